"""Grown: what can be seen of an MoE that was grown without reading its weights.

Names and shapes are held to transformers' own model, every key of the config to the source's, and
`upcycle.json` to all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from upcycle_cli.checkpoint.header import TORCH_DTYPES, TensorEntry
from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME
from upcycle_cli.core.errors import shown
from upcycle_cli.old_verification.claims import (
    differences,
    file_failures,
    router_failures,
    source_failures,
)
from upcycle_cli.old_verification.companions import check_files
from upcycle_cli.old_verification.completeness import record_failures
from upcycle_cli.old_verification.grown import Grown, Side
from upcycle_cli.old_verification.headers import header_failures
from upcycle_cli.old_verification.structure import own_failures
from upcycle_cli.verification.result import CheckResult, Findings, Status

_NOT_COMPARED = {"transformers_version", "_name_or_path"}
"""Who wrote a config, and where: no setting."""


def headers_of_grown(facts: Grown) -> tuple[str, ...]:
    """Return what headers show to be wrong with the grown MoE, and is not so in its source."""
    usual = {*header_failures(facts.dense, facts.source.target)}
    found = header_failures(facts.moe, facts.grown.target)
    # Of layers that predict further tokens, transformers knows nothing.
    further = {*facts.layers} - {*facts.grown.layers}
    grown = {name for i in further for name in facts.grown.of_experts(i)}
    return tuple(
        failure for failure in found if failure not in usual and failure.split(" ")[0] not in grown
    )


def check_grown_structure(facts: Grown, by_header: Sequence[str]) -> CheckResult:
    """Check names, shapes, dtypes, files and every key of the config; `by_header` as found."""
    from upcycle_cli.run.models import class_of

    source, grown = facts.source, facts.grown
    architecture = class_of(grown.target)
    usual = {*own_failures(source.moe, source.target, source.moe.storage.names(), architecture)}
    own = own_failures(grown.moe, grown.target, facts.moe_names, architecture)
    failures = (
        *_config_failures(facts),
        *by_header,
        *(failure for failure in own if failure not in usual),
        *_dtype_failures(facts),
    )
    passed = (
        f"{len(grown.moe.tensors)} tensors have the names and shapes that transformers gives them "
        f"by config.json, which is the source's but for {grown.num_experts} experts and a top-k "
        f"of {grown.top_k}."
    )
    return Findings(failures).result("structure", passed, {"tensors": len(grown.moe.tensors)})


def _config_failures(facts: Grown) -> Iterator[str]:
    """Compare the configs key by key."""
    keys = facts.grown.target.keys
    before, after = facts.dense.config, facts.moe.config
    grows = {keys.num_experts, *keys.aliases}
    for key in sorted({*before, *after} - _NOT_COMPARED - {keys.top_k}):
        ours, theirs = (held.get(key) for held in (after, before))
        if key in grows:
            wanted: Any = facts.grown.num_experts if key in after else None
            if key in before and key not in after:
                yield f"{CONFIG_NAME}: {key} is missing"
            elif ours != wanted or type(ours) is bool:
                yield f"{CONFIG_NAME}: {key} is {shown(ours)}, and there are {wanted} experts"
        elif key in ("dtype", "torch_dtype"):
            stored = {TORCH_DTYPES[entry.dtype] for entry in _plain(facts)}
            if ours != theirs and stored != {ours}:
                words = f"{key} is {shown(ours)}, which is not the dtype of all tensors"
                yield f"{CONFIG_NAME}: {words}"
        elif key == "tie_word_embeddings" and ours is False:
            continue  # --untie-embeddings: whether the head is right is for the weights check
        elif (ours, type(ours)) != (theirs, type(theirs)) or (key in after) != (key in before):
            found, wanted = (shown(held.get(key, "absent")) for held in (after, before))
            yield f"{CONFIG_NAME}: {key} is {found}, in the source's {wanted}"


def _plain(facts: Grown) -> list[TensorEntry]:
    """Return the tensors but the biases on the choice, which keep their own dtype."""
    wide = {name for layer in facts.layers for name in facts.grown.of_choice(layer)[1:]}
    return [entry for name, entry in facts.moe.tensors.items() if name not in wide]


def _dtype_failures(facts: Grown) -> Iterator[str]:
    """Name the tensors whose dtype is neither the source's nor that of all."""
    if len({entry.dtype for entry in _plain(facts)}) == 1:
        return
    for name, became in facts.became.items():
        if became in facts.moe.tensors and name in facts.dense.tensors:
            found, wanted = facts.moe.tensors[became].dtype, facts.dense.tensors[name].dtype
            if found != wanted:
                yield f"{became} is {found}: neither the source's {wanted} nor the dtype of all"


def check_grown_files(facts: Grown) -> CheckResult:
    """Compare the files beside the weights with the source's."""
    found = check_files(facts)

    def ours(text: str) -> str:
        return text.replace("dense model", "source")

    return replace(
        found, detail=ours(found.detail), failures=tuple(ours(text) for text in found.failures)
    )


def check_grown_claims(facts: Grown) -> CheckResult:
    """Check `upcycle.json` against both configs, the tensors and the files."""
    data, grown, source = facts.record.data, facts.grown, facts.source
    if not facts.moe.storage.has(RECORD_NAME):
        detail = f"Not run: there is no {RECORD_NAME}, so nothing is claimed."
        return CheckResult(name="claims", status=Status.SKIPPED, detail=detail)
    held = data.get("growth")
    growth, says = held if isinstance(held, dict) else {}, "and the configs make it"
    parameters = data.get("parameters")
    counts = parameters if isinstance(parameters, dict) else {}
    layout = next(str(name) for name, row in grown.target.layouts.items() if row == grown.layout)
    failures = (
        *facts.record.problems,
        *record_failures(facts.moe, data),
        *differences(
            ("format", data.get("format"), 1, "and only this is known:"),
            ("source_type", data.get("source_type"), source.moe.config["model_type"], says),
            ("growth.expand", growth.get("expand"), facts.copies, says),
            ("growth.top_k", growth.get("top_k"), grown.top_k, says),
            ("growth.routing", growth.get("routing"), grown.routing, says),
            (
                "growth.source_num_experts",
                growth.get("source_num_experts"),
                source.num_experts,
                says,
            ),
            ("growth.source_top_k", growth.get("source_top_k"), source.top_k, says),
            ("promise", data.get("promise"), "none" if facts.objection else "exact", says),
            ("moe_layers", data.get("moe_layers"), [*facts.grown.layers], says),
            ("expert_layout", data.get("expert_layout"), layout, "the tensors are"),
            ("parameters.total", counts.get("total"), grown.moe.num_parameters, says),
            ("parameters.active", counts.get("active"), _active(grown), says),
            ("parameters.source", counts.get("source"), source.moe.num_parameters, says),
        ),
        *_option_failures(facts),
        *router_failures(facts),
        *source_failures(facts),
        *file_failures(facts),
    )
    passed = (
        f"{RECORD_NAME} agrees with config.json, the tensors and the source: {facts.copies} copies "
        f"of each expert, {grown.routing}, layout and router digests."
    )
    return Findings(failures).result("claims", passed, {"routers": len(facts.layers)})


def _active(side: Side) -> int:
    names = {name for layer in side.routed for name in side.of_experts(layer)}
    held = (side.moe.tensors[name].num_elements for name in names & side.moe.tensors.keys())
    return side.moe.num_parameters - sum(held) // side.num_experts * (side.num_experts - side.top_k)


def _option_failures(facts: Grown) -> Iterator[str]:
    data = facts.record.data
    dtype, stored = data.get("dtype"), {TORCH_DTYPES[entry.dtype] for entry in _plain(facts)}
    if dtype is not None and stored != {dtype}:
        yield f"{RECORD_NAME}: dtype is {shown(dtype)}, which is not the dtype of all tensors"
    tied, tied_now = (
        bool(moe.config.get("tie_word_embeddings", False)) for moe in (facts.dense, facts.moe)
    )
    if tied and data.get("untie_embeddings") is tied_now:
        yield f"{RECORD_NAME}: untie_embeddings is {tied_now}, and so is tie_word_embeddings"
