"""Files of router rows and of neuron orders: used as they are, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, read_tensors
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import Recipe, UpcycleError, build_plan, open_checkpoint, verify
from upcycle_cli.plan.inputs import Inputs

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
INNER = 48
Tensors = Mapping[str, torch.Tensor]


def write(path: Path, kind: str, shape: tuple[int, int], more: Tensors | None = None) -> Path:
    """Write random rows, or orders of neurons that change nothing, and other tensors."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(2, *shape, generator=generator)
    if kind == "neuron_order":
        made = torch.arange(shape[1]).repeat(2, shape[0], 1)
    tensors = {f"layers.{layer}.{kind}": made[layer].clone() for layer in range(2)} | {
        **(more or {})
    }
    save_file({name: held for name, held in tensors.items() if held.dim() < 3}, path)
    return path


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (4, 32)), ("bfloat16", (8, 32))])
def test_rows_of_a_file_are_taken_as_they_are(
    make_dense: MakeDense, tmp_path: Path, dtype: str, shape: tuple[int, int]
) -> None:
    """One row for each group, or one for each expert without virtual groups."""
    dense, moe, grouped = make_dense("llama", dtype=dtype), tmp_path / "moe", shape[0] == 4
    file = write(tmp_path / "rows.safetensors", "router", shape)
    options = [] if grouped else ["--no-virtual-groups"]
    command: list[str | Path] = ["convert", dense, moe, "-r", "E4G2T4", *options]
    command.append("--router-init")
    result = invoke(*command, file, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["router_init"], told["router_logit_std"]) == ("file", None)
    given, made = read_tensors(file.parent), read_tensors(moe)
    for layer in range(2):
        wanted = given[f"layers.{layer}.router"].to(getattr(torch, dtype))
        wanted = wanted.repeat_interleave(2, 0) if grouped else wanted
        assert torch.equal(made[ROUTER.format(layer)], wanted)
    report = verify(dense, moe, router_init=file, allow_inexact=not grouped)
    assert report.accepted, report.to_json()
    more = {"layers.1.router": torch.eye(*shape)}
    other = write(tmp_path / "other.safetensors", "router", shape, more)
    assert_refused(invoke(*command, other), str(moe))  # another file is another output


NEAR = torch.ones(4, 32) + torch.arange(4.0)[:, None] * 1e-4
EVEN = torch.arange(INNER)
Row = tuple[str, tuple[int, int], Tensors, dict[str, Any], str]


def rows(words: str, *, shape: tuple[int, int] = (4, 32), **more: Any) -> Row:  # noqa: ANN401
    named = {f"layers.{name[1:]}.router": more.pop(name) for name in [*more] if name[0] == "_"}
    return "router", shape, named, more, words


def orders(words: str, **more: torch.Tensor) -> Row:
    named = {f"layers.{name[1:]}.neuron_order": held for name, held in more.items()}
    return "neuron_order", (4, INNER), named, {}, words


@pytest.mark.parametrize(
    ("kind", "shape", "more", "options", "words"),
    [
        rows("has shape [3, 32], not [4, 32]", shape=(3, 32)),
        rows("has shape [8, 32], not [4, 32]", shape=(8, 32)),
        rows("layers.2.router belongs to no MoE layer", _2=torch.eye(4, 32)),
        rows("layers.1.router belongs to no MoE layer", layers="0", target="qwen2_moe"),
        rows("layers.1.router has equal rows", _1=torch.ones(4, 32)),
        # Rows that are equal, or zero, once they are rounded to the dtype of the model.
        rows("layers.1.router, as bfloat16, has equal rows", _1=NEAR, dtype="bfloat16"),
        rows("as float16, has a row of zeros", _1=torch.eye(4, 32) * 1e-9, dtype="float16"),
        rows("as float16, holds values that are not finite", _1=NEAR * 1e5, dtype="float16"),
        rows("not finite", _1=torch.eye(4, 32) * torch.nan),
        rows("zeros", _1=torch.eye(4, 32) * torch.arange(4.0)[:, None]),
        rows("is I32 of shape [4]", _1=torch.ones(4, dtype=torch.int32)),
        orders("is not a permutation", _0=torch.cat([EVEN[:1], EVEN[:1], EVEN[2:]])),
        orders("is not a permutation", _0=EVEN + 1),
        orders("layers.0.neuron_order, group 1", _0=torch.stack([EVEN, EVEN * 0])),
        orders("F32", _0=EVEN.float()),
        orders("shape [0]", _0=EVEN[:0]),
        orders("lacks layers.1.neuron_order", _1=torch.zeros(1, 1, 1)),  # is left out
        orders("has shape [2, 48], not [48] or [4, 48]", _0=torch.stack([EVEN, EVEN])),
        orders("has shape [9], not [48] or [4, 48]", _0=torch.arange(9)),
    ],
    ids=str,
)
def test_refuse_files_that_do_not_fit(
    make_dense: MakeDense,
    tmp_path: Path,
    kind: str,
    shape: tuple[int, int],
    more: Tensors,
    options: dict[str, Any],
    words: str,
) -> None:
    dense = open_checkpoint(make_dense("llama", dtype=options.pop("dtype", "float32")))
    file, target = write(tmp_path / "file", kind, shape, more), options.pop("target", "auto")
    names = {"router": ("router_init", "rows"), "neuron_order": ("neuron_order", "orders")}
    option, argument = names[kind]
    recipe = Recipe("E4G2T4", **options | {option: "file"})
    with pytest.raises(UpcycleError) as caught:
        build_plan(recipe, dense, target=target, inputs=Inputs.read(**{argument: file}))
    assert words in " ".join(str(caught.value).split())


def test_refuse_a_file_without_its_option_and_the_reverse(llama: Path, tmp_path: Path) -> None:
    dense = open_checkpoint(llama)
    given = Inputs.read(orders=write(tmp_path / "o", "neuron_order", (3, INNER)))
    shuffled = Recipe("E3G2T4", neuron_order="shuffled")
    from_file = Recipe("E3G2T4", router_init="file")
    with pytest.raises(UpcycleError, match="shuffled, with a file of neuron orders"):
        build_plan(shuffled, dense, inputs=given)
    with pytest.raises(UpcycleError, match="file, without a file of router rows"):
        build_plan(from_file, dense)
    result = invoke("convert", llama, tmp_path / "moe", "-r", "E4G2T4", "--router-init", "balance")
    assert_refused(result, "balance", "normal, balanced, centroids")
