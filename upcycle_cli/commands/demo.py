"""`upcycle demo`, which runs the other commands."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer  # noqa: TC002 - it reads the annotations of a command
from rich.text import Text

from upcycle_cli.commands.shared import DEMO, JsonOption, for_path
from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import check_utf8
from upcycle_cli.printable import shell_line
from upcycle_cli.terminal import errors_to_exit_codes, print_json, stderr, talk

_RECIPE = "E8G8T8"


def demo(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        for_path(metavar="DIR", help="Where to work; a temporary directory unless given."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a small dense model, convert it to E8G8T8, inspect and verify it; needs no network."""
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.demo import make_dense

        say: Callable[..., None] = (lambda *_: None) if json else talk
        folder = directory or Path(tempfile.mkdtemp(prefix="upcycle-demo-"))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UpcycleError(f"{folder} exists and is not empty.", "Choose another directory.")
        dense, moe = str(folder / "dense"), str(folder / f"moe-{_RECIPE}")
        check_utf8(folder)
        say(f"Making a small dense model (llama, random weights) in {dense} …")
        make_dense(Path(dense))
        steps = []
        for arguments in (
            ["inspect", dense],
            ["convert", dense, moe, "--recipe", _RECIPE],
            ["inspect", moe, "--weights", "--dense", dense],
            ["verify", dense, moe],
        ):
            command = ["upcycle", *arguments]
            line = shell_line(command)
            if not json:
                stderr().print(Text(f"\n$ {line}", style="bold"), soft_wrap=True)
            code, result = _run(context, arguments, as_json=json)
            steps.append({"command": command, "exit_code": code, "result": result})
            if code != 0:
                raise UpcycleError(f"`{line}` ended with exit code {code}.")
        say(
            "",
            "The MoE computes what the dense model computes. With a model of your own:",
            "",
            "  upcycle inspect MODEL --recipe E8G8T16",
            "  upcycle convert MODEL MODEL-E8G8T16 --recipe E8G8T16 --verify",
            "",
            f"The demo's files stay in {folder}.",
        )
        if json:
            print_json({"status": "passed", "directory": str(folder), "steps": steps})


def _run(context: typer.Context, arguments: list[str], *, as_json: bool) -> tuple[int, Any]:
    """Run a command here, and return its exit code and what it printed as JSON, if it did."""
    output = io.StringIO()
    with redirect_stdout(output) if as_json else nullcontext():
        code: int | None = context.find_root().command.main(
            [*arguments, "--json"] if as_json else arguments,
            standalone_mode=False,
            # A demo shows what its commands say, whatever is set for real ones.
            auto_envvar_prefix="UPCYCLE_DEMO",
            obj=DEMO,
        )
    return code or 0, loads(output.getvalue() or "null")
