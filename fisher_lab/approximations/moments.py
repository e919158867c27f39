"""Moments: what an approximation remembers of the data, and all that its matrix is assembled from.

There are three kinds. They differ in how two batches become one, and in how an example moves them:

    Means      named tensors, each the mean of something over the examples; two batches mix
               linearly
    Columns    the examples themselves (inputs, output gradients), each with a weight; two batches
               are joined
    Rows       row blocks kept as their factors while that is smaller; joined, too

Running means, moving averages, checkpoints, masks and standard errors are written for `Moments`,
once. A kind of one's own is a frozen dataclass with `shape`, `tensors`, `with_tensors` and `mix`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fisher_lab._ground.linalg import kept
from fisher_lab._ground.tolerances import agreement
from fisher_lab.approximations import drawing
from fisher_lab.matrices import FactoredRows
from fisher_lab.statistics import LayerStats, contractions

# of several numbers, one after the other, in the leaves of the moments
Gradients = Sequence[Sequence[Tensor]]


class Moments(Mapping[str, Tensor], ABC):
    """What an approximation remembers of one layer, a value; `moments["A"]` is one tensor of it."""

    # a mapping of tensors is equal to itself alone: comparing tensors would make the host wait
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape of W."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same kind holding other tensors, named as in `tensors`."""

    @abstractmethod
    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """The moments of these examples and of those of `new`.

        Args:
            new: moments of other examples, of the same approximation.
            weight: of the new ones, between 0 and 1, and 1 - weight that of these; a 0-d tensor
                where reading it would make the host wait.
        """

    def follow(self, new: Moments, weight: float | Tensor) -> Moments:
        """A moving average of observations, `new` the latest.

        A mean that forgets is a mean like any other, unless a kind does not keep all.
        """
        return self.mix(new, weight)

    # -- what every kind gets ----------------------------------------------------------------------
    @property
    def examples_held(self) -> float:
        """Of how many examples the columns are held once many are seen: 0, some, or math.inf."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        total = 0
        for x in self.tensors().values():
            size = x.element_size()
            total += x.numel() * size
        return total

    def masked(self, ok: Tensor) -> Self:
        """These moments where ok (a 0-d bool), zeros otherwise; without a host read."""
        found = {}
        for name, x in self.tensors().items():
            found[name] = kept(ok, x)
        return self.with_tensors(found)

    def as_means(self) -> Means:
        """The same as tensors that can be mixed.

        Raises:
            TypeError: for a kind without such a form.
        """
        raise TypeError(
            f"Got {type(self).__name__} to mix with means, expected means; mix moments of one kind."
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors())

    def __len__(self) -> int:
        return len(self.tensors())

    # -- how examples move them: what standard errors need -----------------------------------------
    @property
    def unsteady(self) -> tuple[str, ...]:
        """Quantities of the matrix (`trace_approx`, ...) of which the first order says nothing."""
        return ()

    def with_leaves(self) -> tuple[Moments, tuple[Tensor, ...]] | None:
        """The same moments as a function of leaves to differentiate in; None where not known."""
        return None

    def influences(self, gradients: Gradients, own: Iterator[Moments], N: int) -> Tensor | None:
        """The derivative of several numbers in the weight of every example `[numbers, N]`.

        Each row has mean zero. Weights go from 1/N each towards one example, (1 - eps) / N + eps.

        Args:
            gradients: of every number in every leaf.
            own: moments of one example after the other, as if it were alone.
            N: examples.

        Returns:
            None where it is not known.
        """
        return None


@dataclass(frozen=True, eq=False)
class Means(Moments):
    """Named tensors, each a mean over examples; what a dictionary that `moments` returns becomes.

    Args:
        named: the tensors, by any name.
        weight_shape: shape of W.
    """

    named: Mapping[str, Tensor]
    weight_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.weight_shape

    def tensors(self) -> dict[str, Tensor]:
        """The means."""
        return dict(self.named)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Others of the same names."""
        return replace(self, named=dict(tensors))

    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """(1 - weight) self + weight new, name by name; what only `new` has is taken as it is."""
        new = new.as_means()
        mixed = {}
        for name, x in new.named.items():
            if name in self.named:
                x = mixture(self.named[name], x, weight)
            mixed[name] = x
        return new.with_tensors(mixed)

    def as_means(self) -> Means:
        """These."""
        return self

    def with_leaves(self) -> tuple[Means, tuple[Tensor, ...]]:
        """Each tensor plus a leaf of zeros: what the tensors themselves depend on stays known."""
        moved = {}
        leaves = []
        for name, x in self.named.items():
            # moments may be integers, leaves may not
            dtype = torch.promote_types(x.dtype, torch.float32)
            leaf = torch.zeros_like(x, dtype=dtype, requires_grad=True)
            leaves.append(leaf)
            moved[name] = x + leaf
        return self.with_tensors(moved), tuple(leaves)

    def influences(
        self,
        gradients: Gradients,
        own: Iterator[Moments],
        N: int,
    ) -> Tensor | None:
        """<gradient, moments of example n - their mean>; None if that mean is not these moments."""
        rows = []
        for row in gradients:
            rows.append(_flat(row))
        directions = torch.stack(rows)  # [numbers, entries]
        mean = torch.zeros_like(directions[0])
        columns = []
        for n, moments in enumerate(own):
            example = moments.as_means()
            entries = self._entries_of(example)
            columns.append(directions @ entries)
            step = entries - mean
            mean += step / (n + 1)
        if not self._is_mean(mean):
            return None  # whatever these are, they are no means of what the examples have
        influence = torch.stack(columns, 1)
        return influence - influence.mean(1, keepdim=True)

    def _is_mean(self, mean: Tensor) -> bool:
        """Whether the examples' mean is these moments, tensor by tensor: one norm over all of them
        would hide a small one behind a large one.

        Args:
            mean: of the examples' entries, flat as from `_entries_of`.
        """
        sizes = [x.numel() for x in self.named.values()]
        parts = mean.split(sizes)
        for x, part in zip(self.named.values(), parts, strict=True):
            here = x.detach().flatten().to(mean.dtype)
            deviation = torch.linalg.norm(part - here)
            size = torch.linalg.norm(here)
            allowed = agreement(mean.dtype) * size
            if float(deviation) > float(allowed):
                return False
        return True

    def _entries_of(self, other: Means) -> Tensor:
        """The entries of other moments, flat, in the order and in the shapes of these."""
        parts = []
        for name, x in self.named.items():
            y = other.named[name]
            parts.append(y.expand_as(x))
        return _flat(parts)


@dataclass(frozen=True, eq=False)
class Columns(Moments):
    """Inputs and output gradients of examples, each with a weight: for blocks that are larger than
    their columns.

    Args:
        stats: the examples.
        weight: of every example `[N]`, summing to 1. None for equal ones: then the tensors are used
            as they are, without a copy.
        most: examples kept, in a running mean the first, in a moving average drawn in proportion
            to their weights. None for all.
        draws: how often examples were drawn so far: the seed of the next draw.
    """

    stats: LayerStats
    weight: Tensor | None = None
    most: int | None = None
    draws: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        return self.stats.shape

    @property
    def examples_held(self) -> float:
        """At most `most`."""
        return math.inf if self.most is None else self.most

    @property
    def weights(self) -> Tensor:
        """The examples' weights `[N]`."""
        if self.weight is not None:
            return self.weight
        N = self.stats.N
        return self.stats.g.new_full((N,), 1 / N)

    def weighted(self) -> LayerStats:
        """The columns with the weights inside g, so that equal ones are the right ones."""
        if self.weight is None:
            return self.stats
        a = self.stats.a
        g = self.stats.g  # [R, N, ...]
        relative = self.weight * self.stats.N  # to equal ones
        root = relative.sqrt()
        others = (1,) * (g.ndim - 2)
        root = root.view(1, -1, *others)
        return self.stats.like(a, g * root)

    def tensors(self) -> dict[str, Tensor]:
        """`a`, `g` and `weight`, as far as there are any."""
        found = {"g": self.stats.g}
        if self.stats.a is not None:
            found["a"] = self.stats.a
        if self.weight is not None:
            found["weight"] = self.weight
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Others of the same names."""
        a = tensors.get("a")
        g = tensors["g"]
        weight = tensors.get("weight")
        return replace(self, stats=self.stats.like(a, g), weight=weight)

    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """All examples, older ones first, as far as `most` allows."""
        if not isinstance(new, Columns):
            return self.as_means().mix(new, weight)
        joined = self._joined(new, weight)
        return joined._heaviest()

    def follow(self, new: Moments, weight: float | Tensor) -> Moments:
        """`most` of the examples, drawn in proportion to their weights (see `drawing`).

        The heaviest would be the oldest for ever: an observation weighs most when it is the second,
        and every later one less.
        """
        if self.most is None or not isinstance(new, Columns):
            return self.mix(new, weight)
        joined = self._joined(new, weight)
        joined = replace(joined, draws=self.draws + 1)
        return joined._drawn()

    def _joined(self, new: Columns, weight: float | Tensor) -> Columns:
        """All examples, older ones first."""
        T = max(self.stats.T, new.stats.T)  # sequences may be of different length
        older = self.stats.with_positions(T)
        newer = new.stats.with_positions(T)
        g = torch.cat([older.g, newer.g], 1)
        a = None
        if older.a is not None and newer.a is not None:
            a = torch.cat([older.a, newer.a])
        of_older = self.weights * (1 - weight)
        of_newer = new.weights * weight
        weights = torch.cat([of_older, of_newer])
        return replace(new, stats=newer.like(a, g), weight=weights)

    def _heaviest(self) -> Columns:
        """The `most` heaviest examples, ties to the earliest: in a running mean, the first."""
        weight = self.weights
        if self.most is None or len(weight) <= self.most:
            return self
        # weights that differ by rounding only are alike
        share = weight / weight.max()
        heaviness = share.mul(1e6).round()
        order = heaviness.argsort(stable=True, descending=True)
        first = order[: self.most]
        return self._chosen(first, weight[first])

    def _drawn(self) -> Columns:
        """`most` of the examples, whose weighted mean has the expectation of that of all."""
        weight = self.weights
        if self.most is None or len(weight) <= self.most:
            return self
        # equal for all layers, so that they keep the same examples
        u = drawing.number(self.draws)
        index, weight = drawing.draw(weight, self.most, u)
        return self._chosen(index, weight)

    def _chosen(self, order: Tensor, weight: Tensor) -> Columns:
        """Some of the examples, their weights summing to 1 again."""
        a = self.stats.a
        if a is not None:
            a = a[order]
        g = self.stats.g[:, order]
        stats = self.stats.like(a, g)
        return replace(self, stats=stats, weight=weight / weight.sum())

    def as_means(self) -> Means:
        """The `block` `[d, d]` that they are the columns of."""
        stats = self.weighted()
        block = contractions.dense(stats)
        return Means({"block": block}, stats.shape)

    def with_leaves(self) -> tuple[Columns, tuple[Tensor, ...]]:
        """The weights are the leaves."""
        weight = self.weights.detach().clone()
        weight.requires_grad_()
        return replace(self, weight=weight), (weight,)

    def influences(
        self,
        gradients: Gradients,
        own: Iterator[Moments],
        N: int,
    ) -> Tensor | None:
        """From the derivatives in the weights; None if what is kept are not examples of
        the batch.
        """
        places = self._places(own, N)
        if places is None:
            return None
        weights = self.weights.detach()
        rows = []
        for (gradient,) in gradients:
            # a weight grows in proportion to itself, and all are divided by their sum
            mean = weights @ gradient
            row = gradient.new_zeros(N)
            # examples that are not kept move nothing; those that are stand for all
            row[places] = N * weights * (gradient - mean)
            rows.append(row)
        return torch.stack(rows)

    def _places(self, own: Iterator[Moments], N: int) -> Tensor | None:
        """Which of the N examples every kept one is `[n]`, found by their numbers.

        An approximation may keep any of them, in any order.

        Args:
            own: moments of one example after the other.
            N: examples.
        """
        kept = self.stats
        n = kept.N
        places = torch.full((n,), -1, device=kept.g.device)
        for number, moments in zip(range(N), own, strict=True):
            if not isinstance(moments, Columns) or moments.stats.N != 1:
                return None
            alone = moments.stats
            equal = (kept.g == alone.g).transpose(0, 1).flatten(1).all(1)
            if kept.a is not None and alone.a is not None:
                equal = equal & (kept.a == alone.a).flatten(1).all(1)
            # of equal examples the first is the first that is kept
            candidates = (equal & (places < 0)).nonzero()
            if len(candidates):
                places[candidates[0]] = number
        if bool((places < 0).any()):
            return None
        return places


@dataclass(frozen=True, eq=False)
class Rows(Moments):
    """Row blocks a^T diag(w_i) a of W kept as their factors, as long as these are smaller.

    Args:
        a: inputs `[N, d_in]`.
        w: for every row of W the weights of the inputs `[N, d_out]`, which hold the examples' own
            weights.
    """

    a: Tensor
    w: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        d_out = self.w.shape[1]
        d_in = self.a.shape[1]
        return d_out, d_in

    def tensors(self) -> dict[str, Tensor]:
        """`a` and `w`."""
        return {"a": self.a, "w": self.w}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Others of the same names."""
        a = tensors["a"]
        w = tensors["w"]
        return replace(self, a=a, w=w)

    def mix(self, new: Moments, weight: float | Tensor) -> Moments:
        """All examples while they are smaller than the blocks, then the blocks."""
        if isinstance(new, Rows):
            d_out, d_in = self.shape
            N = len(self.a) + len(new.a)
            in_factors = N * (d_in + d_out)
            in_blocks = d_out * d_in**2
            if in_factors < in_blocks:
                a = torch.cat([self.a, new.a])
                of_older = self.w * (1 - weight)
                of_newer = new.w * weight
                w = torch.cat([of_older, of_newer])
                return replace(new, a=a, w=w)
        blocks = self.as_means()
        return blocks.mix(new, weight)

    def as_means(self) -> Means:
        """The blocks, as `row` `[d_out, d_in, d_in]`."""
        factored = FactoredRows(self.a, self.w)
        formed = factored.formed()
        return Means({"row": formed.blocks}, self.shape)

    def with_leaves(self) -> tuple[Rows, tuple[Tensor, ...]]:
        """Factors of the examples' weights are the leaves."""
        one = torch.ones_like(self.w[:, :1])
        factor = one.requires_grad_()
        moved = replace(self, w=self.w * factor)
        return moved, (factor,)

    def influences(
        self,
        gradients: Gradients,
        own: Iterator[Moments],
        N: int,
    ) -> Tensor:
        """From the derivatives in factors of the weights."""
        rows = []
        for (factor,) in gradients:
            gradient = factor[:, 0] * N  # in the weight, 1/N of which is a factor of 1
            rows.append(gradient - gradient.mean())
        return torch.stack(rows)


def mixture(old: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    """(1 - weight) old + weight new."""
    if not old.is_floating_point():  # which lerp, of half as many passes, does not take
        step = new - old
        return old + weight * step
    if isinstance(weight, Tensor):
        weight = weight.to(old.dtype)
    return torch.lerp(old, new, weight)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in a row."""
    parts = []
    for x in tensors:
        parts.append(x.flatten())
    return torch.cat(parts)


def as_moments(
    found: Moments | Mapping[str, Tensor],
    shape: tuple[int, int],
    label: str,
) -> Moments:
    """What `Approximation.moments` returned: a dictionary of tensors are means.

    Args:
        found: moments or a dictionary.
        shape: of W.
        label: of the approximation, for the message.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(found, Moments):
        return found
    what = type(found).__name__
    if isinstance(found, Mapping):
        kinds: set[str] = set()
        for x in found.values():
            if not isinstance(x, Tensor):
                kinds.add(type(x).__name__)
        if not kinds:
            return Means(dict(found), shape)
        others = " and ".join(sorted(kinds))
        what = f"a dictionary with {others}"
    raise TypeError(
        f"{label}.moments returned {what}, expected a dictionary of named tensors, or Moments; "
        "return means over the examples, or fl.approximations.Columns."
    )
