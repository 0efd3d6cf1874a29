"""Mutations of planner and evaluator: each is found by the outputs check alone.

A row changes one thing that `convert` does: a function of the planner, a tensor's expression, a key
of config.json or a step of the evaluator. The outputs check knows the promise and nothing of the
plan, and has to fail. `BYTES` lists what computes the same function: only the bytes show it, which
the oracle and the golden digests hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense
from test_oracle import check as check_bytes
from oracle import Wanted

from upcycle_cli import Options, Recipe, convert, open_checkpoint
from upcycle_cli.models import dense as dense_module
from upcycle_cli.plan.expressions import (
    Concat,
    Expr,
    Full,
    Gather,
    Halves,
    Normal,
    Permutation,
    Repeat,
    Scale,
    Slice,
    Zeros,
    type_of,
)
from upcycle_cli.recipe.recipe import Promise
from upcycle_cli.verification.outputs import Expectation, check_outputs
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CheckResult, Status

FEW = TextOptions(tokens=64)
FACTORS = "recipe.recipe:Recipe.factors"
TENSORS = "plan.upcycle:output_tensors"
CONFIG = "plan.upcycle:moe_config"
Patch = tuple[str, Callable[[Any], Any]]
"""What is patched, and how it follows from what was there."""


# What is converted -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """An exact conversion of a tiny model; E2G2T2 unless `recipe` says something else."""

    model_type: str
    target: str
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    layout: Any = None

    def made_by(self, dense: Path, moe: Path) -> Path:
        wanted = {"expansion": 2, "granularity": 2, "top_k": 2, **self.recipe}
        options = Options(expert_layout=self.layout)
        convert(dense, moe, Recipe(**wanted), target=self.target, options=options)
        return moe

    @property
    def group_size(self) -> int:
        return int(self.recipe.get("granularity", 2)) - int(self.recipe.get("shared_experts", 0))


ALL_CHOSEN = {"routing": "softmax-topk", "top_k": 4}
SHUFFLED = {"neuron_order": "shuffled"}
ONE_SHARED = {"granularity": 3, "shared_experts": 1, "routing": "topk-softmax"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 99.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCENARIOS: Mapping[str, Scenario] = {
    "mixtral": Scenario("llama", "mixtral"),
    "fused": Scenario("llama", "mixtral", layout="fused"),
    "shuffled": Scenario("llama", "mixtral", recipe=SHUFFLED),
    "all chosen": Scenario("llama", "qwen2_moe", recipe=ALL_CHOSEN),
    "renormalised": Scenario("qwen2", "qwen2_moe", recipe={"routing": "topk-softmax"}),
    "by the config": Scenario("llama", "glm4_moe"),
    "shared": Scenario("llama", "qwen2_moe", recipe=ONE_SHARED),
    "tied": Scenario("llama", "mixtral", {"tie_word_embeddings": True}),
    "eps": Scenario("llama", "mixtral", {"rms_norm_eps": 0.1}),
    "rope": Scenario("llama", "mixtral", {"rope_parameters": LLAMA3}),
    "window": Scenario("mistral", "mixtral", {"sliding_window": 8}),
    "some windows": Scenario(
        "qwen2",
        "qwen2_moe",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        {"routing": "topk-softmax"},
    ),
    "qk norm": Scenario("qwen3", "glm4_moe", {"attention_bias": False}),
    "relu2": Scenario("nemotron", "upcycled", {"mlp_bias": True}, {"granularity": 4, "top_k": 4}),
    "gelu": Scenario("gpt2", "upcycled", {}, ALL_CHOSEN),
    "granite": Scenario("granite", "granitemoe"),
    "glm": Scenario("glm", "glm4_moe"),
    "phi3": Scenario("phi3", "mixtral", {"num_key_value_heads": 4}),
    "gemma4": Scenario("gemma4_text", "gemma4_text"),
}


# What is changed ---------------------------------------------------------------------------------


def factors(**changes: Callable[[Any], float]) -> Patch:
    """Multiply experts by other factors; each is computed from the right ones."""

    def patch(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            found = right(*args, **kwargs)
            return replace(found, **{name: change(found) for name, change in changes.items()})

        return wrong

    return FACTORS, patch


def returns(place: str, change: Callable[[Any], Any]) -> Patch:
    """Let a function return something else than it does."""
    return place, lambda right: lambda *args, **kwargs: change(right(*args, **kwargs))


def config(**changes: Any) -> Patch:
    """Write other settings; None takes a key out, of rope settings too."""

    def wrong(right: dict[str, Any]) -> dict[str, Any]:
        assert {*changes} & {*right}, right
        return {key: value for key, value in (right | changes).items() if value is not None}

    return returns(CONFIG, wrong)


def tensors(pattern: str, change: Callable[[Any, dict[str, Any]], Expr]) -> Patch:
    """Give each tensor that a pattern finds another expression, by it and by all of them."""

    def wrong(right: Iterator[Any]) -> Iterator[Any]:
        every = {tensor.name: tensor for tensor in right}
        chosen = [name for name in every if re.search(pattern, name)]
        assert chosen, pattern
        for name, tensor in every.items():
            if name in chosen:
                expr = change(tensor, {key: each.expr for key, each in every.items()})
                assert type_of(expr) == type_of(tensor.expr)
                assert expr != tensor.expr
                yield replace(tensor, expr=expr)
            else:
                yield tensor

    return returns(TENSORS, wrong)


def from_another(pattern: str, other: str, at: str = "") -> Patch:
    """Make tensors what others are, whose names the pattern's match is replaced in."""
    return tensors(
        f"{at}.*{pattern}" if at else pattern,
        lambda tensor, every: every[re.sub(pattern, other, tensor.name)],
    )


def nodes(pattern: str, kind: type, change: Callable[[Any], Expr]) -> Patch:
    """Change each part of a kind in the expressions of tensors."""

    def changed(expr: Any) -> Any:
        if isinstance(expr, tuple):
            return tuple(map(changed, expr))
        if not is_dataclass(expr):
            return expr
        inner = {f.name: changed(getattr(expr, f.name)) for f in fields(expr)}
        made = replace(expr, **inner)  # type: ignore[type-var]
        return change(made) if isinstance(made, kind) else made

    return tensors(pattern, lambda tensor, _: changed(tensor.expr))


EXPERTS = r"experts\.\d+\.(w\d|\w+_proj)\.weight|experts\.\w+_proj$"


def moved(by: int) -> Callable[[Slice], Slice]:
    """Shift the borders of a shard, inside of the matrix."""
    return lambda node: replace(
        node,
        start=min(
            max(node.start + by, 0), type_of(node.of).shape[node.dim] - node.stop + node.start
        ),
        stop=min(max(node.stop + by, node.stop - node.start), type_of(node.of).shape[node.dim]),
    )


Row = tuple[str, str, Patch]
"""A name, the scenario in which it shows, and what is patched."""
ROWS: tuple[Row, ...] = (
    # Factors.
    ("up is doubled", "mixtral", factors(up=lambda f: 2 * f.up)),
    ("down is halved", "mixtral", factors(down=lambda f: f.down / 2)),
    (
        "the gate is scaled and down makes up",
        "mixtral",
        factors(gate=lambda _: 2.0, down=lambda f: f.down / 2),
    ),
    ("nothing is scaled", "mixtral", factors(up=lambda _: 1.0, down=lambda _: 1.0)),
    (
        "c is that of softmax-topk",
        "mixtral",
        returns("recipe.recipe:Recipe._compensation", lambda c: 2 * c),
    ),
    (
        "c counts shared shards",
        "shared",
        returns("recipe.recipe:Recipe._compensation", lambda c: 1.5 * c),
    ),
    (
        "c forgets that all are chosen",
        "all chosen",
        returns("recipe.recipe:Recipe._compensation", lambda c: c / 2),
    ),
    ("relu² is taken for linear", "relu2", returns("models.dense:degree", lambda _: 1)),
    (
        "a down bias stays as it is",
        "gelu",
        returns("recipe.recipe:Recipe.down_bias_factor", lambda _: 1.0),
    ),
    (
        "an up bias stays as it is",
        "relu2",
        tensors(r"up_proj_bias$", lambda tensor, _: unscaled(tensor.expr)),
    ),
    ("the config's factor is 1", "by the config", config(routed_scaling_factor=1.0)),
    ("the config's factor is squared", "by the config", config(routed_scaling_factor=4.0)),
    ("c is in the config and in down", "by the config", factors(down=lambda f: f.config)),
    # Shards and experts.
    ("a border off by one", "mixtral", nodes(EXPERTS, Slice, moved(1))),
    ("a border off by one in down alone", "mixtral", nodes(r"w2\.weight", Slice, moved(1))),
    ("gate and up exchanged", "mixtral", from_another(r"\.w1\.", ".w3.", "layers.0")),
    (
        "up in front of gate in a fused tensor",
        "fused",
        nodes("gate_up_proj", Concat, lambda c: Concat(c.parts[::-1])),
    ),
    (
        "all experts hold the first shard",
        "mixtral",
        from_another(r"experts\.\d", "experts.0", "layers.1"),
    ),
    (
        "groups are the inner index",
        "mixtral",
        from_another(r"experts\.[12]\.", "experts.3.", "layers.1"),
    ),
    (
        "one expert of one group is its neighbour",
        "mixtral",
        from_another(r"experts\.3", "experts.2", "layers.1"),
    ),
    (
        "one down is another expert's",
        "mixtral",
        from_another(r"experts\.2\.w2", "experts.3.w2", "layers.0"),
    ),
    ("layers are exchanged", "mixtral", from_another(r"layers\.0\.block", "layers.1.block")),
    (
        "a stack in another order",
        "granite",
        tensors("input_linear", lambda tensor, _: reordered(tensor.expr)),
    ),
    (
        "a fused stack in another order",
        "fused",
        tensors(r"1.*experts\.down_proj", lambda tensor, _: reordered(tensor.expr)),
    ),
    (
        "down in the dense order",
        "shuffled",
        nodes(r"w2\.weight", Gather, lambda g: Slice(g.of, g.dim, g.start, g.stop)),
    ),
    (
        "up in an order of its own",
        "shuffled",
        nodes(r"w3\.weight", Permutation, lambda p: replace(p, stream=f"{p.stream}.up")),
    ),
    (
        "shared rows are the second shard",
        "shared",
        nodes(r"shared_expert\.up_proj", Slice, moved(16)),
    ),
    (
        "the shared gate's half is forgotten",
        "shared",
        tensors(r"shared_expert\.down", lambda tensor, _: unscaled(tensor.expr)),
    ),
    (
        "an inert shared expert is not",
        "all chosen",
        from_another(r"shared_expert\.down_proj", "shared_expert.up_proj"),
    ),
    # Routers.
    (
        "rows differ inside a group",
        "mixtral",
        nodes(r"1.*gate\.weight", Repeat, lambda r: replace(r.of, shape=(4, 32))),
    ),
    (
        "rows alternate between groups",
        "mixtral",
        nodes(r"\.gate\.weight", Repeat, lambda r: Concat((r.of, r.of))),
    ),
    (
        "a correction bias prefers an expert",
        "by the config",
        tensors("correction_bias", lambda tensor, _: biased(tensor.expr)),
    ),
    # What is no expert's.
    ("v is k", "mixtral", from_another("v_proj", "k_proj", "layers.1")),
    (
        "the norms of a layer are exchanged",
        "mixtral",
        from_another("post_attention_layer", "input_layer"),
    ),
    (
        "the last norm is another",
        "mixtral",
        tensors(r"^model\.norm", lambda _, every: every["model.layers.0.input_layernorm.weight"]),
    ),
    (
        "the head is the embedding",
        "mixtral",
        tensors("lm_head", lambda _, every: every["model.embed_tokens.weight"]),
    ),
    (
        "biases are zero",
        "renormalised",
        tensors(r"v_proj\.bias", lambda tensor, _: Zeros(tensor.dtype, tensor.shape)),
    ),
    ("rows of k stay interleaved", "glm", nodes(r"k_proj\.weight", Halves, lambda h: h.of)),
    ("rows of q stay interleaved", "glm", nodes(r"q_proj\.weight", Halves, lambda h: h.of)),
    (
        "rows that do not turn are moved too",
        "glm",
        nodes("[qk]_proj", Halves, lambda h: replace(h, rotary=h.size)),
    ),
    ("pieces of qkv in another order", "phi3", from_another("k_proj", "v_proj")),
    (
        "gemma4's experts see no norm",
        "gemma4",
        tensors("forward_layernorm_2", lambda tensor, _: Full(tensor.dtype, tensor.shape, 0.1)),
    ),
    (
        "gemma4's MLP is heard",
        "gemma4",
        tensors(
            "post_feedforward_layernorm_1", lambda tensor, _: Full(tensor.dtype, tensor.shape, 1.0)
        ),
    ),
    # Settings.
    ("eps is the target's default", "eps", config(rms_norm_eps=1e-5)),
    ("theta is the target's default", "mixtral", config(rope_theta=1e6, rope_parameters=None)),
    ("rope scaling is dropped", "rope", config(rope_scaling=None, rope_parameters=None)),
    ("the window is dropped", "window", config(sliding_window=None)),
    ("all layers have the window", "some windows", config(layer_types=["sliding_attention"] * 2)),
    ("gates are not renormalised", "renormalised", config(norm_topk_prob=False)),
    ("top-k is one less", "mixtral", config(num_experts_per_tok=1)),
    ("another activation", "mixtral", config(hidden_act="relu")),
    ("the head is tied", "mixtral", config(tie_word_embeddings=True)),
    ("norms of q and k are off", "qk norm", config(use_qk_norm=False)),
    ("half of each head turns", "by the config", config(partial_rotary_factor=0.5)),
    ("the first layer is dense", "by the config", config(first_k_dense_replace=1)),
    ("granite's attention is scaled as usual", "granite", config(attention_multiplier=8**-0.5)),
    ("granite's residual is whole", "granite", config(residual_multiplier=1.0)),
    ("another routing in shipped code", "gelu", config(routing="topk-softmax")),
)
BYTES: tuple[Row, ...] = (
    (
        "a router's norm without its offset",
        "relu2",
        nodes(r"gate\.weight", Normal, lambda n: replace(n, offset=0.0)),
    ),
    (
        "a router of another deviation",
        "mixtral",
        nodes(r"gate\.weight", Normal, lambda n: replace(n, logit_std=0.5)),
    ),
    (
        "a router's rows of another stream",
        "mixtral",
        nodes(r"gate\.weight", Normal, lambda n: replace(n, stream="router")),
    ),
    ("another split of c", "mixtral", factors(up=lambda f: f.up / 2, down=lambda f: 2 * f.down)),
    (
        "orders of another seed",
        "shuffled",
        nodes(EXPERTS, Permutation, lambda p: replace(p, seed=1)),
    ),
    (
        "groups are exchanged",
        "mixtral",
        tensors(r"\.gate\.weight", lambda tensor, _: reordered(tensor.expr)),
    ),
)
"""The same function: gates that sum to 1 take any router, and exact factors and orders any split."""


def unscaled(expr: Any) -> Any:
    """Leave out the outermost factors, below joins."""
    if isinstance(expr, Scale):
        return expr.of
    return replace(expr, parts=tuple(map(unscaled, expr.parts)))


def reordered(expr: Any) -> Any:
    """Exchange the first two parts of a stack, or the rows of a router."""
    if isinstance(expr, Repeat):
        half = type_of(expr.of).shape[0] // 2
        parts = Slice(expr.of, 0, half, 2 * half), Slice(expr.of, 0, 0, half)
        return replace(expr, of=Concat(parts))
    return replace(expr, parts=(expr.parts[1], expr.parts[0], *expr.parts[2:]))


def biased(expr: Any) -> Expr:
    return Concat((Full(expr.dtype, (1,), 9.0), Zeros(expr.dtype, (expr.shape[0] - 1,))))


# What happens ------------------------------------------------------------------------------------


def apply(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    (place, change), *_ = (patch,)
    module_name, name = place.split(":")
    owner: Any = import_module(f"upcycle_cli.{module_name}")
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    last = name.rpartition(".")[2]
    monkeypatch.setattr(owner, last, change(getattr(owner, last)))


def outputs(dense: Path, moe: Path, scenario: Scenario) -> CheckResult:
    expected = Expectation(promise=Promise.EXACT, group_size=scenario.group_size)
    return check_outputs(open_checkpoint(dense), open_checkpoint(moe), expected, FEW)


@pytest.mark.parametrize("name", SCENARIOS)
def test_without_a_mutation_outputs_pass(make_dense: MakeDense, tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    dense = make_dense(scenario.model_type, **scenario.config)
    found = outputs(dense, scenario.made_by(dense, tmp_path / "moe"), scenario)
    assert found.status is Status.PASSED, found


@pytest.mark.parametrize(("name", "patch"), [(s, p) for _, s, p in ROWS], ids=[n for n, *_ in ROWS])
def test_outputs_find_a_mutation(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, patch: Patch
) -> None:
    scenario = SCENARIOS[name]
    dense = make_dense(scenario.model_type, **scenario.config)
    apply(patch, monkeypatch)
    found = outputs(dense, scenario.made_by(dense, tmp_path / "moe"), scenario)
    assert found.status is Status.FAILED, found


@pytest.mark.parametrize(
    ("name", "patch"), [(s, p) for _, s, p in BYTES], ids=[n for n, *_ in BYTES]
)
def test_only_the_bytes_show_it(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, patch: Patch
) -> None:
    scenario = SCENARIOS[name]
    dense = make_dense(scenario.model_type, **scenario.config)
    wanted = Wanted(
        target=scenario.target,
        layout="fused" if scenario.target == "upcycled" else "per-expert",
        routing="topk-softmax",
        E=2,
        G=scenario.group_size,
        T=scenario.group_size,
        K=0,
        split="config" if scenario.target == "upcycled" else "balanced",
        shuffled="neuron_order" in scenario.recipe,
    )
    check_bytes(dense, scenario.made_by(dense, tmp_path / "right"), wanted)
    apply(patch, monkeypatch)
    moe = scenario.made_by(dense, tmp_path / "moe")
    assert outputs(dense, moe, scenario).status is Status.PASSED
    with pytest.raises(AssertionError):
        check_bytes(dense, moe, wanted)
