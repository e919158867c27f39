"""nn.Linear at any number of positions, and the like of other libraries."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fisher_lab.layers.base import WeightBias


class LinearLayer(WeightBias):
    """y = x W^T + b on inputs `[N, *positions, in_features]`."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    type_names = ("torch_geometric.nn.dense.linear.Linear",)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, T, 1, in_features (+ 1)]`."""
        return self.with_bias(x.reshape(x.shape[0], -1, 1, x.shape[-1]))

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, T, 1, out_features]`."""
        return g.reshape(g.shape[0], g.shape[1], -1, 1, g.shape[-1])


class TransposedLinearLayer(LinearLayer):
    """y = x V + b with V `[in_features, out_features]`, the Conv1D of the transformers library; W
    is [V^T | b].
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    type_names = ("transformers.pytorch_utils.Conv1D",)

    @property
    def kernel(self) -> tuple[int, ...]:
        """One input mode; (0,) if the weight is frozen."""
        weight = self.parameters.get("weight")
        if weight is None:
            return (0,)
        return (weight.shape[0],)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows are outputs."""
        rows = next(iter(self.parameters.values())).shape[-1]
        return rows, self.kernel[0] + self.bias

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """[weight^T | bias]."""
        if "weight" in tensors:
            tensors = {**tensors, "weight": tensors["weight"].transpose(-1, -2)}
        return super().pack(tensors)

    def unpack(self, W: Tensor) -> dict[str, Tensor]:
        """Weight and bias apart."""
        tensors = super().unpack(W)
        if "weight" in tensors:
            tensors["weight"] = tensors["weight"].transpose(-1, -2)
        return tensors
