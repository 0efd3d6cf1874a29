"""A resumed conversion uses what an earlier run finished, and trusts nothing that was changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import engine_fixtures as engine
import pytest

from upcycle_cli import UpcycleError
from upcycle_cli.api import Conversion
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.staging import (
    MARKER,
    NOTE_SUFFIX,
    TEMPORARY_SUFFIX,
    clean,
    new_of,
    partial_of,
)
from upcycle_cli.write.writer import WriteOptions

RECIPE, SHARD_BYTES = "E4G1T2", 40_000


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.make_dense(tmp_path_factory.mktemp("staging") / "dense")


@pytest.fixture(scope="module")
def plan(dense: Path) -> Plan:
    return engine.plan_of(dense, RECIPE, max_shard_bytes=SHARD_BYTES)


@pytest.fixture(scope="module")
def reference(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("reference") / "moe"
    engine.execute(plan, path)
    return engine.contents(path)


@pytest.fixture
def output(plan: Plan, tmp_path: Path) -> Path:
    """An OUTPUT of which a run has finished three shards, and begun the fourth."""
    output = tmp_path / "moe"
    engine.stopped_after(plan, output, sum(shard.nbytes for shard in plan.shards[:3]))
    assert len(notes(output)) == 3
    return output


def notes(output: Path) -> list[Path]:
    return sorted(partial_of(output).glob(f"*{NOTE_SUFFIX}"))


def shard_bytes(plan: Plan, *numbers: int) -> int:
    return sum(plan.shards[number].nbytes for number in numbers)


def finish(
    plan: Plan,
    output: Path,
    reference: dict[str, str],
    progress: Callable[[int], object] = lambda _: None,
) -> Conversion:
    done = engine.execute(plan, output, hooks=engine.Advance(progress))
    assert engine.contents(output) == reference
    assert not partial_of(output).exists()
    return done


@pytest.mark.parametrize("options", [WriteOptions(), WriteOptions(fsync=False, workers=3)], ids=str)
def test_finished_shards_are_used(plan: Plan, output: Path, options: WriteOptions) -> None:
    names = [note.name.removesuffix(NOTE_SUFFIX) for note in notes(output)]
    os.utime(new_of(output) / names[0])  # a partial that was copied to another disk, say
    before = {name: (new_of(output) / name).stat() for name in names}
    done = engine.execute(plan, output, writing=options)
    assert done.reused_bytes == shard_bytes(plan, 0, 1, 2)
    for name, status in before.items():
        found = (output / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


@pytest.mark.parametrize("change", ["recipe", "source", "companion", "shard size"])
def test_another_plan_is_refused(dense: Path, output: Path, change: str) -> None:
    other = shutil.copytree(dense, output.with_name("dense"))
    if change == "source":
        engine.set_value(other, "model.layers.0.mlp.up_proj.weight", 0x3F00)
    if change == "companion":
        (other / "LICENSE").write_text("Do as we like.\n")
    recipe = "E4G1T3" if change == "recipe" else RECIPE
    changed = engine.plan_of(
        other, recipe, max_shard_bytes=SHARD_BYTES + 1000 * (change == "shard size")
    )
    left = engine.contents(partial_of(output))
    with pytest.raises(UpcycleError, match=r"another recipe or source(?s:.*)overwrite=True.*clean"):
        engine.execute(changed, output)
    assert engine.contents(partial_of(output)) == left
    assert engine.execute(changed, output, overwrite=True).reused_bytes == 0
    engine.execute(changed, output.with_name("reference"))
    assert engine.contents(output) == engine.contents(output.with_name("reference"))


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "no length": lambda data: b"\xff" * 8 + data[8:],
    "header": flip(20),
    "first copy": flip(4096),
    # A byte of each block: each copy of each part, and the router.
    **{f"byte {at}": flip(at) for at in range(4096 + 1234, 29_000, 4096)},
    "last byte": flip(-1),
    "zeros": lambda data: data[:4096] + bytes(len(data) - 4096),
    "gone": lambda _: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_written_again(
    plan: Plan, output: Path, reference: dict[str, str], damage: str
) -> None:
    """Size and time are as they were, as on a disk that forgets."""
    shard = new_of(output) / notes(output)[1].name.removesuffix(NOTE_SUFFIX)
    status = shard.stat()
    data = DAMAGES[damage](shard.read_bytes())
    if data is None:
        shard.unlink()
    else:
        shard.write_bytes(data)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    told: list[int] = []
    done = finish(plan, output, reference, told.append)
    assert done.reused_bytes == shard_bytes(plan, 0, 2)
    assert sum(told) == plan.nbytes  # bytes that were reported while checked are not twice


@pytest.mark.parametrize("text", ["", '{"plan_sha', "[]", "null", "\0\0\0\0"])
def test_a_damaged_note_or_marker_costs_time_only(
    plan: Plan, output: Path, reference: dict[str, str], text: str
) -> None:
    notes(output)[0].write_text(text)
    (partial_of(output) / MARKER).write_text(text)
    assert finish(plan, output, reference).reused_bytes == shard_bytes(plan, 1, 2)


def test_stray_files_do_not_get_into_the_output(
    plan: Plan, output: Path, reference: dict[str, str]
) -> None:
    for name in (f"x{TEMPORARY_SUFFIX}", "stray.safetensors", ".upcycle-00.new", "directory/file"):
        for directory in (partial_of(output), new_of(output)):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("left over")
    stray, seen = new_of(output) / "stray.safetensors", list[bool]()
    finish(plan, output, reference, lambda _: seen.append(stray.exists()))
    assert not any(seen)  # its space is free before anything is written


def test_a_sealed_partial_is_published_by_the_next_run(
    dense: Path,
    plan: Plan,
    tmp_path: Path,
    reference: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run can be killed between the sealing and the renaming."""
    output, rename = tmp_path / "sealed", Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == output:
            raise OSError(5, "stopped by the test")
        return rename(path, target)

    for then in ("clean", "convert"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", refuse)
            with pytest.raises(UpcycleError, match="stopped by the test"):
                engine.execute(plan, output)
        if then == "clean":
            clean(output, remove=True)
    with pytest.raises(UpcycleError, match="another recipe or source"):
        engine.execute(engine.plan_of(dense, "E2G1T2"), output)
    engine.execute(plan, output.with_name("moe"))
    assert engine.execute(plan, output).reused_bytes == plan.nbytes
    assert engine.contents(output).keys() == reference.keys()
