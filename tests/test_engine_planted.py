"""Directories that others can write to: what is planted there is not followed, nor trusted."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import stops_after
from engine_fixtures import Advance, contents, make_dense, plan_of

from upcycle_cli import UpcycleError
from upcycle_cli.api import Conversion, execute
from upcycle_cli.core.errors import ResumableError
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.staging import MARKER, NOTE_SUFFIX, SEAL, TEMPORARY_SUFFIX, partial_of
from upcycle_cli.write.transaction import clean
from upcycle_cli.write.writer import WriteOptions

SECRET = b"somebody's secret"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("planted") / "dense")


@pytest.fixture(scope="module")
def plan(dense: Path) -> Plan:
    return plan_of(dense, "E4G1T2", max_shard_bytes=40_000)


@pytest.fixture(scope="module")
def reference(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("reference") / "moe"
    execute(plan, output)
    return contents(output)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "moe"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


def interrupt(plan: Plan, output: Path, num_shards: int = 3) -> Path:
    """Leave the partial of a run that ended after so many shards; return it."""
    stop = stops_after(sum(shard.nbytes for shard in plan.shards[:num_shards]))
    with pytest.raises(ResumableError, match="stopped by the test"):
        execute(plan, output, hooks=Advance(stop), writing=WriteOptions(workers=1))
    return partial_of(output)


def run_during(
    plan: Plan,
    output: Path,
    act: Callable[[], None],
    *,
    overwrite: bool = False,
    checksums: bool = False,
) -> Conversion:
    """Convert, and let somebody act in the middle of it."""
    acted = False

    def once(_: int) -> None:
        nonlocal acted
        if not acted:
            acted = True
            act()

    return execute(plan, output, overwrite=overwrite, checksums=checksums, hooks=Advance(once))


# What lies in OUTPUT.partial ---------------------------------------------------------------------

FIRST, LAST = "model-00001-of-00015.safetensors", "model-00015-of-00015.safetensors"
PLANTED = [
    MARKER,
    SEAL,
    f"{MARKER}.new",
    FIRST,
    FIRST + NOTE_SUFFIX,
    LAST,
    LAST + NOTE_SUFFIX,
    LAST + TEMPORARY_SUFFIX,
    "config.json",
    "model.safetensors.index.json",
    "LICENSE",
    "README.md",
    "upcycle.json",
    "SHA256SUMS",
    ".upcycle-00.new",
]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("way", ["link", "dangling link", "hard link", "directory link"])
@pytest.mark.parametrize("name", PLANTED)
def test_nothing_is_written_through_a_link(
    plan: Plan,
    output: Path,
    victim: Path,
    reference: dict[str, str],
    name: str,
    way: str,
    when: str,
) -> None:
    assert {FIRST, LAST} <= reference.keys()
    elsewhere = victim.with_name("elsewhere")

    def plant() -> None:
        place = partial_of(output) / name
        place.unlink(missing_ok=True)
        match way:
            case "link":
                place.symlink_to(victim)
            case "dangling link":
                place.symlink_to(elsewhere)
            case "hard link":
                place.hardlink_to(victim)
            case "directory link":
                elsewhere.mkdir()
                (elsewhere / "thesis.tex").write_bytes(SECRET)
                place.symlink_to(elsewhere)

    if when == "before":
        interrupt(plan, output)
        plant()
        execute(plan, output, checksums=True)
    else:
        run_during(plan, output, plant, checksums=True)
    assert victim.read_bytes() == SECRET
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    if way == "directory link":
        assert contents(elsewhere).keys() == {"thesis.tex"}
    else:
        assert not elsewhere.exists()
    found = contents(output)
    assert found.pop("SHA256SUMS")
    assert found == reference
    assert not any(path.is_symlink() for path in output.rglob("*"))


@pytest.mark.parametrize("way", ["hard link", "owner"])
@pytest.mark.parametrize("name", [FIRST, FIRST + NOTE_SUFFIX])
def test_a_shard_or_note_of_somebody_else_is_not_used(
    plan: Plan, output: Path, reference: dict[str, str], name: str, way: str
) -> None:
    """Whatever it holds: that may change under us."""
    path = interrupt(plan, output) / name
    if way == "hard link":
        path.with_name("other").hardlink_to(path)
        path.with_name("other").rename(output.with_name("other"))
    else:
        needs_root()
        os.chown(path, 12345, -1)
    done = execute(plan, output)
    assert done.reused_bytes == sum(shard.nbytes for shard in plan.shards[1:3])
    assert contents(output) == reference


LIES: dict[str, object] = {
    "routers": {"model.layers.0.block_sparse_moe.gate.weight": "0" * 64, "thesis": "1" * 64},
    "size": -1,
    "shared_bytes": "many",
    "vanished": {"0": "all", "1": -5, "99999": 3, "x": 1, "2": 1e99},
    "name": "../../victim",
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_note_says_is_not_believed(
    plan: Plan, output: Path, reference: dict[str, str], lie: str
) -> None:
    """Its digest must be that of the bytes, and what goes into the record is read from them."""
    partial = interrupt(plan, output)
    for note in partial.glob(f"*{NOTE_SUFFIX}"):
        note.write_text(json.dumps(json.loads(note.read_text()) | {lie: LIES[lie]}))
    done = execute(plan, output)
    assert done.reused_bytes == sum(shard.nbytes for shard in plan.shards[:3])
    assert (done.shared_bytes, done.warnings) == (0, ())
    assert contents(output) == reference


def test_a_note_for_another_file_goes(plan: Plan, output: Path, reference: dict[str, str]) -> None:
    partial = interrupt(plan, output)
    (note,) = partial.glob(f"{FIRST}{NOTE_SUFFIX}")
    shutil.copy(note, partial / f"thesis.tex{NOTE_SUFFIX}")
    (partial / "thesis.tex").write_text("not of this plan")
    execute(plan, output)
    assert contents(output) == reference


# Whose OUTPUT.partial it is ----------------------------------------------------------------------


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")


@pytest.mark.parametrize("whose", ["another user's", "everybody's", "a group's"])
def test_a_directory_that_others_may_write_is_refused(plan: Plan, output: Path, whose: str) -> None:
    partial = interrupt(plan, output)
    if whose == "another user's":
        needs_root()
        for path in (partial, *partial.iterdir()):
            os.chown(path, 12345, -1)
    else:
        partial.chmod(0o777 if whose == "everybody's" else 0o770)
    before = contents(partial)
    for overwrite in (False, True):
        with pytest.raises(UpcycleError, match="belongs to another user, or others may write"):
            execute(plan, output, overwrite=overwrite)
    for remove in (False, True):
        with pytest.raises(UpcycleError, match="belongs to another user, or others may write"):
            clean(output, remove=remove)
    assert contents(partial) == before
    assert not output.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o775), (0o022, 0o755), (0o077, 0o700)])
def test_a_umask_counts_once_it_is_done(plan: Plan, output: Path, umask: int, mode: int) -> None:
    """Until then nobody else may look in: the files' own modes may let a group write."""

    def look() -> None:
        assert stat.S_IMODE(partial_of(output).stat().st_mode) == 0o700

    before = os.umask(umask)
    try:
        interrupt(plan, output)
        look()
        run_during(plan, output, look)
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == mode
    assert stat.S_IMODE((output / FIRST).stat().st_mode) == mode & 0o666


# What is no unfinished conversion ----------------------------------------------------------------


@contextmanager
def untouched(directory: Path) -> Iterator[None]:
    before = contents(directory), directory.stat().st_ino
    yield
    assert (contents(directory), directory.stat().st_ino) == before


def finished(directory: Path, plan: Plan) -> None:
    execute(plan, directory)


def finished_with_a_marker(directory: Path, plan: Plan) -> None:
    execute(plan, directory)
    (directory / MARKER).touch()


def finished_at_the_last_step(directory: Path, plan: Plan) -> None:
    execute(plan, directory)
    state: dict[str, object] = {
        "plan_sha256": plan.digest,
        "output": directory.name,
        "replaces": None,
        "notes": {},
    }
    (directory / SEAL).write_text(json.dumps(state))


def holding(**files: str) -> Callable[[Path, Plan], None]:
    def make(directory: Path, _: Plan) -> None:
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)

    return make


OTHERS = {
    "finished": finished,
    "finished, with an empty marker": finished_with_a_marker,
    "finished, but for its seal": finished_at_the_last_step,
    "an empty record": holding(**{"upcycle.json": "", "thesis.tex": "work"}),
    "a foreign record": holding(**{"upcycle.json": '{"plan_sha256": "0"}', "thesis.tex": "work"}),
    "an empty marker": holding(**{MARKER: "", "thesis.tex": "work"}),
    "a foreign marker": holding(**{MARKER: '{"plan_sha256": "00"}', "thesis.tex": "work"}),
    "no marker": holding(**{"model.safetensors": "work"}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_only_has_such_a_name_is_left_alone(plan: Plan, output: Path, other: str) -> None:
    """A model may well be named foo.partial, and another foo."""
    OTHERS[other](partial_of(output), plan)
    with untouched(partial_of(output)):
        for overwrite in (False, True):
            with pytest.raises(UpcycleError, match="no unfinished conversion of upcycle"):
                execute(plan, output, overwrite=overwrite)
        for remove in (False, True):
            with pytest.raises(UpcycleError, match="no unfinished conversion of upcycle"):
                clean(output, remove=remove)
    assert not output.exists()


# What happens meanwhile --------------------------------------------------------------------------


def test_a_partial_that_is_replaced_meanwhile_is_noticed(plan: Plan, output: Path) -> None:
    partial, stolen = partial_of(output), output.with_name("stolen")

    def swap() -> None:
        partial.rename(stolen)
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(SECRET)

    with pytest.raises(ResumableError, match="was moved or replaced meanwhile"):
        run_during(plan, output, swap)
    assert not output.exists()
    assert contents(partial).keys() == {"model.safetensors"}
    assert (stolen / FIRST).exists()  # it went on in the directory that it had opened


def test_a_partial_that_becomes_a_link_meanwhile_is_noticed(plan: Plan, output: Path) -> None:
    partial, precious = partial_of(output), output.with_name("precious")
    precious.mkdir()

    def swap() -> None:
        partial.rename(output.with_name("stolen"))
        partial.symlink_to(precious)

    with pytest.raises(ResumableError, match="was moved or replaced meanwhile"):
        run_during(plan, output, swap)
    assert not output.exists()
    assert list(precious.iterdir()) == []


def test_a_parent_that_is_replaced_meanwhile_is_noticed(plan: Plan, tmp_path: Path) -> None:
    parent = tmp_path / "models"

    def swap() -> None:
        parent.rename(tmp_path / "stolen")
        (parent / "moe.partial").mkdir(parents=True)

    with pytest.raises(ResumableError, match="was moved or replaced meanwhile"):
        run_during(plan, parent / "moe", swap)
    assert contents(parent) == {}
    assert not (tmp_path / "stolen" / "moe").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["a link", "a file", "a directory", "a thesis"])
def test_an_output_that_changes_meanwhile_is_noticed(
    plan: Plan, dense: Path, output: Path, what: str, *, overwrite: bool
) -> None:
    moved, other = output.with_name("moved"), output.with_name("other")
    execute(plan_of(dense, "E2G1T2"), other)
    (other / "thesis.tex").write_bytes(SECRET)
    if overwrite:
        execute(plan_of(dense, "E2G1T2"), output)

    def change() -> None:
        if overwrite:
            output.rename(moved)
        match what:
            case "a link":
                moved.mkdir(exist_ok=True)
                output.symlink_to(moved)
            case "a file":
                output.write_bytes(SECRET)
            case "a directory":
                output.mkdir()
                (output / "model.safetensors").write_bytes(SECRET)
            case "a thesis":
                other.rename(output)

    with pytest.raises(ResumableError, match="the same command publishes it"):
        run_during(plan, output, change, overwrite=overwrite)
    if what == "a link":
        assert output.is_symlink()
        output.unlink()
    elif what == "a file":
        assert output.read_bytes() == SECRET
        output.unlink()
    else:
        assert SECRET in {path.read_bytes() for path in output.iterdir()}
        shutil.rmtree(output)
    # Nothing has to be written again.
    assert execute(plan, output, overwrite=overwrite).reused_bytes == plan.nbytes
