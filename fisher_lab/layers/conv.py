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

    Example:
        >>> fl.layers.ConvLayer("c", nn.Conv2d(2, 4, 3)).shape  # 2 * 3 * 3 inputs and the bias
        (4, 19)
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
        dims = len(conv.kernel_size)
        if x.ndim != dims + 2:
            raise ValueError(
                f"Layer {self.name!r} got an input of shape {tuple(x.shape)}, expected {dims + 2} "
                "dimensions [N, C_in, *positions]; keep the examples as first dimension."
            )
        mode = conv.padding_mode
        if mode == "zeros":
            mode = "constant"  # what `pad` calls it
        patches = pad(x, self._padding(), mode=mode)
        for i in range(dims):
            dilation = conv.dilation[i]
            reach = dilation * (conv.kernel_size[i] - 1) + 1
            # a new last dimension with what the kernel spans, of which it sees every dilation-th
            spans = patches.unfold(2 + i, reach, conv.stride[i])
            patches = spans[..., ::dilation]
        # patches are [N, C_in, *positions, *kernel]
        N = patches.shape[0]
        T = math.prod(patches.shape[2 : 2 + dims])
        kernel = math.prod(conv.kernel_size)
        grouped = patches.reshape(N, conv.groups, -1, T, kernel)
        a = grouped.permute(0, 3, 1, 2, 4)  # [N, T, Q, C_in / Q, kernel]
        return self.with_bias(a.flatten(3))

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, T, Q, C_out / Q]` of g `[R, N, C_out, *positions]`."""
        R, N, C_out = g.shape[:3]
        d_out = C_out // self.groups
        grouped = g.reshape(R, N, self.groups, d_out, -1)  # [R, N, Q, d_out, T]
        return grouped.permute(0, 1, 4, 2, 3)

    def _padding(self) -> list[int]:
        """Entries to add before and after, last dimension first, as torch's `pad` wants them."""
        conv = self.module
        dims = len(conv.kernel_size)
        amounts: list[int] = []
        for i in reversed(range(dims)):
            if conv.padding == "valid":
                before = 0
                behind = 0
            elif conv.padding == "same":
                total = conv.dilation[i] * (conv.kernel_size[i] - 1)
                before = total // 2  # of an odd number torch puts one more behind
                behind = total - before
            else:
                before = conv.padding[i]
                behind = before
            amounts += [before, behind]
        return amounts
