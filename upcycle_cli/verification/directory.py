"""The check `directory`: are the MoE's files those that the plan writes?

JSON is compared by value and the rest byte for byte. Any other file that a loader could read is a
difference, and so is any other setting. What transformers writes when it saves such a model again
is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    GENERATION_NAME,
    INDEX_NAME,
    RECORD_NAME,
    REPORT_NAME,
    WEIGHTS_NAME,
    is_weight_file,
    json_object,
    read_json,
)
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    MOST_COMPANION_BYTES,
    MOST_LISTING_BYTES,
    matches,
    read_small,
)
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.plan.plan import Plan
from upcycle_cli.verification.result import CheckResult, Findings
from upcycle_cli.verification.settings import (
    Settings,
    config_failures,
    differences,
    record_failures,
    same,
)
from upcycle_cli.write.ownership import checksum_failures

NAME = "directory"
_OWN = (CONFIG_NAME, RECORD_NAME, CARD_NAME, REPORT_NAME, CHECKSUMS_NAME)
_GIT = (".gitattributes", ".gitignore")
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
_INERT = ("", ".md", ".txt", ".log", ".csv", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg")
"""Suffixes of files that no loader reads, unless they have the name of a tokenizer's file."""
_SAVED_BY = ("transformers_version", "is_local", "local_files_only")
"""Keys that transformers adds when it saves, which nothing reads."""
_MOST_NAMED = 5


def check_directory(
    plan: Plan, moe: Checkpoint, names: Sequence[str], record: Settings
) -> CheckResult:
    """Compare an MoE's files with the plan; `names` are all that lie in its directory."""
    findings, notes = Findings(), list[str]()
    findings.add(*config_failures(plan, moe, record, notes), *record_failures(plan, record))
    findings.add(*_weight_file_failures(moe))
    findings.add(*_companion_failures(plan, moe, notes))
    findings.add(*_foreign_failures(plan, moe, names, notes), *checksum_failures(moe.path))
    return findings.result(NAME, "All files are those of the plan.", note=" ".join(notes))


def _weight_file_failures(moe: Checkpoint) -> Iterator[str]:
    """Check the names and metadata of weight files; how tensors are spread over them is free."""
    for shard in moe.shards:
        if "/" in shard.name or not matches(shard.name, ("model*.safetensors",)):
            yield f"{shard.name} holds weights under a name that only the index knows"
        if shard.format != "pt":
            kind = shown(shard.format)
            yield f"{shard.name}: the format in its metadata is {kind}, and loaders want 'pt'"
    if not _has_index(moe):
        return
    index = read_json(moe.storage.local(INDEX_NAME), MOST_LISTING_BYTES)
    metadata = index.get("metadata")
    held = metadata if isinstance(metadata, dict) else {}
    wanted, counted = {"total_size": moe.nbytes}, held.get("total_parameters")
    if type(counted) is int and 0 < counted <= moe.num_parameters:
        wanted["total_parameters"] = counted  # transformers leaves out buffers
    expected = {"metadata": wanted, "weight_map": index["weight_map"]}
    yield from (
        f"{INDEX_NAME}: {each}" for each in differences(expected, index | {"metadata": held})
    )


def _has_index(moe: Checkpoint) -> bool:
    return [shard.name for shard in moe.shards] != [WEIGHTS_NAME]


def _foreign_failures(
    plan: Plan, moe: Checkpoint, names: Sequence[str], notes: list[str]
) -> Iterator[str]:
    """Name the files that no plan writes; those that no loader reads are only noted."""
    expected = {*_OWN, *_GIT, *(shard.name for shard in moe.shards)}
    expected |= {INDEX_NAME} if _has_index(moe) else set()
    expected |= {CODE_NAME} if plan.code is not None else set()
    inert = []
    for name in names:
        path, odd = PurePosixPath(name), is_weight_file(name) or name.endswith((".py", "/"))
        if name in expected or (not odd and matches(name, COMPANIONS)):
            continue
        if path.suffix.casefold() in _INERT and not (odd or matches(name.casefold(), COMPANIONS)):
            inert.append(name)
        else:
            yield f"{name} is no file of this model, and loaders or engines may read or run it"
    if inert:
        more = f" and {len(inert) - _MOST_NAMED} more" if len(inert) > _MOST_NAMED else ""
        notes.append(f"Not part of the model: {', '.join(inert[:_MOST_NAMED])}{more}.")


# Tokenizer, generation settings, licences ---------------------------------------------------------


def _companion_failures(plan: Plan, moe: Checkpoint, notes: list[str]) -> Iterator[str]:
    """Compare the code, and what is copied from the dense model."""
    names = {file.name for model in (plan.source, moe) for file in model.companions}
    licences = {name for name in names if matches(name, _LICENCES)}
    generation = names & {GENERATION_NAME}
    for some in (generation, names - licences - generation):
        found = [*_differing(plan, moe, some)]
        if found and _equals_saved(plan, moe, some):
            saved = ", ".join(sorted(some))
            notes.append(f"Saved again by transformers, and the same: {saved}.")
        else:
            yield from found
    yield from _differing(plan, moe, [] if plan.code is None else [CODE_NAME])
    # Somebody may add or amend a licence, which no engine reads.
    notes += [f"{each}." for each in _differing(plan, moe, licences)]


def _differing(plan: Plan, moe: Checkpoint, names: Collection[str]) -> Iterator[str]:
    for name in sorted(names):
        try:
            code = plan.code if name == CODE_NAME else None
            wanted = _contents(plan.source, name) if code is None else code.encode()
            held = _contents(moe, name)
            if wanted == held:
                continue
            if held is None:
                yield f"{name} is missing"
            elif wanted is not None and name.endswith(".json"):
                ours, theirs = (json_object(data, name) for data in (wanted, held))
                yield from (f"{name}: {each}" for each in differences(ours, theirs))
            else:
                yield f"{name} is not what convert writes"
        except UpcycleError as error:
            yield error.message


def _equals_saved(plan: Plan, moe: Checkpoint, names: set[str]) -> bool:
    """Whether the MoE's files are what transformers writes when it saves the dense model's."""
    dense = plan.source
    from upcycle_cli.run.models import TransformersError

    try:
        written = _saved(dense, plan.config, generation=GENERATION_NAME in names)
        for name in names | written.keys():
            wanted, held = written.get(name), _contents(moe, name)
            # What transformers no longer writes it has moved to a file that it does write.
            if wanted == held or (wanted is None and held == _contents(dense, name)):
                continue
            if wanted is None or held is None or not name.endswith(".json"):
                return False
            values = [json_object(data, name) for data in (wanted, held)]
            if not same(*map(_without_defaults, values)):
                return False
    except (TransformersError, UpcycleError):
        return False
    return True


def _saved(dense: Checkpoint, config: Settings, *, generation: bool) -> dict[str, bytes]:
    """Return what transformers writes when it saves the tokenizer, or the generation settings.

    The config decides which class the tokenizer has, so it is the MoE's.
    """
    from upcycle_cli.run.models import load_config, load_tokenizer, transformers_errors

    with TemporaryDirectory(prefix="upcycle-verify-") as scratch, transformers_errors():
        from transformers import GenerationConfig

        before, again = Path(scratch, "before"), Path(scratch, "again")
        for file in dense.companions:
            (before / file.name).parent.mkdir(parents=True, exist_ok=True)
            (before / file.name).write_bytes(_contents(dense, file.name) or b"")
        (before / CONFIG_NAME).write_text(json.dumps(config))
        if not generation:
            load_tokenizer(before).save_pretrained(again)
        elif dense.storage.has(GENERATION_NAME):
            found = GenerationConfig.from_pretrained(before, local_files_only=True)
            found.save_pretrained(again)
        else:  # then transformers saves what the model's config says
            GenerationConfig.from_model_config(load_config(before)).save_pretrained(again)
        files = [path for path in again.rglob("*") if path.is_file()]
        return {path.relative_to(again).as_posix(): path.read_bytes() for path in files}


def _without_defaults(value: object) -> object:
    """Leave out keys of who saved it, and flags of generation that transformers writes or not."""
    if not isinstance(value, dict):
        return value
    flags = [(flag, False) for flag in ("output_attentions", "output_hidden_states")]
    return {k: v for k, v in value.items() if k not in _SAVED_BY and (k, v) not in flags}


def _contents(model: Checkpoint, name: str) -> bytes | None:
    """Return what a file beside the weights holds, None where there is none; UpcycleError."""
    if not model.storage.has(name):
        return None
    return read_small(model.storage.local(name), MOST_COMPANION_BYTES)
