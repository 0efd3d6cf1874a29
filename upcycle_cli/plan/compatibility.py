"""Whether another dense model can give experts beside the source: the same but for its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

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
from upcycle_cli.plan.merge import Merge, model_of
from upcycle_cli.plan.validate import check_source

_UNREAD = (
    *("use_cache", "initializer_range", "pretraining_tp", "attention_dropout", "resid_pdrop"),
    *("embd_pdrop", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
)
"""Keys that a forward pass does not read, and one that others stand for."""
_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Files that say what tokens are, where there is no tokenizer.json."""


def carried(source: Checkpoint, merge: Merge | None) -> CardMetadata:
    """Return what the new card takes over: of several models no licence that is not everyone's."""
    found = read_card_metadata(source.path, CARD_NAME)
    notes = () if merge is None else tuple(_licence_notes(source, merge.others))
    if not notes:
        return found
    kept = {key: value for key, value in found.values.items() if not key.startswith("license")}
    return CardMetadata(kept, found.notes + notes)


def _licence_notes(source: Checkpoint, others: Sequence[Checkpoint]) -> Iterator[str]:
    """Say which models have another licence than the source, as far as their cards tell."""
    first = read_card_metadata(source.path, CARD_NAME).values.get("license")
    for other in others:
        found = read_card_metadata(other.path, CARD_NAME).values.get("license")
        if found != first:
            yield (
                f"{other.name} is under the licence {found or 'that its card does not name'}, and "
                f"{source.name} under {first or 'one that its card does not name'}: the new card "
                "names none; see what each asks for."
            )


def alike(source: Checkpoint, others: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Return the other models; UpcycleError for one that cannot give experts beside the source."""
    dense = dense_model(source.config, source.tensors)
    wanted = source.tensors.keys() - check_source(source, dense).keys()
    for other in others:
        _check_alike(source, dense, sorted(wanted), other)
    return tuple(others)


def _check_alike(
    source: Checkpoint, dense: DenseModel, wanted: Sequence[str], other: Checkpoint
) -> None:
    """Raise UpcycleError for a model that is not whole, or no model of the source's kind.

    It must be of the same family, with the same tensors, compute alike but for its weights, and
    have the same tokens.
    """
    found = dense_model(other.config, other.tensors)
    if found.family.title != dense.family.title:
        raise UpcycleError(
            f"{other.path} is a {found.family.title}, and {source.path} a {dense.family.title}.",
            "Only models of one family can give experts to one mixture.",
        )
    refuse_unsafe_settings(
        other, outgrown=found.family.has_obsolete_code, parts=nested_configs(other.config)
    )
    dropped = check_source(other, found)
    _check_settings(source, dense, other, found)
    for name in sorted({*wanted} ^ (other.tensors.keys() - dropped.keys())):
        here, there = (source, other) if name in wanted else (other, source)
        raise UpcycleError(f"{here.path} has {name}, and {there.path} does not.")
    for name in wanted:
        one, two = source.tensors[name], other.tensors[name]
        if one.shape != two.shape:
            raise UpcycleError(
                f"{name} is of shape {list(two.shape)} in {other.path}, and {list(one.shape)} in "
                f"{source.path}.",
                "Only models of one shape can give experts to one mixture.",
            )
        if model_of(name)[0]:
            raise UpcycleError(f"{source.path}: no tensor of a model is called {shown(name)}.")
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
    unread = set(_UNREAD)
    if dense.values.get("rope_scaling") is None and "rope_theta" in dense.values:
        unread.add("max_position_embeddings")  # positions have no table, and are not stretched
    for key in sorted(keys - unread):
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
