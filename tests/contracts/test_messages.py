"""Messages below the command line name arguments, such as `top_k`; flags are the CLI's business."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import upcycle_cli

ROOT = Path(upcycle_cli.__file__).parent
WITH_FLAGS = {
    *("publish/card.py", "recipe/recipe_file.py", "write/staging.py", "run/models.py"),
    "models/engines.py",
}
"""These write whole commands, and the tables of what an engine needs."""


def test_messages_below_the_command_line_name_no_flags() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docs = {node.value for node in nodes if isinstance(node, ast.Expr)}
        texts = {node for node in nodes if isinstance(node, ast.Constant)} - docs
        if any(re.search(r"(?<![\w-])--[a-z]", str(node.value)) for node in texts):
            found.add(path.relative_to(ROOT).as_posix())
    assert {name for name in found if not name.startswith("cli/")} == WITH_FLAGS
