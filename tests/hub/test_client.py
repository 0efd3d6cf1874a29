"""Requests to servers that misbehave: one error message, bounded size, no path from an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from conftest import IMPATIENT, RunOnHub

from hub.server import TOKEN, Hub
from upcycle_cli import UpcycleError
from upcycle_cli.hub.client import checked_commit, read_repo, read_user

REPO = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = r"/api/models/acme/tiny(/revision/\w+)?(\?|$)"


# What answers say --------------------------------------------------------------------------------


def info(**changes: object) -> Any:  # noqa: ANN401
    """What huggingface_hub returns for a repo with one file."""
    file = {"rfilename": "x", "size": 1} | changes
    siblings = [SimpleNamespace(**file)]
    return SimpleNamespace(siblings=siblings, sha=changes.get("sha", COMMIT), private=False)


def test_read_a_repo_and_a_user() -> None:
    repo = read_repo(info(), with_sizes=True)
    assert (repo.commit, repo.sizes, repo.private) == (COMMIT, {"x": 1}, False)
    assert read_repo(info(size=None)).sizes == {"x": 0}
    user = {"name": "me", "orgs": [{"name": "acme"}], "auth": {"accessToken": {"role": "read"}}}
    assert read_user(user) == (["me", "acme"], True)
    assert read_user({"name": "me"}) == (["me"], False)


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "a\x1b[2J", "", 7, None])
def test_refuse_file_names_that_leave_the_repo(name: object) -> None:
    with pytest.raises(UpcycleError, match="a file is named"):
        read_repo(info(rfilename=name))


@pytest.mark.parametrize("commit", [None, 7, "../../../../escape", "A" * 40, "0" * 41])
def test_refuse_commits_that_are_not_ids(commit: object) -> None:
    for read in (lambda: checked_commit(commit), lambda: read_repo(info(sha=commit))):
        with pytest.raises(UpcycleError, match="the commit is"):
            read()


# On the wire -------------------------------------------------------------------------------------


@pytest.fixture
def refused(hub: Hub, run: RunOnHub, llama: Path) -> Callable[[], str]:
    """Inspect a repo, which must end in one error message; return it."""
    hub.store.upload(REPO, llama)

    def inspect() -> str:
        said = " ".join(run("inspect", REPO, expect=2).stderr.split())
        assert said.count("error:") == 1
        assert len(said) < 2_000
        assert "\x1b" not in said
        return said

    return inspect


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("HEAD", "config.json", {"X-Repo-Commit": "../../escape"}),
        ("HEAD", "config.json", {"ETag": '"../../escape"'}),
        ("HEAD", "config.json", {"X-Linked-Etag": '"a/b"'}),
        ("HEAD", "config.json", {"X-Linked-Size": "-1"}),
        ("GET", "model.safetensors", {"Location": "file:///etc/passwd"}),
        ("GET", "model.safetensors", {"Location": "http://[::"}),
    ],
)
def test_refuse_headers_that_become_paths_or_sizes(
    hub: Hub,
    refused: Callable[[], str],
    tmp_path: Path,
    method: str,
    path: str,
    headers: dict[str, str],
) -> None:
    hub.alter(method, path, headers=headers)
    refused()
    assert not list(tmp_path.rglob("*escape*"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda answer: answer | {"sha": "../escape"}, "the commit is"),
        (lambda _: b"[" * 100_000, ""),
        (lambda _: b"\xff\xfe", ""),
    ],
)
def test_refuse_listings_of_another_form(
    hub: Hub, refused: Callable[[], str], body: Callable[[Any], Any], words: str
) -> None:
    hub.alter("GET", INFO, body=body)
    assert words in refused()


def test_cut_a_long_error_short(hub: Hub, refused: Callable[[], str]) -> None:
    hub.alter("GET", INFO, status=400, body=lambda _: {"error": "\x1b[2J" + "x" * 900_000})
    refused()


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (INFO, None, "far more bytes than it announced"),
        (INFO, 500, ""),
        ("config.json", None, "far more bytes than it announced"),
        ("_cdn", None, "its header would have"),  # only the requested range is read
    ],
)
def test_stop_answers_without_an_end(
    hub: Hub, refused: Callable[[], str], path: str, status: int | None, words: str
) -> None:
    hub.alter("GET", path, status=status, endless=True)
    assert words in refused()


def test_compare_the_size_of_a_file_with_the_listing(hub: Hub, refused: Callable[[], str]) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        for file in answer["siblings"]:
            if file["rfilename"] == "config.json":
                file["size"] = 3
        return answer

    hub.alter("GET", INFO, body=change)
    assert "bytes, and 3 in acme/tiny" in refused()


# Secrets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://localhost:1"),
        ("HTTP_PROXY", "http://localhost:port"),
        ("HF_ENDPOINT", "http://[::bad"),
        ("HF_TOKEN", "hf_“quoted”"),
        ("HF_TOKEN", "hf_abc\x0bSECRETPART"),
        ("HF_HUB_ETAG_TIMEOUT", "abc"),
        ("SSL_CERT_FILE", "/nonexistent"),
    ],
)
def test_explain_settings_that_make_no_sense(
    hub: Hub, run: RunOnHub, llama: Path, variable: str, value: str
) -> None:
    hub.store.upload(REPO, llama)
    result = run("inspect", REPO, **{variable: value}, expect=2)
    assert result.stderr.count("error:") == 1
    assert "SECRETPART" not in result.stderr


@pytest.mark.parametrize("port", ["", ":1"])
def test_hide_the_password_of_a_mirror_in_messages(hub: Hub, tmp_path: Path, port: str) -> None:
    address = hub.url.replace("http://", "http://user:sEcr3t@")
    address = f"{address.rsplit(':', 1)[0]}{port}" if port else address
    variables = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": address}
    result = forked.run(("inspect", REPO), program=IMPATIENT, environment=variables)
    assert result.returncode == 2
    assert "sEcr3t" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_hide_the_token_that_an_answer_quotes(hub: Hub, run: RunOnHub) -> None:
    hub.fail("GET", "/api/models/", 403, message=f"the token {TOKEN} is not for this")
    assert "the token hf_… is not for this" in " ".join(
        run("inspect", REPO, expect=2).stderr.split()
    )


# Progress ----------------------------------------------------------------------------------------
