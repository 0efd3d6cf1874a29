"""A finished output to a repo on the Hub: checked first, then uploaded by huggingface_hub.

Nothing shows on the branch before everything is there. What was uploaded already is not sent again,
so a push that was cut off is resumed by the same command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.card import is_edited
from upcycle_cli.checkpoint import CARD_NAME, CONFIG_NAME, INDEX_NAME, RECORD_NAME
from upcycle_cli.errors import UpcycleError
from upcycle_cli.hub.licences import reminders
from upcycle_cli.hub.requests import explained, patiently, transport_errors, without_token
from upcycle_cli.publish import MARKER, split_files

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_MOST_FILES = 20
"""huggingface_hub splits a commit of more files when the Hub refuses it as a whole."""
_LAST = (CONFIG_NAME, INDEX_NAME, RECORD_NAME)
"""Without these, nothing takes a repo for a model."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to push, and how."""

    repo: str
    revision: str | None = None
    """A branch, made when it is not there, or refs/pr/N; None for the main branch."""
    private: bool = False
    """Make the repo a private one, when it is to be made."""
    create_pr: bool = False
    """Open a pull request instead of changing the branch."""
    message: str | None = None
    """The commit's first line."""
    replace_card: bool = False
    """Replace the repo's card even where somebody has edited it there."""

    def __post_init__(self) -> None:
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
    pull_request: str | None
    """Its URL, when one was opened."""
    changed: bool
    """False when everything was there already."""
    files: int
    nbytes: int
    card_kept: bool
    """Whether the repo's card had been edited there, and was left as it is."""
    left_out: tuple[str, ...]
    """Files of the directory that are not part of the model."""
    reminders: tuple[str, ...]
    """What the licence asks for and is not there."""


def check_destination(destination: Destination) -> None:
    """Raise UpcycleError when the Hub cannot be reached, or the user cannot write to the repo."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    repo = destination.repo
    if constants.HF_HUB_OFFLINE:
        raise UpcycleError("HF_HUB_OFFLINE forbids to push.", "Unset it.")
    with explained(repo):
        validate_repo_id(repo)
        if "/" not in repo:
            raise UpcycleError(f"'{repo}' is not a repo id.", "Write ORG/NAME or USER/NAME.")
        if get_token() is None:
            raise UpcycleError(
                "pushing takes a token, and there is none.",
                "Sign in with `hf auth login`, or set HF_TOKEN.",
            )
        api = HfApi()
        user = patiently(api.whoami)
        names = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
        try:
            public = not patiently(lambda: api.model_info(repo)).private
        except RepositoryNotFoundError:
            if repo.split("/")[0] not in names:
                raise UpcycleError(
                    f"you ({user['name']}) cannot make {repo}: it is neither yours nor that of "
                    "an organization of yours.",
                    f"Choose from {', '.join(f'{name}/…' for name in names)}, or use another "
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
    on_start: Callable[[int, int], None] = lambda _files, _nbytes: None,
) -> Push:
    """Push a complete upcycled checkpoint to a repo, made when it is not there.

    `on_start` hears the number of files and their bytes before anything is sent.

    Raises UpcycleError when the directory is not complete, when the Hub refuses, and when it does
    not answer any more; the same call then goes on from what was uploaded.
    """
    _check_complete(directory)
    check_destination(destination)
    names, left_out = split_files(directory)
    metadata, card = _read_card(directory / CARD_NAME)
    with explained(destination.repo, destination.revision):
        kept = _prepare(destination, card)
        if kept:
            names = [name for name in names if name != CARD_NAME]
        nbytes = sum((directory / name).stat().st_size for name in names)
        on_start(len(names), nbytes)
        before, info = _upload(directory, names, destination)
    return Push(
        repo=destination.repo,
        url=_url(destination, info),
        commit=info.oid,
        pull_request=info.pr_url,
        changed=info.oid != before,
        files=len(names),
        nbytes=nbytes,
        card_kept=kept,
        left_out=tuple(left_out),
        reminders=reminders(metadata, card, destination.repo, names),
    )


def _check_complete(directory: Path) -> None:
    from upcycle_cli.verification.completeness import find_incomplete

    if (directory / MARKER).exists():
        raise UpcycleError(
            f"{directory} is an unfinished conversion.",
            "Finish it by running the same `upcycle convert` again.",
        )
    failures = find_incomplete(directory)
    if failures:
        shown = "\n".join(f"- {failure}" for failure in failures[:8])
        more = f"\n- and {len(failures) - 8} more" if len(failures) > 8 else ""
        raise UpcycleError(
            f"{directory} is not a complete upcycled checkpoint; nothing was pushed.\n"
            f"{shown}{more}",
            "Make it again with `upcycle convert --overwrite`. A model that was trained further is "
            "not the one that its card and record describe: upload it with `hf upload`.",
        )


def _read_card(path: Path) -> tuple[dict[str, object], str]:
    """Return a card's metadata and its whole text."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]  # huggingface_hub's own parser

    if not path.is_file():
        raise UpcycleError(f"there is no {path}.", "Write it: it is the model card.")
    try:
        text = path.read_text(encoding="utf-8")
        return ModelCard(text).data.to_dict(), text
    except (ValueError, YAMLError) as error:
        raise UpcycleError(f"{path} is not a valid model card: {error}") from error


def _prepare(destination: Destination, card: str) -> bool:
    """Make the repo and the branch; return whether the card that is there must be kept."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    api, repo, revision = HfApi(), destination.repo, destination.revision
    # None leaves it to the organization's own settings.
    private = destination.private or None
    patiently(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision is not None and not revision.startswith("refs/"):
        patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    if destination.replace_card:
        return False
    try:
        there = patiently(lambda: Path(hf_hub_download(repo, CARD_NAME, revision=revision)))
    except EntryNotFoundError:
        return False
    text = there.read_text(encoding="utf-8")
    return is_edited(text) and text.strip() != card.strip()


def _upload(directory: Path, names: list[str], destination: Destination) -> tuple[str, CommitInfo]:
    """Upload files; return the commit before, and what huggingface_hub says of the last one."""
    from huggingface_hub import HfApi

    api, revision = HfApi(), destination.revision
    before = patiently(lambda: api.model_info(destination.repo, revision=revision)).sha
    assert before is not None
    if len(names) <= _MOST_FILES:
        return before, _upload_together(api, directory, names, destination)
    early = [name for name in names if name not in _LAST]
    first = _upload_together(api, directory, early, destination)
    if first.pr_revision is not None:
        destination = replace(destination, create_pr=False, revision=first.pr_revision)
    late = [name for name in names if name in _LAST]
    last = _upload_together(api, directory, late, destination)
    last.pr_url = last.pr_url or first.pr_url
    return before, last


def _upload_together(
    api: HfApi, directory: Path, names: list[str], destination: Destination
) -> CommitInfo:
    def upload() -> CommitInfo:
        return api.upload_folder(
            repo_id=destination.repo,
            folder_path=directory,
            commit_message=destination.message or f"Upload {directory.resolve().name}",
            revision=destination.revision,
            create_pr=destination.create_pr,
            allow_patterns=[escape(name) for name in names],
        )

    try:
        # Trying again after an answer that was lost could open a second pull request.
        return upload() if destination.create_pr else patiently(upload)
    except transport_errors():
        raise
    except ValueError as error:
        # The Hub's verdict on the card's metadata, before anything is uploaded.
        raise UpcycleError(f"the Hub refuses this: {error}", f"Correct {CARD_NAME}.") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error.__cause__, transport_errors()):
            raise error.__cause__ from error
        # When one thread's connection breaks, the others are told only that the client is closed:
        # whether the Hub is there says why.
        patiently(api.whoami)
        words = without_token(" ".join(str(error).split())[:300])  # of Xet's own transfer
        raise UpcycleError(
            f"uploading to {destination.repo} failed: {words}",
            "Nothing was published. The same command goes on from what was uploaded.",
        ) from error


def _url(destination: Destination, info: CommitInfo) -> str:
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/{destination.repo}"
    if info.pr_url is not None:
        return info.pr_url
    return url if destination.revision is None else f"{url}/tree/{destination.revision}"
