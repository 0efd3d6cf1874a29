"""Several processes under torchrun make what one process makes, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import TypeVar

import engine_fixtures as engine
import pytest
from measure import descendants

from upcycle_cli.plan.output import Role
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.staging import NOTE_SUFFIX, partial_of

T = TypeVar("T")
BF16_MILLION = 0x4974  # 999,424, which float16 cannot hold
SIZES = {"max_shard_bytes": 100_000}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.make_dense(tmp_path_factory.mktemp("team") / "dense", layers=3)


def command(dense: Path, output: Path, *options: str) -> list[str]:
    return engine.convert_command(
        dense, output, "--max-shard-size", "100KB", *options, recipe="E4G2T4"
    )


def team_of(size: int) -> Team:
    team = Team()
    team.size = size
    return team


def test_a_team_makes_what_one_process_makes(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "work" / "moe"
    engine.execute(engine.plan_of(dense, "E4G2T4", **SIZES), tmp_path / "reference")
    done = engine.run(engine.torchrun_command(3, command(dense, output, "--json")))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "converted"  # one object: other ranks are silent
    assert engine.contents(output) == engine.contents(tmp_path / "reference")
    assert [entry.name for entry in output.parent.iterdir()] == ["moe"]
    again = engine.run(engine.torchrun_command(3, command(dense, output)))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing to do") == 1


@pytest.mark.parametrize(
    "how",
    [
        ("--router-init", "balanced"),
        ("--noise", "0.1", "--allow-inexact"),
        ("--experts-from", "other", "--allow-inexact"),
    ],
    ids=" ".join,
)
def test_a_team_shares_a_calibration_draws_and_models(
    llama: Path, dense: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    source = llama if "balanced" in how else dense
    other = shutil.copytree(dense, tmp_path / "other")
    engine.set_value(other, "model.layers.0.mlp.up_proj.weight", 0x3F00)
    options = [str(other) if option == "other" else option for option in how]
    one = command(source, tmp_path / "one" / "moe", *options)
    two = engine.torchrun_command(2, command(source, tmp_path / "two" / "moe", *options))
    for line in (one, two):
        done = engine.run(line)
        assert done.returncode == 0, done.stderr
    assert engine.contents(tmp_path / "one") == engine.contents(tmp_path / "two")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_balanced(dense: Path, size: int) -> None:
    shards, team = engine.plan_of(dense, "E4G2T4", **SIZES).shards, team_of(size)
    shares = [team.share_of(shards, rank) for rank in range(size)]
    names = sorted(shard.name for share in shares for shard in share)
    assert names == sorted(shard.name for shard in shards)
    loads = [sum(shard.nbytes for shard in share) for share in shares]
    assert max(loads) - min(loads) <= max(shard.nbytes for shard in shards)


# The launcher -------------------------------------------------------------------------------------

HERE = {"MASTER_ADDR": "localhost", "UPCYCLE_JOIN_SECONDS": "2"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "8", "RANK": "3"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        (
            HERE | {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "PORT"},
            "not all of these",
        ),
    ],
    ids=str,
)
def test_an_incomplete_launcher_is_refused(
    dense: Path, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    given = {name: value.replace("PORT", port) for name, value in variables.items()}
    done = engine.run(command(dense, tmp_path / "moe"), **given)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert words in done.stderr
    assert "unset WORLD_SIZE and RANK" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Failures -----------------------------------------------------------------------------------------


def assert_fails(words: list[str], message: str) -> None:
    """The job fails, and its ranks say so once."""
    done = engine.run(words)
    assert done.returncode != 0
    assert "directory" not in done.stdout  # at most the plan
    # torch logs lost connections, in lines of its own, and ends the ranks that are still there.
    ours = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(ours - {"error: terminated."}) == 1, done.stderr
    assert done.stderr.count(message) == 1
    # The launcher shows a traceback of its own.
    assert f'File "{engine.ROOT}/upcycle_cli' not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_rank_is_said_once(dense: Path, tmp_path: Path, rank: int) -> None:
    spoilt, output = shutil.copytree(dense, tmp_path / "dense"), tmp_path / "moe"
    share = team_of(2).share_of(
        engine.plan_of(dense, "E4G2T4", dtype="float16", **SIZES).shards, rank
    )
    copied = (tensor for shard in share for tensor in shard.tensors if tensor.role is Role.COPIED)
    name = next(tensor.name for tensor in copied if "norm" not in tensor.name)
    engine.set_value(spoilt, name, BF16_MILLION)
    words = engine.torchrun_command(2, command(spoilt, output, "--dtype", "float16"))
    assert_fails(words, f"rank {rank}: {name}")
    assert not output.exists()
    assert not partial_of(output).exists()  # no engine.run could ever complete it


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (2, "do not see the same source"),
        (3, "moe1.partial is not the directory that rank 0"),
    ],
    ids=["sources", "outputs"],
)
def test_ranks_on_different_file_systems_are_refused(
    dense: Path, tmp_path: Path, argument: int, message: str
) -> None:
    for rank in range(2):
        shutil.copytree(dense, tmp_path / f"dense{rank}")
    engine.set_value(tmp_path / "dense1", "model.layers.0.mlp.up_proj.weight", 0x3F00)
    script = tmp_path / "own.py"
    script.write_text(
        "import os, sys\n"
        "from upcycle_cli.__main__ import main\n"
        f"sys.argv[{argument}] += os.environ['RANK']\n"
        "main()\n"
    )
    source = tmp_path / "dense" if argument == 2 else dense
    own = command(source, tmp_path / "out" / "moe")
    assert_fails(engine.torchrun_command(2, [own[0], str(script), *own[3:]]), message)
    assert not (tmp_path / "out" / "moe").exists()
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.long
def test_a_job_whose_rank_is_killed_resumes(tmp_path: Path) -> None:
    dense = engine.make_dense(tmp_path / "dense", hidden=512, inner=1024, layers=4, vocab=256)
    output = tmp_path / "moe"
    options = ("--max-shard-size", "5MB", "--json")
    words = engine.torchrun_command(2, engine.convert_command(dense, output, *options))
    job = engine.start(words)
    assert engine.wait_until(lambda: list(partial_of(output).glob(f"*{NOTE_SUFFIX}")), job)
    (pid,) = (pid for pid in descendants(job.pid) if is_rank_1(pid))
    os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=engine.SUBPROCESS_SECONDS)
    assert job.returncode != 0
    assert not output.exists()
    done = engine.run(words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_bytes"] > 0
    engine.execute(engine.plan_of(dense, max_shard_bytes=5_000_000), tmp_path / "reference")
    assert engine.contents(output) == engine.contents(tmp_path / "reference")


def is_rank_1(pid: int) -> bool:
    try:
        return b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
