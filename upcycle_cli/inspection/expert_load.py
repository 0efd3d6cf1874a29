"""Counts the tokens that choose each expert; the MoE runs layer by layer from disk.

Legend: B rows of S positions each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.texts import CalibrationText
from upcycle_cli.run.layerwise import started
from upcycle_cli.run.lazy_models import lazy_model
from upcycle_cli.run.models import TransformersError, load_config, transformers_errors
from upcycle_cli.run.texts import as_rows, shares, tokenized
from upcycle_cli.verification.routing import observed_routers

if TYPE_CHECKING:
    import torch

    from upcycle_cli.core.callbacks import Progress
    from upcycle_cli.models.moe_experts import Experts

TOKENS = 2048  # at most


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """How many tokens choose each expert of a layer."""

    layer: int
    load: tuple[int, ...]
    load_cv: float
    """The standard deviation of the loads divided by their mean."""
    idle: tuple[int, ...]
    """The experts that no token chooses."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ExpertLoad(Compact):
    """The loads of all MoE layers."""

    text: str
    """`builtin`, or the text file's name without its directory."""
    tokens: int
    layers: tuple[LayerLoad, ...]


def measure_expert_load(
    experts: Experts, text: CalibrationText, dense: Checkpoint | None, watch: Progress
) -> ExpertLoad:
    """Run an MoE on the first TOKENS tokens of a text, with its own tokenizer or that of `dense`.

    Raises UpcycleError without a usable tokenizer, and for a model that transformers cannot run.
    """
    watch.begins("checking load")
    moe = experts.moe
    try:
        config = load_config(moe.path).get_text_config()
        texts, _, reason = tokenized(moe, text.texts, config.vocab_size)
        reason = reason.replace("the dense model", "the model")
        if not texts and dense is not None:
            texts, _, reason = tokenized(dense, text.texts, config.vocab_size)
        if not texts:
            hint = "Put the tokenizer beside the model, or name its dense model with `dense`."
            raise UpcycleError(f"measuring the experts' load needs a tokenizer: {reason}.", hint)
        tokens = [token for share in shares(texts, TOKENS) for token in share]
        with moe.reader() as reader:
            layers = tuple(_run(experts, reader, as_rows(tokens, config), len(tokens), watch))
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {moe.path}: {error}") from error
    return ExpertLoad(text=text.name, tokens=len(tokens), layers=layers)


def _run(
    experts: Experts, reader: Reader, ids_BS: torch.Tensor, count: int, watch: Progress
) -> Iterator[LayerLoad]:
    model = lazy_model(experts.moe, reader)
    with (
        transformers_errors(),
        observed_routers(model, count, group_size=1) as observed,
        started(model.net, ids_BS, []) as run,
    ):
        for layer in range(experts.num_layers):
            run.steps.advance()
            watch.checked(layer + 1, experts.num_layers, "layers")
    for layer, measures in observed.measures.items():
        load, load_cv = tuple(measures["load"]), measures["load_cv"]
        idle = tuple(expert for expert, tokens in enumerate(load) if not tokens)
        yield LayerLoad(layer=layer, load=load, load_cv=load_cv, idle=idle)
