"""Weights of a grown MoE: is each expert there k times, with its router row, bit for bit?

Experts are told by their bytes and those of their rows together, in whatever order they lie; every
other tensor is the source's. Where all was rounded to another dtype, the source's are rounded
first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Reader, raw_bytes
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.old_verification.grown import Grown, Side
from upcycle_cli.verification.result import CheckResult, Findings

if TYPE_CHECKING:
    import torch

_EMBEDDING = "model.embed_tokens.weight"
Pieces = Mapping[str, bytes]
"""Digests of an expert's parts, and of its entries in what chooses, by their names."""


def check_grown_weights(facts: Grown, watch: Watch) -> CheckResult:
    """Compare every tensor with the source's, bit for bit."""
    findings = Findings()
    held, done = facts.moe.tensors, 0
    with facts.dense.reader() as source, facts.moe.reader() as moe:
        for name in sorted(facts.source.copied | facts.grown.copied):
            failure = _copied_failure(facts, source, moe, name)
            if failure is not None:
                findings.add(failure)
            done += held[name].nbytes if name in held else 0
            watch.checked(done, facts.moe.nbytes, "bytes")
        for layer in sorted({*facts.source.routed, *facts.grown.routed}):
            findings.add(*_layer_failures(facts, source, moe, layer))
            names = {*facts.grown.of_choice(layer), *facts.grown.of_experts(layer)}
            done += sum(held[name].nbytes for name in names & held.keys())
            watch.checked(done, facts.moe.nbytes, "bytes")
    before, k = facts.source.num_experts, facts.copies
    passed = (
        f"In {len(facts.layers)} layers each of the source's {before} experts is there {k} times, "
        "with its router row, bit for bit; so is every other tensor, once."
    )
    metrics = {"experts": facts.grown.num_experts, "copies": k}
    return findings.result("weights", passed, metrics)


def _copied_failure(facts: Grown, source: Reader, moe: Reader, name: str) -> str | None:
    """Say what is wrong with a tensor that has nothing to do with experts, if anything."""
    theirs, ours = facts.dense.tensors, facts.moe.tensors
    if name not in ours:
        return f"{name} of the source is missing"
    untied = name == facts.grown.target.head and name not in theirs
    origin = _EMBEDDING if untied else name
    if origin not in theirs:
        return f"{name} is not in the source"
    if theirs[origin].shape != ours[name].shape:
        return f"{name} has shape {list(ours[name].shape)}, not the source's"
    held = moe.tensor(name)
    if not _same_bits(source.tensor(origin).to(held.dtype), held):
        return f"{name} is not the source's {_EMBEDDING if untied else 'tensor'}"
    return None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import numpy as np

    first, second = (np.frombuffer(raw_bytes(held), np.uint8) for held in (one, other))
    return np.array_equal(first, second)


def _layer_failures(facts: Grown, source: Reader, moe: Reader, layer: int) -> Iterator[str]:
    """Name the experts of a layer that are no copies, and those that are not there k times."""
    before, after, k = facts.source, facts.grown, facts.copies
    if layer not in before.routed:
        yield f"layer {layer} has no experts in the source"
        return
    failures = [*after.shape_failures(layer)]
    yield from failures
    if failures:
        return
    wanted = [_pieces(before, source, layer, e, like=after) for e in range(before.num_experts)]
    found = [_pieces(after, moe, layer, e, like=after) for e in range(after.num_experts)]
    known, held = (Counter(tuple(each.values()) for each in side) for side in (wanted, found))
    for e, pieces in enumerate(found):
        if tuple(pieces.values()) not in known:
            yield _odd(after, layer, e, pieces, wanted, e // k)
    for e, pieces in enumerate(wanted):
        key = tuple(pieces.values())
        if held[key] != k * known[key]:
            yield (
                f"layer {layer}: expert {e} of the source is there {held[key]} times with its "
                f"router row, and {k * known[key]} are wanted"
            )


def _odd(
    after: Side, layer: int, expert: int, pieces: Pieces, wanted: Sequence[Pieces], usual: int
) -> str:
    """Say how an expert that is no copy differs from that of the source which is most like it.

    Of several, that is the `usual` one, which lies where it would come to lie.
    """

    def likeness(e: int) -> tuple[int, bool]:
        return sum(digest == wanted[e][label] for label, digest in pieces.items()), e == usual

    most = max(range(len(wanted)), key=likeness)
    labels = [
        after.locate(label, layer, expert).label if label in after.parts else f"{label}[{expert}]"
        for label, digest in pieces.items()
        if digest != wanted[most][label]
    ]
    return f"{', '.join(labels)}: no copy of what expert {most} of the source has"


def _pieces(side: Side, reader: Reader, layer: int, expert: int, *, like: Side) -> Pieces:
    """Return an expert's digests, rounded first to the dtypes that it has in `like`."""
    import torch

    found: dict[str, bytes] = {}

    def note(label: str, tensor: torch.Tensor, name: str) -> None:
        dtype = getattr(torch, TORCH_DTYPES[like.moe.tensors[name].dtype])
        found[label] = hashlib.sha256(raw_bytes(tensor.to(dtype))).digest()

    for name, theirs in zip(side.of_choice(layer), like.of_choice(layer), strict=True):
        note(theirs, reader.tensor(name)[expert], theirs)
    for part in sorted(side.parts):
        spot = side.locate(part, layer, expert)
        other = like.locate(part, layer, 0)
        note(part, spot.select(reader.tensor(spot.tensor), other.split_dim), other.tensor)
    return found
