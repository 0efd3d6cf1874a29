"""A conversion as a whole: complete, resumable, and reported as it happens."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    MakeDense,
    clone,
    contents,
    logits,
    others,
    random_ids,
    read_json,
    snapshot,
    spoil,
    write_json,
)
from engine_fixtures import stopped_after
from refusals import assert_refused, invoke
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, convert, open_checkpoint
from upcycle_cli.api import Conversion, Request, carry_out, preview
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.plan.facts import warnings
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.distributed import Team

RECIPE = Recipe("E2G2T2")
TWICE = Recipe("E4G2T4")
CHECK = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]


# The files of the output --------------------------------------------------------------------------


def test_the_output_has_all_files_and_no_others(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense", _name_or_path=str(tmp_path / "secret"))
    for name in ("pytorch_model.bin", ".gitattributes", "training_args.bin", "model.onnx"):
        (dense / name).write_bytes(b"something")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    before = snapshot(dense)
    convert(dense, tmp_path / "moe", TWICE, checksums=True, verify=True)
    assert snapshot(dense) == before
    found, source = contents(tmp_path / "moe"), contents(dense)
    companions = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}
    companions |= {"generation_config.json", "additional_chat_templates/tool_use.jinja"}
    assert {name: found[name] for name in companions} == {name: source[name] for name in companions}
    own = {"README.md", "config.json", "model.safetensors", "upcycle.json", "SHA256SUMS"}
    assert found.keys() == companions | own
    for file in filter(Path.is_file, (tmp_path / "moe").rglob("*")):
        assert os.fsencode(tmp_path) not in file.read_bytes(), file.name
    record = read_json(tmp_path / "moe" / "upcycle.json")
    assert (record["recipe"]["name"], record["recipe"]["seed"]) == ("E4G2T4", 0)
    assert record["source"]["name"] == "dense"
    factors = {"c": 2.0, "gate": 1.0, "up": 2.0, "down": 1.0, "config": 1.0}
    assert record["factors"].items() >= factors.items()
    assert record["moe_layers"] == [0, 1]
    assert len(record["routers"]) == 2
    sums = (tmp_path / "moe/SHA256SUMS").read_text().splitlines()
    assert {line.split("  ", 1)[1] for line in sums} == found.keys() - {"SHA256SUMS", "README.md"}
    assert subprocess.run(CHECK, cwd=tmp_path / "moe", check=False).returncode == 0
    spoil(tmp_path / "moe" / "model.safetensors")
    damaged = subprocess.run(CHECK, cwd=tmp_path / "moe", check=False, capture_output=True)
    assert damaged.returncode == 1


def test_the_output_loads(llama: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer, GenerationConfig

    convert(str(llama), str(tmp_path / "moe"), RECIPE)
    text = "Ein Häuschen, 3 × 7."
    one, two = (AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "moe"))
    assert one(text).input_ids == two(text).input_ids
    assert two.chat_template == one.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "moe").temperature == 0.6
    assert torch.isfinite(logits(tmp_path / "moe", random_ids())).all()
    data = ModelCard.load(tmp_path / "moe" / "README.md").data.to_dict()
    assert data["license"] == "apache-2.0"  # carried over from the source's card
    assert {"moe", "mixtral"} <= set(data["tags"])


# An output that exists already --------------------------------------------------------------------


def test_a_second_run_finds_nothing_to_do(llama: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    moe.mkdir()
    first = convert(llama, moe, RECIPE)
    before = snapshot(moe)
    second = convert(llama, moe, RECIPE)
    assert (first.already_done, second.already_done) == (False, True)
    assert snapshot(moe) == before
    # Sizes and config are all that makes an output count as finished; verify reads the weights.
    assert convert(llama, moe, RECIPE, verify=True, checksums=True).published
    assert (moe / "SHA256SUMS").exists()
    spoil(moe / "model.safetensors")
    assert not convert(llama, moe, RECIPE, verify=True).published
    assert not convert(llama, moe, RECIPE, overwrite=True).already_done
    assert contents(moe) == {name: digest for name, (digest, _) in before.items()}
    assert others(tmp_path) == []


def shorten(moe: Path) -> None:
    (moe / "model.safetensors").write_bytes((moe / "model.safetensors").read_bytes()[:-100])


@pytest.mark.parametrize("damage", [shorten, lambda moe: write_json(moe / "config.json", {})])
def test_a_damaged_output_is_not_taken_for_finished(
    llama: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    convert(llama, tmp_path / "moe", RECIPE)
    damage(tmp_path / "moe")
    with pytest.raises(UpcycleError, match="not empty"):
        convert(llama, tmp_path / "moe", RECIPE)
    with pytest.raises(UpcycleError, match="is not replaced, because of"):
        convert(llama, tmp_path / "moe", RECIPE, overwrite=True)


def test_a_changed_source_or_recipe_needs_overwrite(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    convert(dense, tmp_path / "moe", RECIPE)
    spoil(dense / "model.safetensors")  # the same size and header: another model
    os.utime(dense / "model.safetensors")
    for recipe in (RECIPE, TWICE):
        with pytest.raises(UpcycleError, match="`overwrite=True`"):
            convert(dense, tmp_path / "moe", recipe)
        assert not convert(dense, tmp_path / "moe", recipe, overwrite=True).already_done
    assert read_json(tmp_path / "moe" / "config.json")["num_local_experts"] == 8
    assert others(tmp_path) == []


# A dry run ----------------------------------------------------------------------------------------


def begun(output: Path, dense: Path, recipe: Recipe = RECIPE) -> None:
    stopped_after(build_plan(recipe, open_checkpoint(dense)), output, 0)


REFUSED = "converting would be refused: "
PREVIEWS: list[tuple[Callable[[Path, Path], object], bool, str | None]] = [
    (lambda *_: None, False, None),
    (lambda output, dense: convert(dense, output, RECIPE), False, "is already what this command"),
    (lambda output, dense: convert(dense, output, TWICE), False, f"{REFUSED}.* not empty"),
    (lambda output, dense: convert(dense, output, TWICE), True, None),
    (lambda output, dense: shutil.copytree(dense, output), False, f"{REFUSED}.*another name\\."),
    (begun, False, "moe.partial .* files are used"),
    (partial(begun, recipe=TWICE), False, f"{REFUSED}.* of another recipe"),
    (partial(begun, recipe=TWICE), True, "moe.partial .* is removed"),
]


@pytest.mark.parametrize(("prepare", "overwrite", "note"), PREVIEWS)
def test_a_dry_run_shows_the_plan_and_the_problems(
    llama: Path,
    tmp_path: Path,
    prepare: Callable[[Path, Path], object],
    note: str | None,
    *,
    overwrite: bool,
) -> None:
    prepare(tmp_path / "moe", llama)
    before = snapshot(tmp_path)
    request = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE, overwrite=overwrite)
    plan, notes = preview(request, Hooks(), Team())
    assert plan.how["recipe"]["name"] == "E2G2T2"
    general = [*warnings(plan)]
    assert (notes == general) == (note is None)
    assert note is None or re.search(note, notes[len(general)])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", ["", "/", "..", "../gone/.."])
def test_an_output_without_a_name_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert_refused(invoke("convert", llama, output, "--recipe", RECIPE.name))
    assert list(tmp_path.rglob("*.partial*")) == []


# Callbacks ----------------------------------------------------------------------------------------


class Listener(Hooks):
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.nbytes = 0

    def planned(self, plan: Plan) -> None:
        self.heard.append(f"planned {plan.how['recipe']['name']}")

    def writing(self, plan: Plan) -> None:
        assert self.nbytes == 0
        self.heard.append(f"writing {len(plan.layers)} layers")

    def advance(self, num_bytes: int) -> None:
        self.nbytes += num_bytes

    def begins(self, what: str) -> None:
        self.heard.append(what)

    def finished(self, result: Conversion) -> None:
        self.heard.append(f"finished {result.output.name}")


def test_callbacks_receive_every_step_in_order(llama: Path, tmp_path: Path) -> None:
    listener = Listener()
    request = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE, verify=True)
    done = carry_out(request, listener, Team())
    assert listener.nbytes == done.plan.nbytes
    assert done.report is not None
    checks = [f"checking {check.name}" for check in done.report.checks]
    expected = ["planned E2G2T2", "writing 2 layers", *checks, "finished moe"]
    assert [word for word in listener.heard if word in expected] == expected
    card = (tmp_path / "moe" / "README.md").read_text()
    assert all(f"| {check.name} | passed |" in card for check in done.report.checks)


# Weights that vanish ------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj.weight"
VANISHED = (
    f"93 % of {DOWN} is too small for float16 and becomes zero. Use `dtype` bfloat16 or float32."
)


def test_vanished_weights_are_reported_once(make_dense: MakeDense, tmp_path: Path) -> None:
    """However many copies of a part there are, in however many files, in however many runs."""
    faint = clone(make_dense("llama", dtype="bfloat16"), tmp_path / "dense")
    tensors = {k: v.clone() for k, v in load_file(faint / "model.safetensors").items()}
    tensors[DOWN].view(-1)[: round(0.93 * tensors[DOWN].numel())] = 1e-9
    up = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)
    up[: up.numel() // 8] = -1e-9
    tensors["model.norm.weight"][0] = 0  # which is no loss
    tensors["model.layers.1.mlp.gate_proj.weight"][0, 0] = 1e-9  # nor is a single weight
    save_file(tensors, faint / "model.safetensors", metadata={"format": "pt"})
    options = Options(dtype="float16", max_shard_bytes=20_000)
    plan = build_plan(TWICE, open_checkpoint(faint), options=options)
    stopped_after(plan, tmp_path / "moe", plan.nbytes - plan.shards[-1].nbytes)
    done = convert(faint, tmp_path / "moe", TWICE, options=options)
    assert done.reused_bytes > plan.nbytes // 2
    assert done.warnings == (*warnings(done.plan), VANISHED)


def test_convert_takes_every_field_of_a_request() -> None:
    assert {*inspect.signature(convert).parameters} == {field.name for field in fields(Request)}
