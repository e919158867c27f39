"""Statistics of a vocabulary: a Linear layer whose outputs are the logits of a softmax over many
classes, perhaps tied to the Embedding of the same classes, with one direction an example.

The output gradients `[N, T, V]` of such a layer are larger than anything else in the network, and
known from little: at a position with the logits z = W a, the label y and the weight c they are

    g = c (onehot(y) - softmax(z)),

so that a, y, c and the logarithm of the softmax's sum say all of them. A lookup of row x whose
result has the gradient e adds onehot(x) e^T to P. Everything is summed over slices of the rows of
W, for all examples at once: g, and from it P `[N, rows, d_in]`, are formed anew in every pass and
never whole.

Second moments over the rows, V x V, would be larger still. They are their diagonals here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisher_lab._ground.linalg import eigh
from fisher_lab.statistics import pieces
from fisher_lab.statistics.contractions import Basis
from fisher_lab.statistics.layer_stats import LayerStats
from fisher_lab.statistics.sums import Sums

NO_LABEL = -1  # a lookup of a row that is not trained


class OutOfReachError(ValueError):
    """What cannot be had of the statistics of a vocabulary."""


@dataclass(frozen=True, eq=False)
class VocabularyStats:
    """What the gradients of W `[V, d_in]` follow from, of N examples at T positions and U lookups.

    Args:
        W: the weight, the bias its last column.
        a: inputs `[N, T, d_in]`, ones in the last column if there is a bias.
        label: y `[N, T]`.
        scale: c `[N, T]`; 0 at a position that does not count.
        log_sum: of the exponentials of the logits `[N, T]`.
        index: x `[N, U]`; -1 for a lookup whose row is not trained.
        e: gradients of what was looked up `[N, U, d_in]`, 0 in the column of a bias.
        bias: whether the last column of W is a bias.
    """

    W: Tensor
    a: Tensor
    label: Tensor
    scale: Tensor
    log_sum: Tensor
    index: Tensor
    e: Tensor
    bias: bool

    # -- sizes -------------------------------------------------------------------------------------
    @property
    def N(self) -> int:
        """Examples."""
        return len(self.a)

    @property
    def T(self) -> int:
        """Positions, lookups among them."""
        return self.a.shape[1] + self.index.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        V, d_in = self.W.shape
        return V, d_in

    @property
    def dim(self) -> int:
        """Number of parameters d of the block."""
        return self.W.numel()

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.W.element_size()

    # -- the same with other tensors ---------------------------------------------------------------
    def visited(self, change: Callable[[str, Tensor], Tensor]) -> VocabularyStats:
        """The same with `change(name, tensor)` in the place of every tensor of real numbers."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.is_floating_point():
                changed[field.name] = change(field.name, value)
        return replace(self, **changed)  # type: ignore[arg-type]

    def scaled(self, c: float | Tensor) -> VocabularyStats:
        """The statistics of c F."""
        root = c**0.5
        return replace(self, scale=self.scale * root, e=self.e * root)

    def examples(self, part: slice) -> VocabularyStats:
        """Those of some of the examples."""
        some = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "W":
                some[field.name] = value[part]
        return replace(self, **some)  # type: ignore[arg-type]

    def of_examples(self) -> list[Tensor]:
        """What there is of every example, the examples first."""
        return [self.a, self.label, self.scale, self.log_sum, self.index, self.e]

    def with_examples(self, tensors: list[Tensor]) -> VocabularyStats:
        """The same with others, as `of_examples` has them."""
        a, label, scale, log_sum, index, e = tensors
        return VocabularyStats(self.W, a, label, scale, log_sum, index, e, self.bias)

    # -- gradients, a slice of the rows at a time --------------------------------------------------
    def slices(self) -> Iterator[slice]:
        """The rows of W in slices whose gradients take a chunk of memory."""
        # of a row: its output gradients and their squares, and P with its image
        numbers = 2 * self.a.shape[0] * self.a.shape[1] + 2 * self.N * self.shape[1]
        return pieces.slices(self.shape[0], numbers * self.itemsize)

    def output_gradients(self, rows: slice) -> Tensor:
        """g `[N, T, rows]` of the Linear layer's positions."""
        inputs = self.a.flatten(0, 1)
        g = inputs @ self.W[rows].T
        g -= self.log_sum.reshape(-1, 1)
        g.exp_()  # the softmax
        position, column = _in_slice(self._labels, rows)
        g[position, column] -= 1
        g *= -self.scale.reshape(-1, 1)
        return g.unflatten(0, self.label.shape)

    def gradients(self, rows: slice, g: Tensor, right: Tensor | None = None) -> Tensor:
        """P `[N, rows, d_in]`, or P B for a matrix B `[d_in, k]`.

        Args:
            rows: of W.
            g: from `output_gradients`.
            right: B; None for the identity.
        """
        a = self.a
        e = self.e
        if right is not None:
            a = a @ right
            e = e @ right
        P = g.mT @ a
        lookup, row = _in_slice(self._lookups, rows)
        example = lookup // max(1, self.index.shape[1])
        P.index_put_((example, row), e.flatten(0, 1)[lookup], accumulate=True)
        return P

    def sliced(self, right: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """One pass: slices of the rows, and P B `[N, rows, k]`."""
        for rows in self.slices():
            g = self.output_gradients(rows)
            yield rows, self.gradients(rows, g, right)

    @cached_property
    def _labels(self) -> tuple[Tensor, Tensor]:
        """The labels sorted, and the positions they are of."""
        found = self.label.flatten().sort()
        return found.values, found.indices

    @cached_property
    def _lookups(self) -> tuple[Tensor, Tensor]:
        """The indices that were looked up sorted, and which lookups they are of."""
        found = self.index.flatten().sort()
        return found.values, found.indices

    # -- moments -----------------------------------------------------------------------------------
    def split(self) -> tuple[Tensor, Tensor]:
        """Sizes `[N, U]` of the output gradients of lookups, and their inputs `[N, U, d_in]`.

        As a tied embedding splits e: the size |e| / sqrt(d) of a gradient stays in g, and
        a = sqrt(d) e / |e|.
        """
        d = self.shape[1] - self.bias
        size = self.e.norm(dim=-1) / math.sqrt(d)
        tiny = torch.finfo(size.dtype).tiny
        inputs = self.e / size.clamp(min=tiny).unsqueeze(-1)
        return size, inputs

    def over_rows(self, values: Tensor) -> Tensor:
        """Sums `[V]` of a value `[N, U]` of every lookup over the rows."""
        trained = self.index != NO_LABEL
        total = self.W.new_zeros(self.shape[0])
        return total.index_add_(0, self.index[trained], values[trained])


def _in_slice(ordered: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    """Which entries fall into a slice of the rows, and into which row of it.

    Args:
        ordered: rows of the entries, rising, and the entries.
        rows: the slice.
    """
    values, entries = ordered
    bounds = torch.tensor([rows.start, rows.stop], device=values.device)
    first, last = torch.searchsorted(values, bounds).tolist()
    return entries[first:last], values[first:last] - rows.start


def joined_vocabulary(parts: Sequence[VocabularyStats]) -> VocabularyStats:
    """The statistics of all examples of pieces of one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    T = max(part.a.shape[1] for part in parts)
    U = max(part.index.shape[1] for part in parts)
    padded = [_with_positions(part, T, U) for part in parts]
    together = {}
    for field in fields(first):
        if field.name in ("W", "bias"):
            continue
        tensors = [getattr(part, field.name) for part in padded]
        together[field.name] = torch.cat(tensors)
    return replace(first, **together)  # type: ignore[arg-type]


def _with_positions(part: VocabularyStats, T: int, U: int) -> VocabularyStats:
    """The same with T positions and U lookups, the missing ones zero."""
    missing = T - part.a.shape[1]
    unseen = U - part.index.shape[1]
    if not missing and not unseen:
        return part
    return replace(
        part,
        a=pad(part.a, (0, 0, 0, missing)),
        label=pad(part.label, (0, missing)),
        scale=pad(part.scale, (0, missing)),
        log_sum=pad(part.log_sum, (0, missing)),
        index=pad(part.index, (0, unseen), value=NO_LABEL),
        e=pad(part.e, (0, 0, 0, unseen)),
    )


class VocabularySums(Sums):
    """The sums over the statistics of a vocabulary: those that approximations with a diagonal over
    its rows read.

    Args:
        stats: the statistics.
        shared: as that of Sums.
    """

    stats: VocabularyStats  # type: ignore[assignment]

    def __init__(self, stats: VocabularyStats, shared: bool = True) -> None:
        super().__init__(stats, shared)  # type: ignore[arg-type]

    # -- sums --------------------------------------------------------------------------------------
    def factors(self, spatial: str = "expand") -> tuple[Tensor, Tensor]:
        """A `[1, d_in, d_in]` and the diagonal `[1, V]` of G of KFAC.

        Raises:
            OutOfReachError: for positions that are summed first.
        """
        if spatial != "expand":
            raise OutOfReachError(f"spatial={spatial!r} needs the output gradients themselves")
        A = self._one(("inputs",), _second_moment_of_inputs)
        return A, self._first_pass().G

    def uncorrelated(self) -> tuple[Tensor, Tensor]:
        """The diagonal `[1, V]` of U1 and U2 `[1, d_in, d_in]` of uncorrelated positions."""
        found = self._first_pass()
        return found.U1, found.U2

    def left(self, A: Tensor | None = None) -> Tensor:
        """The diagonal `[1, V]` of 1/N sum P A P^T; U1 without A.

        Args:
            A: symmetric PSD `[1, d_in, d_in]`, or a diagonal `[1, d_in]`.
        """
        if A is None:
            return self._first_pass().left
        return _left(self.stats, A)

    def right(self, G: Tensor | None = None) -> Tensor:
        """1/N sum P^T G P `[1, d_in, d_in]`; U2 without G.

        Args:
            G: a diagonal `[1, V]`.
        """
        if G is None:
            return self._one(("right",), _right)
        return _right(self.stats, G)

    def squares(self, basis: Basis = (None, None)) -> Tensor:
        """1/N sum (P B)^2, elementwise, `[1, V, d_in]`.

        Args:
            basis: None, and B `[1, d_in, d_in]` or None for the identity.

        Raises:
            OutOfReachError: for a basis of the rows.
        """
        left, right = basis
        if left is not None:
            raise OutOfReachError("a basis of the rows takes as many numbers as rows, squared")
        return self._one(self._name_of(basis), _squares, right)

    def gram(self) -> Tensor:
        """Inner products <P_n, P_m> `[N, N]`."""
        return self._first_pass().gram

    def squared_gram(self) -> Tensor:
        """Their squares, with one direction an example."""
        return self.gram().square()

    def square(self) -> Tensor:
        """|F|_Frobenius^2."""
        return self.squared_gram().mean()

    def _first_pass(self) -> FirstPass:
        """What the first pass gives, which every approximation reads something of."""
        found = self._sum(("first pass",), _first_pass)
        return FirstPass(*found)

    # -- products ----------------------------------------------------------------------------------
    def project(self, V: Tensor) -> Tensor:
        """<P_n, V> `[..., 1, N]` for V `[..., V, d_in]`."""
        many = V.flatten(0, -3) if V.ndim > 2 else V.unsqueeze(0)
        total = V.new_zeros(len(many), self.N)
        for rows, P in self.stats.sliced():
            total += many[:, rows].flatten(1) @ P.flatten(1).T
        return total.view(*V.shape[:-2], 1, self.N)

    def combine(self, s: Tensor) -> Tensor:
        """sum_n s_n P_n `[..., V, d_in]` for s `[..., 1, N]`."""
        weights = s.reshape(-1, self.N)
        total = s.new_empty(len(weights), *self.shape)
        for rows, P in self.stats.sliced():
            products = weights @ P.flatten(1)
            total[:, rows] = products.unflatten(1, P.shape[1:])
        return total.view(*s.shape[:-2], *self.shape)

    def apply(self, X: Tensor, weight: Tensor | None = None) -> Tensor:
        """F X for X `[..., V, d_in]`."""
        s = self.project(X)
        if weight is None:
            return self.combine(s / self.N)
        return self.combine(s * weight.unsqueeze(-2))

    def dense(self) -> Tensor:
        """The exact block F `[d, d]`."""
        parts = [P.flatten(1) for _, P in self.stats.sliced()]
        U = torch.cat(parts, 1)
        return U.T @ U / self.N

    # -- the statistics themselves -----------------------------------------------------------------
    def form_gradients(self, most_bytes: float) -> bool:  # noqa: ARG002
        """They are never formed whole."""
        return False

    def _statistics(self) -> list[Tensor]:
        """The tensors that all readers share."""
        return [self.stats.a, self.stats.e, self.stats.W]

    @property
    def a(self) -> Tensor:
        """Inputs of the Linear layer `[N, T, 1, d_in]`, read only."""
        return self.stats.a.unsqueeze(2)

    @property
    def g(self) -> Tensor:
        """Never whole.

        Raises:
            OutOfReachError: always.
        """
        raise OutOfReachError("its output gradients are never formed whole")

    @property
    def R(self) -> int:
        """One direction."""
        return 1

    @property
    def Q(self) -> int:
        """One group."""
        return 1

    @property
    def d_out(self) -> int:
        """V."""
        return self.stats.shape[0]

    @property
    def d_in(self) -> int:
        """Inputs, the bias column among them."""
        return self.stats.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """One input mode."""
        return (self.d_in - self.stats.bias,)

    @property
    def rank_one(self) -> bool:
        """Never asked as if it were."""
        return False

    def gradients(self) -> Tensor:
        """Never whole.

        Raises:
            OutOfReachError: always.
        """
        raise OutOfReachError("its per-example gradients are never formed whole")

    def per_example(self, chunk_bytes: float | None = None) -> Iterator[Tensor]:
        """Per-example gradients P `[1, n, 1, V, d_in]` of some examples at a time, one at least."""
        of_example = self.stats.dim * self.stats.itemsize
        for part in pieces.slices(self.N, of_example, chunk_bytes):
            some = self.stats.examples(part)
            P = torch.cat([rows for _, rows in some.sliced()], 1)
            yield P[None, :, None]

    def examples(self, part: slice) -> VocabularySums:
        """Some of the examples, with sums of their own."""
        return VocabularySums(self.stats.examples(part), shared=False)


def sums_over(stats: LayerStats | VocabularyStats, shared: bool = True) -> Sums:
    """The sums over statistics of either kind."""
    if isinstance(stats, VocabularyStats):
        return VocabularySums(stats, shared)
    return Sums(stats, shared)


class FirstPass(NamedTuple):
    """What one pass over the slices gives.

    Attributes:
        G: diagonal `[1, V]` of 1/N sum g g^T.
        U1: diagonal `[1, V]` of 1/N sum_t |a|^2 g g^T.
        U2: 1/N sum_t |g|^2 a a^T `[1, d_in, d_in]`.
        left: diagonal `[1, V]` of 1/N sum P P^T.
        gram: <P_n, P_m> `[N, N]`.
    """

    G: Tensor
    U1: Tensor
    U2: Tensor
    left: Tensor
    gram: Tensor


def _first_pass(stats: VocabularyStats) -> tuple[Tensor, ...]:
    """The tensors of a FirstPass."""
    N = stats.N
    V = stats.shape[0]
    sizes = stats.a.square().sum(-1).flatten()  # |a|^2
    weights = torch.stack([torch.ones_like(sizes), sizes])
    of_positions = stats.W.new_zeros(2, V)
    gradient_sizes = torch.zeros_like(sizes)  # |g|^2
    left = stats.W.new_zeros(V)
    gram = stats.W.new_zeros(N, N)
    for rows in stats.slices():
        g = stats.output_gradients(rows)
        P = stats.gradients(rows, g)
        flat = P.flatten(1)
        gram.addmm_(flat, flat.T)
        squares = g.square_().flatten(0, 1)
        of_positions[:, rows] = weights @ squares
        gradient_sizes += squares.sum(-1)
        left[rows] = P.square_().sum((0, 2))
    # a lookup has |g|^2 = |e|^2 / d, |a|^2 |g|^2 = |e|^2, and |g|^2 a a^T = e e^T
    size, _ = stats.split()
    G = of_positions[0] + stats.over_rows(size.square())
    U1 = of_positions[1] + stats.over_rows(stats.e.square().sum(-1))
    trained = stats.e[stats.index != NO_LABEL]
    scaled = stats.a.flatten(0, 1) * gradient_sizes.sqrt().unsqueeze(-1)
    U2 = scaled.T @ scaled + trained.T @ trained
    return G[None] / N, U1[None] / N, U2[None] / N, left[None] / N, gram


def _second_moment_of_inputs(stats: VocabularyStats) -> Tensor:
    """1/(N T) sum a a^T `[1, d_in, d_in]` over all positions."""
    _, inputs = stats.split()
    both = torch.cat([stats.a.flatten(0, 1), inputs.flatten(0, 1)])
    total = both.T @ both
    return total[None] / (stats.N * stats.T)


def _left(stats: VocabularyStats, A: Tensor) -> Tensor:
    """The diagonal of 1/N sum P A P^T, by a root of A, which is smaller than P."""
    if A.ndim == 2:
        root = torch.diag(A[0].sqrt())
    else:
        values, vectors = eigh(A[0])
        root = vectors * values.sqrt()
    total = stats.W.new_zeros(stats.shape[0])
    for rows, P in stats.sliced(root):
        total[rows] = P.square_().sum((0, 2))
    return total[None] / stats.N


def _right(stats: VocabularyStats, G: Tensor | None = None) -> Tensor:
    """1/N sum P^T G P for a diagonal G."""
    d_in = stats.shape[1]
    total = stats.W.new_zeros(d_in, d_in)
    for rows, P in stats.sliced():
        if G is not None:
            P *= G[0, rows].sqrt().unsqueeze(-1)
        flat = P.flatten(0, 1)
        total.addmm_(flat.T, flat)
    return total[None] / stats.N


def _squares(stats: VocabularyStats, right: Tensor | None) -> Tensor:
    """1/N sum (P B)^2 `[1, V, d_in]`."""
    B = None if right is None else right[0]
    total = torch.empty_like(stats.W)
    for rows, P in stats.sliced(B):
        total[rows] = P.square_().sum(0)
    return total[None] / stats.N
