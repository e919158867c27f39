"""Examples drawn in proportion to their weights: means keep their expectation."""

import pytest
import torch

import fisher_lab as fl
from fisher_lab.approximations import Columns, drawing
from fisher_lab.statistics import contractions
from tests.helpers import assert_same, random_stats

DRAWS = 2000


def every_draw(weight, n):
    """Draws at equally spaced random numbers, whose mean is their expectation."""
    for k in range(DRAWS):
        yield drawing.draw(weight, n, (k + 0.5) / DRAWS)


def weights(count, spread):
    generator = torch.Generator().manual_seed(count)
    w = torch.rand(count, generator=generator, dtype=torch.float64) ** spread
    return w / w.sum()


@pytest.mark.parametrize("spread", [0, 1, 6])
@pytest.mark.parametrize(("count", "n"), [(9, 8), (30, 8), (30, 1)])
def test_a_draw_keeps_the_expectation_of_every_weight_and_the_sum_of_all(count, n, spread):
    weight = weights(count, spread)
    mean = torch.zeros_like(weight)
    for index, drawn in every_draw(weight, n):
        assert len(set(index.tolist())) == n
        assert index.tolist() == sorted(index.tolist())
        assert float(drawn.sum()) == pytest.approx(1)
        mean[index] += drawn / DRAWS
    # a probability is right up to one of the equally spaced numbers
    largest = float((weight.sum() / n).clamp(min=float(weight.max())))
    torch.testing.assert_close(mean, weight, rtol=1e-4, atol=2 * largest / DRAWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_sure_to_be_drawn_keeps_its_weight(dtype):
    weight = torch.tensor([0.04, 0.5, 0.02, 0.3, 0.04, 0.06, 0.04], dtype=dtype)
    for index, drawn in every_draw(weight, 3):
        assert index.tolist()[0] in (0, 1)
        kept = dict(zip(index.tolist(), drawn.tolist(), strict=True))
        assert kept.pop(1) == pytest.approx(0.5)
        assert kept.pop(3) == pytest.approx(0.3)
        assert list(kept.values()) == [pytest.approx(0.2)]


def test_examples_without_weight_fill_the_places_and_weigh_nothing():
    weight = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    for index, drawn in every_draw(weight, 3):
        assert set(index.tolist()) >= {1, 3}
        assert_same(torch.zeros(5).index_add(0, index, drawn), weight)


def test_a_moving_average_of_few_columns_has_the_expectation_of_that_of_all(monkeypatch):
    """At decay 0.9 the third observation weighs 1/3, and the fifth as much as each before it."""
    few = fl.TENGraD(batch=4)
    batches = [random_stats(seed, N=5, R=2, d_out=2, d_in=3) for seed in range(2)]
    first, second = (few.moments(fl.statistics.Sums(stats)) for stats in batches)
    weight = 0.3
    expected = contractions.dense(first.stats) * (1 - weight)
    expected = expected + contractions.dense(second.stats) * weight
    mean = torch.zeros_like(expected)
    for k in range(DRAWS):
        monkeypatch.setattr(drawing, "number", lambda _, u=(k + 0.5) / DRAWS: u)
        found = first.follow(second, weight)
        assert isinstance(found, Columns)
        assert found.stats.N == 4
        mean += few.assemble(found).dense() / DRAWS
    torch.testing.assert_close(mean, expected, rtol=5e-3, atol=1e-3)


def test_draws_differ_and_can_be_repeated():
    numbers = [drawing.number(k) for k in range(200)]
    assert numbers == [drawing.number(k) for k in range(200)]
    assert len(set(numbers)) == 200
    assert 0.45 < sum(numbers) / 200 < 0.55
