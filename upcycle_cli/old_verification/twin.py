"""Small twins: do a model's settings compute what the dense model's do?

Both configs are made small, but for what they say of attention, positions and layers, and the two
models are given the same random weights. Then the same text must give the same logits. What is
taken for granted of the dense MLP is measured on its twin, too: the norm before it, and what
scaling does to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from upcycle_cli.models.mlp import find_weight, locate
from upcycle_cli.models.wrapper import IN_MEMORY_PREFIXES, Inside
from upcycle_cli.old_verification.copies import changed_form
from upcycle_cli.old_verification.dtypes import shared_tensors
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.run.models import (
    Config,
    Model,
    TransformersError,
    decoder_layers,
    empty_model,
    load_config,
    names_on_disk,
    shorten,
    transformers_says,
)

_WIDTH = 32
_EXPERT_WIDTH = 24
"""Of experts where it must tell which way a matrix lies."""
_VOCAB = 64
_TOKENS = 48
_FIRST_WINDOW = 8
_MOST_GROUPS, _MOST_HEADS = 2, 4
_MOST_DIFFERENCE = 1e-4
"""Relative to the largest logit; rounding alone costs a thousandth of it."""


def twin_failures(facts: Facts) -> Iterator[str]:
    """Say where the dense MLP or the experts are not what they are taken for, or twins differ.

    Where both are of one type, the settings compared key by key say the latter.
    """
    alike = facts.target.ships_code or facts.target.model_type == facts.family.model_type
    try:
        # Each is made small in a way of its own.
        mlp_config, dense_config = (load_config(facts.dense.path) for _ in range(2))
        layout_config, moe_config = (load_config(facts.moe.path) for _ in range(2))
        with transformers_says():
            yield from _mlp_failures(facts, mlp_config.get_text_config())
            yield from _layout_failures(facts, layout_config)
            if not alike:
                yield from _compare(facts, dense_config, moe_config)
    except TransformersError as error:
        yield f"small models with these settings cannot be compared: {error}"


def _layout_failures(facts: Facts, config: Config) -> Iterator[str]:
    """Say where transformers takes a part of an expert from another place than the rows say."""
    in_memory = facts.target.in_memory
    if facts.layout == in_memory:
        return  # the one tensor of a layer is taken as it is
    layer, text = facts.layers[0], config.get_text_config()
    _shrink_experts(facts, text, _EXPERT_WIDTH)
    shorten(text, layer + 1)
    model = empty_model(text, "cpu")
    _fill(model)
    module = decoder_layers(model)[layer]
    turned = tuple(weight.name for weight in facts.target.transposed_weights(facts.layout))
    written = _written(facts.target.inside, config, model, turned)
    for part in facts.parts:
        for expert in range(2):
            found, spot = (
                locate(weights, part, width=_EXPERT_WIDTH, expert=expert)
                for weights in (in_memory.experts, facts.layout.experts)
            )
            # What lies the other way comes back as transformers takes it.
            spot = found if spot.tensor in turned else spot
            name = facts.target.prefix(layer) + spot.tensor
            held = written.get(name)
            wanted = module.get_parameter(found.tensor)[found.index]
            if held is None or not torch.equal(held[spot.index], wanted):
                yield f"transformers does not take the {part} of expert {expert} from {name}"


def _shrink_experts(facts: Facts, config: Config, width: int = _WIDTH) -> None:
    _shrink(config, width)
    keys = facts.target.keys
    sizes = dict.fromkeys((keys.dense_size, keys.expert_size), width)
    for key, value in {keys.num_experts: 2, keys.top_k: 2, **sizes}.items():
        setattr(config, key, value)


def _width(facts: Facts, model: Model) -> int:
    """Return the intermediate size of a dense model, which some derive from their config's."""
    row = facts.dense_mlp[0]
    assert row.split_dim is not None
    held = decoder_layers(model)[facts.layers[0]].get_parameter(row.name)
    return int(held.shape[row.split_dim]) // len(row.parts)


def _shrink(config: Config, width: int = _WIDTH) -> None:
    """Make a model small, and leave what tells two models apart."""
    head_dim = getattr(config, "head_dim", None)
    config.head_dim = head_dim or config.hidden_size // config.num_attention_heads
    config.num_attention_heads //= config.num_key_value_heads
    config.num_key_value_heads = 1
    config.vocab_size, config.hidden_size, config.intermediate_size = _VOCAB, _WIDTH, width
    config.pad_token_id = None


def _shrink_but_heads(facts: Facts, config: Config) -> None:
    """Make a model small, and leave the sizes that attention of some kind could insist on."""
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = None
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = _VOCAB
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    key = facts.family.key("num_key_value_heads")
    groups = getattr(config, key, None) or heads
    few = min(groups, _MOST_HEADS if groups == heads else _MOST_GROUPS)
    heads_make_it = not head_dim or heads * head_dim == config.hidden_size
    head_dim = head_dim or config.hidden_size // heads
    config.num_attention_heads = heads // groups * few
    if hasattr(config, key):
        setattr(config, key, few)
    config.hidden_size = config.num_attention_heads * head_dim if heads_make_it else _WIDTH
    if hasattr(config, "mamba_expand"):  # its heads make up so many times the hidden size
        config.mamba_n_heads = config.mamba_n_groups
        config.mamba_d_head = config.mamba_expand * config.hidden_size // config.mamba_n_heads
    config.vocab_size, config.pad_token_id = _VOCAB, 0
    setattr(config, facts.family.key("intermediate_size"), _WIDTH)


def _written(
    inside: Inside | None, config: Config, text: Model, turned: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the tensors of a text model by the names that they have in a checkpoint.

    `config` is of the whole, which may say more of their names than the text model by itself. Those
    whose names end with one of `turned` are given to transformers the other way.
    """
    state = text.state_dict()
    state |= {name: held.mT.contiguous() for name, held in state.items() if name.endswith(turned)}
    if inside is None:
        return names_on_disk(text, state)
    loaded, released = (
        Inside(inside.wrapper, form) for form in (IN_MEMORY_PREFIXES, inside.wrapper.released)
    )
    held = {loaded.wrapped(name): tensor for name, tensor in state.items()}
    written = names_on_disk(empty_model(config, "meta"), held)
    return {released.moved(name, inside): tensor for name, tensor in written.items()}


def _compare(facts: Facts, dense_outer: Config, moe_outer: Config) -> Iterator[str]:
    dense_config, moe_config = (outer.get_text_config() for outer in (dense_outer, moe_outer))
    for outer in (dense_outer, moe_outer):
        # Of a text model inside of another, the latter says it.
        outer.get_text_config().tie_word_embeddings = outer.tie_word_embeddings
    # Beyond what rotary embeddings were made for, where a stretched kind goes another way.
    far = max(_longest(config) for config in (dense_config, moe_config))
    _shrink_windows(dense_config, moe_config)
    _shrink(dense_config)
    dense = empty_model(dense_config, "cpu")
    _shrink_experts(facts, moe_config, _width(facts, dense))
    moe = empty_model(moe_config, "cpu")
    _fill(dense)
    _fill(moe)
    held = _written(facts.family.inside, dense_outer, dense)
    inside, own = facts.target.inside, moe.state_dict()
    if inside is not None:
        own = {inside.wrapped(name): tensor for name, tensor in own.items()}
    lacking = _share_weights(facts, held, own, dense)
    if lacking is not None:
        yield f"by its settings the MoE has another {lacking} than the dense model"
        return
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(_VOCAB, (1, _TOKENS), generator=generator)
    for start in (0, far):
        positions = torch.arange(start, start + _TOKENS)[None]
        wanted, found = (_logits(model, ids, positions) for model in (dense, moe))
        difference = float((wanted - found).abs().max() / wanted.abs().max())
        if not difference < _MOST_DIFFERENCE:
            where = " beyond the positions that it was made for" if start else ""
            yield (
                "a small model with the MoE's settings computes something else than one with the "
                f"dense model's{where} (their logits differ by {difference:.1%})"
            )
            return


def _longest(config: Config) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or 0
    return int(max(config.max_position_embeddings, original)) + 1


def _shrink_windows(*configs: Config) -> None:
    """Make windows shorter than the text, and different ones different still."""
    held = [getattr(config, "sliding_window", None) for config in configs]
    distinct = sorted({*filter(None, held)})
    small = {window: _FIRST_WINDOW + 3 * index for index, window in enumerate(distinct)}
    for config, window in zip(configs, held, strict=True):
        if window:
            config.sliding_window = small[window]


def _fill(model: Model) -> None:
    """Give a model random weights that all matter to its logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embed" in name else 0.3
        parameter.data = noise * scale + (1.0 if parameter.dim() == 1 else 0.0)


def _share_weights(
    facts: Facts, held: dict[str, Any], own: dict[str, Any], dense: Model
) -> str | None:
    """Give the MoE's tensors (`own`) the dense model's (`held`); return the name of a misfit."""
    width = _width(facts, dense)
    copied: dict[str, Any] = {}
    for name, copies in changed_form(facts, held, dense.config).items():
        source = held.pop(name)
        copied |= {copy.name: copy.of(source) for copy in copies}
    made = {
        name for layer in facts.layers for name in _share_experts(facts, held, own, layer, width)
    }
    here, there = facts.family.inside, facts.target.inside
    kept = {name: tensor for name, tensor in held.items() if name not in facts.became}
    if here is not None and there is not None:
        kept = {here.moved(name, there): tensor for name, tensor in kept.items()}
    kept |= copied
    for name, tensor in own.items():
        if name in made:
            continue
        source = kept.get(name)
        if source is None and name.endswith("bias"):
            source = torch.zeros_like(tensor)  # which the dense model lacks, and the MoE has zero
        if source is None or source.shape != tensor.shape:
            return str(name)
        tensor.copy_(source)
    return min(kept.keys() - own.keys(), default=None)


def _share_experts(
    facts: Facts, held: dict[str, Any], own: dict[str, Any], layer: int, width: int
) -> set[str]:
    """Make each expert the dense MLP; return the names of what belongs to a layer's experts."""
    target, prefix = facts.target, facts.target.prefix(layer)
    layout = target.in_memory
    made = {prefix + layout.router}
    for part in facts.kind.matrices:
        source = locate(facts.dense_mlp, part, width=width)
        whole = held[facts.family.layer.format(layer=layer) + source.tensor][source.index]
        scale = facts.gate_scale if part == "down" else 1.0
        for expert in range(2):
            found = locate(layout.experts, part, width=width, expert=expert)
            made.add(prefix + found.tensor)
            own[prefix + found.tensor][found.index] = whole / scale
    for name, weight, _ in shared_tensors(facts, layer, layout):
        made.add(name)
        if weight is not None and weight.parts == ("down",):
            own[name].zero_()
    return made


@torch.no_grad()
def _logits(model: Model, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=ids, position_ids=positions, use_cache=False)
    # A text model that is nothing but a part of another has no head.
    found: torch.Tensor = output[0] if "logits" not in output else output.logits
    return found[0].double()


def _mlp_failures(facts: Facts, config: Config) -> Iterator[str]:
    family = facts.family
    _shrink_but_heads(facts, config)
    shorten(config, facts.layers[0] + 1)
    model = empty_model(config, "cpu")
    _fill(model)
    layer = decoder_layers(model)[-1]
    mlp = layer.get_submodule(family.mlp[0].name.split(".")[0])
    seen: dict[str, torch.Tensor] = {}
    for name, module in layer.named_modules():
        if getattr(getattr(module, "weight", None), "dim", int)() == 1:
            module.register_forward_hook(
                lambda _, __, output, name=name: seen.update({name: output})
            )
    mlp.register_forward_hook(lambda _, inputs, __: seen.update({"": inputs[0]}))
    _logits(model, torch.arange(_TOKENS)[None], torch.arange(_TOKENS)[None])
    x_SH = seen.pop("")
    feeding = [f"{name}.weight" for name, output in seen.items() if torch.equal(output, x_SH)]
    gamma = facts.gamma_name(facts.layers[0])
    norm = None if gamma is None else gamma.removeprefix(family.layer.format(layer=facts.layers[0]))
    if feeding != ([] if norm is None else [norm]):
        yield f"the MLP of {family.model_type} is fed by {feeding or 'no norm'}, not {norm}"
    elif norm is not None:
        # With nothing added to it, a weight of zero lets nothing through.
        module = layer.get_submodule(feeding[0].removesuffix(".weight"))
        module.weight.data.fill_(-family.norm_offset)
        with torch.no_grad():
            out_SH = module(torch.randn(4, x_SH.shape[-1]))
        if float((out_SH - out_SH[:1]).abs().max()) > 0:
            yield f"the norm before the MLP does not add {family.norm_offset:g} to its weight"
    degree = _degree(facts, mlp, x_SH)
    if degree != facts.kind.degree:
        yield (
            f"twice its up matrix makes the MLP of {family.model_type} {2**degree} times as large, "
            f"and it is taken to be {2**facts.kind.degree}"
            if degree
            else f"the MLP of {family.model_type} does not scale with its up matrix"
        )


def _degree(facts: Facts, mlp: Model, x_SH: torch.Tensor) -> int:
    """Return d where twice the up matrix makes the MLP's output 2**d as large, else 0."""
    row = find_weight(facts.dense_mlp, "up")
    weight = mlp.get_parameter(row.name.split(".", 1)[1])
    assert row.split_dim is not None
    # Some derive it from the size that their config gives.
    found = locate(facts.dense_mlp, "up", width=weight.shape[row.split_dim] // len(row.parts))
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        before = mlp(x_SH).double()
        weight[found.index] *= 2
        ratio = float(mlp(x_SH).double().norm() / before.norm())
    return next((d for d in (1, 2) if math.isclose(ratio, 2.0**d, rel_tol=1e-5)), 0)
