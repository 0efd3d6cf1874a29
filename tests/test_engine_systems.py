"""What only Linux, or only some of its file systems can do: all goes well without it.

Each row hides something from the whole process, as a system that lacks it would.
"""

from __future__ import annotations

import fcntl
import json
import os
import textwrap
from pathlib import Path

import forked
import pytest
from engine_fixtures import contents, convert_command, environment, make_dense, plan_of

from upcycle_cli.api import execute
from upcycle_cli.core import platform as system
from upcycle_cli.write.staging import NOTE_SUFFIX, partial_of

HIDE = {
    "nothing": "",
    "fdatasync": "del os.fdatasync",
    "sched_getaffinity": "del os.sched_getaffinity",
    "posix_fadvise": "del os.posix_fadvise",
    "renameat2": """
        hide_from_libc("renameat2", "renameatx_np")
    """,
    "renameat2, under another name": """
        hide_from_libc("renameat2", renameatx_np=ctypes.CDLL(None).renameat2)
    """,
    "an exchange that a file system refuses": """
        from upcycle_cli.write import swap
        swap.exchange = lambda *_: False
    """,
    "FICLONERANGE": "fcntl.ioctl = refuse(errno.ENOTTY)",
    "flock": "fcntl.flock = refuse(errno.ENOSYS)",
    "modes": "os.fchmod = refuse(errno.EPERM)",
    "fsync of directories": """
        fsync = os.fsync
        os.fsync = lambda fd: (
            refuse(errno.EINVAL)() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
        )
    """,
    "F_FULLFSYNC where there is one": "fcntl.F_FULLFSYNC = 51",
    "/proc and /sys": """
        def hook(event, arguments):
            if event in ("open", "os.listdir", "os.scandir"):
                if str(arguments[0]).startswith(("/proc", "/sys")):
                    raise FileNotFoundError(errno.ENOENT, "hidden", arguments[0])
        sys.addaudithook(hook)
    """,
}
HIDE = {name: textwrap.dedent(code) for name, code in HIDE.items()}
HIDE["all of it"] = "\n".join(
    code for name, code in HIDE.items() if not name.startswith("renameat2")
)

PROGRAM = """
import ctypes, errno, fcntl, os, signal, stat, sys, types

def refuse(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))
    return call

def hide_from_libc(*hidden, _real=ctypes.CDLL, **others):
    class Library:
        def __init__(self, library):
            self._library = library
        def __getattr__(self, name):
            if name in hidden:
                raise AttributeError(name)
            return others.get(name) or getattr(self._library, name)
        def __getitem__(self, name):
            return self._library[name]
    ctypes.CDLL = lambda *a, **k: _real(*a, **k) if a[0] else Library(_real(*a, **k))

def kill_at_write(number, pwrite=os.pwrite):
    left = [number]
    def counting(*arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(*arguments)
    os.pwrite = counting

if sys.argv[1] != "0":
    kill_at_write(int(sys.argv[1]))
del sys.argv[1]
{hide}
from upcycle_cli.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("systems") / "dense")


@pytest.fixture(scope="module")
def references(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    found = {}
    for recipe in ("E4G1T2", "E2G2T2"):
        output = tmp_path_factory.mktemp("reference") / recipe
        execute(plan_of(dense, recipe, max_shard_bytes=40_000), output)
        found[recipe] = contents(output)
        del found[recipe]["README.md"]  # which says whether it was verified
    return found


@pytest.mark.parametrize("hidden", HIDE)
def test_everything_goes_without(
    dense: Path,
    tmp_path: Path,
    references: dict[str, dict[str, str]],
    hidden: str,
) -> None:
    output = tmp_path / "moe"
    program = PROGRAM.format(hide=HIDE[hidden])

    def upcycle(recipe: str, *options: str, kill_at: int = 0) -> dict[str, object]:
        command = convert_command(dense, output, "--max-shard-size", "40KB", "--json", *options,
                                  recipe=recipe)  # fmt: skip
        arguments = [str(kill_at), *command[3:]]
        done = forked.run(arguments, program=program, environment=environment())
        assert done.returncode == (-9 if kill_at else 0), done.stderr
        return {} if kill_at else dict(json.loads(done.stdout))

    def check(recipe: str) -> None:
        found = contents(output)
        del found["README.md"]
        assert found == references[recipe]
        assert [path.name for path in tmp_path.iterdir()] == ["moe"]

    upcycle("E4G1T2", kill_at=40)
    assert list(partial_of(output).glob(f"*{NOTE_SUFFIX}"))
    assert upcycle("E4G1T2")["reused_bytes"]
    check("E4G1T2")
    report = upcycle("E2G2T2", "--overwrite", "--verify")["verification"]
    assert isinstance(report, dict)
    statuses = {part["name"]: part["status"] for part in report["checks"]}
    assert {statuses[name] for name in ("structure", "weights", "claims")} == {"passed"}
    check("E2G2T2")


def test_macos_asks_the_disk_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fsync ends in the disk's cache."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("that is not enough"))
    with (tmp_path / "file").open("w") as file:
        system.make_durable(file.fileno())
        assert calls == [(file.fileno(), 51)]
