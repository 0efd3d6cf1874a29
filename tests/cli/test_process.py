"""The process as a shell sees it: exit codes whatever happens, and only visible text."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from conftest import RunCli, clone, contents, read_json, read_tensors, validate_json, write_json
from safetensors.torch import save_file

from upcycle_cli.checkpoint.storage import RECORD_NAME

RECIPE = ("--recipe", "E2G2T2")
WEIGHTS = "model.safetensors"
SECONDS = 120  # a hang becomes an error


def run_program(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program that changes something and then calls the command line."""
    return forked.run(arguments, program=program, seconds=SECONDS)


# Text from files and arguments --------------------------------------------------------------------

HOSTILE = "\x1b]0;x\x07\x1b[31m\x9b2J\x7f\u202e\u2066\u200b\u2028\n\r\t[red]x[/red][/x]:smile:"
SHOWN = r"\x1b]0;x\x07\x1b[31m\x9b2J\x7f\u202e\u2066\u200b\u2028\n\r\t[red]x[/red][/x]:smile:"
CUT = SHOWN[:40]  # a message quotes no more
Spoil = Callable[[Path], object]


def hostile_names(path: Path) -> None:
    tensors = {HOSTILE + name: tensor for name, tensor in read_tensors(path).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def hostile_index(path: Path) -> None:
    (path / WEIGHTS).unlink()
    index = {"weight_map": {"model.norm.weight": f"x{HOSTILE}.safetensors"}}
    write_json(path / f"{WEIGHTS}.index.json", index)


def hostile_type(path: Path) -> None:
    write_json(path / "config.json", read_json(path / "config.json") | {"model_type": HOSTILE})


def record_with(value: object) -> Spoil:
    def change(path: Path) -> None:
        keys = ["name", "expansion", "granularity", "scaling", "router_init", "seed"]
        recipe = dict.fromkeys(keys, value)
        changes = {"recipe": recipe, "source": {"name": value}, "parameters": {"dense": value}}
        write_json(path / RECORD_NAME, read_json(path / RECORD_NAME) | changes)

    return change


DENSE: dict[str, tuple[Spoil | None, tuple[str, ...], int, str]] = {
    "tensors": (hostile_names, ("inspect", "DENSE", "--tensors"), 0, SHOWN),
    "index": (hostile_index, ("inspect", "DENSE"), 2, CUT),
    "model_type": (hostile_type, ("inspect", "DENSE"), 2, CUT),
    "record": (record_with(HOSTILE), ("inspect", "MOE"), 0, SHOWN),
    "output": (None, ("convert", "DENSE", HOSTILE.replace("/", "|"), *RECIPE), 0, CUT),
    "checks": (None, ("verify", "LLAMA", "MOE", "--checks", HOSTILE), 2, SHOWN),
    "recipe": (None, ("convert", "DENSE", "OUT", "--recipe", HOSTILE), 2, SHOWN),
    "option": (None, ("convert", f"--{HOSTILE}"), 2, "[/x]:smile:"),
    "command": (None, (HOSTILE,), 2, "[/x]:smile:"),
}


def check_harmless(text: str) -> None:
    assert [character for character in text if not character.isprintable()] == ["\n"] * text.count(
        "\n"
    )
    # No line break from a file begins a line of ours.
    assert not re.search(r"^(\\r|\[red])", text, re.MULTILINE)


@pytest.mark.parametrize(("spoil", "arguments", "code", "shown"), DENSE.values(), ids=DENSE)
def test_hostile_text_is_shown_and_not_interpreted(
    run_cli: RunCli,
    llama: Path,
    e2g2t2: Path,
    tmp_path: Path,
    spoil: Spoil | None,
    arguments: tuple[str, ...],
    code: int,
    shown: str,
) -> None:
    name = "MOE" if "MOE" in arguments else "DENSE"
    copy = clone(e2g2t2 if name == "MOE" else llama, tmp_path / name)
    if spoil is not None:
        spoil(copy)
    words = [str(llama) if word == "LLAMA" else word for word in arguments]
    for form, colour in (((), {}), (("--json",), {}), ((), {"FORCE_COLOR": "1", "TERM": "xterm"})):
        done = run_cli(*words, *form, cwd=tmp_path, **colour)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", done.stdout + done.stderr)
        assert colour or text == done.stdout + done.stderr
        check_harmless(text)
        # A table folds long text.
        assert form or "".join(shown.split()) in "".join(text.split())


@pytest.mark.parametrize("value", [None, True, -1e400, "x" * 10_000, [[]], {"a": {}}, ["\x1b"]])
def test_a_record_can_hold_any_value(
    run_cli: RunCli, e2g2t2: Path, tmp_path: Path, value: object
) -> None:
    copy = clone(e2g2t2, tmp_path / "moe")
    record_with(value)(copy)
    done = run_cli("inspect", copy)
    assert done.returncode == 0, done.stderr
    check_harmless(done.stdout)
    validate_json("inspect", run_cli("inspect", copy, "--json").stdout)


# Streams ------------------------------------------------------------------------------------------

COMMANDS = {
    "--help": 0,
    "inspect DENSE --json": 0,
    "inspect ABSENT": 2,
    "no-such-command": 2,
    # A conversion does not need its streams, and its messages do not end up in its files.
    "convert DENSE moe --recipe E2G2T2": 0,
}
DATA_IS_LOST = (">/dev/full", "<&- >&- 2>&-")
TALK_IS_LOST = ("2>&-", "2>&1 | true")


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command, _, pipe = line.partition(" | ")
    line = f"{sys.executable} -m upcycle_cli {command}" + (
        f" | {pipe}; exit ${{PIPESTATUS[0]}}" if pipe else ""
    )
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, cwd=cwd, timeout=SECONDS
    )


@pytest.mark.parametrize("redirection", DATA_IS_LOST + TALK_IS_LOST)
def test_exit_codes_depend_on_stdout_only(
    llama: Path, e2g2t2: Path, tmp_path: Path, redirection: str
) -> None:
    for command, code in COMMANDS.items():
        done = shell(f"{command.replace('DENSE', str(llama))} {redirection}", tmp_path)
        lost = code == 0 and redirection in DATA_IS_LOST
        assert done.returncode == (2 if lost else code), (command, done.stderr)
        assert "Traceback" not in done.stderr
        if lost and "2>" not in redirection:
            assert "could not write all of stdout" in done.stderr
    assert contents(tmp_path / "moe") == contents(e2g2t2)


# Errors -------------------------------------------------------------------------------------------

RAISES = """
import sys, typer
from upcycle_cli.__main__ import main
class PanicException(BaseException): __module__ = "pyo3_runtime"
def raise_error(*_, **__): {statement}
import upcycle_cli.models.overview as overview
overview.families = raise_error
main()
"""
REFUSALS = {
    "memory": ("raise MemoryError", 2, "no more memory"),
    "threads": ('raise RuntimeError("can\'t start new thread")', 2, "no more memory or threads"),
    "depth": ("raise RecursionError", 2, "nested too deeply"),
    "panic": ("raise PanicException('index out of range')", 2, "index out of range"),
    "library": ("sys.modules['numpy.fft'] = None; import numpy.fft", 2, "cannot be imported"),
    "system": ("raise OSError(5, 'Input/output error')", 2, "Input/output error"),
    "pipe": ("raise BrokenPipeError(32, 'Broken pipe')", 2, "Broken pipe"),
    "exit": ("sys.exit(1)", 2, ""),
    "interrupt": ("raise KeyboardInterrupt", 130, "interrupted"),
    "bug": (f"raise ValueError({HOSTILE!r})", 70, "This is a bug in upcycle"),
}


@pytest.mark.parametrize(("statement", "code", "words"), REFUSALS.values(), ids=REFUSALS)
def test_errors_become_exit_codes_and_words(statement: str, code: int, words: str) -> None:
    for form in ((), ("--json",)):
        done = run_program(RAISES.format(statement=statement), "families", *form)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert ("Traceback" in done.stderr) == (code == 70)
        check_harmless(done.stderr)
        if form and words and code != 70:
            assert words in validate_json("families", done.stdout)["message"]


# Signals ------------------------------------------------------------------------------------------

SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children inherit SIG_IGN
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder())
from upcycle_cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "code", "word", "module"),
    [
        ("SIGHUP", 129, "hung up", "upcycle_cli.cli.app"),
        ("SIGINT", 130, "interrupted", "typer"),
        ("SIGTERM", 143, "terminated", "upcycle_cli.write.writer"),
        ("SIGINT", 130, "interrupted", "numpy"),
    ],
)
def test_a_signal_during_an_import(
    llama: Path, tmp_path: Path, name: str, code: int, word: str, module: str
) -> None:
    program = SIGNALLED.format(module=module, signal=name)
    command = [sys.executable, "-c", program, "convert", str(llama), str(tmp_path / "moe"), *RECIPE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"error: {word}")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "moe").exists()


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup upcycle convert …` must outlive its terminal."""
    from upcycle_cli.cli import process

    handlers: dict[int, object] = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    process._handle_signals(process.on_signal)  # noqa: SLF001
    assert handlers[signal.SIGHUP] is signal.SIG_IGN
    assert handlers[signal.SIGTERM] is process.on_signal
