"""A command imports what it needs and no more: torch takes seconds, --help must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys
from upcycle_cli.__main__ import main
atexit.register(lambda: print("IMPORTED", *sys.modules, file=sys.stderr))
main()
"""
LIBRARIES = {"torch", "transformers", "numpy", "safetensors"}
RARE = {"rich.progress", "huggingface_hub", "matplotlib", "jinja2", "tomli_w", "jsonschema"}
OURS = "upcycle_cli."
PLANNING = ("plan.upcycle", "plan.tensors", "plan.expressions", "plan.merge", "plan.facts")
RESULTS = ("api", "write.staging", "publish.card", "verification.verify", "report.page")
MOES = ("plan.expand", "inspection.experts", "inspection.weight_drift")
COMMANDS = ("cli.commands.convert", "cli.commands.inspect", "models")
RECIPE = ("--recipe", "E2G2T2")


@pytest.mark.parametrize(
    ("arguments", "code", "not_imported"),
    [
        (("--help",), 0, (*PLANNING, *RESULTS, *MOES, "models")),
        (("--version",), 0, (*PLANNING, *RESULTS, *MOES, *COMMANDS)),
        (("convert", "--help"), 0, (*PLANNING, *RESULTS, *MOES, "models")),
        (("families",), 0, (*PLANNING, *RESULTS, *MOES, "cli.commands.convert")),
        (("inspect", "DENSE"), 0, (*PLANNING, *RESULTS, *MOES, "cli.commands.convert")),
        (("inspect", "MOE", "--json"), 0, (*PLANNING, *RESULTS, "models.overview")),
        (("inspect", "MOE", "--expand", "2"), 0, (*RESULTS, "models.overview")),
        (("inspect", "DENSE", *RECIPE, "--tensors"), 0, (*RESULTS, *MOES)),
        (
            ("convert", "DENSE", "OUT", *RECIPE, "--dry-run"),
            0,
            ("publish.push", "verification.verify", "report.page", "cli.commands.inspect", *MOES),
        ),
        (
            ("verify", "DENSE", "MOE", "--checks", "directory"),
            0,
            ("report.page", "cli.commands.convert"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_imports_no_more_than_it_needs(
    llama: Path,
    e2g2t2: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    not_imported: tuple[str, ...],
) -> None:
    places = {"DENSE": llama, "MOE": e2g2t2, "OUT": tmp_path / "moe"}
    imported = imports_of(*(str(places.get(word, word)) for word in arguments), code=code)
    assert imported & {f"{OURS}{name}" for name in not_imported} == set()
    assert imported & LIBRARIES == set()
    # verify shows a progress bar, and an absent directory may be a repo on the Hub.
    assert code or arguments[0] == "verify" or imported & RARE == set()


def test_a_conversion_imports_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    imported = imports_of("convert", str(llama), str(tmp_path / "moe"), *RECIPE, code=0)
    assert imported & LIBRARIES == {"numpy"}


def imports_of(*arguments: str, code: int) -> set[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    imported = {*done.stderr.splitlines()[-1].split()}
    assert "IMPORTED" in imported
    return imported
