"""Answers that no Hub gives: each is one message, in bounded time, and writes nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import clone
from hub.server import TOKEN, Hub

from upcycle_cli.core.secrets import blotted

REPO = "acme/tiny"
INFO = r"/api/models/acme/tiny(/revision/\w+)?(\?|$)"
COMMIT = "0" * 40


@pytest.fixture
def refused(hub: Hub, llama: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a command on a repo, which must end in one message; return what it says."""
    hub.store.upload(REPO, llama)

    def run(*arguments: str | Path, limits: str = "", expect: int = 2, **variables: str) -> str:
        code = f"""
from upcycle_cli.hub import client
client._RETRY_WAITS = ()
{limits}
from upcycle_cli.cli.app import main
main()
"""
        done = forked.run(
            arguments or ("inspect", REPO),
            program=code,
            cwd=tmp_path,
            seconds=60,
            environment=hub.environment(tmp_path / "home") | {"COLUMNS": "80"} | variables,
        )
        said = " ".join(done.stderr.split())
        assert (done.returncode, said.count("error:"), "Traceback" in said) == (
            expect,
            1 if expect else 0,
            False,
        ), done.stderr
        assert len(said) < 2_000
        assert "\x1b" not in said
        assert TOKEN not in said
        return said

    return run


def _with(**changes: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: answer | changes


def _instead(value: object) -> Callable[[object], object]:
    return lambda _: value


def _sibling(**changes: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Add a file to what a repo holds."""
    file = {"rfilename": "x", "size": 1} | changes
    return lambda answer: answer | {"siblings": [*answer["siblings"], file]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        *(
            (_with(sha=sha), "commit")
            for sha in (None, 7, "../../../../escape", "A" * 40, "0" * 41)
        ),
        *(
            (_sibling(rfilename=name), "is named")
            for name in (
                "../x",
                "/x",
                "a\\b",
                "a\x1b[2J",
                "a//b",
                "./x",
                "",
                7,
                None,
                "config.json",
            )
        ),
        (_sibling(rfilename="config.json/x"), "a file and a directory"),
        *((_sibling(size=size), "the size of x") for size in (None, -1, "1", 1.5, True, 10**30)),
        (_with(siblings=[{"rfilename": str(n), "size": 1} for n in range(100_001)]), "100,001"),
        (_with(siblings=None), "no config.json"),
        (_with(siblings=7), "does not answer"),
        (_with(siblings=[7]), "does not answer"),
        (_with(siblings=[{}]), "does not answer"),
        (_instead([]), "does not answer"),
        (_instead(None), "does not answer"),
        (_instead("x"), "does not answer"),
        (lambda _: b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (lambda _: b"{", "not JSON"),
        (lambda _: b"\xff\xfe", ""),
    ],
)
def test_a_listing_that_is_none(
    hub: Hub, refused: Callable[..., str], tmp_path: Path, body: Callable[[Any], Any], words: str
) -> None:
    hub.alter("GET", INFO, body=body)
    assert words in refused()
    written = {path for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert not {path for path in written if path.name != "CACHEDIR.TAG"}


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        *(("HEAD", "config.json", {"X-Repo-Commit": x}) for x in ("../../escape", "a" * 39)),
        *(
            ("HEAD", "config.json", {name: value})
            for name in ("ETag", "X-Linked-Etag")
            for value in ('"../../escape"', '".."', '"a/b"', '"' + "a" * 300 + '"')
        ),
        ("HEAD", "config.json", {"ETag": ""}),
        ("HEAD", "config.json", {"X-Linked-Size": "²"}),
        ("HEAD", "config.json", {"X-Linked-Size": "-1"}),
        ("HEAD", "config.json", {"X-Xet-Hash": "../../escape"}),
        ("GET", "model.safetensors", {"Location": "file:///etc/passwd"}),
        ("GET", "model.safetensors", {"Location": "ftp://localhost/x"}),
        ("GET", "model.safetensors", {"Location": "/acme/tiny/resolve/main/model.safetensors"}),
        ("GET", "model.safetensors", {"Location": "http://[::"}),
        ("GET", "_cdn", {"Content-Encoding": "gzip"}),
        ("GET", INFO, {"Content-Encoding": "gzip"}),
    ],
)
def test_headers(
    hub: Hub,
    refused: Callable[..., str],
    tmp_path: Path,
    method: str,
    path: str,
    headers: dict[str, str],
) -> None:
    hub.alter(method, path, headers=headers)
    refused()
    assert not list(tmp_path.rglob("*escape*"))


@pytest.mark.parametrize("body", [[], None, 7, "x", {"error": [7]}, {"errors": 7}, {"error": {}}])
def test_errors_of_any_form(hub: Hub, refused: Callable[..., str], body: object) -> None:
    hub.alter("GET", INFO, status=403, body=lambda _: body)
    assert "does not allow" in refused()


def test_errors_of_any_length(hub: Hub, refused: Callable[..., str]) -> None:
    hub.alter("GET", INFO, status=400, body=lambda _: {"error": "\x1b[2J" + "x" * 900_000})
    assert "answered 400" in refused()
    hub.altered.clear()
    hub.alter("GET", INFO, status=400, headers={"X-Error-Message": "x" * 90_000})
    assert "answered 400" in refused()


@pytest.mark.parametrize("wait", ["²", "999999999", "1e9", "-1", "nan", "9" * 5000])
def test_waits(hub: Hub, refused: Callable[..., str], wait: str) -> None:
    hub.alter("GET", INFO, status=429, headers={"Retry-After": wait.encode().decode("latin-1")})
    assert "limits your requests" in refused()


@pytest.mark.parametrize("how", [{"endless": True}, {"drip": 0.05}])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", INFO, None), ("GET", INFO, 500), ("GET", "config.json", None), ("GET", "_cdn", None)],
)
def test_bodies_without_an_end(
    hub: Hub,
    refused: Callable[..., str],
    how: dict[str, Any],
    method: str,
    path: str,
    status: int | None,
) -> None:
    hub.alter(method, path, status=status, **how)
    limits = "client.MAX_ANSWER_BYTES = 9_000_000"
    said = refused(limits=limits)
    # Of a range what was asked for is taken, and the connection closed: spaces are no header.
    ranged = "_cdn" in path and how == {"endless": True}
    assert ("inside its own header" if ranged else "does not answer as the Hub does") in said
    assert hub.transferred() < 60_000_000


def test_a_large_small_file_is_not_downloaded(hub: Hub, refused: Callable[..., str]) -> None:
    def grown(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {
            "siblings": [
                file | ({"size": 10**9} if file["rfilename"] == "config.json" else {})
                for file in answer["siblings"]
            ]
        }

    hub.alter("GET", INFO, body=grown)
    assert "config.json of acme/tiny is not downloaded: it has 1,000,000,000 bytes" in refused()
    assert not hub.asked("GET", "resolve")


def test_a_file_of_another_size_than_stated(hub: Hub, refused: Callable[..., str]) -> None:
    def shrunk(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {
            "siblings": [
                file | ({"size": 3} if file["rfilename"] == "config.json" else {})
                for file in answer["siblings"]
            ]
        }

    hub.alter("GET", INFO, body=shrunk)
    assert "has one of 3 there" in refused()


@pytest.mark.parametrize(
    "body",
    [
        _with(name=None),
        _with(name="\x1b[2J"),
        _with(orgs=7),
        _with(orgs=[None]),
        _with(orgs=[{"name": ["x"]}]),
        lambda _: [],
    ],
)
def test_a_user_that_is_none(
    hub: Hub, refused: Callable[..., str], llama: Path, body: Callable[[Any], Any], tmp_path: Path
) -> None:
    from upcycle_cli import Recipe, convert

    convert(llama, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=1))
    hub.alter("GET", "/api/whoami", body=body)
    assert "a user is named" in refused("push", "moe", "acme/moe")


@pytest.mark.parametrize(
    "changes",
    [
        {"commitOid": "../x"},
        {"commitOid": None},
        {"commitUrl": 7},
        {"commitUrl": "\x1b[2J"},
        {"pullRequestUrl": 7},
        {"pullRequestUrl": "\x1b[2J"},
    ],
)
def test_a_commit_that_is_none(
    hub: Hub, refused: Callable[..., str], llama: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    from upcycle_cli import Recipe, convert

    convert(llama, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=1))
    hub.store.create("acme/moe")
    hub.alter("POST", "/commit/", body=_with(**changes))
    refused("push", "moe", "acme/moe", "--create-pr")


def test_the_checksums_of_a_repo_are_verified(hub: Hub, llama: Path, tmp_path: Path) -> None:
    from upcycle_cli import Recipe, convert

    hub.store.upload(REPO, llama)
    convert(llama, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=1))
    moe = clone(tmp_path / "moe", tmp_path / "wrong")
    (moe / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    hub.store.upload("acme/moe", moe)
    command = ["verify", REPO, "acme/moe", "--checks", "directory", "--json"]
    done = forked.run(command, environment=hub.environment(tmp_path / "home"))
    assert done.returncode == 1
    assert "config.json is not the file that SHA256SUMS describes" in done.stdout


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTPS_PROXY", "http_proxy"])
@pytest.mark.parametrize(
    "text",
    [
        "https://user:pa%2Fss%20w%C3%B6rd@host/x",
        "pa/ss wörd",
        "pa%2Fss%20w%C3%B6rd",
        "pa%2fss%20w%c3%b6rd",
        "dXNlcjpwYS9zcyB3w7ZyZA==",
        repr("pa/ss wörd"),
    ],
)
def test_passwords_are_blotted_out(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, "https://user:pa%2Fss%20w%C3%B6rd@host:8080/x")
    shown = blotted(f"before {text} after")
    assert "before" in shown
    assert "after" in shown
    for secret in ("pa/ss", "w%C3", "w%c3", "wörd", "dXNl", "user:"):
        assert secret not in shown


def test_no_password_in_a_traceback(hub: Hub, llama: Path, tmp_path: Path) -> None:
    code = """
from upcycle_cli.cli.app import app as cli
from upcycle_cli.inspection import summary as inspection
def broken(*_, **__): raise KeyError(__import__("os").environ["HTTPS_PROXY"])
inspection.inspect_checkpoint = inspection.inspect = broken
cli.check_current_directory = broken
cli.main()
"""
    variables = hub.environment(tmp_path) | {"HTTPS_PROXY": "http://user:sEcr3t@localhost"}
    done = forked.run(["inspect", llama, "--json"], program=code, environment=variables)
    assert "Traceback" in done.stderr
    assert "sEcr3t" not in done.stdout + done.stderr
