"""The check `directory`: compare the MoE's files with the plan.

JSON is compared by value, the rest byte for byte. Any other setting is a difference, and so is any
other file that a loader could read. Files that transformers has saved again are accepted if they
mean the same to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    GENERATION_NAME,
    INDEX_NAME,
    RECORD_NAME,
    REPORT_NAME,
    UNREAD,
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
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.verification.result import CheckResult, Findings
from upcycle_cli.write.ownership import checksum_failures
from upcycle_cli.write.record import described

NAME = "directory"
Settings = Mapping[str, Any]
_REWRITTEN = ("_name_or_path", "transformers_version")
"""Keys of config.json that transformers sets when it saves a model."""
_LEFT_OUT = ("dtype", "tie_word_embeddings")
"""Keys that some versions of transformers rename, or leave out if they are defaults."""
_OWN = (CONFIG_NAME, RECORD_NAME, CARD_NAME, REPORT_NAME, CHECKSUMS_NAME)
_GIT = (".gitattributes", ".gitignore")
_PROCESSORS = ("*processor_config.json", "chat_template.json")
"""Files of a processor, which tokenizers neither read nor save."""
_INERT = ("", ".md", ".txt", ".log", ".csv", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg")
"""Suffixes of files that no loader reads, except for files of a tokenizer."""
_SAVED_BY = ("transformers_version", "is_local", "local_files_only")
"""Keys that transformers adds when it saves; nothing reads them."""


def check_directory(
    plan: Plan, moe: Checkpoint, names: Sequence[str], record: Settings
) -> CheckResult:
    """Compare an MoE's files with the plan; `names` are all files in its directory."""
    notes = list[str]()
    findings = Findings(_config_failures(plan, moe, record, notes))
    findings += _record_failures(plan, record)
    findings += _weight_file_failures(moe)
    findings += _companion_failures(plan, moe, notes)
    findings += _foreign_failures(plan, moe, names)
    findings += (each for each in checksum_failures(moe.path) if each not in findings)
    passed = "Every file is what convert writes for this recipe."
    return findings.result(NAME, passed, note=" ".join(notes))


def _weight_file_failures(moe: Checkpoint) -> Iterator[str]:
    """Check the names and metadata of weight files; tensors may be spread over them freely."""
    for shard in moe.shards:
        if "/" in shard.name or not matches(shard.name, ("model*.safetensors",)):
            yield f"{shard.name} holds weights, but loaders look for model*.safetensors"
        if shard.format != "pt":
            kind = shown(shard.format)
            yield f"{shard.name}: the format in its metadata is {kind}, but loaders want 'pt'"
    if not _has_index(moe):
        return
    index = read_json(moe.storage.local(INDEX_NAME), MOST_LISTING_BYTES)
    metadata = index.get("metadata")
    held = dict(metadata) if isinstance(metadata, dict) else {}
    counted = held.pop("total_parameters", 1)  # transformers leaves out buffers
    if type(counted) is not int or not 0 < counted <= moe.num_parameters:
        yield f"{INDEX_NAME}: metadata.total_parameters is {shown(counted)}"
    wanted = {"metadata": {"total_size": moe.nbytes}, "weight_map": index["weight_map"]}
    found = _differences(wanted, index | {"metadata": held})
    yield from (f"{INDEX_NAME}: {each}" for each in found)


def _has_index(moe: Checkpoint) -> bool:
    return [shard.name for shard in moe.shards] != [WEIGHTS_NAME]


def _foreign_failures(plan: Plan, moe: Checkpoint, names: Sequence[str]) -> Iterator[str]:
    """Name the files that convert does not write and that a loader could read."""
    expected = {*_OWN, *_GIT, *(shard.name for shard in moe.shards)}
    expected |= {INDEX_NAME} if _has_index(moe) else set()
    expected |= {CODE_NAME} if plan.code is not None else set()
    for name in (name for name in names if name not in expected):
        # Some file systems ignore case, so a companion's name in another case counts as well.
        is_companion, may_be = (matches(each, COMPANIONS) for each in (name, name.casefold()))
        inert = is_companion or (not may_be and PurePosixPath(name).suffix.casefold() in _INERT)
        if not inert or is_weight_file(name) or name.endswith((".py", "/")):
            yield f"{name} does not belong to this model, and loaders or engines may read or run it"


# Settings by value --------------------------------------------------------------------------------


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are the same; 1, 1.0 and true are different."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _differences(wanted: object, held: object, path: str = "") -> Iterator[str]:
    """Yield in words how a JSON value differs from the wanted one."""
    if _same(wanted, held):
        return
    if isinstance(wanted, Mapping) and isinstance(held, Mapping):
        for key in {**wanted, **held}:
            where = f"{path}.{key}" if path else str(key)
            if key not in held:
                yield f"{where} is missing; it should be {shown(wanted[key])}"
            elif key not in wanted:
                yield f"{where} is {shown(held[key])}, but should not be there"
            else:
                yield from _differences(wanted[key], held[key], where)
    elif isinstance(wanted, list) and isinstance(held, list) and len(wanted) == len(held):
        for index, (one, other) in enumerate(zip(wanted, held, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    else:
        yield f"{path} is {shown(held)} instead of {shown(wanted)}"


def _config_failures(
    plan: Plan, moe: Checkpoint, record: Settings, notes: list[str]
) -> Iterator[str]:
    wanted: Settings = json.loads(json.dumps(plan.config))
    found = [*_differences(wanted, moe.config)]
    if not found:
        return
    entries = moe.tensors.values()
    _, dtype = max(((entry.nbytes, entry.dtype) for entry in entries), default=(0, ""))
    stored = TORCH_DTYPES.get(dtype, "")  # of the largest tensor
    if _means_the_same(_with_dtype(wanted, moe.config, stored), moe.config):
        notes.append(f"transformers saved {CONFIG_NAME} again; it means the same.")
        return
    yield from (f"{CONFIG_NAME}: {each}" for each in found)
    before, this = record["tool"].get("version"), version("upcycle-cli")
    if before != this:
        notes.append(
            f"upcycle {before} made it, but this is upcycle {this}, which may write other keys. "
            f"Verify with upcycle {before}, or convert again."
        )


def _with_dtype(wanted: Settings, held: Settings, stored: str) -> Settings:
    """Accept the stored dtype where transformers names it: `weights` compares dtypes."""
    named = {key: stored for key in ("dtype", "torch_dtype") if held.get(key) == stored}
    nested = {
        key: _with_dtype(wanted[key], held[key], stored)
        for key in held
        if isinstance(held[key], dict) and isinstance(wanted.get(key), dict)
    }
    return {**wanted, **nested, **named}


def _means_the_same(wanted: Settings, held: Settings) -> bool:
    """Whether transformers may have saved one config as the other.

    Each key must mean the same to transformers. Other engines read the file itself, so each value
    must also be the wanted one or the one that transformers writes, and no written key may be
    missing.
    """
    from upcycle_cli.run.models import TransformersError, saved_config

    try:
        (written, meant), (_, held_meant) = saved_config(wanted), saved_config(held)
    except TransformersError:
        return False
    for key in {*meant, *held_meant, *held} - {*_REWRITTEN}:
        if not _same(meant.get(key), held_meant.get(key)):
            return False
        known = [side[key] for side in (wanted, written, meant) if key in side]
        if key in held and not any(_same(held[key], value) for value in known):
            return False
    kept = {key for key in wanted.keys() & written if wanted[key] is not None}
    return kept <= {*held, *_REWRITTEN, *_LEFT_OUT}


def _record_failures(plan: Plan, record: Settings) -> Iterator[str]:
    """Compare the rest of the record with the plan of its recipe."""
    wanted: dict[str, Any] = json.loads(json.dumps(described(plan)))
    layout = wanted.pop("expert_layout")
    held = {key: record[key] for key in wanted}
    if layout == record["expert_layout"]:  # else transformers changed it, and names with it
        wanted["routers"] = sorted(t.name for t in plan.tensors if t.role is Role.ROUTER)
        held["routers"] = sorted(record["routers"])  # training changes their digests
    source, dense = record["source"], plan.source
    # A conversion from a local directory records no revision.
    if dense.repo is not None and source.get("revision") is not None:
        wanted["source"] = {"name": dense.repo, "revision": dense.revision}
        name = str(source.get("name")).partition("+")[0]  # an adapter may have another place now
        held["source"] = {"name": name, "revision": source["revision"]}
    if (merged := plan.how.get("experts_from")) is not None:
        both = merged, record["experts_from"]  # the models have been compared already
        wanted["experts_from"], held["experts_from"] = ({**each, "models": ()} for each in both)
    yield from (f"{RECORD_NAME}: {each}" for each in _differences(wanted, held))
    calibrates = plan.growing is None and plan.recipe.calibrates
    if calibrates and not isinstance(record["calibration"], dict):
        yield f"{RECORD_NAME}: the recipe needs a calibration, but none is recorded"


# Tokenizer, generation settings, licences ---------------------------------------------------------


def _companion_failures(plan: Plan, moe: Checkpoint, notes: list[str]) -> Iterator[str]:
    """Compare the code, and the files that are copied from the dense model."""
    names = {file.name for model in (plan.source, moe) for file in model.companions}
    unread = {name for name in names if matches(name, UNREAD)}
    generation = names & {GENERATION_NAME}
    processors = {name for name in names if matches(name, _PROCESSORS)}
    yield from _differing(plan, moe, processors)
    for some in (generation, names - unread - generation - processors):
        found = [*_differing(plan, moe, some)]
        if found and _equals_saved(plan, moe, some):
            saved = ", ".join(sorted(some))
            notes.append(f"transformers saved {saved} again; the content is the same.")
        else:
            yield from found
    yield from _differing(plan, moe, [] if plan.code is None else [CODE_NAME])
    notes += [f"{each}." for each in _differing(plan, moe, unread)]


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
                yield from (f"{name}: {each}" for each in _differences(ours, theirs))
            else:
                yield f"{name} is not what convert writes"
        except UpcycleError as error:
            yield error.message.removesuffix(".")


def _equals_saved(plan: Plan, moe: Checkpoint, names: set[str]) -> bool:
    """Whether transformers writes the MoE's files when it saves the dense model's."""
    dense = plan.source
    from upcycle_cli.run.models import TransformersError

    try:
        written = _saved(dense, plan.config, generation=GENERATION_NAME in names)
        for name in names | written.keys():
            wanted, held = written.get(name), _contents(moe, name)
            # transformers has moved the content of a file that it no longer writes to another.
            if wanted == held or (wanted is None and held == _contents(dense, name)):
                continue
            if wanted is None or held is None or not name.endswith(".json"):
                return False
            values = [json_object(data, name) for data in (wanted, held)]
            if not _same(*map(_without_defaults, values)):
                return False
    except (TransformersError, UpcycleError):
        return False
    return True


def _saved(dense: Checkpoint, config: Settings, *, generation: bool) -> dict[str, bytes]:
    """Return what transformers saves of the tokenizer, or of the generation settings."""
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
        else:  # transformers takes the settings from the model's config
            GenerationConfig.from_model_config(load_config(before)).save_pretrained(again)
        files = [path for path in again.rglob("*") if path.is_file()]
        return {path.relative_to(again).as_posix(): path.read_bytes() for path in files}


def _without_defaults(value: object) -> object:
    """Leave out keys that say who saved a file, and flags that not every version writes."""
    if not isinstance(value, dict):
        return value
    flags = [(flag, False) for flag in ("output_attentions", "output_hidden_states")]
    return {k: v for k, v in value.items() if k not in _SAVED_BY and (k, v) not in flags}


def _contents(model: Checkpoint, name: str) -> bytes | None:
    """Return the bytes of a file beside the weights, None if it is missing; UpcycleError."""
    if not model.storage.has(name):
        return None
    return read_small(model.storage.local(name), MOST_COMPANION_BYTES)
