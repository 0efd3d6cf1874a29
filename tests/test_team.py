"""Several processes under PyTorch's launcher make what one makes, or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import TypeVar

import pytest
from engine_fixtures import (
    PYTHON,
    ROOT,
    SUBPROCESS_SECONDS,
    contents,
    convert_command,
    descendants,
    execute,
    make_dense,
    plan_of,
    run,
    set_value,
    start,
    torchrun_command,
    wait_until,
)

from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.staging import NOTE_SUFFIX, partial_of

T = TypeVar("T")
BF16_MILLION = 0x4974  # 999,424, which float16 cannot hold


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("team") / "dense", layers=3)


def sharded(dense: Path, **options: str) -> Plan:
    return plan_of(dense, "E4G2T4", max_shard_bytes=100_000, **options)


def command(dense: Path, output: Path, *options: str) -> list[str]:
    return convert_command(dense, output, "--max-shard-size", "100KB", *options, recipe="E4G2T4")


@pytest.fixture(scope="module")
def reference(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("reference") / "moe"
    execute(sharded(dense), output)
    return contents(output)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_team_makes_what_one_process_makes(
    dense: Path, tmp_path: Path, reference: dict[str, str], ranks: int
) -> None:
    output = tmp_path / "moe"
    done = run(torchrun_command(ranks, command(dense, output, "--json")))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # one object: the other ranks are silent
    assert said["status"] == "converted"
    assert contents(output) == reference
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]
    again = run(torchrun_command(ranks, command(dense, output)))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing to do") == 1


def test_a_team_writes_from_one_calibration(llama: Path, tmp_path: Path) -> None:
    how = ("--max-shard-size", "20KB", "--router-init", "balanced")
    for output, launch in (("one", list), ("two", lambda line: torchrun_command(2, line))):
        line = convert_command(llama, tmp_path / output, *how, recipe="E4G2T4")
        done = run(launch(line))
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    "how",
    [
        ("--noise", "0.1", "--allow-inexact"),
        ("--reinit", "0.5", "--allow-inexact"),
        ("--experts-from", "other", "--allow-inexact"),
    ],
)
def test_a_team_makes_experts_that_differ(
    dense: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    other = shutil.copytree(dense, tmp_path / "other")
    set_value(other, "model.layers.0.mlp.up_proj.weight", 0x3F00)
    options = [str(other) if option == "other" else option for option in how]
    for output, launch in (("one", list), ("two", lambda line: torchrun_command(2, line))):
        done = run(launch(command(dense, tmp_path / output, *options)))
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_more_ranks_than_shards(dense: Path, tmp_path: Path) -> None:
    whole = convert_command(dense, tmp_path / "moe", recipe="E4G2T4")
    done = run(torchrun_command(3, whole))
    assert done.returncode == 0, done.stderr
    execute(plan_of(dense, "E4G2T4"), tmp_path / "reference")
    assert contents(tmp_path / "moe") == contents(tmp_path / "reference")


def test_a_dry_run_is_printed_once(dense: Path, tmp_path: Path) -> None:
    alone = run(command(dense, tmp_path / "moe", "--dry-run"))
    done = run(torchrun_command(2, command(dense, tmp_path / "moe", "--dry-run")))
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shares_are_all_shards_balanced(dense: Path, size: int) -> None:
    plan = sharded(dense)
    team = Team()
    team.size = size
    shares = [team.share_of(plan.shards, rank) for rank in range(size)]
    assert sorted(shard.name for share in shares for shard in share) == sorted(
        shard.name for shard in plan.shards
    )
    loads = [sum(shard.nbytes for shard in share) for share in shares]
    assert max(loads) - min(loads) <= max(shard.nbytes for shard in plan.shards)


class Pair(Team):
    """Two ranks, of which the other one fails, or agrees with whatever this one has."""

    def __init__(self, failure: UpcycleError | None) -> None:
        super().__init__(rank=0, size=2)
        self.failure = failure

    def exchange(self, value: T) -> list[T]:
        return [value, self.failure if value is None else value]  # type: ignore[list-item]


def test_ranks_agree_on_values_of_their_own() -> None:
    own = object()  # which no other rank ever gets
    assert Team().agree(lambda: own) is own
    assert Pair(None).agree(lambda: own) is own
    assert Pair(None).gather(lambda: 7) == [7, 7]


@pytest.mark.parametrize("kind", [UpcycleError, ResumableError])
def test_what_one_rank_raises_is_raised_by_all(kind: type[UpcycleError]) -> None:
    with pytest.raises(kind, match="rank 1: full") as found:
        Pair(kind("full", "Free some.")).agree(lambda: 7)
    assert found.value.hint == "Free some."

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with pytest.raises(ResumableError, match="writing x failed: No space"):
        Team().agree(fail)


# The launcher --------------------------------------------------------------------------------

HERE = {"MASTER_ADDR": "localhost", "UPCYCLE_JOIN_SECONDS": "2"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"WORLD_SIZE": "8", "RANK": "3"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "without RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "-1", "RANK": "0"}, "WORLD_SIZE is -1"),
        ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE is 1"),
        (HERE | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        (HERE | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "PORT"}, "not all of them came"),
        (HERE | {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "PORT"}, "not all of them came"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_launcher_that_is_not_there(
    dense: Path, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    given = {name: value.replace("PORT", port) for name, value in variables.items()}
    done = run(command(dense, tmp_path / "moe"), **given)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert words in done.stderr
    assert "unset WORLD_SIZE and RANK" in done.stderr
    assert own_traceback(done.stderr) == []
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_waits_for_others_can_be_stopped(dense: Path, tmp_path: Path) -> None:
    alone = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    job = start(command(dense, tmp_path / "moe"), **alone)
    assert wait_until(lambda: len(list(Path(f"/proc/{job.pid}/task").iterdir())) > 1, job)
    job.terminate()
    _, said = job.communicate(timeout=60)
    assert job.returncode == 143
    assert said.count("error: terminated") == 1


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "8", "RANK": "3"}, {"WORLD_SIZE": "", "RANK": "abc"}]
)
def test_other_commands_know_no_launcher(
    dense: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    tool = [PYTHON, "-m", "upcycle_cli"]
    variables |= {"UPCYCLE_DEMO_VERIFY_TOKENS": "64"}  # for a shorter demo
    converts = (["demo", str(tmp_path / "demo"), "--json"], 0)
    for arguments, code in (
        (["inspect", str(dense), "--json"], 0),
        (["clean", str(tmp_path / "x"), "--json"], 2),
        (["push", str(tmp_path), "a/b", "--json"], 2),
        (["verify", str(dense), str(dense), "--json"], 2),
        *([converts] if variables["WORLD_SIZE"] else []),
    ):
        done = run([*tool, *arguments], **variables)
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)
        assert bool(done.stderr) == bool(code)


# Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_fails_the_job_and_is_said_once(
    dense: Path, tmp_path: Path, rank: int
) -> None:
    spoilt = shutil.copytree(dense, tmp_path / "dense")
    plan = sharded(dense, dtype="float16")
    team = Team()
    team.size = 2
    name = next(
        tensor.name
        for shard in team.share_of(plan.shards, rank)
        for tensor in shard.tensors
        if tensor.role == "copied" and "norm" not in tensor.name
    )
    set_value(spoilt, name, BF16_MILLION)
    output = tmp_path / "moe"
    done = run(torchrun_command(2, command(spoilt, output, "--dtype", "float16")))
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("becomes infinite") == 1
    assert done.stderr.count("error: ") == 1
    assert f"rank {rank}: {name}" in done.stderr
    assert own_traceback(done.stderr) == []  # the launcher shows one of its own
    assert not output.exists()
    assert not partial_of(output).exists()  # no run could ever complete it


def test_a_refusal_is_said_once(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    done = run(torchrun_command(2, command(dense, output)))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "exists and is not empty" in done.stderr
    assert contents(output).keys() == {"thesis.tex"}


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    done = run(torchrun_command(2, command(tmp_path / "missing", tmp_path / "moe")))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "does not exist" in done.stderr


def test_ranks_that_see_different_sources_are_refused(dense: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copytree(dense, tmp_path / f"dense{rank}")
    set_value(tmp_path / "dense1", "model.layers.0.mlp.up_proj.weight", 0x3F00)
    script = tmp_path / "own_source.py"
    script.write_text(
        "import os, sys\n"
        "from upcycle_cli.cli.app import main\n"
        f"sys.argv[2] = {str(tmp_path / 'dense')!r} + os.environ['RANK']\n"
        "main()\n"
    )
    own = command(dense, tmp_path / "moe")
    done = run(torchrun_command(2, [own[0], str(script), *own[3:]]))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "do not see the same source" in done.stderr
    assert not (tmp_path / "moe").exists()
    assert not partial_of(tmp_path / "moe").exists()


def test_ranks_that_see_different_outputs_are_refused(dense: Path, tmp_path: Path) -> None:
    """As on two machines that do not share the file system, though they have the same source."""
    script = tmp_path / "own_output.py"
    script.write_text(
        "import os, sys\n"
        "from upcycle_cli.cli.app import main\n"
        "sys.argv[3] += os.environ['RANK']\n"
        "main()\n"
    )
    own = command(dense, tmp_path / "moe")
    done = run(torchrun_command(2, [own[0], str(script), *own[3:]]))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "moe1.partial is not the directory that rank 0 writes to" in done.stderr
    assert own_traceback(done.stderr) == []
    assert [path.name for path in tmp_path.iterdir()] == ["own_output.py"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
@pytest.mark.long
def test_a_rank_that_is_killed(tmp_path: Path, rank: int, number: signal.Signals) -> None:
    dense = make_dense(tmp_path / "dense", hidden=512, inner=1024, layers=4, vocab=256)
    output = tmp_path / "moe"
    options = ("--max-shard-size", "5MB")
    job = start(torchrun_command(2, convert_command(dense, output, *options)))
    assert wait_until(lambda: list(partial_of(output).glob(f"*{NOTE_SUFFIX}")), job)
    (pid,) = (pid for pid in descendants(job.pid) if rank_of(pid) == str(rank))
    os.kill(pid, number)
    job.communicate(timeout=SUBPROCESS_SECONDS)
    assert job.returncode != 0
    assert not output.exists()
    assert partial_of(output).is_dir()
    done = run(torchrun_command(2, convert_command(dense, output, *options, "--json")))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_bytes"] > 0
    execute(plan_of(dense, max_shard_bytes=5_000_000), tmp_path / "reference")
    assert contents(output) == contents(tmp_path / "reference")


def own_traceback(stderr: str) -> list[str]:
    """The lines of a traceback that lead through this tool."""
    return [line for line in stderr.splitlines() if f'File "{ROOT}/upcycle_cli' in line]


def rank_of(pid: int) -> str | None:
    try:
        settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [setting.removeprefix(b"RANK=") for setting in settings if setting.startswith(b"RANK=")]
    return ranks[0].decode() if ranks else None
