"""What the expert weights of an MoE say by themselves: copies, groups, and measured factors.

Tensors are read one at a time. Legend: N experts, H hidden, I expert intermediate size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint import TORCH_DTYPES, Checkpoint, Reader, open_checkpoint, raw_bytes
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families import dense_family
from upcycle_cli.families.target import ExpertLayout, Target
from upcycle_cli.inspection import WeightFacts, checked_count

if TYPE_CHECKING:
    import torch

_MAX_DIFFERING = 8


def examine(
    moe: Checkpoint, target: Target, layout: ExpertLayout, dense_path: Path | None
) -> WeightFacts:
    """Read an MoE's experts and routers; with a dense model, measure the scale factors too.

    Raises UpcycleError when tensors are missing or the dense model has other sizes.
    """
    view = _Experts(moe, target, layout)
    with moe.reader() as reader:
        sizes = {view.group_size(reader, layer) for layer in range(view.num_layers)}
        granularity = sizes.pop() if len(sizes) == 1 else 1
        most, differing = 0, []
        for layer in range(view.num_layers):
            digests = [view.digest(reader, layer, expert) for expert in range(view.num_experts)]
            most = max(most, len(set(digests)))
            differing += [
                view.label(layer, expert)
                for expert, digest in enumerate(digests)
                if digest != digests[expert % granularity]
            ]
        factors = None
        if dense_path is not None:
            factors = _measure(view, reader, open_checkpoint(dense_path))
    shown = differing[:_MAX_DIFFERING]
    if len(differing) > len(shown):
        shown.append(f"and {len(differing) - len(shown)} more")
    return WeightFacts(
        distinct_experts=most,
        granularity=granularity,
        whole_groups=not differing,
        differing=tuple(shown),
        factors=factors,
    )


class _Experts:
    """One expert's matrices, whatever the layout on disk."""

    def __init__(self, moe: Checkpoint, target: Target, layout: ExpertLayout) -> None:
        self._moe, self._target, self._layout = moe, target, layout
        self.num_experts: int = moe.config[target.keys.num_experts]
        self.num_layers = checked_count(moe, "num_hidden_layers")

    def _read(self, reader: Reader, name: str) -> torch.Tensor:
        return _read(self._moe, reader, name)

    def _read_all(self, reader: Reader, name: str) -> torch.Tensor:
        """Return a tensor whose first dimension counts the experts."""
        tensor = self._read(reader, name)
        if tensor.shape[:1] != (self.num_experts,):
            raise UpcycleError(
                f"{self._moe.path}: {name} has shape {list(tensor.shape)}, but config.json "
                f"implies {self.num_experts} experts."
            )
        return tensor

    def group_size(self, reader: Reader, layer: int) -> int:
        """Return how many neighbouring experts share a router row; 1 when that is uneven."""
        names = self._target.names
        fused = self._layout is ExpertLayout.FUSED
        template = names.fused_router if fused else names.router
        router_NH = self._read_all(reader, template.format(layer=layer))
        rows = [bytes(raw_bytes(row)) for row in router_NH]
        runs = {len(list(run)) for _, run in groupby(rows)}
        return runs.pop() if len(runs) == 1 else 1

    def matrices(self, reader: Reader, layer: int, expert: int) -> Iterator[torch.Tensor]:
        """Yield gate (I, H), up (I, H) and down (H, I)."""
        names = self._target.names
        if self._layout is ExpertLayout.FUSED:
            gate_up = self._read_all(reader, names.fused_gate_up.format(layer=layer))[expert]
            yield from gate_up.chunk(2)
            yield self._read_all(reader, names.fused_down.format(layer=layer))[expert]
            return
        for template in (names.gate, names.up, names.down):
            yield self._read(reader, template.format(layer=layer, expert=expert))

    def digest(self, reader: Reader, layer: int, expert: int) -> bytes:
        """Identify an expert by the bytes of its matrices."""
        digest = hashlib.sha256()
        for matrix in self.matrices(reader, layer, expert):
            digest.update(raw_bytes(matrix))
        return digest.digest()

    def label(self, layer: int, expert: int) -> str:
        """Name an expert for a person."""
        return f"model.layers.{layer}, expert {expert}"


def _read(checkpoint: Checkpoint, reader: Reader, name: str) -> torch.Tensor:
    if name not in checkpoint.tensors:
        raise UpcycleError(f"{checkpoint.path} lacks {name}, which its config.json implies.")
    dtype = checkpoint.tensors[name].dtype
    if dtype not in TORCH_DTYPES:
        raise UpcycleError(f"{checkpoint.path}: {name} is stored as {dtype}, which is not read.")
    return reader.tensor(name)


def _measure(view: _Experts, reader: Reader, dense: Checkpoint) -> dict[str, float]:
    """Return the least-squares ratio of the first layer's expert 0 to its dense shard."""
    dense_family(dense.config)  # raises when it is not a dense model
    factors = {}
    with dense.reader() as dense_reader:
        experts = view.matrices(reader, 0, 0)
        for matrix, moe_tensor in zip(("gate", "up", "down"), experts, strict=True):
            whole = _read(dense, dense_reader, f"model.layers.0.mlp.{matrix}_proj.weight")
            rows, columns = moe_tensor.shape
            if rows > whole.shape[0] or columns > whole.shape[1]:
                raise UpcycleError(f"{dense.path} is smaller than one expert: not its source.")
            part = whole[:rows, :columns].double()
            factors[matrix] = float((moe_tensor.double() * part).sum() / (part * part).sum())
    return factors
