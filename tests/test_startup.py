"""What it costs to ask: a command imports what it needs, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upcycle_cli import Recipe, convert

TOLD = """
import atexit, sys
from upcycle_cli.__main__ import main
atexit.register(lambda: print("IMPORTED", *sys.modules, file=sys.stderr))
main()
"""
RUNNING = ("torch", "transformers", "numpy", "safetensors")
PLANNING = (
    "plan.upcycle",
    "plan.tensors",
    "plan.expressions",
    "plan.merge",
    "plan.router_inputs",
    "plan.permutation_file",
    "plan.warnings",
)
RESULTS = (
    "write.transaction",
    "publish.card",
    "verification.verify",
    "publish.push",
    "report.page",
)
MOES = ("plan.expand", "inspection.experts", "inspection.weight_drift")
OTHERS = ("rich.progress", "huggingface_hub", "matplotlib", "jinja2", "tomli_w")


def ours(*names: str) -> set[str]:
    return {f"upcycle_cli.{name}" for name in names}


ANSWERS = ours("checkpoint.checkpoint", "models", "cli.commands.convert", "cli.moe_options")
"""What only a command needs."""


@pytest.mark.parametrize(
    ("arguments", "code", "spared"),
    [
        (
            ("--version",),
            0,
            ours(*PLANNING, *RESULTS, *MOES) | ANSWERS - ours("checkpoint.checkpoint"),
        ),
        (("no-such-command",), 2, ours(*PLANNING) | ANSWERS - ours("checkpoint.checkpoint")),
        (("--help",), 0, ours("models", "cli.render", *PLANNING, *RESULTS, *MOES)),
        (("verify", "--help"), 0, ours("models", "cli.commands.convert", "cli.moe_options")),
        (("convert",), 2, ours("models", "cli.render", *PLANNING, *RESULTS, *MOES)),
        (("families",), 0, ours(*PLANNING, *RESULTS, *MOES, "cli.commands.convert")),
        (
            ("inspect", "DENSE"),
            0,
            ours(*PLANNING, *RESULTS, *MOES, "plan.texts", "cli.commands.convert"),
        ),
        (("inspect", "MOE"), 0, ours(*PLANNING, *RESULTS, "plan.expand", "models.overview")),
        (("inspect", "MOE", "--expand", "2"), 0, ours(*RESULTS, "models.overview")),
        (("inspect", "DENSE", "--recipe", "E2G2T2"), 0, ours(*RESULTS, *MOES)),
        (
            ("convert", "DENSE", "OUTPUT", "--recipe", "E2G2T2", "--dry-run"),
            0,
            ours(*RESULTS, *MOES, "cli.commands.inspect", "inspection.summary"),
        ),
        (
            ("verify", "DENSE", "MOE", "--checks", "directory"),
            0,
            ours(
                "write.transaction",
                "plan.upcycle",
                "plan.expressions",
                "plan.expand",
                "plan.moe_experts",
            )
            | ours("old_verification.weights", "old_verification.outputs", "report.page"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_command_does_not_need_is_not_imported(
    llama: Path, moe: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, spared: set[str]
) -> None:
    paths = {"DENSE": llama, "MOE": moe, "OUTPUT": tmp_path / "moe"}
    command = [str(paths.get(argument, argument)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", TOLD, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    imported = {*done.stderr.splitlines()[-1].split()}
    assert "IMPORTED" in imported
    if arguments[0] != "verify" or "--help" in arguments:
        spared = spared | {*RUNNING, *OTHERS}
    assert spared & imported == set()


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path
