"""What the fake Hub stores: repos with branches, commits and trees, and files by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from threading import RLock

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.model")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a tree; `oid` is git's name for it, `sha256` the name of its stored bytes."""

    oid: str
    sha256: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Commit:
    tree: Mapping[str, Entry]
    parent: str | None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    """The commit of each branch, and of each pull request as refs/pr/N."""
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, or of a commit id."""
        name = revision.removeprefix("refs/heads/")
        return self.refs.get(name) or (name if name in self.commits else None)


class Store:
    """All repos of a Hub, in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.lock = RLock()
        (root / "objects").mkdir(parents=True)

    def object(self, sha256: str) -> Path:
        """Return the path of stored bytes."""
        return self.root / "objects" / sha256

    def put(self, data: bytes) -> Entry:
        """Store a regular file."""
        digest = hashlib.sha256(data).hexdigest()
        self.object(digest).write_bytes(data)
        return Entry(oid=_git_oid(data), sha256=digest, size=len(data), lfs=False)

    def lfs_entry(self, sha256: str, size: int) -> Entry:
        """Return the entry of a large file."""
        version = "https://git-lfs.github.com/spec/v1"
        pointer = f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(oid=_git_oid(pointer), sha256=sha256, size=size, lfs=True)

    def create(self, name: str, *, private: bool = False) -> Repo:
        """Create a repo with a first commit, as the Hub does."""
        repo = self.repos[name] = Repo(private=private)
        attributes = "".join(f"{pattern} filter=lfs\n" for pattern in LFS_PATTERNS).encode()
        self.commit(repo, "main", {".gitattributes": self.put(attributes)})
        return repo

    def commit(
        self, repo: Repo, branch: str, added: Mapping[str, Entry], deleted: Iterable[str] = ()
    ) -> str:
        """Commit changes to a branch and return the commit's id."""
        with self.lock:
            head = repo.refs.get(branch)
            tree = {**(repo.commits[head].tree if head else {}), **added}
            for name in deleted:
                del tree[name]
            content = [sorted((name, entry.oid) for name, entry in tree.items()), head]
            stamp = json.dumps([*content, time.time_ns()]).encode()
            oid = hashlib.sha1(stamp, usedforsecurity=False).hexdigest()
            repo.commits[oid] = Commit(tree, head)
            repo.refs[branch] = oid
            return oid

    def upload(
        self, name: str, directory: Path, *, branch: str = "main", hollow: bool = False
    ) -> str:
        """Commit a directory without the protocol; large files are linked, `hollow` ones unread."""
        repo = self.repos.get(name) or self.create(name)
        entries = {}
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            file_name = path.relative_to(directory).as_posix()
            if is_lfs(file_name):
                digest = hashlib.sha256(file_name.encode()).hexdigest()
                if not hollow:
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                if not self.object(digest).exists():
                    self.object(digest).symlink_to(path.resolve())
                entries[file_name] = self.lfs_entry(digest, path.stat().st_size)
            else:
                entries[file_name] = self.put(path.read_bytes())
        repo.refs.setdefault(branch, repo.refs["main"])
        return self.commit(repo, branch, entries)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return the contents of a repo's files."""
        repo = self.repos[name]
        commit = repo.resolve(revision)
        assert commit is not None
        tree = repo.commits[commit].tree
        return {path: self.object(entry.sha256).read_bytes() for path, entry in tree.items()}


def is_lfs(name: str) -> bool:
    """Whether the Hub stores such a file outside git."""
    return any(fnmatchcase(name.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
