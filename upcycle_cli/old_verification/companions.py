"""Companions: is what lies beside the weights what the dense model has there?

The tokenizer, the chat template, the generation settings and the licence are the dense model's, by
file and by meaning; checksums are right; and what else lies there is named. Nothing of this needs a
record of how the MoE was made.
"""

from __future__ import annotations

from collections.abc import Iterator

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import GENERATION_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, read_checksums, sha256_of
from upcycle_cli.old_verification.facts import Pair
from upcycle_cli.old_verification.listing import foreign_files
from upcycle_cli.old_verification.tokenizers import compare_tokenizers, contents, file_failures
from upcycle_cli.run.models import tokenizer_files
from upcycle_cli.verification.result import CheckResult, Findings

NAME = "files"
_MOST_NAMED = 5


def check_files(facts: Pair) -> CheckResult:
    """Compare the files beside the weights with the dense model's."""
    failures, notes = compare_tokenizers(facts.dense, facts.moe)
    failures += file_failures(facts.dense, facts.moe, GENERATION_NAME, notes)
    failures += _checksum_failures(facts.moe)
    foreign = foreign_files(facts.moe_names, facts.moe)
    notes += _licence_notes(facts)
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        notes.append(f"Not part of the model: {', '.join(foreign[:_MOST_NAMED])}{more}.")
    passed = "The tokenizer, chat template and generation settings are the dense model's."
    return Findings(failures).result(NAME, passed, {"foreign_files": len(foreign)}, " ".join(notes))


def _licence_notes(facts: Pair) -> Iterator[str]:
    """Somebody may have added or amended a licence file, which no engine reads."""
    others = {GENERATION_NAME, *tokenizer_files(facts.dense)}
    for name in (file.name for file in facts.dense.companions if file.name not in others):
        try:
            if not facts.moe.storage.has(name):
                yield f"{name} of the dense model is not there."
            elif contents(facts.moe, name) != contents(facts.dense, name):
                yield f"{name} is not the dense model's."
        except UpcycleError as error:
            yield error.message


def _checksum_failures(moe: Checkpoint) -> Iterator[str]:
    """Hold the files against SHA256SUMS, as `sha256sum --check` does."""
    if not moe.storage.has(CHECKSUMS_NAME):
        return
    try:
        sums = read_checksums(moe.storage.local(CHECKSUMS_NAME))
    except UpcycleError as error:
        yield error.message
        return
    for name, wanted in sums.items():
        try:
            if wanted != sha256_of(moe.storage.local(name)):
                yield f"{name} is not the file that {CHECKSUMS_NAME} describes"
        except UpcycleError:
            yield f"{CHECKSUMS_NAME} lists {name}, which is not there"
