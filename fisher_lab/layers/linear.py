"""nn.Linear at any number of positions."""

from __future__ import annotations

from torch import Tensor, nn

from fisher_lab.layers.base import WeightBias


class LinearLayer(WeightBias):
    """y = x W^T + b on inputs `[N, *positions, in_features]`."""

    types = (nn.Linear,)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, T, 1, in_features (+ 1)]`."""
        return self.with_bias(x.reshape(x.shape[0], -1, 1, x.shape[-1]))

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, T, 1, out_features]`."""
        return g.reshape(g.shape[0], g.shape[1], -1, 1, g.shape[-1])
