"""Router rows that are fitted to inputs, and orders of neurons, by numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from upcycle_cli import Recipe, UpcycleError
from upcycle_cli.calibrate.fitting import balanced, centroids, clustered_order, loads, prompted
from upcycle_cli.write.random_draws import standard_normal

Array = np.ndarray[Any, Any]


def draw(stream: str, shape: tuple[int, int]) -> Array:
    return standard_normal(0, stream, shape)


def wanted(rows: int, chosen: int) -> Recipe:
    return Recipe(expansion=rows, granularity=1, top_k=chosen)


@pytest.mark.parametrize("chosen", [1, 4])
def test_fitted_rows_have_a_balanced_load(chosen: int) -> None:
    generator, (P, H, E) = np.random.RandomState(0), (3000, 64, 32)

    def inputs() -> Array:
        # As a norm's output: most of it in a few dimensions that hardly vary.
        held = generator.standard_normal((P, H))
        held[:, :3] = [20, -9, 5] + held[:, :3] * [3, 2, 1]
        return held

    seen, unseen = inputs(), inputs()
    drawn_E = loads(unseen @ draw("router", (E, H)).T, chosen)
    for fit, share in ((balanced, 0.25), (centroids, 0.5)):
        rows_EH = fit(seen, wanted(E, chosen), "router", draw)
        load_E = loads(unseen @ rows_EH.T, chosen)
        assert load_E.std() < share * drawn_E.std()
        assert load_E.min() > 0
        assert np.allclose((seen @ rows_EH.T).std(0), 1.0)
        assert np.abs(rows_EH @ seen.mean(0)).max() < 1e-9


def test_an_unlucky_draw_is_repeated() -> None:
    inputs_PH = np.random.RandomState(0).standard_normal((500, 16))
    streams = []

    def unlucky(stream: str, shape: tuple[int, int]) -> Array:
        streams.append(stream)
        drawn = standard_normal(0, stream, shape)
        if stream == "router":
            drawn[2:] = drawn[1]  # the first of equal rows takes all tokens
        return drawn

    load_E = loads(inputs_PH @ balanced(inputs_PH, wanted(4, 1), "router", unlucky).T, 1)
    assert "router.1" in streams
    assert load_E.min() > 0.25 * load_E.mean()


def test_rows_of_prompts_see_what_tells_their_prompts_apart() -> None:
    inputs_PH = np.random.RandomState(0).standard_normal((90, 16)) + 10
    inputs_PH[:30, 0] += 5
    inputs_PH[30:60, 1] += 5
    weights_EP = np.kron(np.eye(3), np.full(30, 1 / 30))
    rows_EH = prompted(inputs_PH, weights_EP, wanted(3, 1), "router")
    chosen_P = (inputs_PH @ rows_EH.T).argmax(1)
    assert (chosen_P[:60] == np.repeat([0, 1], 30)).mean() > 0.9


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (np.ones((100, 16)), "same input"),
        (np.full((100, 16), np.nan), "not finite"),
        (np.random.RandomState(0).standard_normal((3, 16)), "need 4 tokens"),
    ],
)
def test_inputs_that_no_rows_fit(inputs: Array, words: str) -> None:
    with pytest.raises(UpcycleError, match=words):
        centroids(inputs, wanted(4, 1), "router", draw)


def planted() -> tuple[Array, Array, Array]:
    """Inputs of four kinds, and neurons of which each is three times as active on one of them."""
    generator = np.random.RandomState(0)
    kind_P, kind_I = generator.randint(4, size=800), generator.permutation(np.arange(48) % 4)
    centres = 3 * generator.standard_normal((4, 32))
    inputs_PH = 5 + centres[kind_P] + generator.standard_normal((800, 32))
    level_PI = np.where(kind_P[:, None] == kind_I, 3.0, 1.0)
    activity_PI = level_PI * generator.uniform(0.5, 1.5, (800, 48))
    return inputs_PH, activity_PI.astype(np.float32), kind_I


def test_neurons_that_act_together_share_a_shard_and_the_most_active_comes_first() -> None:
    inputs_PH, activity_PI, kind_I = planted()
    activity_PI[:, kind_I == 2] *= 1.4
    order = clustered_order(inputs_PH, activity_PI, 4, "order", draw)
    assert sorted(order) == list(range(48))
    shards = order.reshape(4, 12)
    assert all(len({*kind_I[shard]}) == 1 for shard in shards)
    assert {*kind_I[shards[0]]} == {2}
    assert (np.diff(shards) > 0).all()
    assert (np.diff(activity_PI.mean(0)[shards].mean(1)) <= 0).all()


@pytest.mark.parametrize("silent", [20, 48])
@pytest.mark.parametrize("granularity", [1, 3, 48])
def test_silent_and_equal_neurons_are_assigned_too(granularity: int, silent: int) -> None:
    inputs_PH, activity_PI, _ = planted()
    activity_PI[:, 20:30] = 1
    activity_PI[:, :silent] = 0
    order = clustered_order(inputs_PH, activity_PI, granularity, "order", draw)
    assert sorted(order) == list(range(48))
    assert granularity > 1 or (order == np.arange(48)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activity_that_is_not_finite_is_refused(value: float) -> None:
    inputs_PH, activity_PI, _ = planted()
    activity_PI[3, 7] = value
    with pytest.raises(UpcycleError, match="not finite"):
        clustered_order(inputs_PH, activity_PI, 4, "order", draw)
