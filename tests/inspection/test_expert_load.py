"""Which experts a text chooses: of what upcycle wrote, and of what others saved of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, clone, read_tensors, validate_json
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import Recipe, UpcycleError, convert, inspect
from upcycle_cli.inspection.expert_load import TOKENS, Load
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED
from upcycle_cli.report import inspection_html

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of which a tiny model's tokenizer makes a token a byte."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} sheep and {i * i % 97} goats went by.\n" for i in range(30)))
    return path


def load_of(moe: Path, text: Path | str, dense: Path | None = None) -> Load:
    found = inspect(moe, load=text, dense=dense).load
    assert found is not None
    return found


def saved(moe: Path, again: Path, **how: Any) -> Path:  # noqa: ANN401
    """Let transformers load a model and save it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(moe).save_pretrained(again, **how)
    return again


@pytest.mark.parametrize("target", [*NATIVE, SHIPPED])
def test_every_target_saved_again_without_its_record(
    make_dense: MakeDense, tmp_path: Path, text: Path, target: str
) -> None:
    types = [name for name, row in DENSE.items() if target in row.targets]
    dense = make_dense(types[0] if types else "olmo2")
    done = convert(
        dense, tmp_path / "moe", Recipe(expansion=4, granularity=2, top_k=2), target=target
    )
    before = load_of(done.output, text)
    assert [each.layer for each in before.layers] == [*done.plan.layers]
    for each in before.layers:
        assert len(each.load) == 8
        assert sum(each.load) == 2 * before.tokens
        assert each.idle == tuple(e for e, tokens in enumerate(each.load) if not tokens)
        assert each.load[::2] == each.load[1::2]  # whole groups
    if target == SHIPPED:
        return
    again = saved(done.output, tmp_path / "again")
    assert not (again / "upcycle.json").exists()
    assert load_of(again, text, dense) == before  # it has no tokenizer of its own
    in_memory = saved(done.output, tmp_path / "in memory", save_original_format=False)
    assert load_of(in_memory, text, dense) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_are_those_of_the_running_model(
    make_dense: MakeDense, tmp_path: Path, text: Path, dtype: str
) -> None:
    dense = make_dense("llama", dtype=dtype)
    moe = convert(dense, tmp_path / "moe", Recipe(expansion=8, granularity=1, top_k=2)).output
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(moe)(text.read_text())["input_ids"][:TOKENS]
    length = model.config.max_position_embeddings
    rows = torch.tensor(ids + [0] * (-len(ids) % length)).reshape(-1, length)
    with torch.no_grad():
        logits = model(rows, output_router_logits=True).router_logits
    found = load_of(moe, text)
    assert found.tokens == len(ids)
    for each, logits_SN in zip(found.layers, logits, strict=True):
        experts = logits_SN[: len(ids)].topk(2).indices
        assert each.load == tuple(experts.flatten().bincount(minlength=8).tolist())
        load = experts.flatten().bincount(minlength=8).double()
        assert each.load_cv == pytest.approx(float(load.std(correction=0) / load.mean()))


@pytest.fixture(scope="module")
def idle_moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the last layer's four experts the last two are never the best."""
    moe = tmp_path_factory.mktemp("idle") / "moe"
    convert(llama, moe, Recipe(expansion=4, granularity=1, top_k=1))
    tensors = read_tensors(moe)
    rows_NH = tensors[ROUTER.format(1)]
    rows_NH[1] = -rows_NH[0]
    rows_NH[2:] = 0
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    return moe


def test_experts_that_no_token_chooses_are_named(idle_moe: Path, text: Path) -> None:
    shown = invoke("inspect", idle_moe, "--load", text)
    assert shown.exit_code == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "never chosen 2 of 8 experts layer 1: 2-3" in words
    assert "of words.txt)" in words
    told = invoke("inspect", idle_moe, "--load", text, "--json")
    load = validate_json("inspect", told.stdout)["load"]
    assert [layer["idle"] for layer in load["layers"]] == [[], [2, 3]]
    assert json.loads(invoke("inspect", idle_moe, "--json").stdout)["load"] is None


def test_the_page_draws_them(idle_moe: Path, text: Path) -> None:
    found = inspect(idle_moe, weights=True, load=text)
    page = inspection_html(found, name="moe", command="")
    assert "Expert load" in page
    assert "no token chose 2 experts of 8" in page
    assert "Expert load" not in inspection_html(inspect(idle_moe), name="moe", command="")


def _without_tokenizer(moe: Path) -> None:
    for file in moe.glob("*token*"):
        file.unlink()


def _without(name: str) -> Callable[[Path], None]:
    def spoil(moe: Path) -> None:
        tensors = read_tensors(moe)
        del tensors[name]
        save_file(tensors, moe / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_tokenizer, ["the model's tokenizer cannot be used", "--dense"]),
        (_without("model.norm.weight"), ["norm.weight"]),
        (_without(ROUTER.format(1)), ["gate.weight"]),
        (_without(ROUTER.format(0).replace("gate", "experts.2.w1")), ["w1"]),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(
    idle_moe: Path, tmp_path: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    moe = clone(idle_moe, tmp_path / "moe")
    spoil(moe)
    with pytest.raises(UpcycleError) as caught:
        inspect(moe, load="builtin")
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_dense_model_lends_its_tokenizer(
    idle_moe: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    moe = clone(idle_moe, tmp_path / "moe")
    _without_tokenizer(moe)
    assert load_of(moe, text, llama) == load_of(idle_moe, text)


def test_a_text_that_cannot_be_read(idle_moe: Path) -> None:
    refused = invoke("inspect", idle_moe, "--load", "nowhere.txt")
    assert_refused(refused, "the text nowhere.txt", "No such file")


def test_a_dense_model_has_no_load(llama: Path) -> None:
    assert_refused(invoke("inspect", llama, "--load", "builtin"), "dense model", "--load")
