"""nn.Conv1d, nn.Conv2d and nn.Conv3d with stride, padding of every mode, dilation and groups."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from fisher_lab.layers.base import WeightBias


class ConvLayer(WeightBias):
    """Cross-correlation as a weight shared by T output positions, with Q groups.

    Patches are flattened in the order (channel, *kernel) of `weight.flatten(1)`; padded entries are
    part of them.
    """

    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    module: Any

    @property
    def groups(self) -> int:
        """Q, the module's groups."""
        return int(self.module.groups)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, T, Q, C_in / Q * prod(kernel) (+ 1)]` of x `[N, C_in, *positions]`."""
        conv = self.module
        n = len(conv.kernel_size)
        if x.ndim != n + 2:
            raise ValueError(
                f"Layer {self.name!r} got an input of shape {tuple(x.shape)}, expected {n + 2} "
                "dimensions [N, C_in, *positions]; keep the examples as first dimension."
            )
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        patches = pad(x, self._padding(), mode=mode)
        for i in range(n):
            size, stride, dilation = conv.kernel_size[i], conv.stride[i], conv.dilation[i]
            reach = dilation * (size - 1) + 1
            patches = patches.unfold(2 + i, reach, stride)[..., ::dilation]
        # patches are [N, C_in, *positions, *kernel]
        N = patches.shape[0]
        T = math.prod(patches.shape[2 : 2 + n])
        grouped = patches.reshape(N, conv.groups, -1, T, math.prod(conv.kernel_size))
        return self.with_bias(grouped.permute(0, 3, 1, 2, 4).flatten(3))

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, T, Q, C_out / Q]` of g `[R, N, C_out, *positions]`."""
        R, N, C_out = g.shape[:3]
        grouped = g.reshape(R, N, self.groups, C_out // self.groups, -1)
        return grouped.permute(0, 1, 4, 2, 3)

    def _padding(self) -> list[int]:
        """Entries to add before and after, last dimension first, as torch's `pad` wants them."""
        conv = self.module
        amounts: list[int] = []
        for i in reversed(range(len(conv.kernel_size))):
            if conv.padding == "valid":
                amounts += [0, 0]
            elif conv.padding == "same":
                total = conv.dilation[i] * (conv.kernel_size[i] - 1)
                before = total // 2  # of an odd number torch puts one more behind
                amounts += [before, total - before]
            else:
                amounts += [conv.padding[i], conv.padding[i]]
        return amounts
