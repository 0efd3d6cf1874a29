"""What `upcycle families` lists, and which targets a model can become."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import sizes_of
from find_families import OTHERS, unknown
from shapes import tiny_config

from upcycle_cli import UpcycleError
from upcycle_cli.models import engines as software
from upcycle_cli.models.defaults import table
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import (
    FUSED,
    SCALED,
    Support,
    Traits,
    engines,
    trainers,
    usual_attention,
)
from upcycle_cli.models.lookup import REFUSED, dense_family, shipped_target, targets_of
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.overview import becomes, families, only, target_rows
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout, Routing

ROOT = Path(__file__).parents[2]


def test_every_causal_language_model_of_transformers_was_looked_at() -> None:
    """`python tests/find_families.py` lists the others."""
    assert unknown() == set()
    assert not OTHERS & {*DENSE, *REFUSED}
    assert not DENSE.keys() & REFUSED.keys()
    assert f"[{len(DENSE)} model types]" in (ROOT / "README.md").read_text("utf-8")
    for model_type, reason in REFUSED.items():
        with pytest.raises(UpcycleError, match=f"{model_type}' cannot be upcycled: {reason}"):
            dense_family({"model_type": model_type})


def test_the_overview_lists_every_row() -> None:
    found = families()
    assert (found.dense.keys(), found.refused) == (DENSE.keys(), REFUSED)
    inside = (texts for wrapped in found.wrappers.values() for texts in wrapped.values())
    targets = {name for names in (*found.dense.values(), *inside) for name in names}
    assert targets == {target.name for target in found.targets}
    # Every target was tested in a trainer, and in an engine other than transformers, but for two.
    assert all(target.trainers for target in found.targets)
    untested = {target.name for target in found.targets if {*target.engines} == {"transformers"}}
    assert untested == {"qwen3_5_moe_text", SHIPPED}


def test_a_wrapper_has_its_own_answers() -> None:
    every = families()
    engines = {name: {*only(every, name).targets[0].engines} for name in ("llama", "smolvlm")}
    assert "llama.cpp" in engines["llama"]
    assert engines["smolvlm"] == {"transformers"}
    default, single = (dict(next(only(every, name).tables())) for name in ("janus", "opt"))
    assert default == {"llama in janus": ["can become mixtral (default), qwen2_moe, upcycled"]}
    assert single == {"opt": ["can become upcycled"]}


def test_a_models_own_config_decides_what_it_can_become() -> None:
    tied = becomes({**tiny_config("qwen3"), "tie_word_embeddings": True}, ())
    some = {"torchtitan", "NeMo AutoModel"}
    assert [{*target.trainers} & some for target in tied[:2]] == [{"torchtitan"}, set()]
    odd = becomes({**tiny_config("llama"), "head_dim": 24, "mlp_bias": True}, ())
    said = [
        any("--untie-embeddings" in line for _, lines in target_rows(found) for line in lines)
        for found in (tied, odd)
    ]
    assert said == [True, False]
    assert "experts have none" in dict(target_rows(odd))["mixtral"][0]
    wide = "head_dim × heads ≠ hidden size"
    assert [target.attention for target in odd if not target.refusal] == [wide]
    for share, attention in ((0.5, f"{wide}, partial rotary"), (1.0, wide)):
        config = {"model_type": "glm", **sizes_of("glm"), "head_dim": 24}
        found = becomes({**config, "partial_rotary_factor": share}, ())
        assert found[0].attention.removeprefix("attention biases, ") == attention


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


def test_a_model_like_llama_3_1_gets_answers_for_its_rope_scaling() -> None:
    found = becomes({**tiny_config("llama"), "rope_scaling": LLAMA3}, ())
    for target in found:
        assert target.attention == "llama3 rope scaling"
        others = {each.name: each for each in (*target.other_engines, *target.other_trainers)}
        for name in ("vLLM", "TRL"):
            is_able = name in {**target.engines, **target.trainers}
            assert is_able or others[name].cause in ("every dense model type", target.attention)
    lines = dict(target_rows(found))["mixtral"]
    assert lines[-1] == "attention: llama3 rope scaling"


def test_advice_names_a_target_that_the_software_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine computes something else for the first target, and the same for another one."""
    attention = software.attention_part("llama3 rope scaling")
    verdicts = {"mixtral": software.DIFFERS, "qwen2_moe": software.SAME}
    faked = {
        **table("engines"),
        "targets": {
            target: {"MLX": {**dict.fromkeys(Routing, software.SAME), attention: verdict}}
            for target, verdict in verdicts.items()
        }
        | {software.ALL_SHIPPED: {}},
    }
    monkeypatch.setattr(software, "table", lambda n: faked if n == "engines" else table(n))
    mixtral, *_ = becomes({**tiny_config("llama"), "rope_scaling": LLAMA3}, ())
    assert mixtral.advice == ("MLX: With `--target qwen2_moe` it computes the same.",)
    runs, *_ = dict(target_rows([mixtral]))["mixtral"][2:]
    assert "MLX: loads, computes something else with llama3 rope scaling" in runs


@pytest.mark.parametrize("name", [name for name, row in DENSE.items() if row.targets])
def test_the_default_target_runs_in_most_engines_and_is_explained(name: str) -> None:
    family = DENSE[name]
    text = (ROOT / "docs" / "evidence" / "decisions.md").read_text("utf-8")
    section = text.split("## Which target is the default")[1].split("\n## ")[0]
    reasons = [reason.partition(":") for reason in section.split("\n- ")]
    (why,) = (why for who, _, why in reasons if name in re.findall(r"\w+", who))
    assert family.targets[0] in why or family.targets == (name,)

    def counted(target: str) -> tuple[int, bool, int]:
        native = target in NATIVE
        row = NATIVE[target] if native else shipped_target(family, "silu", biased=False)
        fused = row.layout(None) is ExpertLayout.FUSED
        properties = [*[FUSED] * fused, *[SCALED] * (row.keys.scale is not None)]
        traits = Traits(row.routings[0], properties, usual_attention(row))
        runs, trains = engines(row.title, traits), trainers(row, traits)
        numbers = [sum(each.support is Support.RUNS for each in one) for one in (runs, trains)]
        return numbers[0], native, numbers[1]

    # Targets after shipped code came later, and never are the default.
    targets = targets_of(family)
    first = targets[: targets.index(SHIPPED) + 1] if SHIPPED in targets else targets
    assert counted(targets[0]) == max(map(counted, first))
