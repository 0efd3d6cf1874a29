"""Sources on the Hub, and pushing to it: huggingface_hub itself against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import forked
import pytest
from conftest import RunOnHub, clone, contents, read_json, read_tensors, validate_json
from hub.server import TOKEN, Hub
from shapes import big_config, write_hollow

from upcycle_cli import Recipe, UpcycleError, convert
from upcycle_cli.checkpoint.card_metadata import is_edited
from upcycle_cli.checkpoint.checkpoint import open_checkpoint, open_storage
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.hub.remote_checkpoint import (
    RepoStorage,
    check_download_space,
    is_repo_id,
    open_source,
)
from upcycle_cli.publish.card import card_for_repo
from upcycle_cli.publish.licences import reminders
from upcycle_cli.report.report_file import ReportFile

REPO = "acme/tiny"
MOE = "acme/tiny-E4G1T2"
RECIPE = Recipe(expansion=4, granularity=1, top_k=2)
SHARDED = ("--max-shard-size", "40KB")


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion in several files. Read only."""
    from upcycle_cli import Options

    path = tmp_path_factory.mktemp("moe") / "tiny-E4G1T2"
    convert(llama, path, RECIPE, options=Options(max_shard_bytes=40_000))
    assert len(list(path.glob("*.safetensors"))) > 4
    return path


def assert_says(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The message is one, and says this."""
    assert result.stderr.count("error:") == 1
    said = " ".join(result.stderr.split())
    for word in words:
        assert word in said


# Sources -----------------------------------------------------------------------------------------


def test_a_repo_is_converted_like_a_directory(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    source = clone(llama, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"a second copy of the weights")
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").write_bytes(b"a third one")
    commit = hub.store.upload(REPO, source)
    result = run("convert", REPO, "out", "--recipe", "E4G1T2")
    verify = f"upcycle verify {REPO} {tmp_path / 'out'} --dense-revision {commit}"
    assert verify in " ".join(result.stderr.split())
    convert(llama, tmp_path / "local", RECIPE)
    out, local = tmp_path / "out", tmp_path / "local"
    assert read_tensors(out).keys() == read_tensors(local).keys()
    name = "model.safetensors"
    assert (out / name).read_bytes() == (local / name).read_bytes()
    record = read_json(out / RECORD_NAME)["source"]
    assert (record["name"], record["revision"]) == (REPO, commit)
    card = (out / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert commit in card
    for needless in ("pytorch_model.bin", "original"):
        assert not hub.asked("GET", needless)
        assert not hub.asked("HEAD", needless)


def test_what_can_be_refused_is_refused_before_weights_are_downloaded(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    assert_says(run("convert", REPO, "out", "--recipe", "E4G7T7", expect=2), "not divisible")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert_says(run("convert", REPO, "out", "--recipe", "E4G1T2", expect=2), "is not empty")
    size = (llama / "model.safetensors").stat().st_size
    assert max(request.sent for request in hub.asked("GET", "/_cdn/")) < size
    assert not list((tmp_path / "home").rglob("model.safetensors"))


def test_a_plan_alone_downloads_no_weights(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    result = run("convert", REPO, "out", "--recipe", "E4G1T2", "--dry-run", "--json")
    assert json.loads(result.stdout)["source"] == REPO
    assert not list((tmp_path / "home").rglob("model.safetensors"))


def test_a_download_that_breaks_off_is_gone_on_with(
    hub: Hub, run: RunOnHub, make_dense: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_dense("llama", vocab_size=60_000)
    size = (dense / "model.safetensors").stat().st_size
    hub.store.upload(REPO, dense)
    cut = 11_000_000  # huggingface_hub keeps what it has by the 10 MiB
    assert size > 1.3 * cut
    hub.cuts = [cut]
    run("convert", REPO, "out", "--recipe", "E2G1T1")
    assert not hub.cuts
    sent = sum(request.sent for request in hub.asked("GET", "/_cdn/"))
    assert sent < size + 0.5 * cut  # not from the beginning again
    convert(dense, tmp_path / "local", Recipe(expansion=2, granularity=1, top_k=1))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_finished_output_needs_no_download(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    run("convert", REPO, "out", "--recipe", "E4G1T2")
    shutil.rmtree(tmp_path / "home")
    result = run("convert", REPO, "out", "--recipe", "E4G1T2")
    assert "nothing to do" in result.stderr
    assert not list((tmp_path / "home").rglob("model.safetensors"))


@pytest.mark.parametrize("as_commit", [False, True])
def test_revisions(
    hub: Hub,
    run: RunOnHub,
    llama: Path,
    make_dense: Callable[..., Path],
    *,
    as_commit: bool,
) -> None:
    hub.store.upload(REPO, make_dense("mistral"))
    commit = hub.store.upload(REPO, llama, branch="candidate")
    revision = commit if as_commit else "candidate"
    result = run("inspect", REPO, "--revision", revision, "--json")
    assert json.loads(result.stdout)["model_type"] == "llama"
    result = run("inspect", REPO, "--json")
    assert json.loads(result.stdout)["model_type"] == "mistral"


def test_repos_that_cannot_be_read(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    hub.store.upload(REPO, llama)
    hub.store.upload("acme/hidden", llama)
    hub.store.repos["acme/hidden"].private = True
    hub.store.upload("acme/gated", llama)
    hub.store.repos["acme/gated"].gated = True
    hub.store.create("acme/empty")
    assert_says(run("inspect", "acme/absent", expect=2), "acme/absent is neither", "Check the name")
    hidden = run("inspect", "acme/hidden", token=None, expect=2)
    assert_says(hidden, "acme/hidden is neither", "hf auth login", "HF_TOKEN")
    gated = run("convert", "acme/gated", "out", "--recipe", "E4G1T2", expect=2)
    assert_says(gated, "access to acme/gated is restricted", f"{hub.url}/acme/gated")
    gated = run("inspect", "acme/gated", token=None, expect=2)
    assert_says(gated, "you are not signed in", "hf auth login")
    assert_says(run("inspect", "acme/empty", expect=2), "acme/empty has no config.json")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    hub.store.upload("acme/lora", tmp_path / "lora")
    assert_says(
        run("inspect", "acme/lora", expect=2), "acme/lora is an adapter", "merge_and_unload"
    )
    wrong = run("inspect", REPO, "--revision", "absent", expect=2)
    assert_says(wrong, f"{REPO} has no revision 'absent'")
    assert_says(run("inspect", REPO, token="hf_wrong", expect=2), "refuses the token", "HF_TOKEN")
    run("inspect", "acme/hidden")


def test_offline(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    hub.store.upload(REPO, llama)
    empty = run("inspect", REPO, HF_HUB_OFFLINE="1", expect=2)
    assert_says(empty, "HF_HUB_OFFLINE", f"hf download {REPO}")
    assert not hub.requests
    run("inspect", REPO)
    headers_only = run("convert", REPO, "out", "-r", "E4G1T2", HF_HUB_OFFLINE="1", expect=2)
    assert_says(headers_only, "HF_HUB_OFFLINE")
    run("convert", REPO, "out", "-r", "E4G1T2")
    asked = len(hub.requests)
    run("convert", REPO, "again", "-r", "E4G1T2", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    one, other = contents(tmp_path / "out"), contents(tmp_path / "again")
    assert one == other


def test_a_busy_hub_is_asked_again(hub: Hub, run: RunOnHub, llama: Path) -> None:
    hub.store.upload(REPO, llama)
    for status in (500, 503):
        hub.fail("GET", r"/api/models/acme/tiny", status)
    hub.fail("GET", r"/_cdn/", 429, headers={"Retry-After": "1"})
    run("inspect", REPO)
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.long
def test_a_hub_that_stays_away(hub: Hub, run: RunOnHub, llama: Path) -> None:
    hub.store.upload(REPO, llama)
    hub.fail("GET", r"/api/models/acme/tiny", 503, times=99)
    assert_says(run("inspect", REPO, expect=2), "503", "Try again later")
    hub.stop()
    assert_says(run("inspect", "acme/other", expect=2), "cannot reach the Hub", hub.url)


def test_inspect_reads_kilobytes_of_a_large_repo(hub: Hub, run: RunOnHub, tmp_path: Path) -> None:
    """30 shards, 141 GB, none of which exists."""
    dense = write_hollow(tmp_path / "dense", big_config("llama-3.1-70b"))
    (dense / "tokenizer.json").write_bytes(b" " * 9_000_000)
    hub.store.upload("acme/large", dense, hollow=True)
    result = run("inspect", "acme/large", "--recipe", "E8G8T8", "--json")
    found = json.loads(result.stdout)
    assert found["total_parameters"] > 70e9
    assert found["shards"] == 30
    assert found["plan"]["num_experts"] == 64
    assert hub.transferred() < 5_000_000


def test_inspect_and_verify_repos(hub: Hub, run: RunOnHub, llama: Path, moe: Path) -> None:
    hub.store.upload(REPO, llama)
    hub.store.upload(MOE, moe)
    found = json.loads(run("inspect", MOE, "--json").stdout)
    assert (found["kind"], found["recipe"]) == ("moe", "E4G1T2")
    report = json.loads(run("verify", REPO, MOE, "--json").stdout)
    assert report["status"] == "passed"
    assert_says(run("verify", MOE, REPO, expect=2), "The dense model comes first")
    pinned = run("verify", REPO, MOE, "--moe-revision", "absent", expect=2)
    assert_says(pinned, "no revision 'absent'")


def test_ranks_take_a_repo_too(hub: Hub, llama: Path, tmp_path: Path) -> None:
    hub.store.upload(REPO, llama)
    command = (*("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "upcycle_cli"),)
    subprocess.run(
        [sys.executable, *command, "convert", REPO, "out", "--recipe", "E4G1T2", *SHARDED],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    downloads = [request for request in hub.asked("GET", "/_cdn/") if request.status == 200]
    assert len(downloads) == 1
    assert read_json(tmp_path / "out" / RECORD_NAME)["source"]["name"] == REPO


def test_what_is_a_repo_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "here").mkdir(parents=True)
    assert is_repo_id("acme/there")
    assert is_repo_id(Path("meta-llama/Llama-3.1-8B"))
    for no in ("acme/here", "there", "./acme/there", "/acme/there", "a/b/c", "../a", "~/a", ""):
        assert not is_repo_id(no)


def test_a_revision_of_a_directory(llama: Path) -> None:
    with pytest.raises(UpcycleError, match="needs a repo on the Hub"):
        open_source(llama, "main")


def test_space_for_the_download(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {file.name: file.stat().st_size for file in llama.iterdir()}
    storage = RepoStorage(tmp_path / "cache", "acme/tiny", "c0ffee", sizes)
    monkeypatch.setattr(RepoStorage, "local", lambda _, name: llama / name)
    monkeypatch.setattr(
        RepoStorage,
        "_request",
        lambda _, name, end: (llama / name).read_bytes()[:end],
    )
    checkpoint = open_storage(storage)
    here = open_checkpoint(llama)
    assert checkpoint.tensors == here.tensors
    needed = sum((llama / name).stat().st_size for name in checkpoint.files)
    assert checkpoint.bytes_to_download == needed
    assert check_download_space([checkpoint], beside=tmp_path / "out") == needed
    # On another file system it does not count there, and must fit where it goes.
    assert check_download_space([checkpoint], beside=Path("/proc/out")) == 0
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UpcycleError, match="not enough disk space to download") as caught:
        check_download_space([checkpoint], beside=Path("/proc/out"))
    assert "HF_HOME" in str(caught.value)


def test_a_hub_that_stumbles_does_not_bring_an_old_commit(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    run("convert", REPO, "old", "-r", "E2G1T1")
    changed = clone(llama, tmp_path / "changed")
    (changed / "notes.md").write_text("new")
    newer = hub.store.upload(REPO, changed)
    hub.fail("HEAD", "/config.json", 503, times=2)
    run("convert", REPO, "new", "-r", "E2G1T1")
    assert read_json(tmp_path / "new" / RECORD_NAME)["source"]["revision"] == newer


@pytest.mark.long
def test_what_the_hub_refuses_of_a_file_is_said_as_it_is(
    hub: Hub, run: RunOnHub, llama: Path
) -> None:
    hub.store.upload(REPO, llama)
    for status, words in ((403, "does not allow this"), (500, "the Hub answered 500")):
        hub.faults.clear()
        hub.fail("HEAD", "/config.json", status, times=99)
        assert_says(run("inspect", REPO, expect=2), words)


def test_a_cache_that_cannot_be_written(
    hub: Hub, run: RunOnHub, llama: Path, moe: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    run("inspect", REPO)
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", sys.executable, "-m", "upcycle_cli"]
    for command in (("convert", REPO, "out", "-r", "E2G1T1"), ("verify", REPO, moe)):
        result = subprocess.run(
            [*limited, *map(str, command)],
            env=hub.environment(tmp_path / "home"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert_says(result, f"a request to the Hub for {REPO} failed", "File too large", "hub)")


def test_a_recipe_file_for_a_directory_of_the_cache_names_no_revision(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    commit = hub.store.upload(REPO, llama)
    run("convert", REPO, "out", "-r", "E2G1T1")
    snapshot = tmp_path / "home/hub/models--acme--tiny/snapshots" / commit
    run("convert", snapshot, "x", "-r", "E2G1T1", "--dry-run", "--save-config", "u.toml")
    run("convert", "--config", "u.toml", "--dry-run")


def test_an_empty_revision(run: RunOnHub, llama: Path, moe: Path) -> None:
    for command in (
        ("inspect", REPO, "--revision", ""),
        ("convert", llama, "out", "-r", "E2G1T1", "--revision", ""),
        ("verify", llama, REPO, "--moe-revision", ""),
        ("push", moe, MOE, "--revision", ""),
    ):
        assert_says(run(*command, expect=2), "the revision is empty")


@pytest.mark.parametrize("request_", [("GET", "/_cdn/"), ("HEAD", "tokenizer.json")])
def test_an_interrupted_download_ends_at_once(
    hub: Hub, llama: Path, tmp_path: Path, request_: tuple[str, str]
) -> None:
    """A transfer that hangs is not waited for."""
    hub.store.upload(REPO, llama)
    hung, release = Event(), Event()

    def hang() -> None:
        hung.set()
        release.wait(60)

    hub.fail(*request_, 500, hit=hang)
    arguments = ["convert", REPO, "out", "-r", "E2G1T1"]
    with subprocess.Popen(
        [sys.executable, "-m", "upcycle_cli", *arguments],
        env=hub.environment(tmp_path / "home"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert hung.wait(60)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=30)
        finally:
            release.set()
            process.kill()
    assert process.returncode == 143
    assert "terminated" in said
    assert not (tmp_path / "out").exists()


# Pushing -----------------------------------------------------------------------------------------


def files_of(hub: Hub, name: str = MOE, revision: str = "main") -> dict[str, bytes]:
    """What a repo holds, without what the Hub adds."""
    found = hub.store.files(name, revision)
    del found[".gitattributes"]
    return found


def files_in(directory: Path, repo: str = MOE) -> dict[str, bytes]:
    """What a directory holds, its card as it is for a repo."""
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
    return found | {"README.md": card_for_repo(found["README.md"].decode(), repo).encode()}


def put_card(hub: Hub, tmp_path: Path, card: bytes) -> None:
    """Have the repo hold a card, and nothing else of this."""
    page = tmp_path / "page"
    page.mkdir(exist_ok=True)
    (page / "README.md").write_bytes(card)
    hub.store.upload(MOE, page)


@pytest.mark.parametrize("multipart", [0, 16_384])
def test_a_push_and_a_second_one(hub: Hub, run: RunOnHub, moe: Path, multipart: int) -> None:
    hub.multipart = multipart
    result = run("push", moe, MOE)
    assert f"{hub.url}/{MOE}" in result.stdout
    commit = hub.store.repos[MOE].refs["main"]
    assert commit in result.stdout
    assert files_of(hub) == files_in(moe)
    assert len(hub.store.repos[MOE].commits) == 2  # the Hub's own, and this one
    assert bool(hub.asked("PUT", r"part=")) == bool(multipart)
    sent = len(hub.asked("PUT", ""))
    again = validate_json("push", run("push", moe, MOE, "--json").stdout)
    assert (again["status"], again["commit"]) == ("already there", commit)
    assert len(hub.asked("PUT", "")) == sent


def test_push_options(hub: Hub, run: RunOnHub, moe: Path) -> None:
    result = json.loads(run("push", moe, MOE, "--private", "--json").stdout)
    assert result["status"] == "pushed"
    repo = hub.store.repos[MOE]
    assert repo.private
    main = repo.refs["main"]
    run("push", moe, MOE, "--revision", "candidate", "-m", "A candidate")
    assert files_of(hub, revision="candidate") == files_in(moe)
    assert repo.refs["main"] == main
    hub.store.create("acme/public")
    refused = run("push", moe, "acme/public", "--private", expect=2)
    assert_says(refused, "acme/public exists and is public")
    opened = run("push", moe, "acme/public", "--create-pr", "--json")
    pull = validate_json("push", opened.stdout)
    assert pull["pull_request"].endswith("/acme/public/discussions/1")
    assert files_of(hub, "acme/public", "refs/pr/1") == files_in(moe, "acme/public")
    assert not files_of(hub, "acme/public")
    both = run("push", moe, MOE, "--create-pr", "--revision", "x", expect=2)
    assert_says(both, "--create-pr or --revision")


def test_what_is_not_complete_is_not_pushed(
    hub: Hub, run: RunOnHub, moe: Path, llama: Path, tmp_path: Path
) -> None:
    def spoiled(name: str, spoil: Callable[[Path], object]) -> Path:
        path = clone(moe, tmp_path / name)
        spoil(path)
        return path

    def set_bytes(path: Path, tensor: str) -> None:
        from upcycle_cli.checkpoint.checkpoint import open_checkpoint

        entry = open_checkpoint(path).tensors[tensor]
        with (path / entry.shard).open("r+b") as file:
            file.seek(entry.offset)
            file.write(b"\1" * entry.nbytes)

    shard = "model-00002-of-00003.safetensors"
    shards = sorted(file.name for file in moe.glob("*.safetensors"))
    shard = shards[1]
    router = "model.layers.0.block_sparse_moe.gate.weight"
    for directory, words in (
        (llama, ["was not made by upcycle", "hf upload"]),
        (tmp_path / "absent", ["does not exist"]),
        (spoiled("lacks", lambda path: (path / shard).unlink()), [shard]),
        (spoiled("short", lambda path: (path / shard).write_bytes(b"abc")), ["truncated"]),
        (
            spoiled("config", lambda path: clone_config(path, num_local_experts=3)),
            ["not a complete upcycled checkpoint", "config.json"],
        ),
        (spoiled("trained", lambda path: set_bytes(path, router)), [router, "is not the router"]),
        (
            spoiled("partial", lambda path: (path / ".upcycle-partial").write_text("{}")),
            ["unfinished"],
        ),
        (spoiled("cardless", lambda path: (path / "README.md").unlink()), ["README.md"]),
        (
            spoiled("stray", lambda path: (path / "pytorch_model.bin").touch()),
            ["pytorch_model.bin"],
        ),
    ):
        assert_says(run("push", directory, MOE, expect=2), *words)
    assert not hub.store.repos


def clone_config(path: Path, **changes: object) -> None:
    config = read_json(path / "config.json") | changes
    (path / "config.json").write_text(json.dumps(config))


def test_files_of_others_are_left_out(hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    (directory / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (directory / "optimizer.json").write_text("{}")
    for name in ("model-checkpoints/step-5.safetensors", "tokenizer_work/secret.json"):
        (directory / name).parent.mkdir()
        (directory / name).write_text("{}")
    result = run("push", directory, MOE)
    for name in ("optimizer.json", "model-checkpoints/step-5.safetensors", "secret.json"):
        assert name in result.stdout
    assert files_of(hub) == files_in(moe)


def test_a_report_goes_with_its_model(hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    page = directory / "verification.html"
    ReportFile(page).write("<p>of another model</p>")
    assert "verification.html" in run("push", directory, MOE).stdout  # as left out
    assert "verification.html" not in files_of(hub)
    digest = hashlib.sha256((directory / "upcycle.json").read_bytes()).hexdigest()
    ReportFile(page).write(f"<p>{digest}</p>")
    run("push", directory, MOE)
    assert files_of(hub)["verification.html"] == page.read_bytes()
    assert b"verification.html" in files_of(hub)["README.md"]


def test_an_edited_card_is_kept(hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path) -> None:
    run("push", moe, MOE)
    edited = files_of(hub)["README.md"].replace(b"# ", b"# The great ", 1)
    put_card(hub, tmp_path, edited)
    directory = clone(moe, tmp_path / "moe")
    (directory / "LICENSE.txt").write_text("Do as you must.\n")
    result = json.loads(run("push", directory, MOE, "--json").stdout)
    assert (result["status"], result["card_kept"]) == ("pushed", True)
    assert files_of(hub)["README.md"] == edited
    assert files_of(hub)["LICENSE.txt"] == b"Do as you must.\n"
    assert "--replace-card" in run("push", directory, MOE).stdout
    run("push", directory, MOE, "--replace-card")
    assert files_of(hub)["README.md"] == files_in(moe)["README.md"]


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 99])
def test_an_edited_card_is_kept_when_the_hub_stumbles(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path, times: int
) -> None:
    put_card(hub, tmp_path, b"# By hand\n")
    hub.fail("HEAD", "README.md", 500, times=times)
    result = run("push", moe, MOE, expect=0 if times == 1 else 2)
    assert files_of(hub)["README.md"] == b"# By hand\n"
    if times > 1:
        assert_says(result, "the Hub answered 500")
        assert len(files_of(hub)) == 1


@pytest.mark.parametrize(
    "card",
    [
        b"\xff\xfe no text",
        b"---\nlicense: [\n---\n# By hand\n",
        b"---\n- a\n---\n# By hand\n",
        b"---\na: " + b"[" * 5_000 + b"\n---\n# By hand\n",
    ],
)
def test_a_card_that_cannot_be_read_is_kept(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path, card: bytes
) -> None:
    put_card(hub, tmp_path, card)
    assert json.loads(run("push", moe, MOE, "--json").stdout)["card_kept"]
    assert files_of(hub)["README.md"] == card


def test_reminders_are_of_the_card_that_is_kept(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path
) -> None:
    put_card(hub, tmp_path, b"---\nlicense: llama3.1\n---\n# By hand\n")
    assert "Built with Llama" in " ".join(run("push", moe, MOE).stderr.split())
    put_card(hub, tmp_path, b"# Built with Llama, by hand\n")
    assert "Built with Llama" not in " ".join(run("push", moe, MOE).stderr.split())


def test_the_card_names_the_repo_that_it_is_pushed_to(hub: Hub, run: RunOnHub, moe: Path) -> None:
    assert "my-org/" in (moe / "README.md").read_text()
    for repo in (MOE, "acme/another"):
        run("push", moe, repo)
        card = files_of(hub, repo)["README.md"].decode()
        assert f'path = "{repo}"' in card
        assert f"upcycle verify DENSE {repo}\n" in card
        assert "my-org/" not in card
        assert not is_edited(card)
    edited = (moe / "README.md").read_text() + "More.\n"
    assert card_for_repo(edited, MOE) == edited


@pytest.fixture(scope="module")
def single(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than `moe`, in one file. Read only."""
    path = tmp_path_factory.mktemp("moe") / "tiny-E2G1T1"
    convert(llama, path, Recipe(expansion=2, granularity=1, top_k=1))
    return path


def test_a_push_replaces_another_model_whole(
    hub: Hub, run: RunOnHub, moe: Path, single: Path
) -> None:
    """A weight file that stayed would be loaded in place of those that were pushed."""
    for directory, old in ((single, None), (moe, single), (single, moe)):
        removed = json.loads(run("push", directory, MOE, "--json").stdout)["removed"]
        assert files_of(hub) == files_in(directory)
        before = {path.name for path in old.iterdir()} if old else set()
        assert set(removed) == {
            name
            for name in before - {path.name for path in directory.iterdir()}
            if name.startswith("model")
        }
    table = run("push", moe, MOE).stdout
    assert "removed there" in table
    assert "model.safetensors" in table


def test_what_is_not_weights_stays_in_the_repo(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page"
    (page / "gguf").mkdir(parents=True)
    for name in ("moe-Q8.gguf", "gguf/model.safetensors", "model-lora.safetensors"):
        (page / name).write_text("mine")
    hub.store.upload(MOE, page)
    assert json.loads(run("push", moe, MOE, "--json").stdout)["removed"] == []
    assert {"moe-Q8.gguf", "gguf/model.safetensors", "model-lora.safetensors"} <= set(files_of(hub))


def test_a_card_that_is_only_metadata_is_replaced(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path
) -> None:
    put_card(hub, tmp_path, b"---\nlicense: mit\n---\n")
    run("push", moe, MOE)
    assert files_of(hub) == files_in(moe)


def test_which_cards_are_edited(moe: Path) -> None:
    card = (moe / "README.md").read_text()
    assert not is_edited(card)
    assert not is_edited("---\nlicense: mit\n---\n")
    assert not is_edited("")
    assert is_edited(card.replace("license: apache-2.0", "license: mit"))
    assert is_edited(card + "\nMore.\n")
    assert is_edited("# By hand\n")


def test_a_card_that_the_hub_refuses(hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    card = (moe / "README.md").read_text()
    (directory / "README.md").write_text(card.replace("- en\n", "- English of Oxford\n"))
    assert_says(run("push", directory, MOE, expect=2), "ISO 639")
    (directory / "README.md").write_text("---\nlicense: [\n---\n")
    assert_says(run("push", directory, MOE, expect=2), "not a valid model card")
    assert not hub.asked("PUT", "")


def test_pushing_takes_a_token_and_the_right(hub: Hub, run: RunOnHub, moe: Path) -> None:
    assert_says(run("push", moe, MOE, token=None, expect=2), "takes a token", "hf auth login")
    assert_says(run("push", moe, MOE, token="hf_wrong", expect=2), "refuses the token")
    foreign = run("push", moe, "google/gemma", expect=2)
    assert_says(foreign, "you (tester) cannot make google/gemma", "tester/…, acme/…")
    hub.store.create("google/gemma")
    assert_says(run("push", moe, "google/gemma", expect=2), "does not allow this", "rights")
    hub.role = "read"
    assert_says(run("push", moe, MOE, expect=2), "the token may only read")
    assert_says(run("push", moe, "moe", expect=2), "ORG/NAME")
    assert_says(run("push", moe, "a/b/c", expect=2), "a/b/c")
    assert_says(run("push", moe, MOE, HF_HUB_OFFLINE="1", expect=2), "HF_HUB_OFFLINE")
    assert list(hub.store.repos) == ["google/gemma"]


def test_an_upload_that_breaks_off_once_is_sent_again(hub: Hub, run: RunOnHub, moe: Path) -> None:
    hub.fail("PUT", "/_objects/", after_bytes=10_000)
    hub.fail("PUT", "/_objects/", 500)
    hub.fail("POST", "/preupload/", 429, headers={"Retry-After": "1"})
    hub.fail("POST", "/commit/", 503)
    run("push", moe, MOE)
    assert not any(fault.times for fault in hub.faults)
    assert files_of(hub) == files_in(moe)
    assert len(hub.store.repos[MOE].commits) == 2


@pytest.mark.long
def test_an_upload_cut_off_halfway_goes_on_from_there(hub: Hub, run: RunOnHub, moe: Path) -> None:
    """Half of the files arrive; then the Hub takes no more, until the second run."""
    shards = [path.name for path in moe.glob("*.safetensors")]
    hub.most_objects = len(shards) // 2
    failed = run("push", moe, MOE, expect=2)
    assert_says(failed, "cannot reach the Hub", "run the command again")
    first = {request.path for request in hub.asked("PUT", "") if request.status == 200}
    assert len(first) == len(shards) // 2
    assert len(hub.store.repos[MOE].commits) == 1  # nothing is half published
    hub.most_objects = None
    before = len(hub.requests)
    run("push", moe, MOE)
    second = {request.path for request in hub.requests[before:] if request.method == "PUT"}
    assert not first & second
    assert len(first | second) == len(shards)
    assert files_of(hub) == files_in(moe)


@pytest.mark.long
def test_a_hub_that_disappears_during_an_upload(hub: Hub, run: RunOnHub, moe: Path) -> None:
    hub.fail("PUT", "/_objects/", after_bytes=100, hit=hub.vanish)
    failed = run("push", moe, MOE, expect=2)
    assert_says(failed, "cannot reach the Hub", "run the command again")
    assert len(hub.store.repos[MOE].commits) == 1


def test_many_files_are_not_half_published_either(
    hub: Hub, run: RunOnHub, llama: Path, moe: Path, tmp_path: Path
) -> None:
    """With more than 20 files, those that make a model of the others come last."""
    from upcycle_cli import Options

    options = Options(max_shard_bytes=8_000)
    convert(llama, tmp_path / "many", RECIPE, options=options)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 20
    result = json.loads(run("push", "many", MOE, "--create-pr", "--json").stdout)
    assert result["pull_request"]
    repo = hub.store.repos[MOE]
    assert files_of(hub, revision="refs/pr/1") == files_in(tmp_path / "many")
    last = repo.commits[repo.refs["refs/pr/1"]]
    assert last.parent is not None
    assert "config.json" not in repo.commits[last.parent].tree
    assert list(repo.refs) == ["main", "refs/pr/1"]
    # Over another model, and cut off between the two commits.
    run("push", moe, MOE)
    commit = repo.refs["main"]
    hub.most_commits = 1
    assert_says(run("push", "many", MOE, expect=2), "no more commits")
    hub.most_commits = None
    assert repo.commits[repo.refs["main"]].parent == commit
    between = files_of(hub)
    assert not {"config.json", "upcycle.json", "model.safetensors.index.json"} & set(between)
    assert json.loads(run("push", "many", MOE, "--json").stdout)["status"] == "pushed"
    assert files_of(hub) == files_in(tmp_path / "many")
    assert json.loads(run("push", "many", MOE, "--json").stdout)["status"] == "already there"


def test_a_pull_request_that_was_cut_off_is_named(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    from upcycle_cli import Options

    convert(llama, tmp_path / "many", RECIPE, options=Options(max_shard_bytes=8_000))
    hub.store.create(MOE)
    hub.most_commits = 1
    failed = run("push", "many", MOE, "--create-pr", expect=2)
    assert_says(failed, "discussions/1 is open, but not complete", "--revision refs/pr/1")
    hub.most_commits = None
    run("push", "many", MOE, "--revision", "refs/pr/1")
    assert files_of(hub, revision="refs/pr/1") == files_in(tmp_path / "many")


def test_xet_stores_equal_experts_once(
    hub: Hub, run: RunOnHub, make_dense: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_dense("llama", hidden_size=256, intermediate_size=1024)
    convert(dense, tmp_path / "moe", Recipe(expansion=8, granularity=1, top_k=2))
    hub.xet = tmp_path / "cas"
    hub.xet.mkdir()
    run("push", "moe", MOE)
    assert not hub.asked("PUT", "")
    stored = sum(path.stat().st_size for path in hub.xet.rglob("*") if path.is_file())
    apparent = (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert apparent > 5 * (dense / "model.safetensors").stat().st_size
    assert stored < 0.5 * apparent
    run("verify", dense, MOE, home=tmp_path / "another home")
    again = json.loads(run("push", "moe", MOE, "--json").stdout)
    assert again["status"] == "already there"
    for path in hub.xet.rglob("*"):
        if path.is_file() and path.suffix != ".mdb":
            path.unlink()
    broken = run("verify", dense, MOE, home=tmp_path / "a third home", expect=2)
    assert "a request to the Hub for" in broken.stderr


def test_convert_and_push(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    hub.store.upload(REPO, llama)
    arguments = ("convert", REPO, "out", "-r", "E4G1T2", "--push-to-hub", MOE, "--private")
    result = validate_json("convert", run(*arguments, "--verify", "--json").stdout)
    assert result["push"]["repo"] == MOE
    card = files_of(hub)["README.md"].decode()
    assert f'path = "{MOE}"' in card
    commit = hub.store.repos[REPO].refs["main"]
    assert f"upcycle verify {REPO} {MOE} --dense-revision {commit}" in card
    assert card.count("| passed |") == 5
    assert hub.store.repos[MOE].private
    assert files_of(hub) == files_in(tmp_path / "out")
    assert run("convert", REPO, "new", "-r", "E4G1T2", "--private", expect=2)


def test_the_card_s_code_loads_what_was_pushed(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    run("convert", llama, "out", "-r", "E4G1T2", "--push-to-hub", MOE)
    card = files_of(hub)["README.md"].decode()
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    check = "\nprint(model.num_parameters(), len(tokenizer('hello').input_ids) > 0)"
    variables = hub.environment(tmp_path / "another home")
    done = forked.run([], program=found[1] + check, environment=variables)
    assert done.returncode == 0, done.stderr
    record = read_json(tmp_path / "out" / RECORD_NAME)
    assert done.stdout == f"{record['parameters']['total']} True\n"


def test_a_push_that_cannot_work_is_refused_before_the_conversion(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    arguments = ("convert", REPO, "out", "-r", "E4G1T2", "--push-to-hub", MOE)
    assert_says(run(*arguments, token="hf_wrong", expect=2), "refuses the token")
    assert_says(run(*arguments[:-1], "google/x", expect=2), "cannot make google/x")
    assert not (tmp_path / "out").exists()
    hub.store.create("google/x")
    assert_says(run(*arguments[:-1], "google/x", expect=2), "does not allow this on google/x")
    assert not (tmp_path / "out").exists()
    hub.fail("PUT", "/_objects/", 403, times=9)
    failed = run(*arguments, expect=2)
    assert_says(failed, "out is complete, but was not pushed", f"upcycle push {tmp_path}/out {MOE}")
    hub.faults.clear()
    run("push", "out", MOE)
    assert files_of(hub) == files_in(tmp_path / "out")


def test_no_token_anywhere(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    """`run` looks at what every command of these tests prints; here is what they leave."""
    hub.store.upload(REPO, llama)
    run("convert", REPO, "out", "-r", "E4G1T2", "--verify", "--checksums", "--push-to-hub", MOE)
    run("convert", REPO, "x", "-r", "E4G1T2", "--dry-run", "--save-config", "upcycle.toml")
    hub.fail("POST", "/commit/", 400, times=9)
    run("push", "out", "acme/another", expect=2)
    assert any(request.token == TOKEN for request in hub.requests)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_an_answer_that_holds_the_token(hub: Hub, run: RunOnHub, moe: Path) -> None:
    hub.fail("GET", "/api/whoami", 403, message=f"the token {TOKEN} is not for this")
    failed = run("push", moe, MOE, expect=2)
    assert_says(failed, "the token hf_… is not for this")


@pytest.mark.long
def test_no_secret_in_what_a_library_quotes(
    hub: Hub, run: RunOnHub, moe: Path, llama: Path
) -> None:
    odd = run("push", moe, MOE, token="hf_abc\x0bSECRETPART", expect=2)
    assert_says(odd, "hf_…")
    assert "SECRETPART" not in odd.stderr
    hub.store.upload(REPO, llama)
    address = hub.url.replace("http://", "http://user:sEcr3t@")
    nobody = f"{address.rsplit(':', 1)[0]}:1"
    for command, endpoints in (
        (("inspect", REPO), (address, nobody)),
        (("inspect", "acme/absent"), (address,)),
        (("push", moe, MOE), (address,)),
    ):
        for endpoint in endpoints:
            variables = hub.environment(moe.parent / "home") | {"HF_ENDPOINT": endpoint}
            result = forked.run(command, environment=variables)
            assert "sEcr3t" not in result.stdout + result.stderr
            assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ALL_PROXY", "socks5://localhost:1"),
        ("HTTP_PROXY", "ftp://localhost"),
        ("HTTP_PROXY", "http://localhost:port"),
        ("HF_ENDPOINT", "http://[::bad"),
        ("HF_TOKEN", "hf_“quoted”"),
        ("HF_HUB_ETAG_TIMEOUT", "abc"),
        ("SSL_CERT_FILE", "/nonexistent"),
    ],
)
def test_settings_that_make_no_sense(
    hub: Hub, run: RunOnHub, llama: Path, moe: Path, setting: str, value: str
) -> None:
    hub.store.upload(REPO, llama)
    for command in (("inspect", REPO), ("push", moe, MOE)):
        assert_says(run(*command, **{setting: value}, expect=2), "")
    if setting == "HF_HUB_ETAG_TIMEOUT":
        result = run("convert", llama, "out", "-r", "E4G1T2", **{setting: value}, expect=2)
        assert_says(result, "HF_…")


# Licences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "repo", "words"),
    [
        ({"license": "llama3.1"}, "me/MyMoE", ['begin with "Llama"', '"Built with Llama"']),
        ({"license": "llama3.3"}, "me/Llama-MoE", ['"Built with Llama"']),
        ({"license": "llama3"}, "me/Llama-3-MoE", ['"Built with Meta Llama 3"']),
        ({"license": "llama3"}, "me/Llama-MoE", ['begin with "Llama 3"']),
        ({"license": "other", "license_name": "llama-3.2"}, "me/x", ['begin with "Llama"']),
        ({"license": "llama4"}, "me/x", ['begin with "Llama"']),
        ({"license": "llama2"}, "me/x", ["LLAMA 2 Community License"]),
        ({"license": "gemma"}, "me/x", ["Gemma Terms of Use"]),
    ],
)
def test_licences_that_ask_for_something(
    metadata: dict[str, str], repo: str, words: list[str]
) -> None:
    found = " ".join(reminders(metadata, "", repo, []))
    for word in words:
        assert word in found


def test_licences_that_have_what_they_ask_for() -> None:
    files = ["LICENSE.txt", "NOTICE"]
    assert reminders({"license": "llama3.1"}, "Built with Llama.", "me/Llama-x", files) == ()
    assert reminders({"license": "llama2"}, "", "me/x", files) == ()
    for licence in ("apache-2.0", "mit", "llamafile", None):
        assert reminders({"license": licence}, "", "me/x", []) == ()


def test_reminders_are_shown(run: RunOnHub, moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    card = (moe / "README.md").read_text()
    (directory / "README.md").write_text(card.replace("apache-2.0", "llama3.1"))
    said = " ".join(run("push", directory, MOE).stderr.split())
    assert re.search(r'note: the Llama Community License wants the name .* "Llama"', said)
    assert "note: the Llama Community License wants the model card to say" in said
