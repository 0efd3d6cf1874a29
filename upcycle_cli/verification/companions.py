"""Companions: is what lies beside the weights what the dense model has there?

The tokenizer, the chat template, the generation settings and the licence are the dense model's, by
file and by meaning; checksums are right; and what else lies there is named. Nothing of this needs a
record of how the MoE was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from upcycle_cli.checkpoint import CONFIG_NAME, GENERATION_NAME, Checkpoint, read_json
from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import CHECKSUMS_NAME, matches, read_checksums, sha256_of
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.listing import foreign_files
from upcycle_cli.verification.report import CheckResult, Findings
from upcycle_cli.verification.tokenizers import compare_tokenizers, contents

NAME = "files"
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
_MOST_NAMED = 5

_GENERATION_USUAL: Mapping[str, Any] = {
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
    failures, notes = compare_tokenizers(facts.dense, facts.moe)
    for failure in (*failures, *_generation_failures(facts), *_checksum_failures(facts.moe)):
        findings.add(failure)
    foreign = foreign_files(facts.moe_names, facts.moe)
    notes += _licence_notes(facts)
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        notes.append(f"Not part of the model: {', '.join(foreign[:_MOST_NAMED])}{more}.")
    passed = "The tokenizer, chat template and generation settings are the dense model's."
    return findings.result(NAME, passed, {"foreign_files": len(foreign)}, " ".join(notes))


def _generation_failures(facts: Facts) -> Iterator[str]:
    theirs = contents(facts.dense, GENERATION_NAME)
    try:
        ours = contents(facts.moe, GENERATION_NAME)
        if theirs == ours:
            return
        if ours is None:
            yield f"{GENERATION_NAME} is missing: the dense model has one"
            return
        found = _generation(facts.moe)
        if theirs is not None:
            wanted, whose = _generation(facts.dense), "the dense model's"
        else:  # what transformers writes for a model that came without
            config = facts.moe.config
            wanted = {key: config[key] for key in _GENERATION_TOKENS if config.get(key) is not None}
            wanted["_from_model_config"] = True
            whose = f"what {CONFIG_NAME} implies"
    except UpcycleError:
        yield f"{GENERATION_NAME} is not the file of the dense model"
        return
    for key in sorted(wanted | found):
        one, other = wanted.get(key), found.get(key)
        if type(one) is not type(other) or one != other:
            held, due = ("absent" if value is None else repr(value) for value in (other, one))
            yield f"{GENERATION_NAME}: {key} is {held}, {whose} is {due}"


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the generation settings without what transformers adds and drops by itself."""
    config = read_json(checkpoint.storage.local(GENERATION_NAME))
    said = {key: value for key, value in config.items() if value is not None}
    said.pop("transformers_version", None)
    return {key: value for key, value in said.items() if value is not _GENERATION_USUAL.get(key)}


def _licence_notes(facts: Facts) -> Iterator[str]:
    """Somebody may have added or amended a licence file, which no engine reads."""
    names = [file.name for file in facts.dense.companions if matches(file.name, _LICENCES)]
    for name in names:
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
