"""Pieces put together as they come are those joined when all are there."""

import pytest
import torch

from fisher_lab.statistics import Gathered, joined
from tests.contracts.matrices import vocabulary_sums
from tests.helpers import random_stats


@pytest.mark.parametrize("size", [1, 3, 7, 9])
@pytest.mark.parametrize("R", [1, 2])
def test_layer_stats(size, R):
    stats = random_stats(0, N=7, R=R, T=3, Q=2, d_out=3, d_in=4)
    parts = [stats.examples(slice(start, start + size)) for start in range(0, 7, size)]
    gathered = Gathered(7)
    for part in parts:
        alone = part.like(part.a.clone(), part.g.contiguous())  # as a capture gives it
        gathered.add(alone)
    found = gathered.whole()
    expected = joined(parts)
    assert torch.equal(found.a, expected.a)
    assert torch.equal(found.g, expected.g)
    assert found.g.is_contiguous()
    assert found.kernel == stats.kernel


def test_positions_that_a_piece_lacks_are_zeros():
    long = random_stats(0, N=2, T=3, d_out=3, d_in=4)
    short = random_stats(1, N=3, T=2, d_out=3, d_in=4)
    gathered = Gathered(7)
    for part in (long, short, long):
        gathered.add(part)
    expected = joined([long, short, long])
    found = gathered.whole()
    assert torch.equal(found.a, expected.a)
    assert torch.equal(found.g, expected.g)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_vocabulary(size):
    stats = vocabulary_sums().stats
    gathered = Gathered(4)
    for start in range(0, 4, size):
        gathered.add(stats.examples(slice(start, start + size)))
    found = gathered.whole()
    for mine, theirs in zip(found.of_examples(), stats.of_examples(), strict=True):
        assert torch.equal(mine, theirs)
