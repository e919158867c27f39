"""Standard errors and covariances of the rows of a comparison, collected layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_lab.diagnose.influence import Influences, of_error, of_exact, of_pair
from fisher_lab.errors import Measure, Pair, Total
from fisher_lab.matrices import FisherMatrix
from fisher_lab.results import ALL
from fisher_lab.statistics import Sums

Found = dict[tuple[str, str], float]  # (approximation, error) -> standard error


class StandardErrors:
    """What the examples do to every quantity of every layer, and the standard errors that follow.

    Args:
        wanted: the undamped measures.
    """

    def __init__(self, wanted: Sequence[Measure]) -> None:
        self.wanted = [m for m in wanted if not m.damped]
        self.influences: dict[tuple[str, str], Influences] = {}
        self.covariances: list[dict[str, Any]] = []

    def layer(
        self,
        name: str,
        sums: Sums,
        exact: FisherMatrix,
        pairs: Mapping[str, Pair],
        candidates: Mapping[str, Any],
    ) -> Found:
        """Standard errors of one layer.

        Args:
            name: of the layer.
            sums: of its columns, on the scale of `exact`.
            exact: its block.
            pairs: by approximation.
            candidates: the Approximations, or matrices that are fixed.
        """
        spectral = any(m.reads("top_difference") for m in self.wanted)
        shared = of_exact(sums, exact)
        for label, pair in pairs.items():
            found = of_pair(sums, pair, candidates[label], shared, spectral)
            if found is not None:
                self.influences[name, label] = found
        known = {label: (pair, self.influences.get((name, label))) for label, pair in pairs.items()}
        return self._errors(name, known, self.wanted)

    def taken(self) -> list[dict[str, Any]]:
        """The covariances found since this was asked last."""
        found = self.covariances
        self.covariances = []
        return found

    def total(self, layers: Sequence[str], totals: Mapping[str, Total]) -> Found:
        """Standard errors over all layers; none for approximations of which a layer is missing (after `resume`)."""
        found = {}
        for label, total in totals.items():
            parts = [self.influences.get((name, label)) for name in layers]
            found[label] = (total, None if None in parts else _summed(parts, total))  # type: ignore[arg-type]
        return self._errors(ALL, found, [m for m in self.wanted if m.layered])

    def _errors(
        self, name: str, found: Mapping[str, tuple[Any, Influences | None]], wanted: Sequence[Measure]
    ) -> Found:
        """Standard errors and covariances of some measures, of the approximations whose influences are known."""
        errors: Found = {}
        for m in wanted:
            rows: dict[str, Tensor] = {}
            for label, (quantities, influences) in found.items():
                row = None if influences is None else of_error(m, quantities, influences)
                if row is not None:
                    rows[label] = row
            if not rows:
                continue
            U = torch.stack([*rows.values()])
            C = U @ U.T / U.shape[1] ** 2
            errors |= {(label, m.name): float(C[i, i].sqrt()) for i, label in enumerate(rows)}
            self.covariances.append({"layer": name, "error": m.name, "approximations": [*rows], "matrix": C.tolist()})
        return errors


def _summed(parts: list[Influences], total: Total) -> Influences:
    """Influences on sums over layers; a spectral norm is that of its layer."""
    summed = {k: torch.stack([part[k] for part in parts]).sum(0) for k in parts[0] if not k.startswith("top")}
    for name in ("top_exact", "top_difference"):
        values = [getattr(part, name, 0.0) for part in total.parts]
        summed[name] = parts[values.index(max(values))][name]
    return summed
