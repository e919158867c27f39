"""The networks and data that the benchmarks measure: random weights, random inputs, the same for
every contender.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import fisher_lab as fl

Case = tuple[nn.Module, Any, Any]  # model, loss, (x, y) or another batch


def _labelled(x: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x, torch.randint(classes, (len(x),), generator=torch.Generator().manual_seed(2))


def _inputs(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def martens_grosse(N: int = 1000) -> Case:
    """256-20-20-20-20-20-10, tanh."""
    widths = [256, 20, 20, 20, 20, 20, 10]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), _labelled(_inputs(N, 256), 10)


def mlp(width: int = 1000, N: int = 1000, C: int = 10) -> Case:
    """784-width-width-C, tanh."""
    model = nn.Sequential(
        nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, C)
    )
    return model, nn.CrossEntropyLoss(), _labelled(_inputs(N, 784), C)


def conv(channels: int = 128, side: int = 16, N: int = 200) -> Case:
    """A convolution between two of its width; only layer "2" is measured."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )
    return model, nn.CrossEntropyLoss(), _labelled(_inputs(N, 3, side, side), 10)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        short = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.short = nn.Sequential(*short) if stride > 1 or inputs != outputs else nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


def resnet18(N: int = 64) -> Case:
    """ResNet-18 for 32x32 images, 11.2 million parameters, in evaluation mode."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inputs, outputs, stride), _Block(outputs, outputs, 1)]
        inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model, nn.CrossEntropyLoss(), _labelled(_inputs(N, 3, 32, 32), 10)


def _tokens(V: int, N: int, L: int) -> torch.Tensor:
    return torch.randint(V, (N, L), generator=torch.Generator().manual_seed(1))


def gpt2(V: int = 50_257, N: int = 64, L: int = 128) -> Case:
    """GPT-2 of two layers of width 256, its output layer tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2,
        n_embd=256,
        n_head=4,
        vocab_size=V,
        n_positions=L,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), fl.Categorical(), {"input_ids": _tokens(V, N, L)}


def head(V: int = 50_257, N: int = 64, L: int = 128) -> Case:
    """Logits with a bias, tied to nothing, of vectors of width 256."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, V))
    return model, fl.Categorical(), _inputs(N, L, 256)


CASES: dict[str, Callable[..., Case]] = {
    f.__name__: f for f in (martens_grosse, mlp, conv, resnet18, gpt2, head)
}


def build(name: str, sizes: dict[str, int]) -> Case:
    """A case with seeded weights, in evaluation mode."""
    torch.manual_seed(0)
    model, loss, data = CASES[name](**sizes)
    return model.eval(), loss, data
