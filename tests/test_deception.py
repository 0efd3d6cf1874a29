"""Attempts to make verification pass a wrong model: each one fails, whatever the record says.

An attack edits a good conversion. It is tried with the record that the conversion left, and without
one, since a forger leaves it out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import MakeDense, clone, read_json, read_tensors, write_json
from safetensors.torch import save_file
from test_redirects import FILES, KEYS

from upcycle_cli import Options, Recipe, UpcycleError, convert, verify
from upcycle_cli.old_verification.completeness import find_incomplete, open_upcycled
from upcycle_cli.recipe.recipe import Routing
from upcycle_cli.verification.result import Report, Status

Edit = Callable[[dict[str, Any]], object]
RECIPE = Recipe(expansion=4, granularity=2, top_k=2)
ROUTERS = tuple(f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2))
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in bfloat16 whose second layer does not look at the first hidden dimension."""
    path = clone(make_dense("llama", dtype="bfloat16"), tmp_path_factory.mktemp("dense") / "dense")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][0] = 0

    edit_tensors(path, edit)
    return path


@pytest.fixture(scope="module")
def good(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "moe"
    convert(dense, path, RECIPE)
    return path


@pytest.fixture(params=["recorded", "unrecorded"])
def moe(good: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = Path(shutil.copytree(good, tmp_path / "moe"))
    if request.param == "unrecorded":
        (path / "upcycle.json").unlink()
    return path


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(path)
    edit(tensors)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, edit: Edit) -> None:
    value = read_json(path)
    edit(value)
    write_json(path, value)


def text_of(report: Report) -> str:
    return "\n".join(
        f"{check.name} {check.status}: {check.detail} {' '.join(check.failures)}"
        for check in report.checks
    )


def assert_caught(dense: Path, moe: Path, check: str, *words: str) -> None:
    """The check fails alone, without any other, and says why."""
    report = verify(dense, moe, checks=[check])
    assert report.status is Status.FAILED, text_of(report)
    assert not report.accepted
    for word in words:
        assert word in text_of(report)


def test_the_good_one_passes(dense: Path, moe: Path) -> None:
    report = verify(dense, moe)
    assert report.passed, text_of(report)
    assert report.promise == "exact"


# Which file is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", KEYS, ids="-".join)
def test_keys_that_send_loaders_elsewhere(dense: Path, moe: Path, changes: dict[str, Any]) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_caught(dense, moe, "structure", *changes)


def test_other_weights(dense: Path, moe: Path) -> None:
    """What the weights check reads is right, and what transformers loads is another model."""
    (moe / "other").mkdir()
    edit = {"transformers_weights": "other/model.safetensors"}
    shutil.copy(moe / "model.safetensors", moe / "other")
    edit_tensors(moe / "other", lambda tensors: tensors["lm_head.weight"].mul_(-1))
    edit_json(moe / "config.json", lambda config: config.update(edit))
    assert_caught(dense, moe, "structure", "transformers_weights", "another weight file")


READ = (
    *FILES,
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "params.json",
    "tekken.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "modules.json",
    "config.4.0.0.json",
    "model.gguf",
    "NOTICE.safetensors",
    "LICENSE.py",
    "Config.json",
    "ADAPTER_CONFIG.json",
    "model.SAFETENSORS",
)


@pytest.mark.parametrize("name", READ)
def test_files_that_something_reads(dense: Path, moe: Path, name: str) -> None:
    (moe / name).parent.mkdir(exist_ok=True)
    (moe / name).write_text("{}")
    assert_caught(dense, moe, "structure", name)


def test_a_link_to_a_directory_of_code(dense: Path, moe: Path) -> None:
    (moe / "scripts").mkdir()
    (moe / "scripts" / "generate.py").write_text("")
    (moe / "custom_generate").symlink_to("scripts")
    assert_caught(dense, moe, "structure", "custom_generate/ is a link to a directory")


@pytest.mark.parametrize("metadata", [None, {"format": "tf"}, {"format": "mlx"}])
def test_formats_that_loaders_refuse(
    dense: Path, moe: Path, metadata: dict[str, str] | None
) -> None:
    save_file(read_tensors(moe), moe / "model.safetensors", metadata=metadata)
    assert_caught(dense, moe, "structure", "loaders want 'pt'")


def test_a_shard_that_only_the_index_knows(dense: Path, moe: Path) -> None:
    tensors = read_tensors(moe)
    (moe / "model.safetensors").rename(moe / "weights.safetensors")
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(tensors, "weights.safetensors"),
    }
    write_json(moe / "model.safetensors.index.json", index)
    assert_caught(dense, moe, "structure", "weights.safetensors holds weights under a name")


def test_files_that_nothing_reads_are_named(dense: Path, moe: Path) -> None:
    for name in ("notes.txt", "plots/loss.png", ".gitattributes", "NOTICE", "README.md"):
        (moe / name).parent.mkdir(exist_ok=True)
        (moe / name).write_text("mine")
    report = verify(dense, moe, checks=["structure", "files"])
    assert report.passed
    assert "Not part of the model: notes.txt, plots/loss.png." in report.checks[1].detail


# The tokenizer and what else is copied ------------------------------------------------------------


def tokenizer(edit: Edit) -> Callable[[Path], None]:
    return lambda moe: edit_json(moe / "tokenizer.json", edit)


def setting(**changes: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return lambda moe: edit_json(moe / "tokenizer_config.json", lambda value: value.update(changes))


def generation(**changes: Any) -> Callable[[Path], None]:  # noqa: ANN401
    return lambda moe: edit_json(
        moe / "generation_config.json", lambda value: value.update(changes)
    )


def new_file(name: str, text: str) -> Callable[[Path], None]:
    def write(moe: Path) -> None:
        (moe / name).parent.mkdir(exist_ok=True)
        (moe / name).write_text(text)

    return write


def swapped(value: dict[str, Any]) -> None:
    vocab = value["model"]["vocab"]
    one, other = list(vocab)[40:42]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def made_special(value: dict[str, Any]) -> None:
    value["added_tokens"].append(value["added_tokens"][0] | {"id": 40, "content": "a"})


def not_special(value: dict[str, Any]) -> None:
    value["added_tokens"][0]["special"] = False


def without(name: str, key: str) -> Callable[[Path], None]:
    return lambda moe: edit_json(moe / name, lambda value: value.pop(key))


def with_a_byte_order_mark(moe: Path) -> None:
    path = moe / "generation_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def bomb(value: dict[str, Any]) -> None:
    """A normalizer that makes two letters of one, forty times over."""
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    value["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}


STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
LOWERCASE = {"type": "Lowercase"}
COMPANIONS: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("decoder added", tokenizer(lambda value: value.update(decoder=STRIP | {"type": "Fuse"})), ""),
    (
        "normaliser added",
        tokenizer(lambda value: value.update(normalizer=LOWERCASE)),
        "normalizer is",
    ),
    ("pre-tokenizer", tokenizer(lambda value: value.update(pre_tokenizer=None)), "pre_tokenizer"),
    ("merge added", tokenizer(lambda value: value["model"].update(merges=[["a", "b"]])), ""),
    ("ids swapped", tokenizer(swapped), "model.vocab"),
    ("a word made special", tokenizer(made_special), "added_tokens[2]"),
    ("a special token made a word", tokenizer(not_special), "added_tokens[0].special"),
    ("longest text", setting(model_max_length=7), "model_max_length"),
    ("another eos token", setting(eos_token="a"), "eos_token"),
    ("extra special token", setting(extra_special_tokens=["b"]), "special tokens"),
    ("another backend", setting(backend="sentencepiece"), "backend"),
    ("code", setting(auto_map={"AutoTokenizer": ["x.X", None]}), "auto_map"),
    ("another class", setting(tokenizer_class="BertTokenizer"), "tokenizer_class"),
    ("another side", setting(padding_side="left"), "padding_side"),
    ("a second vocabulary", new_file("vocab.json", '{"a": 0}'), "vocab.json"),
    ("other merges", new_file("merges.txt", "#version: 0.2\na b\n"), "merges.txt"),
    ("sentencepiece", new_file("tokenizer.model", "x"), "tokenizer.model"),
    ("a processor", new_file("preprocessor_config.json", "{}"), "preprocessor_config.json"),
    ("tiktoken", new_file("x.tiktoken", "x"), "x.tiktoken"),
    ("other special tokens", new_file("special_tokens_map.json", '{"eos_token": "a"}'), "eos"),
    ("added tokens", new_file("added_tokens.json", '{"zz": 300}'), "added_tokens.json"),
    ("template", new_file("chat_template.jinja", "{{ messages }}"), "the chat template is not"),
    ("second template", new_file("additional_chat_templates/tools.jinja", "x"), "'tools'"),
    ("two default templates", new_file("additional_chat_templates/default.jinja", "x"), "template"),
    (
        "a template of llama.cpp",
        setting(chat_template="{{ messages }}"),
        "the chat template is not",
    ),
    ("another tokenizer file", setting(tokenizer_file="data/t.json"), "tokenizer_file"),
    ("no class", without("tokenizer_config.json", "tokenizer_class"), "tokenizer_class is None"),
    ("a bomb", tokenizer(bomb), "normalizer"),
    ("temperature", generation(temperature=9.0), "temperature is 9.0"),
    ("as the config says", generation(_from_model_config=True), "_from_model_config is True"),
    ("a number for a flag", generation(do_sample=1), "do_sample is 1"),
    ("a float for an integer", generation(top_p=1), "top_p"),
    ("byte order mark", with_a_byte_order_mark, "generation_config.json"),
    ("generation keys", generation(suppress_tokens=[5]), "suppress_tokens is [5]"),
    ("eos of generation", generation(eos_token_id=[1, 5]), "eos_token_id"),
    ("not JSON", new_file("generation_config.json", "{"), "generation_config.json"),
    ("not a tokenizer", new_file("tokenizer.json", "{}"), "tokenizer"),
    ("wrong checksums", new_file("SHA256SUMS", f"{'0' * 64}  config.json\n"), "SHA256SUMS"),
    ("strange checksums", new_file("SHA256SUMS", f"{'0' * 64}  ../config.json\n"), "no file here"),
    ("checksum of nothing", new_file("SHA256SUMS", f"{'0' * 64}  gone\n"), "gone"),
)


@pytest.mark.parametrize(
    ("edit", "words"), [row[1:] for row in COMPANIONS], ids=[row[0] for row in COMPANIONS]
)
def test_companions(dense: Path, moe: Path, edit: Callable[[Path], None], words: str) -> None:
    edit(moe)
    assert_caught(dense, moe, "files", words)


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
@pytest.mark.parametrize("name", ["LICENSE", "generation_config.json", "tokenizer.json"])
def test_what_is_no_file_is_a_finding(
    dense: Path, moe: Path, tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / "elsewhere").write_bytes((moe / name).read_bytes())
    (moe / name).unlink()
    make = {"link": lambda path: path.symlink_to(tmp_path / "elsewhere"), "directory": Path.mkdir}
    make.get(kind, os.mkfifo)(moe / name)
    reports = {check: verify(dense, moe, checks=[check]) for check in ("files", "claims")}
    if name != "LICENSE":  # which is only noted
        assert not reports["files"].passed
    if (moe / "upcycle.json").exists():
        assert any(name in failure for failure in reports["claims"].checks[0].failures)


def test_a_licence_of_any_length(dense: Path, tmp_path: Path) -> None:
    long = clone(dense, tmp_path / "long")
    (long / "LICENSE").write_bytes(b"Do as you must.\n" * 700_000)
    convert(long, tmp_path / "long-moe", Recipe(expansion=2, granularity=2, top_k=2))
    report = verify(long, tmp_path / "long-moe", checks=["files"])
    assert report.passed
    assert "LICENSE" not in report.checks[0].detail


def test_a_generation_config_where_dense_has_none(dense: Path, moe: Path, tmp_path: Path) -> None:
    plain = clone(dense, tmp_path / "plain")
    (plain / "generation_config.json").unlink()
    assert_caught(plain, moe, "files", "generation_config.json: do_sample is True")
    ids = {key: read_json(moe / "config.json")[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(moe / "generation_config.json", ids | {"_from_model_config": True})
    assert verify(plain, moe, checks=["files"]).passed


# Routers ------------------------------------------------------------------------------------------


def ulps_apart(tensors: dict[str, torch.Tensor]) -> None:
    """Rows that only float32 arithmetic tells apart."""
    for name in ROUTERS:
        row = tensors[name][0].view(torch.int16)
        rows = torch.stack([row + group for group in range(4)]).view(torch.bfloat16)
        tensors[name] = rows.repeat_interleave(2, 0)


def nearly_equal(tensors: dict[str, torch.Tensor]) -> None:
    """Large rows with small differences, which are lost in the rounding of their logits."""
    for name in ROUTERS:
        rows = tensors[name][::2].float()
        rows = 100 * rows[:1] + rows
        tensors[name] = rows.bfloat16().repeat_interleave(2, 0)


@pytest.mark.parametrize("edit", [ulps_apart, nearly_equal])
def test_rows_that_only_work_in_float32(
    dense: Path, moe: Path, edit: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    edit_tensors(moe, edit)
    assert_caught(dense, moe, "weights", ROUTERS[0], "tells them apart")
    assert_caught(dense, moe, "outputs", ROUTERS[0], "an honest router")


def test_groups_that_always_tie(dense: Path, moe: Path) -> None:
    """Rows that differ where the layer's input is zero: the CPU's order of ties helps."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        rows = torch.zeros(4, 32)
        rows[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        tensors[ROUTERS[1]] = rows.bfloat16().repeat_interleave(2, 0)

    edit_tensors(moe, edit)
    assert_caught(dense, moe, "outputs", "split_token_layers")


def test_rows_that_differ_where_nothing_comes_through(dense: Path, moe: Path) -> None:
    """The same without running anything: what is behind a weight of 0 tells no rows apart."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        rows = tensors[ROUTERS[1]][:1].repeat(8, 1)
        rows[:, 0] = torch.arange(4).repeat_interleave(2).bfloat16()
        tensors[ROUTERS[1]] = rows

    edit_tensors(moe, edit)
    assert_caught(dense, moe, "weights", ROUTERS[1], "rows 0 and 1 of its groups are the same")


@pytest.fixture(scope="module")
def wide(make_dense: MakeDense) -> Path:
    """A llama whose rows have enough dimensions to look random, or not to."""
    return make_dense("llama", dtype="bfloat16", hidden_size=256, num_hidden_layers=1)


def common(rows: torch.Tensor) -> torch.Tensor:
    """A direction that the built-in text may hardly have, in all rows."""
    direction = torch.randn(256)
    direction /= direction.norm()
    added: torch.Tensor = 3 * rows.norm() * direction
    return rows + added


def opposite(rows: torch.Tensor) -> torch.Tensor:
    signs = torch.tensor([1.0, -1.0, 0.8, -0.8]).unsqueeze(1)
    return rows * 0.2 + signs * rows[:1]


def sparse(rows: torch.Tensor) -> torch.Tensor:
    largest = rows.abs() == rows.abs().amax(dim=1, keepdim=True)
    return rows * 1e30 * largest


def loud(rows: torch.Tensor) -> torch.Tensor:
    return rows * 3e37


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (common, "in one direction"),
        (opposite, "in one direction"),
        (sparse, "standard deviations"),
        (loud, "its logits can reach"),
    ],
)
def test_rows_that_are_fine_on_the_built_in_text(
    wide: Path, tmp_path: Path, edit: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    convert(wide, tmp_path / "moe", RECIPE)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows = edit(tensors[ROUTERS[0]][::2].float())
        tensors[ROUTERS[0]] = rows.bfloat16().repeat_interleave(2, 0)

    torch.manual_seed(0)
    edit_tensors(tmp_path / "moe", change)
    assert_caught(wide, tmp_path / "moe", "weights", ROUTERS[0], words)


def test_a_gate_of_the_shared_expert_that_overflows(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "moe", RECIPE, target="qwen2_moe")
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    edit_tensors(tmp_path / "moe", lambda tensors: tensors[name].mul_(1e38))
    assert_caught(wide, tmp_path / "moe", "weights", name, "its logits can reach")


def test_tokens_that_nobody_would_write(dense: Path, good: Path, tmp_path: Path) -> None:
    """Some of them are no text, and another router is run on others of them."""
    metrics = verify(dense, good, checks=["outputs"]).checks[0].metrics
    assert (metrics["tokens"], metrics["text_tokens"]) == (1920, 1792)
    other = tmp_path / "moe"
    convert(dense, other, Recipe(expansion=4, granularity=2, top_k=2, seed=1))
    gaps = [
        verify(dense, path, checks=["outputs"]).checks[0].metrics["dense_nll"]
        for path in (good, other)
    ]
    assert gaps[0] == gaps[1]  # of the text alone


def test_a_router_that_is_refused(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=4, granularity=2, top_k=2, router_logit_std=60_000)
    with pytest.raises(UpcycleError, match="60000 overflow float16"):
        convert(dense, tmp_path / "moe", recipe, options=Options(dtype="float16"))
    convert(dense, tmp_path / "moe", recipe)
    assert verify(dense, tmp_path / "moe").passed


def test_router_logits_that_overflow(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(dense, moe, RECIPE, options=Options(dtype="float16"))
    edit_tensors(moe, lambda tensors: [tensors[name].mul_(3e5) for name in ROUTERS])
    assert_caught(dense, moe, "outputs", "of its logits are not finite in float16")


# Rounding -----------------------------------------------------------------------------------------


def test_rounding_is_a_number_of_its_own(make_dense: MakeDense, tmp_path: Path) -> None:
    source = make_dense("llama")
    convert(source, tmp_path / "moe", RECIPE, options=Options(dtype="bfloat16"))
    report = verify(source, tmp_path / "moe", checks=["weights", "outputs"])
    weights, outputs = report.checks
    assert 1e-3 < float(weights.metrics["rounding_error"]) < 3e-3
    assert weights.metrics["zeroed_share"] == 0
    found = {
        key: float(outputs.metrics[f"kl_mean{key}"]) for key in ("", "_rounding", "_conversion")
    }
    assert found["_conversion"] < 1e-8 < found["_rounding"]
    assert found[""] == pytest.approx(found["_rounding"], rel=1e-2)
    assert "Rounding its weights alone costs" in outputs.detail


def test_weights_that_become_zero(make_dense: MakeDense, tmp_path: Path) -> None:
    """The function is that of the dense model rounded, and nothing is left of its MLPs."""
    source = clone(make_dense("llama"), tmp_path / "dense")
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(source, lambda tensors: tensors[name].mul_(1e-7))
    convert(source, tmp_path / "moe", RECIPE, options=Options(dtype="float16"))
    assert_caught(source, tmp_path / "moe", "weights", "float16 cannot hold", name, "became 0")


def test_rounding_that_costs_too_much(make_dense: MakeDense, tmp_path: Path) -> None:
    source = clone(make_dense("llama"), tmp_path / "dense")

    def sharpen(tensors: dict[str, torch.Tensor]) -> None:
        """Attention that chooses between nearly equal scores."""
        for name in tensors:
            if "q_proj" in name:
                tensors[name] *= 300

    edit_tensors(source, sharpen)
    convert(source, tmp_path / "moe", RECIPE, options=Options(dtype="bfloat16"))
    assert_caught(source, tmp_path / "moe", "outputs", "kl_mean_rounding")


def test_products_that_overflow_float16(make_dense: MakeDense, tmp_path: Path) -> None:
    """Every expert's output is small; what goes into it is not."""
    source = clone(make_dense("llama", dtype="float16"), tmp_path / "dense")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1.2e4
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 1e-3

    edit_tensors(source, edit)
    moe = tmp_path / "moe"
    convert(source, moe, Recipe(expansion=2, granularity=8, top_k=8))
    assert_caught(source, moe, "outputs", "run in float16, as it is stored")


# Who sets the standard ----------------------------------------------------------------------------


def test_a_record_that_asks_for_less(dense: Path, good: Path, tmp_path: Path) -> None:
    """Experts 512 times too large, and a record that says that this was wanted."""
    moe = Path(shutil.copytree(good, tmp_path / "moe"))

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("w2.weight"):
                tensors[name] *= 512

    def record(value: dict[str, Any]) -> None:
        value["recipe"]["scaling"] = 1024.0
        value["factors"] |= {"c": 1024.0, "down": 512.0}
        value["promise"] = "none"

    edit_tensors(moe, scale)
    edit_json(moe / "upcycle.json", record)
    for checks in (["structure"], ["weights"], ["outputs"], ["weights", "outputs"]):
        report = verify(dense, moe, checks=checks)
        assert report.status is Status.MEASURED
        assert not report.accepted
        assert report.to_json()["promise"] == "none"
    assert verify(dense, moe, checks=["weights"], allow_inexact=True).accepted
    (moe / "upcycle.json").unlink()
    assert_caught(dense, moe, "weights", "up × down = 1024", "needs c = 2")
    assert_caught(dense, moe, "outputs", "kl_mean_conversion")
    report = verify(dense, moe, allow_inexact=True)
    assert report.status is Status.MEASURED
    assert report.accepted


@pytest.mark.parametrize("top_k", [1, 3])
def test_another_top_k(dense: Path, good: Path, tmp_path: Path, top_k: int) -> None:
    moe = Path(shutil.copytree(good, tmp_path / "moe"))

    def record(value: dict[str, Any]) -> None:
        value["recipe"] |= {"top_k": top_k, "name": f"E4G2T{top_k}", "allow_inexact": True}
        value["promise"] = "none"

    edit_json(moe / "upcycle.json", record)
    edit_json(moe / "config.json", lambda config: config.update(num_experts_per_tok=top_k))
    for _ in range(2):
        report = verify(dense, moe, checks=["structure", "weights", "outputs"])
        assert report.status is Status.MEASURED, text_of(report)
        assert not report.accepted
        (moe / "upcycle.json").unlink(missing_ok=True)


def test_routers_without_groups(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(dense, moe, Recipe(expansion=4, granularity=2, top_k=2, virtual_groups=False))
    assert verify(dense, moe).status is Status.MEASURED
    (moe / "upcycle.json").unlink()
    assert_caught(dense, moe, "weights", "differs from the other rows of its virtual group")
    assert_caught(dense, moe, "outputs", "split_token_layers")
    assert verify(dense, moe, allow_inexact=True).accepted


def test_one_layer_with_a_loud_router(make_dense: MakeDense, tmp_path: Path) -> None:
    """Nearly uniform on average is not enough for gates that are not renormalised."""
    source = make_dense("llama", num_hidden_layers=6)
    recipe = Recipe(expansion=4, granularity=1, top_k=1, routing=Routing.SOFTMAX_TOPK)
    moe = tmp_path / "moe"
    convert(source, moe, recipe, target="qwen2_moe")
    edit_tensors(moe, lambda tensors: tensors["model.layers.5.mlp.gate.weight"].mul_(100))
    report = verify(source, moe, checks=["outputs"])
    assert report.status is Status.MEASURED
    assert "logits are too large" in report.checks[0].detail
    assert_caught(source, moe, "claims", "model.layers.5.mlp.gate.weight")


# Settings -----------------------------------------------------------------------------------------

SETTINGS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rope_theta": 5e5}, "rope_theta is 500000.0, but rope_parameters.rope_theta is"),
    ({"rope_theta": None}, "rope_theta is None, but rope_parameters.rope_theta is"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    ({"decoder_sparse_step": 5}, "decoder_sparse_step is 5"),
    ({"qkv_bias": True}, "qkv_bias is True"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is"),
    ({"temperature": 0.1}, "temperature is 0.1, and the dense model has no such setting"),
    ({"num_experts": 3}, "gate.weight has shape"),
    ({"router_aux_loss_coef": -0.5}, "router_aux_loss_coef is -0.5"),
    ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef is nan"),
    ({"router_aux_loss_coef": "0.01"}, "router_aux_loss_coef is '0.01'"),
    ({"output_router_logits": "yes"}, "output_router_logits is 'yes'"),
    ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ({"use_cache": False}, "use_cache is False"),
    ({"initializer_range": 7.0}, "initializer_range is 7.0"),
    ({"max_position_embeddings": 4096}, "max_position_embeddings is 4096"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
    ({"attention_multiplier": 2.0}, "attention_multiplier is 2.0"),
    ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class"),
    ({"model_name": "x"}, "model_name is 'x'"),
    ({"get_text_config": 1}, "transformers cannot"),
    ({"pad_token_id": 7}, "pad_token_id is 7"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000 is more than there are"),
    ({"num_hidden_layers": 10**18}, "num_hidden_layers"),
    ({"num_local_experts": 10**9}, "num_local_experts"),
)


@pytest.mark.parametrize(("changes", "words"), SETTINGS, ids=lambda value: str(value)[:50])
def test_settings(dense: Path, moe: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_caught(dense, moe, "structure", words)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def old_notation(config: dict[str, Any]) -> None:
    """A theta for those who take the top one, and another for those who look further."""
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_theta"] = 5e5


def two_kinds(config: dict[str, Any]) -> None:
    config["rope_scaling"]["type"] = "default"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (old_notation, "rope_scaling.rope_theta is"),
        (two_kinds, "rope_type 'yarn' and type 'default'"),
    ],
)
def test_rope_that_readers_resolve_differently(
    make_dense: MakeDense, tmp_path: Path, edit: Edit, words: str
) -> None:
    source = make_dense("llama", dtype="bfloat16", rope_parameters=YARN | {"rope_theta": 1e4})
    convert(source, tmp_path / "moe", RECIPE)
    assert verify(source, tmp_path / "moe", checks=["structure"]).passed
    edit_json(tmp_path / "moe" / "config.json", edit)
    assert_caught(source, tmp_path / "moe", "structure", words)


def test_rope_in_the_newest_notation_alone_is_noted(dense: Path, moe: Path) -> None:
    edit_json(
        moe / "config.json", lambda config: [config.pop("rope_theta"), config.pop("rope_scaling")]
    )
    report = verify(dense, moe, checks=["structure"])
    assert report.passed
    assert "notation of transformers 5 alone" in report.checks[0].detail


def test_windows_that_the_dense_model_does_not_read(dense: Path, tmp_path: Path) -> None:
    """llama has none, whatever its config says, and qwen2_moe has."""
    stray = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    source = clone(dense, tmp_path / "dense", **stray)
    for target in ("mixtral", "qwen2_moe"):
        moe = tmp_path / target
        convert(source, moe, RECIPE, target=target)
        assert verify(source, moe, checks=["structure"]).passed
    edit_json(moe / "config.json", lambda config: config.update(stray))
    assert_caught(source, moe, "structure", "use_sliding_window", "max_window_layers")


HARMLESS = {
    "transformers_version",  # says who wrote it
    "output_router_logits",  # true is what trainers set
    "dtype",  # null leaves it to the tensors
    "num_experts_per_tok",  # the weights and outputs checks' matter
    "norm_topk_prob",
}


@pytest.mark.parametrize("pair", [("llama", "mixtral"), ("qwen3", "qwen3_moe")], ids="-".join)
def test_every_setting_counts(make_dense: MakeDense, tmp_path: Path, pair: tuple[str, str]) -> None:
    source = make_dense(pair[0], dtype="bfloat16")
    moe = tmp_path / "moe"
    convert(source, moe, RECIPE, target=pair[1])
    config = read_json(moe / "config.json")
    unnoticed = []
    for key, value in config.items():
        changed = {
            bool: not value,
            int: value + 1 if isinstance(value, int) else None,
            float: value * 2 + 1 if isinstance(value, float) else None,
            str: f"{value}x",
            dict: {**value, "factor": 2.0} if isinstance(value, dict) else None,
        }.get(type(value), 7)
        write_json(moe / "config.json", config | {key: changed})
        try:
            if verify(source, moe, checks=["structure"]).status is not Status.FAILED:
                unnoticed.append(key)
        except UpcycleError:
            assert key == "model_type"
    assert set(unnoticed) <= HARMLESS


def test_source_that_is_not_the_dense_model(dense: Path, good: Path, tmp_path: Path) -> None:
    """A record that credits another repo than the one in the Hub's cache that it is held to."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(dense, snapshot)
    moe = Path(shutil.copytree(good, tmp_path / "moe"))
    assert "It names 'dense' as its source" in text_of(verify(snapshot, moe, checks=["claims"]))
    for name, revision, words in (
        ("meta-llama/Llama-3.1-8B", "0" * 40, "source.name is 'meta-llama/Llama-3.1-8B'"),
        ("org/tiny", "1" * 40, "source.revision is '1111"),
    ):
        edit_json(
            moe / "upcycle.json",
            lambda record: record["source"].update(name=name, revision=revision),  # noqa: B023
        )
        assert_caught(snapshot, moe, "claims", words)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "lists no files"),
        (None, "lists no files"),
        ([{"name": "../x", "size": 1, "sha256": "0" * 64}], "which is no file"),
        ([{"name": "config.json", "size": 1}], "without a digest"),
        ([{"name": "config.json", "size": 1, "sha256": "0" * 64}], "config.json is not the file"),
        ([{"name": "gone", "size": 1, "sha256": "0" * 64}], "gone, which is not there"),
    ],
)
def test_listed_files(dense: Path, good: Path, tmp_path: Path, files: object, words: str) -> None:
    moe = Path(shutil.copytree(good, tmp_path / "moe"))
    edit_json(moe / "upcycle.json", lambda record: record.update(files=files))
    assert_caught(dense, moe, "claims", words)


# Links, and the network ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_directory(dense: Path, moe: Path, tmp_path: Path, name: str) -> None:
    (moe / name).rename(tmp_path / "elsewhere")
    (moe / name).symlink_to(tmp_path / "elsewhere")
    if name == "config.json":
        with pytest.raises(UpcycleError, match="is not followed"):
            verify(dense, moe)
        return
    assert_caught(dense, moe, "weights", "is not followed")


GUARDED = """
import sys
from pathlib import Path
from upcycle_cli import verify

def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print("ONLINE", event, arguments, flush=True)

sys.addaudithook(guard)
for moe in sys.argv[2:]:
    print(verify(sys.argv[1], moe).status)
"""
NAMED: tuple[dict[str, Any], ...] = (
    {"_name_or_path": "org/other", "name_or_path": "org/other"},
    {"attn_implementation": "org/kernel"},
    {"experts_implementation": "org/kernel"},
    {"auto_map": {"AutoConfig": "org/code--x.X", "AutoModelForCausalLM": "org/code--x.X"}},
    {"tokenizer_class": "BertTokenizer", "model_name": "org/other"},
    {"quantization_config": {"quant_method": "gptq", "tokenizer": "org/other"}},
)


def test_nothing_that_a_checkpoint_names_is_asked_for(
    dense: Path, good: Path, tmp_path: Path
) -> None:
    moes = []
    for number, changes in enumerate(NAMED):
        moe = Path(shutil.copytree(good, tmp_path / str(number)))
        edit_json(moe / "config.json", lambda config: config.update(changes))  # noqa: B023
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/other"}
        write_json(moe / "adapter_config.json", adapter)
        moes.append(str(moe))
    online = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = forked.run([dense, *moes], program=GUARDED, environment=online)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "failed\n" * len(moes)


# What transformers itself rewrites ----------------------------------------------------------------

PAIRS = (("llama", "mixtral"), ("mistral", "qwen2_moe"), ("qwen2", "qwen2_moe"))


def test_experts_of_an_odd_width(make_dense: MakeDense, tmp_path: Path) -> None:
    source = make_dense("llama", dtype="bfloat16")
    convert(source, tmp_path / "moe", Recipe(expansion=2, granularity=8, top_k=8))
    report = verify(source, tmp_path / "moe")
    assert report.passed, text_of(report)
    assert "Experts 6 wide" in text_of(report)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("minimal", [True, False])
def test_saved_again_by_transformers(
    make_dense: MakeDense, tmp_path: Path, pair: tuple[str, str], *, minimal: bool
) -> None:
    from transformers import AutoModelForCausalLM

    original = make_dense(pair[0], dtype="bfloat16", minimal=minimal)
    source = clone(original, tmp_path / "dense")
    for path in (*source.glob("tokenizer*"), *source.glob("chat*")):
        path.unlink()  # the next test's
    recipe = Recipe(expansion=2, granularity=2, top_k=2, routing=Routing.TOPK_SOFTMAX)
    convert(source, tmp_path / "moe", recipe, target=pair[1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    again = tmp_path / "again"
    model.save_pretrained(again)
    report = verify(source, again)
    assert report.passed, text_of(report)


def test_tokenizer_saved_again(dense: Path, moe: Path, tmp_path: Path) -> None:
    """A tokenizer as transformers 4 wrote it, in the MoE as transformers 5 rewrites it."""
    old = clone(dense, tmp_path / "old")
    config = read_json(old / "tokenizer_config.json")
    config = {key: config[key] for key in ("bos_token", "eos_token", "pad_token")}
    added = {
        str(token.pop("id")): token for token in read_json(old / "tokenizer.json")["added_tokens"]
    }
    extra = {"added_tokens_decoder": added, "additional_special_tokens": ["<s>"]}
    template = (old / "chat_template.jinja").read_text()
    (old / "chat_template.jinja").unlink()
    write_json(
        old / "tokenizer_config.json",
        config | extra | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template},
    )
    write_json(old / "special_tokens_map.json", config)
    write_json(
        moe / "tokenizer_config.json",
        config | {"extra_special_tokens": ["<s>"], "tokenizer_class": "TokenizersBackend"},
    )
    report = verify(old, moe, checks=["files"])
    assert report.passed, text_of(report)
    assert "tokenizer_config.json was saved again, and says the same" in report.checks[0].detail
    assert "special_tokens_map.json is not there" in report.checks[0].detail
    json.loads(json.dumps(report.to_json()))


# Code that is shipped -----------------------------------------------------------------------------

CODE = "modeling_upcycled.py"


@pytest.fixture(scope="module")
def shipping(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A nemotron and its MoE."""
    dense, moe = make_dense("nemotron"), tmp_path_factory.mktemp("shipping") / "moe"
    assert convert(dense, moe, Recipe(expansion=2, granularity=2, top_k=2)).published
    return dense, moe


def append(text: str) -> Callable[[Path], object]:
    return lambda moe: (moe / CODE).write_text((moe / CODE).read_text() + text)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            append("\nopen(__file__ + '.ran', 'w')\n"),
            "not what this version of upcycle writes",
        ),
        (append(" "), "not what this version of upcycle writes"),
        (lambda moe: (moe / CODE).unlink(), f"{CODE} cannot be read"),
        (
            lambda moe: edit_json(
                moe / "config.json",
                lambda config: config["auto_map"].update(AutoModel="other.Model"),
            ),
            "auto_map does not name the classes",
        ),
        (
            lambda moe: edit_json(moe / "config.json", lambda config: config.pop("auto_map")),
            "auto_map does not name the classes",
        ),
    ],
    ids=["more code", "a space", "gone", "another class", "no class"],
)
def test_code_that_is_not_ours(
    shipping: tuple[Path, Path], tmp_path: Path, edit: Callable[[Path], object], words: str
) -> None:
    dense, good = shipping
    moe = Path(shutil.copytree(good, tmp_path / "moe"))
    edit(moe)
    for check in ("structure", "files", "weights", "outputs", "claims"):
        assert_caught(dense, moe, check, words)
    assert any(words in failure for failure in find_incomplete(open_upcycled(moe)))
    assert not (moe / f"{CODE}.ran").exists()


def test_other_code_beside_ours(shipping: tuple[Path, Path], tmp_path: Path) -> None:
    dense, good = shipping
    moe = Path(shutil.copytree(good, tmp_path / "moe"))
    (moe / "configuration_nemotron.py").write_text("")
    assert_caught(dense, moe, "structure", "configuration_nemotron.py is code")


def test_transformers_knows_of_shipped_code_no_longer_than_it_takes(
    shipping: tuple[Path, Path],
) -> None:
    from transformers import AutoConfig

    assert verify(*shipping).passed
    with pytest.raises(ValueError, match="upcycled_nemotron"):
        AutoConfig.for_model("upcycled_nemotron")
