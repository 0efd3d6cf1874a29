"""Training what was converted: virtual groups that stay whole.

The G experts of a virtual group hold the parts of one dense MLP, and are chosen together because
their router rows are equal. In training the rows get gradients of their own, and move apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.families import is_target, target_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class TiedGroups:
    """Groups whose router rows are trained as one, for as long as `remove` is not called."""

    granularity: int
    """G, the rows of a group; 1 where there are no groups, and nothing is tied."""
    routers: tuple[str, ...]
    """The names of the parameters, (E·G, H) each."""
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Let each row go its own way from the next backward pass on."""
        for handle in self.handles:
            handle.remove()


def tie_virtual_groups(model: Module) -> TiedGroups:
    """Average the gradients of router rows inside each virtual group, so that groups stay whole.

    Rows that are equal and get equal gradients stay equal bit for bit under any optimizer that
    treats the entries of a parameter alike. G is read off the rows, of which G in a row are equal:
    call it before the first step, or on what was trained with it. `model` is a causal LM of
    transformers, of any type that upcycle makes, also inside peft's.

    Raises UpcycleError for another model, for one whose routers are frozen, and where a router
    is not held in one piece (DeepSpeed ZeRO-3, FSDP with flat parameters: call it before they
    divide the model) or its rows make no groups of one size.
    """
    routers = dict(_routers(model))
    sizes = {name: _group_size(name, weight) for name, weight in routers.items()}
    if len({*sizes.values()}) > 1:
        found = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise UpcycleError(f"the equal rows of routers make groups of several sizes: {found}.")
    size = next(iter(sizes.values()))
    if size == 1:
        return TiedGroups(1, (), ())
    mean = partial(_mean_of_groups, size=size)
    handles = tuple(
        weight.register_hook(mean)  # type: ignore[no-untyped-call]
        for weight in routers.values()
    )
    return TiedGroups(size, tuple(routers), handles)


def _routers(model: Module) -> Iterator[tuple[str, Parameter]]:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    if not is_target(values):
        raise UpcycleError(
            f"{type(model).__name__} is no mixture of experts that upcycle makes.",
            "Pass a model that transformers loaded from its output.",
        )
    layouts = target_of(values, [name for name, _ in model.named_parameters()]).layouts.values()
    names = "|".join(re.escape(layout.router) for layout in layouts)
    router = re.compile(rf"(?:.*\.)?layers\.\d+\.(?:{names})")
    found = [item for item in model.named_parameters() if router.fullmatch(item[0])]
    trained = [item for item in found if item[1].requires_grad]
    if not trained:
        raise UpcycleError(
            "all its routers are frozen." if found else "it has no routers.",
            "Tie virtual groups where routers are trained.",
        )
    yield from trained


def _group_size(name: str, weight: Parameter) -> int:
    """Return how many rows in a row are equal, everywhere in a router (N, H)."""
    if weight.dim() != 2 or not weight.numel():
        raise UpcycleError(
            f"{name} is not held in one piece here: its shape is {tuple(weight.shape)}.",
            "Call tie_virtual_groups before the model is divided among processes.",
        )
    rows = weight.detach()
    starts = [0] + [i for i in range(1, len(rows)) if not bool((rows[i] == rows[i - 1]).all())]
    sizes = {stop - start for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)}
    if len(sizes) > 1:
        raise UpcycleError(
            f"some virtual groups of {name} are split: {len(starts)} of its rows differ.",
            "Only groups that were tied from the first step on stay whole.",
        )
    return sizes.pop()


def _mean_of_groups(gradient: Tensor, *, size: int) -> Tensor:
    groups = gradient.reshape(-1, size, gradient.shape[-1])
    return groups.mean(1, keepdim=True).expand_as(groups).reshape(gradient.shape)
