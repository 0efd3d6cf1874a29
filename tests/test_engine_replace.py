"""--overwrite: only what upcycle wrote goes, and at no moment is the old output less than whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import (
    PYTHON,
    Advance,
    CannotMountError,
    contents,
    convert_command,
    make_dense,
    mounted,
    plan_of,
    run,
    system,
)

from upcycle_cli import UpcycleError
from upcycle_cli.api import execute
from upcycle_cli.checkpoint.header import parse_header
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import ResumableError
from upcycle_cli.core.safe_files import read_header
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write import swap
from upcycle_cli.write.staging import SEAL, partial_of
from upcycle_cli.write.transaction import clean

SHARDS = 40_000


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = make_dense(tmp_path_factory.mktemp("replace") / "dense")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    return dense


@pytest.fixture(scope="module")
def plan(dense: Path) -> Plan:
    return plan_of(dense, "E4G1T2", max_shard_bytes=SHARDS)


@pytest.fixture(scope="module")
def old(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "moe"
    execute(plan_of(dense, "E2G1T2", max_shard_bytes=SHARDS), path, checksums=True)
    return path


@pytest.fixture(scope="module")
def reference(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("reference") / "moe"
    execute(plan, path)
    return contents(path)


@pytest.fixture
def output(old: Path, tmp_path: Path) -> Path:
    return shutil.copytree(old, tmp_path / "moe")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_upcycle_wrote_is_replaced(
    plan: Plan, output: Path, reference: dict[str, str]
) -> None:
    assert execute(plan, output, overwrite=True).warnings == ()
    assert contents(output) == reference
    assert names(output.parent) == ["moe"]


# What stops it -----------------------------------------------------------------------------------


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(output: Path) -> None:
        path = output / name
        path.write_bytes(change(path.read_bytes()))

    return act


def add(name: str, data: bytes = b"weeks of work") -> Callable[[Path], None]:
    def act(output: Path) -> None:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(data)

    return act


def train(output: Path) -> None:
    """Save other weights under the same name, in as many bytes."""
    path = output / SHARD
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    other = header.replace(b'{"format":"pt"}', b'{"format":"tp"}')
    assert other != header
    path.write_bytes(data.replace(header, other))


def train_in_place(output: Path) -> None:
    """Write another router where the old one is."""
    for path in sorted(output.glob("*.safetensors")):
        with path.open("rb") as file:
            entries, _ = parse_header(read_header(file), path, path.name)
        for entry in entries:
            if entry.name.endswith(".gate.weight"):
                with path.open("r+b") as file:
                    file.seek(entry.offset)
                    file.write(b"\1" * entry.nbytes)
                return


def link(output: Path) -> None:
    (output / "LICENSE").rename(output.parent / "LICENSE")
    (output / "LICENSE").symlink_to(output.parent / "LICENSE")


def forget_the_files(output: Path) -> None:
    record = json.loads((output / "upcycle.json").read_text())
    del record["files"]
    (output / "upcycle.json").write_text(json.dumps(record))


SHARD = "model-00001-of-00009.safetensors"
STOPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a model beside it": (add("model-my-finetune.safetensors"), "model-my-finetune.safetensors"),
    "another shard": (add("model-00099-of-00099.safetensors"), "model-00099-of-00099.safetensors"),
    "a trained shard": (train, SHARD),
    "a shard that was trained in place": (train_in_place, "gate.weight was changed"),
    "a longer shard": (edit(SHARD, lambda data: data + b"x"), SHARD),
    "a cut shard": (edit(SHARD, lambda data: data[:-1]), SHARD),
    "an edited card": (edit("README.md", lambda data: data + b"Trained.\n"), "README.md"),
    "another card": (edit("README.md", lambda _: b"---\nlicense: mit\n---\n"), "README.md"),
    "a card of no text": (edit("README.md", lambda _: b"\xff\xfe"), "README.md"),
    "an edited config": (edit("config.json", lambda data: data.replace(b"2", b"3")), "config.json"),
    "another licence": (edit("LICENSE", lambda data: data[::-1]), "LICENSE"),
    "another tokenizer": (add("tokenizer.json"), "tokenizer.json"),
    "checkpoints": (add("checkpoint-1000/optimizer.pt"), "checkpoint-1000/optimizer.pt"),
    "an empty directory": (lambda output: (output / "runs").mkdir(), "runs"),
    "a hidden file": (add(".gitattributes"), ".gitattributes"),
    "another template": (add("additional_chat_templates/my.jinja"), "my.jinja"),
    "a link": (link, "LICENSE"),
    "a pipe": (lambda output: os.mkfifo(output / "pipe"), "pipe"),
    "checksums of more": (
        edit("SHA256SUMS", lambda data: data + b"0" * 64 + b"  thesis.tex\n"),
        "SHA256SUMS",
    ),
    "checksums of others": (edit("SHA256SUMS", lambda data: b"0" * 64 + data[64:]), "SHA256SUMS"),
    "no record": (lambda output: (output / "upcycle.json").unlink(), "not made by upcycle"),
    "half a record": (edit("upcycle.json", lambda data: data[:99]), "does not say which of its"),
    "a list": (edit("upcycle.json", lambda _: b"[]"), "does not say which of its files"),
    "an old record": (forget_the_files, "does not say which of its files"),
}


@pytest.mark.parametrize("what", STOPS)
def test_what_somebody_else_wrote_stops_it_by_name(
    plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    change, said = STOPS[what]
    change(output)
    before = contents(output)
    with monkeypatch.context() as context:
        context.setattr(swap, "_give_name", None)  # it must not come that far
        with pytest.raises(UpcycleError) as refused:
            execute(plan, output, overwrite=True, hooks=Advance(_unexpected))
    assert said in refused.value.message
    assert "left as it is" in refused.value.message
    assert contents(output) == before
    assert not partial_of(output).exists()


def _unexpected(_: int) -> None:
    raise AssertionError("a byte was written")


def test_a_missing_file_does_not_stop_it(
    plan: Plan, output: Path, reference: dict[str, str]
) -> None:
    (output / SHARD).unlink()
    shutil.rmtree(output / "additional_chat_templates")
    execute(plan, output, overwrite=True)
    assert contents(output) == reference
    assert names(output.parent) == ["moe"]


@pytest.mark.parametrize("what", ["new", "changed"])
def test_what_comes_at_the_last_moment_is_left_and_told(
    plan: Plan,
    output: Path,
    reference: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """A training run that still writes there does not notice that its directory was moved."""
    give_name = swap._give_name  # noqa: SLF001

    def train_meanwhile(parent: Folder, new: Folder, name: str, old: Folder) -> None:
        give_name(parent, new, name, old)
        add("checkpoint.pt" if what == "new" else "LICENSE")(old.path.with_name("moe.partial"))

    monkeypatch.setattr(swap, "_give_name", train_meanwhile)
    done = execute(plan, output, overwrite=True)
    assert contents(output) == reference
    (warning,) = done.warnings
    assert f"{partial_of(output)} is what moe was before" in warning
    assert "weeks of work" in {
        path.read_bytes().decode(errors="replace") for path in partial_of(output).iterdir()
        if path.is_file()
    }  # fmt: skip
    with pytest.raises(UpcycleError, match="no unfinished conversion"):
        clean(output, remove=True)


# Where two names cannot be exchanged -------------------------------------------------------------


@pytest.fixture
def two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "exchange", lambda *_: False)


@pytest.mark.usefixtures("two_renames")
def test_two_renames_do_as_well(plan: Plan, output: Path, reference: dict[str, str]) -> None:
    assert execute(plan, output, overwrite=True).warnings == ()
    assert contents(output) == reference
    assert names(output.parent) == ["moe"]


@pytest.mark.usefixtures("two_renames")
def test_what_is_in_the_way_of_two_renames_is_left_alone(
    plan: Plan, output: Path, old: Path, reference: dict[str, str]
) -> None:
    aside = shutil.copytree(old, output.with_name("moe.replaced"))
    with pytest.raises(ResumableError, match=r"moe\.replaced is in the way"):
        execute(plan, output, overwrite=True)
    assert contents(output) == contents(aside) == contents(old)
    shutil.rmtree(aside)
    assert execute(plan, output, overwrite=True).reused_bytes == plan.nbytes
    assert contents(output) == reference


# What a kill leaves ------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from upcycle_cli.write import swap

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def rename(folder, old, new, rename=swap.Folder.rename):
    rename(folder, old, new)
    if (old, new) == ("moe", "moe.replaced") and "between" in moment:
        die()

moment = sys.argv.pop(1)
if "renames" in moment:
    swap.exchange = lambda *_: False
swap.Folder.rename = rename
swap._finish = die
from upcycle_cli.__main__ import main
main()
"""
MOMENTS = ["exchanged", "between two renames", "after two renames"]


def killed(dense: Path, output: Path, moment: str) -> dict[str, dict[str, str]]:
    """Kill a run at some moment of the replacing; return what is where then."""
    command = convert_command(dense, output, "--overwrite", "--max-shard-size", "40KB",
                              recipe="E4G1T2")  # fmt: skip
    done = run([PYTHON, "-c", KILLED, moment, *command[3:]])
    assert done.returncode == -9, done.stderr
    return {path.name: contents(path) for path in output.parent.iterdir()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_the_old_output_is_whole_and_unmarked(
    dense: Path, output: Path, old: Path, reference: dict[str, str], moment: str
) -> None:
    left = killed(dense, output, moment)
    assert contents(old) in left.values()
    (new,) = (found for found in left.values() if found.pop(SEAL, None))
    assert new == reference


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_the_next_run_ends_it(
    dense: Path, plan: Plan, output: Path, reference: dict[str, str], moment: str
) -> None:
    killed(dense, output, moment)
    done = execute(plan, output, overwrite=True)
    assert contents(output) == reference
    assert names(output.parent) == ["moe"]
    if moment == "between two renames":
        assert done.reused_bytes == plan.nbytes
        assert "is back" in done.warnings[0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_another_run_finds_an_output(
    dense: Path, output: Path, old: Path, reference: dict[str, str], moment: str
) -> None:
    killed(dense, output, moment)
    with pytest.raises(UpcycleError, match="exists and is not empty"):
        execute(plan_of(dense, "E2G2T2"), output)
    assert contents(output) == (contents(old) if "between" in moment else reference)
    assert names(output.parent) == (["moe", "moe.partial"] if "between" in moment else ["moe"])


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_clean_shows_first(
    dense: Path, output: Path, old: Path, reference: dict[str, str], moment: str
) -> None:
    left = killed(dense, output, moment)
    place = "moe.replaced" if "after" in moment else "moe.partial"
    found = clean(output, remove=False)
    assert found.path == output.with_name(place)
    assert found.nbytes > 0
    assert ("unfinished" if "between" in moment else "was before") in found.what
    assert {path.name: contents(path) for path in output.parent.iterdir()} == left
    removed = clean(output, remove=True)
    assert (removed.path, removed.nbytes) == (found.path, found.nbytes)
    assert (removed.note is not None and "is back" in removed.note) == ("between" in moment)
    assert names(output.parent) == ["moe"]
    assert contents(output) == (contents(old) if "between" in moment else reference)


def test_a_seal_that_a_kill_left_is_removed(plan: Plan, output: Path) -> None:
    shutil.rmtree(output)
    execute(plan, output)
    before = contents(output)
    state = {"plan_sha256": plan.digest, "output": "moe"}
    (output / SEAL).write_text(json.dumps(state))
    with pytest.raises(UpcycleError, match="Nothing to clean"):
        clean(output, remove=False)
    assert execute(plan, output).already_done
    assert contents(output) == before


def test_a_replacement_that_another_process_is_at_is_left_to_it(
    dense: Path, plan: Plan, output: Path
) -> None:
    left = killed(dense, output, "exchanged")
    holder = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        for overwrite in (False, True):
            with pytest.raises(UpcycleError, match="another upcycle process is writing"):
                execute(plan, output, overwrite=overwrite)
        with pytest.raises(UpcycleError, match="another upcycle process is writing"):
            clean(output, remove=True)
    finally:
        os.close(holder)
    assert {path.name: contents(path) for path in output.parent.iterdir()} == left


def test_a_seal_in_a_directory_that_was_renamed_does_not_matter(
    plan: Plan, output: Path, reference: dict[str, str]
) -> None:
    state = {"plan_sha256": plan.digest, "output": "another name"}
    (output / SEAL).write_text(json.dumps(state))
    execute(plan, output, overwrite=True)
    assert contents(output) == reference
    assert names(output.parent) == ["moe"]


def test_a_seal_with_another_directory_in_mind_removes_nothing(
    plan: Plan, output: Path, old: Path
) -> None:
    """foo.partial is a model of its own, whatever the seal in foo says."""
    theirs = partial_of(output)
    execute(plan, theirs)
    before = contents(theirs)
    state = {"plan_sha256": plan.digest, "output": "moe", "replaces": "0" * 64, "notes": {}}
    (output / SEAL).write_text(json.dumps(state))
    with pytest.raises(UpcycleError, match="no unfinished conversion of upcycle"):
        clean(output, remove=True)
    assert contents(theirs) == before
    assert contents(output) == contents(old)


# Overlays ----------------------------------------------------------------------------------------


@pytest.fixture(params=["off", "on"])
def overlay(request: pytest.FixtureRequest, old: Path, tmp_path: Path) -> Iterator[Path]:
    """A directory with the old output in the lower layer of an overlay, as in an image."""
    try:
        with mounted("tmpfs", tmp_path / "layers", 64 << 20) as layers:
            for name in ("lower", "upper", "work", "merged"):
                (layers / name).mkdir()
            shutil.copytree(old, layers / "lower" / "moe")
            options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
            options += f",redirect_dir={request.param}"
            done = system("mount", "-t", "overlay", "overlay", "-o", options, layers / "merged")
            if done.returncode:
                pytest.skip(f"no overlay: {done.stderr.strip()}")
            try:
                yield layers / "merged"
            finally:
                system("umount", layers / "merged").check_returncode()
    except CannotMountError as error:
        pytest.skip(str(error))


def can_be_renamed(directory: Path) -> bool:
    try:
        directory.rename(directory.with_name("renamed"))
    except OSError as error:
        assert error.errno == errno.EXDEV  # noqa: PT017
        return False
    directory.with_name("renamed").rename(directory)
    return True


def test_a_directory_of_a_lower_layer(
    overlay: Path, dense: Path, plan: Plan, old: Path, reference: dict[str, str]
) -> None:
    output = overlay / "moe"
    command = convert_command(dense, output, "--overwrite", "--max-shard-size", "40KB",
                              recipe="E4G1T2")  # fmt: skip
    done = run(command)
    if done.returncode:
        assert "lower layer of an overlay" in done.stderr
        assert done.stderr.count("error:") == 1
        assert contents(output) == contents(old)
        assert not can_be_renamed(output)
        # Nothing of the work is lost once it has gone.
        shutil.rmtree(output)
        assert execute(plan, output).reused_bytes == plan.nbytes
    assert contents(output) == reference
    assert names(overlay) == ["moe"]


def test_an_overlay_that_cannot_exchange(
    plan: Plan, output: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of such a directory, where there is no overlay to be had."""

    def rename(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(swap, "exchange", lambda *_: False)
    monkeypatch.setattr(Folder, "rename", _refusing_directories(Folder.rename, rename))
    with pytest.raises(ResumableError, match="lower layer of an overlay"):
        execute(plan, output, overwrite=True)
    assert contents(output) == contents(old)


def _refusing_directories(
    rename: Callable[..., Any], refuse: Callable[..., Any]
) -> Callable[[Folder, str, str], None]:
    def choose(folder: Folder, old: str, new: str) -> None:
        (refuse if old.startswith("moe") else rename)(folder, old, new)

    return choose


# The command -------------------------------------------------------------------------------------


def test_the_command_says_what_stops_it(dense: Path, output: Path) -> None:
    (output / "model-my-finetune.safetensors").write_bytes(b"weeks of work")
    done = run(convert_command(dense, output, "--overwrite"))
    assert done.returncode == 2
    assert "model-my-finetune.safetensors, which upcycle did not write" in done.stderr
    assert (output / "model-my-finetune.safetensors").read_bytes() == b"weeks of work"


def test_sha256sum_reads_what_it_is_given(plan: Plan, output: Path) -> None:
    execute(plan, output, overwrite=True, checksums=True)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=output, check=False).returncode == 0
