"""Standard errors and covariances of the rows of a comparison, collected layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_lab.diagnose.influence import Influences, of_error, of_exact, of_pair
from fisher_lab.errors import Measure, Pair, Quantities, total
from fisher_lab.errors.quantities import LARGEST
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
        known = {}
        for label, pair in pairs.items():
            for m in self.wanted:
                m.formula(pair)  # which asks for what it reads
            known[label] = Influenced(pair.asked(), self.influences.get((name, label)))
        return self._errors(name, known, self.wanted)

    def taken(self) -> list[dict[str, Any]]:
        """The covariances found since this was asked last."""
        found = self.covariances
        self.covariances = []
        return found

    def total(self, layers: Sequence[str], quantities: Mapping[str, Sequence[Quantities]]) -> Found:
        """Standard errors over all layers; none for approximations of which a layer is missing
        (after `resume`).

        Args:
            layers: their names.
            quantities: of every layer, by approximation.
        """
        found = {}
        for label, parts in quantities.items():
            influences = [
                self.influences[name, label] for name in layers if (name, label) in self.influences
            ]
            summed = None
            if len(influences) == len(layers):
                summed = _summed(influences, parts)
            found[label] = Influenced(total(parts), summed)
        return self._errors(ALL, found, [m for m in self.wanted if m.layered])

    def _errors(
        self,
        name: str,
        found: Mapping[str, Influenced],
        wanted: Sequence[Measure],
    ) -> Found:
        """Standard errors and covariances of some measures, of the approximations whose influences
        are known.
        """
        errors: Found = {}
        for m in wanted:
            rows = _rows(m, found)
            if not rows:
                continue
            labels = [*rows]
            U = torch.stack([*rows.values()])  # [approximations, N]
            N = U.shape[1]
            C = U @ U.T / N**2
            for label, variance in zip(labels, C.diagonal(), strict=True):
                errors[label, m.name] = float(variance.sqrt())
            covariance = {
                "layer": name,
                "error": m.name,
                "approximations": labels,
                "matrix": C.tolist(),
            }
            self.covariances.append(covariance)
        return errors


class Influenced(NamedTuple):
    """The numbers behind the errors of an approximation, and how the examples move them; None where
    not known.
    """

    quantities: Quantities
    influences: Influences | None


def _rows(measure: Measure, found: Mapping[str, Influenced]) -> dict[str, Tensor]:
    """Influences `[N]` on one error of every approximation, as far as they are known."""
    rows = {}
    for label, (quantities, influences) in found.items():
        if influences is None:
            continue
        row = of_error(measure, quantities, influences)
        if row is not None:
            rows[label] = row
    return rows


def _summed(influences: Sequence[Influences], parts: Sequence[Quantities]) -> Influences:
    """Influences on sums over layers; a spectral norm is that of its layer."""
    summed = {}
    for name in influences[0]:
        each = [influence[name] for influence in influences]
        if name in LARGEST:
            norms = [getattr(part, name) or 0.0 for part in parts]
            largest = norms.index(max(norms))
            summed[name] = each[largest]
        else:
            summed[name] = torch.stack(each).sum(0)
    return summed
