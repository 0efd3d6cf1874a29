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
from conftest import MakeDense  # noqa: TC002 - it is ours
from oracle import Wanted
from test_oracle import check as check_bytes

from upcycle_cli import Options, Recipe, convert, open_checkpoint
from upcycle_cli.plan import expressions as ex
from upcycle_cli.recipe.recipe import Promise
from upcycle_cli.verification.outputs import Expectation, check_outputs
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CheckResult, Status

FEW = TextOptions(tokens=64)
FACTORS = "recipe.recipe:Recipe.factors"
TENSORS = "plan.upcycle:TensorMaker.tensors"
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
    "balanced": Scenario(
        "nemotron",
        "upcycled",
        {"mlp_bias": True},
        {"granularity": 4, "top_k": 4, "scale_split": "balanced"},
    ),
    "gelu": Scenario("gpt2", "upcycled", {}, ALL_CHOSEN),
    "granite": Scenario("granite", "granitemoe"),
    "as granite": Scenario("llama", "granitemoe"),
    "ernie": Scenario("llama", "ernie4_5_moe"),
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


def tensors(pattern: str, change: Callable[[Any, dict[str, Any]], Any]) -> Patch:
    """Give each tensor that a pattern finds another expression, by it and by all of them."""

    def wrong(right: Iterator[Any]) -> Iterator[Any]:
        every = {tensor.name: tensor for tensor in right}
        chosen = [name for name in every if re.search(pattern, name)]
        assert chosen, pattern
        for name, tensor in every.items():
            if name in chosen:
                expr = change(tensor, {key: each.expr for key, each in every.items()})
                assert ex.type_of(expr) == ex.type_of(tensor.expr)
                yield replace(tensor, expr=expr)
            else:
                yield tensor

    return returns(TENSORS, lambda right: tuple(wrong(right)))


def from_another(this: str, other: str) -> Patch:
    """Give tensors the expressions of others; their names differ in `this`."""
    return tensors(re.escape(this), lambda tensor, every: every[tensor.name.replace(this, other)])


def exchanged(one: str, other: str, where: str = "") -> Patch:
    """Exchange pairs of tensors; their names differ in `one` and `other`."""

    def change(tensor: Any, every: dict[str, Any]) -> Any:
        there = (one, other) if one in tensor.name else (other, one)
        return every[tensor.name.replace(*there)]

    return tensors(f"{where}.*({re.escape(one)}|{re.escape(other)})", change)


def nodes(pattern: str, kind: type, change: Callable[[Any], ex.Expr]) -> Patch:
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


EXPERT = r"experts\.\d+\.(w\d|\w+_proj)\.weight|experts\.\w+_proj$"


def moved(by: int) -> Callable[[ex.Slice], ex.Slice]:
    """Shift the borders of a shard, as far as the matrix goes."""

    def change(node: ex.Slice) -> ex.Slice:
        size = ex.type_of(node.of).shape[node.dim]
        start = min(max(node.start + by, 0), size - node.stop + node.start)
        return replace(node, start=start, stop=start + node.stop - node.start)

    return change


def reordered(expr: Any) -> Any:
    """Exchange the first two parts of a stack, or the rows of a router."""
    if isinstance(expr, ex.Repeat):
        half = ex.type_of(expr.of).shape[0] // 2
        parts = ex.Slice(expr.of, 0, half, 2 * half), ex.Slice(expr.of, 0, 0, half)
        return replace(expr, of=ex.Concat(parts))
    return replace(expr, parts=(expr.parts[1], expr.parts[0], *expr.parts[2:]))


def filled(value: float) -> Callable[[Any, object], ex.Expr]:
    return lambda tensor, _: ex.Full(tensor.dtype, tensor.shape, value)


C = "recipe.recipe:Recipe._compensation"
Row = tuple[str, str, Patch]
"""What is wrong, the scenario in which it shows, and what is patched."""
# fmt: off
ROWS: tuple[Row, ...] = (
    # Factors.
    ("up is doubled", "mixtral", factors(up=lambda f: 2 * f.up)),
    ("the gate is scaled", "mixtral", factors(gate=lambda _: 2.0, down=lambda f: f.down / 2)),
    ("nothing is scaled", "mixtral", factors(up=lambda _: 1.0, down=lambda _: 1.0)),
    ("c counts shared shards", "shared", returns(C, lambda c: 1.5 * c)),
    ("relu² is taken for linear", "balanced", returns("models.dense:degree", lambda _: 1)),
    ("a down bias keeps its size", "gelu", factors(down_bias=lambda _: 1.0)),
    ("an up bias is not scaled", "balanced", nodes("up_proj_bias", ex.Scale, lambda node: node.of)),
    ("the config's factor is 1", "by the config", config(routed_scaling_factor=1.0)),
    ("the config's factor is squared", "by the config", config(routed_scaling_factor=4.0)),
    ("c is in the config and in down", "by the config", factors(down=lambda f: f.config)),
    # Shards and experts.
    ("borders are off by one", "mixtral", nodes(EXPERT, ex.Slice, moved(1))),
    ("gate and up are exchanged", "mixtral", exchanged(".w1.", ".w3.", "layers.0")),
    ("up comes first in a joined tensor", "fused",
     nodes("gate_up_proj", ex.Concat, lambda node: ex.Concat(node.parts[::-1]))),
    ("every expert holds the first shard", "mixtral",
     tensors(r"w1\.weight", lambda t, every: every[re.sub(r"\d\.w1", "0.w1", t.name)])),
    ("groups count before shards", "mixtral", exchanged("experts.1.", "experts.2.")),
    ("one expert is its neighbour", "mixtral", from_another("experts.3.w3", "experts.2.w3")),
    ("layers are exchanged", "mixtral", exchanged("layers.0.block", "layers.1.block")),
    ("a stack is in another order", "granite",
     tensors("input_linear", lambda t, _: reordered(t.expr))),
    ("down keeps the dense order", "shuffled",
     nodes(r"w2\.weight", ex.Gather, lambda n: ex.Slice(n.of, n.dim, n.start, n.stop))),
    ("up has an order of its own", "shuffled",
     nodes(r"w3\.weight", ex.Permutation, lambda node: replace(node, stream="another"))),
    ("the second shard is shared", "shared", nodes(r"shared_expert\.up_proj", ex.Slice, moved(16))),
    ("a shared gate's half is forgotten", "shared",
     nodes(r"shared_expert\.down", ex.Scale, lambda node: node.of)),
    ("an inert shared expert computes", "all chosen", tensors(r"shared_expert\.down", filled(0.1))),
    # Routers.
    ("rows differ inside a group", "mixtral",
     nodes(r"1.*gate\.weight", ex.Repeat, lambda node: replace(node.of, shape=(4, 32)))),
    ("rows take turns between groups", "mixtral",
     nodes(r"\.gate\.weight", ex.Repeat, lambda node: ex.Concat((node.of, node.of)))),
    ("a correction bias prefers an expert", "by the config",
     nodes("correction_bias", ex.Full,
           lambda _: ex.Concat((ex.Full("F32", (1,), 9.0), ex.Full("F32", (3,)))))),
    # What is copied.
    ("k and v are exchanged", "mixtral", exchanged("v_proj", "k_proj", "layers.1")),
    ("norms are exchanged", "mixtral", exchanged("post_attention_layer", "input_layer")),
    ("the last norm is halved in part", "mixtral",
     nodes(r"^model\.norm", ex.Source, lambda node: ex.Concat((
         ex.Scale(ex.Slice(node, 0, 0, 16), 0.5), ex.Slice(node, 0, 16, 32))))),
    ("the embedding is the head", "mixtral", exchanged("lm_head", "model.embed_tokens")),
    ("biases of attention are dropped", "renormalised",
     nodes(r"v_proj\.bias", ex.Source, lambda node: ex.Scale(node, 0.0))),
    ("rows of k are not permuted", "glm",
     nodes(r"k_proj\.weight", ex.RotaryRows, lambda node: node.of)),
    ("rows that do not turn are permuted", "glm",
     nodes("[qk]_proj", ex.RotaryRows, lambda node: replace(node, rotary=node.size))),
    ("rows of q stay halves", "ernie",
     nodes(r"q_proj\.weight", ex.RotaryRows, lambda node: node.of)),
    ("rows are split, not interleaved", "ernie",
     nodes("[qk]_proj", ex.RotaryRows, lambda node: replace(node, interleave=False))),
    ("pieces of qkv are exchanged", "phi3", exchanged("k_proj", "v_proj")),
    ("gemma4's experts see no norm", "gemma4", tensors("pre_feed.*norm_2", filled(0.1))),
    ("gemma4's MLP is not silenced", "gemma4", tensors("post_feed.*norm_1", filled(1.0))),
    # Settings.
    ("eps is the target's default", "eps", config(rms_norm_eps=1e-5)),
    ("theta is the target's default", "mixtral", config(rope_theta=1e6, rope_parameters=None)),
    ("rope scaling is dropped", "rope", config(rope_scaling=None, rope_parameters=None)),
    ("the window is dropped", "window", config(sliding_window=None)),
    ("all layers have the window", "some windows", config(layer_types=["sliding_attention"] * 2)),
    ("gates are not renormalised", "renormalised", config(norm_topk_prob=False)),
    ("top-k is one less", "mixtral", config(num_experts_per_tok=1)),
    ("the activation is another", "mixtral", config(hidden_act="relu")),
    ("norms of q and k are off", "qk norm", config(use_qk_norm=False)),
    ("half of each head turns", "by the config", config(partial_rotary_factor=0.5)),
    ("the first layer is dense", "by the config", config(first_k_dense_replace=1)),
    ("attention has the usual scale", "granite", config(attention_multiplier=8**-0.5)),
    ("attention has granite's scale", "as granite", config(attention_multiplier=1.0)),
    ("shipped code routes otherwise", "relu2", config(routing="softmax-topk")),
)
BYTES: tuple[Row, ...] = (
    ("a norm's offset is forgotten", "relu2",
     nodes(r"gate\.weight", ex.Normal, lambda node: replace(node, offset=0.0))),
    ("router logits are half as large", "mixtral",
     nodes(r"gate\.weight", ex.Normal, lambda node: replace(node, logit_std=0.5))),
    ("routers are drawn from another stream", "mixtral",
     nodes(r"gate\.weight", ex.Normal, lambda node: replace(node, stream="router"))),
    ("rows of groups are exchanged", "mixtral",
     tensors(r"\.gate\.weight", lambda t, _: reordered(t.expr))),
    ("c is split another way", "mixtral",
     factors(up=lambda f: f.up / 2, down=lambda f: 2 * f.down)),
    ("orders are another seed's", "shuffled",
     nodes(EXPERT, ex.Permutation, lambda node: replace(node, seed=1))),
)
# fmt: on
"""The same function: gates that sum to 1 take any router, and any exact split or order will do."""


# What happens ------------------------------------------------------------------------------------


def apply(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    place, change = patch
    module_name, name = place.split(":")
    owner: Any = import_module(f"upcycle_cli.{module_name}")
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    last = name.rpartition(".")[2]
    monkeypatch.setattr(owner, last, change(getattr(owner, last)))


def outputs(dense: Path, moe: Path, scenario: Scenario) -> CheckResult:
    expected = Expectation(promise=Promise.EXACT, group_size=scenario.group_size)
    return check_outputs(open_checkpoint(dense), open_checkpoint(moe), expected, FEW)


def test_the_readme_lists_every_mutation() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    wanted = [f"| {name} | {scenario} | outputs |" for name, scenario, _ in ROWS]
    wanted += [f"| {name} | {scenario} | bytes |" for name, scenario, _ in BYTES]
    assert [
        line for line in page.splitlines() if line.endswith((" outputs |", " bytes |"))
    ] == wanted


@pytest.mark.parametrize(
    ("name", "patch"),
    [*((s, p) for _, s, p in ROWS), *((s, None) for s in SCENARIOS)],
    ids=[*(n for n, *_ in ROWS), *(f"nothing in {s}" for s in SCENARIOS)],
)
def test_outputs_find_a_mutation_and_nothing_else(
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    patch: Patch | None,
) -> None:
    scenario = SCENARIOS[name]
    dense = make_dense(scenario.model_type, **scenario.config)
    if patch is not None:
        apply(patch, monkeypatch)
    found = outputs(dense, scenario.made_by(dense, tmp_path / "moe"), scenario)
    assert found.status is (Status.PASSED if patch is None else Status.FAILED), found


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
