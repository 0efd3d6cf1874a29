"""A model on its way through a text, a layer at a time, and what is seen of it there.

Legend: B texts, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from upcycle_cli.run.models import Model, decoder_layers
from upcycle_cli.run.steps import Steps

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass
class Run:
    """A model on its way through the text, and what its hooks saw in the layer that ran last."""

    model: Model
    steps: Steps
    hidden: torch.Tensor = field(init=False)
    """What the layer returned."""
    mlp_input: torch.Tensor = field(init=False)
    mlp_output: torch.Tensor = field(init=False)
    extra: torch.Tensor | None = None
    """Further inputs for the MLP; what it makes of them is then in their place."""
    output: Any = None
    """What the base model returned in the end."""


class Span(NamedTuple):
    """A part of a layer that is no module: one takes its input, another makes its output.

    `whole` computes it of further inputs (P, H), of which no hook is to hear.
    """

    first: Model
    last: Model
    whole: Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def started(model: Model, ids_BS: torch.Tensor, mlps: Sequence[Model | Span]) -> Iterator[Run]:
    """Run a model on text, to be taken from layer to layer by `steps.advance()`.

    `mlps` are the modules or parts, one a layer at most, whose input and output are wanted.
    """

    def work(pause: Callable[[], None]) -> None:
        def end_layer(_module: Model, _inputs: object, output: Any) -> None:  # noqa: ANN401
            run.hidden = _first(output)
            pause()

        with ExitStack() as hooks, torch.no_grad():
            for layer in decoder_layers(model):
                hooks.callback(layer.register_forward_hook(end_layer).remove)
            # Padding comes last, where causal attention keeps it from what counts, and positions
            # are counted from the first token.
            run.output = model.base_model(input_ids=ids_BS, use_cache=False)

    with Steps(work) as steps, ExitStack() as hooks:
        run = Run(model, steps)
        for handle in (handle for mlp in mlps for handle in _watched(run, mlp)):
            hooks.callback(handle.remove)
        yield run


def _watched(run: Run, mlp: Model | Span) -> Iterator[RemovableHandle]:
    """Have a run note what an MLP takes and makes, and compute what is wanted further."""

    def enter(_module: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        run.mlp_input = inputs[0]
        if run.extra is None:
            return None
        flat = inputs[0].flatten(0, -2)
        return (torch.cat([flat, run.extra.to(flat)])[None], *inputs[1:])

    def leave(_module: Model, _inputs: object, output: Any) -> Any:  # noqa: ANN401
        made = _first(output)
        if run.extra is None:
            run.mlp_output = made
            return None
        count = made.shape[-2] - len(run.extra)
        run.extra = made[0, count:]
        run.mlp_output = made[0, :count].reshape(run.mlp_input.shape)
        return (run.mlp_output, *output[1:]) if isinstance(output, tuple) else run.mlp_output

    def begin(_module: Model, inputs: tuple[torch.Tensor, ...]) -> None:
        run.mlp_input = inputs[0]
        if run.extra is not None:
            run.extra = mlp.whole(run.extra.to(inputs[0]))

    def end(_module: Model, _inputs: object, output: Any) -> None:  # noqa: ANN401
        run.mlp_output = _first(output)

    if isinstance(mlp, Span):
        yield mlp.first.register_forward_pre_hook(begin)
        yield mlp.last.register_forward_hook(end)
    else:
        yield mlp.register_forward_pre_hook(enter)
        yield mlp.register_forward_hook(leave)


def _first(output: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the hidden states of what a module returned; some return more."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
