"""Moments that keep columns (inputs and output gradients of examples) instead of a mean.

Used where the columns are smaller than the matrix they stand for. The moments are `g`, `a` (absent when the
per-example gradients are explicit) and `weight`, one per example, summing to 1 (absent when all are equal: then the
tensors are used as they are, without a copy); or the `block` they were turned into.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisher_lab.approximations.base import Moments
from fisher_lab.statistics import LayerStats


def keep(stats: LayerStats) -> Moments:
    """The columns of `stats`, equally weighted."""
    return {"g": stats.g} if stats.a is None else {"a": stats.a, "g": stats.g}


def to_stats(moments: Moments) -> LayerStats:
    """Kept columns as LayerStats, the weights inside g."""
    g = moments["g"]
    if "weight" not in moments:
        return LayerStats(moments.get("a"), g)
    root = (moments["weight"] * g.shape[1]).sqrt()
    return LayerStats(moments.get("a"), g * root.view(1, -1, *(1,) * (g.ndim - 2)))


def weights(moments: Moments) -> Tensor:
    """The examples' weights `[N]`."""
    g = moments["g"]
    return moments["weight"] if "weight" in moments else g.new_full((g.shape[1],), 1 / g.shape[1])


def mix(old: Moments, new: Moments, weight: float | Tensor) -> Moments:
    """Weighted concatenation of the examples; older ones first."""
    T = max(old["g"].shape[2], new["g"].shape[2]) if "a" in new else 0
    old, new = _padded(old, T), _padded(new, T)
    mixed = {
        "g": torch.cat([old["g"], new["g"]], 1),
        "weight": torch.cat([weights(old) * (1 - weight), weights(new) * weight]),
    }
    if "a" in new:
        mixed["a"] = torch.cat([old["a"], new["a"]])
    return mixed


def _padded(moments: Moments, T: int) -> Moments:
    """With T positions (sequences of different length): more positions of zeros add nothing to a gradient."""
    missing = T - moments["g"].shape[2]
    return (
        {k: pad(x, (0, 0, 0, 0, 0, missing)) if k in "ag" else x for k, x in moments.items()}
        if missing > 0
        else moments
    )


def trim(moments: Moments, most: int, newest: bool = False) -> Moments:
    """At most `most` examples, their weights summing to 1 again.

    Args:
        moments: columns, older examples first.
        most: how many.
        newest: keep the newest that have a weight, in their order (those of a batch that was not finite have none);
            otherwise the heaviest, ties to the earliest, which in a running mean are the first.
    """
    weight = weights(moments)
    n = len(weight)
    if n <= most:
        return moments
    if newest:
        age = torch.arange(n, device=weight.device)
        wanted = torch.where(weight > 0, age, -1)
        order = wanted.argsort(descending=True)[:most].sort().values
    else:
        # weights that differ by rounding only are alike
        heaviness = (weight / weight.max()).mul(1e6).round()
        order = heaviness.argsort(stable=True, descending=True)[:most]
    kept = {"g": moments["g"][:, order], "weight": weight[order] / weight[order].sum()}
    if "a" in moments:
        kept["a"] = moments["a"][order]
    return kept


def size(moments: Moments) -> int:
    """Numbers held."""
    return sum(x.numel() for x in moments.values())
