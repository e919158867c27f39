"""The FisherMatrix noun: a symmetric PSD matrix over one weight W, acting on arrays of
W's shape.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fisher_lab._ground.arguments import check_kind, is_whole, number, shown
from fisher_lab._ground.linalg import lanczos, start_vector
from fisher_lab._ground.memory import available_bytes, readable
from fisher_lab._ground.notebook import Cell, html_table
from fisher_lab.statistics import LayerStats, Sums, VocabularyStats, pieces

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

DampingStyle = Literal["exact", "factored"]
Scalar = float | Tensor  # a number, or a 0-d tensor that stays on its device
AnyStats = LayerStats | Sums  # the columns of a block, alone or with what was computed of them
# on arrays of the shape of W, or several `[..., d_out, d_in]`
Operator = Callable[[Tensor], Tensor]
Visitor = Callable[[str, Tensor], Tensor]  # of a tensor by its dotted name

_log = logging.getLogger("fisher_lab")
_told: set[tuple[type, str]] = set()  # of which structure which slow default was told already


def tell_slow(matrix: FisherMatrix, method: str, how: str) -> None:
    """Say once for a structure which of its methods has only the slow default.

    Args:
        matrix: of the structure.
        method: the one to specialise.
        how: what the default does.
    """
    kind = type(matrix)
    if (kind, method) in _told:
        return
    _told.add((kind, method))
    name = kind.__name__
    _log.warning(
        "%s has no %s of its own: the default %s. Define it where that takes long.",
        name,
        method,
        how,
    )


class FisherMatrix(ABC):
    """Symmetric positive semi-definite matrix over the entries of W `[d_out, d_in]`, row-major.

    Structures are frozen dataclasses that hold tensors and owe `shape`, `_apply`, `trace`,
    `frobenius_norm`, `scaled` and `_powered`; everything else has a right, possibly slow, default
    here. The slowest say once, in the log "fisher_lab", which method a structure should define.

    Example:
        >>> V = torch.ones(6, 9, dtype=torch.float64)
        >>> step = exact.solve(V, damping=0.01)
        >>> torch.allclose(exact @ step + 0.01 * step, V)
        True
    """

    _as_dense: ClassVar[type[Any]]  # Dense: its file sets it here, which stands above this one

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape `(d_out, d_in)` of W."""

    @abstractmethod
    def _apply(self, X: Tensor) -> Tensor:
        """The matrix times vec(X), for X `[..., d_out, d_in]`."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Root of the sum of squared eigenvalues, a scalar."""

    @abstractmethod
    def scaled(self, c: Scalar) -> FisherMatrix:
        """c times this matrix, c >= 0."""

    @abstractmethod
    def _powered(self, p: float, damping: Scalar) -> FisherMatrix:
        """(self + damping I)^p."""

    # -- what every structure gets -----------------------------------------------------------------
    @property
    def dim(self) -> int:
        """Number of parameters d."""
        return math.prod(self.shape)

    def __matmul__(self, X: Tensor) -> Tensor:
        """The matrix times vec(X), for X `[..., d_out, d_in]`, in the shape of X."""
        if not isinstance(X, Tensor):
            raise TypeError(
                f"Got type {type(X).__name__}, expected a tensor of the weight's shape "
                f"{self.shape}."
            )
        if X.ndim < 2 or tuple(X.shape[-2:]) != tuple(self.shape):
            raise ValueError(
                f"Got an array of shape {tuple(X.shape)}, expected [..., {self.shape[0]}, "
                f"{self.shape[1]}]: a FisherMatrix acts on arrays of the shape of its weight "
                "(bias as the last column)."
            )
        if X.layout != torch.strided:
            raise TypeError(f"Got a {X.layout} tensor, expected a dense one; use X.to_dense().")
        if X.dtype != self.dtype:
            raise TypeError(
                f"Got a {X.dtype} tensor, expected {self.dtype}; use X.to({self.dtype})."
            )
        if X.device != self.device:
            # some kernels read memory that is not there instead of raising
            raise TypeError(
                f"Got a tensor on {X.device}, expected {self.device}; use "
                f"X.to({str(self.device)!r})."
            )
        return self._apply(X)

    def powered(
        self, p: float, damping: Scalar = 0.0, style: DampingStyle = "exact"
    ) -> FisherMatrix:
        """(self + damping I)^p as a FisherMatrix, factorised once.

        Damping 0 with p < 0 is the pseudo-inverse.

        Args:
            p: the power, for instance -1.
            damping: lambda >= 0, on the scale of the Fisher. A 0-d tensor is never looked at: where
                it is negative or not finite, the result is NaN.
            style: "exact" adds lambda I; "factored" (Kronecker only) brings the k factors to equal
                mean eigenvalue and adds lambda^(1/k) to each.

        Raises:
            ValueError: a power that is not finite, negative damping, or "factored" for a structure
                without factors.
            TypeError: a damping in a tensor of another kind or device.
        """
        check_power(p)
        damping = checked_scalar(damping, "damping", self)
        if style == "factored":
            return self._powered_factored(p, damping)
        if style != "exact":
            raise ValueError(f'Got style={style!r}, expected "exact" or "factored".')
        return self._powered(p, damping)

    def _powered_factored(self, p: float, damping: Scalar) -> FisherMatrix:  # noqa: ARG002
        raise ValueError(
            f"{type(self).__name__} got factored damping, expected exact damping: only Kronecker "
            'products have factors to damp; use style="exact".'
        )

    @property
    def examples(self) -> int | None:
        """Of how many examples' own blocks it is the mean; None for what is no such mean."""
        return None

    @property
    def has_factors(self) -> bool:
        """Whether there is something that factored damping can damp."""
        return type(self)._powered_factored is not FisherMatrix._powered_factored

    @property
    def damps_exactly(self) -> bool:
        """Whether exact damping costs no more than factored damping: trainers need not make do."""
        return False

    def rescued(self, p: float, damping: Scalar) -> FisherMatrix:
        """(self + damping I)^p by eigendecompositions, where a Cholesky factorisation failed.

        Args:
            p: the power.
            damping: lambda >= 0.

        Raises:
            ValueError: if the default would need a dense matrix that does not fit into the memory
                that is free.
        """
        tell_slow(self, "rescued", "decomposes the dense matrix")
        dense = self._as_dense(self.dense(), self.shape)
        return dense.rescued(p, damping)

    def power(
        self, X: Tensor, p: float, damping: Scalar = 0.0, style: DampingStyle = "exact"
    ) -> Tensor:
        """(self + damping I)^p times vec(X) `[..., d_out, d_in]`; `powered` factorises once."""
        return self.powered(p, damping, style) @ X

    def solve(self, X: Tensor, damping: Scalar, style: DampingStyle = "exact") -> Tensor:
        """(self + damping I)^-1 vec(X), for X `[..., d_out, d_in]`."""
        return self.power(X, -1.0, damping, style)

    def dense(self) -> Tensor:
        """The matrix itself `[d, d]`.

        Raises:
            ValueError: if it would not fit into the memory that is free.
        """
        d = self.dim
        entry = torch.finfo(self.dtype).bits // 8
        need = 2 * d * d * entry  # the matrix and room to work on it
        free = available_bytes()
        if need > free:
            raise ValueError(
                f"A dense block with d={d} needs {readable(need)} and {readable(free)} is free; "
                "use @, solve and the norms, which need no dense matrix."
            )
        return self._dense()

    def _dense(self) -> Tensor:
        rows = []
        for E in self.identity_chunks():
            image = self @ E
            rows.append(image.flatten(1))
        return torch.cat(rows)

    def identity_chunks(self) -> Iterator[Tensor]:
        """The identity in pieces `[c, d_out, d_in]`, a few rows of it at a time."""
        d = self.dim
        row = 8 * d  # bytes
        step = max(1, int(pieces.chunk() // row))
        for start in range(0, d, step):
            rows = min(step, d - start)
            E = torch.zeros(rows, d, dtype=self.dtype, device=self.device)
            E.diagonal(start).fill_(1)
            yield E.view(rows, *self.shape)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues `[d]`, ascending."""
        return torch.linalg.eigvalsh(self.dense())

    def spectral_norm(self) -> Tensor:
        """Largest eigenvalue, a scalar; by the Lanczos method, once, where there is no shortcut."""
        return self._top

    @cached_property
    def _top(self) -> Tensor:
        def apply(v: Tensor) -> Tensor:
            X = v.view(self.shape)
            return self._apply(X).flatten()

        found = lanczos(apply, start_vector(self), tolerance=1e-6)
        return torch.tensor(found.high, dtype=self.dtype, device=self.device)

    def quadratic(self, stats: AnyStats) -> Tensor:
        """<F, self>_Frobenius for the block F of `stats`.

        It is 1/N sum of vec(P)^T self vec(P) over the columns vec(P) of F.

        Args:
            stats: the columns; as Sums, what others computed of them is used, and what is computed
                is kept for others.
        """
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for P in stats.per_example(pieces.stream()):
            P = P.flatten(2, 3)
            image = self._apply(P)
            total = total + (P * image).sum()
        return total / stats.N

    # -- beside another matrix ---------------------------------------------------------------------
    # Where one of the two is held as the columns of F, the other one answers: it knows which
    # contraction of columns with its own numbers is cheap (`quadratic`, `_taken_from`,
    # `_square_distance_to`).
    def inner(self, other: FisherMatrix) -> Tensor:
        """<self, other>_Frobenius, a scalar, without a dense matrix."""
        check_beside(self, other)
        found = self._inner_by_columns(other)
        if found is None:
            found = other._inner_by_columns(self)
        if found is not None:
            return found
        tell_slow(self, "inner", "takes d products with either matrix")
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for E in self.identity_chunks():
            mine = self @ E
            theirs = other @ E
            total = total + (mine * theirs).sum()
        return total

    def _inner_by_columns(self, other: FisherMatrix) -> Tensor | None:  # noqa: ARG002
        """<self, other> from the columns of this matrix; None for one that is not held as
        columns.
        """
        return None

    def minus(self, other: FisherMatrix) -> Operator:
        """An operator with the eigenvalues of self - other.

        X -> self X - other X, up to a rotation of the space.
        """
        check_beside(self, other)
        return lambda X: self @ X - other @ X

    def _taken_from(self, stats: LayerStats) -> Operator | None:  # noqa: ARG002
        """An operator with the eigenvalues of F - self, where one costs less than two products.

        Args:
            stats: the columns of F.
        """
        return None

    def differences(self, others: Sequence[FisherMatrix], V: Tensor) -> list[Tensor]:
        """(self - others[i]) V[i] for V `[L, d_out, d_in]`, from one product of this matrix.

        Args:
            others: L matrices.
            V: one array for each.
        """
        Y = self @ V
        found = []
        for other, v, y in zip(others, V, Y, strict=True):
            found.append(y - other @ v)
        return found

    @property
    def shares_products(self) -> bool:
        """Whether products should wait for each other: one with several X costs much less."""
        return False

    @property
    def product_flops(self) -> float:
        """Multiplications of a product with one X, an upper bound."""
        return float(self.dim) ** 2

    def square_distance(self, other: FisherMatrix, most_flops: float) -> float | None:
        """|self - other|_Frobenius^2 without cancellation, entry by entry.

        Args:
            other: another matrix over W.
            most_flops: the work allowed; None is returned where it would be more.
        """
        # d products with either matrix, a multiplication and an addition each
        flops = 4 * self.product_flops * self.dim
        if flops > most_flops:
            return None
        total = 0.0
        for E in self.identity_chunks():
            difference = self @ E - other @ E
            total += float(difference.square().sum())
        return total

    def norm_of_difference(self, other: FisherMatrix) -> tuple[float, float] | None:  # noqa: ARG002
        """|self - other|_2 and how far it may be off, where there is a route of its own."""
        return None

    def _square_distance_to(self, stats: LayerStats, most_flops: float) -> float | None:  # noqa: ARG002
        """|F - self|_Frobenius^2 for the F of `stats` without cancellation, by a route of
        its own.
        """
        return None

    def known_square(self, other: FisherMatrix) -> Tensor | None:  # noqa: ARG002
        """|other|_Frobenius^2 where it is a part of what this matrix's own norm was made of."""
        return None

    def same(self, other: FisherMatrix) -> bool:
        """Whether the other matrix has the same structure and the same numbers."""
        if type(self) is not type(other) or tuple(self.shape) != tuple(other.shape):
            return False
        mine = self.tensors()
        theirs = other.tensors()
        if self._plain_fields() != other._plain_fields() or mine.keys() != theirs.keys():
            return False
        for name, tensor in mine.items():
            if not torch.equal(tensor, theirs[name]):
                return False
        return True

    def _fields(self) -> dict[str, Any]:
        """The fields of the dataclass that the structure is, by name."""
        found = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            found[field.name] = getattr(self, field.name)
        return found

    def _plain_fields(self) -> dict[str, Any]:
        """The fields that hold no tensors."""
        found = {}
        for name, value in self._fields().items():
            if not isinstance(value, HOLDERS):
                found[name] = value
        return found

    def to_scipy(self) -> LinearOperator:
        """This matrix as a `scipy.sparse.linalg.LinearOperator` `[d, d]` on the CPU."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(V: Any) -> Any:
            columns = torch.as_tensor(V, dtype=self.dtype, device=self.device)
            X = columns.T.reshape(-1, *self.shape)
            image = self._apply(X).flatten(1)
            return image.T.cpu().numpy()

        def matvec(v: Any) -> Any:
            column = v.reshape(-1, 1)
            return matmat(column)[:, 0]

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype  # NumPy's name of it
        return LinearOperator(
            (self.dim, self.dim),
            matvec=matvec,
            matmat=matmat,
            rmatvec=matvec,  # it is symmetric
            dtype=dtype,
        )

    # -- several matrices as one -------------------------------------------------------------------
    @property
    def signature(self) -> Hashable:
        """What matrices must have in common for `stack` to join them; None: it stays alone.

        Trainers work on all layers of one signature in one batched call; layers that stay alone
        take a call each.
        """
        tell_slow(self, "signature", "works on every layer alone")
        return None

    def stack(self, others: Sequence[Self]) -> Self:
        """Matrices of one signature as one over the rows of all, `[L * d_out, d_in]`, in order.

        Raises:
            ValueError: if there are others and the structure says no signature.
        """
        if not others:
            return self
        if self.signature is None:
            raise ValueError(
                f"Got {1 + len(others)} matrices of structure {type(self).__name__} to stack, "
                "expected one: it stays alone; define signature, stack and part to join several."
            )
        together: dict[str, list[Tensor]] = {}
        for matrix in (self, *others):
            for name, tensor in matrix.tensors().items():
                together.setdefault(name, []).append(tensor)
        joined = {}
        for name, tensors in together.items():
            joined[name] = torch.cat(tensors)
        return self.with_tensors(joined)

    def part(self, index: int, count: int) -> Self:
        """One of the `count` equal matrices that `stack` joined."""
        check_index(index, count)
        if count == 1:
            return self
        own = {}
        for name, tensor in self.tensors().items():
            chunks = tensor.chunk(count)
            own[name] = chunks[index]
        return self.with_tensors(own)

    def _shapes(self) -> Hashable:
        """The signature of structures whose tensors can be joined along their first axis."""
        shapes = []
        for name, tensor in self.tensors().items():
            shapes.append((name, tuple(tensor.shape)))
        return type(self).__name__, tuple(shapes)

    # -- tensors: bytes, device, checkpoints -------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by a dotted name."""
        found: dict[str, Tensor] = {}
        self._visit(lambda name, tensor: found.setdefault(name, tensor))
        return found

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same structure holding other tensors, named as in `tensors`."""
        return self._visit(lambda name, _: tensors[name])

    def forgetful(self) -> Self:
        """The same matrix without the decompositions and norms that it remembers.

        `nbytes` does not count these.
        """
        return self.with_tensors(self.tensors())

    def remembers(self, name: str) -> bool:
        """Whether something it computes once was computed, or handed to it, already.

        Args:
            name: of a cached property: `eigenpairs`, `eigenbasis`, `_eigh`, `_top` and others.
        """
        return name in self.__dict__

    def _remember(self, name: str, value: Any) -> None:
        """Hand over what a cached property would compute."""
        self.__dict__[name] = value

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """The same matrix elsewhere or in another precision.

        Raises:
            TypeError: for what is no device or no floating point precision.
            ValueError: for a device that is not there.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"Got dtype={shown(dtype)}, expected torch.float64 or torch.float32.")
        check_kind("device", device, (str, torch.device), 'a device such as "cpu"')
        elsewhere = {}
        try:
            for name, tensor in self.tensors().items():
                elsewhere[name] = tensor.to(device, dtype)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"Got device={device!r} ({reason}), expected a device of this machine."
            ) from error
        return self.with_tensors(elsewhere)

    def _visit(self, fn: Visitor, prefix: str = "") -> Self:
        """The same structure with fn(dotted name, tensor) in the place of every tensor."""
        fields = {}
        for name, value in self._fields().items():
            fields[name] = _visit(prefix + name, value, fn)
        return type(self)(**fields)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        total = 0
        for tensor in self.tensors().values():
            total += tensor.numel() * tensor.element_size()
        return total

    # -- for people --------------------------------------------------------------------------------
    def __repr__(self) -> str:
        rows, columns = self.shape
        held = []
        for name, tensor in self.tensors().items():
            held.append(f"{name} {list(tensor.shape)}")
        return (
            f"{type(self).__name__} {self.dim} x {self.dim} over W {rows}x{columns}, {self.dtype} "
            f"on {self.device}, {readable(self.nbytes)}: {', '.join(held)}"
        )

    def _repr_html_(self) -> str:
        """What it is and holds, as a table of a notebook."""
        rows, columns = self.shape
        above = [
            f"{type(self).__name__}: {self.dim} x {self.dim} over W {rows}x{columns}",
            f"trace {float(self.trace()):.4g}, Frobenius norm {float(self.frobenius_norm()):.4g}",
        ]
        lines = []
        for name, tensor in self.tensors().items():
            size = tensor.numel() * tensor.element_size()
            shape = " x ".join(map(str, tensor.shape))
            kind = str(tensor.dtype).removeprefix("torch.")
            texts = [Cell(name), Cell(shape), Cell(kind), Cell(str(tensor.device))]
            lines.append([*texts, Cell(readable(size), size)])
        titles = ["tensor", "shape", "type", "device", "bytes"]
        return html_table(titles, lines, above, names=4)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the matrix, in the Frobenius norm, without the factors of
        order 10 that noise floors add: eps, or more where it was made by what magnifies rounding.
        """
        return torch.finfo(self.dtype).eps

    @cached_property
    def _example(self) -> Tensor:
        """One of the tensors: all have the same type and device."""
        held = self.tensors().values()
        return next(iter(held))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self._example.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._example.device


def checked_scalar(value: Scalar, what: str, matrix: FisherMatrix) -> Scalar:
    """A factor or damping >= 0; NaN for a tensor of another value, which is never looked at.

    A trainer's damping stays on its device: to look at it would make the step wait.

    Args:
        value: the number, or a 0-d tensor.
        what: its name, for the message.
        matrix: where it is used.

    Raises:
        ValueError: for a number that is negative or not finite, or several numbers.
        TypeError: for a tensor of truth values or complex numbers, or on another device.
    """
    if not isinstance(value, Tensor):
        if not 0 <= number(value) < math.inf:
            raise ValueError(f"Got {what}={shown(value)}, expected a finite number >= 0.")
        return number(value)  # tensors take no whole number of any size
    if value.ndim:
        raise ValueError(
            f"Got {what} of shape {list(value.shape)}, expected one number >= 0 or a 0-d tensor; "
            "call once for each."
        )
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"Got {what} of {value.dtype}, expected a real number >= 0.")
    if value.device != matrix.device:
        raise TypeError(
            f"Got {what} on {value.device}, expected {matrix.device}; use "
            f".to({str(matrix.device)!r})."
        )
    right = (value >= 0) & (value < math.inf)
    return torch.where(right, value, torch.nan)


def check_power(p: Any) -> None:
    """Raise a ValueError for what is no finite number."""
    if not math.isfinite(number(p)):
        raise ValueError(f"Got power {shown(p)}, expected a finite number such as -1.")


def check_index(index: int, count: int) -> None:
    """Raise a ValueError where there is no such part."""
    if not is_whole(count, 1) or not is_whole(index, 0) or index >= count:
        raise ValueError(
            f"Got part {shown(index)} of {shown(count)}, expected at least one part and an "
            "index below their number."
        )


def check_beside(matrix: FisherMatrix, other: FisherMatrix) -> None:
    """Raise a TypeError or ValueError for what is no matrix over the same weight."""
    if not isinstance(other, FisherMatrix):
        raise TypeError(f"Got a {type(other).__name__}, expected a FisherMatrix.")
    if tuple(matrix.shape) != tuple(other.shape):
        raise ValueError(
            f"Got a matrix over {tuple(other.shape)}, expected one over {tuple(matrix.shape)}; "
            "compare matrices of the same layer."
        )


HOLDERS = (Tensor, FisherMatrix, LayerStats, Sums, tuple)  # what a field holds tensors in


def _visit(name: str, value: Any, fn: Visitor) -> Any:
    """A field's value with fn(dotted name, tensor) in the place of every tensor."""
    if isinstance(value, Tensor):
        return fn(name, value)
    if isinstance(value, FisherMatrix):
        return value._visit(fn, f"{name}.")
    if isinstance(value, LayerStats):
        a = value.a
        if a is not None:
            a = fn(f"{name}.a", a)
        g = fn(f"{name}.g", value.g)
        return value.like(a, g)
    if isinstance(value, VocabularyStats):
        return value.visited(lambda key, tensor: fn(f"{name}.{key}", tensor))
    if isinstance(value, Sums):
        stats = _visit(name, value.stats, fn)
        return type(value)(stats, value.shared)
    if isinstance(value, tuple):
        items = []
        for i, item in enumerate(value):
            items.append(_visit(f"{name}.{i}", item, fn))
        return tuple(items)
    return value


def same_memory(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors are the same memory, up to axes of length 1."""
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() and _strides(x) == _strides(y)


def _strides(x: Tensor) -> list[tuple[int, int]]:
    """Length and stride of the axes that are longer than 1."""
    found = []
    for length, stride in zip(x.shape, x.stride(), strict=True):
        if length > 1:
            found.append((length, stride))
    return found
