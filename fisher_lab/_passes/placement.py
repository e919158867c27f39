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

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisher_lab.layers import Layer

NOBODY = -1  # a row without influence on any output
SEVERAL = -2  # a row that several examples use
MOST_EXAMPLES = 64  # examples from which the placement of a model's layers is found


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


def owners(z: Tensor, uses: list[Use]) -> list[Tensor]:
    """For every use the example `[M * T]` of each row and position, or NOBODY, or SEVERAL.

    Args:
        z: outputs `[N, *output]`, whose graph is kept.
        uses: of any layers.
    """
    N = z.shape[0]
    digits = max(1, (N - 1).bit_length())
    numbers = torch.arange(N, device=z.device)
    places = torch.arange(digits, device=z.device)
    has = (numbers >> places[:, None]) & 1  # [digits, N]
    chosen = torch.cat([has, 1 - has]).to(z.dtype)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
    columns = chosen.view(2 * digits, N, *(1,) * (z.ndim - 1)) * draw
    edges = [use.edge for use in uses]
    gradients = torch.autograd.grad(
        z, edges, columns, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    found = []
    for use, gradient in zip(uses, gradients, strict=True):
        M, T = use.a.shape[:2]
        if gradient is None:
            found.append(torch.full((M * T,), NOBODY, device=z.device))
            continue
        g = use.layer.unroll_gradient(gradient)  # [2 digits, M, T, Q, d_out]
        touched = (g != 0).flatten(3).any(-1).flatten(1)
        with_digit, without = touched[:digits], touched[digits:]
        owner = (with_digit.long() << places[:, None]).sum(0)
        owner[~touched.any(0)] = NOBODY
        owner[(with_digit & without).any(0)] = SEVERAL
        found.append(owner)
    return found


def placement_of(owner: Tensor, M: int, T: int, N: int) -> Placement:
    """The regular placement that agrees with the rows' owners, or OWNERS, SHARED or MIXED.

    Args:
        owner: `[M * T]` from `owners`.
        M: rows.
        T: positions in a row.
        N: examples.
    """
    known = owner != NOBODY
    if bool((owner == SEVERAL).any()):
        return Placement.SHARED if M == 1 and N > 1 else Placement.MIXED
    for regular in (Placement.BLOCKS, Placement.SECOND, Placement.STRIDED):
        expected = _expected(regular, M, T, N, owner.device)
        if expected is not None and bool((owner == expected)[known].all()):
            return regular
    return Placement.OWNERS


def _expected(placement: Placement, M: int, T: int, N: int, device: torch.device) -> Tensor | None:
    """The owners `[M * T]` under a regular placement; None where the sizes do not fit it."""
    rows = torch.arange(M, device=device)[:, None].expand(M, T)
    positions = torch.arange(T, device=device).expand(M, T)
    if placement is Placement.BLOCKS and M % N == 0:
        return (rows // (M // N)).flatten()
    if placement is Placement.SECOND and T % N == 0:
        return (positions // (T // N)).flatten()
    if placement is Placement.STRIDED and M % N == 0:
        return (rows % N).flatten()
    return None


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
    if placement is Placement.BLOCKS:
        if M == N:
            return x
        return x.unflatten(axis, (N, M // N)).flatten(axis + 1, axis + 2)
    if placement is Placement.STRIDED:
        by_example = x.unflatten(axis, (M // N, N)).transpose(axis, axis + 1)
        return by_example.flatten(axis + 1, axis + 2)
    if placement is Placement.SECOND:
        by_example = x.unflatten(axis + 1, (N, T // N)).transpose(axis, axis + 1)
        return by_example.flatten(axis + 1, axis + 2)
    assert owner is not None
    return _gathered(x.flatten(axis, axis + 1), N, owner, axis)


def _gathered(x: Tensor, N: int, owner: Tensor, axis: int) -> Tensor:
    """Rows `[..., rows, Q, n]` by example, filled up with zeros to the largest number of rows of an
    example.
    """
    order = owner.argsort(stable=True)
    order = order[owner[order] >= 0]
    sorted_owner = owner[order]
    count = torch.bincount(sorted_owner, minlength=N)
    T = max(1, int(count.max()))
    start = count.cumsum(0) - count
    place = torch.arange(len(order), device=x.device) - start[sorted_owner]
    shape = (*x.shape[:axis], N * T, *x.shape[axis + 1 :])
    found = x.new_zeros(shape)
    found.index_copy_(axis, sorted_owner * T + place, x.index_select(axis, order))
    return found.unflatten(axis, (N, T))
