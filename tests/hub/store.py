"""What a Hub keeps: repos with branches, commits and trees, and the bytes of files by SHA-256."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from threading import RLock

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.model")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a tree; `oid` is what git calls it, `sha256` where its bytes are."""

    oid: str
    sha256: str
    size: int
    lfs: bool
    xet: str | None = None

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))


Tree = Mapping[str, Entry]


@dataclass(frozen=True)
class Commit:
    tree: Tree
    title: str
    parent: str | None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    """Branches by name, and pull requests as refs/pr/N: the commit that each points at."""
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch or of itself."""
        name = revision.removeprefix("refs/heads/")
        return self.refs.get(name) or (name if name in self.commits else None)


class Store:
    """All repos of a Hub, in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.lock = RLock()
        (root / "objects").mkdir(parents=True)
        (root / "parts").mkdir()

    def object(self, sha256: str) -> Path:
        """Return where bytes are, or would be."""
        return self.root / "objects" / sha256

    def put(self, data: bytes) -> Entry:
        """Keep a regular file."""
        digest = hashlib.sha256(data).hexdigest()
        self.object(digest).write_bytes(data)
        return Entry(oid=_git_oid(data), sha256=digest, size=len(data), lfs=False)

    def lfs_entry(self, sha256: str, size: int, xet: str | None = None) -> Entry:
        """Return the entry of a large file whose bytes are kept already."""
        oid = _git_oid(_pointer(sha256, size))
        return Entry(oid=oid, sha256=sha256, size=size, lfs=True, xet=xet)

    def create(self, name: str, *, private: bool = False) -> Repo:
        """Make a repo with a first commit, as the Hub does."""
        repo = self.repos[name] = Repo(private=private)
        attributes = "".join(f"{pattern} filter=lfs\n" for pattern in LFS_PATTERNS).encode()
        entry = self.put(attributes)
        self.commit(repo, "main", "initial commit", [lambda tree: _set(tree, entry)])
        return repo

    def commit(
        self,
        repo: Repo,
        branch: str,
        title: str,
        changes: Iterable[Callable[[dict[str, Entry]], None]],
    ) -> str:
        """Apply changes to a branch; all of them or, when one raises, none."""
        with self.lock:
            head = repo.refs.get(branch)
            tree = dict(repo.commits[head].tree) if head else {}
            for change in changes:
                change(tree)
            content = [sorted((name, entry.oid) for name, entry in tree.items()), title, head]
            stamp = [*content, time.time_ns()]
            oid = hashlib.sha1(json.dumps(stamp).encode(), usedforsecurity=False).hexdigest()
            repo.commits[oid] = Commit(tree, title, head)
            repo.refs[branch] = oid
            return oid

    def upload(
        self, name: str, directory: Path, *, branch: str = "main", hollow: bool = False
    ) -> str:
        """Put a directory into a repo, past the protocol; large files are linked.

        Those of a `hollow` one are too large to be hashed.
        """
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
        if branch not in repo.refs:
            repo.refs[branch] = repo.refs["main"]
        return self.commit(repo, branch, "Upload", [lambda tree: tree.update(entries)])

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a repo holds, by file name."""
        repo = self.repos[name]
        commit = repo.resolve(revision)
        assert commit is not None
        tree = repo.commits[commit].tree
        return {path: self.object(entry.sha256).read_bytes() for path, entry in tree.items()}


def is_lfs(name: str) -> bool:
    """Whether the Hub keeps such a file beside git."""
    return any(fnmatchcase(name.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)


def xet_hashes(directory: Path) -> dict[str, str]:
    """Return the Xet hash of each SHA-256, from the shards that hf_xet left in a local store.

    A shard (.mdb) is a 48-byte header and then, per file, 48 bytes (hash, flags, count), `count`
    entries of 48 bytes, as many again with flag 31, and with flag 30 one that holds the SHA-256.
    """
    found = {}
    for path in directory.rglob("*.mdb"):
        data, at = path.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            file_hash = data[at : at + 32]
            flags, count = struct.unpack_from("<II", data, at + 32)
            at += 48 + 48 * count * (2 if flags & (1 << 31) else 1)
            if flags & (1 << 30):
                found[_merkle(data[at : at + 32])] = _merkle(file_hash)
                at += 48
    return found


def _merkle(data: bytes) -> str:
    """Write a hash as Xet does: four little-endian words."""
    words = (int.from_bytes(data[at : at + 8], "little") for at in (0, 8, 16, 24))
    return "".join(f"{word:016x}" for word in words)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    version = "https://git-lfs.github.com/spec/v1"
    return f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()


def _set(tree: dict[str, Entry], entry: Entry) -> None:
    tree[".gitattributes"] = entry
