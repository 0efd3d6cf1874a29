"""When two outputs of an engine are the same."""

from __future__ import annotations

import math

import pytest

from upcycle_cli.verification.engines import (
    HESITATION,
    LOW_PRECISION,
    ROUNDING,
    Output,
    compare,
)

TEXT, LATE, EARLY = [*range(32)], [*range(31), 99], [*range(20), 99, *range(21, 32)]
SCORES = [-3.0] * 24
CERTAIN, HESITANT = [3.0] * 32, [*[3.0] * 20, 0.01, *[3.0] * 10, 0.01]
EXACT, AVERAGE = False, True


def texts(*found: list[int], margins: list[float] = CERTAIN) -> Output:
    return {"texts": found, "margins": [margins] * len(found), "logprobs": None}


def scores(*found: list[float]) -> Output:
    return {"texts": [], "margins": [], "logprobs": found}


@pytest.mark.parametrize(
    ("found", "expected", "on_average", "difference"),
    [
        (texts([1, 2], [3, 4]), texts([1, 2], [3, 4]), EXACT, ""),
        (texts([1, 2], [3, 5]), texts([1, 2], [3, 4]), EXACT, "the text after row 1 differs from"),
        (texts([1, 2], [3]), texts([1, 2], [3, 4]), EXACT, "the text after row 1 differs from"),
        (texts([9]), texts([]), EXACT, "the text after row 0 differs from token 0 on"),
        # Log-probabilities may differ by rounding.
        (scores([0.5, -3.0001]), scores([0.5, -3.0]), EXACT, ""),
        (scores([0.5], [0.5, -3.01]), scores([0.5], [0.5, -3.0]), EXACT, "row 1 differ by 0.01"),
        (scores([0.5, math.nan]), scores([0.5, -3.0]), EXACT, "row 0 differ by nan"),
        # Texts may part where the dense model hesitates.
        (texts(LATE), texts(TEXT, margins=HESITANT), EXACT, "the text after row 0 differs"),
        (texts(LATE), texts(TEXT), AVERAGE, "the text after row 0 differs from token 31 on"),
        (texts(LATE), texts(TEXT, margins=HESITANT), AVERAGE, ""),
        (texts(EARLY), texts(TEXT, margins=HESITANT), AVERAGE, "only 20 of 32 tokens of text"),
        (texts(EARLY, TEXT), texts(TEXT, TEXT, margins=HESITANT), AVERAGE, ""),
        (texts(TEXT[:-1]), texts(TEXT, margins=HESITANT), AVERAGE, "the text after row 0 differs"),
        # Approximate ones may differ as far as softmax-topk promises, and one token by more.
        (scores([0.5], [-2.95] * 24), scores([0.5], SCORES), AVERAGE, ""),
        (scores([0.5], [*SCORES[1:], -3.5]), scores([0.5], SCORES), AVERAGE, ""),
        (scores([0.5], [-2.8] * 24), scores([0.5], SCORES), AVERAGE, "by 0.2 on average"),
        (scores([0.5], [math.nan] * 24), scores([0.5], SCORES), AVERAGE, "row 1 differ by nan"),
        # An engine that does not generate has log-probabilities alone.
        (scores([0.5]), {**texts(TEXT), "logprobs": [[0.5]]}, EXACT, ""),
        (scores([0.5]), texts(TEXT), EXACT, "nothing to compare"),
    ],
)
def test_outputs_are_compared(
    found: Output, expected: Output, *, on_average: bool, difference: str
) -> None:
    tolerance = HESITATION if on_average else ROUNDING
    said, _ = compare(found, expected, tolerance, on_average=on_average)
    assert difference in said
    assert bool(difference) == bool(said)


def test_texts_may_part_earlier_in_low_precision() -> None:
    early, late = texts([1, 9, 9], margins=[3.0, 0.9, 3.0]), texts([1, 9, 9], margins=[3.0] * 3)
    assert not compare(texts([1, 2, 3]), early, LOW_PRECISION, on_average=True)[0]
    assert compare(texts([1, 2, 3]), late, LOW_PRECISION, on_average=True)[0]
    assert compare(scores([-0.7]), scores([-1.0]), LOW_PRECISION, on_average=True)[0]


def test_the_largest_and_the_mean_difference_are_measured() -> None:
    _, found = compare(scores([0.5, 1.0], [0.0]), scores([0.5, 0.0], [0.5]))
    assert (found["logprob_diff_mean"], found["logprob_diff_max"]) == (0.5, 1.0)
