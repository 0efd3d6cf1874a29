"""A finished output to a repo on the Hub: checked first, then uploaded by huggingface_hub.

Nothing shows on the branch before everything is there. What was uploaded already is not sent again,
so a push that was cut off is resumed by the same command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.card_metadata import is_edited, read_front_matter
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    RECORD_NAME,
    REPORT_NAME,
)
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, matches, read_small
from upcycle_cli.core.text import printable
from upcycle_cli.hub.client import (
    Repo,
    checked_commit,
    download_limit,
    fetch,
    hub_session,
    read_repo,
    read_user,
    retry,
    run_interruptibly,
)
from upcycle_cli.hub.errors import SIGN_IN, endpoint, error_text
from upcycle_cli.hub.remote_checkpoint import check_revision
from upcycle_cli.publish.card import for_repo
from upcycle_cli.publish.licences import reminders
from upcycle_cli.write.staging import MARKER

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from upcycle_cli.publish.manifest import Manifest

# huggingface_hub splits a commit of more files when the Hub refuses it as a whole.
_MOST_FILES = 20
_CLOSED_CLIENTS = 2  # so often an upload is gone on with
_LAST = (CONFIG_NAME, INDEX_NAME, RECORD_NAME)  # without these, nothing takes a repo for a model
# What would be loaded instead of, or along with, the weights that are pushed.
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", INDEX_NAME)


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to push, and how."""

    repo: str
    # A branch, made when it is not there, or refs/pr/N; None for the main branch.
    revision: str | None = None
    private: bool = False  # make the repo a private one, when it is to be made
    create_pr: bool = False  # open a pull request instead of changing the branch
    message: str | None = None  # the commit's first line
    replace_card: bool = False  # even where somebody has edited it there

    def __post_init__(self) -> None:
        check_revision(self.revision)
        if self.create_pr and self.revision is not None:
            raise UpcycleError(
                "a pull request is opened against the main branch, whatever --revision says.",
                "Use --create-pr or --revision. To go on with an open one: --revision refs/pr/N.",
            )


@dataclass(frozen=True, kw_only=True)
class Push:
    """What a push did."""

    repo: str
    url: str
    commit: str
    pull_request: str | None  # its URL, when one was opened
    changed: bool  # False when everything was there already
    files: int
    nbytes: int
    card_kept: bool  # the repo's card had been edited there, and was left as it is
    left_out: tuple[str, ...]  # files of the directory that are not part of the model
    removed: tuple[str, ...]  # weight files of another model that were in the repo
    reminders: tuple[str, ...]  # what the licence asks for and is not there


def check_destination(destination: Destination) -> None:
    """Raise UpcycleError when the Hub cannot be reached, or the user cannot write to the repo."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    repo = destination.repo
    if constants.HF_HUB_OFFLINE:
        raise UpcycleError("HF_HUB_OFFLINE forbids to push.", "Unset it.")
    with hub_session(repo):
        validate_repo_id(repo)
        if "/" not in repo:
            raise UpcycleError(f"'{repo}' is not a repo id.", "Write ORG/NAME or USER/NAME.")
        if get_token() is None:
            raise UpcycleError("pushing takes a token, and there is none.", SIGN_IN)
        api = HfApi()
        owners, may_only_read = read_user(retry(api.whoami))
        try:
            public = not read_repo(retry(lambda: api.model_info(repo))).private
            if not destination.create_pr:  # which whoever can read may open
                retry(lambda: api.auth_check(repo, write=True))
        except RepositoryNotFoundError:
            if may_only_read:
                raise UpcycleError(
                    f"the token may only read, and {repo} is to be made.",
                    "Use a token that may write (`hf auth login`, HF_TOKEN).",
                ) from None
            if repo.split("/")[0] not in owners:
                raise UpcycleError(
                    f"you ({owners[0]}) cannot make {repo}: it is neither yours nor that of "
                    "an organization of yours.",
                    f"Choose from {', '.join(f'{name}/…' for name in owners)}, or use another "
                    "token.",
                ) from None
            return
    if public and destination.private:
        raise UpcycleError(
            f"{repo} exists and is public.", "Make it private on the Hub first, or leave --private."
        )


def push(
    directory: Path,
    destination: Destination,
    *,
    on_start: Callable[[int, int], None] = lambda _files, _nbytes: None,  # before anything is sent
) -> Push:
    """Push a complete upcycled checkpoint to a repo, made when it is not there.

    Raises UpcycleError, after which the same call goes on from what was uploaded.
    """
    # In this order because it takes less time.
    check_destination(destination)
    manifest = _check_complete(directory)
    files = dict(manifest.files)
    has_report = REPORT_NAME in files
    card = for_repo(_read_card(files[CARD_NAME]), destination.repo, with_report=has_report)
    with hub_session(destination.repo, destination.revision):
        there = _prepare(destination)
        kept = None if destination.replace_card else _edited_card(there, card, destination)
        if kept is not None:
            card = kept
            del files[CARD_NAME]
        nbytes = sum(path.stat().st_size for path in files.values())
        on_start(len(files), nbytes)
        # Weight files in the repo that are not of this model.
        stale = sorted(name for name in {*there.sizes} - {*files} if matches(name, _WEIGHTS))
        with _staged(directory.resolve().name, files, card) as folder:
            info = run_interruptibly(lambda: _upload(folder, [*files], stale, there, destination))
        checked_commit(info.oid)
    url, pull_request = f"{endpoint()}/{destination.repo}", _pull_request(destination, info)
    branch = destination.revision
    return Push(
        repo=destination.repo,
        url=(pull_request or url) if branch is None else f"{url}/tree/{branch}",
        commit=info.oid,
        pull_request=pull_request,
        changed=info.oid != there.commit,
        files=len(files),
        nbytes=nbytes,
        card_kept=kept is not None,
        left_out=manifest.left_out,
        removed=tuple(stale),
        reminders=reminders(_metadata(card), card, destination.repo, files),
    )


def _check_complete(directory: Path) -> Manifest:
    """Return what of a directory is published; UpcycleError when not all of it is as it was."""
    from upcycle_cli.old_verification.completeness import find_incomplete, open_upcycled
    from upcycle_cli.publish.manifest import read_manifest

    if (directory / MARKER).exists():
        raise UpcycleError(
            f"{directory} is an unfinished conversion.",
            "Finish it by running the same `upcycle convert` again.",
        )
    moe = open_upcycled(directory)
    incomplete = find_incomplete(moe)
    manifest = read_manifest(moe)
    failures = list(dict.fromkeys([*incomplete, *manifest.failures]))
    if failures:
        shown = "\n".join(f"- {printable(failure)}" for failure in failures[:8])
        more = f"\n- and {len(failures) - 8} more" if len(failures) > 8 else ""
        raise UpcycleError(
            f"{directory} is not a complete upcycled checkpoint; nothing was pushed.",
            f"{shown}{more}\n"
            "Make it again with `upcycle convert --overwrite`. A model that was trained further is "
            "not the one that its card and record describe: upload it with `hf upload`.",
        )
    return manifest


def _read_card(path: Path) -> str:
    """Return a card that huggingface_hub can read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]  # huggingface_hub's own parser

    try:
        text = read_small(path, MOST_JSON_BYTES).decode()
        ModelCard(text)
    except (ValueError, YAMLError) as error:
        raise UpcycleError(f"{path} is not a valid model card: {error_text(error)}.") from error
    return text


def _metadata(card: str) -> Mapping[str, object]:
    """Return what a card says of its licence, which somebody else may have written, if anything."""
    try:
        return read_front_matter(card, ("license", "license_name"))
    except UpcycleError:
        return {}


def _prepare(destination: Destination) -> Repo:
    """Make the repo and the branch; return what is there."""
    from huggingface_hub import HfApi

    api, repo, revision = HfApi(), destination.repo, destination.revision
    # None leaves it to the organization's own settings.
    private = destination.private or None
    retry(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision is not None and not revision.startswith("refs/"):
        retry(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    return read_repo(retry(lambda: api.model_info(repo, revision=revision)))


def _edited_card(there: Repo, card: str, destination: Destination) -> str | None:
    """Return the repo's card when it has to stay: somebody has written or changed it."""
    if CARD_NAME not in there.sizes:
        return None
    text = _download(there, CARD_NAME, destination).decode(errors="replace")
    return text if is_edited(text) and text.strip() != card.strip() else None


def _download(there: Repo, name: str, destination: Destination) -> bytes:
    # By its commit, so that a cache that knew an older one is of no account.
    with download_limit(MOST_JSON_BYTES):
        path = retry(lambda: fetch(destination.repo, name, there.commit))
    return read_small(path, MOST_JSON_BYTES)


@contextmanager
def _staged(title: str, files: Mapping[str, Path], card: str) -> Iterator[Path]:
    """Yield a directory of links to these files, with the card as it is to be on the Hub."""
    with tempfile.TemporaryDirectory(prefix="upcycle-push-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / title
        for name, real in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == CARD_NAME:
                path.write_text(card, encoding="utf-8")
            else:
                path.symlink_to(real)
        yield folder


def _upload(
    folder: Path, names: list[str], stale: list[str], there: Repo, destination: Destination
) -> CommitInfo:
    """Upload files and remove stale ones; return what huggingface_hub says of the last commit."""
    if len(names) <= _MOST_FILES:
        return _upload_together(folder, names, stale, destination)
    record = _download(there, RECORD_NAME, destination) if RECORD_NAME in there.sizes else None
    if record != (folder / RECORD_NAME).read_bytes():
        # Between the two commits it is no model at all, which is better than two halves.
        stale = [*stale, *(name for name in _LAST if name in there.sizes and name not in stale)]
    early = [name for name in names if name not in _LAST]
    late = [name for name in names if name in _LAST]
    first = _upload_together(folder, early, stale, destination)
    if first.pr_revision is None:
        return _upload_together(folder, late, [], destination)
    in_pr = replace(destination, create_pr=False, revision=first.pr_revision)
    try:
        with hub_session(destination.repo, first.pr_revision):
            last = _upload_together(folder, late, [], in_pr)
    except UpcycleError as error:
        raise UpcycleError(
            f"the pull request {_pull_request(destination, first)} is open, but not complete: "
            f"{error.message}",
            f"{error.hint or ''}\nGo on with --revision {first.pr_revision} in place of "
            "--create-pr.".strip(),
        ) from error
    last.pr_num = first.pr_num
    return last


def _upload_together(
    folder: Path, names: Sequence[str], stale: Sequence[str], destination: Destination
) -> CommitInfo:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()

    def upload() -> CommitInfo:
        return api.upload_folder(
            repo_id=destination.repo,
            folder_path=folder,
            commit_message=destination.message or f"Upload {folder.name}",
            revision=destination.revision,
            create_pr=destination.create_pr,
            allow_patterns=[escape(name) for name in names],
            delete_patterns=[escape(name) for name in stale] or None,
        )

    try:
        # Trying again after an answer that was lost could open a second pull request.
        return upload() if destination.create_pr else retry(lambda: _outlast(upload))
    except HTTPError:
        raise
    except ValueError as error:
        # The Hub's verdict on the card's metadata, before anything is uploaded.
        words = f"the Hub refuses this: {error_text(error)}."
        raise UpcycleError(words, f"Correct {CARD_NAME}.") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error.__cause__, UpcycleError | HTTPError):
            raise error.__cause__ from error
        # Whether the Hub is there says why.
        retry(api.whoami)
        raise UpcycleError(
            f"uploading to {destination.repo} failed: {error_text(error)}.",
            "Nothing was published. The same command goes on from what was uploaded.",
        ) from error


def _outlast(upload: Callable[[], CommitInfo]) -> CommitInfo:
    """Upload, and go on when one connection of several has broken."""
    # huggingface_hub then closes its client, of which all other threads are told only that it is.
    for _ in range(_CLOSED_CLIENTS):
        try:
            return upload()
        except RuntimeError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
    return upload()


def _pull_request(destination: Destination, info: CommitInfo) -> str | None:
    """Return where a pull request is, by its number: the address is not taken from the answer."""
    if info.pr_num is None:
        return None
    return f"{endpoint()}/{destination.repo}/discussions/{info.pr_num}"
