"""The gradient form: a block over flattened parameters, from per-example gradients by torch.func
instead of hooks.

For parameters that are no weight matrix at positions. W is `[P, 1]`, a = 1 and g the per-example
gradients: every Kronecker product over W is then the full block, and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fisher_lab.layers.base import Layer


class GradientForm(Layer):
    """All trainable parameters of a module, flattened one after the other; makes no assumption on
    its forward.

    Serves norm layers (batch statistics are refused elsewhere), Bilinear, transposed convolutions,
    attention and its output projection (whose forward is never called), recurrent layers and cells,
    bare parameters, parametrised modules and every module of an unknown type that has few
    parameters. A large one of your own is served by a subclass with one line, `types = (MyLayer,)`.

    Example:
        >>> fl.layers.GradientForm("n", nn.LayerNorm(5)).shape
        (10, 1)
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Bilinear,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.MultiheadAttention,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
        nn.RNN,
        nn.LSTM,
        nn.GRU,
        nn.RNNCell,
        nn.LSTMCell,
        nn.GRUCell,
        nn.PReLU,
        nn.ParameterList,
        nn.ParameterDict,
    )
    parameter_names = None  # any
    gradient_form = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.bias = False  # nothing is folded in as a last column
        self._names: dict[str, str] = {}
        self.reason = ""  # why a layer that has an adapter of its own is in this form

    @classmethod
    def joined(cls, layers: Sequence[Layer], reason: str = "") -> GradientForm:
        """One block over the parameters of several modules that share some of them, under the first
        one's name.

        Args:
            layers: adapters of the modules.
            reason: why they are in this form although they have adapters of their own.
        """
        first = layers[0]
        block = cls(first.name, first.module)
        block.reason = reason
        parameters: dict[str, nn.Parameter] = {}
        known: set[int] = set()  # identities: equality of tensors is elementwise
        for layer in layers:
            for key, parameter in layer.parameters.items():
                if id(parameter) in known:
                    continue
                known.add(id(parameter))
                full_name = layer.full_name(key)
                parameters[full_name] = parameter
        block.parameters = parameters
        # the keys are full names already
        block._names = dict(zip(parameters, parameters, strict=True))
        if len(layers) > 1:
            block.tied = tuple(layer.name for layer in layers)
        return block

    def full_name(self, parameter: str) -> str:
        """Name of a parameter in the whole model."""
        if parameter in self._names:
            return self._names[parameter]
        return super().full_name(parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, 1)`."""
        return sum(self._sizes()), 1

    def _sizes(self) -> list[int]:
        """Numbers in each parameter."""
        return [parameter.numel() for parameter in self.parameters.values()]

    @property
    def kernel(self) -> tuple[int, ...]:
        """One input mode of one entry."""
        return (1,)

    def unroll_input(self, x: Tensor) -> Tensor:
        """Ones `[N, 1, 1, 1]`, whatever the module's input."""
        N = x.shape[0]
        some = next(iter(self.parameters.values()))
        return torch.ones(N, 1, 1, 1, dtype=some.dtype, device=x.device)

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, 1, 1, P]` of packed per-example gradients g `[R, N, P, 1]`."""
        R, N = g.shape[:2]
        return g.reshape(R, N, 1, 1, -1)

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """All parameters, flattened one after the other."""
        pieces = []
        for key, parameter in self.parameters.items():
            tensor = tensors[key]  # [..., *shape of the parameter]
            if parameter.ndim == 0:
                piece = tensor.unsqueeze(-1)
            else:
                first = tensor.ndim - parameter.ndim
                piece = tensor.flatten(first)
            pieces.append(piece)
        flat = torch.cat(pieces, -1)
        return flat.unsqueeze(-1)

    def unpack(self, W: Tensor) -> dict[str, Tensor]:
        """The parameters apart."""
        flat = W.squeeze(-1)
        pieces = iter(flat.split(self._sizes(), -1))
        tensors = {}
        for key, parameter in self.parameters.items():
            piece = next(pieces)
            before = piece.shape[:-1]
            tensors[key] = piece.reshape((*before, *parameter.shape))
        return tensors

    def factor_size(self) -> int:
        """The full block."""
        return self.shape[0] ** 2

    def notes(self) -> dict[str, Any]:
        """Also the parameters inside, in their order."""
        found = super().notes()
        found["parameters"] = [self.full_name(key) for key in self.parameters]
        if self.reason:
            found["reason"] = self.reason
        return found
