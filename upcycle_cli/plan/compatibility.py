"""Whether another dense model can give experts beside the source: only its weights may differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from upcycle_cli.checkpoint.card_metadata import CardMetadata, read_card_metadata
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CARD_NAME, CONFIG_NAME
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_COMPANION_BYTES, read_small
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.families import dense_model
from upcycle_cli.models.wrappers import nested_configs
from upcycle_cli.plan.merge import model_of
from upcycle_cli.plan.validate import check_source

_IGNORED_KEYS = (
    *("use_cache", "initializer_range", "pretraining_tp", "attention_dropout", "resid_pdrop"),
    *("embd_pdrop", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
)
"""Keys that a forward pass does not read, and rope_parameters, which rope_theta and rope_scaling
state too."""
_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Files that define the tokens where there is no tokenizer.json."""


def merged_card_metadata(sources: Sequence[Checkpoint]) -> CardMetadata:
    """Return the metadata for the new card; a licence only where all sources have the same one."""
    first, *others = (read_card_metadata(source.path, CARD_NAME) for source in sources)
    license_of = first.values.get("license")
    notes = tuple(
        f"{model.name} is under the licence {found or 'that its card does not name'}, and "
        f"{sources[0].name} under {license_of or 'one that its card does not name'}: the new card "
        "names none; see what each asks for."
        for model, other in zip(sources[1:], others, strict=True)
        if (found := other.values.get("license")) != license_of
    )
    if not notes:
        return first
    kept = {key: value for key, value in first.values.items() if not key.startswith("license")}
    return CardMetadata(kept, first.notes + notes)


def check_compatible(source: Checkpoint, others: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Return the other models; UpcycleError for one that cannot give experts beside the source.

    It must be whole, of the same family, with the same settings, tensors and tokens.
    """
    dense = dense_model(source.config, source.tensors)
    used = sorted(source.tensors.keys() - check_source(source, dense).keys())
    for name in used:
        if model_of(name)[0]:
            raise UpcycleError(f"{source.path}: no tensor of a model is called {shown(name)}.")
    for other in others:
        _check_compatible(source, dense, used, other)
    return tuple(others)


def _check_compatible(
    source: Checkpoint, dense: DenseModel, used: Sequence[str], other: Checkpoint
) -> None:
    found = dense_model(other.config, other.tensors)
    if found.family.title != dense.family.title:
        raise UpcycleError(
            f"{other.path} is a {found.family.title}, and {source.path} a {dense.family.title}.",
            "Only models of one family can give experts to one mixture.",
        )
    refuse_unsafe_settings(
        other, ignore_code=found.family.has_obsolete_code, parts=nested_configs(other.config)
    )
    dropped = check_source(other, found)
    _check_settings(source, dense, other, found)
    for name in sorted({*used} ^ (other.tensors.keys() - dropped.keys())):
        here, there = (source, other) if name in used else (other, source)
        raise UpcycleError(f"{here.path} has {name}, and {there.path} does not.")
    for name in used:
        one, two = source.tensors[name], other.tensors[name]
        if one.shape != two.shape:
            raise UpcycleError(
                f"{name} is of shape {list(two.shape)} in {other.path}, and {list(one.shape)} in "
                f"{source.path}.",
                "Only models of one shape can give experts to one mixture.",
            )
    difference = _tokenizer_difference(source, other)
    if difference is not None:
        raise UpcycleError(
            f"the tokenizer of {other.path} is not that of {source.path}: {difference}.",
            "Only models that have the same tokens can give experts to one mixture.",
        )


def check_dtypes(source: Checkpoint, others: Sequence[Checkpoint], names: Iterable[str]) -> None:
    """Raise UpcycleError where experts would be of several dtypes; `names` are their matrices."""
    for name in names:
        for other in others:
            one, two = source.tensors[name].dtype, other.tensors[name].dtype
            if one != two:
                raise UpcycleError(
                    f"{name} is {two} in {other.path}, and {one} in {source.path}.",
                    "Choose one with --dtype.",
                )


def _check_settings(
    source: Checkpoint, dense: DenseModel, other: Checkpoint, found: DenseModel
) -> None:
    """Raise UpcycleError for a setting that the forward pass reads, and that differs."""
    keys = {*defaults_of(dense.model_type), "rope_theta", "rope_scaling", *dense.family.keys}
    ignored = set(_IGNORED_KEYS)
    if dense.values.get("rope_scaling") is None and "rope_theta" in dense.values:
        ignored.add("max_position_embeddings")  # no table of positions, no stretching
    for key in sorted(keys - ignored):
        one, two = dense.values.get(key), found.values.get(key)
        if one != two:
            raise UpcycleError(
                f"{key} is {shown(two)} in {other.path / CONFIG_NAME}, and {shown(one)} in that of "
                f"{source.path}.",
                "The layers of one mixture compute by one config: its experts would be given what "
                "they were not trained on.",
            )
    if (dense.kinds, dense.windows) != (found.kinds, found.windows):
        raise UpcycleError(f"the layers of {other.path} are of other kinds than {source.path}'s.")


def _tokenizer_difference(source: Checkpoint, other: Checkpoint) -> str | None:
    """Say how the tokens of two models differ, None where they do not or one has no tokenizer."""
    name = "tokenizer.json"
    if not all(model.storage.has(name) for model in (source, other)):
        shared = [n for n in _TOKENIZERS if source.storage.has(n) and other.storage.has(n)]
        for each in shared:
            if _file(source, each) != _file(other, each):
                return f"{each} is another file"
        return None
    (one, merges), (two, others) = (_tokens(model, name) for model in (source, other))
    for token, number in sorted(one.items(), key=lambda item: item[1]):
        if two.get(token) != number:
            held = "has no id" if token not in two else f"has id {two[token]}"
            return f"{shown(token)} {held} there, and {number} here"
    more = sorted(two.keys() - one.keys(), key=lambda token: two[token])
    if more:
        return f"it has {len(more)} tokens more, such as {shown(more[0])}"
    return None if merges == others else "it merges tokens differently"


def _file(model: Checkpoint, name: str) -> bytes:
    return read_small(model.storage.local(name), MOST_COMPANION_BYTES)


def _tokens(model: Checkpoint, name: str) -> tuple[dict[str, int], object]:
    """Return the ids of all tokens, those that were added too, and how they are merged."""
    try:
        content = json.loads(_file(model, name))
        inside = content["model"]
        vocabulary = inside["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of a piece and its score
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        return {**vocabulary, **added}, inside.get("merges")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UpcycleError(f"{model.path / name} describes no tokenizer.") from error
