"""Sums: the statistics of one layer together with the sums over them that several readers share.

TKFAC, TN and LNGD all read `right()`; the exact block and every comparison with it read
`squared_gram()`. A sum is computed for the first of them and kept. What is handed out, sums and
per-example gradients, is the reader's own, to be worked on in place as well, and what it cost
stands on the bill of everybody who read it, so that the seconds of a method do not depend on who
else was asked, or in which order.

The statistics themselves, `a` and `g`, are too large to be copied for everybody. They are read
only: a method that changes them in place is refused by name (`unchanged`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fisher_lab.statistics import contractions, pieces
from fisher_lab.statistics.contractions import Basis
from fisher_lab.statistics.layer_stats import LayerStats

Name = tuple[Any, ...]  # what tells sums apart: the word for it, then its options


@dataclass
class Bill:
    """What one reader owes: its own time, and that of every sum it read, by whomever computed."""

    own: float = 0.0
    read: dict[Name, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of it."""
        of_sums = sum(self.read.values())
        return self.own + of_sums


@dataclass
class _Kept:
    """A sum, and the bill for it: other sums may have gone into it."""

    value: tuple[Tensor, ...]
    bill: Bill


@dataclass
class _Running:
    """A bill being written."""

    started: float
    bill: Bill
    elsewhere: float = 0.0  # spent on sums, which have bills of their own


class Sums:
    """A layer's statistics and the sums over them: all that an approximation sees.

    It answers for the statistics themselves, too: `sums.a`, `sums.g`, `sums.N`, ... are those of
    `sums.stats`.

    Args:
        stats: the statistics.
        shared: whether several readers may ask for the same sum. Without it nothing is kept and
            nothing copied, which is right where there is one reader: in an optimizer's window.

    See Also:
        fisher_lab.statistics.contractions: the same sums as functions, computed anew at every call.
    """

    def __init__(self, stats: LayerStats, shared: bool = True) -> None:
        self._given = stats
        self.stats = stats  # those given, or the same with gradients formed: see `hold`
        self.shared = shared
        self._kept: dict[Name, _Kept] = {}
        self._bases: list[tuple[Basis, Name]] = []  # in which squares are kept
        self._running: list[_Running] = []
        self._paid: dict[Hashable, set[Name]] = {}  # by reader

    # -- life time ---------------------------------------------------------------------------------
    def form_gradients(self, most_bytes: float) -> bool:
        """Form the per-example gradients once and keep them, if positions are shared and they fit.

        This is no sum of anybody's: it is done before the readers come, and stands on no bill.

        Returns:
            Whether they are at hand now.
        """
        self.stats = contractions.with_gradients(self.stats, most_bytes)
        return self.stats.formed

    def free(self) -> None:
        """Forget all sums and the gradients held; what is asked for later is computed again."""
        self.stats = self._given
        self._kept.clear()
        self._bases.clear()
        self._paid.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

    def __reduce__(self) -> Any:
        """Copies and pickles hold the statistics alone."""
        return type(self), (self._given, self.shared)

    @contextmanager
    def unchanged(self, reader: str) -> Iterator[None]:
        """Refuse that what happens inside changes the statistics in place.

        Only torch's own count of changes is read, no number: nothing waits for the device.

        Args:
            reader: whose work it is, for the message.

        Raises:
            ValueError: where it does; all that is read later would be of other data.
        """
        tensors = self._statistics()
        before = [_changes(x) for x in tensors]
        yield
        after = [_changes(x) for x in tensors]
        if after != before:
            raise ValueError(
                f"{reader} changed the layer's inputs or output gradients in place, expected them "
                "as they were, because others read them too; work on a copy (`sums.g.clone()`)."
            )

    def apart(self, x: Any) -> Any:
        """A copy of what is one of the statistics, or a view of one; all else as it is."""
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage().data_ptr()
        for shared in self._statistics():
            if shared.untyped_storage().data_ptr() == storage:
                return x.clone()
        return x

    def _statistics(self) -> list[Tensor]:
        """The tensors that all readers share."""
        found = [self.stats.g]
        if self.stats.a is not None:
            found.append(self.stats.a)
        if self.stats.held is not None:
            found.append(self.stats.held)
        return found

    # -- costs -------------------------------------------------------------------------------------
    @contextmanager
    def billed(self, reader: Hashable = None) -> Iterator[Bill]:
        """The bill of what happens inside; its seconds are known when the `with` ends.

        Args:
            reader: who comes several times, and pays for a sum once.
        """
        running = _Running(time.perf_counter(), Bill())
        self._running.append(running)
        try:
            yield running.bill
        finally:
            self._running.pop()
            elapsed = time.perf_counter() - running.started
            running.bill.own += elapsed - running.elsewhere
            if self._running:
                self._running[-1].elsewhere += elapsed
            if reader is not None:
                self._settle(reader, running.bill)

    def _settle(self, reader: Hashable, bill: Bill) -> None:
        """Take from a bill what its reader paid before."""
        paid = self._paid.setdefault(reader, set())
        again = paid & set(bill.read)
        for name in again:
            del bill.read[name]
        paid.update(bill.read)

    @property
    def seconds(self) -> dict[str, float]:
        """Own seconds of every sum computed so far, by its name."""
        found = {}
        for name, kept in self._kept.items():
            words = " ".join(map(str, name))
            found[words] = kept.bill.own
        return found

    def _sum(
        self,
        name: Name,
        compute: Callable[..., tuple[Tensor, ...]],
        *options: Any,
    ) -> tuple[Tensor, ...]:
        """A sum, computed for the first who asks; every reader gets tensors of their own.

        Args:
            name: of the sum.
            compute: the function of the statistics that gives it.
            options: its further arguments.
        """
        if not self.shared:
            return compute(self.stats, *options)
        if name not in self._kept:
            with self.billed() as bill:
                value = compute(self.stats, *options)
            self._kept[name] = _Kept(value, bill)
        kept = self._kept[name]
        if self._running:
            # the reader owes this sum, and all that went into it
            read = self._running[-1].bill.read
            read.update(kept.bill.read)
            read[name] = kept.bill.own
        # they may be worked on in place
        return tuple(x.clone() for x in kept.value)

    def _one(self, name: Name, compute: Callable[..., Tensor], *options: Any) -> Tensor:
        """As `_sum`, of one tensor."""

        def alone(*arguments: Any) -> tuple[Tensor]:
            return (compute(*arguments),)

        (value,) = self._sum(name, alone, *options)
        return value

    # -- shared sums -------------------------------------------------------------------------------
    def left(self, A: Tensor | None = None) -> Tensor:
        """1/N sum P A P^T `[Q, d_out, d_out]`; U1 without A.

        Args:
            A: symmetric `[Q, d_in, d_in]`, or a diagonal `[Q, d_in]`.
        """
        if A is not None:  # a factor of somebody's own: no other reader will ask for it
            return contractions.left(self.stats, A)
        return self._one(("left",), contractions.left)

    def right(self, G: Tensor | None = None) -> Tensor:
        """1/N sum P^T G P `[Q, d_in, d_in]`; U2 without G.

        Args:
            G: symmetric `[Q, d_out, d_out]`, or a diagonal `[Q, d_out]`.
        """
        if G is not None:
            return contractions.right(self.stats, G)
        return self._one(("right",), contractions.right)

    def factors(self, spatial: str = "expand") -> tuple[Tensor, Tensor]:
        """A `[Q, d_in, d_in]` and G `[Q, d_out, d_out]` of KFAC.

        Args:
            spatial: see `contractions.input_and_gradient_moments`.
        """
        name = ("factors", spatial)
        A, G = self._sum(name, contractions.input_and_gradient_moments, spatial)
        return A, G

    def uncorrelated(self) -> tuple[Tensor, Tensor]:
        """U1 and U2 of uncorrelated positions; see `contractions.uncorrelated_positions`."""
        U1, U2 = self._sum(("uncorrelated",), contractions.uncorrelated_positions)
        return U1, U2

    def modes(self, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Second moments `[Q, n_i, n_i]` of every mode of the weight proper, the output first."""
        name = ("modes", sizes)
        return self._sum(name, contractions.modes, sizes)

    def bias_block(self) -> Tensor:
        """The exact block of the bias column alone `[Q * d_out, Q * d_out]`."""
        return self._one(("bias block",), _bias_block)

    def squares(self, basis: Basis = (None, None)) -> Tensor:
        """1/N sum (B_1^T P B_2)^2, elementwise, `[Q, d_out, d_in]`; None stands for the identity.

        Args:
            basis: orthogonal matrices B_1 `[Q, d_out, d_out]` and B_2 `[Q, d_in, d_in]`.
        """
        name = self._name_of(basis)
        return self._one(name, contractions.squares, basis)

    def gram(self) -> Tensor:
        """Inner products <P_rn, P_sm> `[R * N, R * N]`; kept where `contractions.gram_pays`."""
        if not contractions.gram_pays(self.stats):
            return contractions.gram(self.stats)
        return self._one(("gram",), contractions.gram)

    def squared_gram(self) -> Tensor:
        """<F_n, F_m>_Frobenius `[N, N]` of the examples' own blocks; |F|^2 is its mean."""
        return self._one(("squared gram",), self._squared_gram)

    def _squared_gram(self, stats: LayerStats) -> Tensor:
        """As `squared_gram`, from the Gram matrix where that is shared too."""
        known = None
        if contractions.gram_pays(stats):
            known = self.gram()
        return contractions.squared_gram(stats, known)

    def square(self) -> Tensor:
        """|F|_Frobenius^2, a scalar, never forming F."""
        stats = self.stats
        size = stats.N**2 * stats.itemsize
        if size <= pieces.kept():
            products = self.squared_gram()
            return products.mean()
        return contractions.overlap(stats, stats)

    @property
    def bases(self) -> tuple[Basis, ...]:
        """The bases in which `squares` are known already."""
        return tuple(basis for basis, _ in self._bases)

    def _name_of(self, basis: Basis) -> Name:
        """One name for bases of equal numbers."""
        left, right = basis
        for known, name in self._bases:
            known_left, known_right = known
            if _same(left, known_left) and _same(right, known_right):
                return name
        name = ("squares", len(self._bases))
        if self.shared:
            self._bases.append((basis, name))
        return name

    # -- sums of one reader ------------------------------------------------------------------------
    def dense(self) -> Tensor:
        """The exact block F `[d, d]`."""
        return contractions.dense(self.stats)

    def row_blocks(self, width: int) -> Tensor:
        """Blocks of F over pieces of `width` entries of a row: `[d / width, width, width]`."""
        return contractions.row_blocks(self.stats, width)

    def column_blocks(self) -> Tensor:
        """Blocks of F over columns of W, group by group: `[Q * d_in, d_out, d_out]`."""
        return contractions.column_blocks(self.stats)

    def apply(self, X: Tensor, weight: Tensor | None = None) -> Tensor:
        """F X for X `[..., Q * d_out, d_in]`; see `contractions.apply`."""
        return contractions.apply(self.stats, X, weight)

    def project(self, V: Tensor) -> Tensor:
        """<P_rn, V> `[..., R, N]` for V `[..., Q * d_out, d_in]`."""
        return contractions.project(self.stats, V)

    def combine(self, s: Tensor) -> Tensor:
        """sum_{r,n} s_rn P_rn `[..., Q * d_out, d_in]` for s `[..., R, N]`."""
        return contractions.combine(self.stats, s)

    # -- the statistics themselves -----------------------------------------------------------------
    @property
    def a(self) -> Tensor | None:
        """Layer inputs `[N, T, Q, d_in]`, read only."""
        return self.stats.a

    @property
    def g(self) -> Tensor:
        """Output gradients `[R, N, T, Q, d_out]`, read only."""
        return self.stats.g

    @property
    def R(self) -> int:
        """Directions per example."""
        return self.stats.R

    @property
    def N(self) -> int:
        """Examples."""
        return self.stats.N

    @property
    def T(self) -> int:
        """Positions at which the weight is shared."""
        return self.stats.T

    @property
    def Q(self) -> int:
        """Groups."""
        return self.stats.Q

    @property
    def d_out(self) -> int:
        """Outputs of a group."""
        return self.stats.d_out

    @property
    def d_in(self) -> int:
        """Inputs of a group, the bias column among them."""
        return self.stats.d_in

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W: `(Q * d_out, d_in)`."""
        return self.stats.shape

    @property
    def dim(self) -> int:
        """Number of parameters d of the block."""
        return self.stats.dim

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the input modes of the weight proper."""
        return self.stats.kernel

    @property
    def bias(self) -> bool:
        """Whether the last column of `a` belongs to the bias."""
        return self.stats.bias

    @property
    def rank_one(self) -> bool:
        """Whether every per-example gradient is g a^T."""
        return self.stats.rank_one

    def gradients(self) -> Tensor:
        """All per-example gradients P `[R, N, Q, d_out, d_in]` at once."""
        P = self.stats.gradients()
        return self._own(P)

    def per_example(self, chunk_bytes: float | None = None) -> Iterator[Tensor]:
        """Per-example gradients in chunks of examples: P `[R, n, Q, d_out, d_in]`."""
        for P in self.stats.per_example(chunk_bytes):
            yield self._own(P)

    def _own(self, P: Tensor) -> Tensor:
        """Per-example gradients for one reader alone, who may work on them in place."""
        if self.stats.formed:  # a view of what everybody reads
            return P.clone()
        return P

    def examples(self, part: slice) -> Sums:
        """Some of the examples, with sums of their own."""
        some = self.stats.examples(part)
        return Sums(some, shared=False)

    def inputs(self, part: slice) -> Sums:
        """Some of the columns of W, as one mode, with sums of their own."""
        some = self.stats.inputs(part)
        return Sums(some, shared=False)


def as_sums(columns: LayerStats | Sums) -> Sums:
    """Statistics as sums of one reader; Sums as they are."""
    if isinstance(columns, Sums):
        return columns
    return Sums(columns, shared=False)


def _bias_block(stats: LayerStats) -> Tensor:
    """The exact block of the last column of W."""
    bias = stats.inputs(slice(-1, None))
    return contractions.dense(bias)


def _changes(x: Tensor) -> int:
    """How often a tensor, or a view of it, was changed in place; 0 where torch does not count."""
    if x.is_inference():
        return 0
    return x._version


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether both are the identity (None) or hold the same numbers."""
    if x is y:
        return True
    if x is None or y is None:
        return False
    return torch.equal(x, y)
