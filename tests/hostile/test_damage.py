"""Damage and deception: each row makes an MoE something else than the plan's, and must be named.

What only a run of both models shows is in verification/test_outputs.py and contracts/.
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
from conftest import MakeDense, clone, read_json, save_companions
from safetensors.torch import load_file, save_file
from shapes import write_orders
from verified import (
    EXPERT,
    MIXTRAL_EXPERT,
    ROUTER,
    Tensors,
    edit_json,
    edit_tensors,
    flip_bit,
    save_llama,
    text_of,
)
from wrapped import save_wrapper

from upcycle_cli import Recipe, UpcycleError, convert, verify
from upcycle_cli.verification.result import Status

Damage = Callable[[Path], object]
Row = tuple[str, Damage, str]
RECIPE = Recipe("E2G2T2")


def assert_caught(dense: Path, moe: Path, check: str, *words: str) -> None:
    report = verify(dense, moe, checks=[check])
    assert report.status is Status.FAILED, text_of(report)
    for word in words:
        assert word in text_of(report)


def tensors(edit: Callable[[Tensors], object]) -> Damage:
    return lambda moe: edit_tensors(moe, edit)


def put(name: str, value: Callable[[Tensors], torch.Tensor]) -> Damage:
    return tensors(lambda held: held.update({name: value(held)}))


def edited(name: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda moe: edit_json(moe / name, edit)


def changed(name: str, **changes: object) -> Damage:
    return edited(name, lambda value: value.update(changes))


def config(**changes: object) -> Damage:
    return changed("config.json", **changes)


def record(path: str, value: object) -> Damage:
    def edit(held: dict[str, Any]) -> None:
        *outer, key = path.split("/")
        for name in outer:
            held = held[name]
        held[key] = value

    return edited("upcycle.json", edit)


def written(name: str, data: str | bytes) -> Damage:
    def damage(moe: Path) -> None:
        (moe / name).parent.mkdir(exist_ok=True)
        (moe / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return damage


def removed(name: str) -> Damage:
    return lambda moe: (moe / name).unlink()


def linked(name: str) -> Damage:
    def damage(moe: Path) -> None:
        (moe / name).rename(moe.parent / "elsewhere")
        (moe / name).symlink_to(moe.parent / "elsewhere")

    return damage


# Weights ------------------------------------------------------------------------------------------


def w(layer: int, expert: int, matrix: int) -> str:
    """Return the name of an expert's matrix: 1 is the gate, 2 down, 3 up."""
    return MIXTRAL_EXPERT.format(layer, expert, f"w{matrix}")


QWEN_ROUTER = "model.layers.0.mlp.gate.weight"
QWEN_BIAS = "model.layers.1.self_attn.q_proj.bias"
SHARED_DOWN = "model.layers.0.mlp.shared_expert.down_proj.weight"
SHARED_GATE = "model.layers.1.mlp.shared_expert_gate.weight"


def filled(name: str, value: float) -> Damage:
    return tensors(lambda held: held[name].fill_(value))


def scaled(name: str, factor: float) -> Damage:
    return tensors(lambda held: held[name].mul_(factor))


def renamed(name: str, *names: str) -> Damage:
    return tensors(lambda held: held.update(dict.fromkeys(names, held.pop(name))))


def swapped(one: str, other: str) -> Damage:
    return tensors(lambda held: held.update({one: held[other], other: held[one]}))


def exchanged(name: str, dim: int, *places: int) -> Damage:
    def edit(held: Tensors) -> None:
        index = torch.tensor(places)
        held[name].index_copy_(dim, index, held[name].index_select(dim, index.flip(0)))

    return tensors(edit)


WEIGHTS: tuple[Row, ...] = (
    # name (and which MoE, if not the plain one), what is damaged, words of the report
    (
        "a bit of an expert",
        lambda moe: flip_bit(moe, w(1, 3, 2)),
        "expert 3 differs in 1 of | 3.w2.weight",
    ),
    ("a bit of a router", lambda moe: flip_bit(moe, ROUTER), f"{ROUTER} differs in 1 of"),
    ("qwen: a row", tensors(lambda t: t[QWEN_ROUTER][3].mul_(-1)), "32 of 256 elements, first at"),
    ("another router", put(ROUTER, lambda t: t[ROUTER].flip(1)), ROUTER),
    ("a router of nans", filled(ROUTER, torch.nan), "nan instead of"),
    ("a larger router", scaled(ROUTER, 8), f"{ROUTER} is its expected value × 8"),
    ("another shard", put(w(1, 2, 2), lambda t: t[w(1, 3, 2)]), "holds shard 1 where shard 0"),
    ("gate and up exchanged", swapped(w(0, 0, 1), w(0, 0, 3)), "0.w1.weight | 0.w3.weight"),
    ("exchanged rows", exchanged(EXPERT, 0, 3, 11), "has rows 3 and 11 exchanged"),
    ("exchanged columns", exchanged(w(1, 3, 2), 1, 0, 20), "has columns 0 and 20 exchanged"),
    (
        "one expert by 1.05",
        scaled(EXPERT, 1.05),
        f"layer 1, expert 2 is its shard × 1.05 ({EXPERT}",
    ),
    ("qwen: a bias", filled(QWEN_BIAS, 1.0), "q_proj.bias differs in 32 of 32 | instead of 0"),
    ("qwen: an inert expert works", filled(SHARED_DOWN, 0.5), f"{SHARED_DOWN} | instead of 0"),
    ("qwen: a gate that divides by zero", filled(SHARED_GATE, 0.0), SHARED_GATE),
    ("a missing expert", renamed(EXPERT), f"{EXPERT} is missing"),
    (
        "a renamed tensor",
        renamed(EXPERT, "mine"),
        f"{EXPERT} is missing | mine should not be there",
    ),
    ("another shape", put(ROUTER, lambda t: t[ROUTER][:-1]), f"{ROUTER} has shape [3, 32] instead"),
    ("integers", put(EXPERT, lambda t: t[EXPERT].to(torch.int8)), f"{EXPERT} is I8 instead of"),
    ("dtype of the record", record("dtype", "float32"), "is BF16 instead of F32"),
)

# Settings and files -------------------------------------------------------------------------------

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
READ = (
    *("adapter_config.json", "modeling_mine.py", "custom_generate/generate.py", "LICENSE.py"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.gguf"),
    *("NOTICE.safetensors", "Config.json", "vocab.txt", "special_tokens_map.json"),
    "additional_chat_templates/tools.jinja",
)
INDEX, TOKENS, GENERATION = (
    "model.safetensors.index.json",
    "tokenizer.json",
    "generation_config.json",
)


def swapped_ids(value: dict[str, Any]) -> None:
    vocab = value["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def setting(**changes: object) -> Damage:
    return changed("tokenizer_config.json", **changes)


def float16(value: dict[str, Any]) -> None:
    value["metadata"]["dtype"] = "float16"


def another_file_of_the_index(value: dict[str, Any]) -> None:
    files = value["weight_map"]
    files[EXPERT] = next(file for file in files.values() if file != files[EXPERT])


def pipe(moe: Path) -> None:
    (moe / GENERATION).unlink()
    os.mkfifo(moe / GENERATION)


def tokenizer_gone(moe: Path) -> None:
    removed(TOKENS)(moe)
    written("SHA256SUMS", f"{'0' * 64}  {TOKENS}\n")(moe)


def other_format(moe: Path) -> None:
    path = moe / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "mlx"})


def no_tensors(moe: Path) -> None:
    save_file({}, moe / "model.safetensors", metadata={"format": "pt"})
    config(use_cache=3)(moe)


FILES: tuple[Row, ...] = (
    *((min(each), config(**each), f"config.json: {min(each)}") for each in SETTINGS),
    *((name, written(name, "{}"), name) for name in READ),
    ("top-k", config(num_experts_per_tok=1), "num_experts_per_tok is 1 instead of 2"),
    ("experts", config(num_local_experts=6), "num_local_experts is 6 instead of 4"),
    ("qwen: routing", config(norm_topk_prob=True), "norm_topk_prob is True instead of False"),
    ("sharded: total size", changed(INDEX, metadata={"total_size": 5}), "total_size is 5 instead"),
    ("sharded: dtype", edited(INDEX, float16), "dtype is 'float16', but should not be there"),
    ("sharded: file", edited(INDEX, another_file_of_the_index), f"{EXPERT} | cannot be read"),
    (
        "cut off",
        lambda moe: os.truncate(moe / "model.safetensors", 5000),
        "truncated | cannot be read",
    ),
    ("ids swapped", edited(TOKENS, swapped_ids), "model.vocab.a is"),
    ("normalizer", changed(TOKENS, normalizer={"type": "Lowercase"}), f"{TOKENS}: normalizer"),
    ("no tokenizer", written(TOKENS, "{}"), f"{TOKENS}: version is missing"),
    ("no config", written("config.json", "{"), "config.json is not valid JSON | cannot be read"),
    ("tokenizer gone", tokenizer_gone, f"{TOKENS} is missing | 1 problem found"),
    ("longest text", setting(model_max_length=7), "model_max_length is 7"),
    ("end of text", setting(eos_token="a"), "eos_token is 'a' instead of '</s>'"),
    ("names of inputs", setting(model_input_names=["input_ids"]), "model_input_names"),
    ("special names", setting(extra_special_tokens={"image_token": "a"}), "extra_special_tokens"),
    ("code", setting(auto_map={"AutoTokenizer": ["x.X", None]}), "auto_map"),
    ("template beside", setting(chat_template="{{ messages }}"), "chat_template"),
    ("template", written("chat_template.jinja", "{{ x }}"), "chat_template.jinja is not"),
    ("temperature", changed(GENERATION, temperature=9.0), "temperature is 9.0"),
    ("byte order mark", written(GENERATION, b"\xef\xbb\xbf{}"), "not valid JSON"),
    ("link", linked("chat_template.jinja"), "is not followed"),
    ("pipe", pipe, GENERATION),
    ("wrong sums", written("SHA256SUMS", f"{'0' * 64}  config.json\n"), "SHA256SUMS describes"),
    ("sums elsewhere", written("SHA256SUMS", f"{'0' * 64}  ../x\n"), "SHA256SUMS"),
    ("another format", other_format, "loaders want 'pt'"),
    ("no tensors", no_tensors, "config.json: use_cache is 3"),
    ("E of the record", record("recipe/expansion", 4), "num_local_experts is 4 instead of 8"),
    ("G of the record", record("recipe/granularity", 1), "intermediate_size is 32 instead of 64"),
    ("T of the record", record("recipe/top_k", 4), "num_experts_per_tok is 2 instead of 4"),
    ("routing of the record", record("recipe/routing", "softmax-topk"), "describes no conversion"),
    ("target", record("target", "qwen2_moe"), "model_type is 'mixtral' instead of 'qwen2_moe'"),
    ("target type", record("target_type", "qwen2_moe"), "target_type is 'qwen2_moe' instead of"),
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
    moe: Path = request.getfixturevalue(name.partition(": ")[0] if name.count(": ") else "moe")
    damage(moe)
    assert_caught(dense, moe, check, *words.split(" | "))


def test_files_that_nothing_reads_are_accepted(dense: Path, moe: Path) -> None:
    for name in ("notes.txt", "plots/loss.png", ".gitattributes", "NOTICE", "README.md"):
        written(name, "mine")(moe)
    report = verify(dense, moe, checks=["directory"])
    assert report.accepted, text_of(report)


def test_links_to_what_is_parsed_are_followed(dense: Path, moe: Path) -> None:
    for name in ("config.json", "upcycle.json", "model.safetensors", TOKENS):
        (moe.parent / "store").mkdir(exist_ok=True)
        (moe / name).rename(moe.parent / "store" / name)
        (moe / name).symlink_to(moe.parent / "store" / name)
    report = verify(dense, moe, checks=["directory", "weights"])
    assert report.accepted, text_of(report)


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
    dense = save_wrapper(tmp_path / "dense", "llava", "llama", {})
    moe = tmp_path / "moe"
    convert(dense, moe, RECIPE)
    assert verify(dense, moe, checks=["directory", "weights"]).accepted
    for key in ("vision_feature_layer", "image_token_index", "mine"):
        changed = clone(moe, tmp_path / key, **{key: 1})
        assert_caught(dense, changed, "directory", f"config.json: {key} is 1")
    removed("preprocessor_config.json")(moe)  # which no tokenizer saves
    assert_caught(dense, moe, "directory", "preprocessor_config.json is missing")


def test_exchanged_chat_templates(dense: Path, tmp_path: Path) -> None:
    source, names = clone(dense, tmp_path / "dense"), ("one.jinja", "two.jinja")
    folder = "additional_chat_templates"
    for name in names:
        written(f"{folder}/{name}", name)(source)
    convert(source, tmp_path / "moe", RECIPE)
    assert verify(source, tmp_path / "moe", checks=["directory"]).accepted
    for name, other in zip(names, reversed(names), strict=True):
        written(f"{folder}/{name}", other)(tmp_path / "moe")
    assert_caught(source, tmp_path / "moe", "directory", "one.jinja is not", "two.jinja is not")


def saved_tokenizer(source: Path, moe: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(moe)
    setting(local_files_only=False)(moe)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_half_of_what_transformers_saves_is_a_difference(
    dense: Path, tmp_path: Path, name: str
) -> None:
    """transformers 5 moves the settings of these files to the files that it saves."""
    source, moe = clone(dense, tmp_path / "dense"), tmp_path / "moe"
    said = {"added_tokens.json": {"<new>": 258}, "special_tokens_map.json": {"eos_token": "</s>"}}
    edit_json(source / "tokenizer_config.json", lambda value: value.pop("eos_token"))
    written(name, json.dumps(said[name]))(source)
    convert(source, moe, RECIPE)
    removed(name)(moe)
    assert_caught(source, moe, "directory", f"{name} is missing")
    saved_tokenizer(source, moe)
    assert verify(source, moe, checks=["directory"]).accepted


def test_a_tokenizer_has_the_class_that_the_moe_gives_it(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    """transformers loads any tokenizer of a qwen2 as its own class, and those of its MoE not."""
    dense, moe = clone(make_dense("qwen2"), tmp_path / "dense"), tmp_path / "moe"
    save_companions(dense)
    convert(dense, moe, RECIPE)
    saved_tokenizer(moe, moe)
    report = verify(dense, moe, checks=["directory"])
    assert report.accepted, text_of(report)


# Code, and what a checkpoint names ----------------------------------------------------------------

CODE = "modeling_upcycled.py"


def more_code(text: str) -> Damage:
    return lambda moe: (moe / CODE).write_text((moe / CODE).read_text() + text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (more_code("\nopen(__file__ + '.ran', 'w')\n"), "is not what convert writes"),
        (more_code(" "), "is not what convert writes"),
        (removed(CODE), f"{CODE} is missing"),
        (edited("config.json", lambda c: c["auto_map"].update(AutoModel="o.M")), "auto_map"),
        (edited("config.json", lambda config: config.pop("auto_map")), "auto_map"),
        (written("configuration_mine.py", ""), "configuration_mine.py"),
    ],
    ids=["more code", "a space", "gone", "another class", "no class", "another file"],
)
def test_code_that_is_not_ours_never_runs(
    make_dense: MakeDense, tmp_path: Path, damage: Damage, words: str
) -> None:
    dense, moe = make_dense("nemotron"), tmp_path / "moe"
    convert(dense, moe, RECIPE)
    damage(moe)
    report = verify(dense, moe)
    assert report.status is Status.FAILED
    assert words in text_of(report)
    assert not (moe / f"{CODE}.ran").exists()


def test_a_script_beside_the_model_does_not_keep_it_from_running(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, moe = make_dense("nemotron"), tmp_path / "moe"
    convert(dense, moe, RECIPE)
    (moe / "train.py").write_text("raise SystemExit")
    report = verify(dense, moe, checks=["outputs"])
    (outputs,) = report.checks
    assert outputs.status is Status.PASSED, text_of(report)


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
    {"name_or_path": "org/other", "attn_implementation": "org/kernel"},
    {"experts_implementation": "org/kernel"},
    {"auto_map": {"AutoConfig": "org/code--x.X", "AutoModelForCausalLM": "org/code--x.X"}},
    {"quantization_config": {"quant_method": "gptq", "tokenizer": "org/other"}},
)


def test_nothing_that_a_checkpoint_names_is_asked_for(
    dense: Path, mixtral: Path, tmp_path: Path
) -> None:
    moes = list[Path]()
    for number, changes in enumerate(NAMED):
        moes += [clone(mixtral, tmp_path / f"{number}{each}", **changes) for each in "ab"]
        removed("upcycle.json")(moes[-1])
    online = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = forked.run([dense, *moes], program=GUARDED, environment=online)
    assert found.returncode == 0, found.stderr
    assert "ONLINE" not in found.stdout
    assert "passed" not in found.stdout


# Values that only the MoE has ---------------------------------------------------------------------


def one_word(rows: torch.Tensor) -> torch.Tensor:
    """Rows that see one direction only, as if they were fitted to a single word."""
    direction = torch.ones(rows.shape[1])
    return torch.stack([direction * (1 + group) for group in range(len(rows))])


@pytest.mark.parametrize("init", ["normal", "balanced", "centroids"])
def test_rows_that_no_seed_and_no_text_gives(dense: Path, tmp_path: Path, init: str) -> None:
    recipe = Recipe("E2G2T2", router_init=init)
    convert(dense, tmp_path / "moe", recipe)
    assert verify(dense, tmp_path / "moe", checks=["weights"]).accepted
    given = load_file(tmp_path / "moe" / "model.safetensors")[ROUTER][::2].float()
    for rows in (
        one_word(given),
        100 * given[:1] + given,
        given * 3e37,
        given * 1.2,
        given * 1.03,
        given.flip(0),
    ):
        put(ROUTER, lambda _, rows=rows: rows.bfloat16().repeat_interleave(2, 0))(tmp_path / "moe")  # type: ignore[misc]
        assert_caught(dense, tmp_path / "moe", "weights", ROUTER)
    if init != "normal":
        record("calibration", None)(tmp_path / "moe")
        assert_caught(dense, tmp_path / "moe", "directory", "needs a calibration")


def test_an_order_that_is_no_permutation(dense: Path, tmp_path: Path) -> None:
    """Neurons that one expert has twice, in an order that only the MoE knows."""
    orders = write_orders(tmp_path / "orders.safetensors", alike=0, shape=(2, 2, 64))
    recipe = Recipe("E2G2T2", neuron_order="file")
    moe = tmp_path / "moe"
    convert(dense, moe, recipe, neuron_orders=orders)
    assert verify(dense, moe).passed

    def twice(held: Tensors) -> None:
        for matrix, dim in ((1, 0), (3, 0), (2, 1)):
            held[w(1, 2, matrix)].select(dim, 7).copy_(held[w(1, 2, matrix)].select(dim, 3))

    damaged = Path(shutil.copytree(moe, tmp_path / "damaged"))
    tensors(lambda held: held[w(1, 2, 3)].view(torch.int16)[0, 0].bitwise_xor_(1))(damaged)
    assert_caught(dense, damaged, "weights", "expert 2 differs in 1 of", "1 problem")
    tensors(twice)(moe)
    assert_caught(dense, moe, "weights", "layers.1.neuron_order.1", "not a permutation")


# Who sets the standard ----------------------------------------------------------------------------

RECORDS: tuple[tuple[Damage, str], ...] = (
    *(
        (written("upcycle.json", text), "upcycle.json")
        for text in ("", "[]", "{}", "[" * 100_000, '{"format": 1}', '{"format": 2, "recipe": {}}')
    ),
    (record("recipe", None), "has no recipe"),
    (record("recipe/expansion", [2]), "cannot be used"),
    (record("recipe/granularity", 0), "at least 1"),
    (record("recipe/top_k", 10**400), "top-k"),
    (record("recipe/top_k", 2.0), "`top_k` cannot be 2.0"),
    (record("recipe/scaling", "best"), "scaling"),
    (record("recipe/trick", 1), "does not know trick"),
    (record("recipe/layers", 7), "`layers` cannot be 7"),
    (edited("upcycle.json", lambda value: value.pop("promise")), "upcycle.json has no promise"),
    (edited("upcycle.json", lambda value: value.pop("source")), "upcycle.json has no source"),
    (record("target", 7), "target is 7"),
    (record("source", 7), "has no source"),
    (record("files", {}), "has no files"),
    (edited("upcycle.json", lambda value: value.pop("calibration")), "has no calibration"),
)


@pytest.mark.parametrize(("damage", "words"), RECORDS, ids=[str(i) for i in range(len(RECORDS))])
def test_a_record_that_makes_no_sense_proves_nothing(
    dense: Path, moe: Path, damage: Damage, words: str
) -> None:
    damage(moe)
    report = verify(dense, moe, checks=["directory", "weights"])
    assert report.status is Status.SKIPPED
    assert words in text_of(report)
    assert not report.accepted


def test_without_a_record_outputs_are_measured(dense: Path, moe: Path) -> None:
    removed("upcycle.json")(moe)
    report = verify(dense, moe)
    assert [check.status for check in report.checks] == ["skipped", "skipped", "measured"]
    assert report.status is Status.MEASURED
    assert "upcycle.json" in report.checks[0].detail


def test_another_dense_model(mixtral: Path, make_dense: MakeDense, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1, rms_norm_eps=1e-3)
    report = verify(other, mixtral)
    assert [check.status for check in report.checks] == ["failed"] * 3
    assert "rms_norm_eps is 1e-06 instead of 0.001" in text_of(report)
    with pytest.raises(UpcycleError, match="was made from"):
        verify(make_dense("qwen3"), mixtral)


def test_a_record_that_names_another_repo(dense: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(dense, snapshot)
    convert(snapshot, tmp_path / "moe", RECIPE)
    assert verify(snapshot, tmp_path / "moe", checks=["directory"]).accepted
    record("source/name", "meta-llama/Llama-3.1-8B")(tmp_path / "moe")
    assert_caught(snapshot, tmp_path / "moe", "directory", "source.name is 'meta-llama/")


@pytest.mark.parametrize("init", ["normal", "balanced"])
@pytest.mark.parametrize("order", ["sliced", "clustered"])
def test_trained_weights_are_one_sentence(
    dense: Path, tmp_path: Path, init: str, order: str
) -> None:
    """Biases and shared experts were zeros before, and rows of a router the same.

    Training also changes fitted rows and orders that only the weights tell.
    """
    from transformers import AutoModelForCausalLM

    qwen, trained = tmp_path / "qwen", tmp_path / "trained"
    made: dict[str, Any] = {"router_init": init, "neuron_order": order}
    recipe = Recipe("E4G2T2", **made)
    convert(dense, qwen, recipe, target="qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(qwen, dtype="auto")
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
    assert "these weights were trained, or made from another model or adapter: " in words
    assert "tensors changed, by " in words
