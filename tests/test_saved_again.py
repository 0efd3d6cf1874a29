"""Converted models that something else has saved again: their other forms are the same models.

The installed transformers saves them here. What transformers 4.57 writes was looked at once, with
4.57.6: the same tensors under the same names, and a config without the tokens that are null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, clone, read_json, read_tensors, write_json
from safetensors.torch import save_file

from upcycle_cli import Recipe, convert, inspect, verify
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import Routing

Tensors = dict[str, torch.Tensor]
CHECKS = ("structure", "weights", "outputs")


@pytest.fixture(scope="module")
def converted(
    make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A dense model, and what it is converted to; read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(target: str) -> tuple[Path, Path]:
        if target not in made:
            model_type = next(name for name, row in DENSE.items() if target in row.targets)
            dense, moe = make_dense(model_type), tmp_path_factory.mktemp(target) / "moe"
            able = NATIVE[target].routings
            routing = able[-1] if able[0] is Routing.SOFTMAX_TOPK else able[0]
            recipe = Recipe(expansion=2, granularity=2, top_k=2, routing=routing)
            convert(dense, moe, recipe, target=target)
            made[target] = dense, moe
        return made[target]

    return make


def saved(moe: Path, again: Path, **how: Any) -> Path:  # noqa: ANN401
    """Let transformers load a model and save it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(moe).save_pretrained(again, **how)
    return again


def assert_as_good(dense: Path, moe: Path, again: Path) -> None:
    found, before = inspect(again), inspect(moe)
    for name in ("model_type", "num_experts", "top_k", "routing", "moe_layers", "total_parameters"):
        assert getattr(found, name) == getattr(before, name), name
    report = verify(dense, again, checks=CHECKS)
    assert report.passed, report
    # There is no record beside it: whoever reads it goes by the config and the tensors alone.
    assert found.record is None


@pytest.mark.parametrize("target", NATIVE)
def test_saved_by_the_installed_transformers(
    converted: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str
) -> None:
    dense, moe = converted(target)
    again = saved(moe, tmp_path / "again")
    assert read_tensors(again).keys() == read_tensors(moe).keys()
    assert_as_good(dense, moe, again)


@pytest.mark.parametrize("target", NATIVE)
def test_saved_by_the_names_in_memory(
    converted: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str
) -> None:
    """As transformers 5 writes it when told to: a tensor for all experts of a layer."""
    dense, moe = converted(target)
    again = saved(moe, tmp_path / "again", save_original_format=False)
    alone = len(NATIVE[target].layouts) == 1  # what it is on disk it is in memory
    assert (read_tensors(again).keys() == read_tensors(moe).keys()) is alone
    assert_as_good(dense, moe, again)
    assert inspect(again).expert_layout == "fused"


def _released(*parts: str) -> Callable[[Tensors], Tensors]:
    """Give the tensors whose names have one of the parts those of released checkpoints."""

    def rename(tensors: Tensors) -> Tensors:
        return {
            name.replace("model.", "backbone.", 1) if any(p in name for p in parts) else name: held
            for name, held in tensors.items()
        }

    return rename


def _both(tensors: Tensors) -> Tensors:
    return _released("")(tensors) | tensors


def _swap(tensors: Tensors) -> Tensors:
    one, other = (f"model.layers.{layer}.norm.weight" for layer in (0, 1))
    return tensors | {one: tensors[other], other: tensors[one]}


@pytest.mark.parametrize(
    ("damage", "caught"),
    [
        (dict, ""),
        (_released("embeddings"), "structure weights"),
        (_released(".experts."), "structure weights"),
        (_released("gate.weight"), "structure weights"),
        (_released("norm", "embeddings", "_proj.weight"), "structure weights"),
        (_both, "structure weights"),
        (lambda t: {n: held for n, held in t.items() if "norm_f" not in n}, "structure weights"),
        (lambda t: t | {"model.norm.weight": t["model.norm_f.weight"]}, "structure weights"),
        (_swap, "weights"),
    ],
    ids=("intact", "embedding", "experts", "routers", "most", "both", "missing", "extra", "swap"),
)
def test_names_in_memory_are_held_to_it(
    converted: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    damage: Callable[[Tensors], Tensors],
    caught: str,
) -> None:
    """Of the one architecture whose released names begin in another way."""
    dense, moe = converted("nemotron_h")
    again = saved(moe, tmp_path / "again", save_original_format=False)
    tensors = {name: held.clone() for name, held in damage(read_tensors(again)).items()}
    save_file(tensors, again / "model.safetensors", metadata={"format": "pt"})
    for check in ("structure", "weights"):
        assert verify(dense, again, checks=[check]).passed == (check not in caught), check


@pytest.mark.parametrize("max_shard_size", ["20KB"])
@pytest.mark.parametrize("target", NATIVE)
def test_saved_in_other_shards_and_another_order(
    converted: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str, max_shard_size: str
) -> None:
    dense, moe = converted(target)
    again = saved(moe, tmp_path / "again", max_shard_size=max_shard_size)
    assert len([*again.glob("*.safetensors")]) > 1
    assert_as_good(dense, moe, again)


ALIASED = [(name, alias) for name, row in NATIVE.items() for alias in row.keys.aliases]


@pytest.mark.parametrize(("target", "alias"), ALIASED)
def test_the_number_of_experts_by_another_name(
    converted: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str, alias: str
) -> None:
    """Releases of transformers have renamed it more than once."""
    from transformers import AutoConfig

    dense, moe = converted(target)
    key = NATIVE[target].keys.num_experts
    again = clone(moe, tmp_path / "again")
    (again / "upcycle.json").unlink()
    config = read_json(again / "config.json")
    write_json(again / "config.json", {**_without(config, key), alias: config[key]})
    reads = getattr(AutoConfig.from_pretrained(again), key) == config[key]
    assert inspect(again).num_experts == config[key]
    if reads:  # else this transformers has no such alias, and says so
        assert_as_good(dense, moe, again)
    else:
        assert not verify(dense, again, checks=["structure"]).passed


@pytest.mark.parametrize("target", [name for name in NATIVE if name != "nemotron_h"])
def test_as_transformers_4_writes_it(
    converted: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str
) -> None:
    """It does not know nemotron_h."""
    dense, moe = converted(target)
    again = clone(moe, tmp_path / "again")
    (again / "upcycle.json").unlink()
    config = read_json(again / "config.json")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    nulls = [key for key in tokens if config[key] is defaults_of(target)[key] is None]
    written = {**_without(config, *nulls), "transformers_version": "4.57.6"}
    write_json(again / "config.json", dict(sorted(written.items())))
    assert_as_good(dense, moe, again)


def _without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}
