"""What is promised of each model type and each target that it can have: the rows of the tables.

A new row is tested here without another line. The models' random weights are large enough for every
part to matter; transformers' own code runs both, or the code that is shipped with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import NATIVE_PAIRS as NATIVE_ROWS
from conftest import (
    SIZES,
    MakeDense,
    clone,
    difference,
    random_ids,
    read_json,
    read_tensors,
    sizes_of,
)
from conftest import logits as logits_of
from safetensors.torch import save_file

from upcycle_cli import (
    Options,
    Recipe,
    UpcycleError,
    build_plan,
    convert,
    inspect,
    open_checkpoint,
    verify,
)
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.plan.output import Role
from upcycle_cli.recipe.options import SHIPPED, ExpertLayout, Routing
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import Status

Row = tuple[str, str]
Logits = Callable[..., torch.Tensor]
MakeMoe = Callable[..., tuple[Path, Path]]
SHIPPED_ROWS = [(name, SHIPPED) for name, row in DENSE.items() if row.can_ship_code]
FEW = TextOptions(tokens=64)
SINGLE = 1e-5
ROUTED = [
    *((row, routing, None) for row in NATIVE_ROWS for routing in NATIVE[row[1]].routings),
    *((row, None, layout) for row in NATIVE_ROWS for layout in [*NATIVE[row[1]].layouts][1:]),
    *((row, routing, None) for row in SHIPPED_ROWS if row[0] in SIZES for routing in Routing),
    *((row, None, None) for row in SHIPPED_ROWS if row[0] not in SIZES),
]
"""Each target with each routing and layout; shipped code with each routing where models differ in
kind, and once for every other type."""

SLIDES: Mapping[str, Any] = {"sliding_window": 8, "use_sliding_window": True}
BOTH_KINDS = ["sliding_attention", "full_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 99.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
KINDS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("arcee", SHIPPED, {"mlp_bias": True}),
    ("bloom", SHIPPED, {"apply_residual_connection_post_layernorm": True}),
    ("cohere", SHIPPED, {"use_qk_norm": True, "logit_scale": 0.5}),
    ("doge", SHIPPED, {"keep_window_size": 8}),
    ("doge", SHIPPED, {"sliding_window": 8}),
    ("exaone4", SHIPPED, {"layer_types": BOTH_KINDS}),
    ("falcon", SHIPPED, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    (
        "falcon",
        SHIPPED,
        {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    ),
    ("gemma2", SHIPPED, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma3_text", SHIPPED, {"layer_types": BOTH_KINDS}),
    ("gemma4_text", SHIPPED, {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", SHIPPED, {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    ("glm", "glm4_moe", {"attention_bias": False, "head_dim": 16}),
    ("glm", "glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 99.0}}),
    ("gpt2", SHIPPED, {"n_inner": 80, "tie_word_embeddings": False}),
    ("gpt_bigcode", SHIPPED, {"multi_query": False}),
    ("gpt_neox", SHIPPED, {"use_parallel_residual": False}),
    (
        "granite",
        SHIPPED,
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_bias": True},
    ),
    ("granite_swa", "granitemoe_swa", {"layer_rope_theta": [0, 99.0]}),
    ("hyperclovax", SHIPPED, {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    ("lfm2", SHIPPED, {"block_auto_adjust_ff_dim": False}),
    ("minicpm3", SHIPPED, {"scale_emb": 3, "scale_depth": 1.4}),
    ("ministral3", SHIPPED, {"sliding_window": 8}),
    ("helium", "glm4_moe", {"attention_bias": True}),
    ("llama", "granitemoe", {"attention_bias": True, "num_key_value_heads": 1}),
    ("llama", "granitemoehybrid", {"attention_bias": True}),
    ("ministral", "mixtral", {"layer_types": ["sliding_attention"] * 2}),
    ("ministral", "qwen2_moe", {"layer_types": BOTH_KINDS}),
    ("mistral", "mixtral", {"sliding_window": 8}),
    ("mistral", "qwen2_moe", {"sliding_window": 8}),
    ("modernbert-decoder", SHIPPED, {"mlp_bias": True, "attention_bias": True, "norm_bias": True}),
    ("olmo", SHIPPED, {"clip_qkv": 0.5}),
    ("opt", SHIPPED, {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("opt", SHIPPED, {"enable_bias": False}),
    ("phi", SHIPPED, {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    ("phi3", SHIPPED, {"partial_rotary_factor": 0.5}),
    ("phi3", SHIPPED, {"sliding_window": 8}),
    ("phi3", "mixtral", {"sliding_window": 8, "num_key_value_heads": 4}),
    ("phi3", "ernie4_5_moe", {"head_dim": 16, "num_key_value_heads": 4}),
    ("qwen2", "qwen2_moe", {**SLIDES, "max_window_layers": 1}),
    ("qwen3", "qwen3_moe", {**SLIDES, "max_window_layers": 0}),
    ("qwen3", "dots1", {**SLIDES, "max_window_layers": 0, "attention_bias": True}),
    ("qwen3", "mellum", {"attention_bias": True, "rope_parameters": YARN, **SLIDES}),
    ("seed_oss", "glm4_moe", {"attention_bias": False}),
    ("smollm3", SHIPPED, {"no_rope_layers": [1, 0]}),
    ("smollm3", "granitemoe_swa", {"no_rope_layers": [1, 0], "attention_bias": True}),
    ("smollm3", "granitemoe_swa", {**SLIDES, "no_rope_layers": [0, 1], "rope_parameters": YARN}),
    ("smollm3", SHIPPED, {**SLIDES, "layer_types": BOTH_KINDS}),
    ("stablelm", SHIPPED, {"use_parallel_residual": True}),
    ("stablelm", SHIPPED, {"use_qkv_bias": True, "qk_layernorm": True}),
    ("starcoder2", SHIPPED, {"use_bias": False, "tie_word_embeddings": False}),
    ("starcoder2", SHIPPED, {"sliding_window": 8}),
    ("vaultgemma", SHIPPED, {"attn_logit_softcapping": 2.0, "tie_word_embeddings": False}),
    (
        "youtu",
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    ("youtu", "deepseek_v3", {"rope_parameters": YARN}),
)
"""Other kinds of a type, by their configs: another block, a cap, a multiplier, other positions."""
ORIGINAL = {"factor": 2.0, "original_max_position_embeddings": 32}
ROPES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": ORIGINAL,
    "llama3": {**ORIGINAL, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
    "longrope": {**ORIGINAL, "short_factor": [1.1] * 8, "long_factor": [3.0] * 8},
}
SCALED = [
    *((row, kind) for row in NATIVE_ROWS if row[0] == "llama" for kind in ROPES),
    (("helium", "glm4_moe"), "yarn"),
    (("phi3", "glm4_moe"), "longrope"),
    (("phi3", "ernie4_5_moe"), "longrope"),
]
SCALED.remove((("llama", "mixtral"), "longrope"))  # refused
WIDE: Mapping[str, Any] = {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
NARROW = {**WIDE, "head_dim": 8}  # the only size that helium has here
TURNED: Mapping[str, Mapping[str, Any]] = {
    "helium": NARROW,
    "phi3": {**NARROW, "original_max_position_embeddings": 32},
}
WINDOW_KEYS = {"sliding_window", "window_size", "keep_window_size", "local_attention"}


def exact_routing(target: str) -> Routing:
    """The first routing whose gates sum to 1, which no router can spoil."""
    return next(r for r in NATIVE[target].routings if r is not Routing.SOFTMAX_TOPK)


@pytest.fixture(scope="module")
def make_moe(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> MakeMoe:
    """Convert the dense model of a row, once per set of arguments. Read only: it is shared."""
    made: dict[str, Path] = {}

    def make(
        row: Row,
        routing: Routing | None = None,
        layout: ExpertLayout | None = None,
        **config: Any,  # noqa: ANN401 - JSON values
    ) -> tuple[Path, Path]:
        dense, key = make_dense(row[0], **config), repr((row, routing, layout, config))
        if key not in made:
            # With softmax-topk all experts are chosen, which is exact. transformers tells shipped
            # code apart by the last name of its path.
            chosen = 4 if routing is Routing.SOFTMAX_TOPK else 2
            if routing is None and row[1] != SHIPPED:
                routing = exact_routing(row[1])
            recipe = Recipe(expansion=2, granularity=2, top_k=chosen, routing=routing)
            made[key] = tmp_path_factory.mktemp("_".join(row)) / f"moe{len(made)}"
            convert(dense, made[key], recipe, target=row[1], options=Options(expert_layout=layout))
        return dense, made[key]

    return make


@contextmanager
def without_our_classes() -> Iterator[None]:
    """Let transformers take shipped code from the model: verify has registered ours."""
    from transformers.models.auto import configuration_auto, modeling_auto

    with pytest.MonkeyPatch.context() as patch:
        for mapping in (
            configuration_auto.CONFIG_MAPPING,
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        ):
            patch.setattr(mapping, "_extra_content", {})
        yield


@pytest.fixture(scope="module")
def logits() -> Logits:
    """Run a model by transformers, which must load all of it without a complaint; once each."""

    @cache
    def run(path: Path, length: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with without_our_classes():
            return logits_of(path, random_ids(length), dtype)

    return run


def assert_passed(dense: Path, moe: Path) -> None:
    report = verify(dense, moe, texts=FEW)
    assert {check.status for check in report.checks} == {Status.PASSED}, report


@pytest.mark.parametrize(("row", "routing", "layout"), ROUTED, ids=str)
def test_the_logits_are_those_of_the_dense_model(
    make_moe: MakeMoe, logits: Logits, row: Row, routing: Routing | None, layout: ExpertLayout
) -> None:
    dense, moe = make_moe(row, routing, layout)
    assert difference(logits(moe), logits(dense)) < SINGLE


@pytest.mark.parametrize(
    "row", [*NATIVE_ROWS, *((n, SHIPPED) for n in SIZES if DENSE[n].can_ship_code)], ids="-".join
)
def test_a_config_may_leave_out_what_is_usual(make_moe: MakeMoe, logits: Logits, row: Row) -> None:
    dense, moe = make_moe(row, minimal=True)
    full, _ = make_moe(row)
    keys = [read_json(path / "config.json").keys() for path in (dense, full)]
    assert keys[0] < keys[1]
    assert torch.equal(logits(dense), logits(full))
    assert difference(logits(moe), logits(full)) < SINGLE


@pytest.mark.parametrize(("model_type", "target", "config"), KINDS, ids=str)
def test_other_kinds_of_a_type(
    make_moe: MakeMoe, logits: Logits, model_type: str, target: str, config: dict[str, Any]
) -> None:
    dense, moe = make_moe((model_type, target), **config)
    assert difference(logits(moe, 40), logits(dense, 40)) < SINGLE
    usual = make_moe((model_type, target))[0]
    assert difference(logits(usual, 40), logits(dense, 40)) > 1e-3  # another kind indeed
    assert_passed(dense, moe)


@pytest.mark.parametrize(("row", "kind"), SCALED, ids=str)
def test_scaled_rope_is_that_of_the_dense_model(
    make_moe: MakeMoe, logits: Logits, row: Row, kind: str
) -> None:
    """On both sides of the original length, with head_dim × heads ≠ hidden size.

    Far from the beginning a model alone differs as much between float32 and float64.
    """
    config = TURNED.get(row[0], WIDE)
    if row == ("phi3", "glm4_moe"):
        config = {**config, "partial_rotary_factor": 0.5}
    turned = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)) // 2
    rope = {name: v[:turned] if isinstance(v, list) else v for name, v in ROPES[kind].items()}
    usual, _ = make_moe(row, **config)
    rope |= {"rope_type": kind, "rope_theta": 99.0}
    dense, moe = make_moe(row, **config, rope_parameters=rope)
    for length in (24, 96):
        assert difference(logits(moe, length), logits(dense, length)) < 2 * SINGLE
    assert difference(logits(usual, 96), logits(dense, 96)) > 1e-3


@pytest.mark.parametrize("target", ["glm4_moe", "granitemoehybrid"])
def test_a_window_that_no_text_exceeds_is_none(
    make_dense: MakeDense, logits: Logits, tmp_path: Path, target: str
) -> None:
    dense = make_dense("mistral", sliding_window=48, max_position_embeddings=48)
    convert(dense, tmp_path / "moe", Recipe("E2G2T2"), target=target)
    assert difference(logits(tmp_path / "moe", 48), logits(dense, 48)) < SINGLE
    assert "sliding_window" not in read_json(tmp_path / "moe" / "config.json")
    shorter = make_dense("mistral", sliding_window=47, max_position_embeddings=48)
    with pytest.raises(UpcycleError, match="the target supports none"):
        convert(shorter, tmp_path / "shorter", Recipe("E2G2T2"), target=target)


def test_every_window_is_tried_with_a_longer_text() -> None:
    windowed = {name for name in DENSE if defaults_of(name).keys() & WINDOW_KEYS}
    tried = {name for name, _, config in KINDS if config.keys() & WINDOW_KEYS}
    tried |= {name for name, _ in SHIPPED_ROWS if sizes_of(name).keys() & WINDOW_KEYS}
    assert windowed - tried == {"nemotron_h"}  # whose window no layer of transformers reads


@pytest.mark.parametrize("row", [*NATIVE_ROWS, *SHIPPED_ROWS], ids="-".join)
def test_verify_passes_and_again_after_transformers_saved_it(
    make_moe: MakeMoe, tmp_path: Path, row: Row
) -> None:
    from transformers import AutoModelForCausalLM

    dense, moe = make_moe(row)
    assert_passed(dense, moe)
    if row[1] != SHIPPED or row[0] in (*SIZES, "biogpt", "mpt", "opt"):
        again = clone(moe, tmp_path / "again")
        (again / "model.safetensors").unlink()
        with without_our_classes():
            code = row[1] == SHIPPED
            model = AutoModelForCausalLM.from_pretrained(moe, trust_remote_code=code)
            model.save_pretrained(again)
        found, before = inspect(again), inspect(moe)
        for name in ("model_type", "num_experts", "top_k", "routing", "moe_layers", "num_layers"):
            assert getattr(found, name) == getattr(before, name), name
        assert_passed(dense, again)


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "opt"])
def test_names_may_lack_the_first_part(make_moe: MakeMoe, tmp_path: Path, model_type: str) -> None:
    """As transformers saves the base model: it is the same model, with its head tied."""
    dense, moe = make_moe((model_type, SHIPPED))
    short = clone(dense, tmp_path / "short")
    tensors = {n.partition(".")[2]: tensor for n, tensor in read_tensors(dense).items()}
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    found = convert(short, tmp_path / "moe", "E2G2T2", target=SHIPPED).output
    wanted, held = read_tensors(moe), read_tensors(found)
    assert wanted.keys() == held.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert_passed(short, found)


@pytest.mark.parametrize("row", NATIVE_ROWS, ids="-".join)
def test_one_bit_of_any_kind_of_tensor_is_noticed(
    make_dense: MakeDense, tmp_path: Path, row: Row
) -> None:
    dense = make_dense(row[0])
    recipe = Recipe("E2G2T2", routing=exact_routing(row[1]))
    plan = build_plan(recipe, open_checkpoint(dense), target=row[1])
    moe = convert(dense, tmp_path / "moe", recipe, target=row[1]).output
    kinds = {(tensor.role, type(tensor.expr), *tensor.parts): tensor for tensor in plan.tensors}
    assert {Role.COPIED, Role.ROUTER, Role.EXPERT} <= {tensor.role for tensor in kinds.values()}
    for tensor in kinds.values():
        entry = open_checkpoint(moe).tensors[tensor.name]
        for flips in (1, 2):  # and back
            with (moe / entry.shard).open("r+b") as file:
                file.seek(entry.offset + entry.nbytes - 4)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
            passed = verify(dense, moe, checks=["weights"]).checks[0].status is Status.PASSED
            assert passed is (flips == 2), tensor.name


MOVED = [
    (name, target)
    for name, target in NATIVE_ROWS
    if DENSE[name].pieces or DENSE[name].interleaved_rope is not NATIVE[target].interleaved_rope
]


@pytest.mark.parametrize("row", MOVED, ids="-".join)
def test_rows_that_move_are_rounded_and_split_over_files(
    make_dense: MakeDense, tmp_path: Path, row: Row
) -> None:
    """With a layer that stays dense, where the target can have one."""
    some = NATIVE[row[1]].layers.objection((1,), ("mlp",) * 2) is None
    recipe = Recipe("E2G2T2", layers="1" if some else None)
    options = Options(dtype="bfloat16", max_shard_bytes=20_000)
    dense = make_dense(row[0])
    assert_passed(
        dense, convert(dense, tmp_path / "moe", recipe, target=row[1], options=options).output
    )
