"""Sources on the Hub: huggingface_hub itself against a server on loopback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import RunOnHub, clone, contents, read_json, read_tensors
from shapes import big_config, write_hollow

from hub import assert_says
from hub.server import TOKEN, Hub
from upcycle_cli import Recipe, UpcycleError, convert
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.hub.remote_checkpoint import is_repo_id, locate_model, split_revision

REPO = "acme/tiny"
WEIGHTS = "model.safetensors"
CONVERT = ("convert", REPO, "out", "-r", "E2G1T1")
RECIPE = Recipe("E2G1T1")


# What is downloaded ------------------------------------------------------------------------------


def test_convert_a_repo_like_a_directory(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    source = clone(llama, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"a second copy of the weights")
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").write_bytes(b"a third one")
    commit = hub.store.upload(REPO, source)
    result = run(*CONVERT)
    out, local = tmp_path / "out", convert(llama, tmp_path / "local", RECIPE).output
    assert f"upcycle verify {REPO}@{commit} {out}" in " ".join(result.stderr.split())
    assert (out / WEIGHTS).read_bytes() == (local / WEIGHTS).read_bytes()
    record = read_json(out / RECORD_NAME)["source"]
    assert (record["name"], record["revision"]) == (REPO, commit)
    card = (out / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert commit in card
    for needless in ("pytorch_model.bin", "original"):
        assert not hub.asked("GET", needless)
    shutil.rmtree(tmp_path / "home")
    assert "nothing to do" in run(*CONVERT).stderr
    assert not list((tmp_path / "home").rglob(WEIGHTS))


def test_inspect_reads_kilobytes_of_a_large_repo(hub: Hub, run: RunOnHub, tmp_path: Path) -> None:
    """30 shards of 141 GB, which do not exist."""
    dense = write_hollow(tmp_path / "dense", big_config("llama-3.1-70b"))
    (dense / "tokenizer.json").write_bytes(b" " * 9_000_000)
    hub.store.upload("acme/large", dense, hollow=True)
    found = json.loads(run("inspect", "acme/large", "--recipe", "E8G8T8", "--json").stdout)
    assert found["total_parameters"] > 70e9
    assert found["shards"] == 30
    assert found["plan"]["num_experts"] == 64
    assert hub.transferred() < 5_000_000


def test_read_a_header_that_is_larger_than_the_first_request(
    hub: Hub, run: RunOnHub, make_dense: Callable[..., Path], tmp_path: Path
) -> None:
    dense = clone(make_dense("llama"), tmp_path / "dense")
    data = (dense / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * 100_000
    (dense / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    hub.store.upload(REPO, dense)
    run("inspect", REPO)
    run(*CONVERT)
    run("inspect", REPO, HF_HUB_OFFLINE="1")


def test_verify_and_inspect_repos(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    moe = convert(llama, tmp_path / "moe", RECIPE, checksums=True).output
    hub.store.upload(REPO, llama)
    hub.store.upload("acme/moe", moe)
    found = json.loads(run("inspect", "acme/moe", "--json").stdout)
    assert (found["kind"], found["recipe"]) == ("moe", "E2G1T1")
    report = json.loads(run("verify", REPO, "acme/moe", "--json").stdout)
    assert report["status"] == "passed"
    assert_says(run("verify", "acme/moe", REPO, expect=2), "The dense model comes first")
    pinned = run("verify", REPO, "acme/moe", "--moe-revision", "absent", expect=2)
    assert_says(pinned, "no revision 'absent'")
    (moe / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    hub.store.upload("acme/moe", moe)
    assert "SHA256SUMS" in run("verify", REPO, "acme/moe", "--json", expect=1).stdout


# Names and revisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_inspect_a_revision(
    hub: Hub, run: RunOnHub, llama: Path, make_dense: Callable[..., Path], by: str
) -> None:
    hub.store.upload(REPO, make_dense("mistral"))
    commit = hub.store.upload(REPO, llama, branch="candidate")
    revision = {"branch": "candidate", "commit": commit}[by]
    found = run("inspect", REPO, "--revision", revision, "--json")
    assert json.loads(found.stdout)["model_type"] == "llama"
    assert json.loads(run("inspect", REPO, "--json").stdout)["model_type"] == "mistral"


def test_tell_repo_ids_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "here").mkdir(parents=True)
    assert is_repo_id("acme/there")
    assert is_repo_id(Path("meta-llama/Llama-3.1-8B"))
    for path in ("acme/here", "there", "./acme/there", "/acme/there", "a/b/c", "../a", "~/a", ""):
        assert not is_repo_id(path)
    assert split_revision("acme/there@v1") == ("acme/there", "v1")
    assert split_revision("acme/here@v1") == ("acme/here@v1", None)


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("LLAMA", "main", "needs a repo on the Hub"),
        ("LLAMA", "", "the revision is empty"),
        (REPO, " ", "the revision is empty"),
    ],
)
def test_refuse_a_revision(llama: Path, source: str, revision: str, words: str) -> None:
    with pytest.raises(UpcycleError, match=words):
        locate_model(llama if source == "LLAMA" else source, revision)


# Errors ------------------------------------------------------------------------------------------


API = "/api/models/acme/tiny"


@pytest.mark.parametrize(
    ("repo", "token", "fault", "words"),
    [
        ("acme/absent", TOKEN, (), ["acme/absent is neither a local directory", "Check the name"]),
        ("acme/hidden", None, (), ["acme/hidden is neither", "hf auth login", "HF_TOKEN"]),
        ("acme/gated", TOKEN, (), ["access to acme/gated is restricted", "/acme/gated"]),
        ("acme/gated", None, (), ["you are not signed in", "hf auth login"]),
        ("acme/empty", TOKEN, (), ["acme/empty has no config.json"]),
        ("acme/lora", TOKEN, (), ["acme/lora is an adapter", "BASE+acme/lora"]),
        (f"{REPO}@absent", TOKEN, (), [f"{REPO} has no revision 'absent'"]),
        (REPO, "hf_wrong", (), ["refuses the token", "HF_TOKEN"]),
        # A Hub that keeps failing.
        (REPO, TOKEN, ("GET", API, 503), ["503", "Try again later"]),
        (REPO, TOKEN, ("HEAD", "/config.json", 403), ["does not allow this"]),
        (REPO, TOKEN, ("HEAD", "/config.json", 500), ["the Hub answered 500"]),
        (REPO, TOKEN, ("GET", API), ["cannot reach the Hub at http://127.0.0.1"]),
    ],
)
def test_say_why_a_repo_cannot_be_read(
    hub: Hub,
    run: RunOnHub,
    llama: Path,
    tmp_path: Path,
    repo: str,
    token: str | None,
    fault: tuple[Any, ...],
    words: list[str],
) -> None:
    for name in (REPO, "acme/hidden", "acme/gated"):
        hub.store.upload(name, llama)
    hub.store.repos["acme/hidden"].private = True
    hub.store.repos["acme/gated"].gated = True
    hub.store.create("acme/empty")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    hub.store.upload("acme/lora", tmp_path / "lora")
    if fault:
        hub.fail(*fault, times=99)
    name, _, revision = repo.partition("@")
    options = ("--revision", revision) if revision else ()
    assert_says(run("inspect", name, *options, token=token, expect=2), *words)


def test_work_offline_from_the_cache(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    hub.store.upload(REPO, llama)
    empty = run("inspect", REPO, HF_HUB_OFFLINE="1", expect=2)
    assert_says(empty, "HF_HUB_OFFLINE", f"hf download {REPO}")
    assert not hub.requests
    run("inspect", REPO)
    assert_says(run(*CONVERT, HF_HUB_OFFLINE="1", expect=2), "HF_HUB_OFFLINE")
    run(*CONVERT)
    asked = len(hub.requests)
    run("convert", REPO, "again", "-r", "E2G1T1", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_repeat_requests_to_a_busy_hub(hub: Hub, run: RunOnHub, llama: Path) -> None:
    hub.store.upload(REPO, llama)
    for status in (500, 503):
        hub.fail("GET", r"/api/models/acme/tiny", status)
    hub.fail("GET", r"/_cdn/", 429, headers={"Retry-After": "1"})
    run("inspect", REPO)
    assert not any(fault.times for fault in hub.faults)


def test_continue_a_download_that_broke_off(
    hub: Hub, run: RunOnHub, make_dense: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_dense("llama", vocab_size=60_000)
    size = (dense / WEIGHTS).stat().st_size
    hub.store.upload(REPO, dense)
    cut = 11_000_000  # huggingface_hub keeps multiples of 10 MiB
    assert size > 1.3 * cut
    hub.cuts = [cut]
    run(*CONVERT)
    assert not hub.cuts
    sent = sum(request.sent for request in hub.asked("GET", "/_cdn/"))
    assert sent < size + 0.5 * cut  # not from the beginning again
    assert read_tensors(tmp_path / "out")


def test_use_the_newest_commit_although_the_hub_fails_once(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    run(*CONVERT)
    changed = clone(llama, tmp_path / "changed")
    (changed / "notes.md").write_text("new")
    newer = hub.store.upload(REPO, changed)
    hub.fail("HEAD", "/config.json", 503, times=2)
    run("convert", REPO, "new", "-r", "E2G1T1")
    assert read_json(tmp_path / "new" / RECORD_NAME)["source"]["revision"] == newer


def test_end_a_hanging_download_at_a_signal(hub: Hub, llama: Path, tmp_path: Path) -> None:
    hub.store.upload(REPO, llama)
    hung, release = Event(), Event()

    def hang() -> None:
        hung.set()
        release.wait(60)

    hub.fail("HEAD", "tokenizer.json", 500, hit=hang)
    with subprocess.Popen(
        [sys.executable, "-m", "upcycle_cli", *CONVERT],
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
