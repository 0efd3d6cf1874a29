"""The Hub's HTTP API on loopback, as much of it as huggingface_hub uses for models.

A reading of the client, not of the real Hub: create, preupload, LFS (basic and multipart), Xet's
local store, commit, pull requests, tree, resolve with ranges and redirects. Faults are injected by
rule, and every request is kept for the tests to look at.

    with Hub(directory) as hub:
        subprocess.run([...], env=hub.environment(home))
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped]

from hub.store import Commit, Entry, Repo, Store, is_lfs, xet_hashes

TOKEN = "hf_loopbackSecretToken0123456789abcdef"  # noqa: S105 - opens nothing
USER = "tester"
_PIECE = 1 << 20


class DroppedError(Exception):
    """The connection is to end here, without a word."""


class RefusedError(Exception):
    """An answer that is an error, with the headers that the client reads it by."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: str
    """A regular expression, searched for in the path."""
    status: int | None = None
    """The answer; None to end the connection."""
    after_bytes: int = 0
    """With no status: how much of an upload is read before that."""
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected"
    hit: Callable[[], None] = lambda: None


@dataclass
class Alteration:
    """How the answers to requests that match differ from what they should be."""

    method: str
    path: str
    """A regular expression, searched for in the path."""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """What to send in place of, or besides, the right ones; None to leave one out."""
    body: Callable[[Any], Any] | None = None
    """Makes the JSON, or the bytes, from what they should be."""
    status: int | None = None
    drip: float | None = None
    """Seconds between a byte and the next, without an end."""
    endless: bool = False
    """Send for ever, as fast as it goes."""


@dataclass
class Request:
    """A request that was answered, or not."""

    method: str
    path: str
    status: int | None = None
    received: int = 0
    """Bytes of its body that were read."""
    sent: int = 0
    """Bytes of the answer's body."""
    token: str = ""


class Hub:
    """The server; a context that starts and stops it."""

    def __init__(
        self,
        root: Path,
        *,
        multipart: int = 0,
        xet: Path | None = None,
        organization: str = "acme",
    ) -> None:
        self.store = Store(root)
        self.multipart = multipart
        """Size of the parts that larger files are uploaded in; 0 for whole files."""
        self.xet = xet
        """Directory of hf_xet's local store; None to serve LFS."""
        self.organization = organization
        self.role = "write"
        """What the token may do."""
        self.password: str | None = None
        """What a mirror wants in place of the token, as "user:password"."""
        self.granted: set[str] = set()
        """Gated repos that the token may read."""
        self.faults: list[Fault] = []
        self.cuts: list[int] = []
        """After how many bytes the next downloads from the CDN break off."""
        self.altered: list[Alteration] = []
        self.gone = False
        self.most_objects: int | None = None
        """How many uploads are accepted; the connections of all others are broken off."""
        self.most_commits: int | None = None
        """How many commits are accepted; all others are refused."""
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close down, and end what is still being answered."""
        self.gone = True
        self._server.shutdown()
        self._server.server_close()

    def vanish(self) -> None:
        """Answer nobody any more; for a handler, which has a thread of its own."""
        self.gone = True
        self._server.shutdown()
        self._server.socket.close()

    @property
    def url(self) -> str:
        """The endpoint, by the address that the CDN does not have."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def cdn(self) -> str:
        """Where large files are: on a redirect to the same host the client loses the commit."""
        return f"http://localhost:{self._server.server_address[1]}"

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Return what a process needs to take this for the Hub, with a cache of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def fail(self, method: str, path: str, status: int | None = None, **how: Any) -> Fault:  # noqa: ANN401
        """Let something go wrong."""
        fault = Fault(method, path, status, **how)
        self.faults.append(fault)
        return fault

    def alter(self, method: str, path: str, **how: Any) -> None:  # noqa: ANN401
        """Let answers be other than they should be."""
        self.altered.append(Alteration(method, path, **how))

    def asked(self, method: str, path: str) -> list[Request]:
        """Return the requests whose path has such a part."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def transferred(self) -> int:
        """Return the bytes of all answers."""
        return sum(request.sent for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    _routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/api/whoami-v2", "_whoami"),
        ("POST", r"/api/validate-yaml", "_validate_yaml"),
        ("POST", r"/api/repos/create", "_create"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write", "_auth_check"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "_tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "_preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "_commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions", "_open_pull_request"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<number>\d+)", "_discussion"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-\w+-token/(?P<revision>[^/]+)", "_xet"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "_lfs_batch"),
        ("PUT", r"/_objects/(?P<sha256>\w+)", "_put"),
        ("POST", r"/_complete/(?P<sha256>\w+)", "_complete"),
        ("POST", r"/_verify", "_verify"),
        ("GET", r"/_cdn/(?P<sha256>\w+)", "_cdn"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
    ]

    def __init__(self, hub: Hub, *arguments: Any) -> None:  # noqa: ANN401
        self.hub = hub
        self.request_log = Request("", "")
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:  # noqa: ANN401
        """Stay silent."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    # How requests are read and answered ----------------------------------------------------------

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body_read = False
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.request_log = Request(self.command, self.path, token=token)
        self.hub.requests.append(self.request_log)
        try:
            self._go_wrong()
            self._dispatch(method, url.path)
        except RefusedError as error:
            self._refuse(error)
        except (DroppedError, ConnectionError):
            self.close_connection = True
            self.connection.close()

    def _dispatch(self, method: str, path: str) -> None:
        for wanted, pattern, name in self._routes:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                getattr(self, name)(**{key: unquote(at) for key, at in match.groupdict().items()})
                return
        raise RefusedError(404, f"no route {method} {path}")

    def _go_wrong(self) -> None:
        if self.hub.gone:
            raise DroppedError
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                fault.times -= 1
                if fault.status is None:
                    for _ in self._pieces(fault.after_bytes):
                        pass
                fault.hit()
                if fault.status is None:
                    raise DroppedError
                error = RefusedError(fault.status, fault.message)
                self._refuse(error, fault.headers)
                raise DroppedError

    def _refuse(self, error: RefusedError, headers: Mapping[str, str] | None = None) -> None:
        for _ in self._pieces():
            pass
        codes = {} if error.code is None else {"X-Error-Code": error.code}
        self._send(
            error.status,
            {"error": error.message},
            {"X-Error-Message": error.message, **codes, **(headers or {})},
        )

    def _pieces(self, most: int | None = None) -> Iterator[bytes]:
        """Yield the request's body, or as much of it."""
        if self.body_read:
            return
        self.body_read = True
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while length := int(self.rfile.readline(), 16):
                yield self._received(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        left = left if most is None else min(left, most)
        while left:
            data = self.rfile.read(min(_PIECE, left))
            if not data:
                raise DroppedError
            left -= len(data)
            yield self._received(data)

    def _received(self, data: bytes) -> bytes:
        self.request_log.received += len(data)
        return data

    def _json(self) -> Any:  # noqa: ANN401
        return json.loads(b"".join(self._pieces()) or b"{}")

    def _send(
        self,
        status: int,
        content: Any = b"",  # noqa: ANN401
        headers: Mapping[str, str] | None = None,
        *,
        kind: str = "application/json",
    ) -> None:
        alteration = self._alteration()
        if alteration is not None and alteration.body is not None and self.command != "HEAD":
            content = alteration.body(content)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        # As the Hub's own framework makes them, slashes included.
        digest = base64.b64encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode()
        etag = f'W/"{len(data):x}-/{digest}"'
        self._head(status, len(data), {"Content-Type": kind, "ETag": etag, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)
            self.request_log.sent += len(data)

    def _alteration(self) -> Alteration | None:
        for alteration in self.hub.altered:
            if alteration.method == self.command and re.search(alteration.path, self.path):
                return alteration
        return None

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        alteration = self._alteration()
        found: dict[str, str | None] = {"Content-Length": str(length), **headers}
        if alteration is not None:
            status = alteration.status or status
            found |= alteration.headers
        without_end = alteration is not None and (alteration.endless or alteration.drip)
        if without_end:
            found |= {"Content-Length": None, "Transfer-Encoding": "chunked"}
        self.request_log.status = status
        self.send_response(status)
        for name, value in found.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if alteration is not None and without_end and self.command != "HEAD":
            self._never_end(alteration)

    def _never_end(self, alteration: Alteration) -> None:
        piece = b" " * (_PIECE if alteration.endless else 1)
        while not self.hub.gone:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.request_log.sent += len(piece)
            time.sleep(alteration.drip or 0)
        raise DroppedError

    # Who asks, and for what ----------------------------------------------------------------------

    @property
    def _authorized(self) -> bool:
        token = self.request_log.token
        if self.hub.password is not None:
            return token == f"Basic {base64.b64encode(self.hub.password.encode()).decode()}"
        if token and token != TOKEN:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return bool(token)

    def _must_be_authorized(self) -> None:
        if not self._authorized:
            raise RefusedError(401, "Invalid username or password.")

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        authorized = self._authorized
        if write:
            self._must_be_authorized()
            own = name.split("/", maxsplit=1)[0] in (USER, self.hub.organization)
            if not own or self.hub.role != "write":
                raise RefusedError(403, "You don't have the rights to write to this repo")
        repo = self.hub.store.repos.get(name)
        if repo is None or (repo.private and not authorized):
            # Who is not signed in is not told which of the two it is.
            status = 404 if authorized else 401
            raise RefusedError(status, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        oid = repo.resolve(revision)
        if oid is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def _whoami(self) -> None:
        self._must_be_authorized()
        organization = {"type": "org", "id": "2", "name": self.hub.organization}
        auth = {"type": "access_token", "accessToken": {"role": self.hub.role}}
        user = {"type": "user", "id": "1", "name": USER, "orgs": [organization], "auth": auth}
        self._send(200, user)

    # Repos ---------------------------------------------------------------------------------------

    def _create(self) -> None:
        self._must_be_authorized()
        wanted = self._json()
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if owner not in (USER, self.hub.organization):
            raise RefusedError(403, f"You don't have the rights to create a model under {owner}")
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        with self.hub.store.lock:
            if name in self.hub.store.repos:
                self._send(409, {"error": "You already created this model repo", **answer})
                return
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.store.create(name, private=private)
        self._send(200, answer)

    def _auth_check(self, repo: str) -> None:
        self._repo(repo, write=True)
        self._send(200, {})

    def _info(self, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        oid, commit = self._commit_of(found, revision)
        self._send(
            200,
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "author": repo.split("/", maxsplit=1)[0],
                "sha": oid,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [
                    {"rfilename": name, "size": entry.size, "blobId": entry.oid}
                    for name, entry in commit.tree.items()
                ],
            },
        )

    def _tree(self, repo: str, revision: str) -> None:
        _, commit = self._commit_of(self._repo(repo), revision)
        self._send(200, [_described(name, entry) for name, entry in sorted(commit.tree.items())])

    def _branch(self, repo: str, branch: str) -> None:
        found = self._repo(repo, write=True)
        wanted = self._json()
        if branch in found.refs:
            raise RefusedError(409, "Reference already exists")
        found.refs[branch], _ = self._commit_of(found, wanted.get("startingPoint") or "main")
        self._send(200, {})

    def _open_pull_request(self, repo: str) -> None:
        found = self._repo(repo, write=True)
        self._send(200, {"num": self._new_pull_request(found)})

    def _new_pull_request(self, repo: Repo) -> int:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        repo.refs[f"refs/pr/{number}"] = repo.refs["main"]
        return number

    def _discussion(self, repo: str, number: str) -> None:
        self._repo(repo)
        self._send(
            200,
            {
                "num": int(number),
                "title": "Upload",
                "isPullRequest": True,
                "status": "draft",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "author": {"name": USER},
                "repo": {"name": repo, "type": "model"},
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
            },
        )

    # Uploads -------------------------------------------------------------------------------------

    def _validate_yaml(self) -> None:
        content = self._json()["content"]
        match = re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL)
        errors = []
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            metadata, errors = {}, [{"message": str(error)}]
        for name in _listed(metadata.get("base_model")):
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                errors.append({"message": f'"base_model[0]" {name} is not a repo id'})
        errors += [
            {"message": f'"language[0]" {language} is not an ISO 639 code'}
            for language in _listed(metadata.get("language"))
            if not re.fullmatch(r"[a-z]{2,3}", language)
        ]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, repo: str, revision: str) -> None:
        _, commit = self._commit_of(self._repo(repo, write=True), revision)
        files = []
        for file in self._json()["files"]:
            there = commit.tree.get(file["path"])
            oid = None if there is None else there.sha256 if there.lfs else there.oid
            mode = "lfs" if is_lfs(file["path"]) else "regular"
            files.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._send(200, {"files": files})

    def _lfs_batch(self, repo: str) -> None:
        self._repo(repo, write=True)
        wanted = self._json()
        objects, transfer = [], "basic"
        for item in wanted["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if not self.hub.store.object(item["oid"]).exists():
                href = f"{self.hub.cdn}/_objects/{item['oid']}"
                verify = {"href": f"{self.hub.url}/_verify"}
                upload: dict[str, Any] = {"href": href}
                size = self.hub.multipart
                if size and item["size"] > size and "multipart" in wanted.get("transfers", ()):
                    transfer = "multipart"
                    parts = -(-item["size"] // size)
                    header = {f"{n:05d}": f"{href}?part={n}" for n in range(1, parts + 1)}
                    upload = {
                        "href": f"{self.hub.cdn}/_complete/{item['oid']}",
                        "header": {"chunk_size": str(size), **header},
                    }
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        content = {"transfer": transfer, "objects": objects, "hash_algo": "sha256"}
        self._send(200, content, kind="application/vnd.git-lfs+json")

    def _put(self, sha256: str) -> None:
        with self.hub.store.lock:
            if self.hub.most_objects is not None:
                if not self.hub.most_objects:
                    raise DroppedError
                self.hub.most_objects -= 1
        part = self.query.get("part", ["whole"])[0]
        temporary = self.hub.store.root / "parts" / f"{sha256}.{part}"
        digest, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with temporary.open("wb") as file:
            for piece in self._pieces():
                file.write(piece)
                digest.update(piece)
                md5.update(piece)
        if part == "whole":
            if digest.hexdigest() != sha256:
                raise RefusedError(400, "sha256 mismatch")
            temporary.replace(self.hub.store.object(sha256))
        self._send(200, b"", {"ETag": f'"{md5.hexdigest()}"'})

    def _complete(self, sha256: str) -> None:
        whole = self.hub.store.root / "parts" / f"{sha256}.complete"
        with whole.open("wb") as file:
            for item in self._json()["parts"]:
                part = whole.with_suffix(f".{item['partNumber']}")
                data = part.read_bytes()
                if item["etag"].strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
                    raise RefusedError(400, "bad etag")
                file.write(data)
                part.unlink()
        with whole.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise RefusedError(400, "sha256 mismatch")
        whole.replace(self.hub.store.object(sha256))
        self._send(200, {"success": True})

    def _verify(self) -> None:
        wanted = self._json()
        path = self.hub.store.object(wanted["oid"])
        sound = path.exists() and path.stat().st_size == wanted["size"]
        self._send(200 if sound else 404, {})

    def _commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        with self.hub.store.lock:
            if self.hub.most_commits is not None:
                if not self.hub.most_commits:
                    raise RefusedError(400, "no more commits")
                self.hub.most_commits -= 1
        lines = [json.loads(line) for line in b"".join(self._pieces()).splitlines() if line]
        title, changes = "", []
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    title = value.get("summary", "")
                case "file":
                    entry = self.hub.store.put(base64.b64decode(value["content"]))
                    changes.append(partial(_put_entry, value["path"], entry))
                case "lfsFile":
                    changes.append(partial(_put_entry, value["path"], self._uploaded(value)))
                case "deletedFile":
                    changes.append(partial(_delete_entry, value["path"]))
                case other:
                    raise RefusedError(400, f"unknown operation {other}")
        self._commit_of(found, revision)
        url, pull_request = f"{self.hub.url}/{repo}", None
        if "1" in self.query.get("create_pr", ()):
            number = self._new_pull_request(found)
            revision, pull_request = f"refs/pr/{number}", f"{url}/discussions/{number}"
        oid = self.hub.store.commit(found, revision, title, changes)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self._send(200, {**answer, "pullRequestUrl": pull_request})

    def _uploaded(self, value: Mapping[str, Any]) -> Entry:
        sha256, size = value["oid"], value["size"]
        xet = xet_hashes(self.hub.xet).get(sha256) if self.hub.xet else None
        if xet is None and not self.hub.store.object(sha256).exists():
            raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return self.hub.store.lfs_entry(sha256, size, xet)

    def _xet(self, repo: str, revision: str) -> None:  # noqa: ARG002
        self._repo(repo)
        if self.hub.xet is None:
            raise RefusedError(404, "no Xet here")
        url, expires = f"local://{self.hub.xet}", int(time.time()) + 3600
        self._send(
            200,
            {"accessToken": "xet", "exp": expires, "casUrl": url},
            {
                "X-Xet-Cas-Url": url,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expires),
            },
        )

    # Downloads -----------------------------------------------------------------------------------

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        if found.gated and repo not in self.hub.granted:
            raise RefusedError(403, "Access to this model is restricted", "GatedRepo")
        oid, commit = self._commit_of(found, revision)
        entry = commit.tree.get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if entry is None:
            self._send(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
        elif entry.lfs:
            headers |= {
                "X-Linked-Etag": f'"{entry.sha256}"',
                "X-Linked-Size": str(entry.size),
                "Location": f"{self.hub.cdn}/_cdn/{entry.sha256}",
            }
            if entry.xet:
                route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{oid}"
                headers |= {
                    "X-Xet-Hash": entry.xet,
                    "X-Xet-Refresh-Route": route,
                    "Link": f'<{route}>; rel="xet-auth"',
                }
            self._send(302, b"", headers, kind="text/plain")
        else:
            self._file(entry.sha256, {**headers, "ETag": f'"{entry.oid}"'})

    def _cdn(self, sha256: str) -> None:
        self._file(sha256, {"ETag": f'"{sha256}"'})

    def _file(self, sha256: str, headers: Mapping[str, str]) -> None:
        path = self.hub.store.object(sha256)
        if not path.exists():
            raise RefusedError(404, "no such object")
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            begin, end = int(match[1]), min(int(match[2] or size) + 1, size)
            if begin >= end:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            status = 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
        self._head(status, end - begin, {"Content-Type": "application/octet-stream", **headers})
        if self.command == "HEAD":
            return
        cut = None
        if self.hub.cuts and "/_cdn/" in self.path and end - begin > self.hub.cuts[0]:
            cut = self.hub.cuts.pop(0)
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                if cut is not None and self.request_log.sent >= cut:
                    raise DroppedError
                data = file.read(min(_PIECE if cut is None else cut, end - begin))
                self.wfile.write(data)
                self.request_log.sent += len(data)
                begin += len(data)


def _described(name: str, entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": "file",
        "oid": entry.oid,
        "size": entry.size,
        "path": name,
    }
    if entry.lfs:
        pointer = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        described |= {"lfs": pointer}
    if entry.xet:
        described["xetHash"] = entry.xet
    return described


def _put_entry(name: str, entry: Entry, tree: dict[str, Entry]) -> None:
    tree[name] = entry


def _delete_entry(name: str, tree: dict[str, Entry]) -> None:
    del tree[name]


def _listed(value: object) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item]
