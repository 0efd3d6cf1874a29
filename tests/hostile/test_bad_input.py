"""What a user can get wrong: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import clone, contents
from refusals import assert_refused, invoke, save_tensors

if TYPE_CHECKING:
    from refusals import Refuses


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("hello"), "is not a directory"),
        (lambda path: path.symlink_to("nowhere"), "does not exist"),
        (Path.mkdir, "has no config.json"),
    ],
)
def test_refuse_a_source_that_is_no_directory_of_a_model(
    refuses: Refuses, tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / "dense")
    refuses(tmp_path / "dense", words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "E999999999G999999999T999999999"), ["experts per layer", "4096"]),
        (("--recipe", "E2G2T3"), ["not a multiple of granularity 2", "2 or 4", "--allow-inexact"]),
        (("--recipe", "E2G5T5"), ["48 is not divisible by granularity 5", "4 or 6"]),
        (("-r", "E2G2T2", "--scaling=abc"), ["exact, paper, none, measured or a number"]),
        (("-r", "E2G2T2", "--scaling=1e308"), ["infinite"]),
        # Infinite weights, or zeros that would tie every group.
        (("-r", "E2G2T2", "--router-logit-std=1e300"), ["overflow float32"]),
        (("-r", "E2G2T2", "--router-logit-std=1e-300"), ["cannot hold"]),
        (("-r", "E2G2T2", "--max-shard-size=0.1B"), ["positive"]),
        (
            ("-r", "E2G2T2", "--routing", "softmax-topk", "--target", "mixtral"),
            ["no softmax-topk routing", "--target qwen2_moe"],
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_refuse_options(
    llama: Path, refuses: Refuses, arguments: tuple[str, ...], words: list[str]
) -> None:
    refuses(llama, *words, arguments=arguments)


# Other commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect ABSENT", "does not exist"),
        ("inspect MOE --recipe E2G2T2", "mixture of experts already"),
        ("inspect DENSE --weights", "--weights"),
        ("inspect MOE --weights --dense MOE", "mixture of experts"),
        ("verify ABSENT MOE", "absent"),
        ("verify DENSE ABSENT", "absent"),
        ("verify DENSE DENSE", "llama"),
        ("verify DENSE MOE --prompts EMPTY", "empty"),
        ("demo FULL", "exists and is not empty"),
        ("demo EMPTY", "empty"),
    ],
)
def test_refuse_arguments_of_other_commands(
    llama: Path, e2g2t2: Path, tmp_path: Path, command: str, words: str
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    places = {"DENSE": llama, "MOE": e2g2t2, "ABSENT": tmp_path / "absent"}
    places |= {"EMPTY": tmp_path / "empty", "FULL": tmp_path / "full"}
    assert_refused(invoke(*(str(places.get(word, word)) for word in command.split())), words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_local_experts": value} for value in ("4", 0, None, 3, 8)),
        *({"num_experts_per_tok": value} for value in ([2], -1, 9)),
        *({"num_hidden_layers": value} for value in ("2", 5, None)),
    ],
    ids=json.dumps,
)
def test_refuse_to_inspect_an_moe_whose_config_is_wrong(
    e2g2t2: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    broken = clone(e2g2t2, tmp_path / "moe", **changes)
    assert_refused(invoke("inspect", broken, "--weights"))


def test_refuse_to_read_quantised_experts(e2g2t2: Path, tmp_path: Path) -> None:
    broken = clone(e2g2t2, tmp_path / "moe")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_tensors(broken, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert invoke("inspect", broken).exit_code == 0
    assert_refused(invoke("inspect", broken, "--weights"), name, "I8")
