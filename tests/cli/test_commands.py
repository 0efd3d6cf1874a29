"""What the commands print, as text and as JSON, and which plan their options lead to."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    TINY,
    VOCAB_SIZE,
    MakeDense,
    RunCli,
    clone,
    read_json,
    read_tensors,
    spoil,
    validate_json,
)
from typer.testing import CliRunner, Result

from upcycle_cli.cli import options
from upcycle_cli.cli.app import app
from upcycle_cli.recipe.recipe import (
    SHIPPED,
    ExpertLayout,
    NeuronOrder,
    RouterInit,
    Routing,
    ScaleSplit,
    Scaling,
)

RECIPE = ("--recipe", "E2G2T2")
BY_TEXT = ("--router-init", "balanced", "--calibration", __file__)
EMBEDDING_BYTES = 4 * VOCAB_SIZE * int(TINY["hidden_size"])
TABLE = tomllib.loads(Path(options.__file__).with_name("options.toml").read_text("utf-8"))
COMMANDS = ("convert", "inspect", "verify", "push", "families", "clean", "demo")


def invoke(*arguments: str | Path, **environment: str) -> Result:
    variables = {"COLUMNS": "80", "NO_COLOR": "1"} | environment
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=variables)


def succeed(*arguments: str | Path, **environment: str) -> Result:
    result = invoke(*arguments, **environment)
    assert result.exit_code == 0, result.output
    return result


def succeed_json(command: str, *arguments: str | Path) -> dict[str, Any]:
    result = succeed(command, *arguments, "--json")
    assert result.stderr == ""
    return validate_json(command, result.stdout)


@pytest.fixture(scope="module")
def damaged(e2g2t2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = clone(e2g2t2, tmp_path_factory.mktemp("damaged") / "moe")
    spoil(path / "model.safetensors")
    return path


# Help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_two_levels_fits_any_screen(command: str) -> None:
    shown = {}
    for width, flag in itertools.product((60, 80, 120), ("--help", "--help-all")):
        text = shown[width, flag] = succeed(command, flag, COLUMNS=str(width)).stdout
        assert text.startswith(f"Usage: upcycle {command} [OPTIONS]")
        assert [line for line in text.splitlines() if len(line) > width or line[-1:] == " "] == []
        assert sorted(text.split()) == sorted(shown[60, flag].split())  # no word is broken
        assert not re.search("[<…]", text)
        panels = re.split(r"\n(?=\S.*:\n)", text)[1:]
        assert min(len(re.findall(r"^  -", p, re.MULTILINE)) for p in panels if "\n  -" in p) > 1
    short, every = shown[80, "--help"], shown[80, "--help-all"]
    assert len(short.splitlines()) <= 75
    assert short == succeed(command, "-h").stdout == succeed(command, "-help").stdout
    assert (short == every) == ("more option" not in short)
    whole, narrow = (re.findall("  upcycle .*", shown[width, "--help"]) for width in (120, 60))
    assert whole == narrow
    assert {*re.findall(r"--[a-z-]+", short)} <= {*re.findall(r"--[a-z-]+", every)}


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("routing", ["auto", *Routing]),
        ("dtype", ["auto", "bfloat16", "float16", "float32"]),
        ("scaling", [*Scaling]),
        ("scale_split", [*ScaleSplit]),
        ("expert_layout", [*ExpertLayout]),
        ("neuron_order", {*NeuronOrder} - {NeuronOrder.FILE}),
        ("router_init", {*RouterInit} - {RouterInit.FILE, RouterInit.PROMPTS}),
        ("target", [SHIPPED]),
    ],
)
def test_the_help_of_an_option_names_its_choices(option: str, choices: Iterable[str]) -> None:
    words = re.findall(r"[\w-]+", TABLE["moe"][option]["help"])
    assert {*choices} <= {*words}
    assert sorted(TABLE["moe"][option].get("choices", choices)) == sorted(choices)


@pytest.mark.parametrize(("words", "found"), [("--rei", "--reinit"), ("--rest ", "first mean")])
def test_complete_options_and_values_in_a_shell(run_cli: RunCli, words: str, found: str) -> None:
    line, place = f"upcycle convert {words}", str(2 + words.count(" "))
    variables = {"COMP_WORDS": line, "COMP_CWORD": place, "_UPCYCLE_COMPLETE": "complete_bash"}
    assert run_cli(**variables).stdout.split() == found.split()


# JSON ---------------------------------------------------------------------------------------------


def check_facts(value: dict[str, Any], path: Path, dense: Path) -> None:
    """Compare the numbers with the files on disk."""
    tensors = read_tensors(path)
    expert = [tensor for name, tensor in tensors.items() if ".experts." in name]
    total = sum(tensor.numel() for tensor in tensors.values())
    idle = sum(tensor.numel() for tensor in expert) // 2  # 2 of 4 experts
    expected = {
        "model_type": "mixtral",
        "recipe": "E2G2T2",
        "num_experts": 4,
        "top_k": 2,
        "total_parameters": total,
        "active_parameters": total - idle,
        "dense_parameters": sum(t.numel() for t in read_tensors(dense).values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "shards": len(list(path.glob("*.safetensors"))),
    }
    assert {key: value[key] for key in expected} == expected


def test_convert_json_agrees_with_its_dry_run_and_with_the_files(
    llama: Path, tmp_path: Path
) -> None:
    command = (llama, tmp_path / "moe", *RECIPE, "--max-shard-size", "50kB")
    planned = succeed_json("convert", *command, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    done = succeed_json("convert", *command)
    assert (planned.pop("status"), done["status"]) == ("planned", "converted")
    assert {key: done[key] for key in planned} == planned
    assert done["verification"] is None
    assert done["shards"] > 2
    check_facts(done, tmp_path / "moe", llama)
    again = succeed_json("convert", *command)
    assert again["status"] == "already done"
    assert again["plan_sha256"] == done["plan_sha256"]


def test_inspect_a_dense_model_at_a_glance(llama: Path) -> None:
    done = succeed("inspect", llama)
    assert len(done.output.splitlines()) <= 15
    assert "can become  mixtral (default), qwen2_moe" in done.stdout
    assert "sigmoid" not in done.stdout
    assert "sigmoid" in succeed("inspect", llama, "--targets").stdout


def test_inspect_json(llama: Path, e2g2t2: Path, tmp_path: Path) -> None:
    dense = succeed_json("inspect", llama)
    assert (dense["kind"], dense["plan"]) == ("dense", None)
    assert dense["targets"][:3] == ["mixtral", "qwen2_moe", "glm4_moe"]
    assert dense["bytes"] == 4 * dense["total_parameters"]
    found = succeed_json("inspect", e2g2t2)
    assert (found["kind"], found["claims"]["recipe"]["name"]) == ("moe", "E2G2T2")
    check_facts(found, e2g2t2, llama)
    check_facts(succeed_json("inspect", llama, *RECIPE)["plan"], e2g2t2, llama)
    unknown = clone(e2g2t2, tmp_path / "moe")
    (unknown / "upcycle.json").unlink()
    value = succeed_json("inspect", unknown)
    assert (value["claims"], value["recipe"], value["dense_parameters"]) == (None, None, None)
    assert value["num_experts"] == 4


@pytest.mark.parametrize("recipe", [(), RECIPE])
def test_tensors_are_listed(llama: Path, e2g2t2: Path, recipe: tuple[str, ...]) -> None:
    value = succeed_json("inspect", llama, *recipe, "--tensors")
    listed = {tensor["name"]: tensor["shape"] for tensor in value["tensors"]}
    actual = read_tensors(e2g2t2 if recipe else llama)
    assert listed == {name: list(tensor.shape) for name, tensor in actual.items()}
    text = succeed("inspect", llama, *recipe, "--tensors").stdout
    for name in actual:
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
        assert "F32" in line


def test_families_name_every_target_and_answer_for_one_name() -> None:
    targets = succeed_json("families")["targets"]
    for option in ((), ("--targets",)):
        text = succeed("families", *option).stdout
        assert [name for name in targets if name not in text] == []
    for name, key, words in (
        ("qwen3", "dense", "can become qwen3_moe"),
        ("LLaVA", "wrappers", "qwen3 in llava"),
        ("mixtral", "targets", "vLLM"),
        ("bitnet", "refused", "normalises over all neurons"),
    ):
        assert words in succeed("families", name).stdout
        assert [*succeed_json("families", name)[key]] == [name.lower()]


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "DENSE"),
        ("inspect", "DENSE", "--recipe", "E8G2T3"),
        ("inspect", "DENSE", "--max-params", "1M"),
        ("inspect", "MOE", "--weights", "--dense", "DENSE"),
        ("convert", "DENSE", "OUTPUT", *RECIPE, "--verify"),
        ("verify", "DENSE", "DAMAGED", "--checks", "weights"),
    ],
    ids=" ".join,
)
def test_tables_fit_the_screen_and_are_plain_in_a_pipe(
    llama: Path,
    e2g2t2: Path,
    damaged: Path,
    tmp_path: Path,
    run_cli: RunCli,
    arguments: tuple[str, ...],
) -> None:
    paths = {"DENSE": llama, "MOE": e2g2t2, "DAMAGED": damaged, "OUTPUT": tmp_path / "moe"}
    done = run_cli(*(paths.get(argument, argument) for argument in arguments))
    assert done.returncode == ("DAMAGED" in arguments)
    assert done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Next: ")]
    assert [line for line in lines if len(line) > 80 or line[-1:] == " "] == []
    assert "Traceback" not in done.stderr


def test_data_goes_to_stdout_and_talk_to_stderr(llama: Path, tmp_path: Path) -> None:
    command = ("convert", llama, tmp_path / "a" / "moe", *RECIPE)
    planned = succeed(*command, "--dry-run")
    assert "Nothing was written" in planned.stderr
    assert "4 per layer, 2 active" in planned.stdout
    assert list(tmp_path.iterdir()) == []
    done = succeed(*command)
    (note,) = (line for line in done.stderr.splitlines() if line.startswith("note:"))
    assert note.endswith(".")  # whole lines in a log can be searched
    for words in ("note:", "Wrote"):  # T = G: the router gets no gradient
        assert words in done.stderr
        assert words not in done.stdout
    again = succeed(*command)
    assert again.stdout == ""
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--verify",)])
def test_quiet_prints_nothing(llama: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    for _ in range(2):  # the second time it is done already
        result = succeed("convert", llama, tmp_path / "moe", *RECIPE, "--quiet", *extra)
        assert result.output == ""


def test_quiet_verification_prints_failures_only(llama: Path, e2g2t2: Path, damaged: Path) -> None:
    checks = ("--checks", "weights", "--quiet")
    assert succeed("verify", llama, e2g2t2, *checks).output == ""
    failed = invoke("verify", llama, damaged, *checks)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "model.norm.weight" in failed.stderr


@pytest.mark.parametrize("form", ["", "--json", "--quiet"])
def test_a_failed_verification_exits_with_1_and_publishes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    real = os.pwrite

    def flip_a_bit(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) == EMBEDDING_BYTES:
            data = bytes([data[0] ^ 1, *data[1:]])
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", flip_a_bit)
    command = ("convert", llama, tmp_path / "moe", *RECIPE, "--verify")
    result = invoke(*command, *filter(None, [form]))
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert "nothing was published" in result.stderr
    if form == "--quiet":
        assert result.stdout == ""
        assert "failed" in result.stderr
    else:
        assert "model.embed_tokens.weight" in result.stdout
    if form == "--json":
        value = validate_json("convert", result.stdout)
        assert value["status"] == "verification failed"
        assert value["verification"]["status"] == "failed"


@pytest.mark.parametrize(
    ("extra", "step"),
    [
        ((), "upcycle verify {dense} {moe}"),
        (("--scaling", "2"), "upcycle verify {dense} {moe} --allow-inexact"),
        (BY_TEXT, f"upcycle verify {{dense}} {{moe}} {shlex.join(BY_TEXT[2:])}"),
        (("--verify",), "upcycle push {moe} my-org/it-s-moe"),
    ],
)
def test_the_next_command_is_suggested(
    llama: Path, tmp_path: Path, extra: tuple[str, ...], step: str
) -> None:
    output = tmp_path / "it's moe"
    result = succeed("convert", llama, output, "--recipe", "E1G1T1", *extra)
    places = {"dense": shlex.quote(str(llama)), "moe": shlex.quote(str(output))}
    assert f"Next: {step.format(**places)}\n" in result.stderr


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (("--routing", "softmax-topk"), "model_type", "qwen2_moe"),
        (("--target", "qwen2_moe"), "routing", "softmax-topk"),
        (("--target", "upcycled"), "model_type", "upcycled_llama"),
        (("--layers", "1-"), "model_type", "qwen2_moe"),  # mixtral has experts in every layer
        (("--scaling", "paper"), "promise", "none"),
        (("--scaling", "3.5"), "scaling", 3.5),
        (
            ("--scale-split", "down"),
            "factors",
            {"c": 2.0, "gate": 1, "up": 1, "down": 2.0, "down_bias": 1, "config": 1},
        ),
        (("--no-virtual-groups",), "promise", "none"),
        (("--router-logit-std", "0.5"), "router_logit_std", 0.5),
        (("--seed", "3"), "seed", 3),
        (("--noise", "0.25"), "noise", 0.25),
        (("--reinit", "0.5"), "reinit", 0.5),
        (("--neuron-order", "shuffled"), "neuron_order", "shuffled"),
        (("--expert-layout", "fused"), "expert_layout", "fused"),
        (("--max-shard-size", "82kB"), "shards", 3),
        (("--max-shard-size", "82KiB"), "shards", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_reach_the_plan_of_convert_and_inspect(
    llama: Path, tmp_path: Path, options: tuple[str, ...], key: str, value: object
) -> None:
    output = tmp_path / "moe"
    planned = succeed_json("convert", llama, output, *RECIPE, *options, "--dry-run")
    assert planned[key] == value
    shown = succeed_json("inspect", llama, "-E", "2", "-G", "2", "-T", "2", *options)["plan"]
    # The digest covers --allow-inexact, which inspect always sets.
    for name in shown.keys() - {"plan_sha256"}:
        assert shown[name] == planned[name], name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "DENSE", "--seed", "3"), "--seed cannot be used without --recipe"),
        (("inspect", "DENSE", "--dense", "DENSE"), "--dense needs --weights"),
        (("inspect", "DENSE", "--experts-from", "DENSE"), "--experts-from needs --dense"),
        (("inspect", "DENSE", "--report", "r.txt"), ".html"),
        (("families", "qwen33"), "Did you mean qwen3?"),
        (("convert", "DENSE", "OUT"), "no recipe is given"),
        (("convert", "DENSE", "OUT", "-E", "2"), "--granularity, --top-k missing"),
        (("convert", "DENSE", "OUT", *RECIPE, "-E", "2"), "one or the other"),
        (("convert", "DENSE", "OUT", *RECIPE, "--expand", "2"), "takes no --recipe"),
        (("convert", "DENSE", "OUT", *RECIPE, "--max-shard-size", "9" * 400), "is not a size"),
        (("convert", "DENSE", "OUT", *RECIPE, "--max-shard-size", "5GB×8"), "is not a size"),
        (("convert", "DENSE", "OUT", *RECIPE, "--max-shard-size", "2"), "write 2GB"),
        (("inspect", "DENSE", "--max-params", "5MB"), "write 50B or 700M"),
        (("convert", "DENSE", "OUT", *RECIPE, "--rest", "mean"), "--rest needs --experts-from"),
        (("convert", "DENSE", "OUT", *RECIPE, "--private"), "--private needs --push-to-hub"),
        (("convert", "", "OUT", *RECIPE), "it is empty"),
        (("convert", "DENSE", "OUT", *RECIPE, "--calibration", ""), "it is empty"),
        (("covert",), "Did you mean 'convert'?"),
        (("convert", "--receipe", "E2G2T2"), "Did you mean --recipe?"),
        (("convert", "--no-virtual-group"), "Did you mean --no-virtual-groups?"),
        (("convert", "--no-fsyn"), "Did you mean --no-fsync?"),
        (("convert", "--output"), "there is no option --output. "),
        (("inspect", "DENSE", "--gpu-memory", "1GB", "--shared-experts", "20"), "less than G"),
        (("inspect", "DENSE", *RECIPE, "--routing", "topk-softmx"), "Did you mean topk-softmax?"),
        (("inspect", "DENSE", *RECIPE, "--dtype", "bf16"), "Did you mean bfloat16?"),
        (("inspect", "DENSE", *RECIPE, "--target", "mixtrl"), "Did you mean mixtral?"),
        (("inspect", "DENSE", *RECIPE, "--router-init", "balancd"), "Did you mean balanced?"),
        (("inspect", "DENSE", *RECIPE, "--scaling", "exct"), "Did you mean exact?"),
        (("verify", "DENSE", "DENSE", "--checks", "weigths"), "Did you mean weights?"),
        (("inspect", "gpt2"), "ORG/NAME"),
        (("convert", "DENSE", "OUT", "-r", "E2G2T3"), "or pass --allow-inexact to convert"),
        (("convert", "DENSE", *RECIPE), "missing argument 'OUTPUT'"),
        (("verify", "DENSE", "DENSE", "--checks", "all"), "directory, weights, outputs"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit_are_refused_with_advice(
    llama: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"DENSE": str(llama), "OUT": str(tmp_path / "out")}
    result = invoke(*(places.get(word, word) for word in arguments), "--json")
    assert result.exit_code == json.loads(result.stdout)["exit_code"] == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_dtype_and_untying_reach_the_files(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("llama", tie_word_embeddings=True)
    options = ("--dtype", "bfloat16", "--untie-embeddings", "--checksums")
    succeed("convert", dense, tmp_path / "moe", *RECIPE, *options)
    tensors = read_tensors(tmp_path / "moe")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert "lm_head.weight" in tensors
    assert (tmp_path / "moe" / "SHA256SUMS").is_file()


# The whole job ------------------------------------------------------------------------------------


def test_demo_json(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcycle_cli.cli.commands.demo._make_dense", lambda at: clone(llama, at))
    assert succeed_json("demo", tmp_path)["directory"] == str(tmp_path)


@pytest.mark.long
def test_demo(tmp_path: Path, run_cli: RunCli) -> None:
    from transformers import AutoTokenizer

    done = run_cli("demo", tmp_path / "demo", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "$ upcycle convert" in done.stderr
    assert "passed" in done.stdout
    assert "note:" not in done.stderr
    config = read_json(tmp_path / "demo" / "moe" / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo" / "moe")
    assert (config["num_local_experts"], config["vocab_size"]) == (8, len(tokenizer))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "</s>", "<pad>"]
    assert tokenizer.decode(tokenizer("Two words")["input_ids"]) == "Two words"
