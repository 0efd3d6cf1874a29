"""Checkpoints on the Hub that are not downloaded yet.

The config and the headers of the weight files are read first, by range requests: errors and the
needed disk space show before gigabytes are downloaded. All files are from one commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_storage
from upcycle_cli.checkpoint.storage import (
    ADAPTER_NAME,
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    INDEX_NAME,
    RECORD_NAME,
    FileStamp,
    Storage,
    find_others,
)
from upcycle_cli.core import safe_files as files
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.hub import client

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_HEAD_BYTES = 1 << 16  # the first request for a header: most are smaller
_CONNECTIONS = 8
_FILES_FOR_VERIFY = (RECORD_NAME, CARD_NAME, INDEX_NAME, files.CHECKSUMS_NAME)


def is_repo_id(source: Path | str) -> bool:
    """Whether this names a repo: it looks like ORG/NAME and no such file or directory exists."""
    text = str(source)
    return _REPO_ID.fullmatch(text) is not None and not Path(text).exists()


def split_revision(text: str) -> tuple[str, str | None]:
    """Split REPO@REVISION; a directory and a repo without @ have no revision."""
    repo, at, revision = text.rpartition("@")
    if at and is_repo_id(repo) and not Path(text).exists():
        return repo, revision
    return text, None


def check_revision(revision: str | None) -> None:
    """Raise UpcycleError for an empty revision, which an unset shell variable gives."""
    if revision is not None and not revision.strip():
        hint = "Leave it out, or name a branch, a tag or a commit."
        raise UpcycleError("the revision is empty.", hint)


def split_adapter(source: Path | str) -> tuple[str, str | None]:
    """Split BASE+ADAPTER; a directory whose name has a +, or a model alone, has no adapter."""
    text = str(source)
    signs = () if os.path.exists(text) else re.finditer(r"\+(?=.)", text)  # noqa: PTH110
    bases = [text[: sign.start()] for sign in signs]
    able = [n for n in bases if os.path.isdir(n) or is_repo_id(split_revision(n)[0])]  # noqa: PTH112
    able = able or [n for n in bases if os.path.isdir(text[len(n) + 1 :])]  # noqa: PTH112
    return (able[-1], text[len(able[-1]) + 1 :]) if able else (text, None)


def locate_model(
    source: Path | str, revision: str | None = None, config_name: str = CONFIG_NAME
) -> Storage:
    """Return where a model's files are, with a repo's config in the cache; UpcycleError."""
    source, revision = split_revision(str(source)) if revision is None else (source, revision)
    check_revision(revision)
    if is_repo_id(source):
        return _find_repo(str(source), revision, config_name)
    if revision is not None:
        what = "a local directory" if Path(source).exists() else "not a repo id"
        raise UpcycleError(f"a revision needs a repo on the Hub, and {source} is {what}.")
    return Storage(Path(source))


def locate_source(source: Path | str, revision: str | None = None) -> Storage:
    """Like `locate_model`, also for BASE+ADAPTER; `revision` is the base's."""
    base, adapter = split_adapter(source)
    place = None if adapter is None else locate_model(adapter, None, ADAPTER_NAME)
    return replace(locate_model(base, revision), adapter=place)


def open_source(source: Path | str | Storage, revision: str | None = None) -> Checkpoint:
    """Open a model, or BASE+ADAPTER, without downloading weights; raises UpcycleError."""
    place = source if isinstance(source, Storage) else locate_source(source, revision)
    base = open_checkpoint(place.path) if place.is_local else open_storage(place)
    if place.adapter is None:
        return base
    from upcycle_cli.checkpoint.adapter import open_adapter, with_adapter

    return with_adapter(base, open_adapter(place.adapter))


def download_model(storage: Storage) -> Path:
    """Return a model's directory with everything that `verify` reads; raises UpcycleError."""
    if isinstance(storage, RepoStorage):
        try:
            names = open_storage(storage).files
        except UpcycleError:
            # Opening the directory later reports the error.
            names = storage.matching([CONFIG_NAME, "*.safetensors", *COMPANIONS])
        storage.download([*names, *storage.matching(_FILES_FOR_VERIFY)])
    return storage.path


@dataclass(frozen=True)
class RepoStorage(Storage):
    """One commit of a repo; `path` is its snapshot in huggingface_hub's cache."""

    is_local = False
    repo: str
    commit: str
    sizes: Mapping[str, int]
    """The size of every file of the repo."""
    _heads: dict[str, bytes] = field(default_factory=dict)
    """The first bytes of weight files, at least their headers."""

    def has(self, name: str) -> bool:
        """Whether the repo has such a file."""
        return name in self.sizes

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        return sorted(self.sizes)

    def prefetch_headers(self, shards: Sequence[str]) -> None:
        """Request all headers in parallel, since there can be hundreds."""
        wanted = [name for name in self._missing(shards) if name in self.sizes]

        def request_all() -> None:
            with ThreadPoolExecutor(_CONNECTIONS, "upcycle-hub") as pool:
                self._heads.update(zip(wanted, pool.map(self._head, wanted), strict=True))

        client.run_interruptibly(request_all)

    def stamp(self, name: str) -> FileStamp:
        """Return the size of a file; the files of a commit do not change."""
        if name not in self.sizes:
            from huggingface_hub import constants

            if constants.HF_HUB_OFFLINE:
                raise client.not_cached(self.repo, self.commit)
            raise UpcycleError(f"{self.repo} has no {name}, which its index lists.")
        return FileStamp(name, self.sizes[name], 0)

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Return some of the first bytes of a weight file."""
        head = self._heads.get(shard)
        return super().read(shard, begin, end) if head is None else head[begin:end]

    def local(self, name: str) -> Path:
        """Return the path of a small file in the cache, after downloading it if necessary."""
        self.download([name])
        return self.path / name

    def download(self, names: Sequence[str]) -> None:
        """Download the files that are not in the cache; raises UpcycleError."""
        from huggingface_hub import snapshot_download

        if missing := self._missing(names):
            nbytes = self.bytes_to_download(missing)
            download = partial(snapshot_download, self.repo, revision=self.commit)
            patterns = [escape(name) for name in missing]
            with client.hub_session(self.repo, self.commit), client.download_limit(nbytes):
                client.run_interruptibly(partial(download, allow_patterns=patterns))

    def bytes_to_download(self, names: Sequence[str]) -> int:
        """Return the total size of the files that are not in the cache."""
        return sum(self.sizes.get(name, 0) for name in self._missing(names))

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (self.path / name).exists()]

    def _head(self, name: str) -> bytes:
        head = self._request(name, _HEAD_BYTES)
        header_end = 8 + int.from_bytes(head[:8], "little")
        if len(head) < header_end <= min(self.sizes[name], files.MOST_LISTING_BYTES):
            head = self._request(name, header_end)
        return head

    def _request(self, name: str, nbytes: int) -> bytes:
        """Download the first bytes of a file; a server may ignore the range and send all of it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers() | {"Range": f"bytes=0-{nbytes - 1}"}
        url = hf_hub_url(self.repo, name, revision=self.commit)

        def request() -> bytes:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=30
            ) as response:
                hf_raise_for_status(response)
                data = bytearray()
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) >= nbytes:
                        break
            return bytes(data[:nbytes])

        with client.hub_session(self.repo, self.commit):
            return client.retry(request)


def _find_repo(repo: str, revision: str | None, config_name: str) -> RepoStorage:
    """Find a repo's commit and files, on the Hub or, offline, in the cache."""
    with client.hub_session(repo, revision):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            path = client.fetch(repo, config_name, revision).parent
            found = (file for file in path.rglob("*") if file.is_file())
            sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in found}
            storage = RepoStorage(path, repo, path.name, sizes)
            if not storage.matching(["*.safetensors"]):
                raise client.not_cached(repo, revision)
            return storage
        ask = partial(HfApi().model_info, repo, revision=revision, files_metadata=True)
        info = client.retry(ask)
        sizes, commit = client.file_sizes(info), client.checked_commit(info.sha)
        if config_name not in sizes:
            hint = "Give the repo of a Hugging Face model, or BASE+ADAPTER with a LoRA adapter."
            others = find_others(RepoStorage(Path(repo), repo, commit, sizes))
            raise others or UpcycleError(f"{repo} has no {config_name}.", hint)
        with client.download_limit(sizes[config_name]):
            # By the revision first: the cache then knows which commit it is, for offline use.
            path = client.retry(lambda: client.fetch(repo, config_name, revision))
            if path.parent.name != commit:
                # The branch moved, or the Hub failed and the cache answered with an older commit.
                path = client.retry(lambda: client.fetch(repo, config_name, commit))
    return RepoStorage(path.parent, repo, commit, sizes)
