"""One small model for every layer type and option: what is measured, and how its
parameters form W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.layers.oracle import flattened, generator, normal, randomised, weight_and_bias

N = 4


@dataclass(frozen=True)
class Case:
    """A model, inputs, the name of the layer in question and the way its gradients form W."""

    model: nn.Module
    x: Tensor
    layer: str = "0"
    pack: Callable[[dict[str, Tensor]], Tensor] | None = None  # None: weight and bias

    @property
    def module(self) -> Any:
        return self.model.get_submodule(self.layer)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the block."""
        found = {
            key: p for key, p in self.module.named_parameters(recurse=False) if p.requires_grad
        }
        inside = self.module.named_parameters() if hasattr(self.module, "parametrizations") else ()
        return found | {key: p for key, p in inside if key.startswith("parametrizations")}

    def packed(self) -> Callable[[dict[str, Tensor]], Tensor]:
        return weight_and_bias(self.module) if self.pack is None else self.pack


class Head(nn.Module):
    """The first tensor of the layer's output through tanh, averaged over all positions:
    `[N, width]` -> `[N, 3]`.
    """

    def __init__(self, layer: nn.Module, width: int, channels: int = 1, call: str = "x") -> None:
        super().__init__()
        self.layer, self.channels, self.call = layer, channels, call
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = (
            self.layer(x, x, x)
            if self.call == "xxx"
            else self.layer(x, x.flip(-1))
            if self.call == "xy"
            else self.layer(x)
        )
        y = (y[0] if isinstance(y, tuple) else y).tanh()
        if (
            y.ndim > 2
            # not by movedim: torch 2.13's InstanceNorm has a wrong backward for gradients with
            # channels last
        ):
            y = y.square()
            y = y.flatten(1, -2).mean(1) if self.channels == -1 else y.flatten(2).mean(2)
        return self.out(y)


class Bare(nn.Module):
    """A container that owns parameters of its own: `name` is its place in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x + self.shift).tanh()) * self.scale


def conv(dim: int, **options: Any) -> Callable[[], Case]:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    sizes = {1: (7,), 2: (5, 6), 3: (4, 3, 4)}

    def make() -> Case:
        C_in, C_out = options.pop("channels", (2, 4)) if "channels" in options else (2, 4)
        kernel = options.get("kernel_size", 3 if dim < 3 else 2)
        kwargs = {
            key: value for key, value in options.items() if key not in ("kernel_size", "channels")
        }
        model = Head(kinds[dim](C_in, C_out, kernel, **kwargs), C_out)
        return Case(randomised(model), normal(N, C_in, *sizes[dim]), "layer")

    return make


def simple(
    make_layer: Callable[[], nn.Module], width: int, *shape: int, **kwargs: Any
) -> Callable[[], Case]:
    """A layer in gradient form (or with `pack`) on normal inputs `[N, *shape]`."""
    pack = kwargs.pop("pack", flattened)
    return lambda: Case(
        randomised(Head(make_layer(), width, **kwargs)), normal(N, *shape), "layer", pack
    )


def embedding(**options: Any) -> Callable[[], Case]:
    def pack(gradient: dict[str, Tensor]) -> Tensor:
        rows = [row for row in range(5) if row != options.get("padding_idx")]
        return gradient["weight"][rows].T.flatten()

    indices = torch.randint(0, 5, (N, 3), generator=generator())
    return lambda: Case(
        randomised(Head(nn.Embedding(5, 3, **options), 3, channels=-1)), indices, "layer", pack
    )


def bag(**options: Any) -> Callable[[], Case]:
    """An EmbeddingBag on bags of four indices."""
    padding = options.get("padding_idx")

    def pack(gradient: dict[str, Tensor]) -> Tensor:
        rows = [row for row in range(5) if row != padding]
        return gradient["weight"][rows].T.flatten()

    indices = torch.randint(0, 5, (N, 4), generator=generator())
    return lambda: Case(
        randomised(Head(nn.EmbeddingBag(5, 3, **options), 3)), indices, "layer", pack
    )


class Conv1D(nn.Module):
    """The Conv1D of the transformers library, under its name there: y = x V + b."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def transposed(gradient: dict[str, Tensor]) -> Tensor:
    """W of a Conv1D: `[V^T | b]`."""
    return torch.cat([gradient["weight"].T, gradient["bias"][:, None]], 1).flatten()


def attention(**options: Any) -> Callable[[], Case]:
    return simple(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options),
        4,
        3,
        4,
        call="xxx",
        channels=-1,
    )


def frozen(which: str) -> Case:
    case = conv(2)()
    getattr(case.module, which).requires_grad_(False)
    return case


GRADIENT_FORM: dict[str, Callable[[], Case]] = {
    "LayerNorm": simple(lambda: nn.LayerNorm(4), 4, 3, 4, channels=-1),
    "LayerNorm over two dimensions": simple(lambda: nn.LayerNorm((3, 4)), 4, 3, 4, channels=-1),
    "LayerNorm without bias": simple(lambda: nn.LayerNorm(4, bias=False), 4, 4, channels=-1),
    "RMSNorm": simple(lambda: nn.RMSNorm(4), 4, 3, 4, channels=-1),
    "GroupNorm": simple(lambda: nn.GroupNorm(2, 4), 4, 4, 3, 2),
    "InstanceNorm1d": simple(lambda: nn.InstanceNorm1d(4, affine=True), 4, 4, 5),
    "InstanceNorm2d": simple(lambda: nn.InstanceNorm2d(4, affine=True), 4, 4, 3, 3),
    "InstanceNorm2d running": simple(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 4, 4, 3, 3
    ),
    "InstanceNorm3d": simple(lambda: nn.InstanceNorm3d(2, affine=True), 2, 2, 2, 3, 2),
    "BatchNorm1d": simple(lambda: nn.BatchNorm1d(4), 4, 4),
    "BatchNorm2d": simple(lambda: nn.BatchNorm2d(4), 4, 4, 3, 3),
    "BatchNorm3d": simple(lambda: nn.BatchNorm3d(2), 2, 2, 2, 3, 2),
    "Bilinear": simple(lambda: nn.Bilinear(3, 3, 2), 2, 3, call="xy", channels=-1),
    "ConvTranspose1d": simple(lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), 4, 2, 5),
    "ConvTranspose2d": simple(
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), padding=1, output_padding=0), 3, 2, 4, 4
    ),
    "ConvTranspose3d": simple(lambda: nn.ConvTranspose3d(2, 2, 2, bias=False), 2, 2, 2, 3, 2),
    "PReLU": simple(lambda: nn.PReLU(4), 4, 4, 3),
    "RNN": simple(lambda: nn.RNN(3, 2, batch_first=True), 2, 4, 3, channels=-1),
    "LSTM": simple(lambda: nn.LSTM(3, 2, batch_first=True), 2, 3, 3, channels=-1),
    "GRU": simple(lambda: nn.GRU(3, 2, batch_first=True, bidirectional=True), 4, 3, 3, channels=-1),
    "RNNCell": simple(lambda: nn.RNNCell(3, 2), 2, 3),
    "LSTMCell": simple(lambda: nn.LSTMCell(3, 2), 2, 3),
    "GRUCell": simple(lambda: nn.GRUCell(3, 2, bias=False), 2, 3),
    "weight norm": simple(lambda: parametrizations.weight_norm(nn.Linear(3, 4)), 4, 3),
    "weight norm of a convolution": simple(
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), 3, 2, 4
    ),
    "spectral norm": simple(lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), 4, 3),
    "MultiheadAttention in": attention(),
    "MultiheadAttention with a bias of keys": attention(add_bias_kv=True),
    "MultiheadAttention of other widths": attention(kdim=4, vdim=4, bias=False),
    "MultiheadAttention out": lambda: Case(
        randomised(Head(nn.MultiheadAttention(4, 2, batch_first=True), 4, call="xxx", channels=-1)),
        normal(N, 3, 4),
        "layer.out_proj",
        flattened,
    ),
    "bare parameters": lambda: Case(
        randomised(nn.Sequential(Bare(), nn.Tanh())), normal(N, 3), "0", flattened
    ),
    "bare parameters of the root": lambda: Case(randomised(Bare()), normal(N, 3), "", flattened),
}

FACTOR_FORM: dict[str, Callable[[], Case]] = {
    "Linear": lambda: Case(randomised(nn.Sequential(nn.Linear(3, 3))), normal(N, 3)),
    "Linear without bias": simple(lambda: nn.Linear(4, 2, bias=False), 2, 4, pack=None),
    "Linear at positions": simple(lambda: nn.Linear(4, 2), 2, 3, 2, 4, channels=-1, pack=None),
    "Conv1d": conv(1),
    "Conv1d stride": conv(1, stride=2, padding=1),
    "Conv1d same": conv(1, padding="same", kernel_size=4, dilation=2),
    "Conv1d reflect": conv(1, padding=2, padding_mode="reflect", bias=False),
    "Conv2d": conv(2),
    "Conv2d without bias": conv(2, bias=False),
    "Conv2d stride and dilation": conv(
        2, stride=(2, 1), dilation=(1, 2), padding=(0, 2), kernel_size=(2, 3)
    ),
    "Conv2d valid": conv(2, padding="valid", kernel_size=(2, 3)),
    "Conv2d same": conv(2, padding="same", kernel_size=(2, 3), dilation=(1, 2)),
    "Conv2d reflect": conv(2, padding=(1, 2), padding_mode="reflect"),
    "Conv2d replicate": conv(2, padding=1, padding_mode="replicate", stride=2),
    "Conv2d circular": conv(2, padding=(2, 1), padding_mode="circular"),
    "Conv2d same circular": conv(2, padding="same", kernel_size=(2, 3), padding_mode="circular"),
    "Conv2d groups": conv(2, groups=2, padding=1),
    "Conv2d groups and bias": conv(2, groups=2, channels=(4, 6)),
    "Conv2d depthwise": conv(2, groups=2, channels=(2, 2), padding=1, bias=False),
    "Conv2d depthwise with multiplier": conv(2, groups=2, channels=(2, 4), stride=2),
    "Conv2d pointwise": conv(2, kernel_size=1),
    "Conv2d frozen weight": lambda: frozen("weight"),
    "Conv2d frozen bias": lambda: frozen("bias"),
    "Conv3d": conv(3),
    "Conv3d options": conv(
        3, stride=(1, 2, 1), padding=(1, 0, 1), padding_mode="replicate", groups=2, channels=(2, 2)
    ),
    "Embedding": embedding(),
    "Embedding padding": embedding(padding_idx=2),
    "EmbeddingBag": bag(),
    "EmbeddingBag sum": bag(mode="sum"),
    "EmbeddingBag padding": bag(padding_idx=2),
    "Conv1D of transformers": simple(lambda: Conv1D(2, 4), 2, 3, 4, channels=-1, pack=transposed),
}

CASES = FACTOR_FORM | GRADIENT_FORM
