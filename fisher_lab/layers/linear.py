"""nn.Linear at any number of positions, and the like of other libraries."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fisher_lab.layers.base import WeightBias


class LinearLayer(WeightBias):
    """y = x W^T + b on inputs `[N, *positions, in_features]`.

    Example:
        >>> fl.layers.LinearLayer("0", model[0]).shape
        (6, 9)
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    type_names: ClassVar[tuple[str, ...]] = ("torch_geometric.nn.dense.linear.Linear",)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, T, 1, in_features (+ 1)]`."""
        N = x.shape[0]
        in_features = x.shape[-1]
        a = x.reshape(N, -1, 1, in_features)
        return self.with_bias(a)

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, T, 1, out_features]`."""
        R, N = g.shape[:2]
        out_features = g.shape[-1]
        return g.reshape(R, N, -1, 1, out_features)


class TransposedLinearLayer(LinearLayer):
    """y = x V + b with V `[in_features, out_features]`, the Conv1D of the transformers library; W
    is [V^T | b].
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    type_names: ClassVar[tuple[str, ...]] = ("transformers.pytorch_utils.Conv1D",)

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
        some = next(iter(self.parameters.values()))  # the last dimension of both are the outputs
        columns = self.kernel[0] + self.bias
        return some.shape[-1], columns

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """[weight^T | bias]."""
        turned = dict(tensors)
        if "weight" in turned:
            V = turned["weight"]
            turned["weight"] = V.transpose(-1, -2)
        return super().pack(turned)

    def unpack(self, W: Tensor) -> dict[str, Tensor]:
        """Weight and bias apart."""
        tensors = super().unpack(W)
        if "weight" in tensors:
            weight = tensors["weight"]
            tensors["weight"] = weight.transpose(-1, -2)
        return tensors
