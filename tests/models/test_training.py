"""Training converted models: virtual groups that stay whole, and what inspect says afterwards."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import converted, source_of
from conftest import MakeDense, random_ids, read_json, sizes_of, write_json

from upcycle_cli import Recipe, UpcycleError, convert, inspect, tie_virtual_groups
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED, Routing

G = 2
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "train.py"


@pytest.fixture
def load(make_dense: MakeDense, tmp_path: Path) -> Any:  # noqa: ANN401
    """Convert to a target, with a routing that gives router rows gradients, and load the model."""
    from transformers import AutoModelForCausalLM

    def load(target: str, granularity: int = G, **changes: Any) -> Any:  # noqa: ANN401
        able = tuple(Routing) if target == SHIPPED else NATIVE[target].routings
        routing = Routing.SOFTMAX_TOPK if Routing.SOFTMAX_TOPK in able else able[0]
        moe = tmp_path / "moe"
        recipe = Recipe(
            expansion=4, granularity=granularity, top_k=2 * granularity, routing=routing
        )
        convert(make_dense(source_of(target)), moe, recipe, target=target)
        write_json(moe / "config.json", read_json(moe / "config.json") | changes)
        return AutoModelForCausalLM.from_pretrained(
            moe, dtype=torch.float32, experts_implementation="eager", trust_remote_code=True
        ).train()

    return load


def train(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Take three steps, and return the routers' rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        for part in (random_ids() + step).chunk(2):  # accumulates gradients
            model(part, labels=part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    name = re.compile(r".*layers\.\d+\.(\w+\.)*(gate|gate\.wg|router|router\.proj)\.weight")
    rows = {n: p.detach() for n, p in model.named_parameters() if name.fullmatch(n)}
    assert rows
    return rows


def is_whole(rows: torch.Tensor) -> bool:
    groups = rows.reshape(-1, G, rows.shape[-1])
    return torch.equal(groups[:, :1].expand_as(groups), groups)


@pytest.mark.parametrize("target", [*NATIVE, SHIPPED])
def test_tied_groups_stay_whole_and_others_split(load: Any, target: str) -> None:  # noqa: ANN401
    model = load(target, virtual_group_size=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = tie_virtual_groups(model)
    rows = train(model)
    assert (tied.granularity, {*tied.routers}) == (G, {*rows})
    assert all(map(is_whole, rows.values()))
    assert not any(torch.equal(weight, before[name]) for name, weight in rows.items())
    tied.remove()
    assert not any(map(is_whole, train(model).values()))


def test_shipped_code_ties_groups_by_its_config(load: Any) -> None:  # noqa: ANN401
    model = load(SHIPPED)
    assert model.config.virtual_group_size == G
    assert all(map(is_whole, train(model).values()))


@pytest.mark.parametrize(
    ("routing", "granularity", "top_k", "size"),
    [
        ("softmax-topk", 1, 1, None),
        ("topk-softmax", 2, 2, 2),
        ("topk-softmax", 2, 4, None),
        ("sigmoid-topk", 2, 2, None),
        ("softmax-topk", 2, 4, 2),
    ],
)
def test_groups_are_tied_by_default_where_that_was_measured_to_train_better(
    routing: str, granularity: int, top_k: int, size: int | None
) -> None:
    recipe = Recipe(f"E4G{granularity}T{top_k}", routing=Routing(routing))
    config = converted({"model_type": "olmo2", **sizes_of("olmo2")}, SHIPPED, recipe)
    assert config.get("virtual_group_size") == size


def test_refuse_to_tie(load: Any, llama: Path) -> None:  # noqa: ANN401
    from transformers import AutoModelForCausalLM

    with pytest.raises(UpcycleError, match="LlamaForCausalLM is not a mixture of experts"):
        tie_virtual_groups(AutoModelForCausalLM.from_pretrained(llama))
    model = load("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1] += 1
    with pytest.raises(UpcycleError, match=r"layers\.0\.mlp\.gate\.weight are split"):
        tie_virtual_groups(model)
    model.model.layers[0].mlp.gate.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(UpcycleError, match="split among processes"):
        tie_virtual_groups(model)
    with pytest.raises(UpcycleError, match="all routers of the model are frozen"):
        tie_virtual_groups(model.requires_grad_(requires_grad=False))


def test_without_groups_nothing_is_tied(load: Any) -> None:  # noqa: ANN401
    tied = tie_virtual_groups(load("mixtral", granularity=1))
    assert (tied.granularity, tied.routers) == (1, ())


@pytest.mark.filterwarnings("ignore")  # raised inside of transformers and accelerate
def test_the_example_trains_from_the_dense_models_loss(
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense, text, out = make_dense("qwen3"), tmp_path / "text", tmp_path / "out"
    text.write_text("Experts learn to differ. " * 60)
    arguments = ["train.py", dense, text, out, "--steps", "3", "--lr", "1e-3"]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    losses = re.search(r"first loss ([\d.]+), dense model ([\d.]+)", printed)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=1e-4)
    number = r"(\d+\.\d+)"
    line = rf"(\d)/3  loss {number}  balancing {number}  load varies by {number}, at most {number}"
    steps = re.findall(rf"(?m)^step {line} \(layer [01]\)$", printed[losses.end() :])
    assert [step for step, *_ in steps] == ["1", "2", "3"]
    assert all(float(aux) > 0 < float(mean) <= float(most) for *_, aux, mean, most in steps)
    monkeypatch.setattr("sys.argv", list(map(str, [*arguments, "--recipe", "E2G2T2"])))
    with pytest.raises(SystemExit, match="is not empty"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not (out / "trained" / "training_args.bin").exists()

    # inspect needs no upcycle.json, which transformers does not save.
    assert not (out / "trained" / "upcycle.json").exists()
    trained, untrained = (
        inspect(out / name, weights=True, dense=dense).weights for name in ("trained", "moe")
    )
    assert trained is not None
    assert untrained is not None
    assert trained.movement is not None
    assert untrained.movement is not None
    assert trained.diverged == trained.num_experts
    assert untrained.diverged == 0
    for layer in trained.movement:
        assert all(0.001 < distance < 0.5 for distance in layer.moved)
        assert 0 < layer.apart < max(layer.moved)
        assert (layer.num_groups, layer.split_groups) == (4, 0)
    assert {d for layer in untrained.movement for d in (*layer.moved, layer.apart)} == {0.0}
