"""A conversion that is resumed uses the calibration that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import contents

from upcycle_cli import Recipe, convert
from upcycle_cli.api import Request, carry_out
from upcycle_cli.calibrate import collect
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit

RECIPE = Recipe(
    expansion=4,
    granularity=2,
    top_k=4,
    router_init=RouterInit.BALANCED,
    neuron_order=NeuronOrder.CLUSTERED,
)


class _KilledError(BaseException):
    pass


class _Kill(Hooks):
    def advance(self, num_bytes: int) -> None:
        raise _KilledError(num_bytes)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "moe"
    return convert(llama, output, RECIPE, verify=True).output


@pytest.mark.parametrize(
    ("spoil", "runs"),
    [
        (lambda data: data, 0),
        (lambda _: b"not what was written", 1),
    ],
)
def test_a_calibration_runs_again_only_if_it_is_damaged(
    llama: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[bytes], bytes],
    runs: int,
) -> None:
    request = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE, verify=True)
    with pytest.raises(_KilledError):
        carry_out(request, hooks=_Kill())
    cached = tmp_path / "moe.partial" / ".upcycle-calibration"
    cached.write_bytes(spoil(cached.read_bytes()))
    found, calibrate = [], collect.calibrate

    def counted(*arguments: Any) -> Calibration:  # noqa: ANN401
        found.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(collect, "calibrate", counted)
    done = carry_out(request)
    assert len(found) == runs
    assert contents(done.output) == contents(undisturbed)
    # Verification takes the calibration that convert has run, and runs none of its own.
    assert done.report is not None
    assert done.report.passed
    assert carry_out(replace(request, verify=False)).already_done
    assert len(found) == runs
