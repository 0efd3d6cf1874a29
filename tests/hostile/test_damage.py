"""Damage to an MoE's files: each row is one kind, which the comparison with the plan must name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from verified import (
    ATTENTION,
    EXPERT,
    MIXTRAL_EXPERT,
    ROUTER,
    Tensors,
    edit_json,
    edit_tensors,
    flip_byte,
    text_of,
)

from upcycle_cli import Recipe, convert, open_checkpoint, verify
from upcycle_cli.verification.result import Status

Damage = Callable[[Path], object]
Row = tuple[str, Damage, str]


def w(layer: int, expert: int, matrix: int) -> str:
    """Return the name of an expert's matrix: 1 is the gate, 2 down, 3 up."""
    return MIXTRAL_EXPERT.format(layer, expert, f"w{matrix}")


QWEN_ROUTER = "model.layers.0.mlp.gate.weight"
SHARED = "model.layers.{}.mlp.shared_expert"


def tensors(edit: Callable[[Tensors], object]) -> Damage:
    return lambda moe: edit_tensors(moe, edit)


def flip(name: str) -> Damage:
    return lambda moe: flip_byte(moe, name)


def put(name: str, value: Callable[[Tensors], torch.Tensor]) -> Damage:
    return tensors(lambda held: held.update({name: value(held)}))


def scaled(factors: dict[str, float], layers: tuple[int, ...] = (0, 1), experts: int = 4) -> Damage:
    def edit(held: Tensors) -> None:
        for layer in layers:
            for expert in range(experts):
                for matrix, factor in factors.items():
                    held[MIXTRAL_EXPERT.format(layer, expert, matrix)] *= factor

    return tensors(edit)


def swapped(one: str, other: str, dim: int | None = None, *places: int) -> Damage:
    def edit(held: Tensors) -> None:
        if dim is None:
            held[one], held[other] = held[other], held[one]
            return
        index = torch.tensor(places)
        held[one].index_copy_(dim, index, held[one].index_select(dim, index.flip(0)))

    return tensors(edit)


def config(**changes: object) -> Damage:
    return lambda moe: edit_json(moe / "config.json", lambda value: value.update(changes))


def record(path: str, value: object) -> Damage:
    def edit(held: dict[str, Any]) -> None:
        *outer, key = path.split("/")
        for name in outer:
            held = held[name]
        held[key] = value

    return lambda moe: edit_json(moe / "upcycle.json", edit)


def index(**changes: object) -> Damage:
    name = "model.safetensors.index.json"
    return lambda moe: edit_json(moe / name, lambda value: value["metadata"].update(changes))


def another_file_of_the_index(moe: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        files = value["weight_map"]
        files[EXPERT] = next(file for file in files.values() if file != files[EXPERT])

    edit_json(moe / "model.safetensors.index.json", edit)


def swapped_between_files(moe: Path) -> None:
    entries = open_checkpoint(moe).tensors
    pair = [entries[MIXTRAL_EXPERT.format(0, expert, "w1")] for expert in (0, 3)]
    assert pair[0].shard != pair[1].shard
    values = [(moe / e.shard).read_bytes()[e.offset : e.offset + e.nbytes] for e in pair]
    for entry, value in zip(pair, reversed(values), strict=True):
        with (moe / entry.shard).open("r+b") as file:
            file.seek(entry.offset)
            file.write(value)


def cut_off(moe: Path) -> None:
    (moe / "model.safetensors").write_bytes((moe / "model.safetensors").read_bytes()[:-10])


WEIGHTS: tuple[Row, ...] = (
    # name (and which MoE, if not the plain one), what is damaged, words of the report
    ("a bit of an expert", flip(w(1, 3, 2)), "3.w2.weight differs in 1 of"),
    ("a bit of attention", flip(ATTENTION), f"{ATTENTION} differs in 1 of"),
    ("a bit of a router", flip(ROUTER), f"{ROUTER} differs in 1 of"),
    (
        "qwen: a row of a router",
        tensors(lambda t: t[QWEN_ROUTER][3].mul_(-1)),
        f"{QWEN_ROUTER} differs in 32 of 256 elements, first at [3, 0]",
    ),
    (
        "another router",
        put(ROUTER, lambda _: torch.randn(2, 32).repeat_interleave(2, 0).bfloat16()),
        ROUTER,
    ),
    ("a router of nans", tensors(lambda t: t[ROUTER].fill_(torch.nan)), "nan instead of"),
    ("a larger router", tensors(lambda t: t[ROUTER].mul_(8)), "multiplied by a further 8"),
    (
        "another shard",
        put(w(1, 2, 2), lambda t: t[w(1, 3, 2)]),
        "2.w2.weight holds shard 1 where shard 0 belongs",
    ),
    ("sharded: exchanged between files", swapped_between_files, "0.w1.weight holds shard 1"),
    ("gate and up exchanged", swapped(w(0, 0, 1), w(0, 0, 3)), "0.w1.weight | 0.w3.weight"),
    ("exchanged rows", swapped(EXPERT, EXPERT, 0, 3, 11), "has rows 3 and 11 exchanged"),
    ("exchanged columns", swapped(w(1, 3, 2), "", 1, 0, 20), "has columns 0 and 20 exchanged"),
    (
        "scaled twice",
        scaled({"w3": 2}),
        "w3.weight is its expected value multiplied by a further 2",
    ),
    ("one expert by 1.05", tensors(lambda t: t[EXPERT].mul_(1.05)), "multiplied by a further 1.05"),
    (
        "qwen: a bias that is to be zero",
        tensors(lambda t: t["model.layers.1.self_attn.q_proj.bias"].fill_(1.0)),
        "q_proj.bias differs in 32 of 32 | instead of 0",
    ),
    (
        "qwen: an inert expert that works",
        tensors(lambda t: t[f"{SHARED.format(0)}.down_proj.weight"].fill_(0.5)),
        "shared_expert.down_proj.weight | instead of 0",
    ),
    (
        "qwen: a gate that divides by zero",
        tensors(lambda t: t[f"{SHARED.format(1)}_gate.weight"].zero_()),
        "shared_expert_gate.weight",
    ),
    ("a missing expert", tensors(lambda t: t.pop(EXPERT)), f"{EXPERT} is missing"),
    (
        "a renamed tensor",
        tensors(lambda t: t.update({f"{EXPERT}s": t.pop(EXPERT)})),
        f"{EXPERT} is missing | {EXPERT}s should not be there",
    ),
    (
        "an extra expert",
        put(w(0, 4, 1), lambda _: torch.zeros(32, 32)),
        "4.w1.weight should not be there",
    ),
    (
        "another shape",
        put(ROUTER, lambda t: t[ROUTER][:-1]),
        f"{ROUTER} has shape [3, 32] instead of [4, 32]",
    ),
    (
        "integers",
        put(EXPERT, lambda t: t[EXPERT].to(torch.int8)),
        f"{EXPERT} is I8 instead of BF16",
    ),
    ("dtype of the record", record("dtype", "float32"), "is BF16 instead of F32"),
)


FILES: tuple[Row, ...] = (
    # name (and which MoE, if not the plain one), what is damaged, words of the report
    ("top-k", config(num_experts_per_tok=1), "num_experts_per_tok is 1 instead of 2"),
    ("experts", config(num_local_experts=6), "num_local_experts is 6 instead of 4"),
    ("qwen: routing", config(norm_topk_prob=True), "norm_topk_prob is True instead of False"),
    ("sharded: total size", index(total_size=5), "metadata.total_size is 5 instead of"),
    (
        "sharded: dtype of the index",
        index(dtype="float16"),
        "metadata.dtype is 'float16', and should not be there",
    ),
    ("sharded: file of the index", another_file_of_the_index, f"{EXPERT} | cannot be read"),
    ("cut off", cut_off, "truncated | cannot be read"),
    ("E of the record", record("recipe/expansion", 4), "num_local_experts is 4 instead of 8"),
    ("G of the record", record("recipe/granularity", 1), "intermediate_size is 32 instead of 64"),
    ("T of the record", record("recipe/top_k", 4), "num_experts_per_tok is 2 instead of 4"),
    ("routing of the record", record("recipe/routing", "softmax-topk"), "describes no conversion"),
    (
        "target of the record",
        record("target", "qwen2_moe"),
        "model_type is 'mixtral' instead of 'qwen2_moe'",
    ),
    (
        "another target type",
        record("target_type", "qwen2_moe"),
        "target_type is 'qwen2_moe' instead of 'mixtral'",
    ),
    ("factors", record("factors/up", 4), "factors.up is 4 instead of 2.0"),
    ("promise", record("promise", "none"), "promise is 'none' instead of 'exact'"),
    ("routers", record("routers", {}), "routers is [] instead of"),
    ("parameters", record("parameters/active", 1), "parameters.active is 1 instead of"),
)


DAMAGE = [("weights", *row) for row in WEIGHTS] + [("directory", *row) for row in FILES]


@pytest.mark.parametrize(("check", "name", "damage", "words"), DAMAGE, ids=[r[1] for r in DAMAGE])
def test_damage_is_found_and_named(
    dense: Path, request: pytest.FixtureRequest, check: str, name: str, damage: Damage, words: str
) -> None:
    moe: Path = request.getfixturevalue(name.partition(": ")[0] if ": " in name else "moe")
    damage(moe)
    report = verify(dense, moe, checks=[check])
    assert report.status is Status.FAILED
    for word in words.split(" | "):
        assert word in text_of(report)


# What only the outputs show, or nothing should ---------------------------------------------------


def test_logits_that_are_not_finite_fail_whatever_is_promised(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2, scaling="none")  # type: ignore[arg-type]
    convert(dense, tmp_path / "moe", recipe)
    edit_tensors(tmp_path / "moe", lambda held: held["lm_head.weight"][7].fill_(torch.inf))
    report = verify(dense, tmp_path / "moe", checks=["outputs"], allow_inexact=True)
    assert report.status is Status.FAILED
    assert "not finite" in text_of(report)


def test_trained_weights_are_one_sentence(dense: Path, qwen: Path, tmp_path: Path) -> None:
    """Biases and shared experts were zeros before, and rows of a router the same."""
    from transformers import AutoModelForCausalLM

    model, trained = AutoModelForCausalLM.from_pretrained(qwen, dtype="auto"), tmp_path / "trained"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for seed in range(3):
        ids = torch.randint(258, (2, 32), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(trained)
    for file in qwen.iterdir():
        if not (trained / file.name).exists():
            shutil.copy(file, trained)
    report = verify(dense, trained, checks=["directory", "weights"])
    assert [check.status for check in report.checks] == [Status.PASSED, Status.FAILED]
    [words] = report.checks[1].failures
    assert "these weights were trained: " in words
    assert "tensors changed, mean relative change 0.0" in words
    assert "upcycle inspect --weights --dense" in words
