"""The Fisher of all weights of a network together, and how good a step is by it.

The share of the best decrease of the damped quadratic model that a step y reaches with its best
length is

    eta(y) = (y . g)^2 / [(y^T (F + lambda I) y) (g^T (F + lambda I)^-1 g)]

with the lambda of the whole network in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab._ground.arguments import check_kind, number
from fisher_lab.errors import network_efficiency
from fisher_lab.errors.quantities import DampedQuantities
from fisher_lab.matrices import FisherMatrix
from fisher_lab.matrices.base import DampingStyle
from fisher_lab.whole_network.inverse import Form, Inverse, inverse_of
from fisher_lab.whole_network.products import Arrays, Products


class NetworkFisher(Products):
    """F over the weights of all layers, `{layer: W [d_out, d_in]}`: products, norms, blocks, solves
    and the efficiency of steps.

    For example, of `nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))`: `shapes` is
    `{"0": (3, 5), "2": (2, 4)}` (the bias is the last column of W), `dim` 23, and `F @ V` takes and
    gives `{"0": [3, 5], "2": [2, 4]}`. `fl.network` makes one.

    Example:
        >>> F = fl.network(model, loss, (x, y))
        >>> step = F.step({"0": exact, "2": exact_2}, damping=0.01)
        >>> 0 < float(F.efficiency(step, damping=0.01)) <= 1
        True
    """

    def absolute_damping(self, damping: float) -> float:
        """Lambda for a damping relative to tr F / d, the mean eigenvalue of the whole network's F.

        Raises:
            ValueError: if the damping is not positive and finite, or F is zero.
        """
        if not 0 < number(damping) < math.inf:
            raise ValueError(
                f"Got damping={damping!r}, expected a positive number relative to tr F / d."
            )
        mean = float(self.trace()) / self.dim
        if mean <= 0:
            raise ValueError(
                "The Fisher of the network is zero, expected a positive trace: no damping is "
                "relative to it."
            )
        return float(damping) * mean

    @cached_property
    def _inverse(self) -> Inverse:
        return inverse_of(self)

    @cached_property
    def _decreases(self) -> dict[float, Form]:
        """g^T (F + lambda I)^-1 g by relative damping, as far as they were asked for."""
        return {}

    @property
    def route(self) -> str:
        """How (F + lambda I)^-1 is applied: "dense", "gram" or "krylov"."""
        return self._inverse.route

    def solve(self, V: Mapping[str, Tensor], damping: float) -> Arrays:
        """(F + lambda I)^-1 V for V `{layer: [d_out, d_in]}`, lambda relative to tr F / d.

        Raises:
            ValueError: for arrays of other shapes, a damping that is not positive, or where the
                solution is not reached to 1e-8 (only for F too large to be factorised).
        """
        v = self.flatten(V)
        if v.ndim != 1:
            raise ValueError(
                f"Got arrays of {v.ndim - 1} leading dimensions, expected none; solve one by one."
            )
        return self.unflatten(self._inverse.solve(v, self.absolute_damping(damping)))

    def best_decreases(self, dampings: Sequence[float]) -> list[Form]:
        """g^T (F + lambda I)^-1 g for several dampings at once: twice the best decrease of the
        damped quadratic model, with its noise.

        Raises:
            ValueError: for dampings that are not positive, or a gradient that is zero.
        """
        g = self.flatten(self.gradient)
        if not bool(g.any()):
            raise ValueError(
                "The gradient of the loss is zero, expected another one: no step is to be judged."
            )
        check_kind("dampings", dampings, (list, tuple), "a list of positive finite numbers")
        asked = {damping: self.absolute_damping(damping) for damping in dampings}
        missing = [damping for damping in asked if damping not in self._decreases]
        if missing:
            found = self._inverse.form(g, [asked[damping] for damping in missing])
            self._decreases.update(zip(missing, found, strict=True))
        return [self._decreases[damping] for damping in asked]

    def step(
        self, matrices: Mapping[str, FisherMatrix], damping: float, factored: bool = False
    ) -> Arrays:
        """The step of an approximation: (F^_l + lambda I)^-1 g_l in every layer, with the lambda of
        the whole network.

        Args:
            matrices: `{layer: FisherMatrix}`, as `estimate` and `opt.matrices()` give them.
            damping: relative to tr F / d of the whole network.
            factored: whether matrices with factors are damped in these, as K-FAC's papers do.
        """
        check_kind("factored", factored, bool, "True or False")
        check_kind("matrices", matrices, Mapping, "{layer: FisherMatrix}, as estimate gives them")
        shift = self.absolute_damping(damping)
        steps = {}
        for name in self.shapes:
            if name not in matrices:
                raise ValueError(
                    f"Got no matrix for layer {name!r}, expected one for every layer of the "
                    "network."
                )
            matrix = matrices[name]
            style: DampingStyle = "factored" if factored and matrix.has_factors else "exact"
            steps[name] = matrix.power(self.gradient[name], -1.0, shift, style)
        return steps

    def quantities(self, step: Mapping[str, Tensor], damping: float) -> DampedQuantities:
        """What the measures of a step y of the whole network are made of.

        Args:
            step: y `{layer: [d_out, d_in]}`, of any length.
            damping: lambda relative to tr F / d of the whole network.
        """
        y = self.flatten(step)
        g = self.flatten(self.gradient)
        square = float(self.quadratic(step))
        return self.quantities_of(float(y @ g), float(y @ y), square, damping)

    def quantities_of(self, yg: float, yy: float, yFy: float, damping: float) -> DampedQuantities:
        """The same from y . g, y . y and y . F y."""
        (best,) = self.best_decreases([damping])
        shift = self.absolute_damping(damping)
        return DampedQuantities(
            eps=torch.finfo(self.dtype).eps,
            shift=shift,
            rounding=best.noise / best.value,
            yg=yg,
            yy=yy,
            gx=best.value,
            yHy=yFy + shift * yy,
        )

    def efficiency(self, step: Mapping[str, Tensor], damping: float) -> float:
        """The share of the best decrease of the damped quadratic model that a step along `step`
        reaches with its best length; see `errors.network_efficiency`.

        Args:
            step: y `{layer: [d_out, d_in]}`, of any length.
            damping: lambda relative to tr F / d of the whole network.
        """
        return network_efficiency(self, step, damping)
