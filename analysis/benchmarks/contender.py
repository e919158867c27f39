"""One measurement in a process of its own:
`python -m analysis.benchmarks.contender '{"library": ..., "case": ...}'`.

Prints one line of JSON: seconds of the work (imports apart), seconds and peak memory of the whole
process, the errors found, and the machine's float64 matrix-product rate measured after the work.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from analysis.benchmarks.cases import build

STARTED = time.perf_counter()
ERRORS = ("trace", "frobenius", "spectral")


def product_rate(n: int = 2000, repeats: int = 3) -> float:
    """Floating-point operations per second of a float64 matrix product, the best of some."""
    A = torch.rand(n, n, dtype=torch.float64)
    return 2 * n**3 / fastest(lambda: A @ A, repeats + 1)


def fastest(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def ours(
    case: Any, approximations: list[str] | None, layers: list[str] | None, **options: Any
) -> dict[str, Any]:
    """compare() with all default approximations, or some."""
    import fisher_lab as fl

    model, loss, data = case
    chosen = None if approximations is None else [getattr(fl, name)() for name in approximations]
    started = time.perf_counter()
    found = fl.compare(
        model, loss, data, chosen, layers=layers, errors=list(ERRORS), progress=False, **options
    )
    seconds = time.perf_counter() - started
    values = {
        f"{r.layer} {r.approximation} {r.error}": r.value for r in found.rows if r.layer != "(all)"
    }
    routes = {name: about["route"] for name, about in found.settings["layers"].items()}
    return {
        "seconds": seconds,
        "values": values,
        "routes": routes,
        "parameters": found.settings["parameters"],
        "versions": found.settings["versions"],
        "machine": found.settings["machine"],
    }


def by_eigenvalues(A: torch.Tensor) -> float:
    """Spectral norm of a symmetric matrix."""
    return float(torch.linalg.eigvalsh(A).abs().max())


def by_singular_values(A: torch.Tensor) -> float:
    """Spectral norm of any matrix, as torch has it."""
    return float(torch.linalg.matrix_norm(A, 2))


NORMS = {"eigenvalues": by_eigenvalues, "singular values": by_singular_values}


def errors_of(
    F: torch.Tensor,
    approx: torch.Tensor,
    norms: tuple[float, float],
    norm: Callable[[torch.Tensor], float],
) -> tuple[float, float, float]:
    """Trace, Frobenius and spectral error of dense blocks, given |F|_F and |F|_2."""
    difference = approx - F
    top = norm(difference)
    trace = float(F.diagonal().sum())
    return (
        float(difference.diagonal().sum()) / trace,
        float(difference.norm()) / norms[0],
        top / norms[1],
    )


def dense_errors(
    blocks: dict[str, torch.Tensor],
    approx_of: dict[str, Any],
    norm: Callable[[torch.Tensor], float] = by_eigenvalues,
) -> dict[str, float]:
    """Errors layer by layer; `approx_of[name](layer)` forms one dense block, which is dropped
    again.
    """
    values = {}
    for layer, F in blocks.items():
        norms = float(F.norm()), norm(F)
        for name, form in approx_of.items():
            for error, value in zip(ERRORS, errors_of(F, form(layer), norms, norm), strict=True):
                values[f"{layer} {name} {error}"] = value
    return values


def nngeometry(case: Any, norm: str = "eigenvalues", **_: Any) -> dict[str, Any]:
    """Exact blocks, KFAC and EKFAC by nngeometry, the errors of their dense differences
    by torch.
    """
    from nngeometry.metrics import FIM
    from nngeometry.object.pspace import PMatBlockDiag, PMatEKFAC, PMatKFAC
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_default_dtype(torch.float64)  # it allocates in the default type
    model, _, (x, y) = case
    model, loader = model.double(), DataLoader(TensorDataset(x.double(), y), batch_size=len(x))
    started = time.perf_counter()
    made = {
        cls: FIM(model, loader, cls, variant="classif_logits", device="cpu")
        for cls in (PMatBlockDiag, PMatKFAC, PMatEKFAC)
    }
    made[PMatEKFAC].update_diag(loader)
    ids = dict(zip((n for n, m in model.named_modules() if list(m.parameters(recurse=False))),
                   made[PMatBlockDiag].data, strict=True))  # fmt: skip
    orders = {name: _order(model.get_submodule(name)) for name in ids}

    def kfac(name: str) -> torch.Tensor:
        a, g = made[PMatKFAC].data[ids[name]]
        return torch.kron(g, a)

    def ekfac(name: str) -> torch.Tensor:
        (a, g), diagonal = made[PMatEKFAC].data[0][ids[name]], made[PMatEKFAC].data[1][ids[name]]
        Q = torch.kron(g, a)
        return (Q * diagonal.reshape(-1)) @ Q.T

    blocks = {
        name: made[PMatBlockDiag].data[i][orders[name]][:, orders[name]] for name, i in ids.items()
    }
    made.pop(PMatBlockDiag)
    values = dense_errors(blocks, {"KFAC": kfac, "EKFAC": ekfac}, NORMS[norm])
    return {"seconds": time.perf_counter() - started, "values": values}


def _order(layer: torch.nn.Linear) -> torch.Tensor:
    """From [weight, bias] one after the other to rows of [weight | bias]."""
    rows, columns = layer.weight.shape
    weight = torch.arange(rows * columns).view(rows, columns)
    return torch.cat([weight, rows * columns + torch.arange(rows)[:, None]], 1).flatten()


def curvlinops(case: Any, **_: Any) -> dict[str, Any]:
    """Exact blocks, KFAC and EKFAC by curvlinops, made dense by products with the identity, the
    errors by torch.
    """
    import curvlinops as clo
    from curvlinops.kfac import FisherType

    model, loss, (x, y) = case
    model, data = model.double(), [(x.double(), y)]
    names = [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    started = time.perf_counter()

    def operator(name: str, kind: str) -> torch.Tensor:
        layer = model.get_submodule(name)
        arguments = (model, loss, list(layer.parameters()), data)
        if kind == "exact":
            made = clo.GGNLinearOperator(*arguments, check_deterministic=False)
        else:
            options = {
                "fisher_type": FisherType.TYPE2,
                "separate_weight_and_bias": False,
                "check_deterministic": False,
            }
            made = getattr(clo, f"{kind}LinearOperator")(*arguments, **options)
        size, pieces = sum(p.numel() for p in layer.parameters()), []
        for start in range(0, size, 512):  # all columns at once would need P times the activations
            columns = torch.zeros(size, min(512, size - start), dtype=torch.float64)
            columns[
                torch.arange(start, start + columns.shape[1]), torch.arange(columns.shape[1])
            ] = 1
            pieces.append((made @ columns).detach())
        dense, order = torch.cat(pieces, 1), _order(layer)
        return dense[order][:, order]

    values = {}
    for name in names:
        forms = {
            kind: (lambda layer, kind=kind: operator(layer, kind)) for kind in ("KFAC", "EKFAC")
        }
        values.update(dense_errors({name: operator(name, "exact")}, forms))
    return {"seconds": time.perf_counter() - started, "values": values}


def phases(case: Any, **_: Any) -> dict[str, Any]:
    """Floating-point operations per second of what large layers spend their time on, for layer "2"
    of the MLP.
    """
    import fisher_lab as fl
    from fisher_lab._passes.setup import Setup
    from fisher_lab._passes.source import Source
    from fisher_lab.approximations.base import build as approximate
    from fisher_lab.matrices import LowRank
    from fisher_lab.statistics.contractions import outer_gram

    model, loss, data = case
    started = time.perf_counter()
    stats = next(iter(Source(Setup(model, loss, data, layers=["2"])).sweep()))["2"]
    (o, i), N, R = stats.shape, stats.N, stats.R
    F, K, E = LowRank(stats), approximate(fl.KFAC(), stats), approximate(fl.EKFAC(), stats)
    X = torch.rand(o, i, dtype=torch.float64)
    work = {
        "product with F": (lambda: F @ X, 4 * N * o * i + 4 * R * N * o),
        "product with a Kronecker product": (lambda: K @ X, 2 * o * i * (o + i)),
        "product with EKFAC": (lambda: E @ X, 4 * o * i * (o + i)),
        "Gram of the examples' blocks": (
            lambda: outer_gram(stats.g[:, :, 0, 0]),
            R * (R + 1) * N * N * o,
        ),
    }
    values = {name: flops / fastest(run, 6) for name, (run, flops) in work.items()}
    return {"seconds": time.perf_counter() - started, "values": values}


LIBRARIES = {
    "fisher_lab": ours,
    "nngeometry": nngeometry,
    "curvlinops": curvlinops,
    "phases": phases,
}


def main() -> None:
    """Measure what the first argument asks for."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked.get("threads", 2))
    case = build(asked["case"], asked.get("sizes", {}))
    options = {
        "approximations": asked.get("approximations"),
        "layers": asked.get("layers"),
    } | asked.get("options", {})
    found = LIBRARIES[asked["library"]](case, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    spent = resource.getrusage(resource.RUSAGE_SELF)
    used = {
        "peak_bytes": peak,
        "processor": spent.ru_utime + spent.ru_stime,
        "whole": time.perf_counter() - STARTED,
        "product_rate": product_rate(),
    }
    print(json.dumps(found | used))


if __name__ == "__main__":
    main()
