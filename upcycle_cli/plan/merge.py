"""Several dense models in one MoE, and the request that names them.

Model 0, the source of the conversion, gives the config and the tokenizer. The weights outside the
experts come from it, or are the mean of all models. The models may differ only in their weights.
In expressions the source's tensors keep their names; `tensor_of` names the other models' tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from upcycle_cli.checkpoint.card_metadata import CardMetadata, read_card_metadata
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_COMPANION_BYTES, read_small
from upcycle_cli.core.text import listed, printable
from upcycle_cli.hub.remote_checkpoint import open_source
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.lookup import dense_model
from upcycle_cli.models.wrappers import nested_configs
from upcycle_cli.plan.validate import check_source
from upcycle_cli.recipe.options import member
from upcycle_cli.recipe.recipe import Recipe

_IGNORED_KEYS = {
    *("use_cache", "initializer_range", "pretraining_tp", "attention_dropout", "resid_pdrop"),
    *("embd_pdrop", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
}
"""Keys that no forward pass reads; rope_parameters repeats rope_theta and rope_scaling."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Files that define the tokens; the first is enough."""


class NonExpertWeights(StrEnum):
    """Where attention, norms and embeddings come from: the source, or the mean of all models."""

    FIRST = "first"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """The other models, and the models that take turns with the virtual groups; 0 is the source."""

    others: tuple[Checkpoint, ...]
    cycle: tuple[int, ...]
    rest: NonExpertWeights = NonExpertWeights.FIRST

    def of_groups(self, expansion: int) -> tuple[int, ...]:
        """Return the model of each virtual group; UpcycleError if the cycle does not fit."""
        count = len(self.cycle)
        if expansion % count:
            raise UpcycleError(
                f"expansion {expansion} is not a multiple of the {count} models that give experts.",
                f"Use an expansion of {count} or {2 * count}.",
            )
        return self.cycle * (expansion // count)

    def check(self, recipe: Recipe) -> None:
        """Raise UpcycleError for a recipe that several models cannot follow."""
        self.of_groups(recipe.expansion)
        if recipe.shared_experts or recipe.perturbed:
            words = "`shared_experts`, `noise` and `reinit` need a single dense model."
            raise UpcycleError(words, "Leave them out, or leave out `experts_from`.")


def merged_card_metadata(sources: Sequence[Checkpoint]) -> CardMetadata:
    """Return the metadata for the new card; a licence only where all sources have the same one."""
    sources = [part for source in sources for part in source.base_and_adapter]
    first, *others = (read_card_metadata(source.path) for source in sources)
    license_of = first.values.get("license")
    notes = tuple(
        f"{model.name} has the licence {found or '(unknown)'}, but {sources[0].name} has "
        f"{license_of or '(unknown)'}. The new card names none: check what each requires."
        for model, other in zip(sources[1:], others, strict=True)
        if (found := other.values.get("license")) != license_of
    )
    if not notes:
        return first
    kept = {key: value for key, value in first.values.items() if not key.startswith("license")}
    return CardMetadata(kept, first.notes + notes)


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """Other models to make experts from: directories, REPO@REVISION or BASE+ADAPTER.

    With `source_too` the first experts come from the source. Without it, all experts come from the
    named models, which may include the source. All other weights are the source's, or with
    `rest="mean"` the average of all models.
    """

    experts_from: Path | str | Sequence[Path | str]
    rest: NonExpertWeights | str = NonExpertWeights.FIRST
    source_too: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rest", member(NonExpertWeights, self.rest, "rest"))

    def open(self, source: Checkpoint) -> Merge | None:
        """Open the models; None if all are the source.

        Raises UpcycleError for a model with another family, other settings, tensors or tokens.
        """
        models, cycle = [source], [0] * self.source_too
        for place in listed(self.experts_from):
            model = open_source(place)
            paths = [[p.path.resolve() for p in m.base_and_adapter] for m in (*models, model)]
            cycle.append(paths.index(paths[-1]))
            models += [model] * (cycle[-1] == len(models))
        if len(models) == 1:
            return None
        dense = dense_model(source.config, source.tensors)
        for other in models[1:]:
            _check_compatible(source, dense, other)
        return Merge(others=(*models[1:],), cycle=tuple(cycle), rest=NonExpertWeights(self.rest))


def _check_compatible(source: Checkpoint, dense: DenseModel, other: Checkpoint) -> None:
    found = dense_model(other.config, other.tensors)
    if found.family.title != dense.family.title:
        words = f"{other.path} is a {found.family.title}, but {source.path} a {dense.family.title}."
        raise UpcycleError(words, "All models must be of one family.")
    refuse_unsafe_settings(
        other, ignore_code=found.family.has_obsolete_code, parts=nested_configs(other.config)
    )
    shared = [n for n in _TOKENIZERS if source.storage.has(n) and other.storage.has(n)]
    for what, here, there in (
        ("", _settings(dense), _settings(found)),
        ("the shape of ", _shapes(source, dense), _shapes(other, found)),
        ("the tokenizers differ: ", _tokens(source, shared), _tokens(other, shared)),
    ):
        for key in sorted(here.keys() | there.keys()):
            one, two = here.get(key, "missing"), there.get(key, "missing")
            if one != two:
                raise UpcycleError(
                    f"{what}{printable(key)} is {shown(two)} in {other.path}, but {shown(one)} in "
                    f"{source.path}.",
                    "The models may differ in their weights only, since they share one config.",
                )


def _settings(dense: DenseModel) -> dict[str, object]:
    """Return the settings that the forward pass reads."""
    keys = {*defaults_of(dense.model_type), "rope_theta", "rope_scaling", *dense.family.keys}
    if dense.values.get("rope_scaling") is None and "rope_theta" in dense.values:
        keys -= {"max_position_embeddings"}  # no table of positions, no stretching
    kinds = {"the kind of each layer": [*dense.kinds], "the window of each": [*dense.windows]}
    return {key: dense.values.get(key) for key in keys - _IGNORED_KEYS} | kinds


def _shapes(model: Checkpoint, dense: DenseModel) -> dict[str, object]:
    dropped = check_source(model, dense)
    return {name: [*entry.shape] for name, entry in model.tensors.items() if name not in dropped}


def _tokens(model: Checkpoint, files: Sequence[str]) -> dict[str, object]:
    """Return the ids of all tokens, and how they are merged; digests of files of other formats."""
    held = {name: read_small(model.storage.local(name), MOST_COMPANION_BYTES) for name in files}
    if _TOKENIZERS[0] not in held:
        return {name: hashlib.sha256(data).hexdigest() for name, data in held.items()}
    try:
        content = json.loads(held[_TOKENIZERS[0]])
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of a piece and its score
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        return {**vocabulary, **added, "merges of tokens": content["model"].get("merges")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UpcycleError(f"{model.path / _TOKENIZERS[0]} is not a valid tokenizer.") from error
