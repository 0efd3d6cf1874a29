"""Companions: is what lies beside the weights what the dense model has there?

The tokenizer, the chat template, the generation settings and the licence are the dense model's, by
file and by meaning; checksums are right; and what else lies there is named. Nothing of this needs a
record of how the MoE was made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from upcycle_cli.checkpoint import CONFIG_NAME, GENERATION_NAME, Checkpoint, read_json
from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import (
    CHECKSUMS_NAME,
    MOST_COMPANION_BYTES,
    MOST_JSON_BYTES,
    matches,
    open_regular,
    parse_checksums,
    read_small,
)
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.listing import foreign_files
from upcycle_cli.verification.report import CheckResult, Findings
from upcycle_cli.verification.tokenizers import compare_tokenizers

NAME = "files"
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
_MOST_NAMED = 5

_GENERATION_REWRITTEN: Mapping[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    "use_cache": True,
}
"""Generation settings that transformers adds or drops when it saves, being what it does anyway."""
_GENERATION_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_files(facts: Facts) -> CheckResult:
    """Compare the files beside the weights with the dense model's."""
    findings = Findings()
    tokenizers = compare_tokenizers(facts.dense, facts.moe)
    for failure in (
        *tokenizers.failures,
        *_generation_failures(facts),
        *_checksum_failures(facts.moe),
    ):
        findings.add(failure)
    foreign = foreign_files(facts.moe_names, facts.moe)
    notes = [*tokenizers.notes, *_licence_notes(facts)]
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        notes.append(f"Not part of the model: {', '.join(foreign[:_MOST_NAMED])}{more}.")
    passed = "The tokenizer, chat template and generation settings are the dense model's."
    return findings.result(NAME, passed, {"foreign_files": len(foreign)}, " ".join(notes))


def _generation_failures(facts: Facts) -> Iterator[str]:
    theirs = _contents(facts.dense, GENERATION_NAME)
    try:
        ours = _contents(facts.moe, GENERATION_NAME)
        if theirs == ours:
            return
        if ours is None:
            yield f"{GENERATION_NAME} is missing: the dense model has one"
            return
        found = _generation(facts.moe)
        wanted = _implied_generation(facts) if theirs is None else _generation(facts.dense)
    except UpcycleError:
        yield f"{GENERATION_NAME} is not the file of the dense model"
        return
    whose = "the dense model's" if theirs is not None else f"what {CONFIG_NAME} implies"
    for key in sorted(wanted | found):
        one, other = wanted.get(key), found.get(key)
        if type(one) is not type(other) or one != other:
            yield (
                f"{GENERATION_NAME}: {key} is {_words(found.get(key))}, {whose} is "
                f"{_words(wanted.get(key))}"
            )


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the generation settings without what transformers adds and drops by itself."""
    config = read_json(checkpoint.storage.local(GENERATION_NAME))
    return {
        key: value
        for key, value in config.items()
        if key != "transformers_version"
        and value is not None
        and (key not in _GENERATION_REWRITTEN or value is not _GENERATION_REWRITTEN[key])
    }


def _implied_generation(facts: Facts) -> dict[str, Any]:
    """Return the generation settings that transformers writes for a model that came without."""
    config = facts.moe.config
    tokens = {key: config[key] for key in _GENERATION_TOKENS if config.get(key) is not None}
    return tokens | {"_from_model_config": True}


def _words(value: object) -> str:
    return "absent" if value is None else repr(value)


def _licence_notes(facts: Facts) -> Iterator[str]:
    """Somebody may have added or amended a licence file, which no engine reads."""
    for file in facts.dense.companions:
        if not matches(file.name, _LICENCES):
            continue
        if not facts.moe.storage.has(file.name):
            yield f"{file.name} of the dense model is not there."
            continue
        try:
            same = _contents(facts.moe, file.name) == _contents(facts.dense, file.name)
        except UpcycleError as error:
            yield error.message
            continue
        if not same:
            yield f"{file.name} is not the dense model's."


def _contents(checkpoint: Checkpoint, name: str) -> bytes | None:
    if not checkpoint.storage.has(name):
        return None
    return read_small(checkpoint.storage.local(name), MOST_COMPANION_BYTES)


def _checksum_failures(moe: Checkpoint) -> Iterator[str]:
    """Hold the files against SHA256SUMS, as `sha256sum --check` does."""
    if not moe.storage.has(CHECKSUMS_NAME):
        return
    try:
        sums = parse_checksums(read_small(moe.storage.local(CHECKSUMS_NAME), MOST_JSON_BYTES))
    except UpcycleError as error:
        yield error.message
        return
    for name, wanted in sums.items():
        try:
            with open_regular(moe.storage.local(name)) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except UpcycleError:
            yield f"{CHECKSUMS_NAME} lists {name}, which is not there"
            continue
        if digest != wanted:
            yield f"{name} is not the file that {CHECKSUMS_NAME} describes"
