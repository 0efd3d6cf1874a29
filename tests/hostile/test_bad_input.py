"""What a user can get wrong: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import clone, contents
from refusals import assert_refused, invoke
from verified import edit_tensors

COMMANDS: tuple[tuple[str, str], ...] = (
    # a command line, words of the message
    ("convert FILE OUT -r E2G2T2", "is not a directory"),
    ("convert DANGLING OUT -r E2G2T2", "does not exist"),
    ("convert FOLDER OUT -r E2G2T2", "has no config.json"),
    ("convert org/model OUT -r E2G2T2", "neither a directory nor complete in the cache"),
    ("convert org/model OUT -r E2G2T2", "hf download org/model"),
    ("convert DENSE OUT -r E999999999G999999999T999999999", "experts per layer|4096"),
    ("convert DENSE OUT -r E2G2T3", "not a multiple of granularity 2|2 or 4|--allow-inexact"),
    ("convert DENSE OUT -r E2G5T5", "48 is not divisible by granularity 5|4 or 6"),
    ("convert DENSE OUT -r E2G2T2 --scaling=abc", "exact, paper, none, measured, a number"),
    ("convert DENSE OUT -r E2G2T2 --scaling=1e308", "infinite"),
    # Infinite weights, or zeros that would tie every group.
    ("convert DENSE OUT -r E2G2T2 --router-logit-std=1e300", "overflow float32"),
    ("convert DENSE OUT -r E2G2T2 --router-logit-std=1e-300", "cannot hold"),
    ("convert DENSE OUT -r E2G2T2 --max-shard-size=0.1B", "positive"),
    ("convert DENSE OUT -r E2G2T2 --routing softmax-topk --target mixtral", "--target qwen2_moe"),
    ("convert DENSE OUT -r E2G2T2 --workers=-1", "--workers must be 0 or more"),
    ("inspect ABSENT", "does not exist"),
    ("inspect MOE --recipe E2G2T2", "mixture of experts already"),
    ("inspect DENSE --weights", "--weights"),
    ("inspect MOE --weights --dense MOE", "mixture of experts"),
    ("verify ABSENT MOE", "absent does not exist|dense model"),
    ("verify DENSE BEGUN", "begun does not exist; |begun.partial holds an unfinished"),
    ("push ABSENT my-org/x", "absent does not exist"),
    ("verify DENSE DENSE", "llama"),
    ("verify DENSE MOE --prompts FILE", "is empty"),
    ("demo FULL", "exists and is not empty"),
    ("demo FILE", "file"),
)


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_refuse_arguments(
    llama: Path, e2g2t2: Path, tmp_path: Path, command: str, words: str
) -> None:
    places = {name: tmp_path / name.lower() for name in ("FILE", "FOLDER", "FULL", "DANGLING")}
    places |= {name: tmp_path / name.lower() for name in ("OUT", "ABSENT", "BEGUN")}
    places |= {"DENSE": llama, "MOE": e2g2t2}
    places["FILE"].write_text("")
    places["DANGLING"].symlink_to("nowhere")
    for name in ("FOLDER", "FULL"):
        places[name].mkdir()
    (places["FULL"] / "thesis.tex").write_text("years of work")
    (tmp_path / "begun.partial").mkdir()
    before = contents(tmp_path)
    result = invoke(*(str(places.get(word, word)) for word in command.split()))
    assert_refused(result, *words.split("|"))
    assert contents(tmp_path) == before
    assert not places["OUT"].exists()


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
    edit_tensors(broken, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert invoke("inspect", broken).exit_code == 0
    assert_refused(invoke("inspect", broken, "--weights"), name, "I8")
