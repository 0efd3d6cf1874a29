"""What the routers choose: whole groups or not, in float32 and in the precision models run in.

Whole groups depend on logits that are equal inside a group and different between groups. In 16 bits
even good rows tie for some tokens, so what a router of the MoE splits is held against what honest
rows of its shape and size split on the same hidden states.

Legend: S positions, H hidden size, E groups, G shards, N = E·G experts, T top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.recipes import FITTED, NORMAL, PROMPTS
from upcycle_cli.run.mixtures import routers_of
from upcycle_cli.run.models import Model

_HONEST_DRAWS = 4
_MOST_TIMES_HONEST = 3.0
_MARGIN = 5e-3
_MARGIN_TOKENS = 4.0
_FITTED_RATIO = 4.0
"""Another text than the calibration's makes larger or smaller logits, but not by so much."""
_TOKENS_EACH = 16
"""For each group, before one that none chooses says anything."""


@dataclass(frozen=True)
class LayerRouting:
    """What the router of a layer chose."""

    whole: torch.Tensor
    """Which tokens got whole groups."""
    load: torch.Tensor
    """How many tokens chose each expert."""
    entropy: float
    """Of the softmax over the groups' logits, in nats, mean over tokens."""
    margin: float
    """Between the two most probable groups of that softmax, mean over tokens."""
    bfloat16_split: float
    """The share of tokens without whole groups when the router runs in bfloat16."""

    @property
    def load_cv(self) -> float:
        """The standard deviation of the experts' loads, relative to their mean."""
        load_N = self.load.double()
        return float(load_N.std(correction=0) / load_N.mean())


@dataclass
class Routing:
    """What was chosen in all layers."""

    tokens: int
    """So many of those that the routers see count; others may follow."""
    layers: dict[int, LayerRouting] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """Where a router does not work in the dtype that it is stored in, or in bfloat16."""

    @property
    def whole_everywhere(self) -> torch.Tensor:
        """(S,): which tokens got whole groups in every layer."""
        return torch.stack([layer.whole for layer in self.layers.values()]).all(0)

    @property
    def metrics(self) -> dict[str, float]:
        """Shares and means over all layers."""
        found = self.layers.values()
        return {
            "split_token_layers": 1 - _mean([float(x.whole.double().mean()) for x in found]),
            "split_token_layers_bfloat16": _mean([x.bfloat16_split for x in found]),
            "expert_load_cv": _mean([x.load_cv for x in found]),
        }


@contextmanager
def watched_routers(facts: Facts, model: Model, tokens: int) -> Iterator[Routing]:
    """Note what a running model's routers choose, ties and all, for the first `tokens` they see."""
    found = Routing(tokens)
    layout = facts.target.in_memory
    linear = layout.router.removeprefix(layout.gate).removesuffix("weight").strip(".")
    others = [row.name.removeprefix(f"{layout.gate}.") for row in facts.target.extra_tensors]
    with ExitStack() as stack:
        for layer, router in routers_of(model, facts.target, facts.layers).items():
            watch, rows = _Watch(facts, layer, linear, others, found), router.get_submodule(linear)
            stack.callback(router.register_forward_hook(watch).remove)
            stack.callback(rows.register_forward_hook(watch.note_logits).remove)
        yield found


@dataclass
class _Watch:
    """A hook on one router."""

    facts: Facts
    layer: int
    linear: str
    """The module within the router that has its rows; empty where the router itself has them."""
    others: Sequence[str]
    """What a router may have beside its rows."""
    found: Routing
    logits: torch.Tensor | None = None
    """(S, N), of the module that has the rows: what the router returns may be probabilities."""

    def note_logits(self, _linear: Model, _inputs: object, output: object) -> None:
        """Keep what a linear layer put out."""
        self.logits = output if isinstance(output, torch.Tensor) else None

    def __call__(
        self, router: Model, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]
    ) -> None:
        facts, found = self.facts, self.found
        states_SH = inputs[0].detach().reshape(-1, facts.hidden_size)[: found.tokens]
        logits_SN, gates_ST, experts_ST = (held[: found.tokens] for held in output)
        if experts_ST.shape[-1] != facts.top_k:
            found.failures.append(
                f"{facts.router_name(self.layer)}: transformers chooses {experts_ST.shape[-1]} "
                f"experts, and top-k is taken to be {facts.top_k}"
            )
        stored = facts.moe.tensors[facts.router_name(self.layer)].dtype
        weight_NH = router.get_submodule(self.linear).weight[:]
        # What else it is given is a bias, zero as yet.
        run = partial(self._split, router, inputs[1:])
        load_N = torch.bincount(experts_ST.flatten(), minlength=facts.num_experts)
        logits_SE = states_SH.float() @ weight_NH[:: facts.group_size].float().T
        if self.logits is not None:
            logits_SN = self.logits[: found.tokens]
            logits_SE = logits_SN[:, :: facts.group_size].float()
        found.failures.extend(self._made_failures(logits_SE, load_N))
        split = {
            name: self._run_in(name, run, weight_NH, states_SH)
            for name in {TORCH_DTYPES[stored]: 0, "bfloat16": 0}
        }
        groups_SE = logits_SN[:, :: facts.group_size].float().softmax(-1)
        best_S2 = groups_SE.topk(min(2, groups_SE.shape[1])).values
        found.layers[self.layer] = LayerRouting(
            whole=self._whole(gates_ST, experts_ST),
            load=load_N,
            entropy=float(torch.special.entr(groups_SE).sum(-1).mean()),
            margin=float((best_S2[:, 0] - best_S2[:, 1:].sum(-1)).mean()),
            bfloat16_split=split["bfloat16"],
        )

    def _made_failures(self, logits_SE: torch.Tensor, load_N: torch.Tensor) -> Iterator[str]:
        """Say where rows that were not drawn do not do here what they are said to do."""
        facts, label = self.facts, self.facts.router_name(self.layer)
        recipe, std = facts.recipe, facts.recipe.router_logit_std
        # Prompts are of one kind each, and say nothing of what other text is given to whom.
        if recipe.router_init in (NORMAL, PROMPTS) or facts.expansion == 1:
            return
        if recipe.router_init in FITTED and std is not None:
            here = float(logits_SE.double().std(0).mean())
            if not std / _FITTED_RATIO <= here <= std * _FITTED_RATIO:
                yield (
                    f"{label}: its logits have a standard deviation of {here:.3g} here, and are "
                    f"said to have been fitted to {std:g}"
                )
        idle = int((load_N.reshape(-1, facts.group_size).sum(-1) == 0).sum())
        enough = len(logits_SE) >= _TOKENS_EACH * facts.expansion
        if enough and idle > facts.expansion / 2:
            yield f"{label}: {idle} of its {facts.expansion} groups are chosen by no token"

    def _run_in(
        self,
        name: str,
        run: Callable[[torch.Tensor, torch.Tensor], tuple[float, int]],
        weight_NH: torch.Tensor,
        states_SH: torch.Tensor,
    ) -> float:
        """Hold what a router splits in a dtype against what honest rows split; return its share."""
        label, failures = self.facts.router_name(self.layer), self.found.failures
        dtype: torch.dtype = getattr(torch, name)
        states_SH = states_SH.to(dtype)
        split, not_finite = run(weight_NH.to(dtype), states_SH)
        if not_finite:
            failures.append(f"{label}: {not_finite} of its logits are not finite in {name}")
        margin = max(_MARGIN, _MARGIN_TOKENS / len(states_SH))
        if split <= margin:
            return split
        size = weight_NH.float().square().mean().sqrt()
        drawn = [(size * self._rows(seed)).to(dtype) for seed in range(_HONEST_DRAWS)]
        honest = _mean([run(rows_NH, states_SH)[0] for rows_NH in drawn])
        if split > _MOST_TIMES_HONEST * honest + margin:
            failures.append(
                f"{label}: in {name}, {split:.1%} of the tokens get parts of groups, where an "
                f"honest router of its shape and size splits {honest:.1%}"
            )
        return split

    def _rows(self, seed: int) -> torch.Tensor:
        """Return random rows (N, H), equal inside each group."""
        generator = torch.Generator().manual_seed(seed)
        rows_EH = torch.randn(self.facts.expansion, self.facts.hidden_size, generator=generator)
        return rows_EH.repeat_interleave(self.facts.group_size, 0)

    def _split(
        self,
        router: Model,
        others: tuple[torch.Tensor, ...],
        weight_NH: torch.Tensor,
        states_SH: torch.Tensor,
    ) -> tuple[float, int]:
        """Return the share of tokens that get parts of groups, and the logits beyond the dtype."""
        # What is on disk is no parameter.
        slots = router.get_submodule(self.linear)._parameters  # noqa: SLF001
        own = router._parameters  # noqa: SLF001
        beside = {name: own[name] for name in self.others if name in own}
        held = slots["weight"]
        try:
            slots["weight"] = weight_NH
            own |= {name: tensor.to(weight_NH.dtype) for name, tensor in beside.items()}
            with torch.no_grad():
                # Not by calling it, which would call this hook again.
                logits_SN, gates_ST, experts_ST = router.forward(states_SH, *others)
        finally:
            slots["weight"] = held
            own |= beside
        not_finite = int((~logits_SN.isfinite()).sum())
        whole_S = self._whole(gates_ST, experts_ST)
        return 1 - float(whole_S.double().mean()), not_finite

    def _whole(self, gates_ST: torch.Tensor, experts_ST: torch.Tensor) -> torch.Tensor:
        """Return which tokens got whole groups (S,): a gate of 0 is as good as no choice."""
        facts, S = self.facts, len(experts_ST)
        picked_SN = torch.zeros(S, facts.num_experts)
        picked_SN.scatter_(1, experts_ST, (gates_ST != 0).float())
        per_group = picked_SN.reshape(S, facts.expansion, facts.group_size).sum(-1)
        return ((per_group == 0) | (per_group == facts.group_size)).all(-1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
