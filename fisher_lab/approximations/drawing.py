"""Examples drawn in proportion to their weights: systematic sampling (Madow 1949).

Of examples with weights w_i, n are drawn, the i-th with probability p_i = min(1, c w_i), where c
makes these probabilities sum to n; and what is drawn weighs w_i / p_i (Horvitz & Thompson 1952). So
every mean over the examples keeps its expectation, and the weights keep their sum: those that are
sure to be drawn keep theirs, all others weigh 1 / c.

The draw takes one random number u. The probabilities lie one behind the other on a line of length
n, and whichever examples the points u, u + 1, ..., u + n - 1 fall on are drawn.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

# an example whose probability is this near to 1 counts as sure, so that rounding decides nothing
NEARLY_SURE = 1e-5


def number(seed: int) -> float:
    """The random number in [0, 1) of a draw."""
    return random.Random(seed).random()


def draw(weight: Tensor, n: int, u: float) -> tuple[Tensor, Tensor]:
    """Indices `[n]` of the examples drawn, in their order, and the weights `[n]` they get.

    Where fewer than n weigh anything, others fill the places and weigh nothing; nothing waits for
    the device.

    Args:
        weight: of more than n examples, not negative.
        n: how many are drawn.
        u: between 0 and 1.
    """
    order = weight.argsort(stable=True, descending=True)
    w = weight[order]
    if w.device.type != "mps":  # which has no double precision
        w = w.double()
    probability = _probabilities(w, n)
    ends = probability.cumsum(0)
    points = torch.arange(n, dtype=w.dtype, device=w.device) + u
    places = torch.searchsorted(ends, points, right=True)
    # behind the end of the line there are no more examples of any weight
    places = places.clamp(max=len(w) - 1)
    p = probability[places]
    drawn = torch.where(p > 0, w[places] / p, 0.0)
    index, back = order[places].sort(stable=True)
    return index, drawn[back].to(weight.dtype)


def _probabilities(w: Tensor, n: int) -> Tensor:
    """min(1, c w), which sum to n, for weights in falling order; 1 where fewer than n are
    positive.
    """
    rank = torch.arange(len(w), device=w.device)
    of_rest = w.flip(0).cumsum(0).flip(0)  # the weight from here on
    # as long as an example is due a whole place of those that are left, it is sure of one
    due = w * (n - rank)
    sure = (w > 0) & (due >= of_rest * (1 - NEARLY_SURE))
    sure = sure.cumprod(0).bool()  # up to the first that is not
    rest = torch.where(sure, 0.0, w)
    total = rest.sum()
    places = n - sure.sum()
    c = torch.where(total > 0, places / total, 0.0)
    return torch.where(sure, 1.0, rest * c)
