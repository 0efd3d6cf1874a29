"""Several dense models in one mixture of experts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from conftest import (
    REMOVED,
    MakeDense,
    RunOnHub,
    clone,
    contents,
    read_json,
    read_tensors,
    snapshot,
    validate_json,
    write_json,
)
from engine_fixtures import execute
from refusals import invoke
from safetensors.torch import load_file, save_file

from upcycle_cli import (
    MergeRequest,
    Options,
    Recipe,
    UpcycleError,
    convert,
    open_checkpoint,
    verify,
)
from upcycle_cli.api import Conversion
from upcycle_cli.plan.merge import NonExpertWeights
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import RouterInit
from upcycle_cli.verification.result import CheckResult

if TYPE_CHECKING:
    from hub.server import Hub

Tensors = dict[str, torch.Tensor]
INTERMEDIATE = 48
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


def edit(path: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def models(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one shape, with names of their own. Read only."""
    path, made = tmp_path_factory.mktemp("models"), range(3)
    sources = [make_dense("llama", dtype="bfloat16", seed=seed) for seed in made]
    return [clone(source, path / name) for source, name in zip(sources, "abc", strict=True)]


def merged(models: Sequence[Path], output: Path, **options: Any) -> Conversion:  # noqa: ANN401
    """Convert several models, each of which gives one expert."""
    recipe = Recipe(expansion=len(models), granularity=1, top_k=1)
    return convert(
        models[0], output, recipe, merge=MergeRequest(experts_from=models[1:]), **options
    )


def weights_of(models: Sequence[Path], moe: Path, **options: Any) -> CheckResult:  # noqa: ANN401
    first, *others = models
    report = verify(first, moe, experts_from=others, checks=["weights"], **options)
    return report.checks[0]


# Experts of several models -----------------------------------------------------------------------


@pytest.mark.parametrize("rest", NonExpertWeights)
def test_each_virtual_group_comes_from_its_model(
    models: list[Path], tmp_path: Path, rest: NonExpertWeights
) -> None:
    before = [snapshot(model) for model in models]
    convert(
        models[0],
        tmp_path / "moe",
        Recipe("E6G2T2"),
        merge=MergeRequest(experts_from=models[1:], rest=rest),
    )
    assert [snapshot(model) for model in models] == before
    dense, moe = [read_tensors(model) for model in models], read_tensors(tmp_path / "moe")
    half = INTERMEDIATE // 2
    for layer in range(2):
        for expert in range(12):
            group, shard = divmod(expert, 2)
            of, rows = dense[group % 3], slice(shard * half, (shard + 1) * half)
            prefix = f"model.layers.{layer}.mlp."
            gate, up = (of[f"{prefix}{n}_proj.weight"][rows] for n in ("gate", "up"))
            down = of[f"{prefix}down_proj.weight"][:, rows]
            for name, wanted in {"w1": gate, "w3": up * 2, "w2": down}.items():
                assert torch.equal(moe[EXPERT.format(layer, expert, name)], wanted)
    for name in dense[0].keys() & moe.keys():
        wanted = dense[0][name]
        if rest is NonExpertWeights.MEAN:
            total = dense[0][name].float() + dense[1][name].float() + dense[2][name].float()
            wanted = (total / 3).to(torch.bfloat16)
            assert not torch.equal(wanted, dense[0][name])
        assert torch.equal(moe[name], wanted)
    assert weights_of(models, tmp_path / "moe").status == "passed"


def test_the_source_need_not_give_experts(models: list[Path], tmp_path: Path) -> None:
    named = [models[2], models[1], models[2]]
    merge = MergeRequest(experts_from=named, source_too=False)
    convert(models[0], tmp_path / "moe", Recipe("E3G1T2"), merge=merge)
    moe = read_tensors(tmp_path / "moe")
    for expert, model in enumerate(named):
        up = read_tensors(model)["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(moe[EXPERT.format(1, expert, "w3")], up)
    assert read_json(tmp_path / "moe" / "upcycle.json")["experts_from"]["groups"] == [1, 2, 1]
    assert weights_of(models, tmp_path / "moe").status == "passed"


def test_one_model_by_other_names_is_one_model(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(models[0])
    recipe = Recipe("E2G1T1")
    merge = MergeRequest(experts_from=[tmp_path / "link", models[0]])
    done = convert(models[0], tmp_path / "merged", recipe, merge=merge)
    assert done.plan.merge is None
    assert done.plan.promise == "exact"
    convert(models[0], tmp_path / "plain", recipe)
    assert contents(tmp_path / "merged") == contents(tmp_path / "plain")


# Models that do not fit ---------------------------------------------------------------------------


def _more_tokens(path: Path) -> None:
    content = read_json(path / "tokenizer.json")
    content["model"]["vocab"]["zz"] = 999
    write_json(path / "tokenizer.json", content)


REFUSED: dict[str, tuple[dict[str, Any] | Callable[[Path], object], tuple[str, ...]]] = {
    "family": ({"model_type": "mistral"}, ("is a mistral, but", "one family")),
    "rope": ({"rope_parameters": {"rope_theta": 5e5}}, ("rope_theta is 500000.0", "10000.0")),
    "norm": ({"rms_norm_eps": 1e-3}, ("rms_norm_eps is 0.001",)),
    "heads": ({"num_key_value_heads": 4}, ("shape",)),
    "moe": ({"model_type": "mixtral", "num_local_experts": 4}, ("mixture of experts already",)),
    "tokens": (_more_tokens, ("the tokenizers differ: zz is 999 in", "but 'missing' in")),
    "no tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), ("not a valid tokenizer",)),
    "dtype": (
        lambda p: edit(p, lambda t: t.update({n: x.float() for n, x in t.items()})),
        ("is F32 in", "BF16", "`dtype`"),
    ),
    "lacks": (lambda p: edit(p, lambda t: t.pop("model.norm.weight")), ("lacks model.norm",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuse_a_model_of_another_kind(models: list[Path], tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    other = clone(models[1], tmp_path / "other", **(change if isinstance(change, dict) else {}))
    if not isinstance(change, dict):
        change(other)
    with pytest.raises(UpcycleError) as caught:
        merged([models[0], other], tmp_path / "moe")
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.glob("moe*"))


def test_keys_that_no_forward_pass_reads_may_differ(models: list[Path], tmp_path: Path) -> None:
    changes = {"eos_token_id": 7, "max_position_embeddings": 999, "use_cache": REMOVED}
    other = clone(models[1], tmp_path / "other", **changes)
    assert merged([models[0], other], tmp_path / "moe").published


def test_write_into_no_source(models: list[Path], tmp_path: Path) -> None:
    other = clone(models[1], tmp_path / "other")
    before = snapshot(other)
    for output in (other, other / "moe", tmp_path):
        with pytest.raises(UpcycleError, match="source"):
            merged([models[0], other], output, overwrite=True)
        assert snapshot(other) == before


# Safety ------------------------------------------------------------------------------------------


def plan_of(models: Sequence[Path], expansion: int = 2) -> Plan:
    first, *others = models
    source = open_checkpoint(first)
    merge = MergeRequest(experts_from=others).open(source)
    recipe = Recipe(expansion=expansion, granularity=1, top_k=1)
    return build_plan(recipe, source, options=Options(max_shard_bytes=20_000), merge=merge)


def test_refuse_an_expansion_that_does_not_fit(models: list[Path]) -> None:
    with pytest.raises(UpcycleError, match="4 is not a multiple of the 3 models"):
        plan_of(models, expansion=4)


def test_the_digest_covers_every_source(models: list[Path], tmp_path: Path) -> None:
    other = clone(models[1], tmp_path / "other")
    shutil.copystat(models[1] / "model.safetensors", other / "model.safetensors")
    first = plan_of([models[0], other]).digest
    assert plan_of([models[0], other]).digest == first
    os.utime(other / "model.safetensors", ns=(1, 1))
    assert plan_of([models[0], other]).digest != first
    assert plan_of([models[0], models[1]]).digest != plan_of([models[0], models[2]]).digest


def test_refuse_a_model_that_changes_meanwhile(models: list[Path], tmp_path: Path) -> None:
    other = clone(models[1], tmp_path / "other")
    plan = plan_of([models[0], other])
    os.utime(other / "model.safetensors", ns=(1, 1))
    with pytest.raises(UpcycleError, match="changed"):
        execute(plan, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


# The command line --------------------------------------------------------------------------------


def test_models_on_the_hub(hub: Hub, run: RunOnHub, models: list[Path], tmp_path: Path) -> None:
    commits = [hub.store.upload(f"acme/{name}", m) for name, m in zip("abc", models, strict=True)]
    others = ["--experts-from", f"acme/b@{commits[1]}", "--experts-from", "acme/c"]
    said = run("convert", "acme/a", "out", "-r", "E3G1T2", "--rest", "mean", *others).stderr
    assert "acme/a, acme/b, acme/c" in " ".join(said.split())
    assert f"--experts-from acme/c@{commits[2]}" in " ".join(said.split())
    recorded = read_json(tmp_path / "out" / "upcycle.json")["experts_from"]
    assert [each["revision"] for each in recorded["models"]] == commits[1:]
    assert (recorded["groups"], recorded["rest"]) == ([0, 1, 2], "mean")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == ["acme/a", "acme/b", "acme/c"]
    assert front["base_model_relation"] == "merge"
    run("verify", "acme/a", "out", *others, "--checks", "directory,weights", "--allow-inexact")


def test_inherit_no_licence_that_differs(models: list[Path], tmp_path: Path) -> None:
    other = clone(models[1], tmp_path / "other")
    (other / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    done = merged([models[0], other], tmp_path / "moe")
    assert "license" not in yaml.safe_load((tmp_path / "moe/README.md").read_text().split("---")[1])
    assert any("cc-by-nc-4.0" in note for note in done.plan.card_metadata.notes)
    card = (tmp_path / "moe/README.md").read_text()
    assert f"made from `{models[0].name}` and `other` with upcycle: their MLPs" in card
    assert f"| experts from | groups of {models[0].name}: 0; of other: 1 |" in card
    same = merged(models[:2], tmp_path / "same")
    assert same.plan.card_metadata.values["license"] == "apache-2.0"


# Prompts and mergekit's files --------------------------------------------------------------------

PROMPTS = (
    ["Once upon a time there was a king.", "She walked along the river, slowly."],
    ["def f(x): return x + 1", "for (int i = 0; i < n; i++) {}"],
    ["1 + 2 = 3, and 4 * 5 = 20", "7 - 3 = 4"],
)


def test_router_rows_are_made_of_the_prompts(models: list[Path], tmp_path: Path) -> None:
    """Each row is a mean of transformers' own hidden states, without what all prompts share."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "prompts.yml"
    file.write_text(yaml.safe_dump(dict(zip((m.name for m in models), PROMPTS, strict=True))))
    dense = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    seen: list[torch.Tensor] = []
    dense.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    means, every = [], []
    for prompts in PROMPTS:
        seen.clear()
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                dense(ids)
        means.append(torch.stack([each.mean(0) for each in seen]).mean(0))
        every += seen
    inputs_PH, rows_EH = torch.cat(every).double(), torch.stack(means).double()
    rows_EH = rows_EH - rows_EH.mean(0)
    common_H = inputs_PH.mean(0) / inputs_PH.mean(0).norm()
    rows_EH = rows_EH - (rows_EH @ common_H)[:, None] * common_H
    rows_EH = rows_EH / (inputs_PH @ rows_EH.T).std(0, correction=0)[:, None]
    done = convert(
        models[0],
        tmp_path / "moe",
        Recipe("E3G2T2", router_init=RouterInit.PROMPTS),
        options=Options(dtype="float32"),
        merge=MergeRequest(experts_from=models[1:]),
        positive_prompts=file,
        verify=True,
    )
    assert done.published
    router = read_tensors(tmp_path / "moe")["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(router[::2], router[1::2])
    assert torch.allclose(router[::2].double(), rows_EH, rtol=1e-3, atol=1e-4)


def mergekit_file(path: Path, models: Sequence[Path], **changes: object) -> Path:
    experts = [
        {"source_model": str(model), "positive_prompts": prompts}
        for model, prompts in zip(models, PROMPTS, strict=False)
    ]
    content = {"base_model": str(models[0]), "experts": experts, "dtype": "bfloat16"} | changes
    path.write_text(yaml.safe_dump(content))
    return path


def test_convert_by_a_mergekit_file(models: list[Path], tmp_path: Path) -> None:
    """Router rows made of three prompts can lie in few directions, which verify must accept."""
    file = mergekit_file(tmp_path / "moe.yml", models)
    command = ("convert", str(tmp_path / "moe"), "--from-mergekit", str(file))
    done = invoke(*command, "--verify", "--json")
    assert done.exit_code == 0, done.stderr
    found = validate_json("convert", done.stdout)
    assert (found["recipe"], found["router_init"]) == ("E3G1T2", "prompts")
    assert found["verification"]["status"] == "measured"
    statuses = {check["name"]: check["status"] for check in found["verification"]["checks"]}
    assert "failed" not in statuses.values()
    planned = invoke(*command, "--overwrite", "-T", "3", "--dry-run", "--json")
    assert json.loads(planned.stdout)["recipe"] == "E3G1T3"
    random = mergekit_file(tmp_path / "random.yml", models, gate_mode="random", experts_per_token=1)
    made = invoke("convert", str(tmp_path / "r"), "--from-mergekit", str(random), "--quiet")
    assert made.exit_code == 0, made.stderr
    convert(
        models[0],
        tmp_path / "same",
        Recipe("E3G1T1"),
        options=Options(dtype="bfloat16"),
        merge=MergeRequest(experts_from=models, source_too=False),
    )
    assert contents(tmp_path / "r") == contents(tmp_path / "same")
