"""Standard errors over examples by the infinitesimal jackknife (Jaeckel 1972; Efron 1982).

Every error e is a function of the examples' weights w; with its influence U_n = d e / d eps along
w -> (1 - eps) w + eps delta_n at equal weights, the standard error is sqrt(sum U_n^2) / N. The derivative needs no new
pass through the model: F moves by F_n - F, and an approximation by the derivative of its `assemble` along the
difference between example n's own moments and their mean. Eigenvectors at the ends of F - F^ are held fixed, which is
the exact first order of a simple eigenvalue.

The eigenvalue-corrected approximations have none: their bases turn by (sampling error) / (gap of eigenvalues), and
most gaps are smaller than that, so the first order says nothing (up to 8 times a bootstrap's on the digits).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fisher_lab._ground.linalg import Lanczos, start_vector
from fisher_lab.approximations import Approximation
from fisher_lab.approximations.corrected import EigenvalueCorrected
from fisher_lab.errors import DENSE_DIM, Measure, Measured, Pair
from fisher_lab.errors.spectral import TOLERANCE
from fisher_lab.matrices import FactoredRows, FisherMatrix
from fisher_lab.statistics import LayerStats

Influences = dict[str, Tensor]  # name of a quantity -> [N]
FUNCTIONALS = ("trace_approx", "square_approx", "inner", "top")
STEP = 1e-5  # relative step of the numerical derivatives of the measures' formulas


def of_exact(stats: LayerStats, exact: FisherMatrix) -> Influences:
    """Influences of tr F, |F|_F^2 and |F|_2."""
    traces = torch.cat([P.square().sum((0, 2, 3, 4)) for P in stats.per_example()])
    rows = stats.squared_gram().mean(1)
    u, _ = top_vector(lambda X: exact @ X, exact)
    return {
        "trace_exact": traces - traces.mean(),
        "square_exact": 2 * (rows - rows.mean()),
        "top_exact": _centred(_along(stats, u)),
    }


def of_pair(stats: LayerStats, pair: Pair, candidate: Any, exact: Influences, spectral: bool) -> Influences | None:
    """Influences of every quantity of a pair; None where the approximation's moments are of an unknown kind.

    Args:
        stats: the layer's columns.
        pair: the exact block and the approximation.
        candidate: the Approximation, or anything else for a matrix that does not depend on the data.
        exact: from `of_exact`.
        spectral: whether |F - F^|_2 is wanted.
    """
    v, sign = torch.zeros(stats.shape, dtype=stats.g.dtype, device=stats.g.device), 1.0
    if spectral:
        v, sign = top_vector(lambda X: pair.exact @ X - pair.approx @ X, pair.exact)
    moved = dict.fromkeys(FUNCTIONALS, torch.zeros_like(exact["trace_exact"]))
    if isinstance(candidate, Approximation):
        found = _moved(stats, candidate, v)
        if found is None:
            return None
        moved = found
    own = [pair.approx.quadratic(stats.examples(slice(n, n + 1))) for n in range(stats.N)]
    inner = _centred(torch.stack(own)) + moved["inner"]
    return exact | {
        "trace_approx": moved["trace_approx"],
        "square_approx": moved["square_approx"],
        "inner": inner,
        "square_difference": exact["square_exact"] - 2 * inner + moved["square_approx"],
        "top_difference": sign * (_centred(_along(stats, v)) - moved["top"]),
    }


def top_vector(apply: Callable[[Tensor], Tensor], like: FisherMatrix) -> tuple[Tensor, float]:
    """Eigenvector of the eigenvalue that is largest in absolute value, in the shape of W, and its sign."""
    if like.dim <= DENSE_DIM:
        dense = torch.cat([apply(E).flatten(1) for E in like.identity_chunks()])
        values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
        end = 0 if float(-values[0]) > float(values[-1]) else -1
        return vectors[:, end].view(like.shape), -1.0 if end == 0 and float(values[0]) < 0 else 1.0
    run = Lanczos(start_vector(like), TOLERANCE)
    while run.found is None:
        run.feed(apply(run.vector.view(like.shape)).flatten())
    assert run.ritz_vector is not None
    return run.ritz_vector.view(like.shape), -1.0 if abs(run.found.low) > abs(run.found.high) else 1.0


def _along(stats: LayerStats, v: Tensor) -> Tensor:
    """v^T F_n v `[N]`."""
    return stats.project(v).square().sum(0)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean()


# -- how an approximation moves -------------------------------------------------------------------------------------
def _moved(stats: LayerStats, approximation: Approximation, v: Tensor) -> Influences | None:
    """Influence of the examples on tr F^, |F^|_F^2, <F, F^> (F held) and v^T F^ v through the approximation."""
    if isinstance(approximation, EigenvalueCorrected):
        return None
    moments = approximation.moments(stats)
    if set(moments) <= {"a", "g"} and "g" in moments:
        return _of_columns(stats, approximation, moments, v)
    if set(moments) == {"a", "w"}:
        return _of_rows(stats, approximation, moments, v)
    linear = type(approximation).average is Approximation.average or "block" in moments or len(moments) <= 2
    return _of_means(stats, approximation, moments, v) if linear else None


def _functionals(stats: LayerStats, matrix: FisherMatrix, v: Tensor) -> list[Tensor]:
    fresh = stats.like(stats.a, stats.g)  # nothing remembered, so that everything is differentiated
    return [
        matrix.trace(),
        matrix.frobenius_norm() ** 2,
        matrix.quadratic(fresh),
        (v * (matrix @ v)).sum(),
    ]


def _gradients(values: list[Tensor], leaves: list[Tensor]) -> list[list[Tensor]]:
    """Gradient of every functional in every leaf, zero where it does not depend on it."""
    found = []
    for value in values:
        if not value.requires_grad:
            found.append([torch.zeros_like(x) for x in leaves])
            continue
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])
    return found


def _contracted(
    stats: LayerStats, gradients: list[list[Tensor]], own: Callable[[LayerStats], list[Tensor]]
) -> Influences:
    """<gradient, moments of example n - their mean> for every functional."""
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])
    rows = [flat @ torch.cat([m.flatten() for m in own(stats.examples(slice(n, n + 1)))]) for n in range(stats.N)]
    influence = torch.stack(rows, 1)
    return dict(zip(FUNCTIONALS, influence - influence.mean(1, keepdim=True), strict=True))


def _of_means(stats: LayerStats, approximation: Approximation, moments: dict[str, Tensor], v: Tensor) -> Influences:
    """Moments that are means over examples."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in moments.items()}
    gradients = _gradients(_functionals(stats, approximation.assemble(leaves), v), list(leaves.values()))

    def own(example: LayerStats) -> list[Tensor]:
        found = approximation.moments(example)
        if set(found) == {"a", "w"}:  # row blocks, which for one example are larger than their factors
            found = {"row": FactoredRows(found["a"], found["w"]).formed().blocks}
        return [found[name].expand_as(leaves[name]) for name in leaves]

    return _contracted(stats, gradients, own)


def _of_columns(stats: LayerStats, approximation: Approximation, moments: dict[str, Tensor], v: Tensor) -> Influences:
    """Columns with a weight each, perhaps only of the first examples."""
    n = moments["g"].shape[1]
    weight = stats.g.new_full((n,), 1 / n).requires_grad_()
    values = _functionals(stats, approximation.assemble({**moments, "weight": weight}), v)
    return _of_weights(stats, [row[0] for row in _gradients(values, [weight])])


def _of_rows(stats: LayerStats, approximation: Approximation, moments: dict[str, Tensor], v: Tensor) -> Influences:
    """Row blocks kept factored: w is proportional to the weight of its example."""
    weight = torch.ones_like(moments["w"][:, :1]).requires_grad_()
    values = _functionals(stats, approximation.assemble({"a": moments["a"], "w": moments["w"] * weight}), v)
    return _of_weights(stats, [row[0][:, 0] * stats.N for row in _gradients(values, [weight])])


def _of_weights(stats: LayerStats, gradients: list[Tensor]) -> Influences:
    """From derivatives in the weights `[n]` of the first n examples, which sum to 1."""
    found = {}
    for name, gradient in zip(FUNCTIONALS, gradients, strict=True):
        full = gradient.new_zeros(stats.N)
        full[: len(gradient)] = _centred(gradient) * (stats.N / len(gradient))
        found[name] = full
    return found


# -- from quantities to errors --------------------------------------------------------------------------------------
def of_error(measure: Measure, quantities: Any, influences: Influences) -> Tensor | None:
    """Influence `[N]` on an error, by the derivative of its formula; None below its noise floor.

    Args:
        measure: the error.
        quantities: a Pair or a Total.
        influences: of the quantities it is made of.
    """
    names = [*influences]
    values = {name: getattr(quantities, name) for name in names if _has(measure, name)}
    floats = {name: v.value if isinstance(v, Measured) else float(v) for name, v in values.items()}
    value, noise = measure.formula(quantities)
    if abs(value) <= noise and not measure.smooth:
        return None
    total = torch.zeros_like(next(iter(influences.values())))
    for name, x in floats.items():
        step = STEP * abs(x)
        ends = [_evaluate(measure, floats | {name: x + sign * step}, quantities.eps) for sign in (1, -1)]
        if step > 0 and None not in ends:
            total = total + influences[name] * ((ends[0] - ends[1]) / (2 * step))  # type: ignore[operator]
        elif None in ends:
            return None
    return total


def _has(measure: Measure, name: str) -> bool:
    """Whether the formula reads a quantity; one that does not say what it reads may read all but the spectral norms."""
    if measure.needs is None:
        return not name.startswith("top")
    return name in measure.needs


def _evaluate(measure: Measure, floats: dict[str, float], eps: float) -> float | None:
    """The formula on plain numbers without noise; None for a measure made of anything else."""
    wrapped = {k: Measured(v, 0.0) if k.endswith("_difference") else v for k, v in floats.items()}
    try:
        return measure.formula(SimpleNamespace(**wrapped, eps=eps)).value
    except AttributeError:
        return None
