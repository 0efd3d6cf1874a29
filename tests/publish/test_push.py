"""Push to the Hub: huggingface_hub itself against a server on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import forked
import pytest
from conftest import RunOnHub, clone, read_json, validate_json
from hub import assert_says
from hub.server import TOKEN, Hub

from upcycle_cli import Destination, Options, Recipe, UpcycleError, convert
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.publish.card import card_for_repo
from upcycle_cli.publish.push import reminders

REPO = "acme/tiny"
MOE = "acme/moe"
RECIPE = Recipe("E2G1T1")
CONVERT = ("convert", REPO, "out", "-r", "E2G1T1")


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion in several files. Read only."""
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, RECIPE, options=Options(max_shard_bytes=40_000), checksums=True)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def single(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than `moe`, in one file. Read only."""
    return convert(llama, tmp_path_factory.mktemp("single") / "moe", RECIPE).output


def files_of(hub: Hub, name: str = MOE, revision: str = "main") -> dict[str, bytes]:
    """Return the files of a repo without what the Hub adds."""
    found = hub.store.files(name, revision)
    del found[".gitattributes"]
    return found


def files_in(directory: Path, repo: str = MOE) -> dict[str, bytes]:
    """Return the files of a directory, with the card as it is for a repo."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return found | {"README.md": card_for_repo(found["README.md"].decode(), repo).encode()}


def put_card(hub: Hub, tmp_path: Path, card: bytes) -> None:
    """Make the card the only file that the repo has."""
    page = tmp_path / "page"
    page.mkdir(exist_ok=True)
    (page / "README.md").write_bytes(card)
    hub.store.upload(MOE, page)


# What arrives ------------------------------------------------------------------------------------


def test_push_once_and_again(hub: Hub, run: RunOnHub, moe: Path, llama: Path) -> None:
    result = run("push", moe, MOE)
    commit = hub.store.repos[MOE].refs["main"]
    assert f"{hub.url}/{MOE}" in result.stdout
    assert commit in result.stdout
    assert files_of(hub) == files_in(moe)
    assert len(hub.store.repos[MOE].commits) == 2  # the Hub's own and this one
    sent = len(hub.asked("PUT", ""))
    again = validate_json("push", run("push", moe, MOE, "--json").stdout)
    assert (again["status"], again["commit"]) == ("already there", commit)
    assert again["left_out"] == []
    assert len(hub.asked("PUT", "")) == sent
    run("verify", llama, MOE)


def test_push_to_a_branch_a_private_repo_and_a_pull_request(
    hub: Hub, run: RunOnHub, moe: Path
) -> None:
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


def test_refuse_an_impossible_destination() -> None:
    with pytest.raises(UpcycleError, match="`create_pr`"):
        Destination(repo=MOE, create_pr=True, revision="x")
    with pytest.raises(UpcycleError, match="the revision is empty"):
        Destination(repo=MOE, revision="")


def test_replace_another_model_and_keep_other_files(
    hub: Hub, run: RunOnHub, moe: Path, single: Path, tmp_path: Path
) -> None:
    """A weight file that stayed would be loaded instead of the pushed ones."""
    page = tmp_path / "page"
    (page / "gguf").mkdir(parents=True)
    others = {"moe-Q8.gguf", "gguf/model.safetensors", "model-lora.safetensors"}
    for name in others:
        (page / name).write_text("mine")
    (page / "verification.html").write_text("of another model")
    (page / "model.safetensors").write_text("another model")
    hub.store.upload(MOE, page)
    for directory, old in ((single, page), (moe, single), (single, moe)):
        done = json.loads(run("push", directory, MOE, "--json").stdout)
        removed = done["removed"]
        assert done["replaced"] == (["model.safetensors"] if old == page else [])
        assert files_of(hub).keys() == files_in(directory).keys() | others
        stale = {path.name for path in old.iterdir()} - {path.name for path in directory.iterdir()}
        assert set(removed) == stale - others - {"gguf"}
    assert "removed there" in run("push", moe, MOE).stdout


# The card ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        (b"---\nlicense: mit\n---\n", False),
        (b"# By hand\n", True),
        (b"\xff\xfe no text", True),
        (b"---\nlicense: [\n---\n# By hand\n", True),
    ],
)
def test_keep_a_card_that_somebody_wrote(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path, card: bytes, *, kept: bool
) -> None:
    put_card(hub, tmp_path, card)
    assert json.loads(run("push", moe, MOE, "--json").stdout)["card_kept"] == kept
    assert files_of(hub) == files_in(moe) | ({"README.md": card} if kept else {})


def test_keep_an_edited_card_until_told_otherwise(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path
) -> None:
    run("push", moe, MOE)
    edited = files_of(hub)["README.md"].replace(b"# ", b"# The great ", 1)
    put_card(hub, tmp_path, edited)
    assert "--replace-card" in run("push", moe, MOE).stdout
    assert files_of(hub)["README.md"] == edited
    hub.fail("HEAD", "README.md", 500, times=99)
    failed = run("push", moe, MOE, home=tmp_path / "without a cache", expect=2)
    assert_says(failed, "the Hub answered 500")
    assert files_of(hub)["README.md"] == edited
    hub.faults.clear()
    run("push", moe, MOE, "--replace-card")
    assert files_of(hub)["README.md"] == files_in(moe)["README.md"]


def test_remind_of_the_licence_in_the_card_that_is_published(
    hub: Hub, run: RunOnHub, moe: Path, tmp_path: Path
) -> None:
    put_card(hub, tmp_path, b"---\nlicense: llama3.1\n---\n# By hand\n")
    said = " ".join(run("push", moe, MOE).stderr.split())
    assert re.search(r'note: the Llama Community License requires the name .* "Llama"', said)
    assert "note: the Llama Community License requires the model card to say" in said
    put_card(hub, tmp_path, b"# Built with Llama, by hand\n")
    assert "Built with Llama" not in " ".join(run("push", moe, MOE).stderr.split())


def test_refuse_a_card_that_the_hub_refuses(
    hub: Hub, run: RunOnHub, single: Path, tmp_path: Path
) -> None:
    directory = clone(single, tmp_path / "moe")
    (directory / "README.md").write_text("---\nlanguage: English of Oxford\n---\n# x\n")
    assert_says(run("push", directory, MOE, expect=2), "ISO 639")
    assert not hub.asked("PUT", "")


# Licences ---------------------------------------------------------------------------------------


def card_of(metadata: dict[str, str]) -> str:
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    return f"---\n{lines}---\n"


@pytest.mark.parametrize(
    ("metadata", "repo", "words"),
    [
        ({"license": "llama3.1"}, "me/MyMoE", ['begin with "Llama"', '"Built with Llama"']),
        ({"license": "llama3.3"}, "me/Llama-MoE", ['"Built with Llama"']),
        ({"license": "llama3"}, "me/Llama-3-MoE", ['"Built with Meta Llama 3"']),
        ({"license": "llama3"}, "me/Llama-MoE", ['begin with "Llama 3"']),
        ({"license": "other", "license_name": "llama-3.2"}, "me/x", ['begin with "Llama"']),
        ({"license": "llama4"}, "me/x", ['begin with "Llama"', "`hf upload me/x Notice`"]),
        ({"license": "llama2"}, "me/x", ["LLAMA 2 Community License", "`hf upload me/x LICENSE`"]),
        ({"license": "gemma"}, "me/x", ["Gemma Terms of Use"]),
    ],
)
def test_remind_of_names_phrases_and_files(
    metadata: dict[str, str], repo: str, words: list[str]
) -> None:
    found = " ".join(reminders(card_of(metadata), repo, []))
    for word in words:
        assert word in found


def test_stay_silent_when_nothing_is_missing() -> None:
    files = ["LICENSE.txt", "NOTICE"]
    card = card_of({"license": "llama3.1"}) + "Built with Llama."
    assert reminders(card, "me/Llama-x", files) == ()
    assert reminders(card_of({"license": "llama2"}), "me/x", files) == ()
    for licence in ("apache-2.0", "mit", "llamafile", "["):
        assert reminders(card_of({"license": licence}), "me/x", []) == ()
    assert "no licence" in reminders(card_of({"license": "null"}), "me/x", [])[0]
    assert reminders(card_of({"base_model": "meta-llama/x"}), "me/x", []) == ()


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "token", "role", "words"),
    [
        (MOE, None, "write", ["needs a token", "hf auth login"]),
        (MOE, "hf_wrong", "write", ["refuses the token"]),
        ("google/gemma", TOKEN, "write", ["you (tester) cannot create google/gemma", "acme/…"]),
        ("google/there", TOKEN, "write", ["does not allow this", "rights"]),
        (MOE, TOKEN, "read", ["cannot create acme/moe", "a token that may write"]),
        ("moe", TOKEN, "write", ["ORG/NAME"]),
        ("a/b/c", TOKEN, "write", ["a/b/c"]),
    ],
)
def test_refuse_a_push_without_the_right(
    hub: Hub, run: RunOnHub, moe: Path, repo: str, token: str | None, role: str, words: list[str]
) -> None:
    hub.store.create("google/there")
    hub.role = role
    assert_says(run("push", moe, repo, token=token, expect=2), *words)
    assert list(hub.store.repos) == ["google/there"]


def test_refuse_a_push_before_the_conversion(
    hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path
) -> None:
    hub.store.upload(REPO, llama)
    push = (*CONVERT, "--push-to-hub")
    assert_says(run(*push, MOE, token="hf_wrong", expect=2), "refuses the token")
    assert_says(run(*push, "google/x", expect=2), "cannot create google/x")
    assert_says(run(*push, MOE, HF_HUB_OFFLINE="1", expect=2), "HF_HUB_OFFLINE")
    assert not (tmp_path / "out").exists()
    hub.fail("PUT", "/_objects/", 403, times=9)
    failed = run(*push, MOE, expect=2)
    assert_says(failed, "out is complete, but was not pushed", f"upcycle push {tmp_path}/out {MOE}")
    hub.faults.clear()
    run("push", "out", MOE)
    assert files_of(hub) == files_in(tmp_path / "out")


# Interruptions -----------------------------------------------------------------------------------


def test_repeat_uploads_that_break_off(hub: Hub, run: RunOnHub, moe: Path) -> None:
    hub.fail("PUT", "/_objects/", after_bytes=10_000)
    hub.fail("PUT", "/_objects/", 500)
    hub.fail("POST", "/preupload/", 429, headers={"Retry-After": "1"})
    hub.fail("POST", "/commit/", 503)
    run("push", moe, MOE)
    assert not any(fault.times for fault in hub.faults)
    assert files_of(hub) == files_in(moe)
    assert len(hub.store.repos[MOE].commits) == 2


def test_continue_an_interrupted_upload(hub: Hub, run: RunOnHub, moe: Path) -> None:
    shards = [path.name for path in moe.glob("*.safetensors")]
    hub.fail("PUT", "/_objects/", times=99, skip=len(shards) // 2)
    failed = run("push", moe, MOE, expect=2)
    assert_says(failed, "cannot reach the Hub", "run the command again")
    first = {request.path for request in hub.asked("PUT", "") if request.status == 200}
    assert len(first) == len(shards) // 2
    assert len(hub.store.repos[MOE].commits) == 1  # nothing is half published
    hub.faults.clear()
    before = len(hub.requests)
    run("push", moe, MOE)
    second = {request.path for request in hub.requests[before:] if request.method == "PUT"}
    assert not first & second
    assert len(first | second) == len(shards)
    assert files_of(hub) == files_in(moe)


# Convert and push --------------------------------------------------------------------------------


def test_convert_verify_and_push(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    commit = hub.store.upload(REPO, llama)
    arguments = (*CONVERT, "--push-to-hub", MOE, "--private", "--verify", "--checksums")
    result = validate_json("convert", run(*arguments, "--json").stdout)
    assert result["push"]["repo"] == MOE
    assert hub.store.repos[MOE].private
    assert files_of(hub) == files_in(tmp_path / "out")
    card = files_of(hub)["README.md"].decode()
    assert f"upcycle verify {REPO}@{commit} {MOE}" in card
    assert card.count("| passed |") == 3
    # The card's code loads what was pushed.
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    check = "\nprint(model.num_parameters(), len(tokenizer('hello').input_ids) > 0)"
    variables = hub.environment(tmp_path / "another home")
    done = forked.run([], program=code[1] + check, environment=variables)
    assert done.returncode == 0, done.stderr
    record = read_json(tmp_path / "out" / RECORD_NAME)
    assert done.stdout.endswith(f"\n{record['parameters']['total']} True\n")
    # `run` looks for the token in what every command prints; here is what they wrote.
    run("convert", REPO, "x", "-r", "E2G1T1", "--dry-run", "--save-config", "upcycle.toml")
    assert any(request.token == TOKEN for request in hub.requests)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_use_a_mirror_with_a_password(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    """Neither messages nor files, here and on the mirror, contain the password."""
    hub.store.upload(REPO, llama)
    hub.password = "user:pass/w0rd"  # noqa: S105 - opens nothing
    mirror = {"HF_ENDPOINT": hub.url.replace("//", "//user:pass%2Fw0rd@")}
    for command, code in (
        ((*CONVERT, "--save-config", "u.toml"), 0),
        (("push", "out", MOE), 0),
        (("inspect", "acme/nothing"), 2),
        (("push", "out", "stranger/moe"), 2),
    ):
        done = run(*command, expect=code, **mirror)
        assert "w0rd" not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"w0rd" in path.read_bytes()]
