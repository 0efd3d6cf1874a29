"""The check `weights` at the speed of the disk: what it reads, in which memory, when it stops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
import torch
from engine_fixtures import (
    ROOT,
    CannotMountError,
    environment,
    make_dense,
    mounted,
    system,
)

from upcycle_cli import Recipe, convert, open_checkpoint
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.old_verification import extents, scan
from upcycle_cli.old_verification.bits import same_bytes
from upcycle_cli.old_verification.extents import Known, Layout, layout_of
from upcycle_cli.old_verification.sizes import gather_facts
from upcycle_cli.old_verification.weights import check_weights
from upcycle_cli.plan.tensors import Options
from upcycle_cli.recipe.recipe import parse_recipe_name
from upcycle_cli.verification.result import CheckResult, Status

IMAGE_BYTES = 400 << 20  # XFS wants 300 MiB at least
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
RECIPES = ("E8G1T2", "E4G4T4")
ROLES = {
    "unscaled expert": EXPERT.format(1, 5, "w1"),
    "scaled expert": EXPERT.format(1, 5, "w3"),
    "columns": EXPERT.format(0, 7, "w2"),
    "last expert": EXPERT.format(1, -1, "w2"),
    "copied": "model.layers.1.self_attn.k_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
DAMAGE = [
    *((role, "middle") for role in ROLES),
    *(("unscaled expert", place) for place in ("first", "last")),
]


class Heard(Watch):
    def __init__(self) -> None:
        self.told: list[tuple[int, int, str]] = []

    def checked(self, done: int, total: int, unit: str) -> None:
        self.told.append((done, total, unit))


def check(dense: Path, moe: Path, watch: Watch | None = None) -> tuple[CheckResult, frozenset[int]]:
    source, converted = open_checkpoint(dense), open_checkpoint(moe)
    facts = gather_facts(source, converted, moe_names=(), allow_inexact=False)
    return check_weights(facts, watch or Watch())


def make_moe(dense: Path, moe: Path, recipe: str) -> Path:
    expansion, granularity, top_k = parse_recipe_name(recipe)
    wanted = Recipe(expansion=expansion, granularity=granularity, top_k=top_k)
    convert(dense, moe, wanted, target="mixtral")
    return moe


def flip(moe: Path, name: str, place: str) -> None:
    """Flip the lowest bit of a tensor's first, middle or last element, in place."""
    entry = open_checkpoint(moe).tensors[name]
    at = {"first": 0, "middle": entry.nbytes // 4 * 2, "last": entry.nbytes - 2}[place]
    with (moe / entry.shard).open("r+b") as file:
        file.seek(entry.offset + at)
        byte = file.read(1)[0]
        file.seek(entry.offset + at)
        file.write(bytes([byte ^ 1]))


def role_name(role: str, moe: Path) -> str:
    count = open_checkpoint(moe).config["num_local_experts"]
    return ROLES[role].replace("-1", str(count - 1))


def medium_dense(path: Path) -> Path:
    """A model of which a quarter of a matrix is whole blocks of a disk."""
    return make_dense(path, hidden=256, inner=1536, layers=2, vocab=256)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium_dense(tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module", params=RECIPES)
def made(
    request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_moe(dense, tmp_path_factory.mktemp("moe") / "moe", request.param)


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A file system that shares extents, with a dense model and MoEs of it."""
    try:
        with mounted(request.param, tmp_path_factory.mktemp("disk") / "fs", IMAGE_BYTES) as path:
            medium_dense(path / "dense")
            for recipe in RECIPES:
                make_moe(path / "dense", path / recipe, recipe)
            yield path
    except CannotMountError as error:
        pytest.skip(str(error))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each comparison was of."""
    sizes: list[int] = []

    def count(left: int, right: int, nbytes: int) -> bool:
        sizes.append(nbytes)
        return same_bytes(left, right, nbytes)

    monkeypatch.setattr(scan, "same_bytes", count)
    return sizes


def test_every_byte_is_compared_once(dense: Path, made: Path, compared: list[int]) -> None:
    found, copied = check(dense, made)
    assert found.status is Status.PASSED, found
    assert copied == {0, 1}
    entries = open_checkpoint(made).tensors.values()
    assert sum(compared) == sum(e.nbytes for e in entries if not e.name.endswith("moe.gate.weight"))


def test_what_was_written_last_is_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last files are those that memory still holds after a conversion."""
    dense = make_dense(tmp_path / "dense", hidden=256, inner=1536, layers=4, vocab=256)
    moe, read = tmp_path / "moe", list[str]()
    wanted = Recipe(expansion=8, granularity=1, top_k=2)
    convert(dense, moe, wanted, target="mixtral", options=Options(max_shard_bytes=21 << 20))

    def note(left: int, right: int, nbytes: int) -> bool:
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= left < last:
                read.append(Path(line.split()[-1]).name)
        return same_bytes(left, right, nbytes)

    monkeypatch.setattr(scan, "same_bytes", note)
    monkeypatch.setattr(scan, "_THREADS", 1)
    check(dense, moe)
    shards = sorted({entry.shard for entry in open_checkpoint(moe).tensors.values()})
    assert len(shards) > 2
    assert list(dict.fromkeys(read)) == shards[::-1]


@pytest.mark.parametrize(("role", "place"), DAMAGE)
def test_a_flipped_bit(dense: Path, made: Path, tmp_path: Path, role: str, place: str) -> None:
    moe = Path(shutil.copytree(made, tmp_path / "moe"))
    name = role_name(role, moe)
    flip(moe, name, place)
    found, copied = check(dense, moe)
    assert found.status is Status.FAILED
    (failure,) = found.failures
    assert name in failure
    layer = {0, 1} - copied
    assert layer == ({int(name.split(".")[2])} if "experts" in name else set())


def test_progress_in_bytes(dense: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_TALK_SECONDS", 0.0)
    heard = Heard()
    check(dense, made, heard)
    done = [done for done, _, _ in heard.told]
    (total,) = {total for _, total, _ in heard.told}
    assert {unit for _, _, unit in heard.told} == {"bytes"}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    assert len(set(done)) > 3
    heard.told.clear()
    monkeypatch.setattr(scan, "_TALK_SECONDS", 3600.0)
    check(dense, made, heard)
    assert len(heard.told) <= 3


def test_what_ends_it_ends_its_threads(
    dense: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal does, which raises in the main thread."""

    class StoppedError(BaseException):
        pass

    class Stopping(Watch):
        def checked(self, done: int, *_: object) -> None:
            if done:
                raise StoppedError

    compared: list[int] = []

    def slow(left: int, right: int, nbytes: int) -> bool:
        compared.append(nbytes)
        time.sleep(0.05)
        return same_bytes(left, right, nbytes)

    monkeypatch.setattr(scan, "same_bytes", slow)
    monkeypatch.setattr(scan, "_STEP_BYTES", 1 << 12)
    before, threads = threading.active_count(), torch.get_num_threads()
    with pytest.raises(StoppedError):
        check(dense, made, Stopping())
    # Of thousands of steps a busy machine may do a few hundred before its threads are told.
    assert sum(compared) < open_checkpoint(made).nbytes / 2
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """30 MB of MLPs become 240 of experts, of which a layer's shards are held: 6 MB."""
    dense = make_dense(tmp_path / "dense", hidden=512, inner=2048, layers=5, vocab=256)
    moe = make_moe(dense, tmp_path / "moe", "E8G4T8")
    code = (
        "import sys, threading; from pathlib import Path; import torch\n"
        "from test_weights_check import anon_bytes, check\n"
        "check(*map(Path, sys.argv[1:3]))\n"  # what torch itself takes when it is first used
        "before, peak, end = anon_bytes(), [0], threading.Event()\n"
        "def sample():\n"
        "    while not end.wait(0.001): peak.append(anon_bytes())\n"
        "sampler = threading.Thread(target=sample); sampler.start()\n"
        "result, _ = check(*map(Path, sys.argv[3:5])); end.set(); sampler.join()\n"
        "assert result.status == 'passed', result\n"
        "print(max(peak) - before)\n"
    )
    small = make_dense(tmp_path / "small", hidden=64, inner=128, layers=1, vocab=64)
    paths = small, make_moe(small, tmp_path / "small_moe", "E2G2T2"), dense, moe
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(OMP_NUM_THREADS="1") | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20e6


def anon_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(s.split()[1]) for s in status.splitlines() if s.startswith("RssAnon")) * 1024


# Extents that are shared


@pytest.mark.parametrize("recipe", RECIPES)
def test_shared_extents_are_not_read_again(disk: Path, compared: list[int], recipe: str) -> None:
    found, copied = check(disk / "dense", disk / recipe)
    assert found.status is Status.PASSED, found
    assert copied == {0, 1}
    # Copies in no more than whole blocks are shared, so the ends of each tensor are read.
    source = open_checkpoint(disk / "dense").nbytes
    assert sum(compared) < 1.2 * source < open_checkpoint(disk / recipe).nbytes / 2
    compared.clear()
    shutil.copytree(disk / recipe, disk / "plain", copy_function=copy_bytes)
    try:
        assert check(disk / "dense", disk / "plain")[0].status is Status.PASSED
        assert sum(compared) > 0.99 * open_checkpoint(disk / recipe).nbytes
    finally:
        shutil.rmtree(disk / "plain")


def copy_bytes(source: str, target: str) -> None:
    """Copy a file without sharing its extents, as `shutil.copy` may."""
    Path(target).write_bytes(Path(source).read_bytes())


@pytest.mark.parametrize(("role", "place"), DAMAGE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flipped_bit_in_a_shared_copy(disk: Path, recipe: str, role: str, place: str) -> None:
    moe = disk / "damaged"
    assert system("cp", "-r", "--reflink=always", disk / recipe, moe).returncode == 0
    try:
        name = role_name(role, moe)
        flip(moe, name, place)
        found, _ = check(disk / "dense", moe)
        (failure,) = found.failures
        assert name in failure
    finally:
        shutil.rmtree(moe)


def test_a_flipped_bit_that_all_copies_share(disk: Path) -> None:
    """What is shared among experts alone is compared once, and then all of them are wrong."""
    moe = disk / "damaged"
    shutil.copytree(disk / "E8G1T2", moe, copy_function=copy_bytes)
    try:
        for expert in range(8):
            flip(moe, EXPERT.format(0, expert, "w1"), "middle")
        entries = open_checkpoint(moe).tensors
        first = entries[EXPERT.format(0, 0, "w1")]
        file = moe / first.shard
        for expert in range(1, 8):
            other = entries[EXPERT.format(0, expert, "w1")]
            block = 4096
            skip = -first.offset % block
            if (other.offset - first.offset) % block == 0:
                share_range(file, first.offset + skip, other.offset + skip, block * 100)
        found, copied = check(disk / "dense", moe)
        assert copied == {1}
        assert len(found.failures) == 8
        assert all("w1" in failure for failure in found.failures)
    finally:
        shutil.rmtree(moe)


def share_range(file: Path, source: int, target: int, nbytes: int) -> None:
    command = ("xfs_io", "-c", f"reflink {file} {source} {target} {nbytes}", str(file))
    if shutil.which(command[0]) is None:
        pytest.skip("xfs_io is not installed")
    assert system(*command).returncode == 0


def test_extents_that_are_not_sure_are_none(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = next((disk / "E8G1T2").glob("*.safetensors"))
    with weights.open("rb") as file:
        before = layout_of(file.fileno())
        assert before.extents
        monkeypatch.setattr(extents, "_MOST_EXTENTS", 3)  # in several calls
        assert layout_of(file.fileno()) == before
        monkeypatch.undo()

        def flagged(descriptor: int, call: int, answer: bytearray) -> None:
            ioctl(descriptor, call, answer)
            for at in range(32 + 40, len(answer), 56):  # the flags of each extent
                answer[at + flag.bit_length() // 9] |= flag >> (8 if flag > 255 else 0)

        monkeypatch.setattr("upcycle_cli.old_verification.extents.fcntl.ioctl", flagged)
        for flag in (0, 0x2, 0x4, 0x8, 0x80, 0x100, 0x200, 0x400, 0x800):
            assert layout_of(file.fileno()) == (before if not flag else Layout(before.device))


def test_systems_that_cannot_tell(dense: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (made / "model.safetensors").open("rb") as file:
        monkeypatch.setattr(extents, "_FILE_SYSTEMS", set())
        assert layout_of(file.fileno()).extents == ()
    monkeypatch.setattr(extents, "_tells", lambda _: True)

    def refuse(*_: object) -> None:
        raise OSError(25, "ENOTTY")

    monkeypatch.setattr("upcycle_cli.old_verification.extents.fcntl.ioctl", refuse)
    assert check(dense, made)[0].status is Status.PASSED


def test_known_places() -> None:
    """Half a value of 100 bytes at disk 1000; then all of it, there and elsewhere."""
    known = Known()
    assert known.new(Layout(1, ((0, 50, 1000),)), 0, 100) == [(0, 50), (50, 100)]
    assert known.new(Layout(1, ((200, 300, 1000),)), 200, 100) == [(50, 100)]
    assert known.new(Layout(1, ((200, 300, 1000),)), 200, 100) == []
    assert known.new(Layout(2, ((200, 300, 1000),)), 200, 100) == [(0, 100)]
    # The same bytes of the disk, at another place of the value.
    assert known.new(Layout(1, ((0, 90, 1000),)), 10, 80) == [(0, 80)]
    # An extent that goes on at both ends, of which less than the value is known.
    assert known.new(Layout(1, ((0, 500, 900),)), 100, 100) == []
    assert known.new(Layout(1, ((0, 500, 901),)), 100, 100) == [(0, 100)]
    assert known.new(Layout(1), 0, 100) == [(0, 100)]
