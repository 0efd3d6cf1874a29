"""Which experts the tokens of a text choose, in MoEs that upcycle or transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from configs import source_of
from conftest import MakeDense, clone, read_tensors, validate_json
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import Recipe, UpcycleError, convert, inspect
from upcycle_cli.inspection.expert_load import TOKENS, ExpertLoad
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


def load_of(moe: Path, text: Path | str, dense: Path | None = None) -> ExpertLoad:
    found = inspect(moe, load=text, dense=dense).load
    assert found is not None
    return found


@pytest.mark.parametrize("target", [*NATIVE, SHIPPED])
def test_measure_every_target_and_what_transformers_saves_of_it(
    make_dense: MakeDense, tmp_path: Path, text: Path, target: str
) -> None:
    from transformers import AutoModelForCausalLM

    dense = make_dense(source_of(target))
    recipe = Recipe("E4G2T2")
    done = convert(dense, tmp_path / "moe", recipe, target=target)
    before = load_of(done.output, text)
    assert [each.layer for each in before.layers] == [*done.plan.layers]
    for each in before.layers:
        assert sum(each.load) == 2 * before.tokens
        assert each.idle == tuple(e for e, tokens in enumerate(each.load) if not tokens)
        assert each.load[::2] == each.load[1::2]  # whole groups
    for original in (True, False) if target != SHIPPED else ():
        again = tmp_path / f"again {original}"
        model = AutoModelForCausalLM.from_pretrained(done.output)
        model.save_pretrained(again, save_original_format=original)
        assert load_of(again, text, dense) == before  # with the dense model's tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_count_what_the_running_model_chooses(
    make_dense: MakeDense, tmp_path: Path, text: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense = make_dense("llama", dtype=dtype)
    moe = convert(dense, tmp_path / "moe", Recipe("E8G1T2")).output
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(moe)(text.read_text())["input_ids"][:TOKENS]
    length = model.config.max_position_embeddings
    rows = torch.tensor(ids + [0] * (-len(ids) % length)).reshape(-1, length)
    with torch.no_grad():
        logits = model(rows, output_router_logits=True).router_logits
    found = load_of(moe, text)
    assert found.tokens == len(ids)
    for each, logits_SN in zip(found.layers, logits, strict=True):
        load = logits_SN[: len(ids)].topk(2).indices.flatten().bincount(minlength=8)
        assert each.load == tuple(load.tolist())
        cv = float(load.double().std(correction=0) / load.double().mean())
        assert each.load_cv == pytest.approx(cv)


@pytest.fixture(scope="module")
def idle_moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MoE whose last layer never chooses the last two of its four experts."""
    moe = tmp_path_factory.mktemp("idle") / "moe"
    convert(llama, moe, Recipe("E4G1T1"))
    tensors = read_tensors(moe)
    rows_NH = tensors[ROUTER.format(1)]
    rows_NH[1] = -rows_NH[0]
    rows_NH[2:] = 0
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    return moe


def test_name_experts_that_no_token_chooses(idle_moe: Path, text: Path) -> None:
    shown = invoke("inspect", idle_moe, "--load", text)
    assert shown.exit_code == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "never chosen 2 of 8 experts, in layers 1" in words
    assert "of words.txt)" in words
    printed = invoke("inspect", idle_moe, "--load", text, "--json")
    load = validate_json("inspect", printed.stdout)["load"]
    assert [layer["idle"] for layer in load["layers"]] == [[], [2, 3]]
    assert json.loads(invoke("inspect", idle_moe, "--json").stdout)["load"] is None


@pytest.mark.parametrize(
    ("files", "tensor", "words"),
    [
        ("*token*", "", ["the model's tokenizer cannot be used", "`dense`"]),
        ("", "model.norm.weight", ["norm.weight"]),
        ("", ROUTER.format(1), ["gate.weight"]),
        ("", ROUTER.format(0).replace("gate", "experts.2.w1"), ["w1"]),
    ],
)
def test_refuse_what_cannot_be_run(
    idle_moe: Path, tmp_path: Path, files: str, tensor: str, words: list[str]
) -> None:
    moe = clone(idle_moe, tmp_path / "moe")
    for file in moe.glob(files or "none"):
        file.unlink()
    tensors = read_tensors(moe)
    tensors.pop(tensor, None)
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(UpcycleError) as caught:
        inspect(moe, load="builtin")
    assert all(word in str(caught.value) for word in words), caught.value


def test_refuse_a_missing_text_and_a_dense_model(idle_moe: Path, llama: Path) -> None:
    refused = invoke("inspect", idle_moe, "--load", "nowhere.txt")
    assert_refused(refused, "the text nowhere.txt", "No such file")
    assert_refused(invoke("inspect", llama, "--load", "builtin"), "dense model", "--load")
    assert_refused(invoke("inspect", llama, "--weights"), "dense model", "--weights")
