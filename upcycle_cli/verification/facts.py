"""What is known of a dense model and its MoE before a weight is read.

Sizes come from the dense model's tensors and the MoE's config.json, the recipe from `upcycle.json`
where there is one. The formulas here are verification's own: they repeat the method's few lines of
arithmetic instead of importing the converter's, so that an error there is seen here.

Legend: N experts, E expansion (groups), G granularity (shards), T top-k, L layers, H hidden size,
I dense intermediate size, N = E·G.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from types import EllipsisType
from typing import Any

from upcycle_cli.checkpoint import (
    CONFIG_NAME,
    RECORD_NAME,
    TORCH_DTYPES,
    Checkpoint,
    TensorEntry,
    read_json,
)
from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.families import DENSE
from upcycle_cli.families.target import Target

MATRICES = ("gate", "up", "down")
"""The three matrices of a gated MLP, down(act(gate·x) ⊙ up·x)."""

EMBEDDING = "model.embed_tokens.weight"

SOFTMAX_TOPK = "softmax-topk"
TOPK_SOFTMAX = "topk-softmax"

_MLP_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
APPROXIMATE_LOGIT_STD = 0.05
"""Above this standard deviation of the router's logits, gates that are nearly equal are not."""

_SAMPLE_SPREAD = 1.5
"""The deviation of a small sample can be this much larger than that it was drawn with."""
_SAME = 1e-6  # relative; factors are stated in double precision


class DamagedError(UpcycleError):
    """The MoE contradicts itself or the dense model so far that no other check can run."""


class Promise(StrEnum):
    """What the MoE owes the dense model."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class RecipeClaim:
    """A recipe as `upcycle.json` records it, or as it is assumed to have been."""

    expansion: int
    granularity: int
    top_k: int
    routing: str
    scaling: str | float = "exact"
    scale_split: str = "balanced"
    virtual_groups: bool = True
    router_logit_std: float | None = None
    """None when nothing says it: then it is measured."""

    @property
    def num_experts(self) -> int:
        """N = E·G."""
        return self.expansion * self.granularity

    @property
    def needed_c(self) -> float:
        """The factor that the gates take away, and the experts must give back."""
        if self.routing == TOPK_SOFTMAX:
            return float(self.granularity)
        return self.expansion * self.granularity**2 / self.top_k

    @property
    def claimed_c(self) -> float:
        """The factor that the scaling sets out to make."""
        return float(self.scaling) if isinstance(self.scaling, float) else self.needed_c

    def objection(self) -> str | None:
        """Say why this recipe promises no equality, or None when it promises some."""
        c = self.needed_c
        if self.top_k % self.granularity:
            return (
                f"top-k {self.top_k} is not a multiple of granularity {self.granularity}, "
                "so every token misses some shards of the dense MLP"
            )
        if not self.virtual_groups and self.granularity > 1:
            return (
                "without virtual groups the chosen experts need not hold every shard of the "
                "dense MLP"
            )
        if self.scaling == "paper" and not math.isclose(c, 1.0):
            return "scaling paper also scales the gate of SwiGLU, which is not linear in it"
        if self.scaling == "none" and not math.isclose(c, 1.0):
            return f"scaling none leaves the MLP's output too small by a factor of {c:g}"
        if not math.isclose(self.claimed_c, c, rel_tol=_SAME):
            return f"the scale was set to {self.claimed_c:g}, and the routing needs {c:g}"
        return self._logit_objection()

    def _logit_objection(self) -> str | None:
        std = self.router_logit_std
        if not self.uniform and std is not None and std > APPROXIMATE_LOGIT_STD:
            return (
                f"the router's logits are too large (standard deviation {std:.3g}, more than "
                f"{APPROXIMATE_LOGIT_STD:g}) for the recipe to promise anything, so the "
                "difference is only measured"
            )
        return None

    @property
    def uniform(self) -> bool:
        """Whether the gates of any whole groups sum to what the scale makes up for, exactly."""
        # With every expert chosen, the softmax over all is the softmax over the chosen.
        return self.routing == TOPK_SOFTMAX or self.top_k == self.num_experts

    @property
    def promise(self) -> Promise:
        """What a model made by this recipe owes the dense one."""
        if self.objection() is not None:
            return Promise.NONE
        return Promise.EXACT if self.uniform else Promise.APPROXIMATE

    def scaling_failure(self, factors: Mapping[str, float], c: float, origin: str) -> str | None:
        """Say what is wrong with the factors of gate, up and down, or None.

        `c` is the factor that is needed, and `origin` says what needs it.
        """
        wanted = float(self.scaling) if isinstance(self.scaling, float) else c
        if self.scaling in ("paper", "none"):
            each = 1.0 if self.scaling == "none" else math.cbrt(wanted)
            for matrix in MATRICES:
                if not math.isclose(factors[matrix], each, rel_tol=_SAME):
                    return (
                        f"the factor of {matrix} is {factors[matrix]:.7g}, but scaling "
                        f"{self.scaling} with c = {wanted:g} ({origin}) makes it {each:.7g}"
                    )
            return None
        if not math.isclose(factors["gate"], 1.0, rel_tol=_SAME):
            return (
                f"the factor of gate is {factors['gate']:.7g}: the MLP is not linear in its gate, "
                "which must keep its scale"
            )
        product = factors["up"] * factors["down"]
        if not math.isclose(product, wanted, rel_tol=_SAME):
            need = f"the recorded scale is {wanted:g}"
            if not isinstance(self.scaling, float):
                need = f"{origin} needs c = {wanted:g}"
            return f"up × down = {product:.7g}, but {need}"
        return None


@dataclass(frozen=True)
class Record:
    """`upcycle.json`: its data, the recipe when it is intact, and what is wrong with the file."""

    data: Mapping[str, Any]
    recipe: RecipeClaim | None
    problems: tuple[str, ...]

    def factor(self, matrix: str) -> float | None:
        """Return the recorded factor of a matrix, or None when it is not a positive number."""
        factors = self.data.get("factors")
        value = factors.get(matrix) if isinstance(factors, dict) else None
        return float(value) if value is not None and _is_positive(value) else None


@dataclass(frozen=True)
class Place:
    """Where an expert's matrix lies: a tensor on disk and what to select of it."""

    tensor: str
    label: str
    index: EllipsisType | tuple[int | slice, ...] = ...


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The sizes and the layout of a dense model and its MoE."""

    dense: Checkpoint
    moe: Checkpoint
    moe_names: tuple[str, ...]
    """All files beside the MoE, whatever they are."""
    target: Target
    record: Record | None
    allow_inexact: bool
    """Whether an MoE that owes the dense model nothing is what the user expects."""
    num_layers: int
    hidden_size: int
    dense_size: int
    """I, the dense intermediate size."""
    expert_size: int
    """I/G."""
    num_experts: int
    top_k: int
    routing: str
    fused: bool

    @property
    def granularity(self) -> int:
        """G, the shards that the dense MLP was cut into."""
        return self.dense_size // self.expert_size

    @property
    def expansion(self) -> int:
        """E, the virtual groups of a layer."""
        return self.num_experts // self.granularity

    @property
    def implied(self) -> RecipeClaim:
        """The recipe that config.json implies, assuming exact scaling."""
        return RecipeClaim(
            expansion=self.expansion,
            granularity=self.granularity,
            top_k=self.top_k,
            routing=self.routing,
        )

    @property
    def standard(self) -> RecipeClaim:
        """What the MoE is held to, whatever it says of itself: the implied recipe, its routers."""
        std = self.logit_std
        if std <= _SAMPLE_SPREAD * APPROXIMATE_LOGIT_STD:
            std = min(std, APPROXIMATE_LOGIT_STD)
        return replace(self.implied, router_logit_std=std)

    @property
    def recipe(self) -> RecipeClaim:
        """The recorded recipe, or the implied one when nothing intact is recorded."""
        recorded = None if self.record is None else self.record.recipe
        return self.implied if recorded is None else recorded

    @property
    def lenient(self) -> bool:
        """Whether nothing says how the MoE was made, and the user does not mind."""
        return self.allow_inexact and (self.record is None or self.record.recipe is None)

    @property
    def logit_std(self) -> float:
        """The largest of `logit_stds`, nan if unknown: a single layer can spoil the function."""
        return max(self.logit_stds.values(), default=math.nan)

    @cached_property
    def logit_stds(self) -> Mapping[int, float]:
        """The nominal standard deviation of the router's logits, by layer, where it can be told.

        An RMSNorm's output has unit RMS before its weight γ, hence the rows' RMS times ‖γ‖.
        """
        found = {}
        with self.moe.reader() as moe:
            for layer in range(self.num_layers):
                names = (self.router_name(layer), gamma_name(layer))
                entries = [self.moe.tensors.get(name) for name in names]
                if any(entry is None or entry.dtype not in TORCH_DTYPES for entry in entries):
                    continue
                router, gamma = (moe.tensor(name).double() for name in names)
                found[layer] = float(router.square().mean().sqrt() * gamma.norm())
        return found

    @property
    def origin(self) -> str:
        """What c follows from, for messages."""
        return f"{CONFIG_NAME} ({self.routing}, N={self.num_experts}, top-k {self.top_k})"

    @property
    def recorded_dtype(self) -> str | None:
        """Torch's name of the dtype that everything was cast to, when one is recorded."""
        value = None if self.record is None else self.record.data.get("dtype")
        return value if isinstance(value, str) else None

    def router_name(self, layer: int) -> str:
        """Return the name of a layer's router on disk."""
        names = self.target.names
        return (names.fused_router if self.fused else names.router).format(layer=layer)

    def place(self, matrix: str, layer: int, expert: int) -> Place:
        """Return where one matrix of one expert lies on disk."""
        names = self.target.names
        if not self.fused:
            template = {"gate": names.gate, "up": names.up, "down": names.down}[matrix]
            name = template.format(layer=layer, expert=expert)
            return Place(name, name)
        if matrix == "down":
            name = names.fused_down.format(layer=layer)
            return Place(name, f"{name}[{expert}]", (expert,))
        name = names.fused_gate_up.format(layer=layer)
        begin = 0 if matrix == "gate" else self.expert_size
        rows = slice(begin, begin + self.expert_size)
        return Place(name, f"{name}[{expert}] ({matrix})", (expert, rows))


def gamma_name(layer: int) -> str:
    """Return the name of the weight of the norm that feeds a layer's MLP."""
    return f"model.layers.{layer}.post_attention_layernorm.weight"


def dense_mlp_name(matrix: str, layer: int) -> str:
    """Return the name of a matrix of a dense MLP."""
    return f"model.layers.{layer}.mlp.{matrix}_proj.weight"


def is_dense_mlp(name: str) -> bool:
    """Whether a dense tensor is one of an MLP's matrices."""
    return _MLP_NAME.fullmatch(name) is not None


def read_tensors(dense: Checkpoint) -> dict[str, TensorEntry]:
    """Return the tensors of a dense checkpoint but those that no model reads."""
    ignored = [pattern for pattern, _ in DENSE[dense.config["model_type"]].ignored]
    return {
        name: entry
        for name, entry in dense.tensors.items()
        if not any(pattern.fullmatch(name) for pattern in ignored)
    }


def counterparts(facts: Facts) -> dict[str, str]:
    """Return the dense tensor whose dtype each tensor of the MoE takes, by its name in the MoE.

    What was made without a dense tensor, such as a router, takes that of what it works with.
    """
    dense = read_tensors(facts.dense)
    found = {name: name for name in dense if not is_dense_mlp(name)}
    found.setdefault("lm_head.weight", EMBEDDING)
    names = facts.target.names
    shared = (names.shared_gate, names.shared_up, names.shared_down, names.shared_router)
    for layer in range(facts.num_layers):
        gate = dense_mlp_name("gate", layer)
        found[facts.router_name(layer)] = gate
        found |= {template.format(layer=layer): gate for template in shared if template}
        for matrix in ("q_proj", "k_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{matrix}"
            if f"{prefix}.weight" in dense:
                found.setdefault(f"{prefix}.bias", f"{prefix}.weight")
        for expert in range(facts.num_experts):
            for matrix in MATRICES:
                # Fused gate_up holds both, and takes the gate's, which comes first.
                name = facts.place(matrix, layer, expert).tensor
                found.setdefault(name, dense_mlp_name(matrix, layer))
    return found


def dtype_failures(facts: Facts) -> Iterator[str]:
    """Name the tensors whose dtype is neither the recorded one, their origin's, nor everyone's.

    A tensor of a dtype that no weight has is left to others.
    """
    stored = {
        name: TORCH_DTYPES[entry.dtype]
        for name, entry in facts.moe.tensors.items()
        if entry.dtype in TORCH_DTYPES
    }
    recorded = facts.recorded_dtype
    if recorded is not None:
        for name, dtype in stored.items():
            if dtype != recorded:
                yield f"{name} is {facts.moe.tensors[name].dtype}, and {recorded} is recorded"
        return
    if len({entry.dtype for entry in facts.moe.tensors.values()}) == 1:
        return
    sources = counterparts(facts)
    for name in stored:
        source = sources.get(name)
        wanted = None if source is None else facts.dense.tensors[source].dtype
        if wanted is not None and facts.moe.tensors[name].dtype != wanted:
            of = "" if source == name else f" ({source})"
            yield (
                f"{name} is {facts.moe.tensors[name].dtype}: neither the dense model's "
                f"{wanted}{of} nor the dtype of all tensors"
            )


def gather_facts(
    dense: Checkpoint,
    moe: Checkpoint,
    target: Target,
    *,
    moe_names: Sequence[str] = (),
    allow_inexact: bool = False,
) -> Facts:
    """Return what is known of the two checkpoints; `moe_names` are all files beside the MoE.

    Raises UpcycleError when the dense model has no gated MLPs of plain weights, and DamagedError
    when the MoE's config.json does not describe experts that can have been made of them.
    """
    check_sizes(moe, target)
    num_layers, dense_size, hidden_size = _dense_sizes(dense)
    keys = target.keys
    num_experts, top_k, expert_size = (
        checked_count(moe, key) for key in (keys.num_experts, keys.top_k, keys.expert_size)
    )
    if dense_size % expert_size:
        raise DamagedError(
            f"{CONFIG_NAME}: {keys.expert_size} {expert_size} does not divide the dense model's "
            f"intermediate size {dense_size}."
        )
    if num_experts % (dense_size // expert_size):
        raise DamagedError(
            f"{CONFIG_NAME}: {keys.num_experts} {num_experts} is not a multiple of the "
            f"granularity {dense_size // expert_size}, which {keys.expert_size} {expert_size} "
            "stands for."
        )
    return Facts(
        dense=dense,
        moe=moe,
        moe_names=tuple(moe_names),
        target=target,
        record=_read_record(moe),
        allow_inexact=allow_inexact,
        num_layers=num_layers,
        hidden_size=hidden_size,
        dense_size=dense_size,
        expert_size=expert_size,
        num_experts=num_experts,
        top_k=top_k,
        routing=_config_routing(moe, target),
        fused=is_fused(moe, target),
    )


def is_fused(moe: Checkpoint, target: Target) -> bool:
    """Whether the experts of a layer are one tensor."""
    before, after = target.names.fused_down.split("{layer}")
    return any(name.startswith(before) and name.endswith(after) for name in moe.tensors)


def check_sizes(moe: Checkpoint, target: Target) -> None:
    """Raise DamagedError for sizes that no model of these tensors has, and that take forever."""
    keys = target.keys
    num_experts, top_k = checked_count(moe, keys.num_experts), checked_count(moe, keys.top_k)
    if top_k > num_experts:
        raise DamagedError(
            f"{CONFIG_NAME}: {keys.top_k} {top_k} is more than {keys.num_experts} {num_experts}."
        )
    layers = {match[1] for match in map(_LAYER.search, moe.tensors) if match}
    for key, most in (
        (keys.num_experts, _most_experts(moe)),
        ("num_hidden_layers", len(layers)),
    ):
        if checked_count(moe, key) > most:
            raise DamagedError(
                f"{CONFIG_NAME}: {key} {shown(moe.config[key])} is more than there are tensors of."
            )


def _most_experts(moe: Checkpoint) -> int:
    """Return how many experts a layer can have at most: a tensor of each, or all in one."""
    entries = moe.tensors.values()
    fused = (entry.shape[0] for entry in entries if len(entry.shape) == 3 and entry.num_elements)
    return max(len(entries), *fused, 0)


def _dense_sizes(dense: Checkpoint) -> tuple[int, int, int]:
    """Return L, I and H, from the tensors themselves."""
    tensors = read_tensors(dense)
    for name, entry in tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            raise UpcycleError(f"{dense.path}: {name} is {entry.dtype}, not a plain weight.")
    num_layers = len({match[1] for match in map(_MLP_NAME.fullmatch, tensors) if match})
    first = dense_mlp_name("gate", 0)
    for name in (EMBEDDING, first):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UpcycleError(
                f"{dense.path} has no matrix {name}.",
                "Give the dense model that the MoE was made of.",
            )
    shape_IH = tensors[first].shape
    for layer in range(num_layers):
        for matrix in MATRICES:
            name = dense_mlp_name(matrix, layer)
            shape = shape_IH[::-1] if matrix == "down" else shape_IH
            if name not in tensors or tensors[name].shape != shape:
                raise UpcycleError(f"{dense.path} has no {name} of shape {list(shape)}.")
        norm = tensors.get(gamma_name(layer))
        if norm is None or norm.shape != shape_IH[1:]:
            raise UpcycleError(f"{dense.path} has no {gamma_name(layer)} of {shape_IH[1]} values.")
    return num_layers, shape_IH[0], shape_IH[1]


def checked_count(moe: Checkpoint, key: str) -> int:
    """Return a positive integer of config.json; raises DamagedError when it is something else."""
    value = moe.config.get(key)
    if type(value) is not int or value < 1:
        raise DamagedError(f"{CONFIG_NAME}: {key} must be a positive integer, not {shown(value)}.")
    return value


def _config_routing(moe: Checkpoint, target: Target) -> str:
    key = target.keys.norm_topk_prob
    if key is None:
        return TOPK_SOFTMAX
    value = moe.config.get(key, False)  # absent means false in transformers
    if type(value) is not bool:
        raise DamagedError(f"{CONFIG_NAME}: {key} must be true or false, not {shown(value)}.")
    return TOPK_SOFTMAX if value else SOFTMAX_TOPK


def _read_record(moe: Checkpoint) -> Record | None:
    if not moe.storage.has(RECORD_NAME):
        return None
    try:
        data = read_json(moe.storage.local(RECORD_NAME))
    except UpcycleError as error:
        return Record({}, None, (error.message,))
    problems: list[str] = []
    if data.get("format") != 1:
        problems.append(
            f"{RECORD_NAME}: format is {shown(data.get('format'))}, and only 1 is known"
        )
    recipe = data.get("recipe")
    if not isinstance(recipe, dict):
        problems.append(f"{RECORD_NAME}: recipe is missing")
        return Record(data, None, tuple(problems))
    wrong = [f"recipe.{key}" for key, valid in _RECIPE_FIELDS.items() if not valid(recipe.get(key))]
    if wrong:
        problems.append(f"{RECORD_NAME}: {', '.join(wrong)} missing or invalid")
        return Record(data, None, tuple(problems))
    scaling = recipe["scaling"]
    claim = RecipeClaim(
        **{key: recipe[key] for key in _RECIPE_FIELDS if key != "scaling"},
        scaling=scaling if isinstance(scaling, str) else float(scaling),
    )
    if claim.top_k > claim.num_experts:
        problems.append(f"{RECORD_NAME}: recipe.top_k is more than expansion x granularity")
        return Record(data, None, tuple(problems))
    return Record(data, claim, tuple(problems))


def _is_positive(value: object) -> bool:
    # Bounded, so that arithmetic on a damaged record cannot overflow; True is not a number here.
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


_RECIPE_FIELDS = {
    "expansion": _is_count,
    "granularity": _is_count,
    "top_k": _is_count,
    "routing": lambda value: value in (SOFTMAX_TOPK, TOPK_SOFTMAX),
    "scaling": lambda value: value in ("exact", "paper", "none") or _is_positive(value),
    "scale_split": lambda value: value in ("balanced", "down"),
    "virtual_groups": lambda value: type(value) is bool,
    "router_logit_std": _is_positive,
}
"""The fields of a recorded recipe that verification reads, and what each may hold."""
