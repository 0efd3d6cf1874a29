"""Weights that stay in their files."""

from __future__ import annotations

import pytest  # noqa: TC002 - as in other tests
import torch
from torch.nn import functional

from upcycle_cli.run import lazy_weights
from upcycle_cli.run.lazy_weights import Stored


def test_stored_weights_compute_like_the_tensors_they_stand_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lazy_weights, "_BLOCK", 20)  # several blocks, across the border of pieces
    generator = torch.Generator().manual_seed(0)
    whole, bias = torch.randn(12, 8, generator=generator), torch.randn(12, generator=generator)
    seen: list[torch.Tensor] = []
    stored = Stored((whole[:5], whole[5:]), torch.float32, seen.append)
    inputs = torch.randn(3, 8, generator=generator)
    wanted = functional.linear(inputs, whole, bias)
    assert torch.allclose(functional.linear(inputs, stored, bias), wanted)  # type: ignore[arg-type]
    assert [tuple(each.shape) for each in seen] == [(3, 8), (3, 12)]
    product = torch.addmm(torch.zeros(8), torch.ones(3, 12), stored)  # type: ignore[call-overload]
    assert torch.allclose(product, whole.sum(0).expand(3, 8), atol=1e-5)
    assert torch.equal(stored.block(3, 7)[:], whole[3:7])
    one = Stored((whole,), torch.float32)
    ids = torch.tensor([[3, 3], [11, 0]])
    assert torch.equal(functional.embedding(ids, one), whole[ids])  # type: ignore[arg-type]
    rounded = Stored((whole,), torch.bfloat16)
    assert torch.equal(rounded[2], whole[2].bfloat16().float())
    assert stored.shape == (12, 8)
    assert stored.T.shape == (8, 12)
