"""Blocks whose columns are formed anew in every pass: what does not go by products is that of the
dense block.
"""

from __future__ import annotations

from fisher_lab.matrices.base import FisherMatrix, Scalar
from fisher_lab.matrices.dense import Dense


class InPasses(FisherMatrix):
    """What structures without held columns share: powers of the dense block, where that fits."""

    @property
    def signature(self) -> None:
        """It stays alone: its columns are its own."""
        return None

    def rescued(self, p: float, damping: Scalar) -> FisherMatrix:
        """Of the dense matrix."""
        return self._formed().rescued(p, damping)

    def _powered(self, p: float, damping: Scalar) -> FisherMatrix:
        return self._formed()._powered(p, damping)

    def _formed(self) -> Dense:
        """The dense block."""
        return Dense(self.dense(), self.shape)
