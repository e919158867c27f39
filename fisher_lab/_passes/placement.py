"""Which example a row of a layer belongs to.

A layer sees rows: the entries of its input's first dimension, each with its positions. Most often
row n is example n. But a model may keep the batch second, flatten examples and positions into one
dimension, sort sequences by length, or send tokens to experts. What a row belongs to is then found
from derivatives: with random output gradients that vanish for all examples but some, a row has a
gradient if and only if it belongs to one of them. Two such sets for every binary digit of the
example's number, those that have the digit and those that have not, tell the number of every row's
example in 2 log2 N derivatives; a row that reaches several examples shows by both sets of a digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisher_lab.layers import Layer

NOBODY = -1  # a row without influence on any output
SEVERAL = -2  # a row that several examples use
MOST_EXAMPLES = 64  # examples from which the placement of a model's layers is found
TOGETHER = 2**24  # most numbers of output gradients that are derived at once


@dataclass(frozen=True)
class Use:
    """One call of a layer: its adapter, its unrolled input `[M, T, Q, d_in]` and where its output
    gradient arrives.

    M is the first dimension of the layer's input, most often the examples.
    """

    layer: Layer
    a: Tensor
    edge: GradientEdge


class Placement(Enum):
    """How the rows of one use of a layer belong to N examples."""

    BLOCKS = "blocks"  # rows of an example follow each other; one row an example is the usual case
    SECOND = "second"  # the examples are the second dimension
    STRIDED = "strided"  # every N-th row is of one example
    OWNERS = "owners"  # found anew for every batch
    SHARED = "shared"  # one row that all examples use: it is expanded before the layer
    MIXED = "mixed"  # rows that several examples use in another way
    UNSEEN = "unseen"  # no rows: parameters that are read without a call of the layer


def gradients_at(
    z: Tensor, edges: Sequence[GradientEdge], S: Tensor, retain_graph: bool
) -> list[Tensor | None]:
    """Gradients `[R, ...]` at every edge for R output gradients, None where an edge does not
    reach z.

    Args:
        z: outputs `[N, *output]` with their graph.
        edges: where gradients arrive.
        S: output gradients `[R, N, *output]`.
        retain_graph: whether the graph is needed again.
    """
    if len(S) == 1:  # costs less without vmap
        return _one_by_one(z, edges, S, retain_graph)
    try:
        found = torch.autograd.grad(
            z,
            edges,
            S,
            retain_graph=True,  # for the case that this fails
            is_grads_batched=True,
            allow_unused=True,
        )
    except RuntimeError:  # some operation has no vectorised derivative
        return _one_by_one(z, edges, S, retain_graph)
    return list(found)


def _one_by_one(
    z: Tensor, edges: Sequence[GradientEdge], S: Tensor, retain_graph: bool
) -> list[Tensor | None]:
    """The gradients of one direction after the other, as `gradients_at`."""
    by_direction = []
    for r, column in enumerate(S):
        retain = retain_graph or r + 1 < len(S)
        found = torch.autograd.grad(z, edges, column, retain_graph=retain, allow_unused=True)
        by_direction.append(found)
    gradients: list[Tensor | None] = []
    for of_edge in zip(*by_direction, strict=True):
        if of_edge[0] is None:
            gradients.append(None)
        elif len(S) == 1:
            gradients.append(of_edge[0].unsqueeze(0))
        else:
            gradients.append(torch.stack(of_edge))
    return gradients


def owners(z: Tensor, uses: list[Use]) -> list[Tensor]:
    """For every use the example `[M * T]` of each row and position, or NOBODY, or SEVERAL.

    Args:
        z: outputs `[N, *output]`, whose graph is kept.
        uses: of any layers.
    """
    chosen, draw = _digits_of_examples(z)
    edges = [use.edge for use in uses]
    together = len(chosen) * z.numel() <= TOGETHER
    touched: list[list[Tensor]] = [[] for _ in uses]
    # large ones one by one
    for some in [chosen] if together else chosen.split(1):
        gradients = gradients_at(z, edges, some * draw, retain_graph=True)
        for seen, use, gradient in zip(touched, uses, gradients, strict=True):
            if gradient is None:
                continue
            g = use.layer.unroll_gradient(gradient)  # [some digits, M, T, Q, d_out]
            has_gradient = (g != 0).flatten(3).any(-1)
            seen.append(has_gradient.flatten(1))
    found = []
    for seen, use in zip(touched, uses, strict=True):
        if seen:
            found.append(_read_digits(torch.cat(seen)))
            continue
        M, T = use.a.shape[:2]
        nobody = torch.full((M * T,), NOBODY, device=z.device)
        found.append(nobody)
    return found


def _digits_of_examples(z: Tensor) -> tuple[Tensor, Tensor]:
    """Which examples `[2 digits, N, 1, ...]` have a binary digit, then which have it not; and
    random output gradients `[N, *output]`.
    """
    N = z.shape[0]
    digits = max(1, (N - 1).bit_length())
    numbers = torch.arange(N, device=z.device)
    places = torch.arange(digits, device=z.device)
    has = (numbers >> places[:, None]) & 1  # [digits, N]
    chosen = torch.cat([has, 1 - has]).to(z.dtype)
    # random, so that contributions to a row do not cancel by symmetry
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
    of_output = (1,) * (z.ndim - 1)
    return chosen.view(2 * digits, N, *of_output), draw


def _read_digits(touched: Tensor) -> Tensor:
    """The example `[rows]` of every row, or NOBODY, or SEVERAL.

    Args:
        touched: whether a row has a gradient `[2 digits, rows]` for each of `_digits_of_examples`.
    """
    digits = len(touched) // 2
    with_digit = touched[:digits]
    without = touched[digits:]
    places = torch.arange(digits, device=touched.device)
    powers = with_digit.long() << places[:, None]
    owner = powers.sum(0)
    unused = ~touched.any(0)
    several = (with_digit & without).any(0)
    owner[unused] = NOBODY
    owner[several] = SEVERAL
    return owner


def placement_of(owner: Tensor, M: int, T: int, N: int) -> Placement:
    """The regular placement that agrees with the rows' owners, or OWNERS, SHARED or MIXED.

    Args:
        owner: `[M * T]` from `owners`.
        M: rows.
        T: positions in a row.
        N: examples.
    """
    several = owner == SEVERAL
    if bool(several.any()):
        if M == 1 and N > 1:
            return Placement.SHARED
        return Placement.MIXED
    known = owner != NOBODY
    # in the order in which they are likely: a batch of one example fits them all
    for regular in (Placement.BLOCKS, Placement.SECOND, Placement.STRIDED):
        expected = _expected(regular, M, T, N, owner.device)
        if expected is None:
            continue
        agrees = owner == expected
        if bool(agrees[known].all()):
            return regular
    return Placement.OWNERS


def _expected(placement: Placement, M: int, T: int, N: int, device: torch.device) -> Tensor | None:
    """The owners `[M * T]` under a regular placement; None where the sizes do not fit it."""
    if not fits(placement, M, T, N):
        return None
    rows = torch.arange(M, device=device)
    positions = torch.arange(T, device=device)
    if placement is Placement.SECOND:
        of_position = positions // (T // N)
        return of_position.expand(M, T).flatten()
    if placement is Placement.BLOCKS:
        of_row = rows // (M // N)
    else:
        of_row = rows % N
    return of_row[:, None].expand(M, T).flatten()


def fits(placement: Placement, M: int, T: int, N: int) -> bool:
    """Whether M rows of T positions can belong to N examples in this way."""
    if placement in (Placement.BLOCKS, Placement.STRIDED):
        return M % N == 0
    if placement is Placement.SECOND:
        return T % N == 0
    return placement is Placement.OWNERS


def placed(x: Tensor, placement: Placement, N: int, owner: Tensor | None, axis: int) -> Tensor:
    """Rows and positions `[..., M, T, Q, n]` as examples and positions `[..., N, T', Q, n]`.

    Args:
        x: inputs a, or output gradients g behind their directions.
        placement: of the rows.
        N: examples.
        owner: `[M * T]`, for OWNERS.
        axis: dimension of M.
    """
    M, T = x.shape[axis : axis + 2]
    following = axis + 1
    if placement is Placement.OWNERS:
        assert owner is not None
        rows = x.flatten(axis, following)
        return _gathered(rows, N, owner, axis)
    if placement is Placement.BLOCKS:
        if M == N:
            return x
        by_example = x.unflatten(axis, (N, M // N))  # [..., N, M / N, T, Q, n]
    elif placement is Placement.STRIDED:
        examples_second = x.unflatten(axis, (M // N, N))  # [..., M / N, N, T, Q, n]
        by_example = examples_second.transpose(axis, following)
    else:
        examples_second = x.unflatten(following, (N, T // N))  # [..., M, N, T / N, Q, n]
        by_example = examples_second.transpose(axis, following)
    return by_example.flatten(following, axis + 2)


def _gathered(x: Tensor, N: int, owner: Tensor, axis: int) -> Tensor:
    """Rows `[..., rows, Q, n]` by example, filled up with zeros to the largest number of rows of an
    example.
    """
    order = owner.argsort(stable=True)  # so that rows of an example keep their order
    has_owner = owner[order] >= 0
    order = order[has_owner]
    sorted_owner = owner[order]
    count = torch.bincount(sorted_owner, minlength=N)
    T = max(1, int(count.max()))
    # the how-manieth row of its example each one is
    start = count.cumsum(0) - count
    ranks = torch.arange(len(order), device=x.device)
    place = ranks - start[sorted_owner]
    target = sorted_owner * T + place
    rows = x.index_select(axis, order)
    found = x.new_zeros(*x.shape[:axis], N * T, *x.shape[axis + 1 :])
    found.index_copy_(axis, target, rows)
    return found.unflatten(axis, (N, T))
