"""The process as a shell sees it: exit codes whatever happens, and nothing raw on the screen."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import RunCli, clone, contents, read_json, validate_json, write_json

from upcycle_cli import Recipe, convert
from upcycle_cli.checkpoint.storage import RECORD_NAME

RECIPE = ("--recipe", "E2G2T2")
WEIGHTS = "model.safetensors"
SECONDS = 120  # a hang ends in an error


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


@pytest.fixture(scope="module")
def broken(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = clone(moe, tmp_path_factory.mktemp("broken") / "moe")
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1])
    return path


# What is shown ------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;x\x07\x1b[31m\x9b2J\x7f\u202e\u2066\u200b\u2028\n\r\t[red]x[/red][/x]:smile:"
SHOWN = r"\x1b]0;x\x07\x1b[31m\x9b2J\x7f\u202e\u2066\u200b\u2028\n\r\t[red]x[/red][/x]:smile:"
Spoil = Callable[[Path], object]


def untouched(_: Path) -> None:
    pass


def edit_header(path: Path, edit: Callable[[str, dict[str, Any]], tuple[str, object]]) -> None:
    raw = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__", None)
    text = json.dumps(dict(edit(name, entry) for name, entry in entries.items())).encode()
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def hostile_tensors(path: Path) -> None:
    edit_header(path, lambda name, entry: (HOSTILE + name, entry))


def hostile_head(path: Path) -> None:
    edit_header(path, lambda name, entry: (HOSTILE * (name == "lm_head.weight") + name, entry))


def hostile_dtypes(path: Path) -> None:
    edit_header(path, lambda name, entry: (name, entry | {"dtype": HOSTILE}))


def hostile_index(path: Path) -> None:
    (path / WEIGHTS).unlink()
    index = {"weight_map": {"model.norm.weight": f"x{HOSTILE}.safetensors"}}
    write_json(path / f"{WEIGHTS}.index.json", index)


def hostile_config(key: str) -> Spoil:
    return lambda path: write_json(
        path / "config.json", read_json(path / "config.json") | {key: HOSTILE}
    )


def record_with(value: object) -> Spoil:
    def change(path: Path) -> None:
        recipe = dict.fromkeys(("name", "expansion", "granularity", "scaling", "seed"), value)
        changes = {"recipe": recipe, "source": {"name": value}, "parameters": {"dense": value}}
        write_json(path / RECORD_NAME, read_json(path / RECORD_NAME) | changes)

    return change


CUT = SHOWN[:40]  # a message may quote no more
SPOILT: dict[str, tuple[Spoil, tuple[str, ...], int, str]] = {
    "tensors": (hostile_tensors, ("inspect", "DENSE", "--tensors"), 0, SHOWN),
    "unknown tensors": (hostile_tensors, ("convert", "DENSE", "OUT", *RECIPE), 2, "lacks"),
    "tensors of an MoE": (hostile_head, ("verify", "LLAMA", "MOE", "--checks", "weights"), 1, CUT),
    "dtypes": (hostile_dtypes, ("inspect", "DENSE"), 2, CUT),
    "index": (hostile_index, ("inspect", "DENSE"), 2, CUT),
    "model_type": (hostile_config("model_type"), ("inspect", "DENSE"), 2, CUT),
    "model_type of an MoE": (hostile_config("model_type"), ("verify", "LLAMA", "MOE"), 2, CUT),
    "setting of an MoE": (
        hostile_config("hidden_act"),
        ("verify", "LLAMA", "MOE", "--checks", "directory"),
        1,
        CUT,
    ),
    "record": (record_with(HOSTILE), ("inspect", "MOE"), 0, SHOWN),
    "directory": (untouched, ("inspect", HOSTILE), 2, SHOWN),
    "output": (untouched, ("convert", "DENSE", HOSTILE.replace("/", "|"), *RECIPE), 0, CUT),
    "prompts": (untouched, ("verify", "LLAMA", "MOE", "--prompts", HOSTILE), 2, SHOWN),
    "checks": (untouched, ("verify", "LLAMA", "MOE", "--checks", HOSTILE), 2, SHOWN),
    "recipe": (untouched, ("convert", "DENSE", "OUT", "--recipe", HOSTILE), 2, SHOWN),
    "scaling": (untouched, ("convert", "DENSE", "OUT", "--scaling", HOSTILE, *RECIPE), 2, SHOWN),
    "value": (untouched, ("convert", "--seed", HOSTILE), 2, "--seed"),
    "choice": (untouched, ("convert", "--routing", HOSTILE), 2, "--routing"),
    "option": (untouched, ("convert", f"--{HOSTILE}"), 2, "[/x]:smile:"),
    "command": (untouched, (HOSTILE,), 2, "[/x]:smile:"),
    "argument": (untouched, ("inspect", "DENSE", HOSTILE), 2, "[/x]:smile:"),
    "config": (untouched, ("convert", "--config", HOSTILE), 2, SHOWN),
    "revision": (untouched, ("inspect", "DENSE", "--revision", HOSTILE), 2, "DENSE"),
}


def assert_harmless(text: str) -> None:
    assert [sign for sign in text if not sign.isprintable() and sign != "\n"] == []
    # No line break of theirs begins a line of ours.
    assert not re.search(r"^(\\r|\[red])", text, re.MULTILINE)


@pytest.mark.parametrize(("spoil", "arguments", "code", "shown"), SPOILT.values(), ids=SPOILT)
def test_what_comes_from_elsewhere_is_only_shown(
    run_cli: RunCli,
    llama: Path,
    moe: Path,
    tmp_path: Path,
    spoil: Spoil,
    arguments: tuple[str, ...],
    code: int,
    shown: str,
) -> None:
    name = "MOE" if "MOE" in arguments else "DENSE"
    spoil(clone(moe if name == "MOE" else llama, tmp_path / name))
    words = [str(llama) if word == "LLAMA" else word for word in arguments]
    for form, colour in (((), {}), (("--json",), {}), ((), {"FORCE_COLOR": "1", "TERM": "xterm"})):
        done = run_cli(*words, *form, cwd=tmp_path, **colour)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", done.stdout + done.stderr)
        assert colour or text == done.stdout + done.stderr
        assert_harmless(text)
        # A table folds what is long.
        assert form or "".join(shown.split()) in "".join(text.split())


@pytest.mark.parametrize("value", [None, True, 5, -1e400, "x" * 10_000, [[]], {"a": {}}, ["\x1b"]])
def test_a_record_can_hold_any_value(
    run_cli: RunCli, moe: Path, tmp_path: Path, value: object
) -> None:
    copy = clone(moe, tmp_path / "moe")
    record_with(value)(copy)
    done = run_cli("inspect", copy)
    assert done.returncode == 0, done.stderr
    assert_harmless(done.stdout)
    assert len(done.stdout) < 2000
    as_json = run_cli("inspect", copy, "--json").stdout
    assert_harmless(as_json)
    validate_json("inspect", as_json)


def run_program(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command after, and by, a program that changes something first."""
    return forked.run(arguments, program=program, seconds=SECONDS)


def test_a_traceback_is_only_shown(tmp_path: Path) -> None:
    done = run_program(
        "from upcycle_cli import cli, publish\n"
        f"def clean(*_, **__): raise ValueError({HOSTILE!r})\n"
        "publish.clean = clean\ncli.main()",
        "clean",
        tmp_path / "x",
    )
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert "[red]x[/red][/x]:smile:" in done.stderr
    assert [sign for sign in done.stderr if not sign.isprintable() and sign != "\n"] == []


@pytest.mark.parametrize("extra", [(), ("--tensors",), ("--recipe", "E1G1T1")])
def test_nothing_follows_a_line(run_cli: RunCli, llama: Path, extra: tuple[str, ...]) -> None:
    for colour in ({}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}):
        done = run_cli("inspect", llama, *extra, **colour)
        text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
        assert text
        assert [line for line in text.splitlines() if line.endswith(" ")] == []


def test_a_log_has_whole_lines(run_cli: RunCli, llama: Path, tmp_path: Path) -> None:
    done = run_cli("convert", llama, tmp_path / "moe", *RECIPE, COLUMNS="40")
    (note,) = (line for line in done.stderr.splitlines() if line.startswith("note:"))
    assert note.endswith("trained better, at a tiny scale.")


# Streams ------------------------------------------------------------------------------------------

COMMANDS = {
    "--help": 0,
    "--version": 0,
    "inspect DENSE": 0,
    "inspect DENSE --tensors": 0,
    "inspect DENSE --json": 0,
    "verify DENSE BROKEN": 1,
    "verify DENSE BROKEN --json": 1,
    "verify DENSE BROKEN --quiet": 1,
    "inspect ABSENT": 2,
    "inspect ABSENT --json": 2,
    "convert --seed x": 2,
    "no-such-command": 2,
}
DATA_IS_LOST = (">/dev/full", ">&-", ">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-")
TALK_IS_LOST = ("2>/dev/full", "2>&-", "<&-", "| true", "2>&1 | true")


def shell(line: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command, _, pipe = line.partition(" | ")
    line = f"{shlex.join(forked.command())} {command}" + (
        f" | {pipe}; exit ${{PIPESTATUS[0]}}" if pipe else ""
    )
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, cwd=cwd, timeout=SECONDS
    )


@pytest.mark.parametrize("redirection", DATA_IS_LOST + TALK_IS_LOST)
def test_1_says_that_a_verification_failed(
    llama: Path, broken: Path, tmp_path: Path, redirection: str
) -> None:
    for command, code in COMMANDS.items():
        line = command.replace("DENSE", f"'{llama}'").replace("BROKEN", f"'{broken}'")
        done = shell(f"{line} {redirection}", tmp_path)
        lost = code == 0 and redirection in DATA_IS_LOST
        assert done.returncode == (2 if lost else code), (line, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
        if lost and "2>" not in redirection:
            assert "not all of stdout could be written" in done.stderr


@pytest.mark.parametrize("redirection", DATA_IS_LOST + TALK_IS_LOST)
def test_a_conversion_does_not_need_its_streams(
    llama: Path, moe: Path, tmp_path: Path, redirection: str
) -> None:
    """Nor does what it says end up in a file that has got the number of a closed one."""
    done = shell(f"convert '{llama}' moe --recipe E2G2T2 {redirection}", tmp_path)
    assert done.returncode == (2 if redirection in DATA_IS_LOST else 0)
    assert contents(tmp_path / "moe") == contents(moe)


def test_a_pipe_that_does_not_wait(llama: Path) -> None:
    """Whoever has the other end of stdout may have made it one that refuses what it cannot hold."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command = [*forked.command(), "inspect", str(llama)]
    command += ["--recipe", "E64G1T1", "--tensors", "--json"]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        with open(reading, "rb") as file:  # noqa: PTH123 - a descriptor
            text = file.read()
    assert process.returncode == 0
    assert len(text) > 1 << 16  # more than a pipe holds
    assert len(json.loads(text)["tensors"]) > 300


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_in_every_locale(run_cli: RunCli, llama: Path, tmp_path: Path, encoding: str) -> None:
    copy = clone(llama, tmp_path / "ö–漢")
    done = run_cli("inspect", copy, *RECIPE, "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout)["plan"]["source"] == "ö–漢"


@pytest.mark.parametrize("password", ["1234", "bytes", "null", "status"])
def test_a_password_breaks_no_json(run_cli: RunCli, llama: Path, password: str) -> None:
    arguments = ("inspect", llama, *RECIPE, "--json")
    proxy = f"http://user:{password}@localhost"
    done = run_cli(*arguments, HTTPS_PROXY=proxy)
    assert json.loads(done.stdout) == json.loads(run_cli(*arguments).stdout)


# What the system refuses --------------------------------------------------------------------------

RAISES = """
import sys
from upcycle_cli.write import evaluate as arithmetic
from upcycle_cli.cli.app import app as cli
class PanicException(BaseException): __module__ = "pyo3_runtime"
def evaluate(*_): {what}
arithmetic.evaluate = evaluate
cli.main()
"""
REFUSALS = {
    "memory": ("raise MemoryError", "no more memory"),
    "memory of torch": (
        'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")',
        "memory",
    ),
    "threads": ('raise RuntimeError("can\'t start new thread")', "no more threads"),
    "Python": ("raise SystemError('no exception was set')", "Python gave up"),
    "depth": ("raise RecursionError", "nested too deeply"),
    "panic": ("raise PanicException('index out of range')", "index out of range"),
    "library": ("sys.modules['numpy.fft'] = None; import numpy.fft", "cannot be imported"),
    "system": ("raise OSError(5, 'Input/output error')", "Input/output error"),
    "exit": ("sys.exit(1)", ""),
    "C's exit": ("import ctypes; ctypes.CDLL(None).exit(1)", "a library has ended the process"),
    "pipe": ("raise BrokenPipeError(32, 'Broken pipe')", "Broken pipe"),
}


@pytest.mark.parametrize(("what", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_system_refuses_is_said(
    llama: Path, tmp_path: Path, what: str, words: str
) -> None:
    for form in ((), ("--json",)):
        program = RAISES.format(what=what)
        done = run_program(program, "convert", llama, tmp_path / "moe", *RECIPE, *form)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert words in done.stderr
        assert not (tmp_path / "moe").exists()
        if form and words:
            assert words in validate_json("convert", done.stdout)["message"]


@pytest.mark.parametrize("where", ["threading._start_new_thread", "_thread.start_new_thread"])
def test_threads_that_cannot_be_started(llama: Path, tmp_path: Path, where: str) -> None:
    program = (
        "import threading, _thread\nfrom upcycle_cli import cli\n"
        'def refuse(*_): raise RuntimeError("can\'t start new thread")\n'
        f"{where} = refuse\ncli.main()"
    )
    done = run_program(program, "convert", llama, tmp_path / "moe", *RECIPE)
    expected = 2 if where.startswith("threading") else 0  # threading has the function already
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kilobytes", [25_000, 50_000, 100_000, 300_000, 600_000])
@pytest.mark.parametrize(
    "command",
    ["inspect DENSE", "convert DENSE moe --recipe E2G2T2", "verify DENSE MOE --checks weights"],
)
def test_little_memory(
    llama: Path, moe: Path, tmp_path: Path, kilobytes: int, command: str
) -> None:
    line = command.replace("DENSE", f"'{llama}'").replace("MOE", f"'{moe}'")
    limited = f"ulimit -v {kilobytes}; exec '{sys.executable}' -m upcycle_cli {line}"
    done = subprocess.run(
        ["bash", "-c", limited],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,  # Python can ask for memory for ever
    )
    if any(words in done.stderr for words in ("Fatal Python error", "import the site module")):
        pytest.skip("not even Python starts")
    # The C library itself may give up on torch, with a code or a signal of its own.
    own = done.returncode in (0, 2)
    assert own or (command.startswith("verify") and done.returncode != 1), done.stderr
    assert done.returncode != 2 or "error: " in done.stderr


def test_a_directory_that_is_gone(llama: Path, moe: Path, tmp_path: Path) -> None:
    for command in (
        f"inspect '{llama}'",
        f"verify '{llama}' '{moe}'",
        "demo",
        "clean x",
        f"convert '{llama}' '{tmp_path}/x' --recipe E2G2T2",
    ):
        (tmp_path / "gone").mkdir()
        line = f"cd gone; rmdir ../gone; exec {shlex.join(forked.command())} {command}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 2
        assert "the current directory is gone" in done.stderr
    assert list(tmp_path.iterdir()) == []


# A file that is cut short -------------------------------------------------------------------------

CUTS = """
import os
from upcycle_cli.checkpoint.checkpoint import checkpoint
from upcycle_cli.cli.app import app as cli
map_file = checkpoint.Reader._map
def cut(self, shard):
    mapped = map_file(self, shard)
    if "cut" in str(self._checkpoint.path):
        os.truncate(self._checkpoint.path / shard, 8192)
    return mapped
checkpoint.Reader._map = cut
cli.main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "cut", "out", "--recipe", "E2G2T2"),
        ("convert", "cut", "out", "--recipe", "E2G2T2", "--dtype", "bfloat16", "--json"),
        ("verify", "cut", "MOE", "--checks", "weights"),
        ("verify", "DENSE", "cut-moe", "--checks", "weights", "--json"),
        ("inspect", "cut-moe", "--weights"),
    ],
    ids=" ".join,
)
def test_a_file_that_is_cut_short_while_it_is_read(
    llama: Path, moe: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    clone(llama, tmp_path / "cut")
    clone(moe, tmp_path / "cut-moe")
    places = {"DENSE": llama, "MOE": moe, **{n: tmp_path / n for n in ("cut", "cut-moe", "out")}}
    done = run_program(CUTS, *(places.get(word, word) for word in arguments))
    assert done.returncode == 2, (done.returncode, done.stderr)
    words = ("was cut short while it was being read", "changed while it was being read")
    message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert message.endswith(tuple(f"{word}." for word in words))
    assert f"cut{'-moe' * ('cut-moe' in arguments)}/{WEIGHTS}" in message
    assert not (tmp_path / "out").exists()
    if "--json" in arguments:
        assert f"error: {validate_json(arguments[0], done.stdout)['message']}" == message


# Signals ------------------------------------------------------------------------------------------

SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so does who inherits that
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder())
from upcycle_cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [("SIGHUP", 129, "hung up"), ("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")],
)
@pytest.mark.parametrize(
    "module", ["upcycle_cli.cli.app", "typer", "upcycle_cli.write.writer", "numpy"]
)
def test_a_signal_while_it_starts(
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


def test_an_interruption_without_a_signal(llama: Path, tmp_path: Path) -> None:
    program = RAISES.format(what="raise KeyboardInterrupt")
    done = run_program(program, "convert", llama, tmp_path / "moe", *RECIPE)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    assert "interrupted" in done.stderr
