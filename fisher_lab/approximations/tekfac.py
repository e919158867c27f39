"""TEKFAC: Gao et al. (2020), eqs. 3.1-3.3: s = 1/N sum (B_1^T P B_2)^2 in TKFAC's eigenbasis (see
corrected.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisher_lab.approximations.base import check_choice
from fisher_lab.approximations.corrected import EigenvalueCorrected
from fisher_lab.approximations.tkfac import TKFAC


@dataclass(frozen=True)
class TEKFAC(EigenvalueCorrected):
    """TKFAC with corrected eigenvalues (Gao et al. 2020, eq. 3.1-3.3 and Theorem 3.1 there).

    Args:
        spatial: as TKFAC's.

    State: d_out^2 + d_in^2 + d_out d_in. See also: TKFAC, EKFAC.

    Example:
        >>> K = fl.estimate(fl.TEKFAC(), model, loss, (x, y))["0"]
        >>> abs(fl.errors.trace(exact, K)) < 1e-12
        True
    """

    spatial: Literal["expand", "full"] = "expand"

    def __post_init__(self) -> None:
        check_choice("TEKFAC", "spatial", self.spatial, ("expand", "full"))

    @property
    def base(self) -> TKFAC:  # type: ignore[override]
        """The approximation corrected."""
        return TKFAC(self.spatial)
