"""BASE+ADAPTER as a source and as a model of a merge, to the verified MoE."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml  # type: ignore[import-untyped]
from adapters import ADAPTER_WEIGHTS, edit_adapter_config, make_adapter
from conftest import MakeDense, RunOnHub, clone, contents, read_json, read_tensors, snapshot
from refusals import invoke
from safetensors.torch import load_file, save_file

from upcycle_cli import MergeRequest, Options, Recipe, UpcycleError, convert, verify
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.hub.remote_checkpoint import open_source
from upcycle_cli.plan.texts import ModelPrompts

if TYPE_CHECKING:
    import torch
    from hub.server import Hub

ALL = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model under a name of its own. Read only."""
    return clone(make_dense("llama", dtype="bfloat16"), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the base. Read only."""
    path = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(base, path / name, target_modules=ALL, seed=seed)
        for seed, name in enumerate(("code", "law"))
    ]


def weights_of(source: Checkpoint) -> dict[str, torch.Tensor]:
    with source.reader() as reader:
        return {name: reader.tensor(name).contiguous() for name in source.tensors}


def merged(base: Path, adapter: Path, path: Path) -> Path:
    """A directory with the tensors of BASE+ADAPTER."""
    tensors = weights_of(open_source(f"{base}+{adapter}"))
    shutil.copytree(base, path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def weights(path: Path) -> dict[str, str]:
    return {name: data for name, data in contents(path).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_convert_a_model_with_its_adapter(
    base: Path, adapters: list[Path], tmp_path: Path, dtype: str | None
) -> None:
    """All three checks pass, and the weights are those of the merged model."""
    before, source = [snapshot(path) for path in (base, adapters[0])], f"{base}+{adapters[0]}"
    recipe, options = Recipe("E2G2T2", neuron_order="shuffled"), Options(dtype=dtype)
    done = convert(source, tmp_path / "moe", recipe, options=options, verify=True)
    assert done.report is not None
    assert done.report.status == "passed"
    assert [snapshot(path) for path in (base, adapters[0])] == before
    if dtype is None:  # otherwise the merged model is rounded twice
        dense = merged(base, adapters[0], tmp_path / "dense")
        convert(dense, tmp_path / "same", recipe, options=options)
        assert weights(tmp_path / "moe") == weights(tmp_path / "same")
    record = read_json(tmp_path / "moe" / "upcycle.json")["source"]
    assert record["name"] == "base+code"
    assert record["adapter"]["files"][0]["name"] == "adapter_model.safetensors"
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "`base` and its adapter `code`" in card
    assert "| adapter | code, LoRA of rank 4, 20 tensors |" in card
    again = convert(source, tmp_path / "moe", recipe, options=options)
    assert again.already_done
    with pytest.raises(UpcycleError, match=r"base\+code, not from .*one of them has an adapter"):
        verify(base, tmp_path / "moe")
    report = verify(f"{base}+{adapters[1]}", tmp_path / "moe", checks=["weights"])
    assert report.status == "failed"
    assert "or made from another model or adapter: " in report.checks[0].failures[0]


@pytest.mark.parametrize("rest", ["first", "mean"])
def test_make_experts_of_adapters(
    base: Path, adapters: list[Path], tmp_path: Path, rest: str
) -> None:
    names = [f"{base}+{adapter}" for adapter in adapters]
    dense = [merged(base, adapter, tmp_path / adapter.name) for adapter in adapters]
    for output, others in (("moe", names), ("same", dense)):
        merge = MergeRequest(experts_from=others, rest=rest)
        done = convert(base, tmp_path / output, "E3G1T2", merge=merge, verify=True)
        left_out = [each for each in done.warnings if "8 tensors of its adapter" in each]
        assert len(left_out) == (2 if (output, rest) == ("moe", "first") else 0)
    found, same = (read_tensors(tmp_path / name) for name in ("moe", "same"))
    differing = {name for name in found if not (found[name] == same[name]).all()}
    # A merged model is rounded before the mean is taken, a computed one is not.
    of_adapters = {name for name in found if "q_proj" in name or "v_proj" in name}
    assert differing == (set() if rest == "first" else of_adapters)
    checks = {"checks": ["directory", "weights"], "allow_inexact": True}
    report = verify(base, tmp_path / "moe", experts_from=names[::-1], **checks)  # type: ignore[arg-type]
    assert report.accepted
    assert all(check.status == "passed" for check in report.checks)
    for wrong, words in (
        ([names[0], names[0]], r"none of the given models is 'base\+law'"),
        ([names[0], dense[1]], r"none of the given models is 'base\+law'"),
        (dense, r"none of the given models is 'base\+code'"),
    ):
        with pytest.raises(UpcycleError, match=words):
            verify(base, tmp_path / "moe", experts_from=wrong, **checks)  # type: ignore[arg-type]


def test_tell_adapters_apart_by_what_they_change(base: Path, tmp_path: Path) -> None:
    """Their configs and headers are equal, and both have the base's gates."""
    names = [
        f"{base}+{make_adapter(base, tmp_path / name, target_modules=['down_proj'], seed=seed)}"
        for seed, name in enumerate(("code", "law"))
    ]
    convert(base, tmp_path / "moe", "E3G1T2", merge=MergeRequest(experts_from=names), verify=True)
    with pytest.raises(UpcycleError, match=r"none of the given models is 'base\+law'"):
        verify(base, tmp_path / "moe", experts_from=[names[0], names[0]], allow_inexact=True)
    dense = [merged(base, tmp_path / name, tmp_path / f"{name}-whole") for name in ("code", "law")]
    convert(base, tmp_path / "same", "E3G1T2", merge=MergeRequest(experts_from=dense), verify=True)


def test_one_base_is_several_models(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """A mergekit file names a base with adapters; prompts may name the adapter alone."""
    names = [f"{base}+{adapter}" for adapter in adapters]
    prompts = [["def f(x): return x"], ["the party of the first part"], ["once upon a time"]]
    experts = [
        {"source_model": name, "positive_prompts": each}
        for name, each in zip([*names, str(base)], prompts, strict=True)
    ]
    file = tmp_path / "moe.yml"
    file.write_text(yaml.safe_dump({"base_model": str(base), "experts": experts}))
    done = invoke("convert", str(tmp_path / "moe"), "--from-mergekit", str(file), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["experts_from"]["groups"] == [1, 2, 0]
    assert read_json(tmp_path / "moe" / "upcycle.json")["calibration"]["text"] == "moe.yml"
    file.write_text(yaml.safe_dump(dict(zip(("code", "base+law", "base"), prompts, strict=True))))
    convert(
        base,
        tmp_path / "same",
        Recipe("E3G1T2", router_init="prompts"),
        merge=MergeRequest(experts_from=[*names, base], source_too=False),
        positive_prompts=file,
    )
    assert weights(tmp_path / "moe") == weights(tmp_path / "same")


def test_prompts_of_a_base_with_a_plus_in_its_name(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    place = clone(base, tmp_path / "a+b")
    source = open_source(f"{place}+{adapters[0]}")
    for name, fits in (
        (f"{place}+{adapters[0]}", True),
        ("a+b+code", True),
        ("code", True),
        ("a+b", False),
        (f"{place}+{adapters[1]}", False),
        (f"{base}+{adapters[0]}", False),
    ):
        assert ModelPrompts(name, ()).means(source) is fits


def test_calibrate_a_model_with_its_adapter(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    dense = merged(base, adapters[0], tmp_path / "dense")
    recipe = Recipe("E4G1T2", router_init="balanced", neuron_order="sliced")
    convert(f"{base}+{adapters[0]}", tmp_path / "moe", recipe, verify=True)
    convert(dense, tmp_path / "same", recipe)
    assert weights(tmp_path / "moe") == weights(tmp_path / "same")


def test_repos_with_revisions(
    hub: Hub, run: RunOnHub, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """Each side has its own revision; what is recorded and shown leads back to both commits."""
    files = shutil.copytree(adapters[0], tmp_path / "code", ignore=lambda *_: ["merged"])
    (files / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    commits = [hub.store.upload("acme/base", base), hub.store.upload("acme/code", files)]
    edit_adapter_config(files, r=99)
    hub.store.upload("acme/code", files)  # main is unusable now
    source = f"acme/base+acme/code@{commits[1]}"
    inspected = " ".join(run("inspect", source).stdout.split())
    assert "acme/code, LoRA of rank 4, 20 tensors" in inspected
    said = " ".join(
        run("convert", source, "out", "-r", "E2G1T1", "--save-config", "c.toml").stderr.split()
    )
    pinned = f"acme/base@{commits[0]}+acme/code@{commits[1]}"
    assert f"upcycle verify {pinned}" in said
    assert f'source = "{pinned}"' in (tmp_path / "c.toml").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == ["acme/base", "acme/code"]
    assert "license" not in front  # theirs differ
    assert f"tree/{commits[1]}" in card
    record = read_json(tmp_path / "out" / "upcycle.json")["source"]
    assert [record["revision"], record["adapter"]["revision"]] == commits
    run("verify", source, "out", "--checks", "directory,weights")
    run("verify", f"{base}+{adapters[0]}", "out", "--checks", "directory,weights")
    run("verify", pinned, "out", "--checks", "directory,weights", HF_HUB_OFFLINE="1")
    assert "(99, 48)" in run("inspect", "acme/base+acme/code", expect=2).stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_refuse_values_that_are_not_finite(
    base: Path, adapters: list[Path], tmp_path: Path, value: float
) -> None:
    adapter = shutil.copytree(adapters[0], tmp_path / "lora")
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0] = value
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(UpcycleError, match=r"not finite.*layers\.1\.mlp\.up_proj"):
        convert(f"{base}+{adapter}", tmp_path / "moe", "E2G1T1")
    assert not (tmp_path / "moe").exists()


def test_an_adapter_that_changes_is_another_model(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """While it is read that is an error; later the output is no longer this command's."""
    adapter = shutil.copytree(adapters[0], tmp_path / "lora")
    source = open_source(f"{base}+{adapter}")
    convert(f"{base}+{adapter}", tmp_path / "moe", "E2G1T1")
    os.utime(adapter / ADAPTER_WEIGHTS, ns=(1, 1))
    for check in (source.check_unchanged, lambda: weights_of(source)):
        with pytest.raises(UpcycleError, match=r"lora/adapter_model\.safetensors changed"):
            check()
    with pytest.raises(UpcycleError, match="exists and is not empty"):
        convert(f"{base}+{adapter}", tmp_path / "moe", "E2G1T1")
    edit_adapter_config(adapter, lora_alpha=9)
    with pytest.raises(UpcycleError, match=r"lora/adapter_config\.json changed"):
        replace(source.base_and_adapter[1], shards=()).check_unchanged()


def test_write_into_no_adapter(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(adapters[0], tmp_path / "lora")
    before = snapshot(adapter)
    for output, words in (
        (adapter, "was not made by upcycle"),
        (adapter / "moe", "is the source or inside it"),
        (tmp_path, "was not made by upcycle"),
    ):
        with pytest.raises(UpcycleError, match=words):
            convert(f"{base}+{adapter}", output, "E2G1T1", overwrite=True)
    assert snapshot(adapter) == before
