"""Standard errors and covariances of the rows of a comparison, collected layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_lab.diagnose.influence import (
    Influences,
    is_ahead,
    of_error,
    of_exact,
    of_pair,
)
from fisher_lab.errors import Measure, Measured, Pair, Quantities, total
from fisher_lab.errors.quantities import LARGEST
from fisher_lab.matrices import FisherMatrix
from fisher_lab.results import ALL
from fisher_lab.statistics import Sums

# (approximation, error) -> standard error
Found = dict[tuple[str, str], float]


class StandardErrors:
    """What the examples do to every quantity of every layer, and the standard errors that follow.

    Args:
        wanted: the undamped measures.
    """

    def __init__(self, wanted: Sequence[Measure]) -> None:
        self.wanted = [m for m in wanted if not m.damped]
        # (layer, approximation) -> what the examples do to its quantities
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
        known = {}
        for label, pair in pairs.items():
            candidate = candidates[label]
            influences = of_pair(sums, pair, candidate, shared, spectral)
            if influences is not None:
                self.influences[name, label] = influences
            for m in self.wanted:
                m.formula(pair)  # which asks for what it reads
            known[label] = Influenced(pair.asked(), influences)
        return self._errors(name, known, self.wanted)

    def taken(self) -> list[dict[str, Any]]:
        """The covariances found since this was asked last."""
        found = self.covariances
        self.covariances = []
        return found

    def total(self, layers: Sequence[str], quantities: Mapping[str, Sequence[Quantities]]) -> Found:
        """Standard errors over all layers.

        None for approximations of which a layer is missing.

        Args:
            layers: their names.
            quantities: of every layer, by approximation.
        """
        found = {}
        for label, parts in quantities.items():
            influences = self._of_layers(label, layers)
            summed = None
            if influences is not None:
                summed = _summed(influences, parts)
            found[label] = Influenced(total(parts), summed)
        layered = [m for m in self.wanted if m.layered]
        return self._errors(ALL, found, layered)

    def _of_layers(self, label: str, layers: Sequence[str]) -> list[Influences] | None:
        """The influences of an approximation on every layer; None where one is missing."""
        influences = []
        for name in layers:
            known = self.influences.get((name, label))
            if known is None:
                return None
            influences.append(known)
        return influences

    def _errors(
        self,
        name: str,
        found: Mapping[str, Influenced],
        wanted: Sequence[Measure],
    ) -> Found:
        """Standard errors and covariances of some measures, where the influences are known."""
        errors: Found = {}
        for m in wanted:
            rows = _rows(m, found)
            if not rows:
                continue
            labels = list(rows)
            U = torch.stack(list(rows.values()))  # [approximations, N]
            N = U.shape[1]
            C = U @ U.T / N**2
            variances = C.diagonal()
            for label, variance in zip(labels, variances, strict=True):
                error = variance.sqrt()
                errors[label, m.name] = float(error)
            covariance = {
                "layer": name,
                "error": m.name,
                "approximations": labels,
                "matrix": C.tolist(),
            }
            self.covariances.append(covariance)
        return errors


class Influenced(NamedTuple):
    """The numbers behind the errors of an approximation, and how the examples move them."""

    quantities: Quantities
    influences: Influences | None  # None where not known


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
    """Influences on quantities of all layers: sums, but a spectral norm is that of its layer."""
    summed = {}
    for name in dict.fromkeys(chain.from_iterable(influences)):
        if name in LARGEST:
            found = _of_largest(name, influences, parts)
        else:
            found = _of_sum(name, influences)
        if found is not None:
            summed[name] = found
    return summed


def _of_sum(name: str, influences: Sequence[Influences]) -> Tensor | None:
    """The influence on the sum of a quantity; None where that on one of its parts is not known."""
    each = []
    for influence in influences:
        if name not in influence:
            return None
        each.append(influence[name])
    return torch.stack(each).sum(0)


def _of_largest(
    name: str,
    influences: Sequence[Influences],
    parts: Sequence[Quantities],
) -> Tensor | None:
    """The influence of the layer with the largest of a quantity; None where that is chance."""
    norms = []
    for part in parts:
        norms.append(_value(getattr(part, name)))
    first = norms.index(max(norms))
    influence = influences[first].get(name)
    others = norms[:first] + norms[first + 1 :]
    if influence is None or not others:
        return influence
    if is_ahead(norms[first], max(others), influence):
        return influence
    return None


def _value(quantity: float | Measured | None) -> float:
    """A quantity without its noise; of no layer where nobody asked for it."""
    if quantity is None:
        return 0.0
    if isinstance(quantity, Measured):
        return quantity.value
    return quantity
