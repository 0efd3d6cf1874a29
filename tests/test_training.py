"""Virtual groups in training: rows that are equal stay equal when their gradients are averaged."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, random_ids, read_json, read_tensors, write_json
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import Recipe, UpcycleError, convert, inspect, verify
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED, Routing
from upcycle_cli.report import inspection_html
from upcycle_cli.training import tie_virtual_groups

G = 2
TARGETS = (*NATIVE, SHIPPED)
STEPS = 3
EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "train.py"


@pytest.fixture
def load(make_dense: MakeDense, tmp_path: Path) -> Any:  # noqa: ANN401
    """Convert to a target, with rows that have gradients where it can, and load it to train it."""
    from transformers import AutoModelForCausalLM

    def load(target: str, granularity: int = G, **changes: Any) -> Any:  # noqa: ANN401
        able = tuple(Routing) if target == SHIPPED else NATIVE[target].routings
        routing = Routing.SOFTMAX_TOPK if Routing.SOFTMAX_TOPK in able else able[0]
        types = [name for name, row in DENSE.items() if target in row.targets]
        moe = tmp_path / "moe"
        recipe = Recipe(
            expansion=4, granularity=granularity, top_k=2 * granularity, routing=routing
        )
        convert(make_dense(types[0] if types else "olmo2"), moe, recipe, target=target)
        write_json(moe / "config.json", read_json(moe / "config.json") | changes)
        return AutoModelForCausalLM.from_pretrained(
            moe, dtype=torch.float32, experts_implementation="eager", trust_remote_code=True
        ).train()

    return load


def train(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Take some steps, and return the routers' rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        ids = random_ids() + step
        for part in ids.chunk(2):  # gradients are added up
            model(part, labels=part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    name = re.compile(r".*layers\.\d+\.(\w+\.)*(gate|gate\.wg|router|router\.proj)\.weight")
    rows = {n: p.detach() for n, p in model.named_parameters() if name.fullmatch(n)}
    assert rows
    return rows


def whole(rows: torch.Tensor) -> bool:
    groups = rows.reshape(-1, G, rows.shape[-1])
    return torch.equal(groups[:, :1].expand_as(groups), groups)


@pytest.mark.parametrize("target", TARGETS)
def test_groups_stay_whole_only_where_they_are_tied(load: Any, target: str) -> None:  # noqa: ANN401
    model = load(target, virtual_group_size=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = tie_virtual_groups(model)
    rows = train(model)
    assert tied.granularity == G
    assert {*tied.routers} == rows.keys()
    assert all(whole(weight) for weight in rows.values())
    assert not any(torch.equal(weight, before[name]) for name, weight in rows.items())
    tied.remove()
    assert not any(whole(weight) for weight in train(model).values())


def test_shipped_code_ties_them_by_its_config(load: Any) -> None:  # noqa: ANN401
    model = load(SHIPPED)
    assert model.config.virtual_group_size == G
    assert all(whole(weight) for weight in train(model).values())


def test_only_what_was_measured_to_train_better_is_tied_unasked(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense("olmo2")
    for routing, granularity, top_k, size in (
        ("softmax-topk", 1, 1, None),
        ("topk-softmax", 1, 1, None),
        ("topk-softmax", 2, 2, 2),
        ("topk-softmax", 2, 4, None),
        ("sigmoid-topk", 2, 2, None),
        ("softmax-topk", 2, 4, 2),
    ):
        moe = tmp_path / f"{routing}{granularity}{top_k}"
        recipe = Recipe(expansion=4, granularity=granularity, top_k=top_k, routing=Routing(routing))
        convert(dense, moe, recipe, target=SHIPPED)
        assert read_json(moe / "config.json").get("virtual_group_size") == size


@pytest.mark.parametrize(("size", "words"), [(1, None), (4, "virtual_group_size is 4")])
def test_verify_knows_the_size_of_a_group(
    make_dense: MakeDense, tmp_path: Path, size: int, words: str | None
) -> None:
    dense, moe = make_dense("olmo2"), tmp_path / "moe"
    convert(dense, moe, Recipe(expansion=4, granularity=2, top_k=4), target=SHIPPED)
    write_json(moe / "config.json", read_json(moe / "config.json") | {"virtual_group_size": size})
    report = verify(dense, moe, checks=["directory"])
    assert report.passed == (words is None)
    assert words is None or words in str(report.checks)


def test_without_groups_nothing_is_tied(load: Any) -> None:  # noqa: ANN401
    tied = tie_virtual_groups(load("mixtral", granularity=1))
    assert (tied.granularity, tied.routers) == (1, ())


def test_what_cannot_be_tied_is_refused(load: Any, llama: Path) -> None:  # noqa: ANN401
    from transformers import AutoModelForCausalLM

    with pytest.raises(UpcycleError, match="LlamaForCausalLM is no mixture of experts"):
        tie_virtual_groups(AutoModelForCausalLM.from_pretrained(llama))
    model = load("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1] += 1
    with pytest.raises(UpcycleError, match=r"layers\.0\.mlp\.gate\.weight are split"):
        tie_virtual_groups(model)
    model.model.layers[0].mlp.gate.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(UpcycleError, match="not held in one piece"):
        tie_virtual_groups(model)
    with pytest.raises(UpcycleError, match="all its routers are frozen"):
        tie_virtual_groups(model.requires_grad_(requires_grad=False))


@pytest.mark.filterwarnings("ignore")  # of what transformers and accelerate are built on
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
    said = capsys.readouterr().out
    losses = re.search(r"first loss ([\d.]+), of the dense model ([\d.]+)", said)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=1e-4)
    spreads = [re.findall(rf"'load_cv/{layer}': '?([\d.]+)", said) for layer in range(3)]
    assert [len(each) for each in spreads] == [3, 3, 0]  # of each layer, at each step
    assert spreads[0] != spreads[1]
    said = " ".join(said.split())
    assert "12 of 16 experts are no copies" in said  # as inspect has it
    assert re.search(r"moved [\d.]+% on average", said)
    assert "split groups 0 of 8" in said

    # What transformers saved says what became of the experts, without upcycle.json.
    assert not (out / "trained" / "upcycle.json").exists()
    trained = inspect(out / "trained", weights=True, dense=dense)
    weights = trained.weights
    assert weights is not None
    assert weights.movement is not None
    for layer in weights.movement:
        assert all(0.001 < distance < 0.5 for distance in layer.moved)
        assert 0 < layer.apart < max(layer.moved)
        assert (layer.num_groups, layer.split_groups) == (4, 0)
    assert not weights.whole_groups
    assert "Weight drift by layer" in inspection_html(trained, name="trained", command="")
    untrained = inspect(out / "moe", weights=True, dense=dense).weights
    assert untrained is not None
    assert untrained.movement is not None
    assert {d for layer in untrained.movement for d in (*layer.moved, layer.apart)} == {0.0}


def test_groups_that_were_split_are_counted(
    make_dense: MakeDense,
    tmp_path: Path,
    load: Any,  # noqa: ANN401
) -> None:
    model = load("qwen3_moe", granularity=2)
    train(model)
    model.save_pretrained(tmp_path / "trained")
    weights = inspect(tmp_path / "trained", weights=True, dense=make_dense("qwen3")).weights
    assert weights is not None
    assert weights.granularity == 1  # by the rows alone
    assert weights.movement is not None
    assert [(layer.num_groups, layer.split_groups) for layer in weights.movement] == [(4, 4)] * 2


def test_another_dense_model_is_no_source(make_dense: MakeDense, load: Any, tmp_path: Path) -> None:  # noqa: ANN401
    load("qwen3_moe", granularity=3)  # experts 16 wide
    with pytest.raises(UpcycleError, match="MLPs 40 wide, of which experts 16 wide are no shards"):
        inspect(tmp_path / "moe", weights=True, dense=make_dense("qwen3", intermediate_size=40))


WRITTEN = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "output_router_logits": True,
    "use_cache": False,
}
"""What TRL's SFTTrainer 1.16 leaves in a config; it, and peft 0.21, save what transformers does."""


@pytest.mark.parametrize("target", ["mixtral", "qwen3_moe", SHIPPED])
def test_what_trl_saves_is_inspected(make_dense: MakeDense, tmp_path: Path, target: str) -> None:
    dense = make_dense("qwen3" if target == "qwen3_moe" else "llama")
    moe = convert(
        dense, tmp_path / "moe", Recipe(expansion=4, granularity=2, top_k=4), target=target
    ).output
    (moe / "upcycle.json").unlink()
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (moe / name).write_bytes(b"a pickle, which nothing reads")
    write_json(moe / "trainer_state.json", {"global_step": 3})
    config = read_json(moe / "config.json") | WRITTEN
    config |= {"virtual_group_size": 1} if target == SHIPPED else {}
    older = ("rope_theta", "rope_scaling")
    write_json(moe / "config.json", {k: v for k, v in config.items() if k not in older})
    tensors = read_tensors(moe)
    router = next(name for name in tensors if re.search(r"\.1\..*gate\.weight", name))
    tensors[router][5] *= 1.5
    for name, held in tensors.items():
        if ".layers.1." in name and re.search(r"experts\.(5\.w2|5\.down|down)", name):
            (held[5] if held.dim() == 3 else held).mul_(1.5)
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    found = inspect(moe, weights=True, dense=dense, load="builtin")
    assert found.weights is not None
    assert found.load is not None
    assert found.weights.movement is not None
    moved = [distance for layer in found.weights.movement for distance in layer.moved]
    assert [i for i, distance in enumerate(moved) if distance] == [13]
    assert 0.1 < moved[13] < 0.5
    assert [layer.split_groups for layer in found.weights.movement] == [0, 1]
    assert [sum(layer.load) for layer in found.load.layers] == [4 * found.load.tokens] * 2


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_to_shipped_code_is_merged_by_that_code(
    llama: Path, tmp_path: Path, task: str | None
) -> None:
    """peft names the class of the base where it was given no task, else nothing but its path."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    wanted = Recipe(expansion=2, granularity=1, top_k=1)
    convert(llama, base, wanted, target="upcycled")
    adapter.mkdir()
    library = "transformers_modules.base.cbb8e9bf.modeling_upcycled"
    mapping = None if task else {"parent_library": library}
    where = str(base) if task else "org/base"
    held = {"peft_type": "LORA", "task_type": task, "auto_mapping": mapping}
    write_json(adapter / "adapter_config.json", held | {"base_model_name_or_path": where})
    told = assert_refused(invoke("inspect", adapter), f"the code that {where} ships")
    assert f'M.from_pretrained("{where}", dtype="auto", trust_remote_code=True)' in told
    held["auto_mapping"] = {"parent_library": "transformers.models.mixtral.modeling_mixtral"}
    write_json(adapter / "adapter_config.json", held | {"base_model_name_or_path": where})
    assert "trust_remote_code" not in invoke("inspect", adapter).stderr


def test_an_adapter_is_no_model(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "it's mine"
    adapter.mkdir()
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, adapter / "adapter_model.safetensors"
    )
    words = [f"{adapter} is an adapter", "merge_and_unload()"]
    for held, base in (({"base_model_name_or_path": "org/moe"}, '"org/moe"'), ({}, '"MODEL"')):
        write_json(adapter / "adapter_config.json", {"peft_type": "LORA", **held})
        for command in (
            ("inspect", adapter, "--weights"),
            ("verify", llama, adapter),
            ("convert", adapter, tmp_path / "out", "--recipe", "E2G1T1"),
        ):
            assert_refused(invoke(*command), *words, base)
    assert "add trust_remote_code=True after dtype" in invoke("inspect", adapter).stderr
    write_json(adapter / "config.json", {"model_type": "llama"})
    (adapter / "training_args.bin").write_bytes(b"")
    assert_refused(invoke("inspect", adapter), *words)
