"""Router rows of a file: taken as they are, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import MakeDense, read_tensors
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import verify

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
Options = list[str | Path]


def rows(path: Path, shape: tuple[int, int], more: Mapping[str, torch.Tensor]) -> Path:
    generator = torch.Generator().manual_seed(3)
    made = {f"layers.{layer}.router": torch.randn(shape, generator=generator) for layer in (0, 1)}
    save_file({**made, **more}, path)
    return path


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (4, 32)), ("bfloat16", (8, 32))])
def test_rows_of_a_file_are_taken_as_they_are(
    make_dense: MakeDense, tmp_path: Path, dtype: str, shape: tuple[int, int]
) -> None:
    """One row for each group, or one for each expert without virtual groups."""
    dense, moe, grouped = make_dense("llama", dtype=dtype), tmp_path / "moe", shape[0] == 4
    file = rows(tmp_path / "rows.safetensors", shape, {})
    options: Options = ["--router-init", file, *([] if grouped else ["--no-virtual-groups"])]
    result = invoke("convert", dense, moe, "-r", "E4G2T4", "--json", *options)
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
    other = rows(tmp_path / "other.safetensors", shape, {"layers.1.router": torch.eye(*shape)})
    refused = invoke("convert", dense, moe, "-r", "E4G2T4", *options[2:], "--router-init", other)
    assert_refused(refused, str(moe))  # another file is another output


def _file(shape: tuple[int, int] = (4, 32), **more: torch.Tensor) -> Callable[[Path], Options]:
    named = {f"layers.{name[1:]}.router": held for name, held in more.items()}
    return lambda path: ["--router-init", rows(path / "rows.safetensors", shape, named)]


def _with(*options: str, **more: torch.Tensor) -> Callable[[Path], Options]:
    return lambda path: [*_file((4, 32), **more)(path), *options]


NEAR = torch.ones(4, 32) + torch.arange(4.0)[:, None] * 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (_file((3, 32)), ["[3, 32]", "[4, 32]"]),
        (_file((8, 32)), ["[8, 32]", "[4, 32]"]),
        (_file(_2=torch.eye(4, 32)), ["layers.2.router", "no layer"]),
        (_file(_1=torch.ones(4, 32)), ["layers.1.router", "equal rows"]),
        # Rows that are equal, or zero, once they are rounded to the output's dtype.
        (_with("--dtype", "bfloat16", _1=NEAR), ["layers.1.router, as bfloat16", "equal rows"]),
        (_with("--dtype", "float16", _1=torch.eye(4, 32) * 1e-9), ["float16", "zeros"]),
        (_file(_1=torch.eye(4, 32) * torch.nan), ["not finite"]),
        (_file(_1=torch.eye(4, 32) * torch.arange(4.0)[:, None]), ["zeros"]),
        (_file(_1=torch.ones(4, dtype=torch.int32)), ["I32"]),
        (_with("--layers", "0", "--target", "qwen2_moe"), ["layers.1.router"]),
        (_with("--router-logit-std", "1"), ["--router-logit-std"]),
        (lambda _: ["--router-init", "balance"], ["balance", "normal, balanced, centroids"]),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    llama: Path, tmp_path: Path, options: Callable[[Path], Options], words: list[str]
) -> None:
    result = invoke("convert", llama, tmp_path / "moe", "-r", "E4G2T4", *options(tmp_path))
    assert_refused(result, *words)
    assert not list(tmp_path.glob("moe*"))
