"""Keep virtual groups whole while a converted model is trained.

The G experts of a virtual group hold the shards of one dense MLP. Their router rows are equal, so
the router selects them together. In training each row gets its own gradient and the rows drift
apart, unless `tie_virtual_groups` gives the rows of a group one gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.lookup import is_target, target_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class TiedGroups:
    """What `tie_virtual_groups` tied; `remove` unties it."""

    granularity: int
    """G, the router rows per group; 1 if the model has no groups, and then nothing is tied."""
    routers: tuple[str, ...]
    """The names of the tied router parameters, each of shape (E·G, H)."""
    handles: tuple[RemovableHandle, ...] = field(repr=False)

    def remove(self) -> None:
        """Untie the rows, from the next backward pass on."""
        for handle in self.handles:
            handle.remove()


def tie_virtual_groups(model: Module) -> TiedGroups:
    """Keep each virtual group whole in training: average the gradients of its router rows.

    Call it once, after loading the model and before the first step:

        model = AutoModelForCausalLM.from_pretrained("moe", dtype=torch.float32)
        tie_virtual_groups(model)

    `model` is a converted model that transformers loaded, also inside a peft model. Equal rows with
    equal gradients stay equal bit for bit, under any optimizer that treats all entries of a
    parameter alike. G is the number of equal rows in the routers.

    Raises UpcycleError if the model is not one that upcycle creates, if its routers are frozen or
    already split among processes (DeepSpeed ZeRO-3, FSDP: call this before they split the model),
    or if its rows do not form groups of one size.
    """
    routers = dict(_routers(model))
    sizes = {name: _group_size(name, weight) for name, weight in routers.items()}
    if not routers:
        words = "all routers of the model are frozen, or it has none."
        raise UpcycleError(words, "Call tie_virtual_groups only if you train the routers.")
    if len({*sizes.values()}) > 1:
        found = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise UpcycleError(f"the routers have groups of different sizes: {found}.")
    size = next(iter(sizes.values()))
    if size == 1:
        return TiedGroups(1, (), ())
    mean = partial(_mean_of_groups, size=size)
    handles = [weight.register_hook(mean) for weight in routers.values()]  # type: ignore[no-untyped-call]
    return TiedGroups(size, tuple(routers), tuple(handles))


def _routers(model: Module) -> Iterator[tuple[str, Parameter]]:
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    if not is_target(values):
        raise UpcycleError(
            f"{type(model).__name__} is not a mixture of experts that upcycle creates.",
            "Load the output of a conversion with transformers, and pass that model.",
        )
    layouts = target_of(values, [name for name, _ in model.named_parameters()]).layouts.values()
    names = "|".join(re.escape(layout.router) for layout in layouts)
    router = re.compile(rf"(?:.*\.)?layers\.\d+\.(?:{names})")
    for name, weight in model.named_parameters():
        if router.fullmatch(name) and weight.requires_grad:
            yield name, weight


def _group_size(name: str, weight: Parameter) -> int:
    """Return how many consecutive rows of a router (N, H) are equal."""
    if weight.dim() != 2 or not weight.numel():
        words = f"{name} is split among processes: its shape here is {tuple(weight.shape)}."
        raise UpcycleError(words, "Call tie_virtual_groups before the model is split.")
    rows: Any = weight.detach()
    _, sizes = rows.unique_consecutive(return_counts=True, dim=0)
    if len({*sizes.tolist()}) > 1:
        raise UpcycleError(
            f"some virtual groups of {name} are split: {len(sizes)} of its rows differ.",
            "Tie the groups before the first training step, or convert again.",
        )
    return int(sizes[0])


def _mean_of_groups(gradient: Tensor, *, size: int) -> Tensor:
    groups = gradient.reshape(-1, size, gradient.shape[-1])
    return groups.mean(1, keepdim=True).expand_as(groups).reshape(gradient.shape)
