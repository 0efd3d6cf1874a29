"""Models on the Hub that are not here yet.

A repo's config and its weight files' headers are read first, by range requests, so that a plan, the
disk space and every objection come before gigabytes do. Then huggingface_hub downloads the files
that are needed into its cache. Everything is pinned to one commit from the start.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_storage
from upcycle_cli.checkpoint.header import MAX_HEADER_BYTES
from upcycle_cli.checkpoint.storage import (
    ADAPTER_NAME,
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    GENERATION_NAME,
    INDEX_NAME,
    RECORD_NAME,
    FileStamp,
    Storage,
    adapter,
    is_weight_file,
)
from upcycle_cli.core import safe_files as files
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.hub.answers import at_most, bad_answer, longest_seconds, read_repo
from upcycle_cli.hub.requests import (
    download_bar,
    explained,
    fetch,
    not_cached,
    patiently,
    run_interruptibly,
)

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_HEAD_BYTES = 1 << 16  # asked for at once: the headers of most files are smaller
_CONNECTIONS = 8
_MOST_SKIPPED_BYTES = 1 << 20  # of a file that a server sends from its beginning, asked for a part
# What a verification reads besides the checkpoint.
_BESIDES = (RECORD_NAME, CARD_NAME, INDEX_NAME, files.CHECKSUMS_NAME)
_SMALL = (CONFIG_NAME, GENERATION_NAME, RECORD_NAME, CARD_NAME, files.CHECKSUMS_NAME)
_MOST_BYTES = {
    **dict.fromkeys(_SMALL, files.MOST_JSON_BYTES),
    INDEX_NAME: files.MOST_LISTING_BYTES,
}
"""What is read of these files at most, so that no more of them is downloaded either."""


def is_repo_id(source: Path | str) -> bool:
    """Whether this is to be looked for on the Hub: ORG/NAME, and no such file or directory."""
    text = str(source)
    return _REPO_ID.fullmatch(text) is not None and not Path(text).exists()


def split_revision(text: str) -> tuple[str, str | None]:
    """Return a directory or a repo, and the revision that stands behind the latter and an @."""
    repo, at, revision = text.rpartition("@")
    if at and is_repo_id(repo) and not Path(text).exists():
        return repo, revision
    return text, None


def open_source(source: Path | str, revision: str | None = None) -> Checkpoint:
    """Open a model's checkpoint, that of a repo without its weights; raises UpcycleError."""
    storage = locate_model(source, revision)
    return open_checkpoint(storage.path) if storage.is_local else open_storage(storage)


def check_revision(revision: str | None) -> None:
    """Raise UpcycleError for a revision that is there and empty: a variable that is not set."""
    if revision is not None and not revision.strip():
        hint = "Leave it out, or name a branch, a tag or a commit."
        raise UpcycleError("the revision is empty.", hint)


def locate_model(source: Path | str, revision: str | None = None) -> Storage:
    """Return where a model's files are, of a repo only config.json here; raises UpcycleError."""
    check_revision(revision)
    if is_repo_id(source):
        return _find(str(source), revision)
    if revision is not None:
        what = "a directory here" if Path(source).exists() else "no repo id"
        raise UpcycleError(
            f"a revision belongs to a repo on the Hub, and {source} is {what}.", "Leave it out."
        )
    return Storage(Path(source))


def download_model(storage: Storage) -> Path:
    """Return a model's directory, with all here that anything reads; raises UpcycleError."""
    if isinstance(storage, RepoStorage):
        try:
            names = open_storage(storage).files
        except UpcycleError:
            # Whoever reads it here will find what is wrong with it, and say it their way.
            names = storage.matching([CONFIG_NAME, "*.safetensors", *COMPANIONS])
        storage.download([*names, *storage.matching(_BESIDES)])
    return storage.path


def check_download_space(checkpoints: Sequence[Checkpoint], *, beside: Path) -> int:
    """Return the bytes that bringing checkpoints takes from the file system of `beside`.

    Raises UpcycleError when the cache is on another one, and that has not enough.
    """
    to_come = [each for each in checkpoints if each.bytes_to_download]
    missing = sum(each.bytes_to_download for each in to_come)
    cache = _existing((to_come or checkpoints)[0].path)
    if not missing or cache.stat().st_dev == _existing(beside).stat().st_dev:
        return missing
    free = shutil.disk_usage(cache).free
    if missing > free:
        names = ", ".join(each.name for each in to_come)
        raise UpcycleError(
            f"not enough disk space to download {names}: {missing / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free in {cache}.",
            "Free some, or set HF_HOME to a directory on another file system.",
        )
    return 0


@dataclass(frozen=True)
class RepoStorage(Storage):
    """One commit of a repo; its files are in huggingface_hub's cache, once they are."""

    is_local = False
    repo: str
    commit: str
    sizes: Mapping[str, int]  # of every file of the repo, by name
    _heads: dict[str, bytes] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the repo has such a file."""
        return name in self.sizes

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Return the names that match, as they would in a directory."""
        return sorted(name for name in self.sizes if files.matches(name, patterns))

    def names(self) -> list[str]:
        """Return the names of all files of the repo, sorted."""
        return sorted(self.sizes)

    def prepare(self, shards: Sequence[str]) -> None:
        """Ask for all headers side by side: there can be hundreds."""
        wanted = [name for name in shards if name in self.sizes]

        def ask() -> None:
            with ThreadPoolExecutor(_CONNECTIONS, "upcycle-hub") as pool:
                self._heads.update(zip(wanted, pool.map(self._head, wanted), strict=True))

        run_interruptibly(ask)

    def stamp(self, name: str) -> FileStamp:
        """Return the size of a file; a commit's files do not change."""
        if name not in self.sizes:
            from huggingface_hub import constants

            if constants.HF_HUB_OFFLINE:
                raise not_cached(self.repo, self.commit)
            raise UpcycleError(f"{self.repo} has no {name}, which its index lists.")
        return FileStamp(name, self.sizes[name], 0)

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Return a part of a weight file's beginning."""
        head = self._heads.get(shard, b"")
        if end > len(head) and len(head) < self.sizes[shard]:
            head = self._heads[shard] = head + self._request(shard, len(head), end)
        return head[begin:end]

    def local(self, name: str) -> Path:
        """Return the path of a small file in the cache, downloaded if need be."""
        self.download([name])
        return self.path / name

    def download(self, names: Sequence[str]) -> None:
        """Download files into the cache, as far as they are not there; raises UpcycleError."""
        from huggingface_hub import snapshot_download

        if wanted := self._missing(names):
            for name in wanted:
                _check_small(self.repo, name, self.sizes.get(name, 0))
            nbytes = self.bytes_to_download(wanted)
            download = partial(snapshot_download, self.repo, revision=self.commit)
            patterns, bar = [escape(name) for name in wanted], download_bar(nbytes)
            with explained(self.repo, self.commit), at_most(nbytes):
                run_interruptibly(partial(download, allow_patterns=patterns, tqdm_class=bar))
        if missing := self._missing(names):
            raise UpcycleError(f"{self.repo}: {missing[0]} was not downloaded.", "Try again.")
        for name in names:
            path, stated = self.path / name, self.sizes.get(name)
            found = files.locate(self.path, name).stat().st_size
            if found != stated:
                there = f"{self.repo} has one of {stated or 0:,} there."
                hint = f"Remove it, and run the command again: rm {path}"
                raise UpcycleError(f"{path} has {found:,} bytes, and {there}", hint)

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (self.path / name).exists()]

    def bytes_to_download(self, names: Sequence[str]) -> int:
        """Return the size of those of these files that are not in the cache."""
        return sum(self.sizes.get(name, 0) for name in self._missing(names))

    def _head(self, name: str) -> bytes:
        end = min(_HEAD_BYTES, self.sizes[name])
        if (self.path / name).exists():
            with files.open_regular(files.locate(self.path, name)) as file:
                return file.read(end)
        head = self._request(name, 0, end)
        # Here, where it is done side by side, and not for one file after another.
        end = min(8 + int.from_bytes(head[:8], "little"), self.sizes[name])
        if len(head) < end <= MAX_HEADER_BYTES:
            head += self._request(name, len(head), end)
        return head

    def _request(self, name: str, begin: int, end: int) -> bytes:
        """Return bytes of a file on the Hub, and close the connection when it sends more."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if begin >= end:
            return b""
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}"}
        url = hf_hub_url(self.repo, name, revision=self.commit)

        def ask() -> bytes:
            deadline = time.monotonic() + longest_seconds(end - begin)
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=30
            ) as response:
                hf_raise_for_status(response)
                # A server that knows no ranges sends the file from its beginning.
                skip = 0 if response.status_code == 206 else begin
                if skip > _MOST_SKIPPED_BYTES:
                    words = f"it sends {name} from its beginning, not from where it is asked"
                    raise bad_answer(words)
                data = bytearray()
                for piece in response.iter_raw():
                    data += piece
                    if len(data) >= skip + end - begin:
                        break
                    if time.monotonic() > deadline:
                        raise bad_answer(f"the header of {name} takes it too long")
            return bytes(data[skip : skip + end - begin])

        with explained(self.repo, self.commit):
            return patiently(ask)


def _find(repo: str, revision: str | None) -> RepoStorage:
    """Look a repo up: its commit and its files, from the Hub or, offline, from the cache."""
    from huggingface_hub import HfApi, constants

    with explained(repo, revision):
        if constants.HF_HUB_OFFLINE:
            path = fetch(repo, CONFIG_NAME, revision).parent
            commit = path.name
            here = (file for file in path.rglob("*") if file.is_file())
            sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in here}
        else:
            ask = partial(HfApi().model_info, repo, revision=revision, files_metadata=True)
            found = read_repo(patiently(ask), sized=True)
            commit, sizes = found.commit, dict(found.sizes)
            if CONFIG_NAME not in sizes:
                raise _no_model(repo, sizes)
            _check_small(repo, CONFIG_NAME, sizes[CONFIG_NAME])
            with at_most(sizes[CONFIG_NAME]):
                path = _config_path(repo, revision, commit).parent
    storage = RepoStorage(path, repo, commit, sizes)
    if constants.HF_HUB_OFFLINE and not storage.matching(["*.safetensors"]):
        raise not_cached(repo, revision)
    return storage


def _config_path(repo: str, revision: str | None, commit: str) -> Path:
    """Return where the config.json of a commit is in the cache, downloaded if need be."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        # Asked for by the revision, the cache remembers what that was, for when it is offline.
        path = patiently(lambda: fetch(repo, CONFIG_NAME, revision))
        if path.parent.name == commit:
            return path
        # The Hub did not answer this time, and the cache knew an older commit; or it has moved.
        return patiently(lambda: fetch(repo, CONFIG_NAME, commit))
    except RemoteEntryNotFoundError as error:
        raise _no_model(repo) from error


def _no_model(repo: str, files: Collection[str] = ()) -> UpcycleError:
    if ADAPTER_NAME in files:
        return adapter(repo)
    return UpcycleError(f"{repo} has no {CONFIG_NAME}.", "Give the repo of a Hugging Face model.")


def _check_small(repo: str, name: str, nbytes: int) -> None:
    """Raise UpcycleError for a file that is too large to be read, before it is downloaded."""
    most = _MOST_BYTES.get(name, files.MOST_COMPANION_BYTES)
    if nbytes > most and not is_weight_file(name):
        words = f"it has {nbytes:,} bytes, and no such file has more than {most:,}"
        raise UpcycleError(f"{name} of {repo} is not downloaded: {words}.")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
