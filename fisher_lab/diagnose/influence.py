"""Standard errors over examples by the infinitesimal jackknife (Jaeckel 1972; Efron 1982).

Every error e is a function of the examples' weights w; with its influence U_n = d e / d eps along
w -> (1 - eps) w + eps delta_n at equal weights, the standard error is sqrt(sum U_n^2) / N. The
derivative needs no new pass through the model: F moves by F_n - F, and an approximation by the
derivative of its `assemble` along the difference between example n's own moments and their mean.
Eigenvectors at the ends of F - F^ are held fixed, which is the exact first order of a simple
eigenvalue.

How moments move is known to their kind (see approximations.moments). There is no standard error
where the first order says nothing:

* moments whose derivative is unknown, among them those of the eigenvalue-corrected approximations;
* a block of some of the examples (TENGraD). F - F^ is then nothing but the noise of sampling, and
  |F - F^|^2 a square of it, of which the first order counts an example's product with itself twice
  and every other product as if it were known (twice the variance, up to four times). Traces are
  linear, and have theirs.
* the trace of KPSVD: what it misses of tr F are products of two numbers near zero, whose sampling
  errors multiply.
* a spectral norm whose eigenvalue is less than SEPARATION of its own standard errors ahead of the
  next one, or of the other end of the spectrum, or of that of another layer. The largest of several
  that are alike moves otherwise than each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_lab._ground.linalg import Lanczos, start_vector
from fisher_lab.approximations import Approximation, Moments
from fisher_lab.approximations.base import assembled, observed
from fisher_lab.errors import DENSE_DIM, Measure, Measured, Pair, Quantities
from fisher_lab.errors.spectral import TOLERANCE
from fisher_lab.matrices import FisherMatrix
from fisher_lab.statistics import LayerStats, Sums, contractions

Influences = dict[str, Tensor]  # name of a quantity -> [N]
FUNCTIONALS = ("trace_approx", "square_approx", "inner", "top")
STEP = 1e-5  # relative step of the numerical derivatives of the measures' formulas
SEPARATION = 2.0  # standard errors by which the largest eigenvalue must be ahead


def of_exact(sums: Sums, exact: FisherMatrix) -> Influences:
    """Influences of tr F, |F|_F^2 and |F|_2."""
    traces = []
    for P in sums.stats.per_example():  # [R, n, Q, d_out, d_in]
        squares = P.square()
        trace = squares.sum((0, 2, 3, 4))
        traces.append(trace)
    products = sums.squared_gram()  # <F_n, F_m> `[N, N]`
    with_exact = products.mean(1)  # <F_n, F>

    def apply(X: Tensor) -> Tensor:
        return exact @ X

    found = {
        "trace_exact": _centred(torch.cat(traces)),
        # |F|^2 moves on both sides of <F, F>
        "square_exact": 2 * _centred(with_exact),
    }
    top = largest(apply, exact)
    along = _centred(_along(sums.stats, top.vector))
    if is_ahead(top.value, top.next, along):
        found["top_exact"] = along
    return found


def of_pair(
    sums: Sums,
    pair: Pair,
    candidate: Approximation | None,
    exact: Influences,
    spectral: bool,
) -> Influences | None:
    """Influences of the quantities of a pair; None where the moments have no derivative.

    Quantities of which the first order says nothing are left out.

    Args:
        sums: the layer's columns.
        pair: the exact block and the approximation.
        candidate: the Approximation; None for a matrix that does not depend on the data.
        exact: from `of_exact`.
        spectral: whether |F - F^|_2 is wanted.
    """
    stats = sums.stats
    v = stats.g.new_zeros(stats.shape)
    top = None
    if spectral:

        def difference(X: Tensor) -> Tensor:
            return pair.exact @ X - pair.approx @ X

        top = largest(difference, pair.exact)
        v = top.vector
    if candidate is None:
        moved = _unmoved(stats)
    else:
        found = _moved(stats, candidate, v)
        if found is None:
            return None
        moved = found
    influences = dict(exact)
    if "trace_approx" in moved:
        influences["trace_approx"] = moved["trace_approx"]
    if _is_sample(pair.approx, stats):
        return influences
    own = []
    for example in _examples(stats):
        own.append(pair.approx.quadratic(example))  # <F_n, F^>
    # <F, F^> moves with F, F^ held, and with F^, F held
    inner = _centred(torch.stack(own)) + moved["inner"]
    square_exact = exact["square_exact"]
    square_approx = moved["square_approx"]
    influences["square_approx"] = square_approx
    influences["inner"] = inner
    influences["square_difference"] = square_exact - 2 * inner + square_approx
    if top is not None:
        along = _centred(_along(stats, v))
        of_top = top.sign * (along - moved["top"])
        if is_ahead(top.value, top.next, of_top):
            influences["top_difference"] = of_top
    return influences


def _is_sample(approx: FisherMatrix, stats: LayerStats) -> bool:
    """Whether a matrix is the mean of the blocks of some of the examples, not of all."""
    return approx.examples is not None and approx.examples < stats.N


def is_ahead(value: float, other: float, influence: Tensor) -> bool:
    """Whether the largest of several is so by more than chance.

    Args:
        value: of the largest.
        other: of the next one.
        influence: of the examples on the largest `[N]`.
    """
    variance = influence.square().mean() / len(influence)
    error = float(variance.sqrt())
    return value - other > SEPARATION * error


def _unmoved(stats: LayerStats) -> Influences:
    """That of examples on a matrix that does not depend on them."""
    zero = stats.g.new_zeros(stats.N)
    return dict.fromkeys(FUNCTIONALS, zero)


class Largest(NamedTuple):
    """The eigenvalue of a symmetric matrix that is largest in absolute value.

    Attributes:
        vector: its eigenvector, in the shape of W.
        sign: its own.
        value: its absolute value.
        next: the absolute value of the next one.
    """

    vector: Tensor
    sign: float
    value: float
    next: float


def largest(apply: Callable[[Tensor], Tensor], like: FisherMatrix) -> Largest:
    """The largest eigenvalue in absolute value.

    Args:
        apply: the symmetric matrix, on arrays of the shape of W.
        like: a matrix of its size.
    """
    if like.dim <= DENSE_DIM:
        return _largest_of_dense(apply, like)
    run = Lanczos(start_vector(like), TOLERANCE)
    while run.found is None:
        X = run.vector.view(like.shape)
        image = apply(X)
        run.feed(image.flatten())
    assert run.ritz_vector is not None
    vector = run.ritz_vector.view(like.shape)
    return _ranked(vector, run.ritz_values)


def _largest_of_dense(apply: Callable[[Tensor], Tensor], like: FisherMatrix) -> Largest:
    """As `largest`, from all eigenvectors."""
    rows = []
    for E in like.identity_chunks():
        images = apply(E)
        rows.append(images.flatten(1))
    dense = torch.cat(rows)
    symmetric = (dense + dense.T) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    end = 0 if -float(values[0]) > float(values[-1]) else -1
    vector = vectors[:, end].view(like.shape)
    return _ranked(vector, values.tolist())


def _ranked(vector: Tensor, values: Sequence[float]) -> Largest:
    """The largest in absolute value of rising eigenvalues, and the next one.

    Args:
        vector: the eigenvector of the largest.
        values: the eigenvalues.
    """
    sign = 1.0
    if -values[0] > values[-1]:
        sign = -1.0
    sizes = sorted(abs(value) for value in values)
    following = sizes[-2] if len(sizes) > 1 else 0.0
    return Largest(vector, sign, sizes[-1], following)


def _along(stats: LayerStats, v: Tensor) -> Tensor:
    """v^T F_n v `[N]`."""
    s = contractions.project(stats, v)  # [R, N]
    return s.square().sum(0)


def _centred(x: Tensor) -> Tensor:
    """Less its mean: what a weight moves when the others make room for it."""
    return x - x.mean()


def _examples(stats: LayerStats) -> Iterator[LayerStats]:
    """One example after the other."""
    for n in range(stats.N):
        alone = slice(n, n + 1)
        yield stats.examples(alone)


# -- how an approximation moves --------------------------------------------------------------------
def _moved(stats: LayerStats, approximation: Approximation, v: Tensor) -> Influences | None:
    """Influence of the examples on FUNCTIONALS through the approximation, F itself held.

    In every sweep the examples move its moments, and they move the matrix that the next sweep
    starts from.
    """
    # nothing remembered, so that everything is differentiated
    same = stats.like(stats.a, stats.g)
    fresh = Sums(same, shared=False)
    matrix: FisherMatrix | None = None
    sweeps: list[_Sweep] = []
    every: list[Tensor] = []
    for number in range(approximation.sweeps):
        seen = observed(approximation, fresh, matrix)
        found = seen.with_leaves()
        if found is None:
            return None
        moments, leaves = found
        sweep = _Sweep(moments, leaves, _detached(matrix))
        sweeps.append(sweep)
        every.extend(leaves)
        again = number > 0
        matrix = assembled(approximation, moments, matrix, again)
    assert matrix is not None
    values = _functionals(fresh, matrix, v)
    gradients = _gradients(values, every)
    total = v.new_zeros(len(values), stats.N)
    for sweep in sweeps:
        count = len(sweep.leaves)
        of_sweep = [row[:count] for row in gradients]
        gradients = [row[count:] for row in gradients]
        influences = sweep.influences(of_sweep, approximation, stats)
        if influences is None:
            return None
        total = total + influences
    moved = dict(zip(FUNCTIONALS, total, strict=True))
    for name in sweeps[-1].moments.unsteady:
        del moved[name]
    return moved


@dataclass
class _Sweep:
    """One pass of an approximation over the data.

    Attributes:
        moments: as a function of the leaves.
        leaves: to be differentiated in.
        matrix: that the sweep started from.
    """

    moments: Moments
    leaves: tuple[Tensor, ...]
    matrix: FisherMatrix | None

    def influences(
        self,
        gradients: list[list[Tensor]],
        approximation: Approximation,
        stats: LayerStats,
    ) -> Tensor | None:
        """Influences `[functionals, N]` through the moments of this sweep."""

        def own() -> Iterator[Moments]:
            for example in _examples(stats):
                alone = Sums(example, shared=False)
                yield observed(approximation, alone, self.matrix)

        return self.moments.influences(gradients, own(), stats.N)


def _detached(matrix: FisherMatrix | None) -> FisherMatrix | None:
    """The same numbers, of which nothing is known to depend on anything."""
    if matrix is None:
        return None
    found = {}
    for name, x in matrix.tensors().items():
        found[name] = x.detach()
    return matrix.with_tensors(found)


def _functionals(sums: Sums, matrix: FisherMatrix, v: Tensor) -> list[Tensor]:
    """The numbers that FUNCTIONALS names."""
    trace = matrix.trace()
    square = matrix.frobenius_norm() ** 2
    inner = matrix.quadratic(sums)
    image = matrix @ v
    top = (v * image).sum()
    return [trace, square, inner, top]


def _gradients(values: list[Tensor], leaves: list[Tensor]) -> list[list[Tensor]]:
    """Gradient of every functional in every leaf, zero where it does not depend on it."""
    rows = []
    for value in values:
        found: Sequence[Tensor | None]
        if value.requires_grad:
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        else:
            found = (None,) * len(leaves)
        row = []
        for gradient, leaf in zip(found, leaves, strict=True):
            if gradient is None:
                gradient = torch.zeros_like(leaf)
            row.append(gradient)
        rows.append(row)
    return rows


# -- from quantities to errors ---------------------------------------------------------------------
def of_error(measure: Measure, quantities: Quantities, influences: Influences) -> Tensor | None:
    """Influence `[N]` on an error, by the derivative of its formula.

    Args:
        measure: the error.
        quantities: of a layer, or of all layers.
        influences: of the quantities it is made of.

    Returns:
        The influence; None below the noise floor, and for a measure of anything whose influences
        are not known.
    """
    value, noise = measure.formula(quantities)
    if abs(value) <= noise and not measure.smooth:
        return None
    read = measure.read(quantities)
    if not set(read) <= set(influences):
        return None
    total = torch.zeros_like(influences["trace_exact"])
    for name, influence in influences.items():
        if name not in read:
            continue
        slope = _slope(measure, quantities, name)
        if slope is not None:
            total = total + influence * slope
    return total


def _slope(measure: Measure, quantities: Quantities, name: str) -> float | None:
    """The derivative of an error in a quantity; None where that is zero, and has no scale.

    By central differences, because the formulas are written for plain numbers.
    """
    x = _value(getattr(quantities, name))
    step = STEP * abs(x)
    if step == 0:
        return None
    above = measure.formula(_with(quantities, name, x + step))
    below = measure.formula(_with(quantities, name, x - step))
    return (above.value - below.value) / (2 * step)


def _value(quantity: float | Measured) -> float:
    """A quantity without its noise."""
    if isinstance(quantity, Measured):
        return quantity.value
    return float(quantity)


def _with(quantities: Quantities, name: str, value: float) -> Quantities:
    """The quantities with another value of one, all of them without noise."""
    changed: dict[str, float | Measured] = {}
    for key, known in quantities.known().items():
        new = value if key == name else _value(known)
        if isinstance(known, Measured):
            changed[key] = Measured(new, 0.0)
        else:
            changed[key] = new
    return Quantities.of(changed)
