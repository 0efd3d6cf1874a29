"""A fake Hub on loopback: as much of its HTTP API as huggingface_hub uses for models.

Written after the client, not after the real Hub: create, preupload, LFS, commit, pull requests,
resolve with ranges and redirects. Tests inject faults by rule; all requests are recorded.

    with Hub(directory) as hub:
        subprocess.run([...], env=hub.environment(home))
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped]

from hub.store import Commit, Entry, Repo, Store, is_lfs

TOKEN = "hf_loopbackSecretToken0123456789abcdef"  # noqa: S105 - opens nothing
USER = "tester"
_CHUNK = 1 << 20


class DroppedError(Exception):
    """Close the connection without an answer."""


class RefusedError(Exception):
    """Answer with an error; huggingface_hub tells errors apart by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """An error for the next `times` requests that match."""

    method: str
    path: str
    """A regular expression to search for in the path."""
    status: int | None = None
    """The answer; None to close the connection."""
    after_bytes: int = 0
    """Without a status: how much of an upload to read first."""
    times: int = 1
    skip: int = 0
    """How many matching requests to answer first."""
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected"
    hit: Callable[[], None] = lambda: None


@dataclass
class Alteration:
    """Changes to the answers of all requests that match."""

    method: str
    path: str
    """A regular expression to search for in the path."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[Any], Any] | None = None
    """Returns the JSON or the bytes to send instead."""
    status: int | None = None
    endless: bool = False
    """Send spaces forever."""


@dataclass
class Request:
    method: str
    path: str
    token: str
    status: int | None = None
    sent: int = 0
    """The number of bytes of the answer's body."""


class Hub:
    """The server, a context manager that starts and stops it."""

    def __init__(self, root: Path, *, organization: str = "acme") -> None:
        self.store = Store(root)
        self.organization = organization
        self.role = "write"
        """The role of the token."""
        self.password: str | None = None
        """What a mirror requires instead of the token, as "user:password"."""
        self.faults: list[Fault] = []
        self.altered: list[Alteration] = []
        self.cuts: list[int] = []
        """After how many bytes the next large downloads break off."""
        self.gone = False
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and all answers in progress."""
        self.gone = True
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def cdn(self) -> str:
        """The address of large files: another host, as a client expects of a CDN."""
        return f"http://localhost:{self._server.server_address[1]}"

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Return the variables with which a process uses this Hub and a cache of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def fail(self, method: str, path: str, status: int | None = None, **how: Any) -> None:  # noqa: ANN401
        """Inject a `Fault`."""
        self.faults.append(Fault(method, path, status, **how))

    def alter(self, method: str, path: str, **how: Any) -> None:  # noqa: ANN401
        """Inject an `Alteration`."""
        self.altered.append(Alteration(method, path, **how))

    def asked(self, method: str, path: str) -> list[Request]:
        """Return the requests whose path matches."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    def transferred(self) -> int:
        """Return the bytes of all answers."""
        return sum(request.sent for request in self.requests)


_ROUTES: list[tuple[str, str, Callable[..., None]]] = []
_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


def _route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(handler: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((method, pattern, handler))
        return handler

    return add


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:  # noqa: ANN401
        self.hub, self.store = hub, hub.store
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

    # Requests and answers ------------------------------------------------------------------------

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body_read = False
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.log = Request(self.command, self.path, token)
        self.hub.requests.append(self.log)
        try:
            self._inject_fault()
            for wanted, pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and wanted == method:
                    handler(self, **{key: unquote(at) for key, at in match.groupdict().items()})
                    return
            self._refuse(RefusedError(404, f"no route {method} {url.path}"))
        except RefusedError as error:
            self._refuse(error)
        except (DroppedError, ConnectionError):
            self.close_connection = True
            self.connection.close()

    def _inject_fault(self) -> None:
        if self.hub.gone:
            raise DroppedError
        for fault in self.hub.faults:
            if not self._is_due(fault):
                continue
            if fault.status is None:
                self.rfile.read(fault.after_bytes)
            fault.hit()
            if fault.status is not None:
                self._refuse(RefusedError(fault.status, fault.message), fault.headers)
            raise DroppedError

    def _is_due(self, fault: Fault) -> bool:
        if fault.method != self.command or not re.search(fault.path, self.path):
            return False
        with self.store.lock:  # clients upload with several threads
            is_due = fault.times > 0 and fault.skip == 0
            fault.times -= is_due
            fault.skip = max(0, fault.skip - 1)
            return is_due

    def _refuse(self, error: RefusedError, headers: Mapping[str, str] | None = None) -> None:
        for _ in self._chunks():
            pass
        code = {} if error.code is None else {"X-Error-Code": error.code}
        headers = {"X-Error-Message": error.message, **code, **(headers or {})}
        self._send({"error": error.message}, headers, status=error.status)

    def _chunks(self) -> Iterator[bytes]:
        """Yield the request's body."""
        if self.body_read:
            return
        self.body_read = True
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            data = self.rfile.read(min(_CHUNK, left))
            if not data:
                raise DroppedError
            left -= len(data)
            yield data

    def _json(self) -> Any:  # noqa: ANN401
        return json.loads(b"".join(self._chunks()) or b"{}")

    def _send(
        self,
        content: Any = b"",  # noqa: ANN401
        headers: Mapping[str, str] | None = None,
        *,
        status: int = 200,
        kind: str = "application/json",
    ) -> None:
        alteration = self._alteration()
        if alteration is not None and alteration.body is not None and self.command != "HEAD":
            content = alteration.body(content)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        # The Hub's web framework makes etags with slashes.
        digest = base64.b64encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode()
        etag = f'W/"{len(data):x}-/{digest}"'
        self._head(status, len(data), {"Content-Type": kind, "ETag": etag, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)
            self.log.sent += len(data)

    def _alteration(self) -> Alteration | None:
        matching = (a for a in self.hub.altered if a.method == self.command)
        return next((a for a in matching if re.search(a.path, self.path)), None)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        alteration = self._alteration() or Alteration("", "")
        found = {"Content-Length": str(length), **headers, **alteration.headers}
        if alteration.endless:
            del found["Content-Length"]
            found["Transfer-Encoding"] = "chunked"
        self.log.status = alteration.status or status
        self.send_response(self.log.status)
        for name, value in found.items():
            self.send_header(name, value)
        self.end_headers()
        while alteration.endless and self.command != "HEAD":
            if self.hub.gone:
                raise DroppedError
            self.wfile.write(b"%x\r\n%s\r\n" % (_CHUNK, b" " * _CHUNK))
            self.log.sent += _CHUNK

    # Users and repos -----------------------------------------------------------------------------

    def _is_authorized(self, *, must: bool = False) -> bool:
        token, password = self.log.token, self.hub.password
        if password is not None:
            authorized = token == f"Basic {base64.b64encode(password.encode()).decode()}"
        elif token and token != TOKEN:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        else:
            authorized = bool(token)
        if must and not authorized:
            raise RefusedError(401, "Invalid username or password.")
        return authorized

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        authorized = self._is_authorized(must=write)
        own = name.split("/", maxsplit=1)[0] in (USER, self.hub.organization)
        if write and (not own or self.hub.role != "write"):
            raise RefusedError(403, "You don't have the rights to write to this repo")
        repo = self.store.repos.get(name)
        if repo is None or (repo.private and not authorized):
            # The Hub does not tell strangers whether a private repo exists.
            raise RefusedError(404 if authorized else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        oid = repo.resolve(revision)
        if oid is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    @_route("GET", r"/api/whoami-v2")
    def _whoami(self) -> None:
        self._is_authorized(must=True)
        organization = {"type": "org", "id": "2", "name": self.hub.organization}
        auth = {"type": "access_token", "accessToken": {"role": self.hub.role}}
        user = {"type": "user", "id": "1", "name": USER, "orgs": [organization], "auth": auth}
        self._send(user)

    @_route("POST", r"/api/repos/create")
    def _create(self) -> None:
        self._is_authorized(must=True)
        wanted = self._json()
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if owner not in (USER, self.hub.organization):
            raise RefusedError(403, f"You don't have the rights to create a model under {owner}")
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.store.repos:
            message = "You already created this model repo"
            self._send({"error": message, **answer}, status=409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.store.create(name, private=private)
        self._send(answer)

    @_route("GET", rf"{_MODEL}/auth-check/write")
    def _auth_check(self, repo: str) -> None:
        self._repo(repo, write=True)
        self._send({})

    @_route("GET", _MODEL)
    @_route("GET", rf"{_MODEL}/revision/(?P<revision>[^/]+)")
    def _info(self, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        oid, commit = self._commit_of(found, revision)
        siblings = [
            {"rfilename": name, "size": entry.size, "blobId": entry.oid}
            for name, entry in commit.tree.items()
        ]
        names = {"_id": "1", "id": repo, "modelId": repo, "author": repo.split("/", maxsplit=1)[0]}
        counts = {"disabled": False, "tags": [], "downloads": 0, "likes": 0}
        gated = "manual" if found.gated else False
        state = {"sha": oid, "private": found.private, "gated": gated}
        self._send({**names, **counts, **state, "siblings": siblings})

    @_route("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)")
    def _tree(self, repo: str, revision: str) -> None:
        _, commit = self._commit_of(self._repo(repo), revision)
        found = []
        for path, entry in sorted(commit.tree.items()):
            file = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
            found.append({**file, **({"lfs": lfs} if entry.lfs else {})})
        self._send(found)

    @_route("POST", rf"{_MODEL}/branch/(?P<branch>[^/]+)")
    def _branch(self, repo: str, branch: str) -> None:
        found = self._repo(repo, write=True)
        wanted = self._json()
        if branch in found.refs:
            raise RefusedError(409, "Reference already exists")
        found.refs[branch], _ = self._commit_of(found, wanted.get("startingPoint") or "main")
        self._send({})

    # Uploads -------------------------------------------------------------------------------------

    @_route("POST", r"/api/validate-yaml")
    def _validate_yaml(self) -> None:
        content = self._json()["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---") else {}
        languages = metadata.get("language") or []
        languages = languages if isinstance(languages, list) else [languages]
        wrong = [name for name in languages if not re.fullmatch("[a-z]{2,3}", name)]
        errors = [{"message": f"{name} is not an ISO 639 code"} for name in wrong]
        self._send({"errors": errors, "warnings": []}, status=400 if errors else 200)

    @_route("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, repo: str, revision: str) -> None:
        _, commit = self._commit_of(self._repo(repo, write=True), revision)
        files = []
        for path in (file["path"] for file in self._json()["files"]):
            entry = commit.tree.get(path)
            oid = None if entry is None else entry.sha256 if entry.lfs else entry.oid
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": files})

    @_route("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def _lfs_batch(self, repo: str) -> None:
        self._repo(repo, write=True)
        objects = []
        for item in self._json()["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if not self.store.object(item["oid"]).exists():
                upload = {"href": f"{self.hub.cdn}/_objects/{item['oid']}"}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        content = {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}
        self._send(content, kind="application/vnd.git-lfs+json")

    @_route("PUT", r"/_objects/(?P<sha256>\w+)")
    def _put(self, sha256: str) -> None:
        data = b"".join(self._chunks())
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RefusedError(400, "sha256 mismatch")
        self.store.object(sha256).write_bytes(data)
        self._send()

    @_route("POST", rf"{_MODEL}/commit/(?P<revision>[^/]+)")
    def _commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        added: dict[str, Entry] = {}
        deleted: list[str] = []
        for line in b"".join(self._chunks()).splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    added[value["path"]] = self.store.put(base64.b64decode(value["content"]))
                case "lfsFile":
                    added[value["path"]] = self._uploaded(value["oid"], value["size"])
                case "deletedFile":
                    deleted.append(value["path"])
        self._commit_of(found, revision)
        url, pull_request = f"{self.hub.url}/{repo}", None
        if "1" in self.query.get("create_pr", ()):
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            revision, pull_request = f"refs/pr/{number}", f"{url}/discussions/{number}"
            found.refs[revision] = found.refs["main"]
        oid = self.store.commit(found, revision, added, deleted)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self._send({**answer, "pullRequestUrl": pull_request})

    def _uploaded(self, sha256: str, size: int) -> Entry:
        if not self.store.object(sha256).exists():
            raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return self.store.lfs_entry(sha256, size)

    # Downloads -----------------------------------------------------------------------------------

    @_route("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        if found.gated:
            raise RefusedError(403, "Access to this model is restricted", "GatedRepo")
        oid, commit = self._commit_of(found, revision)
        entry = commit.tree.get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if entry is None:
            self._send({}, {**headers, "X-Error-Code": "EntryNotFound"}, status=404)
            return
        if not entry.lfs:
            self._file(entry.sha256, {**headers, "ETag": f'"{entry.oid}"'})
            return
        headers |= {
            "X-Linked-Etag": f'"{entry.sha256}"',
            "X-Linked-Size": str(entry.size),
            "Location": f"{self.hub.cdn}/_cdn/{entry.sha256}",
        }
        self._send(b"", headers, status=302, kind="text/plain")

    @_route("GET", r"/_cdn/(?P<sha256>\w+)")
    def _cdn(self, sha256: str) -> None:
        self._file(sha256, {"ETag": f'"{sha256}"'})

    def _file(self, sha256: str, headers: Mapping[str, str]) -> None:
        path = self.store.object(sha256)
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end, status = int(match[1]), min(int(match[2] or size) + 1, size), 206
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
                if cut is not None and self.log.sent >= cut:
                    raise DroppedError
                data = file.read(min(cut or _CHUNK, end - begin))
                self.wfile.write(data)
                self.log.sent += len(data)
                begin += len(data)
