"""Reading mergekit's files, and files of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from shapes import tiny_config, write_hollow

from upcycle_cli import Recipe, UpcycleError, build_plan, open_checkpoint
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.merge import Merge
from upcycle_cli.plan.texts import read_mergekit, read_prompts

CONTENT = {
    "base_model": "a",
    "experts": [
        {"source_model": name, "positive_prompts": [f"for {name}"], "negative_prompts": ["no"]}
        for name in ("b", "c")
    ],
}


def save(path: Path, content: object) -> Path:
    file = path / "m.yml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"recipe": "E2G1T2", "experts_from": ["b", "c"], "source_experts": False}),
        ({"gate_mode": "random"}, {"router_init": "normal"}),
        ({"gate_mode": "uniform_random"}, {"router_logit_std": "0.57735"}),
        ({"experts_per_token": 1, "dtype": "float16"}, {"recipe": "E2G1T1", "dtype": "float16"}),
        ({"architecture": "qwen3"}, {"target": "qwen3_moe"}),
        ({"base_model": "org/a@main"}, {"source": "org/a", "revision": "main"}),
        ({"base_model": "org/a@main+l@v1"}, {"source": "org/a@main+l@v1"}),
    ],
    ids=str,
)
def test_read_a_file_as_options(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    file = save(tmp_path, CONTENT | changes)
    found = read_mergekit(file)
    assert options.items() <= found.items()
    assert ("positive_prompts" in found) == ("gate_mode" not in changes)


def experts(**changes: object) -> dict[str, Any]:
    return CONTENT | {"experts": [{"source_model": "b", "positive_prompts": ["x"]} | changes]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "not YAML"),
        ({**CONTENT, "gate_mode": "cheap_embed"}, "gate_mode is 'cheap_embed'"),
        ({**CONTENT, "shared_experts": [{"source_model": "b"}]}, "shared_experts"),
        ({**CONTENT, "architecture": "qwen"}, "architecture is 'qwen'"),
        ({**CONTENT, "dtype": "int8"}, "dtype is 'int8'"),
        ({**CONTENT, "merge_method": "slerp"}, "merge_method"),
        ({**CONTENT, "experts_per_token": 0}, "experts_per_token"),
        ({**CONTENT, "experts": []}, "experts must be"),
        ({**CONTENT, "base_model": None}, "base_model"),
        (experts(noise_scale=0.1), "experts[0].noise_scale"),
        (experts(residual_scale=0.5), "experts[0].residual_scale"),
        (experts(source_model={}), "experts[0].source_model"),
        (experts(weight=1), "experts[0].weight"),
    ],
    ids=str,
)
def test_refuse_what_means_something_else_here(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        read_mergekit(save(tmp_path, content))
    assert words in caught.value.message


def test_refuse_files_without_prompts(tmp_path: Path) -> None:
    for content, words in (
        (["a"], "no prompts for models"),
        ({"b": [1]}, "positive_prompts of b must be a list of texts"),
        ({"b": {"negative_prompts": ["x"]}}, "of b must be a list of texts"),
        ({"b": {"positive": ["x"]}}, "'positive'"),
    ):
        with pytest.raises(UpcycleError, match=words):
            read_prompts(save(tmp_path, content))


def test_negative_prompts_change_the_digest(tmp_path: Path) -> None:
    first = read_prompts(save(tmp_path, CONTENT)).digest
    plain = {name: [f"for {name}"] for name in ("b", "c")}
    assert read_prompts(save(tmp_path, plain)).digest != first


@pytest.mark.parametrize(
    ("content", "recipe", "init", "words"),
    [
        ({"dense": ["x"]}, "E2G1T1", "prompts", "has no prompts for b"),
        ({"dense": ["x"], "b": ["y"], "z": ["z"]}, "E2G1T1", "prompts", "has prompts for z"),
        ({"dense": ["x"], "b": ["y"]}, "E4G1T1", "prompts", "4 router rows need as many models"),
        ({"dense": ["x"], "b": ["y"]}, "E2G1T1", "balanced", "`router_init` is balanced"),
        (None, "E2G1T1", "prompts", "without `positive_prompts`"),
    ],
    ids=str,
)
def test_refuse_prompts_that_do_not_fit(
    tmp_path: Path, content: object, recipe: str, init: str, words: str
) -> None:
    paths = (write_hollow(tmp_path / name, tiny_config("llama")) for name in ("dense", "b"))
    models = [open_checkpoint(path) for path in paths]
    inputs = Inputs(text=None if content is None else read_prompts(save(tmp_path, content)))
    merge = Merge(others=(models[1],), cycle=(0, 1))
    with pytest.raises(UpcycleError) as caught:
        build_plan(Recipe(recipe, router_init=init), models[0], inputs=inputs, merge=merge)
    assert words in f"{caught.value.message} {caught.value.hint}"
    if recipe == "E2G1T1" and init == "prompts":
        with pytest.raises(UpcycleError):  # prompts need several models
            build_plan(Recipe(recipe, router_init=init), models[0], inputs=inputs)
