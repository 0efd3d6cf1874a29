"""Every field of every row, changed by itself: is it refused, or does `verify` find it out?

The rows are shared: what is wrong in them is wrong for the converter and for the verification. So
each mutation is in force for both, and all that can find it is what verification asks transformers
and the tensors themselves. A mutation that neither stops has to be of no effect, or to give another
model that is as good: `EQUIVALENT` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, MakeDense, contents, logits, random_ids, sizes_of

from upcycle_cli import Options, Recipe, UpcycleError, WriteOptions, convert, verify
from upcycle_cli import models as families
from upcycle_cli.models import layers
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseFamily, DenseModel, read_dense
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import targets_of
from upcycle_cli.models.mlp import Weight
from upcycle_cli.models.moe import (
    CorrectionBias,
    ExtraTensor,
    Keys,
    Layout,
    ParallelMlp,
    SharedExpert,
    Target,
)
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.shipped_row import shipped
from upcycle_cli.models.tensor_pieces import QKV, Piece, Pieces
from upcycle_cli.models.wrapper import IN_MEMORY_PREFIXES, Inside
from upcycle_cli.models.wrappers import WRAPPERS
from upcycle_cli.recipe.recipe import SHIPPED, Routing
from upcycle_cli.recipe.scaling import Factors, MlpKind
from upcycle_cli.run.shipped import _classes
from upcycle_cli.verification.prompts import TextOptions

CHECKS = (("weights",), ("directory", "outputs"))
"""In the order in which they are tried: the fastest one first, and by itself, so that the outputs
are judged as if nothing were known of the weights."""

QUICKLY = WriteOptions(workers=1, fsync=False)
"""Nothing of it is to outlive the machine."""
FEW = TextOptions(tokens=64)
"""Of each text a few words; the rows are filled up with tokens of the whole vocabulary."""

PLAN_BREAKS = (AssertionError, IndexError, KeyError, StopIteration, TypeError, ValueError)
"""How a conversion may end whose row is no row: it names a tensor, a part or a dimension that is
not there. Nothing is written then, and no user can bring it about; the plan's own assertions, that
every tensor is used, and once, are among them. Of `verify` this is not accepted."""

SIGMOID = [name for name, row in NATIVE.items() if row.keys.routing and row.correction_bias]
SOFTMAX_ONLY = [name for name, row in NATIVE.items() if Routing.SIGMOID_TOPK not in row.routings]
ONE_ROUTING = [name for name, row in NATIVE.items() if row.keys.routing is None]
REFUSE_NONE = [name for name, row in NATIVE.items() if row.refusal is Target.refusal]
TAKES_ALL = [name for name, row in NATIVE.items() if row.layers.objection is layers.ALL.objection]
NO_BIASES = ("mistral", "qwen2", "qwen3", "olmo2")
EQUIVALENT: Mapping[str, str] = {
    # dense families
    rf"({'|'.join(NO_BIASES)}) mlp: \[[345]\] (?!and \[[012]\]).*": "its MLPs have no biases",
    r"nemotron_h mlp: \[2\] (name|split_dim=.*|left out)": "its MLP has no biases that are taken",
    r"nemotron_h mlp: (\[3\] (name|split_dim=.*|left out)|\[2\] and \[3\] swapped)": "nor this one",
    r"nemotron_h embedding: lm_head.weight": "it ties nothing: only the order of tensors changes",
    r"(llama|olmo2|granite|nemotron|nemotron_h) windows: none": "it has none",
    r"(olmo2|granite|nemotron|nemotron_h) windows: .*": "no target of it says anything of windows",
    r"olmo2 norm_offset: .*": "there is no norm that it could be of",
    r".* layers_differ: True": "a table knows all tensors of the layers here",
    r"nemotron_h (head|renamed): .*": "it ties nothing, and ships no code",
    r"nemotron_h keys: renamed: .*": "its layers are counted by their kinds",
    r".* pieces: of a stranger": "it has no such tensor",
    r".* old_keys: .*": "no source here has such a key; what has is tested elsewhere",
    r".* attention_was_tested: .*": "it says what was tested, nothing of the model",
    r".* has_obsolete_code: .*": "no source here has code; what is refused is tested elsewhere",
    # targets
    r".* layouts: .*\.experts: in another order": "tensors come in another order",
    r".* layouts: without (per-expert|stacked)": "the other layout is the default then",
    r"shipped keys: dense_size: .*": "its config is the source's, which says it",
    r".* keys: aliases: none": "it only drops what a source may say, which is tested elsewhere",
    r".* keys: aliases: a stranger": "what is dropped is written again, or is the default",
    r".* shared: (weights|fused): \[0\] and \[1\] swapped": "both are drawn, and down is zero",
    r".* shared: (weights|fused): in another order": "tensors come in another order",
    r".* shared: (weights|fused): \[.\] split_dim=None": "it then has the shape of down",
    r".* shared: (weights|fused): \[.\] holds reversed": "gate and up are drawn alike",
    r".* shared: size: 128": "any width does",
    r".* shared: count_key: n_shared_experts": "nothing reads that key of them",
    rf"({'|'.join(SOFTMAX_ONLY)}) correction_bias: .*": "only sigmoid routing has one",
    rf"({'|'.join(REFUSE_NONE)}|shipped) refusal: none": "it has none",
    r"(flex_olmo|gemma4_text) keys: (routing|scale): .*": (
        "the norm behind the experts takes every factor out"
    ),
    r"gemma4_text extra_tensors: post_feedforward_layernorm_2\.weight (factor|root): (0.5|h.*)": (
        "as does the norm behind this one"
    ),
    r"gemma4_text extra_tensors: post_feedforward_layernorm_1\.weight (root|of): .*": (
        "what is nothing is so whatever it is a multiple of"
    ),
    r"gemma4_text extra_tensors: router\.scale (factor|root|of): .*": "any router does",
    r"gemma4_text extra_tensors: router\.per_expert_scale (factor: 0\.5|root: .*)": (
        "MLPs here put out far more than what it is for"
    ),
    r"gemma4_text shared: norm: None": "its down matrix is zero then",
    r".* extra_tensors: .* frozen: .*": "it is about training",
    r"mixtral refusal: none": "none is ever met",
    r"mixtral unsupported_tensors: without .*": "what has the one has the other",
    rf"({'|'.join(ONE_ROUTING)}) keys: routing: norm_topk_prob": "nothing reads that key of them",
    r".* routings: \(.*": "another default, which is as good",
    r".* routings: (softmax-topk|topk-softmax|sigmoid-topk)": "one less is offered",
    rf"({'|'.join(SIGMOID)}) keys: routing: (another key|none)": "its own settings say it as well",
    rf"({'|'.join(SIGMOID)}|shipped) keys: scale: None": "the matrices take the factor then",
    rf"({'|'.join(SIGMOID)}) settings: another norm_topk_prob": "its routing's key is written last",
    r"qwen2_moe settings: without qkv_bias": "it is the default",
    r"qwen2_moe settings: without sliding_window": "the source has it, or the same default",
    r"mixtral settings: without router_jitter_noise": "it is the default",
    rf"({'|'.join(SIGMOID)}) settings: without (n_group|topk_group|n_shared_experts)": (
        "it is the default"
    ),
    rf"({'|'.join(SIGMOID)}) settings: without norm_topk_prob": "its routing says it as well",
    r"granitemoe_swa settings: without .*": "the source has the key, or the default is the same",
    r"hy_v3 settings: without num_shared_experts": "it is the default",
    r"(hy_v3|solar_open|deepseek_v3) settings: without "
    r"(qk_norm|route_norm|first_k_dense_replace|partial_rotary_factor|topk_method|scoring_func)": (
        "it is for engines, which say themselves that they need it"
    ),
    r"hy_v3 keys: expert_size_copy: None": "it is for one of them",
    r"hy_v3 layers: MLP_TYPES": "it lacks but what is for one of them",
    r".* settings: without num_nextn_predict_layers": "no forward pass reads it",
    r"(dots1|qwen3_moe) settings: without .*": "the source has the key, with the same meaning",
    r"mellum keys: routing: (another key|none)": "its default is what the scenarios ask for",
    r"mellum settings: without (layer_types|sliding_window)": "the source has it",
    r"cohere2_moe keys: routing: .*": "gates sum to 1 in either way",
    r"cohere2_moe settings: without (layer_types|sliding_window)": "the source has it",
    r"cohere2_moe settings: without (num_shared_experts|norm_topk_prob|rms_norm_eps)": (
        "it is the default"
    ),
    r"cohere2_moe settings: another prefix_dense_sliding_window_pattern": "any but 1 does",
    r"qwen3_5_moe_text settings: without layer_types": "the source has it",
    r"lfm2_moe settings: without .*": "the source has it, or it is the default",
    rf"({'|'.join(TAKES_ALL)}) layers: ENABLED": "so it takes all layers, too, and adds a key",
    r"granitemoehybrid layers: ALL": "what has experts has them in all layers",
    r"granitemoehybrid settings: another mamba_n_heads": "there is no such layer",
    r"granitemoehybrid settings: .* mamba_(n_groups|d_state|d_conv|expand)": "nor for these",
    r"nemotron_h settings: without .*": "the source has the key, or means the same without",
    # the arithmetic
    r"degree 0 of .*": "all of c goes into down, which is right for any MLP",
}
"""By a pattern of their names, mutations that make a model that is as good, or the same."""
UNAVOIDABLE: Mapping[str, str] = {
    r".* layouts: per-expert\.experts: \[[01]\] left out": "a part of the MLP has no place",
    r".* shared: (weights|fused): \[.\] left out": "nor has a part of what is shared",
    r".* shared: size: None": "the key of its width would say null",
    r"hunyuan_v1_moe shared: size_key: .*": "as before",
    r".* mlp: \[0\] split_dim=None": "a matrix has two dimensions, and its row must name one",
    r"shipped layouts: fused\.experts: \[2\] split_dim=1": "a bias has but one dimension",
}
"""Mutations that break verify itself: rows that are no rows."""
HOLES: Mapping[str, str] = {}
"""Mutations that verification does not find, and should."""


def reason(table: Mapping[str, str], label: str) -> str | None:
    return next((why for text, why in table.items() if re.fullmatch(text, label)), None)


# What can be shown -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A conversion in which a mutation may show."""

    model_type: str
    target: str
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return repr((self.model_type, self.target, self.config, self.options, self.recipe))

    def made_by(self, dense: Path, moe: Path) -> None:
        wanted = {"expansion": 2, "granularity": 2, "top_k": 2, **self.recipe}
        convert(
            dense,
            moe,
            Recipe(**wanted),
            target=self.target,
            options=Options(**self.options),
            writing=QUICKLY,
        )


SLIDING = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
}
WITHOUT_WINDOWS = ("glm4_moe", "hy_v3")
SUM_TO_ONE = {"routing": Routing.TOPK_SOFTMAX}
LAST = "the last ones"
SOME_LAYERS = {
    **dict.fromkeys((name for name, row in NATIVE.items() if row.layers.scope == "all"), "1"),
    "nemotron_h": "1",
    **dict.fromkeys((name for name, row in NATIVE.items() if row.layers.scope == LAST), "1-"),
}
"""A choice of layers that a target can express, where it is not "0"."""


def piece_scenarios(model_type: str) -> tuple[Scenario, ...]:
    """To each native target, with a layer that stays dense where there can be one."""
    return tuple(
        Scenario(model_type, name, recipe={"layers": layer})
        for name in DENSE[model_type].targets
        for layer in (None, "1")
        if layer is None or NATIVE[name].layers.objection((1,), 2) is None
    )


def dense_scenarios(model_type: str) -> tuple[Scenario, ...]:
    """A family as it is, with all the biases that it can have, and with windows."""
    found = []
    for target in targets_of(DENSE[model_type]):
        settings = dict(SLIDING.get(model_type, {}) if target not in WITHOUT_WINDOWS else {})
        if target == SHIPPED:
            biases = ("attention_bias", "mlp_bias")
            settings |= {key: True for key in biases if key in defaults_of(model_type)}
        routing = {} if target in ("glm4_moe", "nemotron_h") else SUM_TO_ONE
        found.append(Scenario(model_type, target, settings, {}, routing))
    found = found[:1] + found[-1:] if len(found) > 1 else found
    tied = {"tie_word_embeddings": True}
    untied = {"untie_embeddings": True}
    found.append(replace(found[-1], config=tied, options=untied))
    if DENSE[model_type].classes is None:
        found.append(Scenario(model_type, SHIPPED))
    return tuple(found)


def native_scenarios(target: str) -> tuple[Scenario, ...]:
    """The first family that has a target, in each layout, and with some layers left dense."""
    model_type = next(name for name, row in DENSE.items() if target in row.targets)
    able = NATIVE[target].routings
    routing: dict[str, Any] = {"routing": able[-1] if able[0] is Routing.SOFTMAX_TOPK else able[0]}
    if defaults_of(target)[NATIVE[target].keys.top_k] == 2:
        routing |= {"expansion": 3, "top_k": 4}  # a default must not do by chance
    some = SOME_LAYERS.get(target, "0")
    fused = {"expert_layout": "fused"}
    found = [Scenario(model_type, target, {}, {}, routing)]
    found.append(Scenario(model_type, target, {}, fused, routing))
    found.append(Scenario(model_type, target, {}, {}, routing | {"layers": some}))
    found += REFUSED.get(target, ())
    return tuple(found)


def sharing_scenarios(target: str) -> tuple[Scenario, ...]:
    """The same with some of four shards for every token, which no default says by chance."""
    shared = NATIVE[target].shared
    if shared is None:
        return ()
    first, fused, *_ = native_scenarios(target)
    count = 2 if shared.objection(2) is None else 1
    sharing = {"granularity": 2 + count, "shared_experts": count}
    return tuple(
        replace(each, recipe={**each.recipe, "top_k": 2} | sharing) for each in (first, fused)
    )


REFUSED: Mapping[str, tuple[Scenario, ...]] = {
    "nemotron_h": (Scenario("nemotron_h", "nemotron_h"),),
    "mixtral": (
        Scenario("llama", "mixtral", {"attention_bias": True}),
        Scenario("mistral", "mixtral", SLIDING["mistral"]),
        Scenario("mistral", "mixtral", {"minimal": True}),
    ),
    "qwen2_moe": (
        Scenario("llama", "qwen2_moe", {"attention_bias": True}, {}, SUM_TO_ONE),
        Scenario("qwen2", "qwen2_moe", SLIDING["qwen2"], {}, SUM_TO_ONE),
        Scenario("llama", "qwen2_moe", {}, {}, {"top_k": 4}),
        Scenario("mistral", "qwen2_moe", SLIDING["mistral"], {}, SUM_TO_ONE),
    ),
    "qwen3_moe": (
        Scenario("qwen3", "qwen3_moe", SLIDING["qwen2"], {}, SUM_TO_ONE),
        Scenario("qwen3", "qwen3_moe", SLIDING["qwen3"], {}, SUM_TO_ONE),
        Scenario("qwen3", "qwen3_moe", {"attention_bias": True}, {}, SUM_TO_ONE),
    ),
    "cohere2_moe": (
        Scenario("cohere2", "cohere2_moe", {}, {}, {"routing": Routing.SIGMOID_TOPK}),
        Scenario("cohere2", "cohere2_moe", {"num_hidden_layers": 4}, {}, {"layers": "0"}),
    ),
    "glm4_moe": (
        Scenario("llama", "glm4_moe", {"attention_bias": True}),
        Scenario("qwen2", "glm4_moe", SLIDING["qwen2"]),
        Scenario("qwen3", "glm4_moe", {"attention_bias": False}),
        Scenario("qwen2", "glm4_moe"),
    ),
    "gemma4_text": (Scenario("gemma4_text", "gemma4_text", {"rms_norm_eps": 0.0}),),
    "dots1": (Scenario("qwen3", "dots1", SLIDING["qwen2"]),),
    "hy_v3": (Scenario("qwen3", "hy_v3", SLIDING["qwen2"]),),
    "granitemoe_swa": (Scenario("granite_swa", "granitemoe_swa", {"layer_rope_theta": [99.0]}),),
    "solar_open": (Scenario("llama", "solar_open", {"attention_bias": True}),),
    "deepseek_v3": (Scenario("youtu", "deepseek_v3", {"minimal": True}),),
}
"""Models that are refused, or that have what the others have not."""

SHIPPED_SCENARIOS = (
    Scenario("nemotron", SHIPPED, {"mlp_bias": True}, {}, {"routing": Routing.SIGMOID_TOPK}),
    Scenario(
        "nemotron",
        SHIPPED,
        {},
        {},
        {"routing": Routing.TOPK_SOFTMAX, "layers": "1", "expansion": 3, "top_k": 4},
    ),
    Scenario("olmo2", SHIPPED, {}, {}, {"routing": Routing.SOFTMAX_TOPK, "top_k": 4}),
    Scenario("nemotron", SHIPPED, {}, {}, {"routing": Routing.SOFTMAX_TOPK, "top_k": 4}),
)


# What is changed ---------------------------------------------------------------------------------

Variant = tuple[str, Any]

RENAMED = (("norm.", "ln."),)
IN_LLAVA = Inside(WRAPPERS["llava"], IN_MEMORY_PREFIXES)
ALL_LAYERS = {
    "ALL": layers.ALL,
    "MLP_ONLY_LAYERS": layers.MLP_ONLY_LAYERS,
    "FIRST_K_DENSE": layers.FIRST_K_DENSE,
    "NUM_DENSE_LAYERS": layers.NUM_DENSE_LAYERS,
    "BLOCK_TYPES": layers.BLOCK_TYPES,
    "MOE_RANGE": layers.MOE_RANGE,
    "MLP_TYPES": layers.MLP_TYPES,
    "MOE_LAYERS": layers.MOE_LAYERS,
    "ENABLED": layers.ENABLED,
}


def _others(value: object, *choices: object) -> Iterator[Variant]:
    for choice in choices:
        if choice != value:
            yield str(choice), choice


def _weight(weight: Weight) -> Iterator[Variant]:
    yield "name", replace(weight, name=f"{weight.name}_x")
    yield from (
        (f"split_dim={label}", replace(weight, split_dim=cut))
        for label, cut in _others(weight.split_dim, 0, 1, None)
    )
    if len(weight.parts) > 1:
        yield "holds reversed", replace(weight, parts=weight.parts[::-1])


def _weights(weights: tuple[Weight, ...]) -> Iterator[Variant]:
    """Each weight changed, each left out, each two of a kind with each other's parts."""
    for i, weight in enumerate(weights):
        for label, changed in _weight(weight):
            yield f"[{i}] {label}", (*weights[:i], changed, *weights[i + 1 :])
        yield f"[{i}] left out", weights[:i] + weights[i + 1 :]
        for j in range(i):
            one, other = weights[j], weight
            if (one.parts[0][-5:] == "_bias") is (other.parts[0][-5:] == "_bias"):
                swapped = list(weights)
                swapped[j] = replace(one, parts=other.parts)
                swapped[i] = replace(other, parts=one.parts)
                yield f"[{j}] and [{i}] swapped", tuple(swapped)
    yield "in another order", weights[::-1]


def _mapping(value: Mapping[Any, Any]) -> Iterator[Variant]:
    for key in value:
        yield f"without {key}", {k: v for k, v in value.items() if k != key}
    if value:
        yield "empty", {}


def _pieces(value: Pieces) -> Iterator[Variant]:
    """Each piece changed, each left out, each two of a tensor with each other's names."""
    if not value:
        yield "of a stranger", QKV
    for name, held in value.items():
        yield f"without {name}", {key: kept for key, kept in value.items() if key != name}
        for i, piece in enumerate(held):
            for label, changed in variants(piece, piece):
                yield f"{piece.name} {label}", {**value, name: (*held[:i], changed, *held[i + 1 :])}
            yield f"{piece.name} left out", {**value, name: held[:i] + held[i + 1 :]}
            for j in range(i):
                swapped = [*held]
                swapped[i] = replace(piece, name=held[j].name)
                swapped[j] = replace(held[j], name=piece.name)
                yield f"{piece.name} and {held[j].name} swapped", {**value, name: tuple(swapped)}


def _layouts(value: Mapping[Any, Layout]) -> Iterator[Variant]:
    for key, layout in value.items():
        for label, changed in variants(layout, layout):
            yield f"{key}.{label}", {**value, key: changed}
    yield from (pair for pair in _mapping(value) if pair[1])


def _routings(value: tuple[Routing, ...]) -> Iterator[Variant]:
    yield from _others(value, value[::-1])
    for routing in Routing:
        changed = tuple(r for r in value if r is not routing) or (Routing.SOFTMAX_TOPK,)
        yield str(routing), changed if routing in value else (routing, *value)


def _routing_key(value: tuple[str, Mapping[Any, Routing]] | None) -> Iterator[Variant]:
    if value is None:
        yield "norm_topk_prob", ("norm_topk_prob", {True: Routing.TOPK_SOFTMAX})
        return
    key, meanings = value
    yield "none", None
    yield "another key", (f"{key}_x", meanings)
    rotated = list(meanings.values())[1:] + list(meanings.values())[:1]
    if len(meanings) > 1:
        yield "meanings rotated", (key, dict(zip(meanings, rotated, strict=True)))
    else:
        yield "the opposite", (key, {not known: meant for known, meant in meanings.items()})
        for other in Routing:
            if other not in meanings.values():
                yield f"meaning {other}", (key, dict.fromkeys(meanings, other))


def _settings(value: Callable[[DenseModel], dict[str, Any]], row: Target) -> Iterator[Variant]:
    model_type = next(
        (name for name, family in DENSE.items() if row.model_type in family.targets), "nemotron"
    )
    for key in value(_tiny(model_type)):
        yield (
            f"without {key}",
            lambda dense, key=key: {k: v for k, v in value(dense).items() if k != key},
        )
        yield f"another {key}", lambda dense, key=key: _other_setting(value(dense), key)


def _other_setting(settings: dict[str, Any], key: str) -> dict[str, Any]:
    match settings[key]:
        case bool(flag):
            return settings | {key: not flag}
        case float(number):
            return settings | {key: number / 2 or 0.5}
        case int(number):
            return settings | {key: number + 1}
        case None:
            return settings | {key: 8}
        case list(items):
            attends = items[0] in ("attention", "full_attention")
            other = "sliding_attention" if attends else "full_attention"
            return settings | {key: [other, *items[1:]]}
        case _:
            return settings | {key: None}


def _tiny(model_type: str) -> DenseModel:
    return read_dense(DENSE[model_type], {"model_type": model_type, **sizes_of(model_type)})


Rule = Callable[[Any, Any], Iterator[Variant]]
RULES: Mapping[type, Mapping[str, Rule]] = {
    DenseFamily: {
        "model_type": lambda value, _: _others(value, "llama", "nemotron"),
        "mlp": lambda value, _: _weights(value),
        "norm": lambda value, _: _others(
            value, None, "input_layernorm.weight", "post_attention_layernorm.weight"
        ),
        "norm_offset": lambda value, _: _others(value, 0.0, 1.0),
        "layer": lambda value, _: _others(
            value, "model.layers.{layer}.", "backbone.layers.{layer}.", "layers.{layer}."
        ),
        "embedding": lambda value, _: _others(value, "lm_head.weight", "model.norm.weight"),
        "head": lambda value, _: _others(value, "embed_out.weight"),
        "activation": lambda value, _: _others(value, "hidden_act", "mlp_hidden_act"),
        "keys": lambda value, _: _others(
            value, {"intermediate_size": "n_inner"}, {"hidden_size": "n_embd"}
        ),
        "old_keys": lambda value, _: _others(value, {"ffn_dim": "intermediate_size"}),
        "width": lambda value, _: iter([("twice", lambda values: 2 * value(values))]),
        "layers_differ": lambda value, _: _others(value, True),
        "renamed": lambda value, _: _others(value, RENAMED),
        "mlp_block": lambda value, _: _others(value, None, "mlp", "full_attention"),
        "windows": lambda _value, _row: iter(
            (
                ("none", lambda _, count: (None,) * count),
                ("all", lambda _, count: (5,) * count),
                ("the first", lambda _, count: (8, *(None,) * (count - 1))),
            )
        ),
        "targets": lambda value, _: (
            (name, (name,)) for name in NATIVE if name not in value and name not in DENSE
        ),
        "pieces": lambda value, _: _pieces(value),
        "attention_was_tested": lambda value, _: _others(value, False, True),
        "has_obsolete_code": lambda value, _: _others(value, False, True),
        "inside": lambda _value, _row: iter([("llava", IN_LLAVA)]),
        "classes": lambda value, _: _others(value, "Llama", "Mistral", "Nemotron", None),
    },
    Target: {
        "model_type": lambda value, _: _others(value, "mixtral", "qwen2_moe", "upcycled_olmo2"),
        "architecture": lambda value, _: iter([("another", f"{value}X")]),
        "routings": lambda value, _: _routings(value),
        "layouts": lambda value, _: _layouts(value),
        "keys": lambda value, _: variants(value, value),
        "layers": lambda value, _: (pair for pair in ALL_LAYERS.items() if pair[1] is not value),
        "layer": lambda value, _: _others(
            value, "model.layers.{layer}.", "backbone.layers.{layer}.", "layers.{layer}."
        ),
        "head": lambda value, _: _others(value, "embed_out.weight"),
        "renamed": lambda value, _: _others(value, RENAMED),
        "correction_bias": lambda value, _: _correction(value),
        "shared": lambda value, _: _shared(value),
        "required_biases": lambda value, _: iter(
            [
                *((f"without {name}", tuple(n for n in value if n != name)) for name in value),
                ("o", (*value, "self_attn.o_proj")),
                ("q", ("self_attn.q_proj",)),
            ]
        ),
        "extra_tensors": lambda value, _: _added(value),
        "parallel_mlp": lambda value, _: iter(()) if value is None else _beside(value),
        "unsupported_tensors": lambda value, _: _mapping(value),
        "refusal": lambda _value, _row: iter([("none", lambda _: None)]),
        "settings": _settings,
        "inside": lambda _value, _row: iter([("llava", IN_LLAVA)]),
    },
    ExtraTensor: {
        "name": lambda value, _: iter([("another", f"{value}_x")]),
        "factor": lambda value, _: _others(value, 0.0, 0.5, 1.0),
        "root": lambda value, _: _others(value, None, "hidden_size", "rms_norm_eps"),
        "of": lambda value, _: _others(value, None, "input_layernorm.weight"),
        "per_expert": lambda value, _: _others(value, False, True),
        "frozen": lambda value, _: _others(value, False, True),
    },
    ParallelMlp: {
        member.name: lambda value, _: iter([("another", f"{value}_x")])
        for member in fields(ParallelMlp)
    },
    Piece: {
        "name": lambda value, _: iter([("another name", f"{value}_x")]),
        "rows": lambda value, _: _others(
            value, "intermediate_size", "num_key_value_heads*head_dim"
        ),
        "halves": lambda value, _: _others(value, False, True),
    },
    Keys: {
        "num_experts": lambda value, _: iter([("another", f"{value}_x"), ("top_k", "top_k")]),
        "renamed": lambda value, _: _others(value, {"num_hidden_layers": "n_layer"}),
        "aliases": lambda value, _: iter([("none", ()), ("a stranger", ("hidden_act", *value))]),
        "top_k": lambda value, _: iter([("another", f"{value}_x"), ("topk_group", "topk_group")]),
        "expert_size": lambda value, _: _others(
            value, "intermediate_size", "moe_intermediate_size", f"{value}_x"
        ),
        "expert_size_copy": lambda value, _: _others(value, None, "moe_size"),
        "dense_size": lambda value, _: iter([("another", f"{value}_x")]),
        "routing": lambda value, _: _routing_key(value),
        "scale": lambda value, _: _others(value, None, "routed_scaling_factor", "scale"),
    },
    CorrectionBias: {
        "name": lambda value, _: iter([("another", f"{value}_x")]),
        "fused": lambda value, _: _others(value, None, "mlp.gate.bias"),
        "routing": lambda value, _: _others(value, *Routing),
        "rows": lambda value, _: _others(value, None, 1),
    },
    Layout: {
        "experts": lambda value, _: _weights(value),
        "router": lambda value, _: iter(
            [("another", f"{value}_x"), ("the norm", "post_attention_layernorm.weight")]
        ),
    },
    SharedExpert: {
        "weights": lambda value, _: _weights(value),
        "fused": lambda value, _: _weights(value) if value else iter(()),
        "router": lambda value, _: _others(value, None, "mlp.shared_gate.weight"),
        "size_key": lambda value, _: _others(value, None, "moe_intermediate_size"),
        "size": lambda value, _: _others(value, None, 128),
        "count_key": lambda value, _: _others(value, None, "n_shared_experts"),
        "required": lambda value, _: _others(value, False, True),
        "norm": lambda value, _: _others(value, None),
        "settings": lambda value, _: _mapping(value),
    },
}
"""By field, the other values that are tried."""


def _correction(value: CorrectionBias | None) -> Iterator[Variant]:
    if value is None:
        yield "one", NATIVE["glm4_moe"].correction_bias
        return
    yield "none", None
    yield from variants(value, value)


def _added(value: tuple[ExtraTensor, ...]) -> Iterator[Variant]:
    if not value:
        yield "one", (ExtraTensor(name="mlp.norm.weight"),)
    for i, row in enumerate(value):
        yield f"{row.name} left out", value[:i] + value[i + 1 :]
        for label, changed in variants(row, row):
            yield f"{row.name} {label}", (*value[:i], changed, *value[i + 1 :])


def _beside(value: ParallelMlp) -> Iterator[Variant]:
    yield "none", None
    yield from variants(value, value)


def _shared(value: SharedExpert | None) -> Iterator[Variant]:
    if value is None:
        yield "one", NATIVE["glm4_moe"].shared
        return
    yield "none", None
    yield from variants(value, value)


def variants(value: Any, row: Any) -> Iterator[Variant]:  # noqa: ANN401 - a row, or a part of it
    """Yield a row with one of its fields changed, for each field and each other value of it."""
    assert is_dataclass(value)
    for member in fields(value):
        held = getattr(value, member.name)
        for label, changed in RULES[type(value)][member.name](held, row):
            yield f"{member.name}: {label}", replace(value, **{member.name: changed})  # type: ignore[type-var]


@pytest.mark.parametrize("kind", RULES)
def test_every_field_is_changed(kind: type) -> None:
    assert {member.name for member in fields(kind)} == RULES[kind].keys()


# What happens ------------------------------------------------------------------------------------


class Judge:
    """Converts and verifies, and knows what comes out when nothing is changed."""

    def __init__(self, make_dense: MakeDense, folder: Path) -> None:
        self.make_dense, self.folder = make_dense, folder
        self.usual: dict[str, Mapping[str, str] | str] = {}
        self.wanted: dict[Path, torch.Tensor] = {}

    def prepare(self, scenario: Scenario) -> None:
        """Make what is made without the mutation."""
        if scenario.name not in self.usual:
            moe = self.folder / f"usual{len(self.usual)}"
            self.usual[scenario.name] = self.make(scenario, moe)

    def make(self, scenario: Scenario, moe: Path) -> Mapping[str, str] | str:
        """Return what is written, or "refused"."""
        dense = self.make_dense(scenario.model_type, **scenario.config)
        try:
            scenario.made_by(dense, moe)
        except UpcycleError:
            return "refused"
        return {
            name: digest
            for name, digest in contents(moe).items()
            if name not in ("upcycle.json", "README.md")
        }

    def outcome(self, scenario: Scenario, moe: Path, *, harmless: bool) -> str:
        """Convert and verify with what the tables say now; what needs no verifying is not.

        What is written byte for byte as usual is right, whatever verification says. Where the
        mutation is harmless, so is what computes the same: verification has to stop the others.
        """
        usual = self.usual[scenario.name]
        try:
            made = self.make(scenario, moe)
        except PLAN_BREAKS as error:
            return f"the plan broke: {type(error).__name__}: {error}"
        if made == "refused":
            return "no effect" if usual == "refused" else "refused"
        if made == usual:
            return "no effect"
        if harmless and self.is_as_good(scenario, moe):
            return "as good"
        return self.verified(scenario, moe) or self.passed(scenario, moe)

    def verified(self, scenario: Scenario, moe: Path) -> str:
        """Return how verification ends, or nothing when it finds nothing."""
        dense = self.make_dense(scenario.model_type, **scenario.config)
        try:
            for checks in CHECKS:
                report = verify(dense, moe, checks=checks, texts=FEW, fail_fast=True)
                if not report.passed:
                    failed = (check.name for check in report.checks if check.status == "failed")
                    return f"caught by {', '.join(failed)}"
        except UpcycleError:
            return "refused"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is to be seen
            return f"verify broke: {type(error).__name__}: {error}"
        return ""

    def is_as_good(self, scenario: Scenario, moe: Path) -> bool:
        try:
            return self.wrong_by(scenario, moe) < GOOD
        except Exception:  # noqa: BLE001 - of a model that is no good, transformers may say anything
            return False

    def passed(self, scenario: Scenario, moe: Path) -> str:
        wrong = self.wrong_by(scenario, moe)
        return "as good" if wrong < GOOD else f"passed, and is wrong by {wrong:.1e}"

    def wrong_by(self, scenario: Scenario, moe: Path) -> float:
        """Return how far the logits are from the dense model's, relative to the largest."""
        dense = self.make_dense(scenario.model_type, **scenario.config)
        ids = random_ids(40)
        _classes.cache_clear()
        if dense not in self.wanted:
            self.wanted[dense] = logits(dense, ids, torch.float32)
        wanted = self.wanted[dense]
        return float((logits(moe, ids, torch.float32) - wanted).abs().max() / wanted.abs().max())


STOPPED = ("refused", "caught", "the plan broke")
GOOD = 1e-5


@pytest.fixture(autouse=True)
def _own_code() -> Iterator[None]:
    """Let verification look at the tables again for the code that is shipped."""
    yield
    _classes.cache_clear()


@pytest.fixture(scope="module")
def judge(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(make_dense, tmp_path_factory.mktemp("usual"))


def judged(
    judge: Judge,
    label: str,
    scenarios: tuple[Scenario, ...],
    tmp_path: Path,
    apply: Callable[[], None],
) -> None:
    for scenario in scenarios:
        judge.prepare(scenario)
    apply()
    _classes.cache_clear()  # what is shipped may be other code now
    harmless = reason(EQUIVALENT, label) is not None
    first = label.split(maxsplit=1)[0]
    moes = [tmp_path / f"{first}{i}" for i in range(len(scenarios))]
    outcomes: list[str] = []
    for scenario, moe in zip(scenarios, moes, strict=True):
        outcomes.append(judge.outcome(scenario, moe, harmless=harmless))
        if outcomes[-1].startswith(("verify broke", *STOPPED)):
            break
    if not harmless and set(outcomes) <= {"no effect", "as good"}:
        # It shows in nothing that is written, but may in what verification expects.
        for scenario, moe in zip(scenarios, moes, strict=True):
            stopped = judge.verified(scenario, moe) if moe.exists() else ""
            if stopped:
                outcomes.append(stopped)
                break
    good = [outcome for outcome in outcomes if outcome in ("no effect", "as good")]
    if reason(UNAVOIDABLE, label) is not None:
        assert outcomes[-1].startswith(("verify broke", *STOPPED)), outcomes
    elif harmless:
        assert good == outcomes or outcomes[-1].startswith(STOPPED), outcomes
    else:
        assert outcomes[-1].startswith(STOPPED), outcomes
        assert len(good) == len(outcomes) - 1, outcomes


def marked(label: str, *values: Any) -> Any:  # noqa: ANN401 - a pytest parameter
    hole = reason(HOLES, label)
    holes = [] if hole is None else [pytest.mark.xfail(strict=True, reason=hole)]
    return pytest.param(label, *values, id=label, marks=holes)


def dense_mutations() -> Iterator[Any]:
    """Of families that differ in kind; tests/test_contracts.py has something for every other."""
    for name in SIZES:
        row = DENSE[name]
        for label, changed in variants(row, row):
            yield marked(f"{name} {label}", name, changed)
    for name, row in DENSE.items():
        for label, changed in _pieces(row.pieces) if row.pieces else ():
            yield marked(f"{name} pieces: {label}", name, replace(row, pieces=changed))


def native_mutations() -> Iterator[Any]:
    """What several rows are made of is changed in the first of them."""
    known: list[Keys] = []
    for name, row in NATIVE.items():
        alike = any(row.keys is keys for keys in known)
        same = ("layouts", "keys", "correction_bias", "shared", "routings") if alike else ()
        for label, changed in variants(row, row):
            if not label.startswith(same):
                yield marked(f"{name} {label}", name, changed)
        known.append(row.keys)


@pytest.mark.parametrize(("label", "name", "changed"), list(dense_mutations()))
def test_a_changed_row_of_a_dense_family(
    judge: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label: str,
    name: str,
    changed: DenseFamily,
) -> None:
    scenarios = piece_scenarios(name) if DENSE[name].pieces else dense_scenarios(name)
    (field_name,) = [
        member.name
        for member in fields(changed)
        if getattr(changed, member.name) is not getattr(DENSE[name], member.name)
    ]
    if field_name == "targets":
        scenarios = (Scenario(name, changed.targets[0]),)
        judge.usual[scenarios[0].name] = ""  # refused, as it must be still, or found out
    judged(judge, label, scenarios, tmp_path, lambda: monkeypatch.setitem(DENSE, name, changed))


@pytest.mark.parametrize(("label", "name", "changed"), list(native_mutations()))
def test_a_changed_row_of_a_target(
    judge: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label: str,
    name: str,
    changed: Target,
) -> None:
    scenarios = native_scenarios(name)
    if label.startswith(f"{name} shared"):
        scenarios += sharing_scenarios(name)
    judged(
        judge,
        label,
        scenarios,
        tmp_path,
        lambda: monkeypatch.setitem(NATIVE, name, changed),
    )


def shipped_labels() -> Iterator[Any]:
    row = shipped(DENSE["nemotron"], "relu2", biased=True)
    for label, _ in variants(row, row):
        yield marked(f"shipped {label}")


@pytest.mark.parametrize("label", list(shipped_labels()))
def test_a_changed_row_of_the_shipped_code(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    wanted = label.removeprefix("shipped ")

    def changed(family: DenseFamily, activation: str, *, biased: bool) -> Target:
        row = shipped(family, activation, biased=biased)
        result: Target = dict(variants(row, row)).get(wanted, row)
        return result

    judged(
        judge,
        label,
        SHIPPED_SCENARIOS,
        tmp_path,
        lambda: monkeypatch.setattr(families, "shipped", changed),
    )


# The arithmetic ----------------------------------------------------------------------------------

BALANCED = {"scale_split": "balanced"}
SCALED = {
    "gated": Scenario("llama", "mixtral", {}, {}, {"granularity": 4, "top_k": 4}),
    "relu2": Scenario(
        "nemotron",
        SHIPPED,
        {},
        {},
        BALANCED | {"routing": Routing.TOPK_SOFTMAX, "granularity": 4, "top_k": 4},
    ),
    "hybrid": Scenario(
        "nemotron_h", "nemotron_h", {}, {}, BALANCED | {"granularity": 4, "top_k": 4}
    ),
    "by the config": Scenario("llama", "glm4_moe"),
    "biased": Scenario(
        "nemotron", SHIPPED, {"mlp_bias": True}, {}, {"routing": Routing.SOFTMAX_TOPK, "top_k": 4}
    ),
}


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("name", ["gated", "relu2", "hybrid"])
def test_a_wrong_degree(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, degree: int
) -> None:
    right = 1 if name == "gated" else 2
    label = f"degree {degree} of {name}"
    if degree == right:
        pytest.skip("it is right")
    judged(
        judge,
        label,
        (SCALED[name],),
        tmp_path,
        lambda: monkeypatch.setattr("upcycle_cli.models.dense.degree", lambda *_: degree),
    )


FACTORS: Mapping[str, Callable[[Factors], Factors]] = {
    "twice up": lambda f: replace(f, up=2 * f.up),
    "half of down": lambda f: replace(f, down=f.down / 2),
    "twice the gate": lambda f: replace(f, gate=2 * f.gate, down=f.down / 2),
    "twice by the config": lambda f: replace(f, config=2 * f.config),
    "none": lambda f: replace(f, up=1.0, down=1.0, config=1.0),
}


@pytest.mark.parametrize("change", FACTORS)
@pytest.mark.parametrize("name", SCALED)
def test_wrong_factors(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    right = Recipe.factors
    label = f"factors of {name}, {change}"

    def wrong(recipe: Recipe, kind: MlpKind) -> Factors:
        return FACTORS[change](right(recipe, kind))

    if change == "twice the gate" and name in ("relu2", "hybrid", "biased"):
        pytest.skip("it has no gate")
    if change == "twice by the config" and name == "gated":
        pytest.skip("its config has no factor")
    judged(
        judge,
        label,
        (SCALED[name],),
        tmp_path,
        lambda: monkeypatch.setattr(Recipe, "factors", wrong),
    )


@pytest.mark.parametrize("name", SCALED)
def test_a_wrong_c(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    judged(
        judge,
        f"c of {name}",
        (SCALED[name],),
        tmp_path,
        lambda: monkeypatch.setattr(Recipe, "_compensation", lambda _: 3.0),
    )


def test_a_wrong_factor_of_a_down_bias(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(
        judge,
        "down bias",
        (SCALED["biased"],),
        tmp_path,
        lambda: monkeypatch.setattr(Recipe, "down_bias_factor", lambda *_: 2.0),
    )
