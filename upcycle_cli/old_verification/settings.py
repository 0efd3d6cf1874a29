"""Settings: does the MoE's config.json say what the dense model's says, to whoever reads it?

Every key is judged. What transformers reads is compared in effect, with each architecture's own
defaults; a key that neither model's architecture has must be the dense model's, since something
else may read it: another engine, a trainer, a later version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import ITEM_BYTES, TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.checkpoint.unsafe_settings import UNSAFE_KEYS, unsafe_config_settings
from upcycle_cli.core.errors import shown
from upcycle_cli.models.layers import BLOCK_KEYS, OLD_BLOCKS, block_types
from upcycle_cli.models.moe import Target
from upcycle_cli.models.wrappers import nested_configs, text_config_of
from upcycle_cli.old_verification.dtypes import kept_wide
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.run.models import Config, TransformersError, load_config, transformers_says

_ABSENT = object()
_ATTENTION = ("full_attention", "sliding_attention")
_JUDGED_BY_OTHERS = frozenset(
    {
        # what the model is, which the two have not in common; and who wrote it
        *("architectures", "dtype", "model_type", "tie_word_embeddings", "torch_dtype"),
        *("transformers_version", "_name_or_path"),
        # what a dense model has no use for
        *("router_aux_loss_coef", "output_router_logits"),
        # in effect and by the letter: `_in_effect`, `_rope_failures`, `_window_failures` and
        # `_value_failures`
        *("head_dim", "layer_types", "max_window_layers", "partial_rotary_factor"),
        *("rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window"),
    }
)


def _num_first(facts: Facts) -> object:
    """Return how many layers are dense where these are the first ones."""
    first, *_ = facts.layers
    return first if facts.layers == (*range(first, facts.num_layers),) else _ABSENT


_FOR_ENGINES: Mapping[str, Callable[[Facts], object]] = {
    "expert_hidden_dim": lambda facts: facts.expert_size,
    "first_k_dense_replace": _num_first,
    "norm_topk_prob": lambda facts: facts.routing != "softmax-topk",
    "qk_norm": lambda _: True,
    "route_norm": lambda _: True,
    "scoring_func": lambda _: "sigmoid",
    "topk_method": lambda _: "noaux_tc",
}
"""Keys that transformers' class of an MoE may lack, and what they must say to who reads them."""


def own_setting_failures(moe: Checkpoint, target: Target, architecture: str) -> Iterator[str]:
    """Name what config.json must not say of any MoE; `architecture` is the class it must name."""
    own = {"auto_map"} if target.ships_code else set()
    wanted, architectures = [architecture], moe.config.get("architectures")
    if architectures != wanted:
        yield f"{CONFIG_NAME}: architectures is {shown(architectures)}, not {wanted!r}"
    text, inside = text_config_of(moe.config), tuple(nested_configs(moe.config))
    for failure in (
        *unsafe_config_settings({key: moe.config[key] for key in moe.config.keys() - own}, inside),
        *_block_failures(text),
        *_rope_failures(text),
        *_value_failures(text),
    ):
        yield f"{CONFIG_NAME}: {failure}"


def setting_failures(facts: Facts) -> Iterator[str]:
    """Name the settings in which the MoE's config.json differs from the dense model's."""
    try:
        dense, moe = load_config(facts.dense.path), load_config(facts.moe.path)
        with transformers_says():  # which has settings that cannot be read, too
            # The reverse is --untie-embeddings; whether its head is right is for the weights check.
            if moe.tie_word_embeddings and not dense.tie_word_embeddings:
                yield _difference("tie_word_embeddings", "true", "false")
            yield from _setting_failures(facts, dense.get_text_config(), moe.get_text_config())
            yield from _outer_failures(facts, dense, moe)
            yield from _dtype_failures(facts)
    except TransformersError as error:
        yield f"transformers cannot read config.json: {error}"


def _setting_failures(facts: Facts, dense: Config, moe: Config) -> Iterator[str]:
    ours = _in_effect(moe)
    for key, value in _in_effect(dense).items():
        if not _same(ours[key], value):
            yield _difference(key, ours[key], value)
    yield from _window_failures(facts, dense, moe)
    keys, shared = facts.target.keys, facts.target.shared
    judged: set[str | None] = {*_JUDGED_BY_OTHERS, *UNSAFE_KEYS, *BLOCK_KEYS}
    size = getattr(moe, "virtual_group_size", 1)
    if size not in (1, facts.group_size):
        yield f"virtual_group_size is {size}, and there are {facts.group_size} experts in a group"
    judged |= {"virtual_group_size"} if facts.target.ships_code else set()
    judged |= {*keys.aliases, keys.num_experts, keys.top_k, keys.expert_size, keys.scale}
    judged |= {*(keys.routing or ())[:1], *facts.target.layers.keys}
    if not facts.target.ships_code:
        # The size of layers that stay dense, which the dense model may derive from what it says.
        size = getattr(moe, "intermediate_size", facts.dense_size)
        of_shared = shared is not None and shared.size_key == "intermediate_size"
        if "intermediate_size" not in judged and not of_shared and size != facts.dense_size:
            yield _difference("intermediate_size", size, facts.dense_size)
        judged.add("intermediate_size")
    judged |= {shared.size_key, shared.count_key, *shared.settings} if shared else set()
    # What the MoE's architecture alone reads shows in the shapes, or in what its twin computes; for
    # training there is `_value_failures`.
    usual = type(moe)()
    own_keys = {*vars(usual), *type(moe).attribute_map}
    judged |= {key for key in own_keys if not hasattr(dense, key)}
    for key in sorted(_FOR_ENGINES.keys() & facts.moe_config.keys() - own_keys - judged):
        value = facts.moe_config[key]
        if not _same(value, _FOR_ENGINES[key](facts)):
            yield f"{CONFIG_NAME}: {key} is {shown(value)}, and engines that read it go wrong"
        judged.add(key)
    for key in {**dense.to_dict(), **facts.dense_config, **facts.moe_config}:
        if key not in judged:
            yield from _key_failures(facts, key, dense, moe, usual)


def _outer_failures(facts: Facts, dense: Config, moe: Config) -> Iterator[str]:
    """Hold what surrounds a text model against what surrounds that of the dense model."""
    if facts.target.inside is None:
        return
    own = {*_JUDGED_BY_OTHERS, *UNSAFE_KEYS, "text_config"}
    # They may be among the wrapper's own settings.
    own |= set() if "text_config" in facts.dense.config else facts.dense_config.keys()
    ours, theirs = (_without_names(config.to_dict()) for config in (moe, dense))
    ours |= facts.moe.config
    theirs |= facts.dense.config
    for key in sorted({*ours, *theirs} - own):
        one, other = (held.get(key, _ABSENT) for held in (ours, theirs))
        if key in nested_configs(facts.moe.config):
            one, other = (_without_names(getattr(config, key).to_dict()) for config in (moe, dense))
        if not _same(one, other):
            yield _difference(key, one, other)


def setting_notes(facts: Facts) -> Iterator[str]:
    """Say what is right, and what some readers still get wrong."""
    config = facts.moe_config
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" not in config:
        yield (
            "Its rope settings are in the notation of transformers 5 alone: older readers take "
            "their default."
        )
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" in kinds and len(set(map(str, kinds))) > 1:
        yield (
            "Some layers have a window and some have none, which transformers 4 does not know of "
            f"{facts.target.model_type}."
        )
    sizes = {ITEM_BYTES[entry.dtype] for entry in facts.moe.tensors.values()}
    if any(facts.expert_size * size % 16 for size in {2, *sizes}):
        yield (
            f"Experts {facts.expert_size} wide have rows of an odd size, which the grouped matrix "
            "product of transformers and others does not take."
        )


def _rope_failures(config: Mapping[str, Any]) -> Iterator[str]:
    """Whichever of the keys a reader takes, it must read the same."""
    written = {key: config[key] for key in ("rope_parameters", "rope_scaling") if key in config}
    inner = {key: _of_all(value) for key, value in written.items() if isinstance(value, dict)}
    for key, settings in inner.items():
        kind, old_kind = (settings.get(name) for name in ("rope_type", "type"))
        if None not in (kind, old_kind) and kind != old_kind:
            yield f"{key} has rope_type {shown(kind)} and type {shown(old_kind)}"
    places = {"": config, **{f"{key}.": settings for key, settings in inner.items()}}
    for key in ("rope_theta", "partial_rotary_factor"):
        said = [(place + key, held[key]) for place, held in places.items() if key in held]
        for place, value in said[1:]:
            first, usual = said[0]
            if value != usual:
                yield f"{first} is {shown(usual)}, but {place} is {shown(value)}"
    kinds = {str(_scaling(value)) for value in written.values()}
    if inner and len(written) == 2 and len(kinds) > 1:
        scaling, parameters = written["rope_scaling"], written["rope_parameters"]
        yield f"rope_scaling is {shown(scaling)}, but rope_parameters is {shown(parameters)}"


def _of_all(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what kinds of layers with settings of their own all have; else what there is."""
    first, *others = rope.values() or [None]
    return first if isinstance(first, dict) and all(other == first for other in others) else rope


def _scaling(value: object) -> dict[str, Any]:
    """Return what stretches rotary embeddings, in one notation; nothing for the plain kind."""
    settings = dict(value) if isinstance(value, dict) else {}
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("rope_theta", None)
    held = {key: item for key, item in settings.items() if item is not None}
    return {} if kind == "default" else dict(sorted((held | {"rope_type": kind}).items()))


def _block_failures(config: Mapping[str, Any]) -> Iterator[str]:
    """Engines read the kinds of a hybrid's layers in the one notation or in the other."""
    try:
        if len({block_types({key: config[key]}) for key in BLOCK_KEYS if config.get(key)}) > 1:
            yield f"{' and '.join(BLOCK_KEYS)} say different things of the layers"
    except ValueError as error:
        yield str(error)


def _value_failures(config: Mapping[str, Any]) -> Iterator[str]:
    """Name values that are none, and what spoils training, which no forward pass shows."""
    for key, (is_fine, words) in _VALUES.items():
        if key in config and not is_fine(config[key]):
            yield f"{key} is {shown(config[key])}, {words}"


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "head_dim": (lambda size: size is None or (type(size) is int and size > 0), "not a size"),
    "router_aux_loss_coef": (
        _is_weight,
        "and a load-balancing loss is added with a weight between 0 and 1",
    ),
    "router_jitter_noise": (
        lambda noise: noise is None or noise == 0,
        "which makes training multiply the MLP's input by noise",
    ),
    **dict.fromkeys(
        ("num_nextn_predict_layers", "num_mtp_layers"),
        (lambda count: not count, "and there are no layers that predict further tokens"),
    ),
    "output_router_logits": (lambda flag: type(flag) is bool, "neither true nor false"),
}
"""What the value of a key may be, and how it is said that it is not that."""


def _in_effect(config: Config) -> dict[str, Any]:
    """Return the settings that each architecture writes down, or derives, its own way."""
    rope = _of_all(getattr(config, "rope_parameters", None) or {})
    head_dim = getattr(config, "head_dim", None)
    return {
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "rope_parameters": {
            key: value
            for key, value in sorted(rope.items())
            if key != "type" and value is not None and (key, value) != ("partial_rotary_factor", 1)
        },
        "per_layer_config": config.to_dict().get("per_layer_config"),
        "sliding_window of each layer": _windows(config),
    }


def _windows(config: Config) -> list[int | None]:
    """Return the window of each layer, None where it sees all; as each architecture reads it."""
    own = type(config)()
    window = config.sliding_window if hasattr(own, "sliding_window") else None
    # An architecture whose layers can differ has the kind of each; the others read the one window.
    if window is None or not hasattr(own, "layer_types"):
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def _window_failures(facts: Facts, dense: Config, moe: Config) -> Iterator[str]:
    """What is written of windows must fit the effect, for readers that take one key alone."""
    windows = _windows(moe)
    sliding = [layer for layer, window in enumerate(windows) if window is not None]
    by_window = ["full_attention" if window is None else "sliding_attention" for window in windows]
    # A layer of another kind is what it is in the dense model.
    theirs = getattr(dense, "layer_types", None) or by_window
    kinds = [
        mine if kind in _ATTENTION else kind for mine, kind in zip(by_window, theirs, strict=True)
    ]
    implied = {
        "use_sliding_window": bool(sliding),
        "sliding_window": windows[sliding[0]] if sliding else None,
        "max_window_layers": sliding[0] if sliding else len(windows),
        "layer_types": kinds,
    }
    usual = type(moe)()
    for key, value in implied.items():
        by_moe = hasattr(usual, key)
        # Where there are windows, every key is needed: each has a default of its own.
        written = facts.moe_config.get(key, None if sliding and by_moe else value)
        if key == "sliding_window":
            written = written or None  # transformers writes 0 where there is none
        if key == "layer_types" and isinstance(written, list):
            written = [OLD_BLOCKS.get(str(kind), kind) for kind in written]
        # What neither architecture reads may have come from the dense model.
        kept = _same(written, facts.dense_config.get(key, _ABSENT))
        kept = kept and (not by_moe or type(dense) in type(moe).__mro__[:2])
        if not kept and not _same(written, value):
            made = f"and the windows of the layers make it {shown(value)}"
            yield f"{CONFIG_NAME}: {key} is {shown(written)}, {made}"


def _key_failures(
    facts: Facts, key: str, dense: Config, moe: Config, usual: Config
) -> Iterator[str]:
    """Judge one key by transformers' configs; `usual` is what the MoE's type has by itself."""
    written, original = (held.get(key, _ABSENT) for held in (facts.moe_config, facts.dense_config))
    ours, theirs, default = (getattr(config, key, _ABSENT) for config in (moe, dense, usual))
    if theirs is not _ABSENT and ours is not _ABSENT:
        if not _same(ours, theirs):
            yield _difference(key, ours, theirs)
    elif written is not _ABSENT and not _same(written, original) and not _same(written, default):
        # Not even what transformers adds by itself when it saves such a model again.
        yield (
            f"{CONFIG_NAME}: {key} is {shown(written)}, and the dense model has no such setting: "
            "nothing tells what reads it"
        )


def _difference(key: str, ours: object, theirs: object) -> str:
    return (
        f"{key} is {_words(ours)} by the MoE's config.json, {_words(theirs)} by the dense model's"
    )


def _words(value: object) -> str:
    return "absent" if value is None else value if isinstance(value, str) else shown(value)


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _dtype_failures(facts: Facts) -> Iterator[str]:
    """A config may keep the dense model's dtype, or state its own tensors'; loaders obey it."""
    wide, tensors = kept_wide(facts), facts.moe.tensors
    stored = {TORCH_DTYPES.get(entry.dtype) for name, entry in tensors.items() if name not in wide}
    kept = (facts.dense.config.get("dtype"), facts.dense.config.get("torch_dtype"))
    for key in ("dtype", "torch_dtype"):
        value = facts.moe.config.get(key)
        if value is not None and value not in kept and stored != {value}:
            yield f"{CONFIG_NAME}: {key} is {shown(value)}, which is not the dtype of all tensors"


def _without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config but for what the model is called, who wrote it, and how it was loaded."""
    names = ("architectures", "model_type", "transformers_version", "_name_or_path", "dtype")
    return {key: value for key, value in config.items() if key not in names}
