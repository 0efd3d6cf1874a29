"""The check `directory`: are the MoE's files those that the plan writes?

JSON is compared by value and the rest byte for byte. A file that differs may still be what
transformers writes when it saves such a model again: then transformers loads and saves the plan's
own settings, and these are compared.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
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
    parse_json,
    read_json,
)
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    MOST_COMPANION_BYTES,
    MOST_LISTING_BYTES,
    matches,
    read_checksums,
    read_small,
    sha256_of,
)
from upcycle_cli.models.families import is_target
from upcycle_cli.models.shipped import CODE_NAME, UPCYCLED_PREFIX
from upcycle_cli.plan.plan import Plan
from upcycle_cli.verification.result import CheckResult, Findings
from upcycle_cli.write.staging import is_note

NAME = "directory"
_OWN = (CONFIG_NAME, RECORD_NAME, CARD_NAME, REPORT_NAME, CHECKSUMS_NAME)
_GIT = (".gitattributes", ".gitignore")
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
_INERT = ("", ".md", ".txt", ".log", ".csv", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg")
"""Suffixes of files that no loader reads, unless they have the name of a tokenizer's file."""
_MOST_NAMED = 5
_REWRITTEN: Mapping[str, str] = {
    "_name_or_path": "names the directory that the model was loaded from",
    "transformers_version": "names the version that saved it",
}
"""Keys of config.json that transformers sets when it saves a model, each with what it says."""


def check_directory(
    plan: Plan, moe: Checkpoint, names: Sequence[str], record: Mapping[str, Any]
) -> CheckResult:
    """Compare an MoE's files with the plan; `names` are all that lie in its directory."""
    findings, notes = Findings(), list[str]()
    findings.add(*_config_failures(plan, moe, notes, record))
    findings.add(*_record_failures(plan, record))
    findings.add(*_weight_file_failures(moe))
    findings.add(*_companion_failures(plan.source, moe, notes))
    findings.add(*_code_failures(plan, moe))
    findings.add(*_foreign_failures(plan.source, moe, names, notes))
    findings.add(*_checksum_failures(moe))
    return findings.result(NAME, "All files are those of the plan.", note=" ".join(notes))


# config.json and the record -----------------------------------------------------------------------


def _config_failures(
    plan: Plan, moe: Checkpoint, notes: list[str], record: Mapping[str, Any]
) -> Iterator[str]:
    wanted: dict[str, Any] = json.loads(json.dumps(plan.config))
    held = moe.config
    found = [*differences(wanted, held)]
    stored = _main_dtype(moe)
    settled = {key: held[key] for key in ("dtype", "torch_dtype") if held.get(key) == stored}
    if found and not [*_unsaved(wanted | settled, held)]:
        notes.append(f"{CONFIG_NAME} was saved again by transformers, and says the same.")
        return
    yield from (f"{CONFIG_NAME}: {each}" for each in found)
    tool = record.get("tool")
    before = tool.get("version") if isinstance(tool, dict) else None
    if found and before != version("upcycle-cli"):
        notes.append(
            f"It was made by upcycle {before}, and this is {version('upcycle-cli')}: that version "
            "may have written other settings. Verify with it, or convert again."
        )


def _main_dtype(moe: Checkpoint) -> str:
    """Return the dtype that most bytes of an MoE have, by torch's name."""
    nbytes = Counter[str]()
    for entry in moe.tensors.values():
        nbytes[entry.dtype] += entry.nbytes
    return TORCH_DTYPES.get(nbytes.most_common(1)[0][0], "")


def _unsaved(wanted: Mapping[str, Any], held: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a config that differ from what transformers saves of the plan's."""
    from upcycle_cli.run.models import TransformersError, saved_config

    try:
        plain, ours = saved_config(wanted)
        _, theirs = saved_config(held)
    except TransformersError as error:
        yield str(error)
        return
    for key in sorted(plain.keys() | ours.keys() | theirs.keys() | wanted.keys() | held.keys()):
        if key in _REWRITTEN:
            continue
        if not same(ours.get(key), theirs.get(key)) or (
            key in held
            and not any(
                key in known and same(held[key], known[key]) for known in (wanted, plain, ours)
            )
        ):
            yield key


def _record_failures(plan: Plan, record: Mapping[str, Any]) -> Iterator[str]:
    """Compare what the record says beside the recipe with the plan that the recipe makes."""
    from upcycle_cli.write.record import described

    for key, value in json.loads(json.dumps(described(plan))).items():
        if key in record and key != "expert_layout":  # which transformers may change
            yield from (f"{RECORD_NAME}: {each}" for each in _one(key, value, record[key]))
    source, dense = record.get("source"), plan.source
    named = source.get("name") if isinstance(source, dict) else None
    revision = source.get("revision") if isinstance(source, dict) else None
    # A conversion of a local directory recorded no revision; the weights are compared all the same.
    pinned = dense.repo is not None and revision is not None
    if pinned and (named, revision) != (dense.name, dense.revision):
        yield (
            f"{RECORD_NAME}: source is {shown(named)} at {shown(revision)} instead of "
            f"{shown(dense.name)} at {shown(dense.revision)}"
        )


def same(one: object, other: object) -> bool:
    """Whether two JSON values are the same; 1, 1.0 and true are three."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def differences(wanted: object, held: object, path: str = "") -> Iterator[str]:
    """Yield in words where a JSON value differs from the one that it should be."""
    if same(wanted, held):
        return
    if isinstance(wanted, Mapping) and isinstance(held, Mapping):
        for key in [*wanted, *(key for key in held if key not in wanted)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in held:
                yield f"{where} is missing, and should be {shown(wanted[key])}"
            elif key not in wanted:
                yield f"{where} is {shown(held[key])}, and should not be there"
            else:
                yield from differences(wanted[key], held[key], where)
        return
    if isinstance(wanted, list) and isinstance(held, list) and len(wanted) == len(held):
        for index, (one, other) in enumerate(zip(wanted, held, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
        return
    yield f"{path} is {shown(held)} instead of {shown(wanted)}"


def _one(key: str, wanted: object, held: object) -> Iterator[str]:
    return differences(wanted, held, key)


# Weight files, code, and foreign files ------------------------------------------------------------


def _weight_file_failures(moe: Checkpoint) -> Iterator[str]:
    """Check the names and metadata of weight files; how tensors are spread over them is free."""
    for shard in moe.shards:
        if "/" in shard.name or not matches(shard.name, ("model*.safetensors",)):
            yield f"{shard.name} holds weights under a name that only the index knows"
        if shard.format != "pt":
            kind = shown(shard.format)
            yield f"{shard.name}: the format in its metadata is {kind}, and loaders want 'pt'"
    if [shard.name for shard in moe.shards] == [WEIGHTS_NAME]:
        return
    index = read_json(moe.storage.local(INDEX_NAME), MOST_LISTING_BYTES)
    metadata = index.get("metadata")
    held = metadata if isinstance(metadata, dict) else {}
    sizes, counted = {"total_size": moe.nbytes}, held.get("total_parameters")
    if type(counted) is int and 0 < counted <= moe.num_parameters:
        sizes["total_parameters"] = counted  # transformers leaves out buffers
    for key in [*index.keys() - {"metadata", "weight_map"}]:
        yield f"{INDEX_NAME}: {key} should not be there"
    yield from (f"{INDEX_NAME}: {each}" for each in differences(sizes, held, "metadata"))


def _code_failures(plan: Plan, moe: Checkpoint) -> Iterator[str]:
    if plan.code is None:
        return
    held = _contents(moe, CODE_NAME)
    if held is None:
        yield f"{CODE_NAME} is missing"
    elif held != plan.code.encode():
        yield f"{CODE_NAME} is not what this version of upcycle writes, so it is not run"


def belongs(name: str, moe: Checkpoint) -> bool:
    """Whether a file can be part of an MoE, by its name."""
    shards = [shard.name for shard in moe.shards]
    index = [INDEX_NAME] if shards != [WEIGHTS_NAME] else []
    if name in (*_OWN, *_GIT, *index, *shards) or is_note(name):
        return True
    if name == CODE_NAME:
        return str(moe.config.get("model_type")).startswith(UPCYCLED_PREFIX)
    odd = is_weight_file(name) or name.endswith((".py", "/"))
    return not odd and matches(name, COMPANIONS)


def _foreign_failures(
    dense: Checkpoint, moe: Checkpoint, names: Sequence[str], notes: list[str]
) -> Iterator[str]:
    """Name the files that no plan writes; those that no loader reads are only noted."""
    companions = {file.name for file in dense.companions}
    spelt: dict[str, str] = {}
    inert = []
    for name in names:
        other = spelt.setdefault(name.casefold(), name)
        if other != name:
            yield f"{name} and {other} are one file where case does not count"
        if belongs(name, moe) and (name in companions or not matches(name, COMPANIONS)):
            continue
        if belongs(name, moe) and matches(name, _LICENCES):
            notes.append(f"{name} is not the dense model's.")
        elif belongs(name, moe):
            continue  # a tokenizer's file: judged with the others of the tokenizer
        elif _is_inert(name):
            inert.append(name)
        else:
            yield f"{name} is no file of this model, and loaders or engines may read or run it"
    if inert:
        more = f" and {len(inert) - _MOST_NAMED} more" if len(inert) > _MOST_NAMED else ""
        notes.append(f"Not part of the model: {', '.join(inert[:_MOST_NAMED])}{more}.")


def _is_inert(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.casefold() in _INERT and not name.endswith("/") and name != INDEX_NAME


# Tokenizer, generation settings, licences ---------------------------------------------------------


def _companion_failures(dense: Checkpoint, moe: Checkpoint, notes: list[str]) -> Iterator[str]:
    """Compare what lies beside the weights with the dense model's."""
    here, there = ({file.name for file in model.companions} for model in (dense, moe))
    licences = {name for name in here | there if matches(name, _LICENCES)}
    tokenizer = (here | there) - licences - {GENERATION_NAME}
    yield from _files_failures(dense, moe, [GENERATION_NAME], notes, _saved_generation)
    yield from _files_failures(dense, moe, sorted(tokenizer), notes, _saved_tokenizer)
    for name in sorted(licences & here):
        held = _contents(moe, name)
        if held is None:
            notes.append(f"{name} of the dense model is not there.")
        elif held != _contents(dense, name):
            notes.append(f"{name} is not the dense model's.")


def _files_failures(
    dense: Checkpoint,
    moe: Checkpoint,
    names: Sequence[str],
    notes: list[str],
    saved: Callable[[Path, Path], object],
) -> Iterator[str]:
    """Compare files that belong together; `saved` has transformers load and save the dense ones."""
    found = [*_named_differences(dense, moe, names)]
    if found and _equals_saved(dense, moe, names, saved):
        notes.append(f"{', '.join(names)}: saved again by transformers, and the same.")
        return
    yield from found


def _named_differences(one: Checkpoint, other: Checkpoint, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            wanted, held = _contents(one, name), _contents(other, name)
            if wanted == held:
                continue
            if wanted is None or held is None:
                yield f"{name} is missing" if held is None else f"{name} is not the dense model's"
            elif name.endswith(".json"):
                ours, theirs = (parse_json(data, name) for data in (wanted, held))
                yield from (f"{name}: {each}" for each in differences(ours, theirs))
            else:
                yield f"{name} is not the dense model's: its bytes differ"
        except UpcycleError as error:
            yield error.message


def _equals_saved(
    dense: Checkpoint, moe: Checkpoint, names: Sequence[str], saved: Callable[[Path, Path], object]
) -> bool:
    """Whether the MoE's files are what transformers writes when it saves the dense model's."""
    from tempfile import TemporaryDirectory

    from upcycle_cli.run.models import TransformersError

    with TemporaryDirectory(prefix="upcycle-verify-") as scratch:
        again = Path(scratch)
        try:
            saved(dense.path, again)
        except TransformersError:
            return False
        files = (path for path in again.rglob("*") if path.is_file())
        written = {path.relative_to(again).as_posix() for path in files}
        for name in {*names} | (written - {CONFIG_NAME}):
            held = _contents(moe, name)
            path = again / name
            wanted = path.read_bytes() if path.is_file() else None
            if wanted == held or (held is not None and held == _contents(dense, name)):
                continue
            if wanted is None or held is None or not name.endswith(".json"):
                return False
            try:
                values = [parse_json(data, name) for data in (wanted, held)]
            except UpcycleError:
                return False
            if not same(*map(_without_defaults, values)):
                return False
    return True


def _without_defaults(value: object) -> object:
    """Leave out the version, and flags of generation that transformers writes or not."""
    flags = [(flag, False) for flag in ("output_attentions", "output_hidden_states")]
    held = value.items() if isinstance(value, dict) else ()
    kept = {k: v for k, v in held if k != "transformers_version" and (k, v) not in flags}
    return kept if isinstance(value, dict) else value


def _saved_tokenizer(dense: Path, again: Path) -> None:
    from upcycle_cli.run.models import load_tokenizer, transformers_errors

    tokenizer = load_tokenizer(dense)
    with transformers_errors():
        tokenizer.save_pretrained(again)


def _saved_generation(dense: Path, again: Path) -> None:
    from upcycle_cli.run.models import load_config, transformers_errors

    with transformers_errors():
        from transformers import GenerationConfig

        if (dense / GENERATION_NAME).exists():
            settings = GenerationConfig.from_pretrained(dense, local_files_only=True)
        else:  # then transformers saves what the model's config says
            settings = GenerationConfig.from_model_config(load_config(dense))
        settings.save_pretrained(again)


def _contents(model: Checkpoint, name: str) -> bytes | None:
    """Return what a file beside the weights holds, None where there is none; UpcycleError."""
    if not model.storage.has(name):
        return None
    return read_small(model.storage.local(name), MOST_COMPANION_BYTES)


def _checksum_failures(moe: Checkpoint) -> Iterator[str]:
    """Compare the files with SHA256SUMS, as `sha256sum --check` does."""
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


# For a push ---------------------------------------------------------------------------------------


def open_upcycled(directory: Path) -> Checkpoint:
    """Open the MoE in a directory; UpcycleError for no checkpoint, or one that is not upcycle's."""
    if directory.is_dir() and not (directory / RECORD_NAME).is_file():
        raise UpcycleError(
            f"{directory} was not made by upcycle (no {RECORD_NAME}).",
            f"To upload any other directory: hf upload REPO {directory}",
        )
    moe = open_checkpoint(directory)
    if not is_target(moe.config):
        raise UpcycleError(
            f"{directory} is no MoE that upcycle makes: its model type is "
            f"{shown(moe.config.get('model_type'))}.",
            "Give the directory that `upcycle convert` wrote.",
        )
    return moe


def find_incomplete(moe: Checkpoint) -> Iterator[str]:
    """Name what differs between an MoE and its own record, without the dense model.

    The files that the record lists, each with its digest, are not looked at here.
    """
    record = read_json(moe.storage.local(RECORD_NAME))
    recorded, model_type = record.get("target_type"), moe.config["model_type"]
    if recorded != model_type:
        yield f"{RECORD_NAME}: target_type is {shown(recorded)}, {CONFIG_NAME} says {model_type}"
    routers = record.get("routers")
    if not isinstance(routers, dict) or not routers:
        yield f"{RECORD_NAME}: routers is missing"
        return
    yield from changed_routers(moe, routers)


def changed_routers(moe: Checkpoint, routers: Mapping[str, object]) -> Iterator[str]:
    """Name the routers of an MoE that are not the recorded ones."""
    for name, digest in routers.items():
        if name not in moe.tensors:
            yield f"{RECORD_NAME} records the router {name}, which is not there"
        elif moe.tensor_digest(name) != digest:
            yield f"{name} is not the router that {RECORD_NAME} records (SHA-256 differs)"


def unsafe_settings(config: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Name the settings by which loading the MoE would run code or fetch models from elsewhere."""
    from upcycle_cli.checkpoint.unsafe_settings import unsafe_config_settings
    from upcycle_cli.models.wrappers import nested_configs

    found = unsafe_config_settings(config, tuple(nested_configs(config)))
    return [each for each in found if each.partition(" ")[0] not in allowed]
