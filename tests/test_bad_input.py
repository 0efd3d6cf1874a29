"""Everything a user can get wrong: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYOUTS, REMOVED, MakeDense, clone, contents, read_json, snapshot, write_json
from typer.testing import CliRunner, Result

from upcycle_cli import Options, Recipe, UpcycleError, convert
from upcycle_cli.cli import app
from upcycle_cli.recipe import ExpertLayout, Routing, ScaleSplit, Scaling

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Edit = Callable[[dict[str, Any]], object]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> str:
    """One message of the tool's own with all of `words` in it, and no traceback."""
    # Anything but SystemExit is an exception that a shell would show as a traceback.
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "\x1b" not in result.stderr
    for word in words:
        assert word in result.stderr
    return result.stderr


class Refuses:
    """Converts, and checks that this is refused and leaves no trace on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(
        self,
        source: Path,
        *words: str,
        arguments: tuple[str | Path, ...] = ("--recipe", "E2G2T2"),
        output: Path | None = None,
    ) -> str:
        before = snapshot(self.directory)
        tree = sorted(self.directory.rglob("*"))
        source_before = snapshot(source) if os.path.isdir(source) else {}  # noqa: PTH112 - a name may be too long
        result = invoke("convert", source, output or self.directory / "moe", *arguments)
        message = assert_refused(result, *words)
        assert snapshot(self.directory) == before
        assert sorted(self.directory.rglob("*")) == tree
        assert not source_before or snapshot(source) == source_before
        return message


@pytest.fixture
def refuses(tmp_path: Path) -> Refuses:
    return Refuses(tmp_path)


# Where the source is ------------------------------------------------------------------------------


def test_no_such_path(refuses: Refuses, tmp_path: Path) -> None:
    message = refuses(tmp_path / "absent", "does not exist", str(tmp_path / "absent"))
    assert "hf download" not in message  # an absolute path is no repo


def test_a_repo_id(refuses: Refuses) -> None:
    refuses(
        Path("some-org/some-model"),
        "some-org/some-model is neither a directory nor complete in the cache",
        "hf download some-org/some-model",
    )


def test_not_a_directory(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    refuses(tmp_path / "file", "is not a directory")


def test_a_dangling_link(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuses(tmp_path / "link", "does not exist")


def test_a_path_that_loops(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(tmp_path / "loop", str(tmp_path / "loop"))


def test_a_path_that_is_too_long(refuses: Refuses, tmp_path: Path) -> None:
    refuses(tmp_path / ("x" * 300), "x" * 300)


def test_an_empty_directory(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "has no config.json")


# config.json --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"{'model_type': 'llama'}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["llama"]', "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b"{}", "model_type"),
    ],
    ids=["empty", "python", "binary", "deep", "list", "null", "nothing"],
)
def test_configs_that_are_none(
    llama: Path, tmp_path: Path, refuses: Refuses, text: bytes, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / "config.json").write_bytes(text)
    refuses(dense, words)


def test_a_config_that_is_a_directory(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / "config.json").unlink()
    (dense / "config.json").mkdir()
    refuses(dense, "config.json")


def test_an_unknown_model_type(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense", model_type="gpt9")
    refuses(dense, "gpt9", "upcycle families")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "qwen3_moe"},
        {"model_type": "deepseek_v3", "n_routed_experts": 64},
        {"model_type": "llama", "num_experts": 8},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_a_mixture_of_experts(
    llama: Path, tmp_path: Path, refuses: Refuses, changes: dict[str, Any]
) -> None:
    dense = clone(llama, tmp_path / "dense", **changes)
    refuses(dense, "mixture of experts already", changes["model_type"])


def test_the_output_of_a_conversion(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    convert(llama, tmp_path / "first", Recipe(expansion=2, granularity=1, top_k=1))
    refuses(tmp_path / "first", "mixture of experts already")


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize(
    ("bias", "words"),
    [("attention_bias", ("o_proj", "attention_bias")), ("mlp_bias", ("experts",))],
)
def test_llama_with_biases(
    make_dense: MakeDense, refuses: Refuses, target: str, bias: str, words: tuple[str, ...]
) -> None:
    arguments = ("--recipe", "E2G2T2", "--target", target)
    settings: dict[str, Any] = {bias: True}
    dense = make_dense("llama", **settings)
    refuses(dense, *words, f"{target} cannot express", "--target upcycled", arguments=arguments)


def test_gemma4_with_mlps_of_two_sizes(make_dense: MakeDense, refuses: Refuses) -> None:
    settings: dict[str, Any] = {"use_double_wide_mlp": True}
    refuses(make_dense("gemma4_text", **settings), "use_double_wide_mlp", "one size")


def test_gemma4_with_experts_of_its_own_class(make_dense: MakeDense, refuses: Refuses) -> None:
    arguments = ("--recipe", "E2G2T2", "--target", "gemma4_text")
    words = ("cannot become gemma4_text: its experts lie beside", "can become upcycled")
    refuses(make_dense("gemma4_text"), *words, arguments=arguments)
    # Of others it says nothing.
    refuses(make_dense("lfm2"), "lfm2 cannot become gemma4_text.", arguments=arguments)


def test_qwen2_to_mixtral(make_dense: MakeDense, refuses: Refuses) -> None:
    arguments = ("--recipe", "E2G2T2", "--target", "mixtral")
    refuses(make_dense("qwen2"), "cannot become mixtral", "qwen2_moe", arguments=arguments)


def test_qwen3_with_two_kinds_of_layers(make_dense: MakeDense, refuses: Refuses) -> None:
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    }
    arguments = ("--recipe", "E2G2T2", "--target", "qwen3_moe")
    dense = make_dense("qwen3", **window)
    refuses(dense, "qwen3_moe cannot express", "layer_types", arguments=arguments)


def test_a_routing_that_the_target_lacks(llama: Path, refuses: Refuses) -> None:
    arguments = ("--recipe", "E2G2T2", "--routing", "softmax-topk", "--target", "mixtral")
    refuses(llama, "no softmax-topk routing", "--target qwen2_moe", arguments=arguments)


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, "fp8", [], {}])
def test_a_quantised_model(llama: Path, tmp_path: Path, refuses: Refuses, method: object) -> None:
    dense = clone(llama, tmp_path / "dense", quantization_config=method)
    message = refuses(dense, "quantised")
    assert not isinstance(method, dict) or method.get("quant_method", "") in message


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**30}, "config.json implies"),
        ({"intermediate_size": 10**30}, "config.json implies"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": [260]}, "vocab_size"),
        ({"vocab_size": REMOVED}, "config.json implies"),
        ({"intermediate_size": "big"}, "intermediate_size"),
        ({"intermediate_size": {}}, "intermediate_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads 5"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"head_dim": "8"}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"attention_dropout": "none"}, "attention_dropout"),
        ({"max_position_embeddings": 2048.5}, "max_position_embeddings"),
        ({"rope_theta": "1e4", "rope_parameters": REMOVED}, "rope_theta"),
        ({"rope_theta": None, "rope_parameters": REMOVED}, "rope_theta"),
        ({"rope_theta": [1], "rope_parameters": REMOVED}, "rope_theta"),
        ({"rope_scaling": ["linear", 2]}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": 10000.0}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"attention_bias": 0}, "attention_bias"),
        ({"mlp_bias": "no"}, "mlp_bias"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"eos_token_id": {"id": 2}}, "eos_token_id"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"pad_token_id": 1.5}, "pad_token_id"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": {}}, "model_type"),
        ({"model_type": ""}, "cannot be upcycled"),
    ],
    ids=lambda value: (
        json.dumps(value, default=lambda _: "removed") if isinstance(value, dict) else ""
    ),
)
def test_values_of_the_wrong_kind(
    llama: Path, tmp_path: Path, refuses: Refuses, changes: dict[str, Any], word: str
) -> None:
    refuses(clone(llama, tmp_path / "dense", **changes), word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer_types": [{"kind": "full"}] * 2}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"layer_types": {}}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": [["full_attention"], ["full_attention"]]}, "layer_types"),
        ({"use_sliding_window": None}, "use_sliding_window"),
        ({"use_sliding_window": 1}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": "8"}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": None,
                "layer_types": REMOVED,
            },
            "max_window_layers",
        ),
    ],
    ids=lambda value: (
        json.dumps(value, default=lambda _: "removed") if isinstance(value, dict) else ""
    ),
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_the_wrong_kind(
    make_dense: MakeDense,
    tmp_path: Path,
    refuses: Refuses,
    model_type: str,
    changes: dict[str, Any],
    word: str,
) -> None:
    refuses(clone(make_dense(model_type), tmp_path / "dense", **changes), word)


def test_mistral_with_a_window_of_the_wrong_kind(
    make_dense: MakeDense, tmp_path: Path, refuses: Refuses
) -> None:
    for number, window in enumerate(("8", 0, [8], True)):
        dense = clone(make_dense("mistral"), tmp_path / str(number), sliding_window=window)
        refuses(dense, "sliding_window")


def test_qwen3_without_a_head_dim(make_dense: MakeDense, tmp_path: Path, refuses: Refuses) -> None:
    """Absent means 128 there, and null is an error in transformers too."""
    original = make_dense("qwen3")
    refuses(clone(original, tmp_path / "null", head_dim=None), "head_dim")
    refuses(clone(original, tmp_path / "absent", head_dim=REMOVED), "config.json implies [128]")


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "weird"},
        {"torch_dtype": 7, "dtype": None},
        {"dtype": ["bfloat16"]},
        {"architectures": None},
        {"architectures": "LlamaForCausalLM"},
        {"id2label": {"0": 1}, "transformers_version": 4},
        {"_name_or_path": 7},
        {"_name_or_path": None},
        {"auto_map": {}},
        {"quantization_config": None},
        {"num_experts": 0},
        {"eos_token_id": []},
    ],
    ids=json.dumps,
)
def test_oddities_that_do_not_matter(llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = clone(llama, tmp_path / "dense", **changes)
    result = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G2T2", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "moe" / WEIGHTS).is_file()


# Weights that are missing or of the wrong kind ----------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles(llama: Path, tmp_path: Path, refuses: Refuses, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).rename(dense / name)
    refuses(dense, "pickle", name, "save_pretrained", "from_pretrained")


def test_no_weights(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).unlink()
    refuses(dense, f"no {WEIGHTS}")


def test_weights_under_another_name(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).rename(dense / "adapter_model.safetensors")
    refuses(dense, f"no {WEIGHTS}")


def test_weights_that_are_a_directory(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).unlink()
    (dense / WEIGHTS).mkdir()
    refuses(dense, WEIGHTS)


def test_a_dangling_link_to_weights(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).unlink()
    (dense / WEIGHTS).symlink_to(tmp_path / "blobs" / "gone")
    refuses(dense, WEIGHTS)


def test_a_git_lfs_pointer(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    """What a clone without git-lfs leaves in the place of the weights."""
    dense = clone(llama, tmp_path / "dense")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    (dense / WEIGHTS).write_text(pointer)
    refuses(dense, WEIGHTS, "Download")


def save_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.float64]
)
def test_weights_of_a_dtype_that_is_not_for_training(
    llama: Path, tmp_path: Path, refuses: Refuses, dtype: torch.dtype
) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refuses(dense, UP, "F32, F16, BF16")


def test_a_tensor_that_contradicts_the_config(
    llama: Path, tmp_path: Path, refuses: Refuses
) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))
    refuses(dense, UP, "[32, 48]", "[48, 32]")


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor(llama: Path, tmp_path: Path, refuses: Refuses, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.pop(name))
    refuses(dense, f"lacks {name}")


def test_many_missing_tensors_are_counted(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    save_tensors(dense, rename)
    message = refuses(dense, "lacks", "more tensors")
    assert len(message) < 500


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.7.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "vision_tower.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.extra",
        "",
        "[bold]markup[/bold]",
    ],
)
def test_an_unknown_tensor(llama: Path, tmp_path: Path, refuses: Refuses, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({name: torch.zeros(3)}))
    refuses(dense, "unknown tensor", name)


def test_a_value_that_overflows(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors[UP].__setitem__((40, 5), 1e10))
    # Row 40 of 48 is in the second shard.
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    arguments = ("--recipe", "E2G2T2", "--dtype", "float16")
    refuses(dense, name, "infinite", "f16", "--dtype", arguments=arguments)


def test_a_copied_value_that_overflows(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), -1e10))
    arguments = ("--recipe", "E2G2T2", "--dtype", "float16")
    refuses(dense, "lm_head.weight", "infinite", arguments=arguments)


def test_a_scaled_value_that_overflows(
    make_dense: MakeDense, tmp_path: Path, refuses: Refuses
) -> None:
    dense = clone(make_dense("llama", dtype="bfloat16"), tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors[UP].__setitem__((0, 0), 3e38))
    refuses(dense, "model.layers.1.block_sparse_moe.experts.0.w3.weight", "infinite", "bf16")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_norm_that_no_router_can_be_drawn_for(
    llama: Path, tmp_path: Path, refuses: Refuses, value: float
) -> None:
    dense = clone(llama, tmp_path / "dense")
    name = "model.layers.1.post_attention_layernorm.weight"
    save_tensors(dense, lambda tensors: tensors[name].fill_(value))
    refuses(dense, name)


def test_fused_experts_of_two_dtypes(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}))
    arguments = ("--recipe", "E2G2T2", "--expert-layout", "fused")
    refuses(dense, "dtypes", "--dtype", arguments=arguments)
    done = invoke("convert", dense, tmp_path / "moe", *arguments, "--dtype", "float32", "--quiet")
    assert done.exit_code == 0, done.stderr


# Damaged safetensors files ------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -5000])
def test_a_truncated_file(llama: Path, tmp_path: Path, refuses: Refuses, kept: int) -> None:
    dense = clone(llama, tmp_path / "dense")
    data = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(data[:kept])
    refuses(dense, WEIGHTS, "truncated", "Download or copy it again")


def test_a_file_with_more_at_its_end(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    with (dense / WEIGHTS).open("ab") as file:
        file.write(b"1234567")
    refuses(dense, WEIGHTS, "7 bytes that belong to no tensor")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 200_000_000])
def test_a_huge_header(llama: Path, tmp_path: Path, refuses: Refuses, length: int) -> None:
    dense = clone(llama, tmp_path / "dense")
    data = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    refuses(dense, WEIGHTS, "header")


def test_a_huge_header_in_a_file_that_has_it(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    with (dense / WEIGHTS).open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole: it takes no space
    # snapshot() would read it all.
    result = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G2T2")
    assert_refused(result, WEIGHTS, "header of 200,000,000 bytes")
    assert not list(tmp_path.glob("moe*"))


def edit_header(path: Path, edit: Edit) -> None:
    """Change a shard's header, leaving its data as it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    write_header(path, json.dumps(header).encode())


def write_header(path: Path, text: bytes) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x02}q\x00.", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"a": 1}', "a is not described"),
        (b'{"a": null}', "a is not described"),
        (b'{"a": {}}', "dtype"),
        (b'{"a": {"dtype": "F32"}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "offsets"),
        (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "dtype"),
        (b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": {"0": 4}}}', "offsets"),
        (b"{}", "belong to no tensor"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "shape"),
    ],
)
def test_headers_that_are_none(
    llama: Path, tmp_path: Path, refuses: Refuses, text: bytes, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    write_header(dense / WEIGHTS, text)
    refuses(dense, WEIGHTS, words)


def first(header: dict[str, Any], position: int = 0) -> dict[str, Any]:
    """The entry that lies first in the file, or a later one."""
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    found: dict[str, Any] = sorted(tensors, key=lambda entry: entry["data_offsets"])[position]
    return found


def shift(entry: dict[str, Any], by: int) -> None:
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda header: first(header, 1).update(data_offsets=[0, 0]), "lies"),
        (lambda header: shift(first(header, 1), -4), "overlaps"),
        (lambda header: shift(first(header, 1), 4), "leaves a hole"),
        (lambda header: shift(first(header), 4), "leaves a hole after the header"),
        (lambda header: shift(first(header, -1), 10**15), "leaves a hole"),
        (lambda header: first(header).update(dtype="F16"), "lies"),
        (lambda header: first(header).update(dtype="F4"), "unknown dtype 'F4'"),
        (lambda header: first(header).update(dtype="float32"), "unknown dtype"),
        (lambda header: first(header).update(shape=[-260, -32]), "invalid shape"),
        (lambda header: first(header).update(shape=[2**62, 2**62]), "invalid shape"),
        (lambda header: first(header).update(data_offsets=[-4, 0]), "invalid offsets"),
        (lambda header: first(header).update(shape=[]), "lies"),
    ],
    ids=[
        "empty-offsets",
        "overlap",
        "hole",
        "hole-at-start",
        "past-the-end",
        "wrong-size",
        "unknown-dtype",
        "torch-dtype",
        "negative-shape",
        "overflowing-shape",
        "negative-offset",
        "scalar",
    ],
)
def test_headers_that_lie(
    llama: Path, tmp_path: Path, refuses: Refuses, edit: Edit, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    edit_header(dense / WEIGHTS, edit)
    refuses(dense, WEIGHTS, words)


def test_a_last_tensor_past_the_end(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")

    def grow(header: dict[str, Any]) -> None:
        last = first(header, -1)
        last["shape"][0] += 1
        last["data_offsets"][1] += last["shape"][1] * 4 if len(last["shape"]) > 1 else 4

    edit_header(dense / WEIGHTS, grow)
    refuses(dense, WEIGHTS, "truncated")


# Sharded checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_dense: MakeDense, tmp_path: Path) -> Path:
    path = clone(make_dense("llama", max_shard_size="40KB"), tmp_path / "dense")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_a_missing_shard(sharded: Path, refuses: Refuses) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(sharded, shard.name, "missing", "Download or copy it again")


def test_a_truncated_shard(sharded: Path, refuses: Refuses) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refuses(sharded, shard.name, "truncated")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}']
)
def test_an_index_that_is_none(sharded: Path, refuses: Refuses, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    refuses(sharded, INDEX)


def test_a_missing_index(sharded: Path, refuses: Refuses) -> None:
    (sharded / INDEX).unlink()
    refuses(sharded, INDEX)


@pytest.mark.parametrize(
    "place",
    [
        "../elsewhere.safetensors",
        "sub/../../elsewhere.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "sub\\shard.safetensors",
        "nul\0byte",
        None,
        3,
        ["model-00001.safetensors"],
        {},
        "x" * 5000,
    ],
    ids=repr,
)
def test_an_index_that_points_elsewhere(sharded: Path, refuses: Refuses, place: object) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.norm.weight"] = place
    write_json(sharded / INDEX, index)
    # A name that is only too long for the system is no way out of the directory.
    too_long = isinstance(place, str) and len(place) > 255
    refuses(sharded, "missing or unreadable" if too_long else "not a file of this directory")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_shard_outside_of_the_directory(
    sharded: Path, tmp_path: Path, refuses: Refuses, *, absolute: bool
) -> None:
    """Even one that is there and fits: an index from the Hub must not reach other files."""
    index = read_json(sharded / INDEX)
    shard = index["weight_map"]["model.norm.weight"]
    (sharded / shard).rename(tmp_path / "elsewhere.safetensors")
    place = str(tmp_path / "elsewhere.safetensors") if absolute else "../elsewhere.safetensors"
    index["weight_map"] = {
        name: place if file == shard else file for name, file in index["weight_map"].items()
    }
    write_json(sharded / INDEX, index)
    refuses(sharded, "elsewhere.safetensors", "not a file of this directory")


def test_an_index_naming_a_file_that_is_not_there(sharded: Path, refuses: Refuses) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.norm.weight"] = "model-00099-of-00099.safetensors"
    write_json(sharded / INDEX, index)
    refuses(sharded, "model-00099-of-00099.safetensors", "missing")


@pytest.mark.parametrize("name", ["model.extra.weight", "model.norm.weight"])
def test_an_index_that_places_a_tensor_where_it_is_not(
    sharded: Path, refuses: Refuses, name: str
) -> None:
    index = read_json(sharded / INDEX)
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][name] = next(s for s in shards if s != index["weight_map"].get(name))
    write_json(sharded / INDEX, index)
    refuses(sharded, INDEX, name)


def test_an_index_that_leaves_out_a_tensor(sharded: Path, refuses: Refuses) -> None:
    index = read_json(sharded / INDEX)
    del index["weight_map"]["model.norm.weight"]
    write_json(sharded / INDEX, index)
    refuses(sharded, INDEX, "does not list model.norm.weight")


def test_a_tensor_in_two_shards(sharded: Path, refuses: Refuses) -> None:
    index = read_json(sharded / INDEX)
    shard = index["weight_map"]["model.norm.weight"]
    shutil.copyfile(sharded / shard, sharded / "copy.safetensors")
    index["weight_map"]["another"] = "copy.safetensors"
    write_json(sharded / INDEX, index)
    refuses(sharded, "is in both", "copy.safetensors")


# The recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["no recipe", "--recipe E8G1T2"]),
        (("--recipe", ""), ["is not a recipe"]),
        (("--recipe", "8x2"), ["'8x2' is not a recipe", "E8G1T2"]),
        (("--recipe", "E8G1"), ["is not a recipe"]),
        (("--recipe", "E8T2G1"), ["is not a recipe"]),
        (("--recipe", "E-8G1T2"), ["is not a recipe"]),
        (("--recipe", "E8.5G1T2"), ["is not a recipe"]),
        (("--recipe", "E8G1T2 extra"), ["is not a recipe"]),
        (("--recipe", "[bold]"), ["'[bold]' is not a recipe"]),
        (("--recipe", "E" + "9" * 5000 + "G1T2"), ["recipe"]),
        (("--recipe", "E0G1T1"), ["expansion (E) must be at least 1, not 0"]),
        (("--recipe", "E8G0T1"), ["granularity (G) must be at least 1"]),
        (("--recipe", "E8G1T0"), ["top-k (T) must be at least 1"]),
        (("--recipe", "E2G2T6"), ["top-k 6 is more than the 4 experts", "at most 4"]),
        (("--recipe", "E2G2T3"), ["not a multiple of granularity 2", "2 or 4", "--allow-inexact"]),
        (("--recipe", "E2G2T1"), ["Use a top-k of 2", "--allow-inexact"]),
        (("--recipe", "E2G5T5"), ["48 is not divisible by granularity 5", "4 or 6"]),
        (("--recipe", "E2G96T96"), ["48 is not divisible by granularity 96", "Try 48."]),
        (("--recipe", "E2G2T2", "--expansion", "2"), ["Use one or the other"]),
        (("--recipe", "E2G2T2", "-T", "2"), ["Use one or the other"]),
        (("--expansion", "2", "--top-k", "2"), ["--granularity missing"]),
        (("-E", "2"), ["--granularity and --top-k missing"]),
        (("-E", "-2", "-G", "1", "-T", "1"), ["expansion (E) must be at least 1, not -2"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_recipes(
    llama: Path, refuses: Refuses, arguments: tuple[str, ...], words: list[str]
) -> None:
    refuses(llama, *words, arguments=arguments)


def test_a_recipe_of_absurd_size(llama: Path, refuses: Refuses) -> None:
    """Refused before anybody makes a list of so many tensors."""
    for name in ("E4097G1T1", "E999999999G1T1", "E999999999G999999999T999999999"):
        refuses(llama, "experts per layer", "4096", arguments=("--recipe", name))


def test_an_inexact_top_k_on_demand(llama: Path, tmp_path: Path) -> None:
    arguments = ("convert", llama, tmp_path / "moe", "--recipe", "E2G2T3", "--allow-inexact")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "top-k 3 is not a multiple of G = 2" in " ".join(done.stderr.split())
    assert read_json(tmp_path / "moe" / "config.json")["num_experts_per_tok"] == 3


# Other options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--scaling", "abc", "neither exact, paper, none, measured nor a number"),
        ("--scaling", "", "neither exact, paper, none, measured nor a number"),
        ("--scaling", "-1", "positive number"),
        ("--scaling", "0", "positive number"),
        ("--scaling", "nan", "positive number"),
        ("--scaling", "inf", "positive number"),
        ("--scaling", "1e-400", "positive number"),
        ("--scaling", "1e308", "infinite"),
        ("--router-logit-std", "0", "positive number"),
        ("--router-logit-std", "-0.1", "positive number"),
        ("--router-logit-std", "nan", "positive number"),
        ("--router-logit-std", "inf", "positive number"),
        # Infinite weights, or zeros that would tie every group.
        ("--router-logit-std", "1e300", "overflow float32"),
        ("--router-logit-std", "1e-300", "cannot hold"),
        ("--seed", "-1", "seed"),
        ("--seed", str(2**63), "seed"),
        ("--max-shard-size", "x", "'x' is not a size"),
        ("--max-shard-size", "", "is not a size"),
        ("--max-shard-size", "-5GB", "is not a size"),
        ("--max-shard-size", "5 apples", "is not a size"),
        ("--max-shard-size", "0", "positive"),
        ("--max-shard-size", "0.1B", "positive"),
    ],
)
def test_option_values(llama: Path, refuses: Refuses, option: str, value: str, words: str) -> None:
    refuses(llama, words, arguments=("--recipe", "E2G2T2", f"{option}={value}"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "gpt"),
        ("--routing", "random"),
        ("--dtype", "int8"),
        ("--scale-split", "up"),
        ("--expert-layout", "packed"),
        ("--seed", "one"),
        ("--seed", "1.5"),
        ("--top-k", "two"),
        ("--router-logit-std", "small"),
        ("--no-such-option",),
        ("surplus",),
    ],
)
def test_usage_errors(llama: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = invoke("convert", llama, tmp_path / "moe", "--recipe", "E2G2T2", *arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert arguments[0] in result.stderr
    assert list(tmp_path.iterdir()) == []


# Where the output goes ----------------------------------------------------------------------------


def test_the_output_exists(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text("{}")
    refuses(llama, "exists and is not empty", "--overwrite")


def test_overwriting_what_is_no_checkpoint(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.tex").write_text("years of work")
    arguments = ("--recipe", "E2G2T2", "--overwrite")
    refuses(llama, "was not made by upcycle", arguments=arguments)


def test_empty_paths(llama: Path, tmp_path: Path) -> None:
    for arguments in (("convert", str(llama), ""), ("convert", "", str(tmp_path / "moe"))):
        result = CliRunner().invoke(app, [*arguments, "--recipe", "E2G2T2"])
        assert result.exit_code == 2
        assert "it is empty" in result.stderr


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_outputs_that_would_harm_the_source(
    llama: Path, tmp_path: Path, refuses: Refuses, overwrite: tuple[str, ...]
) -> None:
    dense = clone(llama, tmp_path / "models" / "dense")
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(dense)
    arguments = ("--recipe", "E2G2T2", *overwrite)
    for output, words in (
        (dense, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (dense / "moe", "inside the source"),
        (dense / "a" / "b", "inside the source"),
        (tmp_path / "link" / "moe", "inside the source"),
        (tmp_path / "models" / "other" / ".." / "dense", "is the source itself"),
        (tmp_path / "models", "contains the source"),
        (tmp_path, "contains the source"),
        (Path("/"), "contains the source"),
    ):
        refuses(dense, words, output=output, arguments=arguments)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_outputs_that_are_no_directory(
    llama: Path, tmp_path: Path, refuses: Refuses, overwrite: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "somewhere")
    arguments = ("--recipe", "E2G2T2", *overwrite)
    refuses(llama, "not a directory", output=tmp_path / "file", arguments=arguments)
    for name in ("dangling", "linked"):
        refuses(llama, "is a symbolic link", output=tmp_path / name, arguments=arguments)
    refuses(llama, "file", output=tmp_path / "file" / "moe", arguments=arguments)


def test_an_output_that_cannot_be_made(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    # Not even root can make a directory there.
    refuses(llama, "/proc/moe", output=Path("/proc/moe"))
    refuses(llama, "y" * 300, output=tmp_path / ("y" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(llama, "loop", output=tmp_path / "loop")
    refuses(llama, "loop", output=tmp_path / "loop" / "moe")


@pytest.mark.parametrize("length", [250, 255, 256, 5000])
@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--overwrite",)])
def test_an_output_whose_name_is_too_long(
    llama: Path, tmp_path: Path, refuses: Refuses, length: int, extra: tuple[str, ...]
) -> None:
    """The name itself may fit; what it has behind it while it is made does not."""
    output = tmp_path / ("ö" + "z" * (length - 2))
    words = (output.name, "too long", "more than 255 bytes")
    refuses(llama, *words, output=output, arguments=("--recipe", "E2G2T2", *extra))


def test_an_output_whose_name_just_fits(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / ("z" * 246)
    for extra in ((), ("--overwrite", "--seed", "1")):
        done = invoke("convert", llama, output, "--recipe", "E2G2T2", "--quiet", *extra)
        assert done.exit_code == 0, done.stderr


NOT_UTF8 = "x\udcff"


def test_paths_that_are_not_utf8(llama: Path, tmp_path: Path) -> None:
    dense, moe = (tmp_path / f"{name}{NOT_UTF8}" for name in ("dense", "moe"))
    clone(llama, dense)
    prompts, config = tmp_path / f"p{NOT_UTF8}.txt", tmp_path / f"c{NOT_UTF8}.toml"
    prompts.write_text("One two three, said the owl to the moon.\n" * 9)
    config.write_text('recipe = "E2G2T2"\n')
    for arguments in (
        ("convert", dense, moe, "--config", config, "--json"),
        ("convert", llama, tmp_path / "moe", "--recipe", "E2G2T2"),
        ("inspect", dense, "--recipe", "E2G2T2"),
        ("inspect", moe, "--weights", "--dense", dense, "--json"),
        ("verify", llama, tmp_path / "moe", "--prompts", prompts),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        assert "Traceback" not in done.output
        done.output.encode()
    shown = r"densex\udcff"
    assert read_json(moe / "upcycle.json")["source"]["name"] == shown
    assert shown in (moe / "README.md").read_text().replace(r"\\", "\\")
    # What loads models reads no such path; that is no finding about the model.
    for refused in (
        ("convert", dense, tmp_path / "new", "--recipe", "E2G2T2", "--verify"),
        ("convert", llama, tmp_path / NOT_UTF8, "--recipe", "E2G2T2", "--verify"),
        ("verify", dense, tmp_path / "moe"),
        ("verify", llama, moe),
        ("demo", tmp_path / NOT_UTF8),
    ):
        assert_refused(invoke(*refused), "is not UTF-8", r"x\udcff", "Rename it")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_may_not_be_read(
    llama: Path, tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = clone(llama, tmp_path / "dense")
    real = os.open

    def refuse(path: str | Path, *options: Any, **more: Any) -> int:  # noqa: ANN401
        if str(path).endswith("dense/tokenizer.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *options, **more)

    monkeypatch.setattr(os, "open", refuse)
    refuses(dense, "tokenizer.json: Permission denied")
    result = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G2T2", "--dry-run")
    assert result.exit_code == 0
    assert "without --dry-run this is refused" in result.stderr
    assert "tokenizer.json: Permission denied" in result.stderr


def test_a_mount_point(llama: Path, refuses: Refuses) -> None:
    refuses(llama, "mount point", "/dev/shm/moe", output=Path("/dev/shm"))  # noqa: S108


def test_not_enough_disk_space(
    llama: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**6, 10**6))
    message = refuses(llama, "not enough disk space", "1 MB free")
    assert re.search(r"\d MB needed", message)


def test_too_large_a_conversion_is_refused_by_its_size(
    llama: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 8_000_000))
    # 4 MB are kept free for what is not weights; 8 MB of experts are too many then.
    refuses(llama, "not enough disk space", arguments=("--recipe", "E256G1T1"))


def test_errors_are_said_quietly_too(llama: Path, refuses: Refuses) -> None:
    refuses(llama, "is not a recipe", arguments=("--recipe", "x", "--quiet"))


# Other commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


def test_inspect(llama: Path, moe: Path, tmp_path: Path) -> None:
    assert_refused(invoke("inspect", tmp_path / "absent"), "does not exist")
    assert_refused(invoke("inspect", "org/name"), "hf download org/name")
    assert_refused(invoke("inspect", moe, "--recipe", "E2G2T2"), "mixture of experts already")
    assert_refused(invoke("inspect", llama, "--recipe", "E2"), "is not a recipe")
    assert_refused(invoke("inspect", llama, "--recipe", "E2G5T5"), "not divisible")
    assert_refused(invoke("inspect", llama, "--weights"), "dense model", "--weights")
    assert_refused(invoke("inspect", moe, "--dense", llama), "--weights")
    assert_refused(invoke("inspect", moe, "--weights", "--dense", moe), "mixture of experts")
    assert_refused(
        invoke("inspect", moe, "--weights", "--dense", tmp_path / "no"), "does not exist"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": "4"},
        {"num_local_experts": 0},
        {"num_local_experts": None},
        {"num_local_experts": 3},
        {"num_local_experts": 8},
        {"num_experts_per_tok": [2]},
        {"num_experts_per_tok": -1},
        {"num_experts_per_tok": 9},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": None},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspecting_an_moe_whose_config_is_wrong(
    llama: Path, tmp_path: Path, changes: dict[str, Any], layout: ExpertLayout
) -> None:
    recipe, options = Recipe(expansion=2, granularity=2, top_k=2), Options(expert_layout=layout)
    convert(llama, tmp_path / "good", recipe, options=options)
    broken = clone(tmp_path / "good", tmp_path / "moe", **changes)
    assert_refused(invoke("inspect", broken, "--weights"))


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"{}", b'{"recipe": 3, "source": []}'])
def test_inspecting_an_moe_whose_record_is_wrong(moe: Path, tmp_path: Path, record: bytes) -> None:
    broken = clone(moe, tmp_path / "moe")
    (broken / "upcycle.json").write_bytes(record)
    for form in ((), ("--json",)):
        result = invoke("inspect", broken, *form)
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_inspecting_against_another_dense_model(
    moe: Path, make_dense: MakeDense, tmp_path: Path
) -> None:
    smaller = make_dense("llama", hidden_size=16, intermediate_size=16)
    assert_refused(invoke("inspect", moe, "--weights", "--dense", smaller), "smaller")
    one_layer = clone(make_dense("llama"), tmp_path / "dense")
    save_tensors(one_layer, lambda tensors: tensors.pop("model.layers.0.mlp.gate_proj.weight"))
    assert_refused(invoke("inspect", moe, "--weights", "--dense", one_layer), "lacks")


def test_verify(llama: Path, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for arguments, words in (
        ((tmp_path / "no", moe), str(tmp_path / "no")),
        ((llama, tmp_path / "no"), str(tmp_path / "no")),
        ((llama, llama), "llama"),
        ((moe, moe), "The dense model comes first"),
        ((moe, llama), "llama"),
        ((llama, moe, "--checks", "all"), "'all' is not a check"),
        ((llama, moe, "--checks", ""), "check"),
        ((llama, moe, "--prompts", tmp_path / "no.txt"), "no.txt"),
        ((llama, moe, "--prompts", tmp_path / "empty.txt"), "empty.txt"),
        ((llama, moe, "--prompts", tmp_path), str(tmp_path)),
    ):
        assert_refused(invoke("verify", *arguments), words)


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    assert_refused(invoke("demo", tmp_path), "exists and is not empty")
    assert_refused(invoke("demo", tmp_path / "thesis.tex"), "thesis.tex")
    assert contents(tmp_path) == before


# The same from Python -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        {"expansion": 0, "granularity": 1, "top_k": 1},
        {"expansion": 2, "granularity": 1, "top_k": 3},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scaling": float("nan")},
        {"expansion": 2, "granularity": 1, "top_k": 1, "seed": -1},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scaling": 0},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scaling": "double"},
        {"expansion": 2, "granularity": 1, "top_k": 1, "routing": "random"},
        {"expansion": 2, "granularity": 1, "top_k": 1, "scale_split": "up"},
    ],
)
def test_a_recipe_is_valid_or_is_not_made(wanted: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError):
        Recipe(**wanted)


@pytest.mark.parametrize(
    "wanted", [{"dtype": "int8"}, {"expert_layout": "packed"}, {"max_shard_bytes": 0}]
)
def test_options_are_valid_or_are_not_made(wanted: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError):
        Options(**wanted)


def test_names_mean_the_same_as_members() -> None:
    """Or else a plain string would quietly stand for another routing or layout."""
    loose: dict[str, Any] = {"routing": "topk-softmax", "scaling": "paper", "scale_split": "down"}
    recipe = Recipe(expansion=2, granularity=2, top_k=2, **loose)
    assert recipe.routing is Routing.TOPK_SOFTMAX
    assert recipe.scaling is Scaling.PAPER
    assert recipe.scale_split is ScaleSplit.DOWN
    fused: dict[str, Any] = {"expert_layout": "fused"}
    assert Options(**fused).expert_layout is ExpertLayout.FUSED
    whole: dict[str, Any] = {"scaling": 4}
    assert Recipe(expansion=2, granularity=1, top_k=2, **whole).factors().c == 4.0


def test_an_unknown_target_from_python(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="is not a target"):
        convert(llama, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=1), target="gpt")


def test_a_quantised_moe_is_not_looked_into(moe: Path, tmp_path: Path) -> None:
    broken = clone(moe, tmp_path / "moe")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_tensors(broken, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert invoke("inspect", broken).exit_code == 0
    assert_refused(invoke("inspect", broken, "--weights"), name, "I8")
