"""Requests to servers that misbehave: one error message, bounded size, no path from an answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hub.server import TOKEN, Hub
from upcycle_cli import UpcycleError
from upcycle_cli.hub.client import checked_commit, file_sizes
from upcycle_cli.hub.remote_checkpoint import open_source

if TYPE_CHECKING:
    from conftest import RunOnHub

REPO = "acme/tiny"
INFO = r"/api/models/acme/tiny(/revision/\w+)?(\?|$)"


# What answers say --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "a\x1b[2J", "", 7, None])
def test_refuse_file_names_that_leave_the_repo(name: object) -> None:
    file = SimpleNamespace(rfilename=name, size=1)
    with pytest.raises(UpcycleError, match="a file is named"):
        file_sizes(SimpleNamespace(siblings=[file]))  # type: ignore[arg-type]


@pytest.mark.parametrize("commit", [None, 7, "../../../../escape", "A" * 40, "0" * 41])
def test_refuse_commits_that_are_not_ids(commit: object) -> None:
    with pytest.raises(UpcycleError, match="the commit is"):
        checked_commit(commit)


# On the wire -------------------------------------------------------------------------------------


ALTERATIONS: list[tuple[str, str, dict[str, Any], str]] = [
    ("HEAD", "config.json", {"headers": {"X-Repo-Commit": "../../escape"}}, "X-Repo-Commit is"),
    ("HEAD", "config.json", {"headers": {"ETag": '"../../escape"'}}, "ETag is"),
    ("HEAD", "config.json", {"headers": {"X-Linked-Etag": '"a/b"'}}, "X-Linked-ETag is"),
    ("HEAD", "config.json", {"headers": {"X-Linked-Size": "-1"}}, ""),
    ("GET", "model.safetensors", {"headers": {"Location": "file:///etc/passwd"}}, ""),
    ("GET", "model.safetensors", {"headers": {"Location": "http://[::"}}, ""),
    ("GET", INFO, {"body": lambda answer: answer | {"sha": "../escape"}}, "the commit is"),
    ("GET", INFO, {"body": lambda _: b"[" * 100_000}, ""),
    ("GET", INFO, {"body": lambda _: b"\xff\xfe"}, ""),
    ("GET", INFO, {"status": 400, "body": lambda _: {"error": "\x1b[2J" + "x" * 900_000}}, ""),
    # Answers without an end; of a weight file only the requested range is read.
    ("GET", INFO, {"endless": True}, "far more bytes than it announced"),
    ("GET", INFO, {"endless": True, "status": 500}, ""),
    ("GET", "config.json", {"endless": True}, "far more bytes than it announced"),
    ("GET", "_cdn", {"endless": True}, "its header would have"),
]


@pytest.mark.parametrize(("method", "path", "how", "words"), ALTERATIONS)
def test_refuse_answers_that_the_hub_does_not_give(
    hub: Hub,
    run: RunOnHub,
    llama: Path,
    tmp_path: Path,
    method: str,
    path: str,
    how: dict[str, Any],
    words: str,
) -> None:
    hub.store.upload(REPO, llama)
    hub.alter(method, path, **how)
    said = " ".join(run("inspect", REPO, expect=2).stderr.split())
    assert said.count("error:") == 1
    assert words in said
    assert len(said) < 2_000
    assert "\x1b" not in said
    assert not list(tmp_path.rglob("*escape*"))


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


def test_explain_a_huggingface_hub_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.__version__", "0.36.0")
    with pytest.raises(UpcycleError, match=r"0\.36\.0 is installed"):
        open_source(REPO)


def test_hide_the_token_that_an_answer_quotes(hub: Hub, run: RunOnHub) -> None:
    hub.fail("GET", "/api/models/", 403, message=f"the token {TOKEN} is not for this")
    assert "the token hf_… is not for this" in " ".join(
        run("inspect", REPO, expect=2).stderr.split()
    )
