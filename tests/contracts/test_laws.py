"""What holds of any conversion, whatever the recipe, the model and the options.

Each drawn conversion is held to the oracle, bit for bit, whatever its shards, dtypes and seeds.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from conftest import read_json, read_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Wanted
from shapes import PAIRS, TORCH, moe_shapes, same_bits, tiny_config, write_model
from test_oracle import check

from upcycle_cli import Options, Recipe, convert
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.options import ExpertLayout

LAWS = settings(max_examples=25, deadline=None)
STD = {"softmax-topk": 0.001, "topk-softmax": 1.0, "sigmoid-topk": 1.0}


@dataclass(frozen=True)
class Case:
    """One conversion, before it is made."""

    config: dict[str, Any]
    dtype: str
    weights_seed: int
    wanted: Wanted
    shard_bytes: int
    untie: bool

    def convert(self, dense: Path, moe: Path) -> Path:
        w = self.wanted
        recipe = Recipe(
            expansion=w.E,
            granularity=w.G,
            top_k=w.T,
            routing=w.routing,  # type: ignore[arg-type]
            scaling=w.scaling,  # type: ignore[arg-type]
            scale_split=w.split,  # type: ignore[arg-type]
            neuron_order="shuffled" if w.shuffled else "sliced",  # type: ignore[arg-type]
            router_logit_std=w.std,
            seed=w.seed,
        )
        options = Options(
            dtype=None if w.dtype is None else str(w.dtype).removeprefix("torch."),
            expert_layout=w.layout,  # type: ignore[arg-type]
            max_shard_bytes=self.shard_bytes,
            untie_embeddings=self.untie,
        )
        convert(dense, moe, recipe, target=w.target, options=options)
        return moe

    @contextmanager
    def made(self, *others: Wanted) -> Iterator[tuple[Path, list[Path]]]:
        """Make the dense model, its MoE, and those of other wishes."""
        with tempfile.TemporaryDirectory() as directory:
            dense = Path(directory) / "dense"
            write_model(dense, self.config, dtype=self.dtype, seed=self.weights_seed)
            cases = [replace(self, wanted=wanted) for wanted in (self.wanted, *others)]
            yield dense, [c.convert(dense, Path(directory) / f"{i}") for i, c in enumerate(cases)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model_type = draw(st.sampled_from(sorted(PAIRS)))
    target = draw(st.sampled_from(PAIRS[model_type]))
    granularity, expansion = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.integers(1, 4))
    routing = str(draw(st.sampled_from(NATIVE[target].routings)))
    wanted = Wanted(
        target=target,
        layout=str(draw(st.sampled_from(tuple(NATIVE[target].layouts)))),
        routing=routing,
        E=expansion,
        G=granularity,
        T=granularity * draw(st.integers(1, expansion)),
        K=0,
        scaling=draw(st.sampled_from(["exact", "paper", "none"]) | st.floats(1, 100)),
        split=draw(st.sampled_from(["balanced", "down"])),
        shuffled=draw(st.booleans()),
        std=draw(st.just(STD[routing]) | st.floats(1e-3, 10)),
        seed=draw(st.integers(0, 2**63 - 1)),
        dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32])),
    )
    config = tiny_config(
        model_type,
        num_hidden_layers=draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )
    dtype, weights_seed = draw(st.sampled_from(sorted(TORCH))), draw(st.integers(0, 2**32))
    return Case(
        config, dtype, weights_seed, wanted, draw(st.integers(1, 20_000)), draw(st.booleans())
    )


@LAWS
@given(case=cases())
def test_every_byte_is_the_oracles(case: Case) -> None:
    with case.made() as (dense, (moe,)):
        check(dense, moe, case.wanted)


@LAWS
@given(case=cases())
def test_shapes_are_those_of_transformers_own_model(case: Case) -> None:
    with case.made() as (_, (moe,)):
        config, found = read_json(moe / "config.json"), read_tensors(moe)
    shapes = moe_shapes(config, ExpertLayout(case.wanted.layout))
    if "lm_head.weight" in found:  # which a tied model may carry
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert len({tensor.dtype for tensor in found.values()}) == 1


@LAWS
@given(case=cases(), exponent=st.integers(0, 6))
def test_powers_of_two_can_be_taken_out_again(case: Case, exponent: int) -> None:
    """Bit for bit, subnormal numbers and negative zeros included."""
    w = replace(case.wanted, scaling=2.0**exponent, split="down", shuffled=False)
    plain = replace(w, scaling="none")
    with replace(case, wanted=w).made(plain) as (_, (moe, other)):
        mine, theirs = read_tensors(moe), read_tensors(other)
    for name, tensor in mine.items():
        factor = 2.0**exponent if re.search(r"experts\..*(w2|down_proj)", name) else 1.0
        assert same_bits(tensor / factor, theirs[name]), name
