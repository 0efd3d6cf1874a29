"""OUTPUT appears complete, --overwrite replaces only what upcycle wrote, and kills lose nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

import engine_fixtures as engine
import pytest

from upcycle_cli import UpcycleError
from upcycle_cli.core.errors import ResumableError
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write import staging as module
from upcycle_cli.write.staging import aside_of, clean, new_of, partial_of

SHARD = "model-00001-of-00009.safetensors"
BUSY = "another upcycle process is writing"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.make_dense(tmp_path_factory.mktemp("replace") / "dense")


@pytest.fixture(scope="module")
def plan(dense: Path) -> Plan:
    return engine.plan_of(dense, "E4G1T2", max_shard_bytes=40_000)


@pytest.fixture(scope="module")
def old(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "moe"
    engine.execute(engine.plan_of(dense, "E2G1T2", max_shard_bytes=40_000), path, checksums=True)
    return path


@pytest.fixture(scope="module")
def reference(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("reference") / "moe"
    engine.execute(plan, path)
    return engine.contents(path)


@pytest.fixture
def output(old: Path, tmp_path: Path) -> Path:
    return shutil.copytree(old, tmp_path / "moe")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_overwrite_replaces_the_old_output(
    plan: Plan, output: Path, reference: dict[str, str]
) -> None:
    (output / SHARD).unlink()  # a missing file does not stop it
    assert engine.execute(plan, output, overwrite=True).warnings == ()
    assert engine.contents(output) == reference
    assert names(output.parent) == ["moe"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_output_has_the_usual_mode_and_the_partial_is_private(
    plan: Plan, tmp_path: Path, umask: int
) -> None:
    output, modes = tmp_path / "moe", set()

    def look(_: int) -> None:
        modes.add(stat.S_IMODE(partial_of(output).stat().st_mode))

    before = os.umask(umask)
    try:
        engine.execute(plan, output, hooks=engine.Advance(look))
    finally:
        os.umask(before)
    assert modes == {0o700}
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~umask


def test_a_file_that_appears_during_the_conversion_stops_the_publication(
    plan: Plan, output: Path, old: Path, reference: dict[str, str]
) -> None:
    thesis = output / "thesis.tex"
    hooks = engine.Advance(lambda _: thesis.write_text("years of work"))
    with pytest.raises(ResumableError, match=r"because of thesis\.tex") as refused:
        engine.execute(plan, output, overwrite=True, hooks=hooks)
    assert "the same command publishes it" in str(refused.value)
    thesis.unlink()
    assert engine.contents(output) == engine.contents(old)
    assert engine.execute(plan, output, overwrite=True).reused_bytes == plan.nbytes
    assert engine.contents(output) == reference


def test_a_file_that_appears_at_the_last_moment_is_kept(
    plan: Plan, output: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training run that still writes there does not notice that its directory was moved."""
    finish = module._finish  # noqa: SLF001

    def train_meanwhile(output: Path, replaces: str) -> str | None:
        (aside_of(output) / "model.pt").write_bytes(b"weeks of work")
        return finish(output, replaces)

    monkeypatch.setattr(module, "_finish", train_meanwhile)
    (warning,) = engine.execute(plan, output, overwrite=True).warnings
    assert f"the old output is now {aside_of(output)}" in warning
    assert engine.contents(output) == reference
    assert (aside_of(output) / "model.pt").read_bytes() == b"weeks of work"


@pytest.mark.parametrize("name", ["moe", "moe.replaced"])
def test_a_directory_in_the_way_is_left_alone(
    plan: Plan, output: Path, old: Path, reference: dict[str, str], name: str
) -> None:
    """Another program makes a directory of this name during the conversion."""
    overwrite, theirs = name != "moe", output.with_name(name)
    if not overwrite:
        shutil.rmtree(output)

    def take(_: int) -> None:
        if not theirs.exists():
            shutil.copytree(old, theirs)

    with pytest.raises(ResumableError, match=f"{name} failed: Directory not empty"):
        engine.execute(plan, output, overwrite=overwrite, hooks=engine.Advance(take))
    assert engine.contents(output) == engine.contents(theirs) == engine.contents(old)
    shutil.rmtree(theirs)
    assert engine.execute(plan, output, overwrite=overwrite).reused_bytes == plan.nbytes
    assert engine.contents(output) == reference


# After a kill -------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Ends a run as a kill would, without a cleaning up that handles exceptions of our own."""


def killed(plan: Plan, output: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a kill leaves between the two renames of a replacement, or after them."""

    def die(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        rename = Path.rename

        def only_first(path: Path, target: Path) -> Path:
            if path in (new_of(output), aside_of(output)):
                die()  # nor is the first one undone
            return rename(path, target)

        if moment == "between":
            patched.setattr(Path, "rename", only_first)
        else:
            patched.setattr(module, "_finish", die)
        with pytest.raises(KilledError):
            engine.execute(plan, output, overwrite=True)


MOMENTS = ("between", "after")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("then", ["the same command", "another command", "clean"])
def test_the_next_command_ends_an_interrupted_replacement(
    dense: Path,
    plan: Plan,
    output: Path,
    old: Path,
    reference: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    then: str,
) -> None:
    killed(plan, output, moment, monkeypatch)
    assert engine.contents(aside_of(output)) == engine.contents(old)  # complete, under another name
    expected = engine.contents(old) if moment == "between" else reference
    if then == "the same command":
        done = engine.execute(plan, output, overwrite=True)
        assert moment == "after" or done.reused_bytes == plan.nbytes
        assert ("its name again" in " ".join(done.warnings)) == (moment == "between")
        expected = reference
    elif then == "another command":
        with pytest.raises(UpcycleError, match="exists and is not empty"):
            engine.execute(engine.plan_of(dense, "E2G2T2"), output)
    else:
        before = names(output.parent)
        shown, _ = clean(output, remove=False)
        assert names(output.parent) == before
        removed, note = clean(output, remove=True)
        assert removed == shown
        assert ("its name again" in (note or "")) == (moment == "between")
    assert engine.contents(output) == expected
    left = ["moe.partial"] if (moment, then) == ("between", "another command") else []
    assert names(output.parent) == ["moe", *left]


# The staging directory ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["somebody's files", "a link", "a file", "writable by others"])
@pytest.mark.parametrize("act", ["convert", "overwrite", "clean"])
def test_a_partial_that_is_not_ours_is_left_alone(
    plan: Plan, tmp_path: Path, what: str, act: str
) -> None:
    output, elsewhere = tmp_path / "moe", tmp_path / "elsewhere"
    partial = partial_of(output)
    if what == "a file":
        partial.write_text("precious")
    elif what == "a link":
        engine.stopped_after(plan, elsewhere, 0)
        partial.symlink_to(partial_of(elsewhere))
    elif what == "writable by others":
        engine.stopped_after(plan, output, 0)
        partial.chmod(0o777)
    else:
        partial.mkdir()
        (partial / "thesis.tex").write_text("precious")
    before = engine.contents(tmp_path)
    with pytest.raises(UpcycleError):
        clean(output, remove=True) if act == "clean" else engine.execute(
            plan, output, overwrite=act == "overwrite"
        )
    assert engine.contents(tmp_path) == before


@pytest.mark.parametrize("state", ["half written", "published"])
def test_a_second_process_is_refused(
    plan: Plan,
    output: Path,
    reference: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    if state == "published":
        killed(plan, output, "after", monkeypatch)
    else:
        shutil.rmtree(output)
        engine.stopped_after(plan, output, plan.nbytes // 2)
    before = engine.contents(output.parent)
    holder = os.open(partial_of(output), os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UpcycleError, match=BUSY):
            engine.execute(plan, output)
        for remove in (False, True):
            with pytest.raises(UpcycleError, match=BUSY):
                clean(output, remove=remove)
    finally:
        os.close(holder)
    assert engine.contents(output.parent) == before
    engine.execute(plan, output, overwrite=True)
    assert engine.contents(output) == reference


def test_a_directory_that_was_published_before_it_was_locked_is_refused(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, flock = tmp_path / "moe", fcntl.flock

    def publish_first(descriptor: int, operation: int) -> None:
        partial_of(output).rename(tmp_path / "published")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", publish_first)
    with pytest.raises(UpcycleError, match=BUSY):
        engine.execute(plan, output)


def test_clean_shows_first_and_removes_on_request(plan: Plan, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    engine.stopped_after(plan, output, plan.nbytes // 2)
    assert clean(output, remove=False)[0] > 0
    clean(output, remove=True)
    assert names(tmp_path) == []
    with pytest.raises(UpcycleError, match="nothing to clean"):
        clean(output, remove=True)
