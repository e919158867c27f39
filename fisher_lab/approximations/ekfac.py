"""EKFAC: George et al. (2018): s = 1/N sum (B_1^T P B_2)^2 in the eigenbasis B_1 (x) B_2 of KFAC
(see corrected.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisher_lab.approximations.base import check_choice
from fisher_lab.approximations.corrected import EigenvalueCorrected
from fisher_lab.approximations.kfac import KFAC


@dataclass(frozen=True)
class EKFAC(EigenvalueCorrected):
    """KFAC with corrected eigenvalues (George et al. 2018, eq. 6 and Theorem 2 there).

    Args:
        spatial: as KFAC's.

    State: d_out^2 + d_in^2 + d_out d_in. See also: KFAC, TEKFAC.

    Example:
        >>> K = fl.estimate(fl.EKFAC(), model, loss, (x, y))["0"]
        >>> fl.errors.frobenius(exact, K) <= fl.errors.frobenius(exact, kfac)
        True
    """

    spatial: Literal["expand", "reduce"] = "expand"

    def __post_init__(self) -> None:
        check_choice("EKFAC", "spatial", self.spatial, ("expand", "reduce"))

    @property
    def base(self) -> KFAC:  # type: ignore[override]
        """The approximation corrected."""
        return KFAC(self.spatial)
