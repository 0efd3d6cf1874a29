"""Find the rows for a config: a source's dense family and its target, or the target of an MoE."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import any_of, choose_from
from upcycle_cli.models import wrappers
from upcycle_cli.models.defaults import defaults_of, table
from upcycle_cli.models.dense import DenseFamily, DenseModel, Pieces, read_dense
from upcycle_cli.models.dense_rows import DENSE, TEXTS
from upcycle_cli.models.layers import MOE_LAYERS, parse_layers
from upcycle_cli.models.mlp import parts_of, stacked
from upcycle_cli.models.moe import Keys, MoeBlock, Target
from upcycle_cli.models.moe_rows import GROW_ONLY, NATIVE, WRAPPED_TARGETS
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout, Routing

REFUSED: Mapping[str, str] = table("refused")
"""Dense model types that are not supported, with reasons: "X cannot be upcycled: …"."""
_WITH_QK_NORM = ("qwen3_moe", "olmoe", "dots1", "hy_v3", "mellum")
_INEXACT: Mapping[str, str] = {
    **dict.fromkeys(_WITH_QK_NORM, "it always normalises queries and keys (QK norm)"),
    "gpt_oss": "it clamps the gates of its experts",
    "deepseek_v3": "all its heads share one rotary key",
}
"""MoE types that models without QK norm cannot become, with reasons."""
_HINT = "`upcycle families` lists the supported model types."
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")

GROWABLE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe", "olmoe", "flex_olmo"),
    *("deepseek_v3", "dots1", "solar_open"),
)
"""The MoE types that can be grown: it replaces experts, routers and a few config keys."""


def dense_family(config: Mapping[str, Any], names: Collection[str] = ()) -> DenseFamily:
    """Return the family of a dense config, or of a wrapper's text model.

    `names` are the source's tensors, which show the name prefixes of a wrapper. Raises UpcycleError
    for an MoE or an unsupported model type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UpcycleError("config.json has no model_type.", _HINT)
    if is_moe(config):
        raise UpcycleError(
            f"this is a mixture of experts already (model_type {model_type}).",
            "Only a dense model can be upcycled. To double the experts of this one, use "
            "`Growth(expand=2)` instead of a recipe.",
        )
    is_wrapper = wrappers.wrapper_of(config) is not None
    if model_type not in DENSE and not is_wrapper:
        why = f": {REFUSED[model_type]}." if model_type in REFUSED else " yet."
        has_code = model_type not in REFUSED and "auto_map" in config
        hint = _HINT + " Try its release for transformers, often named NAME-hf." * has_code
        raise UpcycleError(f"model type '{model_type}' cannot be upcycled{why}", hint)
    return family_of(config, names)


def dense_model(config: Mapping[str, Any], names: Collection[str] = ()) -> DenseModel:
    """Return the model of a dense config; see `dense_family` for `names` and errors."""
    return read_dense(dense_family(config, names), wrappers.text_config_of(config))


def targets_of(family: DenseFamily) -> tuple[str, ...]:
    """Return the targets of a family; the one that most software loads comes first."""
    ships = family.can_ship_code and SHIPPED not in family.targets
    return (*family.targets, SHIPPED) if ships else family.targets


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a config's model type or its wrapper has a row."""
    return str(config.get("model_type")) in DENSE or wrappers.wrapper_of(config) is not None


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether a config describes an MoE of any architecture."""
    config = wrappers.text_config_of(config)
    model_type = str(config.get("model_type"))
    if model_type in DENSE and model_type in NATIVE:
        try:
            return bool(NATIVE[model_type].moe_layers(config, 1))
        except UpcycleError:
            return False  # reading the dense config raises this error again
    if config.get("is_moe") is False:
        return False
    return is_target(config) or any(config.get(key) for key in _EXPERT_COUNTS)


def is_target(config: Mapping[str, Any]) -> bool:
    """Whether an MoE config is of a type that upcycle creates or expands."""
    model_type = str(config.get("model_type"))
    if model_type in GROW_ONLY:
        return True
    wrapper = wrappers.wrapper_of(config)
    if wrapper is not None:
        text_type = wrappers.text_config_of(config)["model_type"]
        if model_type == wrapper.upcycled:
            return text_type in wrapper.texts
        is_native = text_type in wrapper.natives and model_type == wrapper.native
        return is_native and (text_type not in wrapper.texts or is_moe(config))
    if model_type in NATIVE:
        return model_type not in DENSE or is_moe(config)
    name = model_type.removeprefix(UPCYCLED_PREFIX)
    return name != model_type and name in DENSE and DENSE[name].can_ship_code


def target_of(config: Mapping[str, Any], names: Collection[str]) -> Target:
    """Return the target row of an MoE, for which `is_target` must hold; `names` are its tensors.

    Raises UpcycleError if the config of shipped code has invalid values.
    """
    model_type = str(config["model_type"])
    wrapper = wrappers.wrapper_of(config)
    if wrapper is not None and model_type != wrapper.upcycled:
        text_type = wrappers.text_config_of(config)["model_type"]
        return native_target(text_type, wrapper.inside(names))
    released = {**NATIVE, **GROW_ONLY}.get(model_type)
    if released is not None:
        # Released names win if a checkpoint has both; the in-memory names are then surplus.
        rows = released, replace(released, layer=wrappers.LAYER_PREFIX)
        found = (row for row in rows if any(name.startswith(row.name_prefix) for name in names))
        return next(found, released)
    family = family_of(config, names)
    activation = read_dense(family, wrappers.text_config_of(config)).activation
    biased = any(name.endswith("_proj_bias") and family.has(name) for name in names)
    return shipped_target(family, activation, biased=biased)


def native_target(name: str, inside: wrappers.Inside | None) -> Target:
    """Return the row of an architecture of transformers, inside its wrapper if it has one."""
    target = WRAPPED_TARGETS[name] if name in WRAPPED_TARGETS else NATIVE[name]
    if inside is None:
        return target
    layer, head = inside.wrapped(target.layer), inside.wrapped(target.head)
    return replace(target, layer=layer, head=head, inside=inside)


def shipped_target(family: DenseFamily, activation: str, *, biased: bool) -> Target:
    """Return the row of shipped code for a family; `biased` says whether its MLPs have biases.

    A wrapper's tensors get in-memory names, since transformers renames none for remote code.
    """
    if family.inside is not None:
        family = _inside(TEXTS[family.model_type], wrappers.Inside(family.inside.wrapper))
    gated = "gate" in parts_of(family.mlp)
    swiglu = gated and activation in ("silu", "swish") and not biased
    module = family.mlp[0].name.split(".")[0]
    # vLLM replaces any child named `experts` by its own SwiGLU.
    prefix = f"{module}.{'experts' if swiglu else 'expert_mlps'}"
    layout = MoeBlock(
        experts=stacked(
            prefix, gated=gated, biases=biased, transposed=family.mlp[0].split_dim == 1
        ),
        router=f"{module}.gate.weight",
        correction_bias=f"{module}.gate.e_score_correction_bias",
    )
    return Target(
        model_type=f"{UPCYCLED_PREFIX}{family.model_type}",
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK),
        layouts={ExpertLayout.FUSED: layout},
        keys=Keys(
            renamed=family.keys,
            routing=("routing", {str(routing): routing for routing in Routing}),
            scale="routed_scaling_factor",
        ),
        layers=MOE_LAYERS,
        layer=family.root + wrappers.replace_parts(family.layer, family.renamed),
        head=wrappers.replace_parts(family.head, family.renamed),
        inside=family.inside,
    )


def family_of(config: Mapping[str, Any], names: Collection[str] = ()) -> DenseFamily:
    """Return the dense family of a dense model, or of a model with shipped code.

    Tensor names of a wrapper's text model are those of its checkpoint, which has the tensors
    `names`.
    """
    wrapper = wrappers.wrapper_of(config)
    if wrapper is None:
        row = DENSE[str(config["model_type"]).removeprefix(UPCYCLED_PREFIX)]
        root, inner, _ = row.layer.split(".", 2)
        first = {name.partition(".")[0] for name in names}
        if inner not in first or root in first or row.layer == wrappers.LAYER_PREFIX:
            return row
        layer, embedding = (name.partition(".")[2] for name in (row.layer, row.embedding))
        return replace(row, layer=layer, embedding=embedding, root=f"{root}.")
    text_type = wrappers.text_config_of(config)["model_type"]
    if text_type not in wrapper.texts:
        words = f"{wrapper.model_type} around a text model of type {shown(text_type)} cannot"
        hint = f"The text model of {wrapper.model_type} can be {any_of(wrapper.texts)}."
        raise UpcycleError(f"{words} be upcycled yet.", hint)
    return _inside(TEXTS[text_type], wrapper.inside(names))


def wrapped_families() -> Mapping[str, Mapping[str, DenseFamily]]:
    """Return the rows of all text models inside wrappers: by wrapper, then by text model type."""
    return {
        name: {t: _inside(TEXTS[t], row.inside()) for t in row.texts}
        for name, row in sorted(wrappers.WRAPPERS.items())
    }


def _inside(row: DenseFamily, inside: wrappers.Inside) -> DenseFamily:
    return replace(
        row,
        layer=inside.wrapped(row.layer),
        embedding=inside.wrapped(row.embedding),
        head=inside.wrapped(row.head),
        targets=tuple(target for target in row.targets if target in inside.wrapper.natives),
        inside=inside,
    )


def growable(config: Mapping[str, Any], names: Collection[str]) -> Target:
    """Return the row of an MoE that can be grown; `names` are its tensors.

    Raises UpcycleError for a dense model, and if copied experts would be inexact.
    """
    model_type = config.get("model_type")
    if not is_moe(config):
        words = f"`expand` needs a mixture of experts, and this is a dense {model_type} model."
        raise UpcycleError(words, "Upcycle it first, with a recipe such as E8G1T2.")
    if model_type not in GROWABLE or wrappers.wrapper_of(config) is not None:
        words = f"a mixture of experts of model type {model_type} cannot be grown yet."
        raise UpcycleError(words, f"These can: {', '.join(GROWABLE)}.")
    target = target_of(config, names)
    groups, chosen = (target.value(config, key) for key in ("n_group", "topk_group"))
    if groups not in (None, 1) and groups != chosen:
        # The score of a group is the sum of its two best experts, which would be two copies.
        raise UpcycleError(
            f"tokens choose {chosen} of {groups} groups of experts (n_group, topk_group) by the "
            "two best experts of each group. With copied experts they would choose other groups.",
            "Only models with one group, or with all groups chosen, can be grown.",
        )
    return target


@dataclass(frozen=True, repr=False)
class Family(Compact):
    """A dense model and the target that it becomes."""

    dense: DenseModel
    target: Target
    layers: tuple[int, ...]
    """The layers that become mixtures of experts."""

    @property
    def choice(self) -> str:
        """The value of `target`."""
        return SHIPPED if self.target.ships_code else self.target.model_type

    @property
    def pieces(self) -> Pieces:
        """Dense tensors that the target stores as several; none for shipped code."""
        return {} if self.target.ships_code else self.dense.family.pieces

    def name(self, source: str) -> str:
        """Return the name in the target of a dense tensor that is copied."""
        here, there = self.dense.family.inside, self.target.inside
        if here is not None and there is not None:
            source = here.moved(source, there)
        root = "" if source == self.dense.family.head else self.dense.family.root
        return root + wrappers.replace_parts(source, self.dense.family.renamed)


def choose(
    config: Mapping[str, Any],
    target: str,
    routing: str | None,
    *,
    layers: str | None = None,
    names: Collection[str] = (),
    shared_experts: int = 0,
) -> Family:
    """Return the family of a source config and a target; "auto" takes the first possible one.

    `names` are the source's tensors. Raises UpcycleError with the reasons if none is possible.
    """
    dense = dense_model(config, names)
    family = dense.family
    chosen = parse_layers(layers, dense.mlp_layers, dense.num_layers)
    options = targets_of(family)
    if target not in ("auto", *options):
        plain = dense.shapes and not dense.has("self_attn.q_norm.weight")
        why = f": {_INEXACT[target]}" if plain and target in _INEXACT else ""
        what = f"{family.title} cannot become {target!r}{why}."
        raise UpcycleError(what, choose_from(target, ("auto", *options)))
    mlp = dense.mlp({*dense.shapes, *names}, next(iter(dense.mlp_layers), 0))
    biased = any(weight.is_bias for weight in mlp)
    reasons: dict[str, str] = {}
    for name in options:
        if name == SHIPPED:
            row = shipped_target(family, dense.activation, biased=biased)
        else:
            row = native_target(name, family.inside)
        reason = _objection(row, dense, routing, chosen, biased, shared_experts)
        if reason is not None:
            reasons[name] = reason
        elif target in ("auto", name):
            return Family(dense, row, chosen)
    able = [name for name in options if name not in reasons]
    shown = reasons if target == "auto" else {target: reasons[target]}
    raise UpcycleError(
        " ".join(f"{name} cannot express this model: {why}." for name, why in shown.items()),
        f"{' or '.join(able)} can: use `target` {able[0]}." if able else "No target can yet.",
    )


def _objection(
    target: Target,
    dense: DenseModel,
    routing: str | None,
    layers: Sequence[int],
    biased: bool,  # noqa: FBT001
    shared_experts: int,
) -> str | None:
    """Return why a target cannot express a model, or None if it can."""
    if routing is not None and routing not in target.routings:
        return f"it has no {routing} routing"
    if not dense.mlp_layers:
        return "the model has no layer with a dense MLP"
    if biased and not target.ships_code:
        return "the model's MLPs have biases, but the target's experts have none"
    for name, reason in target.unsupported_tensors.items():
        if dense.has(name):
            return reason
    found = (
        _attention_objection(target, dense)
        or target.refusal(dense)
        or target.layers.objection(layers, dense.kinds)
    )
    if found is not None or not shared_experts:
        return found
    shared = target.shared
    return "it has no shared expert" if shared is None else shared.objection(shared_experts)


def _attention_objection(target: Target, dense: DenseModel) -> str | None:
    """Return which setting of attention the target's config has no key for, or None."""
    known, windows = defaults_of(target.model_type), {*dense.windows}
    if target.ships_code or target.model_type == dense.model_type:
        return None
    # No text is longer than max_position_embeddings, so a window as long hides nothing.
    slides = any(window and window < dense.values["max_position_embeddings"] for window in windows)
    if dense.rotary_share != 1.0 and "partial_rotary_factor" not in known:
        return "only a part of each head is rotated, but the target rotates whole heads"
    if slides and "sliding_window" not in known:
        return "some layers have a sliding window, but the target supports none"
    if len(windows) > 1 and "layer_types" not in known:
        return "only some layers have a sliding window, but the target treats all layers alike"
    return None
