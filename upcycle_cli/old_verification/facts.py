"""What is known of a dense model and its MoE before a weight is read.

Sizes come from the dense model's tensors and the MoE's config.json, the recipe from `upcycle.json`
where there is one. Of the families only their names are used.

Legend: N experts, E expansion (groups), G granularity (shards), K of them shared, T top-k, H hidden
size, I dense intermediate size, N = E·(G − K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.models.choose import pieces_of
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.mlp import Location, Weight, find_weight, locate, parts_of, present_weights
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.models.tensor_pieces import Piece
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.old_verification.merged import Merged, rest_reader
from upcycle_cli.old_verification.recipes import APPROXIMATE_LOGIT_STD, MlpKind, RecipeClaim, Record

if TYPE_CHECKING:
    from upcycle_cli.old_verification.grown import Grown, Side
    from upcycle_cli.plan.router_file import RouterFile

Pair: TypeAlias = "Facts | Grown"
"""An MoE and what it was made of, whichever way: what checks ask that compare files."""
Moe: TypeAlias = "Facts | Side"
"""An MoE that is to be run, with its weights left on disk."""
_SAMPLE_SPREAD = 1.5
"""The deviation of a small sample can be this much larger than that it was drawn with."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The sizes and the layout of a dense model and its MoE."""

    dense: Checkpoint
    moe: Checkpoint
    moe_names: tuple[str, ...]
    """All files beside the MoE, whatever they are."""
    family: DenseFamily
    target: Target
    layout: Layout
    """How the experts of the MoE are named."""
    record: Record
    allow_inexact: bool
    """Whether an MoE that owes the dense model nothing is what the user expects."""
    layers: tuple[int, ...]
    """Those that are mixtures of experts."""
    num_layers: int
    hidden_size: int
    dense_size: int
    """I, the dense intermediate size."""
    expert_size: int
    """I/G."""
    num_experts: int
    shared_experts: int
    """K, the shards that are an expert for every token."""
    top_k: int
    routing: str
    gate_scale: float
    """What config.json has the gates multiplied by."""
    kind: MlpKind
    merged: Merged | None = None
    """Where there are experts of several models: these."""
    only: tuple[int, ...] | None = None
    """The groups that are in view, where these are not all."""
    rows: RouterFile | None = None
    """The file that routers are said to have their rows from, where it is given."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that are made of the dense model."""
        return tuple(range(self.expansion)) if self.only is None else self.only

    @property
    def experts(self) -> list[int]:
        """The experts of these groups."""
        G = self.group_size
        return [group * G + shard for group in self.groups for shard in range(G)]

    @property
    def granularity(self) -> int:
        """G, the shards that the dense MLP was cut into."""
        return self.dense_size // self.expert_size

    @property
    def expansion(self) -> int:
        """E, the virtual groups of a layer."""
        return self.num_experts // self.group_size

    @property
    def group_size(self) -> int:
        """G − K, the routed experts of a group."""
        return self.granularity - self.shared_experts

    @property
    def shared_width(self) -> int:
        """How many neurons of the dense MLP are shared."""
        return self.shared_experts * self.expert_size

    def shard_of(self, expert: int) -> int:
        """Return which shard an expert holds; the first ones are shared."""
        return self.shared_experts + expert % self.group_size

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of the MLP, biases among them."""
        return parts_of(self.dense_mlp)

    @cached_property
    def dense_mlp(self) -> tuple[Weight, ...]:
        """The weights of a dense layer's MLP."""
        return present_weights(self.family.mlp, self.dense.tensors, self._prefix(self.layers[0]))

    def _prefix(self, layer: int) -> str:
        return self.family.layer.format(layer=layer)

    @property
    def implied(self) -> RecipeClaim:
        """The recipe that config.json implies, assuming exact scaling."""
        return RecipeClaim(
            expansion=self.expansion,
            granularity=self.granularity,
            shared_experts=self.shared_experts,
            top_k=self.top_k,
            routing=self.routing,
            kind=self.kind,
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
        return self.record.recipe or self.implied

    @property
    def lenient(self) -> bool:
        """Whether nothing says how the MoE was made, and the user does not mind."""
        return self.allow_inexact and self.record.recipe is None

    @property
    def logit_std(self) -> float:
        """The largest of `logit_stds`, nan if unknown: a single layer can spoil the function."""
        return max(self.logit_stds.values(), default=math.nan)

    @cached_property
    def logit_stds(self) -> Mapping[int, float]:
        """The nominal standard deviation of the router's logits, by layer, where it can be told.

        A norm's output has unit RMS before its weight γ, hence the rows' RMS times ‖γ‖.
        """
        found = {}
        with self.moe.reader() as moe, rest_reader(self) as dense:
            for layer in self.layers:
                entry = self.moe.tensors.get(self.router_name(layer))
                if entry is None or entry.dtype not in TORCH_DTYPES:
                    continue
                router = moe.tensor(entry.name).double()
                length = math.sqrt(self.hidden_size)
                name = self.gamma_name(layer)
                if name is not None:
                    gamma = dense.tensor(name).double() + self.family.norm_offset
                    length = float(gamma.norm())
                found[layer] = float(router.square().mean().sqrt()) * length
        return found

    @property
    def origin(self) -> str:
        """What c follows from, for messages."""
        return f"{CONFIG_NAME} ({self.routing}, N={self.num_experts}, top-k {self.top_k})"

    def setting(self, key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return what the dense model's config says, or means when it is silent."""
        return {**defaults_of(self.family.model_type), **self.dense_config}[key]

    def router_name(self, layer: int) -> str:
        """Return the name of a layer's router on disk."""
        return self.target.prefix(layer) + self.layout.router

    def gamma_name(self, layer: int) -> str | None:
        """Return the name of the weight of the norm that feeds a layer's MLP, if there is one."""
        prefix = self._prefix(layer)
        norm = self.family.norm_name(self.dense.tensors, prefix)
        return None if norm is None else prefix + norm

    def locate(self, part: str, layer: int, expert: int) -> Location:
        """Return where one part of one expert lies on disk, with the tensor's whole name."""
        found = locate(self.layout.experts, part, width=self.expert_size, expert=expert)
        return replace(found, tensor=self.target.prefix(layer) + found.tensor)

    def dense_place(self, part: str, layer: int, shard: int | None = None) -> Location:
        """Return where a part of a dense MLP lies, all of it or one shard."""
        size = self.expert_size
        cut = None if shard is None else (shard * size, (shard + 1) * size)
        found = locate(self.dense_mlp, part, width=self.dense_size, shard=cut)
        return replace(found, tensor=self._prefix(layer) + found.tensor)

    def side_by_side(self, part: str) -> tuple[str, ...]:
        """Return the parts that have a share of each row of its tensor, itself too."""
        weight = find_weight(self.layout.experts, part)
        return weight.parts if weight.split_dim == 1 else (part,)

    def expert_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of the tensor that holds a part of an expert, or of all experts."""
        weight = find_weight(self.layout.experts, part)
        shape = weight.shape(self.expert_size, self.hidden_size)
        return shape if "{expert}" in weight.name else (self.num_experts, *shape)

    @cached_property
    def dense_config(self) -> Mapping[str, Any]:
        """What the dense model's config says of its text model, which mostly is the whole."""
        return text_config_of(self.dense.config)

    @cached_property
    def moe_config(self) -> Mapping[str, Any]:
        """What the MoE's config says of its text model, which mostly is the whole."""
        return text_config_of(self.moe.config)

    def in_moe(self, name: str) -> tuple[str, ...]:
        """Return what the MoE calls a dense tensor: of an MLP the first that was made of it.

        There are several where it holds the rows of one tensor in several.
        """
        if name in self.became:
            return (self.became[name],)
        if name in self.pieces:
            return tuple(found for found, _ in self.pieces[name])
        here, there = self.family.inside, self.target.inside
        if here is not None and there is not None:
            loaded = here.in_memory(name)
            return (self._loaded.get(loaded, there.from_memory(loaded)),)
        root = self.family.layer.partition("layers.")[0]
        kept = self.target.name_prefix + name.removeprefix(root) if name.startswith(root) else name
        return (self.target.name(kept),)

    @cached_property
    def pieces(self) -> Mapping[str, tuple[tuple[str, Piece], ...]]:
        """From the dense tensors that are held in another form to what holds them, in order."""
        copied = self.dense.tensors.keys() - self.became.keys()
        return {
            self._prefix(layer) + name: tuple(
                (self.target.prefix(layer) + piece.name, piece) for piece in pieces
            )
            for layer in range(self.num_layers)
            for name, pieces in pieces_of(self.family, self.target).items()
            if self._prefix(layer) + name in copied
        }

    @cached_property
    def _loaded(self) -> Mapping[str, str]:
        """The MoE's tensors by the names that transformers has in memory, inside of a wrapper."""
        inside = self.target.inside
        return {} if inside is None else {inside.in_memory(name): name for name in self.moe.tensors}

    @cached_property
    def became(self) -> Mapping[str, str]:
        """From the dense tensors that experts were made of to those that hold the first of them."""
        return {
            self.dense_place(part, layer).tensor: self.locate(part, layer, 0).tensor
            for layer in self.layers
            for part in self.parts
        }
