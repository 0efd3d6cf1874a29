"""Tensors that a layer with experts has beside them, where its architecture has such.

They are of one value, or a tensor of the dense layer times it: which is data of the target's row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from upcycle_cli.plan.expressions import Expr, Full, Scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from upcycle_cli.models.choose import Family


def added_tensors(
    family: Family, layer: int, *, num_experts: int, dtype: str, source: Callable[[str], Expr]
) -> Iterator[tuple[str, Expr]]:
    """Yield what is added to a layer, by the names in it.

    `source` gives a dense tensor in the output dtype; what has none is in `dtype`.
    """
    dense = family.dense
    for each in family.target.extra_tensors:
        value = each.value(dense.values)
        if each.of is None:
            size = num_experts if each.per_expert else dense.hidden_size
            yield each.name, Full(dtype, (size,), value)
        else:
            stored = source(dense.prefix(layer) + each.of)
            yield each.name, stored if value == 1.0 else Scale(stored, value)
