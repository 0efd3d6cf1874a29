"""Upload a finished output to a repo on the Hub, after checking it.

All files appear on the branch with one commit. Files that the Hub has already are not sent again,
so the same command resumes a push that was interrupted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.card_metadata import is_edited, read_front_matter
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    INDEX_NAME,
    RECORD_NAME,
    REPORT_NAME,
    WEIGHTS_NAME,
    refuse_missing,
)
from upcycle_cli.core.display import Result, Row
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, MOST_JSON_BYTES, matches, read_small
from upcycle_cli.core.text import counted, printable, shell_line, size_text
from upcycle_cli.hub import client
from upcycle_cli.hub.remote_checkpoint import check_revision
from upcycle_cli.publish.card import card_for_repo
from upcycle_cli.write import ownership

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelInfo

# Files of another model that loaders would read, or that do not match the pushed files.
_REPLACED = (WEIGHTS_NAME, "model-?????-of-?????.safetensors", INDEX_NAME, CHECKSUMS_NAME)
# Folders that git and huggingface_hub leave in a directory.
_FOLDERS_OF_TOOLS = (".git", ".cache")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where to push, and how: the arguments of `push`."""

    repo: str
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    message: str | None = None
    replace_card: bool = False

    def __post_init__(self) -> None:
        check_revision(self.revision)
        if self.create_pr and self.revision is not None:
            raise UpcycleError(
                "`create_pr` opens a pull request against the main branch, and takes no revision.",
                "Leave one out. The revision refs/pr/N alone continues an open pull request.",
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class Push(Result):
    """What a push did."""

    repo: str
    url: str
    commit: str
    pull_request: str | None  # its URL, if one was opened
    changed: bool  # False when the repo had everything already
    files: int
    nbytes: int
    card_kept: bool  # somebody had edited the repo's card, so it stayed
    left_out: tuple[str, ...]  # files of the directory that were not published
    removed: tuple[str, ...]  # weight files, checksums and report of another model in the repo
    replaced: tuple[str, ...]  # weight files of another model that had the same names
    reminders: tuple[str, ...]  # what the licence requires and the repo does not have

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield a table of what was uploaded, removed and left out."""
        what = f"{counted(self.files, 'file')}, {size_text(self.nbytes)}"
        kept = "README.md was edited there and is kept (`replace_card=True` replaces it)"
        rows = {
            "repo": self.url,
            "commit": self.commit,
            "pull request": self.pull_request,
            "uploaded": what if self.changed else f"nothing: all {what} were there",
            "card": kept if self.card_kept else "",
            "replaced there": ", ".join(self.replaced),
            "removed there": ", ".join(self.removed),
            "left out": ", ".join(self.left_out),
        }
        yield [(label, [text]) for label, text in rows.items() if text]


def check_destination(destination: Destination) -> None:
    """Raise UpcycleError when the Hub cannot be reached, or the user cannot write to the repo."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    repo = destination.repo
    if constants.HF_HUB_OFFLINE:
        raise UpcycleError("HF_HUB_OFFLINE forbids the push.", "Unset it.")
    with client.hub_session(repo):
        validate_repo_id(repo)
        if "/" not in repo:
            raise UpcycleError(f"'{repo}' is not a repo id.", "Write ORG/NAME or USER/NAME.")
        if get_token() is None:
            raise UpcycleError("a push needs a token, and you are not signed in.", client.SIGN_IN)
        api = HfApi()
        user = client.retry(api.whoami)
        owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
        token = user.get("auth", {}).get("accessToken") or {}
        try:
            public = not client.retry(lambda: api.model_info(repo)).private
            if not destination.create_pr:  # every reader may open a pull request
                client.retry(lambda: api.auth_check(repo, write=True))
        except RepositoryNotFoundError:
            if token.get("role") == "read" or repo.split("/")[0] not in owners:
                raise UpcycleError(
                    f"you ({owners[0]}) cannot create {repo} with this token.",
                    f"Choose from {', '.join(f'{name}/…' for name in owners)}, with a token that "
                    "may write (`hf auth login`, HF_TOKEN).",
                ) from None
            return
    if public and destination.private:
        hint = "Make it private there first, or leave out `private`."
        raise UpcycleError(f"{repo} exists and is public.", hint)


def push(
    output: Path | str,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    replace_card: bool = False,
    on_start: Callable[[int, int], None] | None = None,
) -> Push:
    """Upload a finished conversion to the Hub: `push("moe", "my-org/moe", private=True)`.

    The repo is created if it does not exist, with `private` as a private one. `revision` is a
    branch, created if necessary, or refs/pr/N; None means the main branch. `create_pr` opens a pull
    request instead. `message` is the commit message. A card that was edited on the Hub is kept
    unless `replace_card` is set. `on_start` gets the number of files and of bytes to upload.

    Raises UpcycleError if the output is incomplete or was changed, or if the Hub refuses it. The
    same call then continues with the files that are missing.
    """
    directory = Path(output)
    destination = Destination(
        repo=repo,
        revision=revision,
        private=private,
        create_pr=create_pr,
        message=message or f"Upload {directory.resolve().name}",
        replace_card=replace_card,
    )
    refuse_missing(directory)
    # First, because it is faster than reading the files.
    check_destination(destination)
    found = _check_complete(directory, destination.repo)
    files = {name: directory / name for name in found.own}
    has_report = REPORT_NAME in files
    try:
        card = card_for_repo(read_small(files[CARD_NAME]).decode(), repo, with_report=has_report)
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{files[CARD_NAME]} is not UTF-8 text.", "Save it as UTF-8.") from error
    with client.hub_session(destination.repo, destination.revision):
        info = _create_repo(destination)
        existing, head = client.file_sizes(info), client.checked_commit(info.sha)
        kept = False
        if CARD_NAME in existing and not destination.replace_card:
            text = read_small(_fetch(repo, CARD_NAME, head)).decode(errors="replace")
            if kept := is_edited(text) and text.strip() != card.strip():
                card = text
                del files[CARD_NAME]
        nbytes = sum(path.stat().st_size for path in files.values())
        if on_start is not None:
            on_start(len(files), nbytes)
        there = _fetch(repo, RECORD_NAME, head).parent if RECORD_NAME in existing else None
        is_other = there is None or ownership.record_digest(there) != found.record_digest
        patterns = (*_REPLACED, REPORT_NAME) if is_other else _REPLACED
        stale = sorted(name for name in existing.keys() - files if matches(name, patterns))
        common = sorted(name for name in existing.keys() & files if name.endswith(".safetensors"))
        done = client.run_interruptibly(lambda: _commit(files, card, stale, destination))
        client.checked_commit(done.oid)
    url, branch = f"{client.endpoint()}/{destination.repo}", destination.revision
    pull_request = None if done.pr_num is None else f"{url}/discussions/{done.pr_num}"
    return Push(
        repo=destination.repo,
        url=(pull_request or url) if branch is None else f"{url}/tree/{branch}",
        commit=done.oid,
        pull_request=pull_request,
        changed=done.oid != head,
        files=len(files),
        nbytes=nbytes,
        card_kept=kept,
        left_out=tuple(
            name for name in found.foreign if name.split("/")[0] not in _FOLDERS_OF_TOOLS
        ),
        removed=tuple(stale),
        replaced=tuple(common if is_other else ()),
        reminders=reminders(card, destination.repo, {*files, *existing}),
    )


def _check_complete(directory: Path, repo: str) -> ownership.Inventory:
    """Return the files of an output; UpcycleError unless it is complete and unchanged."""
    upload = shell_line(["hf", "upload", repo, str(directory)])
    if not (directory / RECORD_NAME).is_file():
        raise UpcycleError(
            f"{directory} is not a finished output of upcycle: it has no {RECORD_NAME}.",
            "If a conversion was interrupted, run the same `upcycle convert` again. To upload any "
            f"other directory, such as a trained model: {upload}",
        )
    found = ownership.take_inventory(directory)
    if failures := found.failures or [*ownership.checksum_failures(directory)]:
        listed = "\n".join(f"- {printable(failure)}" for failure in failures[:8])
        raise UpcycleError(
            f"{directory} is not a complete, unchanged conversion; nothing was pushed.",
            f"{listed}\nConvert again with `overwrite=True`. If you trained the model, its card "
            f"and record no longer describe it: {upload}",
        )
    return found


def _create_repo(destination: Destination) -> ModelInfo:
    """Create the repo and the branch if necessary; return what they contain."""
    from huggingface_hub import HfApi

    api, repo, revision = HfApi(), destination.repo, destination.revision
    # None keeps the organization's default.
    private = destination.private or None
    client.retry(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision is not None and not revision.startswith("refs/"):
        client.retry(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    return client.retry(lambda: api.model_info(repo, revision=revision))


def _fetch(repo: str, name: str, commit: str) -> Path:
    """Download a small file by its commit: the cache may know an older one for the branch."""
    with client.download_limit(MOST_JSON_BYTES):
        return client.retry(lambda: client.fetch(repo, name, commit))


def _commit(
    files: Mapping[str, Path], card: str, stale: Sequence[str], destination: Destination
) -> CommitInfo:
    """Upload files with this card, and commit them together with the removal of stale ones."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    contents = {name: card.encode() if name == CARD_NAME else path for name, path in files.items()}

    def upload() -> CommitInfo:
        return api.create_commit(
            destination.repo,
            [*added, *(CommitOperationDelete(name, is_folder=False) for name in stale)],
            commit_message=destination.message or "",
            revision=destination.revision,
            create_pr=destination.create_pr,
        )

    try:
        # Made once, since it reads every file for its digest.
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        # A retry after a lost answer could open a second pull request.
        return upload() if destination.create_pr else client.retry(upload)
    except HTTPError:
        raise
    except ValueError as error:
        # The Hub checks the card's metadata before anything is uploaded.
        words = f"the Hub refuses the card: {client.error_text(error)}."
        raise UpcycleError(words, f"Correct {CARD_NAME}.") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error.__cause__, UpcycleError | HTTPError):
            raise error.__cause__ from error
        client.retry(api.whoami)  # raises a clearer error if the Hub is not reachable
        words = f"uploading to {destination.repo} failed: {client.error_text(error)}."
        hint = "Nothing was published. The same command continues where this one stopped."
        raise UpcycleError(words, hint) from error


# Licences ---------------------------------------------------------------------------------------


def reminders(card: str, repo: str, files: Collection[str]) -> tuple[str, ...]:
    """Return what the licence named in a card requires and the repo does not have."""
    try:
        named = read_front_matter(card, ("license_name", "license", "base_model"))
    except UpcycleError:
        return ()
    if not named:
        words = "the card names no licence and no base model"
        return (f"{words}. Add them to README.md before you release the model.",)
    licences = (named.get("license_name"), named.get("license"))
    names = [name.lower() for name in licences if isinstance(name, str)]
    # Reminders, not legal advice. Sources: llama.com/llama3/license, llama.com/llama3_1/license and
    # later ones (section 1.b), ai.meta.com/llama/license (Llama 2, section 1.b),
    # ai.google.dev/gemma/terms (section 3.1).
    rules = json.loads((resources(__package__) / "licences.json").read_text("utf-8"))
    for rule in rules:
        # The pattern is for `license`, or for `license_name` where the licence is "other".
        if any(re.fullmatch(rule["pattern"], name) for name in names):
            return tuple(_missing(rule, card, repo, files))
    return ()


def _missing(
    rule: Mapping[str, str], card: str, repo: str, files: Collection[str]
) -> Iterator[str]:
    wants, name = f"the {rule['licence']} requires", repo.rsplit("/", maxsplit=1)[-1]
    prefix, phrase = rule.get("prefix", ""), rule.get("phrase", "")
    if not _letters(name).startswith(_letters(prefix)):
        yield f'{wants} the name of the model to begin with "{prefix}"; "{name}" does not.'
    if phrase.lower() not in card.lower():
        yield f'{wants} the model card to say "{phrase}".'
    if not any(name.upper().startswith("NOTICE") for name in files):
        words = f'{wants} a file "Notice" in the repo that says: "{rule["notice"]}".'
        yield f"{words} Add it with `hf upload {repo} Notice`."
    if not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in files):
        yield f"{wants} a copy of itself in the repo. Add it with `hf upload {repo} LICENSE`."


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
