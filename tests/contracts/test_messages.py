"""Messages name arguments in backticks, as a Python caller has them; the command line has flags."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import upcycle_cli
from upcycle_cli.cli.options import with_flags

ROOT = Path(upcycle_cli.__file__).parent
SHELL = {"publish/card.py", "recipe/recipe_file.py", "write/staging.py", "run/models.py"}
"""These write whole commands."""
TABLES = {"models/engines.py"}
"""What an engine needs, in the words of `--json`."""


def test_messages_below_the_command_line_name_no_flags() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in docs]
        if any(re.search(r"(?<![\w-])--[a-z]", text) for text in texts if isinstance(text, str)):
            found.add(path.relative_to(ROOT).as_posix())
    assert {name for name in found if not name.startswith("cli/")} == SHELL | TABLES


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("leave out `top_k`.", "leave out --top-k."),
        ("pass `allow_inexact=True` or `expand` 2", "pass --allow-inexact or --expand 2"),
        ("`source` of `upcycle demo`: `absent`", "SOURCE of `upcycle demo`: `absent`"),
    ],
)
def test_the_command_line_names_flags(text: str, shown: str) -> None:
    assert with_flags(text) == shown
