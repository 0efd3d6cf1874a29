"""What the names of tiny models state holds, and matters to what they compute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interop.conclusions import parts_of
from interop.conversions import documented
from interop.models import REAL, ROW_TOKENS, make_model, properties_of, settings_of
from interop.trained import TOKENS, VOCABULARY

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

CASES = [case for case in documented() if not case.wrapper and case.dense != REAL]
NAMES = sorted({case.dense for case in CASES})
SIZES = {"hidden_size", "head_dim", "num_attention_heads", "tie_word_embeddings"}
"""Who ignores one of these cannot load the tensors, or has them all."""
MATTERS = 1e-2
"""Ten times what log-probabilities may differ by."""


def logprobs(model: Any) -> Any:  # noqa: ANN401
    """Return those of rows as long as those that engines get."""
    ids_BT = torch.randint(
        1, VOCABULARY, (2, ROW_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits_BTV = model.eval()(ids_BT).logits.float()
    return logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])


@pytest.mark.parametrize("name", [name for name in NAMES if properties_of(name)])
def test_what_a_name_states_matters(name: str) -> None:
    model, (kind, *_) = make_model(name, TOKENS), name.split(maxsplit=1)
    for each in properties_of(name):
        rest = ", ".join(other for other in properties_of(name) if other != each)
        other = f"{kind} ({rest})" if rest else kind
        if any(settings_of(name).get(key) != settings_of(other).get(key) for key in SIZES):
            continue
        ignoring = make_model(other, TOKENS)
        ignoring.load_state_dict(model.state_dict(), strict=False)
        assert (logprobs(model) - logprobs(ignoring)).abs().max() > MATTERS, each


@pytest.mark.parametrize("name", [name for name in NAMES if "longrope" in name])
def test_rows_are_longer_than_the_original_length(name: str) -> None:
    model = make_model(name, TOKENS)
    before, rope = logprobs(model), model.model.rotary_emb
    rope.long_inv_freq.copy_(rope.original_inv_freq)
    assert (logprobs(model) - before).abs().max() > MATTERS


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_norms_matter(name: str) -> None:
    model = make_model(name, TOKENS)
    before = logprobs(model)
    for part, value in (("norm.weight", 1.0), ("norm.weight", 0.0), (".bias", 0.0)):
        found = {key: tensor for key, tensor in model.state_dict().items() if part in key}
        changed = {key: torch.full_like(tensor, value) for key, tensor in found.items()}
        model.load_state_dict(changed, strict=False)
        if changed:
            assert (logprobs(model) - before).abs().max() > MATTERS, part
        model.load_state_dict(found, strict=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_name_states_of_attention_holds(case: Any) -> None:  # noqa: ANN401
    *_, attention = parts_of(case)
    stated = {each for each in properties_of(case.dense) if "rope" in each or "window" in each}
    stated |= {"head_dim × heads ≠ hidden size"} & {*properties_of(case.dense)}
    found = {*attention.partition(": ")[2].split(", ")}
    assert stated <= found
    assert {each for each in found if each.endswith("rope scaling")} <= stated
