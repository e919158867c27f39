"""Sums: computed once, on everybody's bill, handed out to keep, freed together."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab.approximations import build
from fisher_lab.statistics import LayerStats, Sums, as_sums, contractions
from tests.helpers import random_orthogonal, random_stats

READ = {
    "left": lambda sums: sums.left(),
    "right": lambda sums: sums.right(),
    "factors": lambda sums: sums.factors("expand")[0],
    "uncorrelated": lambda sums: sums.uncorrelated()[1],
    "modes": lambda sums: sums.modes((2, 4))[2],
    "bias block": lambda sums: sums.bias_block(),
    "squares": lambda sums: sums.squares(),
    "gram": lambda sums: sums.gram(),
    "squared gram": lambda sums: sums.squared_gram(),
}


@pytest.fixture
def stats() -> LayerStats:
    return random_stats(4, "relu", N=5, T=4, R=2, d_out=3, kernel=(2, 2, 2), bias=True)


@pytest.fixture(params=READ)
def read(request) -> Callable[[Sums], torch.Tensor]:
    return READ[request.param]


def test_what_is_handed_out_may_be_worked_on_in_place(stats: LayerStats, read) -> None:
    sums = Sums(stats)
    expected = read(Sums(stats))
    first = read(sums)
    second = read(sums)
    first.mul_(2)
    second.numpy()[...] = 0
    assert torch.equal(read(sums), expected)
    assert torch.equal(read(sums), expected)


def test_a_method_that_works_in_place_harms_no_other() -> None:
    """It doubled every later TKFAC of the layer."""

    class InPlace(fl.Approximation, register=False):
        def moments(self, stats, matrix=None):
            return {"U": stats.left().mul_(2), "V": stats.right().mul_(3)}

        def assemble(self, moments, matrix=None):
            return fl.matrices.Kronecker((moments["U"], moments["V"]))

    stats = random_stats(3, N=6, d_out=3, d_in=4)
    sums = Sums(stats)
    before = build(fl.TN(), sums)
    build(InPlace(), sums)
    expected = build(fl.TKFAC(), stats).dense()
    assert torch.equal(build(fl.TKFAC(), sums).dense(), expected)
    assert torch.equal(before.dense(), build(fl.TN(), stats).dense())


PER_EXAMPLE = {
    "gradients": lambda sums: sums.gradients(),
    "per example": lambda sums: next(sums.per_example()),
    "examples": lambda sums: sums.examples(slice(0, 3)).gradients(),
    "inputs": lambda sums: sums.inputs(slice(0, 2)).gradients(),
}


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("of", PER_EXAMPLE)
def test_gradients_may_be_worked_on_in_place(stats: LayerStats, of: str, explicit: bool) -> None:
    """Where they were formed once for all, everybody got the same tensor."""
    expected = contractions.squares(stats, (None, None))
    if explicit:
        stats = LayerStats.of_gradients(stats.gradients())
    sums = Sums(stats)
    sums.form_gradients(1e9)
    assert sums.stats.formed
    PER_EXAMPLE[of](sums).mul_(3)
    assert torch.allclose(sums.squares(), expected, rtol=1e-12)


class Changes(fl.Approximation, register=False):
    """KFAC, after something was done to the sums, or to the moments."""

    def __init__(self, change, late=False):
        self.change = change
        self.late = late

    def moments(self, sums):
        A, G = sums.factors()
        if self.late:
            return {"A": A, "G": G, "given": self.change(sums)}
        self.change(sums)
        return {"A": A, "G": G}

    def assemble(self, moments):
        if self.late:
            moments["given"].mul_(3)
        return fl.matrices.Kronecker((moments["G"], moments["A"]))

    @property
    def label(self):
        return "Changes"


IN_PLACE = {
    "a": lambda sums: sums.a.mul_(3),
    "g": lambda sums: sums.g.mul_(3),
    "view of g": lambda sums: sums.g[0].zero_(),
    "some examples": lambda sums: sums.examples(slice(0, 3)).g.mul_(3),
    "formed": lambda sums: sums.stats.gradients().mul_(3),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("of", IN_PLACE)
def test_a_method_that_changes_the_statistics_is_refused(stats, of: str, shared: bool) -> None:
    sums = Sums(stats, shared)
    sums.form_gradients(1e9)
    with pytest.raises(ValueError, match=r"^Changes changed the layer's .*work on a copy"):
        build(Changes(IN_PLACE[of]), sums)


def test_moments_may_be_worked_on_in_place_even_where_they_are_the_statistics(stats) -> None:
    sums = Sums(stats)
    expected = stats.g.clone()
    build(Changes(lambda sums: sums.g[:, :2], late=True), sums)
    assert torch.equal(sums.g, expected)


def test_statistics_made_in_inference_mode_are_read_as_any() -> None:
    with torch.inference_mode():
        stats = random_stats(3, N=6, d_out=3, d_in=4)
    build(fl.KFAC(), stats)


def test_a_sum_is_computed_once_and_after_freeing_again(stats: LayerStats, monkeypatch) -> None:
    calls = []
    right = contractions.right
    monkeypatch.setattr(contractions, "right", lambda *given: (calls.append(1), right(*given))[1])
    with Sums(stats) as sums:
        for _ in range(3):
            sums.right()
        assert len(calls) == 1
        assert list(sums.seconds) == ["right"]
        assert sums.form_gradients(1e9)
    assert not sums.seconds
    assert not sums.stats.formed
    sums.right()
    assert len(calls) == 2


def test_with_one_reader_nothing_is_kept_and_nothing_copied(stats: LayerStats, monkeypatch) -> None:
    kept = torch.zeros(1, 3, 3, dtype=torch.float64)
    monkeypatch.setattr(contractions, "left", lambda *_: kept)
    sums = Sums(stats, shared=False)
    assert sums.left() is kept
    sums.squares((torch.eye(3, dtype=torch.float64)[None], None))
    assert not sums.seconds
    assert sums.bases == ()
    assert as_sums(sums) is sums
    assert not as_sums(stats).shared


def test_squares_are_known_by_the_numbers_of_their_basis(stats: LayerStats) -> None:
    sums = Sums(stats)
    left = random_orthogonal(3, 0)[None]
    right = random_orthogonal(9, 0)[None]
    found = sums.squares((left, right))
    assert torch.equal(sums.squares((left.clone(), right.clone())), found)
    assert len(sums.seconds) == 1
    assert not torch.equal(sums.squares((left, None)), found)
    assert not torch.equal(sums.squares((2 * left, right)), found)
    assert len(sums.bases) == 3


def test_sums_answer_for_their_statistics(stats: LayerStats) -> None:
    sums = Sums(stats)
    for name in (
        "a",
        "g",
        "R",
        "N",
        "T",
        "Q",
        "d_in",
        "d_out",
        "shape",
        "dim",
        "kernel",
        "bias",
        "rank_one",
    ):
        assert getattr(sums, name) is getattr(stats, name) or getattr(sums, name) == getattr(
            stats, name
        )
    assert torch.equal(sums.gradients(), stats.gradients())
    assert torch.equal(sums.dense(), contractions.dense(stats))
    assert torch.equal(
        sums.examples(slice(0, 2)).left(), contractions.left(stats.examples(slice(0, 2)))
    )
    assert torch.equal(
        sums.inputs(slice(0, 2)).right(), contractions.right(stats.inputs(slice(0, 2)))
    )
    X = torch.ones(stats.shape, dtype=torch.float64)
    s = sums.project(X)
    assert torch.equal(sums.apply(X), contractions.apply(stats, X))
    assert torch.equal(sums.combine(s), contractions.combine(stats, s))


def test_copies_hold_the_statistics_alone(stats: LayerStats) -> None:
    sums = Sums(stats)
    sums.form_gradients(1e9)
    sums.left()
    again = pickle.loads(pickle.dumps(sums))
    assert torch.equal(again.g, stats.g)
    assert not again.stats.formed
    assert not again.seconds


# -- bills -----------------------------------------------------------------------------------------
SLOW = 0.05


@pytest.fixture
def slow(monkeypatch) -> None:
    """Sums that take their time."""
    for name in ("left", "right", "input_and_gradient_moments", "gram"):
        of = getattr(contractions, name)
        monkeypatch.setattr(
            contractions, name, lambda *given, of=of: (time.sleep(SLOW), of(*given))[1]
        )


def seconds(chosen: list[fl.Approximation]) -> dict[str, float]:
    torch.manual_seed(0)
    comparison = fl.compare(
        nn.Linear(3, 2), fl.Categorical(), torch.randn(8, 3), chosen, progress=False
    )
    return {cost.approximation: cost.seconds for cost in comparison.costs}


@pytest.mark.usefixtures("slow")
def test_seconds_do_not_depend_on_the_order_of_the_list() -> None:
    """They were those of whoever asked first."""
    chosen = [fl.TKFAC(), fl.TN(), fl.LNGD(), fl.KFAC(), fl.EKFAC()]
    reads = {"TKFAC": 2, "TN": 2, "LNGD": 1, "KFAC": 1, "EKFAC": 1}
    for order in (chosen, chosen[::-1]):
        found = seconds(order)
        for label, count in reads.items():
            assert count * SLOW <= found[label] < (count + 0.9) * SLOW, (label, found)


@pytest.mark.usefixtures("slow")
def test_a_sum_of_sums_owes_for_both() -> None:
    stats = random_stats(4, N=5, T=4, R=2, d_out=9, d_in=11)
    assert contractions.gram_pays(stats)
    sums = Sums(stats)
    for known in (False, True):  # the Gram matrix was somebody else's first, or not
        if known:
            sums = Sums(stats)
            sums.gram()
        with sums.billed() as bill:
            sums.squared_gram()
            sums.gram()  # again: owed once
        assert SLOW <= bill.seconds < 1.9 * SLOW
        assert bill.own < SLOW / 2
    with sums.billed() as bill:
        time.sleep(SLOW)
    assert SLOW <= bill.own < 1.9 * SLOW
