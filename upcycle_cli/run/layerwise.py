"""Run a model one layer at a time, and observe the input and output of each MLP.

Each model has its own thread, which waits after every layer, so several models can run side by
side. Only one thread runs at any time.

Legend: B texts, S positions, P extra positions, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch

from upcycle_cli.run.models import Model, decoder_layers

_JOIN_SECONDS = 1.0
"""How long to wait for the thread of an abandoned run."""


class Steps:
    """Work in a thread that stops at each `pause` until the next `advance`."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._turn = threading.Barrier(2)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._error: BaseException | None = None
        self.done = False

    def advance(self) -> None:
        """Run to the next pause or to the end; raises what the work raises."""
        if self.done:
            return
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.wait()
        self._turn.wait()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._turn.abort()  # ends the work of an abandoned run at its pause
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)

    def _run(self, work: Callable[[Callable[[], None]], None]) -> None:
        try:
            work(self._pause)
        except BaseException as error:  # noqa: BLE001 - `advance` raises it again
            self._error = error
        self.done = True
        with suppress(threading.BrokenBarrierError):
            self._turn.wait()

    def _pause(self) -> None:
        self._turn.wait()
        self._turn.wait()


@dataclass
class Run:
    """A model that runs layer by layer, and the values of its last layer."""

    model: Model
    steps: Steps
    hidden: torch.Tensor = field(init=False)
    """The output of the layer."""
    mlp_input: torch.Tensor = field(init=False)
    mlp_output: torch.Tensor = field(init=False)
    extra: torch.Tensor | None = None
    """Extra inputs for the MLP of the next layer (P, H); then its outputs for them."""
    output: Any = None
    """The output of the base model, after the last step."""


class Span(NamedTuple):
    """From the input of `first` to the output of `last`; `whole` computes it for extra inputs."""

    first: Model
    last: Model
    whole: Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def started(model: Model, ids_BS: torch.Tensor, mlps: Sequence[Model | Span]) -> Iterator[Run]:
    """Start a model: `steps.advance()` runs a layer, the last one the rest; observe the `mlps`."""

    def work(pause: Callable[[], None]) -> None:
        def end_layer(_module: Model, _inputs: object, output: Any) -> None:  # noqa: ANN401
            run.hidden = first_of(output)
            pause()

        with ExitStack() as hooks, torch.no_grad():
            for layer in decoder_layers(model):
                hooks.callback(layer.register_forward_hook(end_layer).remove)
            # Padding comes last: causal attention hides it from the text.
            run.output = model.base_model(input_ids=ids_BS, use_cache=False)

    with Steps(work) as steps, ExitStack() as hooks:
        run = Run(model, steps)
        for handle in (handle for mlp in mlps for handle in _watch(run, mlp)):
            hooks.callback(handle.remove)
        yield run


def _watch(run: Run, mlp: Model | Span) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Register hooks that note the input and output of an MLP, and add the extra inputs."""

    def enter(_module: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        run.mlp_input = inputs[0]
        if run.extra is None:
            return None
        more = run.extra.to(inputs[0])
        given = zip(inputs, (more, 0 * more), strict=False)  # which have no residual
        return tuple(torch.cat([old.flatten(0, -2), new])[None] for old, new in given)

    def leave(_module: Model, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:  # noqa: ANN401
        made = first_of(output)
        if run.extra is None:
            run.mlp_output = made - inputs[1] if inputs[1:] else made  # without the residual
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
        run.mlp_output = first_of(output)

    if isinstance(mlp, Span):
        yield mlp.first.register_forward_pre_hook(begin)
        yield mlp.last.register_forward_hook(end)
    else:
        yield mlp.register_forward_pre_hook(enter)
        yield mlp.register_forward_hook(leave)


def first_of(output: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the hidden states of an output, which can have more values."""
    found: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return found
