"""Which experts the tokens of a text choose: the MoE is run layer by layer, its weights on disk.

Legend: S positions, N experts, T top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.texts import CalibrationText
from upcycle_cli.run.layerwise import started
from upcycle_cli.run.lazy_models import lazy_model
from upcycle_cli.run.models import TransformersError, load_config, transformers_errors
from upcycle_cli.run.texts import as_rows, shares, tokenized

if TYPE_CHECKING:
    import torch

    from upcycle_cli.core.callbacks import Progress
    from upcycle_cli.models.moe_experts import Experts
    from upcycle_cli.run.models import Model

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

    @property
    def idle_experts(self) -> int:
        """The number of experts that no token chooses."""
        return len(self.idle)


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """The loads of all MoE layers."""

    text: str
    """`builtin`, or the text file's name without its directory."""
    tokens: int
    layers: tuple[LayerLoad, ...]


def measure_expert_load(
    experts: Experts, text: CalibrationText, dense: Checkpoint | None, watch: Progress
) -> ExpertLoad:
    """Run an MoE on the first TOKENS tokens of a text.

    If the MoE has no usable tokenizer, the one of `dense` is used. Raises UpcycleError when neither
    has one, and for a model that transformers cannot run.
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
            raise UpcycleError(
                f"measuring the experts' load needs a tokenizer: {reason}.",
                "Put the tokenizer beside the model, or give its --dense model.",
            )
        tokens = [token for share in shares(texts, TOKENS) for token in share]
        with moe.reader() as reader:
            layers = tuple(_run(experts, reader, as_rows(tokens, config), len(tokens), watch))
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {moe.path}: {error}") from error
    return ExpertLoad(text=text.name, tokens=len(tokens), layers=layers)


def _run(
    experts: Experts, reader: Reader, ids_BS: torch.Tensor, count: int, watch: Progress
) -> Iterator[LayerLoad]:
    model, layers = lazy_model(experts.moe, reader), experts.layers
    chosen: list[torch.Tensor] = []

    def note(_router: Model, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        chosen.append(output[2][:count])

    with ExitStack() as stack, transformers_errors():
        for layer in layers:
            stack.callback(model.router(layer).register_forward_hook(note).remove)
        run = stack.enter_context(started(model.net, ids_BS, []))
        for layer in range(experts.num_layers):
            run.steps.advance()
            if layer in layers:
                yield _load(layer, chosen.pop(), experts.num_experts)
            watch.checked(layer + 1, experts.num_layers, "layers")


def _load(layer: int, experts_ST: torch.Tensor, num_experts: int) -> LayerLoad:
    load_N = experts_ST.flatten().bincount(minlength=num_experts)
    mean = float(load_N.double().mean())
    return LayerLoad(
        layer=layer,
        load=tuple(load_N.tolist()),
        load_cv=float(load_N.double().std(correction=0)) / mean,
        idle=tuple((load_N == 0).nonzero().flatten().tolist()),
    )
