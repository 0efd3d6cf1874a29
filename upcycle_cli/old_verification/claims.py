"""Claims: does `upcycle.json` tell the truth?

What no comparison with the dense model can see is checked here: with gates that sum to 1, another
top-k or another random router computes the same function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import is_digest, listed_files, sha256_of
from upcycle_cli.old_verification.completeness import record_failures
from upcycle_cli.old_verification.dtypes import dtype_failures
from upcycle_cli.old_verification.factors import factor_of, recover_factors
from upcycle_cli.old_verification.facts import Facts, Pair
from upcycle_cli.old_verification.merged import by_model
from upcycle_cli.old_verification.neurons import Neurons
from upcycle_cli.old_verification.perturbed import claimed_moments, perturbed_parts
from upcycle_cli.old_verification.recipes import (
    CLUSTERED,
    FILE,
    FITTED,
    NORMAL,
    SHUFFLED,
    SLICED,
    Promise,
    RecipeClaim,
    is_positive,
)
from upcycle_cli.old_verification.sizes import read_tensors
from upcycle_cli.verification.result import CheckResult, Findings, Status

NAME = "claims"
_FIT = 0.05
"""Relative: how well rows are fitted, their own rounding included."""
_STD_RATIO = 2.0  # a small router's sample says no more about what it was drawn with


def check_claims(facts: Facts) -> CheckResult:
    """Check `upcycle.json` against config.json, the tensors, the files and the dense model."""
    if not facts.moe.storage.has(RECORD_NAME):
        detail = f"Not run: there is no {RECORD_NAME}, so nothing is claimed."
        return CheckResult(name=NAME, status=Status.SKIPPED, detail=detail)
    failures = (
        *facts.record.problems,
        *record_failures(facts.moe, facts.record.data),
        *_recipe_failures(facts),
        *_factor_failures(facts),
        *router_failures(facts),
        *_logit_std_failures(facts),
        *_calibration_failures(facts),
        *_file_of_rows_failures(facts),
        *_perturbation_failures(facts),
        *_option_failures(facts),
        *source_failures(facts),
        *file_failures(facts),
        *_parameter_failures(facts),
    )
    passed = (
        f"{RECORD_NAME} agrees with config.json, the tensors and the dense model: recipe "
        f"{facts.recipe.routing}, factors, layout, dtype and router digests."
    )
    source = facts.record.data.get("source")
    name = source.get("name") if isinstance(source, dict) else None
    note = f"It names {shown(name)} as its source; the dense model here is {facts.dense.name}."
    notes = (*([] if name == facts.dense.name else [note]), *_not_held(facts))
    metrics = {"routers": len(facts.layers)}
    return Findings(failures).result(NAME, passed, metrics, " ".join(notes))


def differences(*rows: tuple[str, object, object, str]) -> Iterator[str]:
    """Compare a key's recorded value with the one found; words on the latter end the row."""
    for key, recorded, found, who in rows:
        if recorded != found:
            yield f"{RECORD_NAME}: {key} is {shown(recorded)}, {who} {found}"


def _recipe_failures(facts: Facts) -> Iterator[str]:
    data, recipe = facts.record.data, facts.record.recipe
    source_type, says = facts.dense.config["model_type"], f"{CONFIG_NAME} says"
    yield from differences(("source_type", data.get("source_type"), source_type, says))
    if recipe is None:
        return
    keys, shared = facts.target.keys, facts.target.shared
    routing_key = "routing" if keys.routing is None else keys.routing[0]
    shared_key = (shared and (shared.size_key or shared.count_key)) or keys.expert_size
    for label, key, recorded, configured in (
        ("number of experts", keys.num_experts, recipe.num_experts, facts.num_experts),
        ("granularity", keys.expert_size, recipe.granularity, facts.granularity),
        ("shared experts", shared_key, recipe.shared_experts, facts.shared_experts),
        ("top-k", keys.top_k, recipe.top_k, facts.top_k),
        ("routing", routing_key, recipe.routing, facts.routing),
    ):
        if recorded != configured:
            yield (
                f"{CONFIG_NAME}: {key} stands for {label} {configured}, "
                f"{RECORD_NAME} records {recorded}"
            )
    name = f"E{recipe.expansion}G{recipe.granularity}T{recipe.top_k}"
    promise = str(recipe.promise) if facts.merged is None else str(Promise.NONE)
    yield from differences(
        ("recipe.name", data["recipe"].get("name", name), name, "not"),
        ("promise", data.get("promise", promise), promise, "the recipe's is"),
    )


def _factor_failures(facts: Facts) -> Iterator[str]:
    recorded: dict[str, float] = {}
    for key in ("c", *facts.kind.matrices, "config"):
        value = facts.record.factor(key)
        if value is None:
            yield f"{RECORD_NAME}: factors.{key} is missing or not a positive number"
            return
        recorded[key] = value
    if facts.record.recipe is not None:
        yield from _formula_failures(facts.record.recipe, recorded)
    measured = recover_factors(facts)
    for one in by_model(facts):
        yield from _order_failures(one, measured)
    for matrix in (*facts.kind.matrices, "config"):
        if math.isnan(measured[matrix]):
            yield f"the factor of {matrix} cannot be recovered from the tensors"
        else:
            words = "the tensors were multiplied by"
            yield from _off(matrix, recorded[matrix], words, measured[matrix])


def _order_failures(facts: Facts, factors: Mapping[str, float]) -> Iterator[str]:
    """Compare the recorded order of neurons with that of each group; only where one is recorded."""
    recorded = facts.recipe.neuron_order
    if facts.record.recipe is None or recorded not in {SLICED, SHUFFLED, CLUSTERED}:
        return
    if facts.recipe.perturbed:
        return  # only the check of all weights can tell
    by_part = {part: factor_of(facts, factors, part) for part in facts.parts}
    with facts.dense.reader() as dense, facts.moe.reader() as moe:
        neurons = Neurons(facts, dense, moe, by_part)
        for layer in facts.layers:
            found = neurons.orders(layer, lambda _: True)
            is_other = {
                SLICED: bool(found),
                # All but the first of all groups, which is one of the first model's.
                SHUFFLED: len(found) != len(facts.groups) - (0 in facts.groups),
                CLUSTERED: layer in neurons.uneven,  # one for all may be the dense MLP's own
            }
            if is_other[recorded]:
                yield (
                    f"{RECORD_NAME}: recipe.neuron_order is {recorded}, and in layer {layer} "
                    f"{len(found)} of {len(facts.groups)} groups have an order of their own"
                )
                return


def _off(key: str, recorded: float, words: str, factor: float) -> Iterator[str]:
    if not math.isclose(recorded, factor, rel_tol=1e-6):
        yield f"{RECORD_NAME}: factors.{key} is {recorded:.7g}, {words} {factor:.7g}"


def _formula_failures(recipe: RecipeClaim, recorded: dict[str, float]) -> Iterator[str]:
    yield from _off("c", recorded["c"], "its recipe makes it", recipe.claimed_c)
    failure = recipe.scaling_failure(recorded, recipe.needed_c, "the recorded recipe")
    if failure is not None:
        yield f"{RECORD_NAME}: {failure}"
    named, split = recipe.scaling in ("paper", "none"), recipe.scale_split
    untouched = {"config": ("up", "down"), "down": ("up", "config"), "balanced": ("config",)}
    for matrix in () if named else untouched[split]:
        if recorded[matrix] != 1.0:
            factor = f"factors.{matrix} is {recorded[matrix]:.7g}"
            yield f"{RECORD_NAME}: scale_split is {split}, but {factor}"


def router_failures(facts: Pair) -> Iterator[str]:
    """Name the routers that are recorded or there, and not both."""
    digests = facts.record.data.get("routers")
    if not isinstance(digests, dict):
        return  # which has been said
    names = {facts.router_name(layer) for layer in facts.layers}
    for name in sorted(digests.keys() - names):
        yield f"{RECORD_NAME}: routers has {name}, which is no router of this model"
    for name in sorted(names - digests.keys()):
        yield f"{RECORD_NAME}: routers lacks {name}"


def _logit_std_failures(facts: Facts) -> Iterator[str]:
    recorded = None if facts.record.recipe is None else facts.record.recipe.router_logit_std
    # With a single group no logit decides anything; a missing router is another's finding.
    # That of fitted rows is a measured one: it is held against what the rows of the MoE make of
    # text, where they are run, and against the calibration's own record.
    if recorded is None or facts.expansion == 1 or facts.recipe.router_init != NORMAL:
        return
    for layer, measured in facts.logit_stds.items():
        if not recorded / _STD_RATIO <= measured <= recorded * _STD_RATIO:
            yield (
                f"{RECORD_NAME}: recipe.router_logit_std is {recorded:g}, the logits of "
                f"{facts.router_name(layer)} have a standard deviation of {measured:.3g}"
            )


def _calibration_failures(facts: Facts) -> Iterator[str]:
    """Say where the record of a calibration is missing, or is not what its recipe asks for."""
    found, recipe = facts.record.data.get("calibration"), facts.record.recipe
    fitted = recipe is not None and recipe.router_init in FITTED
    if found is None and not fitted and (recipe is None or recipe.neuron_order != CLUSTERED):
        return
    held = found if isinstance(found, dict) else {}
    for key in ("text_sha256", "sha256"):
        if not is_digest(held.get(key)):
            yield f"{RECORD_NAME}: calibration.{key} is missing or no SHA-256"
    if type(held.get("tokens")) is not int or held["tokens"] < 1:
        yield f"{RECORD_NAME}: calibration.tokens is missing or no number of tokens"
    layers = held.get("layers")
    listed = [each for each in layers if isinstance(each, dict)] if isinstance(layers, list) else []
    if [each.get("layer") for each in listed] != [*facts.layers]:
        yield f"{RECORD_NAME}: calibration.layers does not list the layers that have experts"
        return
    if recipe is None or recipe.router_logit_std is None or not fitted:
        return
    meant = recipe.router_logit_std
    for each in listed:
        std = each.get("logit_std")
        if not is_positive(std) or not math.isclose(std, meant, rel_tol=_FIT):
            yield (
                f"{RECORD_NAME}: rows were fitted to logits of standard deviation {meant:g}, and "
                f"the calibration found {shown(std)} in layer {each['layer']}"
            )


def _file_of_rows_failures(facts: Facts) -> Iterator[str]:
    """Say where the record of a file of rows is none, or of another than the one that is given."""
    found = facts.record.data.get("router_file")
    if found is None:
        return  # an earlier version recorded none
    if not isinstance(found, dict) or not is_digest(found.get("sha256")):
        yield f"{RECORD_NAME}: router_file.sha256 is missing or no SHA-256"
    elif facts.recipe.router_init != FILE:
        yield f"{RECORD_NAME}: router_file is there, and its recipe has rows of no file"
    elif facts.rows is not None and facts.rows.digest != found["sha256"]:
        yield (
            f"{RECORD_NAME}: rows were given in {shown(found.get('name'))}, and those of "
            f"{facts.rows.path} are others (SHA-256 differs)"
        )


def _not_held(facts: Facts) -> Iterator[str]:
    """Say what of the routers' rows rests on their recorded digests alone."""
    init, said = facts.recipe.router_init, facts.record.data
    if init == FILE and facts.rows is None:
        held = said.get("router_file")
        name = shown(held.get("name")) if isinstance(held, dict) else "a file that it does not name"
        yield f"Routers have rows of {name}, and were not held to it: give --router-init FILE."
    elif init in FITTED:
        held = said.get("calibration")
        text = shown(held.get("text")) if isinstance(held, dict) else "a text"
        yield f"Routers have rows that were fitted to {text}, which was not run again."


def _perturbation_failures(facts: Facts) -> Iterator[str]:
    """Say where there is no record of what draws went by; `weights` says whether it is true."""
    found = facts.record.data.get("perturbation")
    if not facts.recipe.perturbed:
        if found is not None:
            yield f"{RECORD_NAME}: perturbation is there, and its recipe perturbs nothing"
        return
    if facts.merged is not None:
        yield f"{RECORD_NAME}: experts of several models are not perturbed, and its recipe says so"
        return
    for layer in facts.layers:
        for part in perturbed_parts(facts):
            if claimed_moments(facts.record, layer, part) is None:
                yield f"{RECORD_NAME}: perturbation lacks the mean and std of {part}, layer {layer}"
                return


def _option_failures(facts: Facts) -> Iterator[str]:
    configs = facts.dense_config, facts.moe_config
    tied, tied_moe = (bool(config.get("tie_word_embeddings", False)) for config in configs)
    data, untied = facts.record.data, facts.record.data.get("untie_embeddings")
    if tied and untied is tied_moe:
        yield f"{RECORD_NAME}: untie_embeddings is {untied}, and so is tie_word_embeddings"
    named = (str(name) for name, row in facts.target.layouts.items() if row == facts.layout)
    layers, layout = [*facts.layers], next(named)
    yield from differences(
        ("moe_layers", data.get("moe_layers", layers), layers, f"{CONFIG_NAME} has"),
        ("expert_layout", data.get("expert_layout"), layout, "the tensors are"),
    )
    dtype = data.get("dtype")
    if dtype in TORCH_DTYPES.values():
        for key in ("dtype", "torch_dtype"):
            configured = facts.moe.config.get(key)
            if configured not in (None, dtype):
                yield f"{CONFIG_NAME}: {key} is {shown(configured)}, {RECORD_NAME} records {dtype}"
        yield from dtype_failures(facts)
    elif dtype is not None:
        yield f"{RECORD_NAME}: dtype {shown(dtype)} is unknown"


def source_failures(facts: Pair) -> Iterator[str]:
    """Say where the recorded source is another than this one."""
    source = facts.record.data.get("source")
    if not isinstance(source, dict):
        yield f"{RECORD_NAME}: source is missing"
        return
    other = "this MoE was made from another checkpoint"
    if source.get("config_sha256") != facts.dense.config_digest:
        yield f"{other}: source.config_sha256 is not that of {facts.dense.path / CONFIG_NAME}"
    found = [
        {"name": shard.name, "size": shard.size, "header_sha256": shard.digest}
        for shard in facts.dense.shards
    ]
    if source.get("files") != found:
        yield f"{other}: source.files does not describe the weight files of {facts.dense.path}"
    yield from _repo_failures("source", source, facts.dense)
    merged: Sequence[Checkpoint] = () if facts.merged is None else facts.merged.others
    if not merged:
        return
    recorded = (facts.record.data.get("experts_from") or {"models": []})["models"]
    if len(recorded) != len(merged):
        yield f"{RECORD_NAME}: it names no other model, and {merged[0].name} is given as one"
        return
    for i, model in enumerate(merged):
        yield from _repo_failures(f"experts_from.models[{i}]", recorded[i], model)


def _repo_failures(key: str, recorded: Mapping[str, Any], model: Checkpoint) -> Iterator[str]:
    # A directory can have any name; a repo on the Hub is what the card points its readers to.
    if model.repo is None or "/" not in str(recorded.get("name")):
        return
    for what, value in (("name", model.repo), ("revision", model.revision)):
        if recorded.get(what) != value:
            yield (
                f"this MoE was made from another checkpoint: {key}.{what} is "
                f"{shown(recorded.get(what))}, and this is {value}"
            )


def file_failures(facts: Pair) -> Iterator[str]:
    """Name the files that are not as they were recorded."""
    try:
        listed = listed_files(facts.record.data)
    except UpcycleError as error:
        yield error.message
        return
    shards = {shard.name: shard for shard in facts.moe.shards}
    for name in shards.keys() - listed.keys():
        yield f"{RECORD_NAME}: files does not list {name}"
    for name, file in listed.items():
        if name not in facts.moe_names:
            yield f"{RECORD_NAME}: files lists {name}, which is not there"
        elif name in shards:
            found = shards[name].size, shards[name].digest
            if found != (file.size, file.header_sha256):
                yield f"{RECORD_NAME}: files does not describe {name}"
        else:
            try:
                changed = sha256_of(facts.moe.storage.local(name)) != file.sha256
            except UpcycleError as error:
                yield error.message
                continue
            if changed:
                yield f"{name} is not the file that {RECORD_NAME} lists: it was changed since"


def _parameter_failures(facts: Facts) -> Iterator[str]:
    recorded = facts.record.data.get("parameters")
    if not isinstance(recorded, dict):
        yield f"{RECORD_NAME}: parameters is missing"
        return
    names = {
        facts.locate(part, layer, expert).tensor
        for layer in facts.layers
        for part in facts.parts
        for expert in range(facts.num_experts)
    }
    held = (facts.moe.tensors[name].num_elements for name in names & facts.moe.tensors.keys())
    idle = sum(held) // facts.num_experts * (facts.num_experts - facts.top_k)
    total = facts.moe.num_parameters
    dense = sum(entry.num_elements for entry in read_tensors(facts.dense).values())
    words = f"{CONFIG_NAME} and the tensors make it"
    for key, found in (("total", total), ("active", total - idle), ("dense", dense)):
        yield from differences((f"parameters.{key}", recorded.get(key), found, words))
