"""Attempts to make verify pass a wrong model: another setting, file or record than the plan's."""

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
from conftest import MakeDense, clone, read_json
from safetensors.torch import load_file, save_file
from verified import (
    MIXTRAL_EXPERT,
    ROUTER,
    SIZES,
    Tensors,
    edit_json,
    edit_tensors,
    save_dense,
    save_tokenizer,
    text_of,
)

from upcycle_cli import Recipe, UpcycleError, convert, verify
from upcycle_cli.verification.result import Status

Attack = Callable[[Path], object]
RECIPE = Recipe(expansion=2, granularity=2, top_k=2)


def assert_caught(dense: Path, moe: Path, check: str, *words: str) -> None:
    report = verify(dense, moe, checks=[check])
    assert report.status is Status.FAILED, text_of(report)
    for word in words:
        assert word in text_of(report)


# config.json --------------------------------------------------------------------------------------

SETTINGS: tuple[dict[str, Any], ...] = (
    # what another model is loaded by, or other code
    {"transformers_weights": "other.safetensors"},
    {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"quantization_config": {}},
    {"attribute_map": {"rms_norm_eps": "attention_dropout"}},
    {"text_config": {"model_type": "qwen2", "hidden_size": 8}},
    # what changes the function, now or for another engine
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"use_sliding_window": True},
    {"mlp_only_layers": [0]},
    {"attention_multiplier": 2.0},
    # what training or text generation goes by
    {"router_aux_loss_coef": float("nan")},
    {"output_router_logits": 0},
    {"get_text_config": 1},
    {"dtype": "float16"},
)


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda value: str(value)[:60])
def test_another_setting_is_a_difference(dense: Path, moe: Path, changes: dict[str, Any]) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_caught(dense, moe, "directory", f"config.json: {next(iter(changes))}")


def test_every_key_counts(dense: Path, moe: Path) -> None:
    """Missing, or another value of the same type; transformers writes no other version's name."""
    path = moe / "config.json"
    config = read_json(path)
    missing, unnoticed = list[str](), list[str]()
    for key, value in config.items():
        others: dict[type, Any] = {bool: not value, str: f"{value}x"}
        if isinstance(value, int | float) and not isinstance(value, bool):
            others[type(value)] = value + 1
        without = {name: held for name, held in config.items() if name != key}
        for changed in (without, config | {key: others.get(type(value), 7)}):
            path.write_text(json.dumps(changed))
            try:
                if verify(dense, moe, checks=["directory"]).status is not Status.FAILED:
                    (missing if changed is without else unnoticed).append(key)
            except UpcycleError:
                assert key == "model_type"
    assert set(unnoticed) <= {"transformers_version"}
    # transformers saves rope_theta in rope_parameters, and leaves out what is null by default.
    unneeded = {"rope_theta", "tie_word_embeddings", "transformers_version"}
    assert {key for key in missing if config[key] is not None} <= unneeded


def test_keys_of_a_wrapper_count(tmp_path: Path) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sees = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16}
    sees |= {"num_attention_heads": 2, "patch_size": 4, "projection_dim": 16}
    config = LlavaConfig(
        text_config=SIZES | {"model_type": "llama"},
        vision_config=sees | {"model_type": "clip_vision_model"},
        image_token_index=250,
    )
    dense = save_dense(config, LlavaForConditionalGeneration, tmp_path / "dense")
    moe = tmp_path / "moe"
    convert(dense, moe, RECIPE)
    assert verify(dense, moe, checks=["directory", "weights"]).accepted
    for key in ("vision_feature_layer", "image_token_index", "mine"):
        changed = clone(moe, tmp_path / key, **{key: 1})
        assert_caught(dense, changed, "directory", f"config.json: {key} is 1")


# Other files --------------------------------------------------------------------------------------

READ = (
    "adapter_config.json",
    "modeling_mine.py",
    "custom_generate/generate.py",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.gguf",
    "NOTICE.safetensors",
    "LICENSE.py",
    "Config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "additional_chat_templates/tools.jinja",
)


@pytest.mark.parametrize("name", READ)
def test_a_file_that_is_not_the_plans_is_a_difference(dense: Path, moe: Path, name: str) -> None:
    (moe / name).parent.mkdir(exist_ok=True)
    (moe / name).write_text("{}")
    assert_caught(dense, moe, "directory", name)


def test_files_that_nothing_reads_are_only_noted(dense: Path, moe: Path) -> None:
    for name in ("notes.txt", "plots/loss.png", ".gitattributes", "NOTICE", "README.md"):
        (moe / name).parent.mkdir(exist_ok=True)
        (moe / name).write_text("mine")
    report = verify(dense, moe, checks=["directory"])
    assert report.accepted, text_of(report)
    assert "Not part of the model: notes.txt, plots/loss.png." in report.checks[0].detail


def json_file(name: str, edit: Callable[[dict[str, Any]], object]) -> Attack:
    return lambda moe: edit_json(moe / name, edit)


def written(name: str, data: str | bytes) -> Attack:
    return lambda moe: (moe / name).write_bytes(data.encode() if isinstance(data, str) else data)


def tokenizer(**changes: object) -> Attack:
    return json_file("tokenizer.json", lambda value: value.update(changes))


def setting(**changes: object) -> Attack:
    return json_file("tokenizer_config.json", lambda value: value.update(changes))


def generation(**changes: object) -> Attack:
    return json_file("generation_config.json", lambda value: value.update(changes))


def swapped_ids(value: dict[str, Any]) -> None:
    vocab = value["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def another_directory(name: str) -> Attack:
    def move(moe: Path) -> None:
        elsewhere = moe.parent / "elsewhere"
        (moe / name).rename(elsewhere)
        (moe / name).symlink_to(elsewhere)

    return move


def pipe(moe: Path) -> None:
    (moe / "generation_config.json").unlink()
    os.mkfifo(moe / "generation_config.json")


def other_format(moe: Path) -> None:
    path = moe / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "mlx"})


FILES: tuple[tuple[str, Attack, str], ...] = (
    ("ids swapped", json_file("tokenizer.json", swapped_ids), "model.vocab.a is"),
    ("normalizer", tokenizer(normalizer={"type": "Lowercase"}), "tokenizer.json: normalizer"),
    ("no tokenizer", written("tokenizer.json", "{}"), "tokenizer.json: version is missing"),
    ("tokenizer gone", lambda moe: (moe / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ("longest text", setting(model_max_length=7), "model_max_length is 7"),
    ("end of text", setting(eos_token="a"), "eos_token is 'a' instead of '</s>'"),
    ("names of inputs", setting(model_input_names=["input_ids"]), "model_input_names"),
    ("special names", setting(extra_special_tokens={"image_token": "a"}), "extra_special_tokens"),
    ("code", setting(auto_map={"AutoTokenizer": ["x.X", None]}), "auto_map"),
    ("template beside", setting(chat_template="{{ messages }}"), "chat_template"),
    ("template", written("chat_template.jinja", "{{ x }}"), "chat_template.jinja is not"),
    ("temperature", generation(temperature=9.0), "temperature is 9.0"),
    ("byte order mark", written("generation_config.json", b"\xef\xbb\xbf{}"), "not valid JSON"),
    ("link", another_directory("generation_config.json"), "is not followed"),
    ("pipe", pipe, "generation_config.json"),
    ("wrong sums", written("SHA256SUMS", f"{'0' * 64}  config.json\n"), "SHA256SUMS describes"),
    ("sums elsewhere", written("SHA256SUMS", f"{'0' * 64}  ../x\n"), "SHA256SUMS"),
    ("another format", other_format, "loaders want 'pt'"),
)


@pytest.mark.parametrize(("attack", "words"), [row[1:] for row in FILES], ids=[r[0] for r in FILES])
def test_another_file_is_a_difference(dense: Path, moe: Path, attack: Attack, words: str) -> None:
    attack(moe)
    assert_caught(dense, moe, "directory", words)


def test_exchanged_chat_templates(dense: Path, tmp_path: Path) -> None:
    source, names = clone(dense, tmp_path / "dense"), ("one.jinja", "two.jinja")
    folder = "additional_chat_templates"
    (source / folder).mkdir()
    for name in names:
        (source / folder / name).write_text(name)
    convert(source, tmp_path / "moe", RECIPE)
    assert verify(source, tmp_path / "moe", checks=["directory"]).accepted
    for name, other in zip(names, reversed(names), strict=True):
        (tmp_path / "moe" / folder / name).write_text(other)
    assert_caught(source, tmp_path / "moe", "directory", "one.jinja is not", "two.jinja is not")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_half_of_what_transformers_saves_is_a_difference(
    dense: Path, tmp_path: Path, name: str
) -> None:
    """transformers 5 moves what these files say to those that it saves."""
    from transformers import AutoTokenizer

    source, moe = clone(dense, tmp_path / "dense"), tmp_path / "moe"
    said = {"added_tokens.json": {"<new>": 258}, "special_tokens_map.json": {"eos_token": "</s>"}}
    edit_json(source / "tokenizer_config.json", lambda value: value.pop("eos_token"))
    (source / name).write_text(json.dumps(said[name]))
    convert(source, moe, RECIPE)
    (moe / name).unlink()
    assert_caught(source, moe, "directory", f"{name} is missing")
    AutoTokenizer.from_pretrained(source).save_pretrained(moe)
    edit_json(moe / "tokenizer_config.json", lambda value: value.update(local_files_only=False))
    assert verify(source, moe, checks=["directory"]).accepted


def test_a_tokenizer_has_the_class_that_the_moe_gives_it(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    """transformers loads any tokenizer of a qwen2 as its own class, and those of its MoE not."""
    from transformers import AutoTokenizer

    dense, moe = clone(make_dense("qwen2"), tmp_path / "dense"), tmp_path / "moe"
    save_tokenizer(dense)
    convert(dense, moe, RECIPE)
    AutoTokenizer.from_pretrained(moe).save_pretrained(moe)
    edit_json(moe / "tokenizer_config.json", lambda value: value.update(local_files_only=False))
    report = verify(dense, moe, checks=["directory"])
    assert report.accepted, text_of(report)


def test_weights_behind_a_link_are_not_read(dense: Path, moe: Path) -> None:
    another_directory("model.safetensors")(moe)
    assert_caught(dense, moe, "weights", "is not followed")
    another_directory("config.json")(moe)
    with pytest.raises(UpcycleError, match="is not followed"):
        verify(dense, moe)


# Shipped code -------------------------------------------------------------------------------------

CODE = "modeling_upcycled.py"


def more_code(text: str) -> Attack:
    return lambda moe: (moe / CODE).write_text((moe / CODE).read_text() + text)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (more_code("\nopen(__file__ + '.ran', 'w')\n"), "is not what convert writes"),
        (more_code(" "), "is not what convert writes"),
        (lambda moe: (moe / CODE).unlink(), f"{CODE} is missing"),
        (json_file("config.json", lambda c: c["auto_map"].update(AutoModel="o.M")), "auto_map"),
        (json_file("config.json", lambda config: config.pop("auto_map")), "auto_map"),
        (written("configuration_mine.py", ""), "configuration_mine.py"),
    ],
    ids=["more code", "a space", "gone", "another class", "no class", "another file"],
)
def test_code_that_is_not_ours_never_runs(
    make_dense: MakeDense, tmp_path: Path, attack: Attack, words: str
) -> None:
    dense, moe = make_dense("nemotron"), tmp_path / "moe"
    convert(dense, moe, RECIPE)
    attack(moe)
    report = verify(dense, moe)
    assert report.status is Status.FAILED
    assert words in text_of(report)
    assert not (moe / f"{CODE}.ran").exists()


GUARDED = """
import sys
from upcycle_cli import verify

def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print("ONLINE", event, arguments, flush=True)

sys.addaudithook(guard)
for moe in sys.argv[2:]:
    print(verify(sys.argv[1], moe).status)
"""
NAMED: tuple[dict[str, Any], ...] = (
    {
        "name_or_path": "org/other",
        "attn_implementation": "org/kernel",
        "experts_implementation": "org/kernel",
    },
    {"auto_map": {"AutoConfig": "org/code--x.X", "AutoModelForCausalLM": "org/code--x.X"}},
    {"quantization_config": {"quant_method": "gptq", "tokenizer": "org/other"}},
)


def test_nothing_that_a_checkpoint_names_is_asked_for(
    dense: Path, mixtral: Path, tmp_path: Path
) -> None:
    moes = []
    for number, changes in enumerate(NAMED):
        for recorded in (True, False):
            moe = clone(mixtral, tmp_path / f"{number}-{recorded}", **changes)
            if not recorded:
                (moe / "upcycle.json").unlink()
            moes.append(str(moe))
    online = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = forked.run([dense, *moes], program=GUARDED, environment=online)
    assert found.returncode == 0, found.stderr
    assert "ONLINE" not in found.stdout
    assert "passed" not in found.stdout


# Routers and experts ------------------------------------------------------------------------------


def rows(edit: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    def change(held: Tensors) -> None:
        made = edit(held[ROUTER][::2].float())
        held[ROUTER] = made.bfloat16().repeat_interleave(2, 0)

    return lambda moe: edit_tensors(moe, change)


def one_word(row: torch.Tensor) -> torch.Tensor:
    """Rows that see one direction only, as if they were fitted to a single word."""
    direction = torch.ones(row.shape[1])
    return torch.stack([direction * (1 + group) for group in range(len(row))])


@pytest.mark.parametrize("init", ["normal", "balanced", "centroids"])
@pytest.mark.parametrize(
    "edit",
    [
        one_word,
        lambda rows: 100 * rows[:1] + rows,
        lambda rows: rows * 3e37,
        lambda rows: rows * 1.2,
        lambda rows: rows.flip(0),
    ],
    ids=["one word", "nearly equal", "too large", "larger", "exchanged"],
)
def test_rows_that_no_seed_and_no_text_gives(
    dense: Path, tmp_path: Path, init: str, edit: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2, router_init=init)  # type: ignore[arg-type]
    convert(dense, tmp_path / "moe", recipe)
    assert verify(dense, tmp_path / "moe", checks=["weights"]).accepted
    rows(edit)(tmp_path / "moe")
    assert_caught(dense, tmp_path / "moe", "weights", ROUTER)


def test_an_order_that_is_no_permutation(dense: Path, tmp_path: Path) -> None:
    """Neurons that one expert has twice, in an order that only the MoE knows."""
    orders = {f"layers.{layer}.neuron_order": torch.arange(64).flip(0) for layer in range(2)}
    save_file(orders, tmp_path / "orders.safetensors")
    recipe = Recipe(expansion=2, granularity=2, top_k=2, neuron_order="file")  # type: ignore[arg-type]
    moe = tmp_path / "moe"
    convert(dense, moe, recipe, neuron_orders=tmp_path / "orders.safetensors")
    assert verify(dense, moe).passed

    def twice(held: Tensors) -> None:
        for matrix, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
            tensor = held[MIXTRAL_EXPERT.format(1, 2, matrix)]
            tensor.select(dim, 7).copy_(tensor.select(dim, 3))

    def one_bit(held: Tensors) -> None:
        held[MIXTRAL_EXPERT.format(1, 2, "w3")].view(torch.int16)[0, 0] ^= 1

    damaged = Path(shutil.copytree(moe, tmp_path / "damaged"))
    edit_tensors(damaged, one_bit)
    assert_caught(dense, damaged, "weights", "2.w3.weight differs in 1 of", "1 problem")
    edit_tensors(moe, twice)
    assert_caught(dense, moe, "weights", "layers.1.neuron_order", "no permutation")


# Who sets the standard ----------------------------------------------------------------------------


def record(edit: Callable[[dict[str, Any]], object]) -> Attack:
    return json_file("upcycle.json", edit)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "{}", "[" * 100_000, '{"format": 1}', '{"format": 2, "recipe": {}}'],
    ids=lambda text: text[:9],
)
def test_without_a_record_that_can_be_read_nothing_passes(
    dense: Path, moe: Path, text: str
) -> None:
    (moe / "upcycle.json").write_text(text)
    report = verify(dense, moe)
    assert [check.status for check in report.checks] == ["skipped", "skipped", "measured"]
    assert report.status is Status.MEASURED
    assert "upcycle.json" in report.checks[2].detail


RECORDS: tuple[tuple[str, Attack, str], ...] = (
    ("no recipe", record(lambda r: r.update(recipe=None)), "has no recipe"),
    ("a list for E", record(lambda r: r["recipe"].update(expansion=[2])), "cannot be used"),
    ("G of 0", record(lambda r: r["recipe"].update(granularity=0)), "at least 1"),
    ("a huge T", record(lambda r: r["recipe"].update(top_k=10**400)), "top-k"),
    ("unknown scaling", record(lambda r: r["recipe"].update(scaling="best")), "scaling"),
    ("unknown key", record(lambda r: r["recipe"].update(trick=1)), "trick is unknown to this"),
    ("layers of no text", record(lambda r: r["recipe"].update(layers=7)), "layers is 7"),
    ("half an expert", record(lambda r: r["recipe"].update(top_k=2.0)), "top_k is 2.0"),
    ("no promise", record(lambda r: r.pop("promise")), "upcycle.json has no promise"),
    ("no source", record(lambda r: r.pop("source")), "upcycle.json has no source"),
    ("no target", record(lambda r: r.update(target=7)), "target is 7"),
)


@pytest.mark.parametrize(("attack", "words"), [r[1:] for r in RECORDS], ids=[r[0] for r in RECORDS])
def test_a_record_that_makes_no_sense_proves_nothing(
    dense: Path, moe: Path, attack: Attack, words: str
) -> None:
    attack(moe)
    report = verify(dense, moe, checks=["directory", "weights"])
    assert report.status is Status.SKIPPED
    assert words in text_of(report)
    assert not report.accepted


def test_another_top_k_with_its_record_is_measured(dense: Path, moe: Path) -> None:
    def ask(value: dict[str, Any]) -> None:
        value["recipe"] |= {"top_k": 1, "name": "E2G2T1", "allow_inexact": True}
        value["promise"] = "none"
        value["parameters"]["active"] -= 2 * 3 * 32 * 32

    record(ask)(moe)
    edit_json(moe / "config.json", lambda config: config.update(num_experts_per_tok=1))
    report = verify(dense, moe)
    assert [check.status for check in report.checks] == ["passed", "passed", "measured"]
    assert not report.accepted
    assert "top-k 1 is not a multiple" in text_of(report)
    assert verify(dense, moe, allow_inexact=True).accepted


def test_another_dense_model(mixtral: Path, make_dense: MakeDense, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES | {"rms_norm_eps": 1e-3}
    other = save_dense(LlamaConfig(**sizes), LlamaForCausalLM, tmp_path / "other", seed=1)
    report = verify(other, mixtral)
    assert [check.status for check in report.checks] == ["failed"] * 3
    assert "rms_norm_eps is 1e-06 instead of 0.001" in text_of(report)
    report = verify(make_dense("qwen3"), mixtral, checks=["directory", "weights"])
    assert [check.status for check in report.checks] == ["failed"] * 2
    assert "describes no conversion of" in text_of(report)


def test_a_record_that_names_another_repo(dense: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(dense, snapshot)
    convert(snapshot, tmp_path / "moe", RECIPE)
    assert verify(snapshot, tmp_path / "moe", checks=["directory"]).accepted
    record(lambda r: r["source"].update(name="meta-llama/Llama-3.1-8B"))(tmp_path / "moe")
    assert_caught(snapshot, tmp_path / "moe", "directory", "source.name is 'meta-llama/")
