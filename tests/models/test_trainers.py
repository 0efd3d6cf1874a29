"""What is known of trainers, against the table of the documentation that they were tested by."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "interoperability"), str(TESTS.parent / "docs")]

import generate_tables  # noqa: E402
from conftest import clone  # noqa: E402
from interop.conversions import cases  # noqa: E402

from upcycle_cli import convert, inspect  # noqa: E402
from upcycle_cli.models.dense_rows import DENSE  # noqa: E402
from upcycle_cli.models.engines import SILENTLY_WRONG, Support, Traits, trainers  # noqa: E402
from upcycle_cli.models.lookup import native_target  # noqa: E402
from upcycle_cli.models.moe_rows import NATIVE  # noqa: E402
from upcycle_cli.models.wrappers import WRAPPERS, Inside  # noqa: E402
from upcycle_cli.recipe.recipe import Routing  # noqa: E402

DOCS = TESTS.parent / "docs"
REFERENCE = DOCS / "reference"


def inside(wrapper: str) -> Inside:
    return Inside(WRAPPERS[wrapper])


def test_a_wrapped_target_has_settings_of_its_own() -> None:
    rows = [NATIVE["qwen2_moe"]]
    rows += [native_target("qwen2_moe", inside(name)) for name in ("llava", "mistral3")]
    alone, in_llava, in_mistral3 = (
        {trainer.name: trainer for trainer in trainers(row, Traits(Routing.SOFTMAX_TOPK))}
        for row in rows
    )
    assert "applies the balancing loss" in alone["TRL"].settings
    assert "training stops" in in_llava["TRL"].settings
    assert {trainer.support for trainer in in_mistral3.values()} == {Support.NOT_TRIED}


def test_a_trainer_that_was_not_tried_with_llama3_rope_scaling_is_not_said_to_run(
    llama: Path, tmp_path: Path
) -> None:
    """NeMo AutoModel's own glm4_moe computes YaRN for any scaling, without a word."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    dense, moe = clone(llama, tmp_path / "dense", rope_scaling=scaling), tmp_path / "moe"
    convert(dense, moe, "E4G2T4", target="glm4_moe")
    found = {trainer.name: trainer for trainer in inspect(moe).trainers}
    nemo = found["NeMo AutoModel"]
    assert nemo.support in {Support.NOT_TRIED, Support.REFUSES, *SILENTLY_WRONG}
    assert nemo.cause == "llama3 rope scaling"


def test_the_reference_has_every_target_and_setting() -> None:
    assert {*NATIVE, "upcycled"} <= {case.target for case in cases(trainers=True)}
    for name in generate_tables.PAGES:
        page = (DOCS / name).read_text(encoding="utf-8")
        assert page == generate_tables.page(name), "run `python docs/generate_tables.py`"
    assert f"{len(DENSE)} dense model types" in (REFERENCE / "families.md").read_text("utf-8")
