"""What must hold of any conversion, whatever the recipe, the model and the options."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from conftest import LAYOUTS
from engine_fixtures import staging_in
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shapes import PAIRS, TORCH, moe_shapes, same_bits, tiny_config, write_model

from upcycle_cli import Options, Recipe, build_plan, open_checkpoint
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import ExpertLayout, NeuronOrder, Routing, ScaleSplit, Scaling
from upcycle_cli.recipe.scaling import Factors
from upcycle_cli.write.writer import WriteOptions, write_weights

Tensors = dict[str, torch.Tensor]
INNER = 12  # tiny_config's intermediate size
MATRICES = ("gate", "up", "down")
LAWS = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Case:
    """One conversion, before it is made."""

    config: dict[str, Any]
    dtype: str
    weights_seed: int
    recipe: Recipe
    target: str
    options: Options


@dataclass(frozen=True)
class Outcome:
    """The dense model's tensors in the output dtype, the MoE's, and what they promise."""

    plan: Plan
    dense: Tensors
    moe: Tensors

    @property
    def layers(self) -> range:
        return range(self.plan.config["num_hidden_layers"])

    @property
    def granularity(self) -> int:
        return self.plan.recipe.granularity


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model_type = draw(st.sampled_from(sorted(PAIRS)))
    target = draw(st.sampled_from(PAIRS[model_type]))
    granularity = draw(st.sampled_from([1, 2, 3, 4, 6]))
    expansion = draw(st.integers(1, 4))
    scaling: Scaling | float = draw(st.sampled_from(Scaling) | st.floats(1, 100))
    recipe = Recipe(
        expansion=expansion,
        granularity=granularity,
        top_k=granularity * draw(st.integers(1, expansion)),
        routing=draw(st.none() | st.sampled_from(NATIVE[target].routings)),
        scaling=scaling,
        scale_split=draw(st.sampled_from([ScaleSplit.BALANCED, ScaleSplit.DOWN])),
        neuron_order=draw(st.sampled_from([NeuronOrder.SLICED, NeuronOrder.SHUFFLED])),
        router_logit_std=draw(st.none() | st.floats(1e-3, 10)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    options = Options(
        dtype=draw(st.sampled_from([None, "bfloat16", "float16", "float32"])),
        expert_layout=draw(st.sampled_from(tuple(NATIVE[target].layouts))),
        max_shard_bytes=draw(st.integers(1, 20_000)),
        untie_embeddings=draw(st.booleans()),
    )
    config = tiny_config(
        model_type,
        num_hidden_layers=draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )
    dtype, weights_seed = draw(st.sampled_from(sorted(TORCH))), draw(st.integers(0, 2**32))
    return Case(config, dtype, weights_seed, recipe, target, options)


@contextmanager
def source_of(case: Case) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "dense"
        write_model(path, case.config, dtype=case.dtype, seed=case.weights_seed)
        yield path


def convert(case: Case, dense: Path) -> Outcome:
    plan = build_plan(case.recipe, open_checkpoint(dense), target=case.target, options=case.options)
    dtype = TORCH[case.options.storage_dtype or case.dtype]
    source = {name: t.to(dtype) for name, t in load_file(dense / "model.safetensors").items()}
    with tempfile.TemporaryDirectory() as directory:
        options = WriteOptions(fsync=False)
        staging = staging_in(plan, Path(directory))
        write_weights(plan, plan.shards, staging, progress=lambda _: None, options=options)
        moe: Tensors = {}
        for shard in Path(directory).glob("*.safetensors"):
            loaded = load_file(shard)
            assert not loaded.keys() & moe.keys()
            moe |= {name: tensor.clone() for name, tensor in loaded.items()}
    return Outcome(plan, source, moe)


def law(check: Callable[[Outcome], None]) -> Callable[[], None]:
    """Hold a check against any conversion."""

    @LAWS
    @given(case=cases())
    def test(case: Case) -> None:
        with source_of(case) as dense:
            check(convert(case, dense))

    wrapped: Callable[[], None] = test
    wrapped.__name__ = check.__name__
    wrapped.__doc__ = check.__doc__
    return wrapped


def experts(outcome: Outcome, layer: int) -> list[Tensors]:
    """Gate, up and down of each expert of a layer, by the names of the released checkpoints."""
    prefix, moe, plan = f"model.layers.{layer}", outcome.moe, outcome.plan
    count = plan.recipe.num_experts
    if plan.options.expert_layout is ExpertLayout.FUSED:
        gate_up = moe[f"{prefix}.mlp.experts.gate_up_proj"]
        down = moe[f"{prefix}.mlp.experts.down_proj"]
        assert len(gate_up) == len(down) == count
        halves = [matrix.chunk(2) for matrix in gate_up]
        return [{"gate": gate, "up": up, "down": down[e]} for e, (gate, up) in enumerate(halves)]
    if plan.family.target.model_type == "mixtral":
        block, names = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    else:
        block, names = "mlp", {matrix: f"{matrix}_proj" for matrix in ("gate", "up", "down")}
    return [
        {
            matrix: moe[f"{prefix}.{block}.experts.{expert}.{name}.weight"]
            for matrix, name in names.items()
        }
        for expert in range(count)
    ]


def router(outcome: Outcome, layer: int) -> torch.Tensor:
    fused = outcome.plan.options.expert_layout is ExpertLayout.FUSED
    mixtral = outcome.plan.family.target.model_type == "mixtral"
    block = "block_sparse_moe" if mixtral and not fused else "mlp"
    return outcome.moe[f"model.layers.{layer}.{block}.gate.weight"]


def groups(outcome: Outcome, layer: int) -> Iterator[Tensors]:
    """Each virtual group's shards joined to whole matrices again, still scaled.

    Where neurons were shuffled, they are where the dense MLP has them: each is found once.
    """
    found, size = experts(outcome, layer), outcome.granularity
    for group in range(outcome.plan.recipe.expansion):
        members = found[group * size : (group + 1) * size]
        joined = {
            matrix: torch.cat([expert[matrix] for expert in members], dim=int(matrix == "down"))
            for matrix in MATRICES
        }
        if group and outcome.plan.recipe.neuron_order is NeuronOrder.SHUFFLED:
            places: dict[bytes, list[int]] = {}
            for place, neuron in enumerate(neurons(joined)):
                places.setdefault(neuron, []).append(place)
            order = torch.tensor(
                [places[neuron].pop() for neuron in neurons(scaled(outcome, layer))]
            )
            joined = {
                matrix: whole.index_select(int(matrix == "down"), order)
                for matrix, whole in joined.items()
            }
        yield joined


def neurons(mlp: Tensors) -> list[bytes]:
    """All weights of each neuron."""
    rows = torch.cat([mlp["gate"], mlp["up"], mlp["down"].T], dim=1)
    return [row.view(torch.uint8).numpy().tobytes() for row in rows]


def scaled(outcome: Outcome, layer: int) -> Tensors:
    """The dense MLP as an MoE must hold it: round(cast(dense) × factor)."""
    return {
        matrix: (dense.float() * factor(outcome.plan.factors, matrix)).to(dense.dtype)
        for matrix in MATRICES
        for dense in [dense_mlp(outcome, layer, matrix)]
    }


def factor(factors: Factors, matrix: str) -> float:
    value = getattr(factors, matrix)
    assert isinstance(value, float)
    return value


def dense_mlp(outcome: Outcome, layer: int, matrix: str) -> torch.Tensor:
    return outcome.dense[f"model.layers.{layer}.mlp.{matrix}_proj.weight"]


# The laws ----------------------------------------------------------------------------------------


def check_groups_are_the_dense_mlp(outcome: Outcome) -> None:
    """Stated so that it is exact even when the factors round: round(cast(dense) × factor)."""
    for layer in outcome.layers:
        for group in groups(outcome, layer):
            for matrix, wanted in scaled(outcome, layer).items():
                assert same_bits(group[matrix], wanted), matrix


def check_every_expert_is_there(outcome: Outcome) -> None:
    """As many as the config says, and copies at the same place of every group that is sliced."""
    plan = outcome.plan
    shuffled = plan.recipe.neuron_order is NeuronOrder.SHUFFLED
    keys = plan.family.target.keys
    assert plan.config[keys.num_experts] == plan.recipe.num_experts
    for layer in outcome.layers:
        found = experts(outcome, layer)
        assert len(found) == plan.config[keys.num_experts]
        for number, expert in enumerate(found):
            assert expert["gate"].shape[0] == plan.config[keys.expert_size]
            first = found[number % outcome.granularity]
            alike = all(same_bits(expert[matrix], first[matrix]) for matrix in expert)
            assert alike or (shuffled and number >= outcome.granularity)


def check_everything_else_is_untouched(outcome: Outcome) -> None:
    copied = {name for name in outcome.dense if ".mlp." not in name}
    for name in copied:
        assert same_bits(outcome.moe[name], outcome.dense[name]), name
    # And nothing is there that is not a copy, an expert, a router or an inert part.
    rest = outcome.moe.keys() - copied
    made = re.compile(
        r"\.(mlp|block_sparse_moe)\.(gate|experts|shared_expert|shared_expert_gate)\."
    )
    for name in rest:
        if name == "lm_head.weight":
            assert outcome.plan.options.untie_embeddings
            assert same_bits(outcome.moe[name], outcome.dense["model.embed_tokens.weight"])
        elif name.endswith("_proj.bias"):
            assert outcome.plan.family.target.model_type == "qwen2_moe"
            assert not outcome.moe[name].any()
        else:
            assert made.search(name), name


def check_types_are_what_the_config_implies(outcome: Outcome) -> None:
    plan = outcome.plan
    wanted = moe_shapes(plan.config, plan.expert_layout)
    if "lm_head.weight" in outcome.moe:  # which a tied model may carry
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in outcome.moe.items()} == wanted
    assert len({tensor.dtype for tensor in outcome.moe.values()}) == 1
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == wanted


def check_router_rows_are_equal_inside_a_group_and_nowhere_else(outcome: Outcome) -> None:
    for layer in outcome.layers:
        rows = router(outcome, layer)
        assert rows.shape == (outcome.plan.recipe.num_experts, 8)
        assert rows.isfinite().all()
        for one in range(len(rows)):
            for other in range(one):
                same_group = one // outcome.granularity == other // outcome.granularity
                assert same_bits(rows[one], rows[other]) == same_group


test_groups_are_the_dense_mlp = law(check_groups_are_the_dense_mlp)
test_every_expert_is_there = law(check_every_expert_is_there)
test_everything_else_is_untouched = law(check_everything_else_is_untouched)
test_types_are_what_the_config_implies = law(check_types_are_what_the_config_implies)
test_router_rows_are_equal_inside_a_group_and_nowhere_else = law(
    check_router_rows_are_equal_inside_a_group_and_nowhere_else
)


@LAWS
@given(case=cases(), exponent=st.integers(0, 6))
def test_powers_of_two_can_be_taken_out_again(case: Case, exponent: int) -> None:
    """Bit for bit, from any group, subnormal numbers and negative zeros included."""
    case = replace(case, recipe=replace(case.recipe, scaling=2.0**exponent))
    with source_of(case) as dense:
        outcome = convert(case, dense)
    factors = outcome.plan.factors
    assert outcome.plan.rounded_to is None
    assert factors.up * factors.down == 2.0**exponent
    for layer in outcome.layers:
        for group in groups(outcome, layer):
            for matrix, whole in group.items():
                unscaled = whole / factor(factors, matrix)
                assert same_bits(unscaled, dense_mlp(outcome, layer, matrix))


@LAWS
@given(case=cases())
def test_exact_factors_of_powers_of_two_lose_nothing(case: Case) -> None:
    """What the recipe itself asks for, where E, G and T are powers of two."""
    recipe = replace(case.recipe, scaling=Scaling.EXACT)
    assume(all(n & (n - 1) == 0 for n in (recipe.expansion, recipe.granularity, recipe.top_k)))
    with source_of(case) as dense:
        outcome = convert(replace(case, recipe=recipe), dense)
    for group in groups(outcome, 0):
        for matrix, whole in group.items():
            unscaled = whole / factor(outcome.plan.factors, matrix)
            assert same_bits(unscaled, dense_mlp(outcome, 0, matrix))


@LAWS
@given(case=cases(), shard_bytes=st.integers(1, 20_000))
def test_shard_size_changes_no_tensor(case: Case, shard_bytes: int) -> None:
    options = replace(case.options, max_shard_bytes=shard_bytes)
    with source_of(case) as dense:
        one, other = convert(case, dense), convert(replace(case, options=options), dense)
    assert one.moe.keys() == other.moe.keys()
    assert all(same_bits(one.moe[name], other.moe[name]) for name in one.moe)


@LAWS
@given(case=cases())
def test_layouts_hold_the_same_experts_and_routers(case: Case) -> None:
    outcomes = []
    with source_of(case) as dense:
        for layout in LAYOUTS:
            options = replace(case.options, expert_layout=layout)
            outcomes.append(convert(replace(case, options=options), dense))
    one, other = outcomes
    for layer in one.layers:
        assert same_bits(router(one, layer), router(other, layer))
        for mine, theirs in zip(experts(one, layer), experts(other, layer), strict=True):
            assert all(same_bits(mine[matrix], theirs[matrix]) for matrix in mine)


@LAWS
@given(case=cases(), seed=st.integers(0, 2**63 - 1))
def test_a_seed_changes_routers_and_nothing_else(case: Case, seed: int) -> None:
    assume(seed != case.recipe.seed)
    case = replace(case, recipe=replace(case.recipe, neuron_order=NeuronOrder.SLICED))
    with source_of(case) as dense:
        one = convert(case, dense)
        other = convert(replace(case, recipe=replace(case.recipe, seed=seed)), dense)
    changed = {name for name in one.moe if not same_bits(one.moe[name], other.moe[name])}
    drawn = re.compile(r"((?<!proj)gate|shared_expert\.(gate|up)_proj)\.weight$")
    assert changed == {name for name in one.moe if drawn.search(name)}


@LAWS
@given(case=cases(), top_k=st.integers(1, 4), routing=st.sampled_from(Routing))
def test_what_the_router_does_changes_no_router(case: Case, top_k: int, routing: Routing) -> None:
    """Top-k and routing are the config's and the factors' business."""
    target = NATIVE[case.target]
    assume(routing in target.routings)
    groups_chosen = min(top_k, case.recipe.expansion)
    recipe = replace(case.recipe, routing=routing, router_logit_std=0.5)
    other_recipe = replace(recipe, top_k=groups_chosen * recipe.granularity)
    with source_of(case) as dense:
        one = convert(replace(case, recipe=recipe), dense)
        other = convert(replace(case, recipe=other_recipe), dense)
    for layer in one.layers:
        assert same_bits(router(one, layer), router(other, layer))
