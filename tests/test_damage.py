"""Verification: each kind of damage, and each false claim, fails the right check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from verified import (
    ATTENTION,
    EXPERT,
    MIXTRAL_EXPERT,
    ROUTER,
    SIZES,
    Tensors,
    assert_fails,
    assert_passes,
    edit_json,
    edit_tensors,
    flip_byte,
    result,
    save_dense,
)

from upcycle_cli import Options, Recipe, convert, open_checkpoint
from upcycle_cli.old_verification import CHECK_NAMES, Status, verify
from upcycle_cli.recipe.recipe import Scaling

# Damaged values


@pytest.mark.parametrize(
    "name",
    [
        MIXTRAL_EXPERT.format(1, 3, "w2"),
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_flipped_byte(dense: Path, moe: Path, name: str) -> None:
    flip_byte(moe, name)
    assert_fails(verify(dense, moe, checks=["weights"]), "weights", name, "in 1 of")


def test_flipped_byte_in_the_expert_that_is_measured_first(dense: Path, moe: Path) -> None:
    name = MIXTRAL_EXPERT.format(0, 0, "w1")
    flip_byte(moe, name)
    report = verify(dense, moe, checks=["weights"])
    assert_fails(report, "weights", name, "1 problem found")


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_nan_stays_nan(dense: Path, tmp_path: Path, dtype: str | None) -> None:
    """Which of them comes out of a cast or a product depends on who computes."""
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    damaged = Path(shutil.copytree(dense, tmp_path / "dense"))

    def spoil(tensors: Tensors) -> None:
        for name in names:
            tensors[name].view(torch.int16)[0, :3] = torch.tensor([0x7FC0, 0x7F81, -1])

    edit_tensors(damaged, spoil)
    moe = tmp_path / "moe"
    convert(damaged, moe, Recipe(expansion=2, granularity=2, top_k=2), options=Options(dtype=dtype))
    assert_passes(verify(damaged, moe, checks=["weights"]))
    edit_tensors(moe, lambda tensors: tensors[names[0]][0].fill_(1))
    report = verify(damaged, moe, checks=["weights"])
    assert_fails(report, "weights", names[0], "first at [0, 0]: 1 instead of nan")


def test_flipped_byte_in_router(dense: Path, moe: Path) -> None:
    flip_byte(moe, ROUTER)
    report = verify(dense, moe, checks=["weights", "claims"])
    assert_fails(report, "weights", ROUTER, "virtual group")
    assert_fails(report, "claims", ROUTER, "SHA-256")


def test_experts_swapped_across_shards(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(
        dense,
        moe,
        Recipe(expansion=2, granularity=2, top_k=2),
        options=Options(max_shard_bytes=20_000),
    )
    first, second = (MIXTRAL_EXPERT.format(0, expert, "w1") for expert in (0, 3))
    entries = open_checkpoint(moe).tensors
    assert entries[first].shard != entries[second].shard
    swapped = [
        (entries[name], (moe / entries[name].shard).read_bytes()) for name in (first, second)
    ]
    values = [data[entry.offset : entry.offset + entry.nbytes] for entry, data in swapped]
    for (entry, data), value in zip(swapped, reversed(values), strict=True):
        end = entry.offset + entry.nbytes
        (moe / entry.shard).write_bytes(data[: entry.offset] + value + data[end:])
    report = verify(dense, moe, checks=["weights", "outputs"])
    assert_fails(report, "weights", f"{first} holds shard 1 where shard 0 belongs", second)
    assert_fails(report, "outputs", "kl_mean")


def test_wrong_shard(dense: Path, moe: Path) -> None:
    wrong, right = (MIXTRAL_EXPERT.format(1, expert, "w2") for expert in (2, 3))
    edit_tensors(moe, lambda tensors: tensors.update({wrong: tensors[right]}))
    report = verify(dense, moe, checks=["weights"])
    assert_fails(report, "weights", f"{wrong} holds shard 1 where shard 0 belongs")


def test_router_row_changed_in_group(dense: Path, qwen: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"

    def edit(tensors: Tensors) -> None:
        tensors[name][3] *= -1

    edit_tensors(qwen, edit)
    report = verify(dense, qwen, checks=["weights", "outputs"])
    assert_fails(report, "weights", f"{name}: row 3 differs", "virtual group 1")
    assert_fails(report, "outputs", "split_token_layers")


def test_groups_with_equal_rows(dense: Path, moe: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[ROUTER] = tensors[ROUTER][:1].repeat(4, 1)

    edit_tensors(moe, edit)
    report = verify(dense, moe, checks=["weights"])
    assert_fails(report, "weights", ROUTER, "rows 0 and 1 of its groups are the same")


def test_router_not_finite(dense: Path, moe: Path) -> None:
    edit_tensors(moe, lambda tensors: tensors[ROUTER].fill_(torch.nan))
    report = verify(dense, moe, checks=["weights", "outputs"])
    assert_fails(report, "weights", ROUTER, "not finite")
    assert result(report, "outputs")[0] is Status.FAILED


def test_logits_not_finite_fail_even_when_nothing_is_promised(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2, scaling=Scaling.NONE)
    convert(dense, tmp_path / "moe", recipe)

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"][7] = torch.inf

    edit_tensors(tmp_path / "moe", edit)
    assert_fails(verify(dense, tmp_path / "moe"), "outputs", "not finite", "MoE")


def test_another_valid_router(dense: Path, moe: Path) -> None:
    def edit(tensors: Tensors) -> None:
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
        tensors[ROUTER] = rows.repeat_interleave(2, 0).to(torch.bfloat16)

    edit_tensors(moe, edit)
    report = verify(dense, moe)
    assert_passes(report, "structure", "files", "weights", "outputs")
    assert_fails(report, "claims", ROUTER)


def test_another_valid_top_k(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe", Recipe(expansion=4, granularity=1, top_k=2))
    edit_json(tmp_path / "moe" / "config.json", lambda config: config.update(num_experts_per_tok=1))
    report = verify(dense, tmp_path / "moe")
    assert_passes(report, "structure", "files", "weights", "outputs")
    assert_fails(report, "claims", "num_experts_per_tok", "top-k")


def multiply(layers: range, matrices: dict[str, float]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for layer in layers:
            for expert in range(4):
                for matrix, factor in matrices.items():
                    tensors[MIXTRAL_EXPERT.format(layer, expert, matrix)] *= factor

    return edit


def test_scale_applied_twice(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(2), {"w3": 2}))
    report = verify(dense, moe)
    assert_fails(report, "weights", "up × down = 4, but config.json", "needs c = 2")
    assert_fails(report, "outputs", "kl_mean")
    assert_fails(report, "claims", "factors.up")


def test_scale_applied_twice_in_one_layer(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(1, 2), {"w3": 2}))
    report = verify(dense, moe, checks=["weights"])
    name = MIXTRAL_EXPERT.format(1, 0, "w3")
    assert_fails(report, "weights", f"{name} is its shard multiplied by a further 2")


def test_scale_on_the_gate(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(2), {"w1": 2, "w3": 0.5}))
    report = verify(dense, moe)
    assert_fails(report, "weights", "the factor of gate is 2")
    assert_fails(report, "outputs", "kl_mean")
    assert_fails(report, "claims", "factors.gate")


def test_scale_that_no_rule_makes(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(2), {"w3": 0.9}))
    report = verify(dense, moe, checks=["weights", "claims"])
    assert_fails(report, "weights", "up × down")
    assert_fails(report, "claims", "factors.up is 2")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.1.self_attn.q_proj.bias", 1.0, "instead of 0"),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", 0.5, "instead of 0"),
        ("model.layers.1.mlp.shared_expert_gate.weight", 0.0, "not all zero"),
    ],
)
def test_inert_tensor_that_is_not(
    dense: Path, qwen: Path, name: str, value: float, words: str
) -> None:
    edit_tensors(qwen, lambda tensors: tensors[name].fill_(value))
    assert_fails(verify(dense, qwen, checks=["weights"]), "weights", name, words)


def test_untied_head_is_not_the_embedding(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    source = save_dense(config, Qwen2ForCausalLM, tmp_path / "dense")
    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    convert(source, tmp_path / "moe", recipe, options=Options(untie_embeddings=True))
    flip_byte(tmp_path / "moe", "lm_head.weight")
    assert_fails(verify(source, tmp_path / "moe"), "weights", "lm_head.weight")


# Damaged structure


@pytest.mark.parametrize("name", [EXPERT, ATTENTION, ROUTER, "model.norm.weight"])
def test_tensor_missing(dense: Path, moe: Path, name: str) -> None:
    edit_tensors(moe, lambda tensors: tensors.pop(name))
    report = verify(dense, moe)
    assert_fails(report, "structure", f"{name} is missing")
    assert_fails(report, "weights", f"{name} is missing")
    assert result(report, "outputs")[0] is Status.FAILED


@pytest.mark.parametrize("name", [EXPERT, ATTENTION])
def test_tensor_renamed(dense: Path, moe: Path, name: str) -> None:
    edit_tensors(moe, lambda tensors: tensors.update({f"{name}s": tensors.pop(name)}))
    report = verify(dense, moe, checks=["structure", "weights"])
    for check in ("structure", "weights"):
        assert_fails(report, check, f"{name} is missing", f"{name}s ")


def test_tensor_extra(dense: Path, moe: Path) -> None:
    name = MIXTRAL_EXPERT.format(0, 4, "w1")
    edit_tensors(moe, lambda tensors: tensors.update({name: torch.zeros(32, 32)}))
    report = verify(dense, moe, checks=["structure", "weights"])
    for check in ("structure", "weights"):
        assert_fails(report, check, name)


@pytest.mark.parametrize("name", [EXPERT, ATTENTION, ROUTER])
def test_tensor_of_another_shape(dense: Path, moe: Path, name: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1]

    edit_tensors(moe, edit)
    report = verify(dense, moe)
    assert_fails(report, "structure", f"{name} has shape")
    assert_fails(report, "weights", f"{name} has shape")
    assert result(report, "outputs")[0] is Status.FAILED


def test_head_missing_although_tied_by_config(dense: Path, moe: Path) -> None:
    edit_tensors(moe, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(moe / "config.json", lambda config: config.update(tie_word_embeddings=True))
    report = verify(dense, moe)
    assert_fails(report, "structure", "tie_word_embeddings")
    assert_fails(report, "weights", "lm_head.weight is missing")
    assert_fails(report, "outputs", "kl_mean")


@pytest.mark.parametrize("name", [EXPERT, ATTENTION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tensor_of_another_dtype(dense: Path, moe: Path, name: str, dtype: torch.dtype) -> None:
    edit_tensors(moe, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    report = verify(dense, moe)
    assert_fails(report, "structure", f"{name} is ")
    if dtype is torch.int8 or name == ATTENTION:
        assert_fails(report, "weights", f"{name} is ")


def test_recorded_dtype_is_held(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    convert(dense, tmp_path / "moe", recipe, options=Options(dtype="float32"))

    def edit(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    edit_tensors(tmp_path / "moe", edit)
    report = verify(dense, tmp_path / "moe", checks=["weights", "claims"])
    assert_fails(report, "weights", "records float32")
    assert_fails(report, "claims", "records float32")


def test_sharded_passes(dense: Path, sharded: Path) -> None:
    assert_passes(verify(dense, sharded))


def test_index_points_to_the_wrong_file(dense: Path, sharded: Path) -> None:
    def edit(index: dict[str, Any]) -> None:
        files = index["weight_map"]
        files[EXPERT] = next(file for file in files.values() if file != files[EXPERT])

    edit_json(sharded / "model.safetensors.index.json", edit)
    report = verify(dense, sharded)
    assert_fails(report, "structure", EXPERT)
    for check in CHECK_NAMES[1:]:
        status, text = result(report, check)
        assert status is Status.SKIPPED
        assert "cannot be read" in text


def test_index_with_wrong_total(dense: Path, sharded: Path) -> None:
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda index: index["metadata"].update(total_size=5),
    )
    report = verify(dense, sharded, checks=["structure"])
    assert_fails(report, "structure", "metadata.total_size is 5")


def test_truncated_weights_fail_whatever_is_asked(dense: Path, moe: Path) -> None:
    data = (moe / "model.safetensors").read_bytes()
    (moe / "model.safetensors").write_bytes(data[:-10])
    report = verify(dense, moe, checks=["claims", "outputs"])
    assert_fails(report, "claims", "truncated")
    assert result(report, "outputs")[0] is Status.SKIPPED


# Damaged config


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"num_experts_per_tok": 1}, "claims", ["num_experts_per_tok", "records 2"]),
        ({"num_experts_per_tok": 9}, "structure", ["num_experts_per_tok 9"]),
        ({"num_local_experts": 6}, "structure", [MIXTRAL_EXPERT.format(0, 5, "w1")]),
        ({"num_local_experts": 2}, "structure", [MIXTRAL_EXPERT.format(0, 2, "w1")]),
        ({"num_local_experts": 5}, "structure", ["num_local_experts 5"]),
        ({"num_local_experts": "4"}, "structure", ["num_local_experts"]),
        ({"intermediate_size": 64}, "structure", ["has shape"]),
        ({"intermediate_size": 31}, "structure", ["intermediate_size 31"]),
        ({"rms_norm_eps": 1e-2}, "structure", ["rms_norm_eps is 0.01"]),
        ({"hidden_act": "gelu"}, "structure", ["hidden_act is gelu"]),
        ({"num_attention_heads": 8, "head_dim": 4}, "structure", ["num_attention_heads is 8"]),
        ({"sliding_window": 16}, "structure", ["sliding_window of each layer is [16, 16]"]),
        ({"tie_word_embeddings": True}, "structure", ["tie_word_embeddings is true"]),
        ({"dtype": "float16"}, "structure", ["dtype is 'float16'"]),
        ({"eos_token_id": 7}, "structure", ["eos_token_id is 7"]),
        ({"hidden_size": -32}, "structure", ["transformers"]),
        ({"num_attention_heads": 0}, "structure", ["num_attention_heads is 0"]),
    ],
)
def test_config_damaged(
    dense: Path, moe: Path, changes: dict[str, Any], check: str, words: list[str]
) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_fails(verify(dense, moe), check, *words)


def test_config_with_another_rope(dense: Path, moe: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["rope_theta"] = 1e6
        if "rope_parameters" in config:
            config["rope_parameters"]["rope_theta"] = 1e6

    edit_json(moe / "config.json", edit)
    report = verify(dense, moe)
    assert_fails(report, "structure", "rope_parameters is", "1000000")
    assert_fails(report, "outputs", "kl_mean")


def test_config_with_the_other_routing(dense: Path, qwen: Path) -> None:
    edit_json(qwen / "config.json", lambda config: config.update(norm_topk_prob=True))
    report = verify(dense, qwen)
    assert_fails(report, "weights", "up × down = 8", "topk-softmax", "needs c = 2")
    assert_fails(report, "outputs", "kl_mean_conversion")
    assert_fails(report, "claims", "norm_topk_prob")


# False claims


def test_another_dense_model(mixtral: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"rms_norm_eps": 1e-3})
    other = save_dense(config, LlamaForCausalLM, tmp_path / "other", seed=1)
    report = verify(other, mixtral)
    assert_fails(report, "structure", "rms_norm_eps")
    assert_fails(report, "weights", "more")
    assert_fails(report, "outputs", "kl_mean")
    assert_fails(report, "claims", "this MoE was made from another checkpoint")
    assert len(report.checks[1].failures) <= 9


def test_tokenizer_changed(dense: Path, moe: Path) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_json(moe / "tokenizer.json", edit)
    assert_fails(verify(dense, moe, checks=["files"]), "files", "model.vocab.a is 67")


def test_tokenizer_missing(dense: Path, moe: Path) -> None:
    for file in (*moe.glob("tokenizer*"), *moe.glob("chat_template*")):
        file.unlink()
    assert_fails(verify(dense, moe, checks=["files"]), "files", "tokenizer is missing")


def test_chat_template_changed(dense: Path, moe: Path) -> None:
    (moe / "chat_template.jinja").write_text("{{ messages }}")
    assert_fails(verify(dense, moe, checks=["files"]), "files", "chat template")


def test_tokenizer_broken(dense: Path, moe: Path) -> None:
    (moe / "tokenizer.json").write_text("{}")
    assert_fails(verify(dense, moe, checks=["files"]), "files", "tokenizer.json", "Model missing")


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "{}", "[" * 100_000, '{"format": 1}', '{"format": 2, "recipe": 3}'],
)
def test_record_corrupt(dense: Path, moe: Path, text: str) -> None:
    (moe / "upcycle.json").write_text(text)
    report = verify(dense, moe, checks=["weights", "claims"])
    assert_fails(report, "claims", "upcycle.json")
    assert result(report, "weights")[0] is Status.PASSED


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("format",), 7),
        (("source_type",), "mistral"),
        (("target_type",), None),
        (("expert_layout",), "fused"),
        (("dtype",), "float8"),
        (("recipe",), None),
        (("recipe", "expansion"), 4),
        (("recipe", "expansion"), [2]),
        (("recipe", "granularity"), 0),
        (("recipe", "granularity"), 1),
        (("recipe", "top_k"), 10**400),
        (("recipe", "top_k"), 4),
        (("recipe", "routing"), "softmax-topk"),
        (("recipe", "routing"), {}),
        (("recipe", "scaling"), "paper"),
        (("recipe", "scaling"), -1),
        (("recipe", "scaling"), 3),
        (("recipe", "scale_split"), "down"),
        (("recipe", "virtual_groups"), "yes"),
        (("recipe", "router_logit_std"), 0),
        (("recipe", "name"), "E8G8T8"),
        (("factors",), "x"),
        (("factors", "c"), 4),
        (("factors", "up"), 4),
        (("factors", "gate"), True),
        (("factors", "down"), None),
        (("routers",), []),
        (("routers", ROUTER), "0" * 64),
        (("routers", "model.layers.9.gate"), "0" * 64),
        (("source",), None),
        (("source", "config_sha256"), "0" * 64),
        (("source", "files"), {}),
    ],
)
def test_record_lies(dense: Path, moe: Path, keys: tuple[str, ...], value: object) -> None:
    def edit(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    edit_json(moe / "upcycle.json", edit)
    assert_fails(verify(dense, moe, checks=["claims"]), "claims")


# What loaders obey beside names and shapes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures is ['LlamaForCausalLM']"]),
        ({"architectures": None}, ["architectures is None"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, ["auto_map is", "code of its own"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config is", "quantised"]),
        ({"attention_dropout": 0.5}, ["attention_dropout is 0.5"]),
        ({"router_jitter_noise": 0.1}, ["router_jitter_noise is 0.1"]),
    ],
)
def test_config_that_misleads(
    dense: Path, moe: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_fails(verify(dense, moe, checks=["structure"]), "structure", *words)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "old.pt", "consolidated.pth"]
)
def test_stray_weight_file(dense: Path, moe: Path, sharded: Path, name: str) -> None:
    for path in (moe, sharded):
        stray = path / f"x{name}"
        stray.write_bytes(b"")
        assert_fails(verify(dense, path, checks=["structure"]), "structure", stray.name)


def test_generation_config_is_the_dense_one(dense: Path, moe: Path) -> None:
    edit_json(moe / "generation_config.json", lambda config: config.update(temperature=9.0))
    report = verify(dense, moe, checks=["files"])
    assert_fails(report, "files", "generation_config.json: temperature is 9.0", "no such thing")
    (moe / "generation_config.json").unlink()
    report = verify(dense, moe, checks=["files"])
    assert_fails(report, "files", "generation_config.json is missing")


@pytest.mark.parametrize("key", ["total", "active", "dense"])
def test_recorded_parameters_are_counted(dense: Path, moe: Path, key: str) -> None:
    edit_json(moe / "upcycle.json", lambda record: record["parameters"].update({key: 1}))
    report = verify(dense, moe, checks=["claims"])
    assert_fails(report, "claims", f"parameters.{key} is 1")
    edit_json(moe / "upcycle.json", lambda record: record.pop("parameters"))
    assert_fails(verify(dense, moe, checks=["claims"]), "claims", "parameters is missing")
