"""How facts of engines are combined; tests/interoperability holds each to what was measured."""

from __future__ import annotations

import pytest

from upcycle_cli.models import engines as known
from upcycle_cli.models.defaults import table
from upcycle_cli.models.engines import (
    DIFFERS,
    FAILS,
    FUSED,
    SAME,
    TIED,
    Engine,
    Support,
    Traits,
    attention_part,
    engines,
    support_lines,
    trainers,
)
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import Routing

TOPK, SOFTMAX = Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK
MEASURED = {
    TOPK: SAME,
    SOFTMAX: DIFFERS,
    FUSED: FAILS,
    TIED: SAME,
    attention_part("plain"): SAME,
    attention_part("llama3 rope scaling"): DIFFERS,
    attention_part("QK norm, sliding window"): SAME,
    attention_part("QK norm, llama3 rope scaling"): SAME,
    attention_part("yarn rope scaling"): FAILS,
}
"""What is known of vLLM and NeMo AutoModel with mixtral, in these tests."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    software = dict.fromkeys(("transformers 5", "vLLM", "MLX", "NeMo AutoModel"), "1.0")
    found = {"vLLM": MEASURED, "NeMo AutoModel": MEASURED, "MLX": {}}
    faked = {"software": software, "targets": {"mixtral": found, known.ALL_SHIPPED: {}}}
    monkeypatch.setattr(known, "table", lambda name: faked if name == "engines" else table(name))


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("traits", "words"),
    [
        (Traits(TOPK), "runs"),
        (Traits(TOPK, {TIED}), "runs"),
        (Traits(TOPK, {FUSED}), "needs --expert-layout per-expert"),
        (Traits(SOFTMAX), "loads, computes something else with softmax-topk routing"),
        (Traits(Routing.SIGMOID_TOPK), "not tried with sigmoid-topk routing"),
        (Traits(TOPK, {known.SHARED}), "not tried with a shared expert"),
        (
            Traits(TOPK, attention="llama3 rope scaling"),
            "loads, computes something else with llama3 rope scaling",
        ),
        (Traits(TOPK, attention="yarn rope scaling"), "does not load it with yarn rope scaling"),
        # A model with more properties fails like one with fewer, unless it was measured.
        (
            Traits(TOPK, attention="llama3 rope scaling, soft caps"),
            "loads, computes something else with llama3 rope scaling",
        ),
        (Traits(TOPK, attention="QK norm, llama3 rope scaling"), "runs"),
        # Success with two properties says nothing of one of them.
        (Traits(TOPK, attention="QK norm"), "not tried with QK norm"),
        (
            Traits(TOPK, {known.SHARED}, "QK norm, soft caps"),
            "not tried with a shared expert and QK norm and soft caps",
        ),
    ],
)
def test_support_follows_from_what_was_measured(traits: Traits, words: str) -> None:
    first, *others = engines("mixtral", traits)
    assert (first.name, first.support, first.version) == ("transformers", Support.RUNS, "1.0")
    # Of MLX only a failure of the machine is known, which says nothing.
    assert {each.name: each.words for each in others} == {
        "transformers 4": "not tried",
        "vLLM": words,
        "llama.cpp": "not tried",
    }
    learns = {each.name: each for each in trainers(NATIVE["mixtral"], traits)}
    assert learns.keys() == {"transformers", "TRL", "peft", "NeMo AutoModel"}
    assert learns["NeMo AutoModel"].words == words
    assert (learns["TRL"].words, learns["TRL"].version) == ("not tried", None)


def test_the_verb_agrees_with_the_number_of_engines() -> None:
    rows = (("vLLM", "RUNS"), ("MLX", "WRONG"), ("llama.cpp", "REFUSES"), ("lm-eval", "REFUSES"))
    assert support_lines(Engine(name, Support[support]) for name, support in rows) == [
        "vLLM",
        "MLX: loads, computes something else",
        "llama.cpp, lm-eval: do not load it",
    ]
