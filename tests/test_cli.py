"""The command line: what goes to stdout, what to stderr, and what it costs to ask."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    LAYOUTS,
    TINY,
    VOCAB_SIZE,
    MakeDense,
    RunCli,
    clone,
    read_json,
    read_tensors,
    snapshot,
)
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from upcycle_cli import Options, Recipe, convert
from upcycle_cli.cli.app import app
from upcycle_cli.recipe.recipe import ExpertLayout

RECIPE = ("--recipe", "E2G2T2")
EMBEDDING_BYTES = 4 * VOCAB_SIZE * int(TINY["hidden_size"])
WIDTH = 80


def invoke(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(
        app,
        [str(argument) for argument in arguments],
        env={"COLUMNS": str(WIDTH), "NO_COLOR": "1"} | environment,
    )


def succeed(*arguments: str | Path, **environment: str) -> Result:
    result = invoke(*arguments, **environment)
    assert result.exit_code == 0, result.output
    return result


def one_json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)  # fails on anything before or after it
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


# What it costs to ask -----------------------------------------------------------------------------

HEAVY = """
import atexit, sys
from upcycle_cli.__main__ import main
@atexit.register
def tell():
    heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
    print("IMPORTED", sorted(heavy), file=sys.stderr)
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        ((), 2),
        (("convert", "--help"), 0),
        (("verify", "--help"), 0),
        (("convert",), 2),
        (("no-such-command",), 2),
        (("convert", "DENSE", "OUTPUT"), 2),
        (("convert", "DENSE", "OUTPUT", "--recipe", "wrong"), 2),
        (("convert", "DENSE", "OUTPUT", "--recipe", "E2G5T5"), 2),
        (("convert", "DENSE", "OUTPUT", *RECIPE, "--dry-run"), 0),
        (("inspect", "DENSE"), 0),
        (("inspect", "DENSE", *RECIPE, "--json"), 0),
        (("inspect", "DENSE", *RECIPE, "--tensors"), 0),
        (("inspect", "MOE", "--json"), 0),
        (("inspect", "ABSENT"), 2),
        (("verify", "ABSENT", "MOE"), 2),
        (("verify", "DENSE", "MOE", "--checks", "all"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_torch_is_not_imported_for_what_does_not_need_it(
    llama: Path, moe: Path, tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    paths = {"DENSE": llama, "MOE": moe, "OUTPUT": tmp_path / "moe", "ABSENT": tmp_path / "no"}
    command = [str(paths.get(argument, argument)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "IMPORTED []" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conversion_imports_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, "convert", str(llama), str(tmp_path / "moe"), *RECIPE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "IMPORTED ['numpy']" in done.stderr


# Help ---------------------------------------------------------------------------------------------


def test_version() -> None:
    from importlib.metadata import version

    assert succeed("--version").stdout == f"upcycle {version('upcycle-cli')}\n"


@pytest.mark.parametrize("command", ["convert", "inspect", "verify", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    help_text = succeed(command, "--help").stdout
    assert "Usage:" in help_text
    assert all(len(line) <= WIDTH for line in help_text.splitlines())
    assert succeed(command, "-h").stdout == help_text
    assert command in succeed("--help").stdout


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", ["convert", "inspect", "verify"])
def test_help_breaks_no_choice(command: str, width: int) -> None:
    text = succeed(command, "--help", COLUMNS=str(width)).stdout
    assert all(len(line) <= width for line in text.splitlines())
    choices = {
        "convert": ["mixtral", "softmax-topk", "topk-softmax", "bfloat16", "per-expert", "paper"],
        "inspect": ["mixtral", "topk-softmax", "float32", "balanced", "none"],
        "verify": ["structure", "weights", "outputs", "claims"],
    }[command]
    assert [choice for choice in choices if choice not in text] == []
    assert width < 80 or "…" not in text


# JSON ---------------------------------------------------------------------------------------------

ALWAYS = {
    "model_type",
    "recipe",
    "num_experts",
    "top_k",
    "total_parameters",
    "active_parameters",
    "dense_parameters",
    "bytes",
    "shards",
}


def assert_facts(value: dict[str, Any], path: Path, dense: Path) -> None:
    """The numbers are those of the files on disk, counted anew."""
    tensors = read_tensors(path)
    expert = [tensor for name, tensor in tensors.items() if ".experts." in name]
    total = sum(tensor.numel() for tensor in tensors.values())
    idle = sum(tensor.numel() for tensor in expert) // 2  # 2 of 4 experts
    assert value["model_type"] == "mixtral"
    assert value["recipe"] == "E2G2T2"
    assert (value["num_experts"], value["top_k"]) == (4, 2)
    assert value["total_parameters"] == total
    assert value["active_parameters"] == total - idle
    assert value["dense_parameters"] == sum(t.numel() for t in read_tensors(dense).values())
    assert value["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert value["shards"] == len(list(path.glob("*.safetensors")))


def test_convert_json(llama: Path, tmp_path: Path) -> None:
    result = succeed("convert", llama, tmp_path / "moe", *RECIPE, "--json")
    value = one_json_object(result.stdout)
    assert result.stderr == ""
    assert value["status"] == "converted"
    assert value["verification"] is None
    assert value["output"] == str(tmp_path / "moe")
    assert_facts(value, tmp_path / "moe", llama)

    again = one_json_object(succeed("convert", llama, tmp_path / "moe", *RECIPE, "--json").stdout)
    assert again["status"] == "already done"
    assert again["plan_sha256"] == value["plan_sha256"]


def test_convert_json_in_several_shards(llama: Path, tmp_path: Path) -> None:
    small = ("--max-shard-size", "50kB")
    result = succeed("convert", llama, tmp_path / "moe", *RECIPE, *small, "--json")
    value = one_json_object(result.stdout)
    assert value["shards"] > 2
    assert_facts(value, tmp_path / "moe", llama)


def test_convert_json_with_a_verification(llama: Path, tmp_path: Path) -> None:
    result = succeed("convert", llama, tmp_path / "moe", *RECIPE, "--verify", "--json")
    value = one_json_object(result.stdout)
    assert result.stderr == ""
    assert value["verification"]["status"] == "passed"
    assert len(value["verification"]["checks"]) == 5


def test_dry_run_json_says_what_convert_says(llama: Path, tmp_path: Path) -> None:
    planned = one_json_object(
        succeed("convert", llama, tmp_path / "moe", *RECIPE, "--dry-run", "--json").stdout
    )
    assert list(tmp_path.iterdir()) == []
    assert planned.pop("status") == "planned"
    done = one_json_object(succeed("convert", llama, tmp_path / "moe", *RECIPE, "--json").stdout)
    assert planned.keys() >= ALWAYS
    assert {key: done[key] for key in planned} == planned


def test_inspect_json(llama: Path, moe: Path) -> None:
    dense = one_json_object(succeed("inspect", llama, "--json").stdout)
    assert dense.keys() >= ALWAYS
    assert dense["kind"] == "dense"
    assert dense["targets"] == ["mixtral", "qwen2_moe", "glm4_moe", "solar_open", "upcycled"]
    assert dense["plan"] is None
    assert dense["bytes"] == 4 * dense["total_parameters"]

    result = succeed("inspect", moe, "--json")
    found = one_json_object(result.stdout)
    assert result.stderr == ""
    assert found["kind"] == "moe"
    assert found["claims"]["recipe"]["name"] == "E2G2T2"
    assert_facts(found, moe, llama)


def test_inspect_says_what_a_model_can_become(make_dense: MakeDense) -> None:
    text = succeed("inspect", make_dense("llama", mlp_bias=True)).stdout
    assert "can become  upcycled\nbut not     mixtral cannot express this model: " in text
    tables = text.split("\n\n")[1:]
    assert "upcycled  topk-softmax" in tables[0]
    assert "upcycled  transformers" in tables[1]
    assert "mixtral" not in "".join(tables)


def test_inspect_json_with_a_recipe(llama: Path, moe: Path) -> None:
    result = succeed("inspect", llama, *RECIPE, "--json")
    assert result.stderr == ""
    plan = one_json_object(result.stdout)["plan"]
    assert plan.keys() >= ALWAYS
    assert_facts(plan, moe, llama)


@pytest.mark.parametrize("recipe", [(), RECIPE])
def test_inspect_json_with_tensors(llama: Path, moe: Path, recipe: tuple[str, ...]) -> None:
    value = one_json_object(succeed("inspect", llama, *recipe, "--tensors", "--json").stdout)
    listed = {tensor["name"]: tensor["shape"] for tensor in value["tensors"]}
    actual = read_tensors(moe if recipe else llama)
    assert listed == {name: list(tensor.shape) for name, tensor in actual.items()}
    assert all(tensor["file"] == "model.safetensors" for tensor in value["tensors"])


def test_inspect_json_of_an_moe_without_a_record(moe: Path, tmp_path: Path) -> None:
    stranger = clone(moe, tmp_path / "moe")
    (stranger / "upcycle.json").unlink()
    value = one_json_object(succeed("inspect", stranger, "--json").stdout)
    assert (value["claims"], value["recipe"], value["dense_parameters"]) == (None, None, None)
    assert value["num_experts"] == 4


def test_verify_json(llama: Path, moe: Path, tmp_path: Path) -> None:
    result = succeed("verify", llama, moe, "--json")
    value = one_json_object(result.stdout)
    assert result.stderr == ""
    assert value["status"] == "passed"
    assert [check["name"] for check in value["checks"]] == [
        "structure",
        "files",
        "claims",
        "weights",
        "outputs",
    ]
    assert all(check.keys() >= {"status", "detail", "metrics"} for check in value["checks"])
    assert {check["status"] for check in value["checks"]} == {"passed"}
    metrics = value["checks"][4]["metrics"]
    wanted = {"kl_mean", "kl_max", "max_abs_logit_diff", "top1_agreement", "dense_nll", "moe_nll"}
    assert metrics.keys() >= {*wanted, "tokens"}
    assert metrics["top1_agreement"] == 1.0

    broken = swapped(moe, tmp_path / "broken")
    failed = invoke("verify", llama, broken, "--json", "--checks", "weights")
    assert failed.exit_code == 1
    value = one_json_object(failed.stdout)
    assert value["status"] == "failed"
    assert [check["name"] for check in value["checks"]] == ["weights"]


def test_json_is_unaffected_by_width_and_language(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / ("ö" * 60))
    wide = succeed("inspect", dense, *RECIPE, "--json", COLUMNS="300").stdout
    narrow = succeed("inspect", dense, *RECIPE, "--json", COLUMNS="20").stdout
    assert narrow == wide
    assert one_json_object(wide)["plan"]["source"] == "ö" * 60


# Text ---------------------------------------------------------------------------------------------


def assert_plain(text: str, *, width: int | None = WIDTH) -> None:
    assert "\x1b" not in text
    assert width is None or all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "DENSE"),
        ("inspect", "DENSE", *RECIPE),
        ("inspect", "DENSE", "--recipe", "E8G2T3"),
        ("inspect", "MOE", "--weights", "--dense", "DENSE"),
        ("convert", "DENSE", "OUTPUT", *RECIPE, "--dry-run"),
        ("convert", "DENSE", "OUTPUT", *RECIPE, "--verify"),
        ("verify", "DENSE", "MOE"),
        ("verify", "DENSE", "SWAPPED"),
    ],
    ids=" ".join,
)
def test_tables_fit_the_screen_and_are_plain_in_a_pipe(
    llama: Path, moe: Path, tmp_path: Path, run_cli: RunCli, arguments: tuple[str, ...]
) -> None:
    swapped(moe, tmp_path / "swapped")
    paths = {
        "DENSE": llama,
        "MOE": moe,
        "OUTPUT": tmp_path / "moe",
        "SWAPPED": tmp_path / "swapped",
    }
    # In a pipe colours go by themselves; NO_COLOR says so even to who is told to force them.
    done = run_cli(*(paths.get(argument, argument) for argument in arguments))
    assert done.returncode == ("SWAPPED" in arguments)
    assert done.stdout != ""
    assert_plain(done.stdout)
    assert_plain(done.stderr, width=None)
    assert "Traceback" not in done.stderr


def test_tensors_take_a_line_each(llama: Path) -> None:
    text = succeed("inspect", llama, *RECIPE, "--tensors").stdout
    for name in ("model.layers.1.block_sparse_moe.experts.3.w2.weight", "lm_head.weight"):
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        assert "F32" in line
    assert_plain(text, width=None)


def test_no_color_is_obeyed_on_a_terminal(llama: Path) -> None:
    """FORCE_COLOR makes rich take the pipe for a terminal."""
    forced = succeed("inspect", llama, FORCE_COLOR="1", NO_COLOR="1").stdout
    assert "\x1b[3" not in forced  # bold is no colour


def test_data_and_talk_are_apart(llama: Path, tmp_path: Path) -> None:
    result = succeed("convert", llama, tmp_path / "moe", *RECIPE)
    assert "E2G2T2" in result.stdout
    assert "note:" in result.stderr  # T = G: the router gets no gradient
    assert "note:" not in result.stdout
    assert "Wrote" in result.stderr
    assert "Wrote" not in result.stdout

    again = succeed("convert", llama, tmp_path / "moe", *RECIPE)
    assert again.stdout == ""
    assert "nothing to do" in again.stderr


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    result = succeed("convert", llama, tmp_path / "a" / "moe", *RECIPE, "--dry-run")
    assert "Nothing was written" in result.stderr
    assert "4 per layer, 2 active" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--verify",)])
def test_quiet_prints_nothing(llama: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    for _ in range(2):  # the second finds it done
        result = succeed("convert", llama, tmp_path / "moe", *RECIPE, "--quiet", *extra)
        assert result.output == ""


def test_quiet_still_says_what_failed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_one_write(monkeypatch)
    result = invoke("convert", llama, tmp_path / "moe", *RECIPE, "--quiet", "--verify")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "failed" in result.stderr


def spoil_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the disk had flipped one bit of the embedding, the largest tensor."""
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) == EMBEDDING_BYTES:
            data = bytes([data[0] ^ 1, *data[1:]])
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_failed_verification_exits_with_1_and_publishes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]
) -> None:
    spoil_one_write(monkeypatch)
    result = invoke("convert", llama, tmp_path / "moe", *RECIPE, "--verify", *form)
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert "nothing was published" in result.stderr
    assert "model.embed_tokens.weight" in result.stdout
    if form:
        value = one_json_object(result.stdout)
        assert value["status"] == "verification failed"
        assert value["verification"]["status"] == "failed"


def test_a_finished_output_that_rotted_fails_its_verification(llama: Path, tmp_path: Path) -> None:
    command = ("convert", llama, tmp_path / "moe", *RECIPE)
    succeed(*command)
    assert "nothing to do" in succeed(*command, "--verify").stderr
    weights = tmp_path / "moe" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = snapshot(tmp_path)
    for form in ((), ("--json",), ("--quiet",)):
        result = invoke(*command, "--verify", *form)
        assert result.exit_code == 1
        assert "already" not in result.output
        assert "--overwrite" in result.stderr
    assert snapshot(tmp_path) == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup upcycle convert …` must outlive its terminal."""
    program = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from upcycle_cli.cli.app import app as cli
from upcycle_cli.cli import process
def app(**_):
    print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
    print(signal.getsignal(signal.SIGTERM) is process.on_signal)
cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"True\nTrue\n"


def test_a_verification_can_be_quiet(llama: Path, moe: Path, tmp_path: Path) -> None:
    checks = ("--checks", "weights", "--quiet")
    assert succeed("verify", llama, moe, *checks).output == ""
    failed = invoke("verify", llama, swapped(moe, tmp_path / "moe"), *checks)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "expert" in failed.stderr


@pytest.mark.parametrize(
    ("extra", "step"),
    [
        ((), "upcycle verify {dense} {moe}"),
        (("--scaling", "2"), "upcycle verify {dense} {moe} --allow-inexact"),
        (("--verify",), "upcycle push {moe} my-org/it-s-moe"),
    ],
)
def test_the_next_step_is_named(
    llama: Path, tmp_path: Path, extra: tuple[str, ...], step: str
) -> None:
    output = tmp_path / "it's moe"
    result = succeed("convert", llama, output, "--recipe", "E1G1T1", *extra)
    places = {"dense": shlex.quote(str(llama)), "moe": shlex.quote(str(output))}
    assert f"Next: {step.format(**places)}\n" in result.stderr


def test_one_is_not_many(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "moe", Recipe(expansion=1, granularity=1, top_k=1))
    text = succeed("inspect", llama, "--recipe", "E1G1T1").stdout
    text += succeed("inspect", tmp_path / "moe", "--weights").stdout
    assert "1 virtual group of 1" in text
    assert "in 1 shard\n" in text
    assert "(1 group of 1)" in text
    assert "1 different expert of 1" in text
    assert not re.search(r"\b1 \w*[^s ]s\b", text)


def test_markup_in_names_is_text(llama: Path, tmp_path: Path) -> None:
    """Rich would take [bold] for an instruction, and [/x] for a broken one."""
    dense = clone(llama, tmp_path / "[bold]dense[" / "x]")
    output = tmp_path / "[red]moe[" / "x]"
    result = succeed("convert", dense, output, *RECIPE)
    assert "[red]moe[/x]" in "".join(result.stderr.split())
    assert read_json(output / "upcycle.json")["source"]["name"] == "x]"
    succeed("inspect", output)
    refused = invoke("convert", dense, output, "--recipe", "E4G2T4")
    assert "[red]moe[/x]" in "".join(refused.stderr.split())


def test_separate_sizes_are_the_same_recipe(llama: Path, tmp_path: Path) -> None:
    sizes = ("--expansion", "2", "--granularity", "2", "--top-k", "2")
    short = ("-E", "2", "-G", "2", "-T", "2")
    plans = [
        one_json_object(
            succeed("convert", llama, tmp_path / "moe", *form, "--dry-run", "--json").stdout
        )
        for form in (sizes, short, RECIPE, ("-r", "e2g2t2"))
    ]
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (("--routing", "softmax-topk"), "model_type", "qwen2_moe"),
        (("--routing", "topk-softmax"), "model_type", "mixtral"),
        (("--target", "qwen2_moe"), "routing", "softmax-topk"),
        (("--scaling", "paper"), "promise", "none"),
        (("--scaling", "none"), "promise", "none"),
        (("--scaling", "2"), "promise", "exact"),
        (("--scaling", "3.5"), "promise", "none"),
        (("--scaling", "3.5"), "scaling", 3.5),
        (
            ("--scale-split", "down"),
            "factors",
            {"c": 2.0, "gate": 1.0, "up": 1.0, "down": 2.0, "config": 1.0},
        ),
        (("--routing", "sigmoid-topk"), "model_type", "glm4_moe"),
        (("--target", "upcycled"), "model_type", "upcycled_llama"),
        (("--target", "upcycled"), "expert_layout", "fused"),
        (("--layers", "1-"), "model_type", "qwen2_moe"),  # mixtral has experts in every layer
        (("--layers", "every:2"), "moe_layers", [0]),
        (("--no-virtual-groups",), "promise", "none"),
        (("--router-logit-std", "0.5"), "router_logit_std", 0.5),
        (("--seed", "3"), "seed", 3),
        (("--expert-layout", "fused"), "expert_layout", "fused"),
        (("--max-shard-size", "82kB"), "shards", 3),
        (("--max-shard-size", "82KiB"), "shards", 2),
        (("--max-shard-size", "1.5 GB"), "shards", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_reach_the_plan(
    llama: Path, tmp_path: Path, options: tuple[str, ...], key: str, value: object
) -> None:
    plan = one_json_object(
        succeed("convert", llama, tmp_path / "moe", *RECIPE, *options, "--dry-run", "--json").stdout
    )
    assert plan[key] == value


HOW = [
    ("--routing", "softmax-topk"),
    ("--target", "qwen2_moe"),
    ("--scaling", "paper"),
    ("--scaling", "3.5"),
    ("--scale-split", "down"),
    ("--no-virtual-groups",),
    ("--router-logit-std", "0.5"),
    ("--seed", "3"),
    ("--expert-layout", "fused"),
    ("--dtype", "bfloat16"),
]


@pytest.mark.parametrize("options", HOW, ids=" ".join)
def test_inspect_shows_what_convert_would_make(
    llama: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    sizes = ("-E", "2", "-G", "2", "-T", "2")
    shown = one_json_object(succeed("inspect", llama, *sizes, *options, "--json").stdout)["plan"]
    made = succeed("convert", llama, tmp_path / "moe", *RECIPE, *options, "--dry-run", "--json")
    planned = one_json_object(made.stdout)
    assert shown["recipe"] == "E2G2T2"
    # Whether a top-k may be inexact is part of the digest, and inspect shows any.
    for key in shown.keys() - {"plan_sha256"}:
        assert shown[key] == planned[key], key
    refused = invoke("inspect", llama, *options)
    assert refused.exit_code == 2
    assert "Add --recipe" in refused.stderr


def test_dtype_and_untying_reach_the_files(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("llama", tie_word_embeddings=True)
    options = ("--dtype", "bfloat16", "--untie-embeddings", "--checksums")
    succeed("convert", dense, tmp_path / "moe", *RECIPE, *options)
    tensors = read_tensors(tmp_path / "moe")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert "lm_head.weight" in tensors
    assert (tmp_path / "moe" / "SHA256SUMS").is_file()


# inspect --weights --------------------------------------------------------------------------------


def swapped(moe: Path, target: Path) -> Path:
    """A copy in which the gates of two experts of layer 1 have changed places."""
    tensors = read_tensors(moe)
    one, other = (
        f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight" for expert in (2, 3)
    )
    tensors[one], tensors[other] = tensors[other], tensors[one]
    clone(moe, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_of_a_good_moe(llama: Path, moe: Path) -> None:
    alone = one_json_object(succeed("inspect", moe, "--weights", "--json").stdout)["weights"]
    assert alone["distinct_experts"] == 2
    assert alone["granularity"] == 2
    assert alone["whole_groups"] is True
    assert alone["factors"] is None

    command = ("inspect", moe, "--weights", "--dense", llama)
    measured = one_json_object(succeed(*command, "--json").stdout)["weights"]["factors"]
    assert measured == pytest.approx({"gate": 1.0, "up": 2.0, "down": 1.0})
    text = succeed(*command).stdout
    assert "2 different experts of 4, 2 per group" in " ".join(text.split())
    assert "yes, in every layer" in text
    assert "up × 2" in text


def test_weights_of_an_moe_with_swapped_experts(moe: Path, tmp_path: Path) -> None:
    broken = swapped(moe, tmp_path / "moe")
    weights = one_json_object(succeed("inspect", broken, "--weights", "--json").stdout)["weights"]
    assert weights["whole_groups"] is False
    assert weights["differing"] == ["model.layers.1, expert 2", "model.layers.1, expert 3"]
    text = succeed("inspect", broken, "--weights").stdout
    assert "model.layers.1, expert 3" in text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("expansion", "granularity"), [(4, 1), (2, 4), (1, 3), (1, 1)])
def test_weights_say_the_granularity(
    llama: Path, tmp_path: Path, layout: ExpertLayout, expansion: int, granularity: int
) -> None:
    recipe = Recipe(expansion=expansion, granularity=granularity, top_k=granularity)
    options = Options(expert_layout=layout)
    convert(llama, tmp_path / "moe", recipe, options=options)
    command = ("inspect", tmp_path / "moe", "--weights", "--dense", llama, "--json")
    found = one_json_object(succeed(*command).stdout)["weights"]
    assert found["granularity"] == granularity
    assert found["distinct_experts"] == granularity
    assert found["whole_groups"] is True
    assert found["factors"]["gate"] == pytest.approx(1.0)
    assert found["factors"]["up"] * found["factors"]["down"] == pytest.approx(granularity)


# The whole job ------------------------------------------------------------------------------------


@pytest.mark.long
def test_demo(tmp_path: Path, run_cli: RunCli) -> None:
    done = run_cli("demo", tmp_path / "demo", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "$ upcycle convert" in done.stderr
    assert "passed" in done.stdout
    assert_plain(done.stdout)
    shown = {entry.name for entry in (tmp_path / "demo").iterdir()}
    assert shown == {"dense", "moe-E8G8T8"}
    assert read_json(tmp_path / "demo" / "moe-E8G8T8" / "config.json")["num_local_experts"] == 64
