"""The Layer noun: the adapter of one module type, from its input and output gradient to `a` and `g`
of LayerStats.

Every layer becomes a weight matrix W `[Q * d_out, d_in]` that is used at T positions. Worked
examples, for N examples:

    Linear(8, 6) on [N, 8]                     a [N, 1, 1, 9]    g [R, N, 1, 1, 6]    W [6, 9]
    Linear(8, 6) on [N, 20, 8], 20 tokens      a [N, 20, 1, 9]   g [R, N, 20, 1, 6]   W [6, 9]
    Conv2d(3, 16, 5) on [N, 3, 12, 12]         a [N, 64, 1, 76]  g [R, N, 64, 1, 16]  W [16, 76]
    Conv2d(4, 6, 3, groups=2) on [N, 4, 5, 5]  a [N, 9, 2, 19]   g [R, N, 9, 2, 3]    W [6, 19]
    Embedding(50, 8) on [N, 20] indices        a [N, 20, 1, 50]  g [R, N, 20, 1, 8]   W [8, 50]
    Linear(8, 6) used twice (a tied weight)    a [N, 2, 1, 9]    g [R, N, 2, 1, 6]    W [6, 9]

The last entry of d_in is the bias: 9 = 8 + 1, 76 = 3 * 5 * 5 + 1, 19 = 4 / 2 * 3 * 3 + 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class Layer(ABC):
    """One module of a model, seen as a weight matrix W `[Q * d_out, d_in]` with the bias as its
    last column.

    A subclass names the module `types` it understands (for libraries that need not be installed,
    their `type_names`) and writes `unroll_input`, `unroll_gradient`, `pack` and `unpack`.
    Parameters that do not require gradients are left out of W.

    Args:
        name: the module's name in the model.
        module: the module.

    Example:
        >>> layer = fl.layers.LinearLayer("0", model[0])
        >>> layer.shape
        (6, 9)
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    # full names of types, such as "transformers.pytorch_utils.Conv1D"
    type_names: ClassVar[tuple[str, ...]] = ()
    # a module that owns others is not understood; None for any
    parameter_names: ClassVar[tuple[str, ...] | None] = ("weight", "bias")
    # whether per-example gradients by torch.func stand in for inputs and hooks
    gradient_form: ClassVar[bool] = False
    # whether the hooked form pays for one direction only; else the gradient form is smaller
    one_direction: ClassVar[bool] = False

    _registry: ClassVar[dict[type[nn.Module], type[Layer]]] = {}
    _by_name: ClassVar[dict[str, type[Layer]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for module_type in cls.types:
            Layer._registry[module_type] = cls
        for name in cls.type_names:
            Layer._by_name[name] = cls

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.parameters: dict[str, nn.Parameter] = {}
        self.frozen: list[str] = []
        for key, parameter in owned_parameters(module).items():
            if parameter.requires_grad:
                self.parameters[key] = parameter
            else:
                self.frozen.append(key)
        self.bias = "bias" in self.parameters
        self.uses: tuple[Layer, ...] = (self,)  # adapters of all modules that hold these parameters
        self.tied: tuple[str, ...] = ()  # names of these modules where there are several
        self.unknown = False  # whether no adapter names the module's type

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape `(Q * d_out, d_in)` of W, without frozen parameters."""

    @property
    def groups(self) -> int:
        """Q."""
        return 1

    @property
    @abstractmethod
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the input modes of W without the bias column."""

    @abstractmethod
    def unroll_input(self, x: Tensor) -> Tensor:
        """The module's input as a `[N, T, Q, d_in]`; always a new tensor."""

    @abstractmethod
    def unroll_gradient(self, g: Tensor) -> Tensor:
        """Gradients of the module's output `[R, N, *output]` as g `[R, N, T, Q, d_out]`."""

    def in_block(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of one use as those of the block that it belongs to, most often the same.

        Args:
            a: from `unroll_input`.
            g: from `unroll_gradient`.
        """
        return a, g

    def unrolled_numbers(self, a: Tensor) -> int:
        """Numbers that the input of one use takes in its block."""
        return a.numel()

    @abstractmethod
    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """Arrays of the named parameters' shapes `[..., *shape]` as one W `[..., Q *
        d_out, d_in]`.
        """

    @abstractmethod
    def unpack(self, W: Tensor) -> dict[str, Tensor]:
        """The inverse of `pack`."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:  # noqa: ARG003
        """Why a module of a known type cannot be measured as it is configured, with the cure; None
        if it can.
        """
        return None

    def full_name(self, parameter: str) -> str:
        """Name of a parameter in the whole model."""
        if not self.name:  # the whole model is the layer
            return parameter
        return f"{self.name}.{parameter}"

    def factor_size(self) -> int:
        """Numbers in the largest matrix that no approximation avoids; 0 where every method has a
        leaner way.
        """
        return 0

    def notes(self) -> dict[str, Any]:
        """What a result says about this block beside its shape."""
        found: dict[str, Any] = {}
        if self.gradient_form:
            found["form"] = "gradient"
        if self.groups > 1:
            found["groups"] = self.groups
            found["cross_group"] = "in the exact block; counts as error of factors per group"
        if self.tied:
            found["tied"] = list(self.tied)
        if self.unknown:
            kind = type(self.module).__name__
            found["unknown"] = f"no adapter for {kind}: measured over its flattened parameters"
        return found

    def with_bias(self, a: Tensor) -> Tensor:
        """Inputs `[N, T, Q, n]` with the columns of a frozen weight dropped and the bias column of
        ones appended.
        """
        if "weight" not in self.parameters:
            a = a[..., :0]
        if not self.bias:
            return a.clone()
        ones = a.new_ones(*a.shape[:-1], 1)
        return torch.cat([a, ones], -1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.shape[0]} x {self.shape[1]})"


def owned_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the module itself, those behind its parametrisations included, by their
    names below it.
    """
    own = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        behind = module.get_submodule("parametrizations")
        for key, parameter in behind.named_parameters():
            own[f"parametrizations.{key}"] = parameter
    return own


class WeightBias(Layer):
    """Layers whose parameters are `weight` `[Q * d_out, *kernel]` and perhaps `bias` `[Q *
    d_out]`.

    Example:
        >>> layer = fl.layers.LinearLayer("0", model[0])
        >>> layer.pack(dict(model[0].named_parameters())).shape
        torch.Size([6, 9])
    """

    @property
    def kernel(self) -> tuple[int, ...]:
        """The weight's shape behind its first dimension; (0,) if it is frozen."""
        weight = self.parameters.get("weight")
        if weight is None:
            return (0,)
        return tuple(weight.shape[1:])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows are outputs, columns the flattened kernel and the bias."""
        some = next(iter(self.parameters.values()))  # weight and bias have as many rows
        columns = math.prod(self.kernel) + self.bias
        return some.shape[0], columns

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """[weight | bias]."""
        columns = []
        if "weight" in self.parameters:
            weight = tensors["weight"]
            first_of_kernel = weight.ndim - len(self.kernel)
            columns.append(weight.flatten(first_of_kernel))
        if self.bias:
            bias = tensors["bias"]
            columns.append(bias.unsqueeze(-1))
        return torch.cat(columns, -1)

    def unpack(self, W: Tensor) -> dict[str, Tensor]:
        """Weight and bias apart."""
        tensors = {}
        if "weight" in self.parameters:
            columns = W.shape[-1] - self.bias
            weight = W[..., :columns]
            tensors["weight"] = weight.unflatten(-1, self.kernel)
        if self.bias:
            tensors["bias"] = W[..., -1]
        return tensors
