"""Older checkpoints and flat routers: logits by transformers' code in float64.

What settings of a config mean is held by tests/models/test_dense.py, for every family.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, clone, difference, logits, random_ids
from safetensors.torch import load_file, save_file

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.recipe.recipe import Routing

Tensors = dict[str, torch.Tensor]


def head(held: Tensors) -> None:
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()


def frequencies(held: Tensors) -> None:
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def wide_norms(held: Tensors) -> None:
    held |= {name: tensor.double().float() for name, tensor in held.items() if "norm" in name}


@pytest.mark.parametrize(
    ("sizes", "edit"),
    [({"tie_word_embeddings": True}, head), ({}, frequencies), ({"dtype": "bfloat16"}, wide_norms)],
    ids=["a tied head that is stored", "rotary frequencies", "several dtypes"],
)
def test_tensors_of_older_checkpoints(
    make_dense: MakeDense, tmp_path: Path, sizes: dict[str, Any], edit: Callable[[Tensors], None]
) -> None:
    dense, moe = clone(make_dense("llama", **sizes), tmp_path / "dense"), tmp_path / "moe"
    held = load_file(dense / "model.safetensors")
    edit(held)
    save_file(held, dense / "model.safetensors", metadata={"format": "pt"})
    convert(dense, moe, Recipe("E2G2T2"), target="mixtral")
    assert difference(*(logits(path, random_ids()) for path in (moe, dense))) < 1e-10
    assert verify(dense, moe, checks=["directory", "weights"]).accepted


@pytest.mark.parametrize("name", ["E4G1T2", "E2G3T3"])
def test_plain_gates_are_closer_for_a_flatter_router(
    llama: Path, tmp_path: Path, name: str
) -> None:
    ids, errors = random_ids(), []
    for std in (0.1, None):  # None is the default, 0.001
        soft = Recipe(name, routing=Routing.SOFTMAX_TOPK, router_logit_std=std)
        moe = convert(llama, tmp_path / str(std), soft, target="qwen2_moe").output
        errors.append(difference(logits(moe, ids), logits(llama, ids)))
    # The error is of first order in the logits: a hundredth of them, a hundredth of it.
    assert errors[1] < 1e-2
    assert 50 < errors[0] / errors[1] < 200
