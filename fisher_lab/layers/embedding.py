"""nn.Embedding and nn.EmbeddingBag: Linear layers without bias on one-hot inputs and on
their sums.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from fisher_lab.layers.base import Layer


class EmbeddingLayer(Layer):
    """W `[embedding_dim, num_embeddings]`, the transpose of the weight, on one-hot inputs.

    The row of `padding_idx`, which never gets a gradient, is left out of W.

    Example:
        >>> fl.layers.EmbeddingLayer("e", nn.Embedding(10, 4)).shape
        (4, 10)
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    parameter_names = ("weight",)
    module: Any

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Options under which the gradient of one example is not defined."""
        if module.max_norm is not None:
            return (
                f"has max_norm={module.max_norm}, which rewrites its weight in forward, expected "
                "None; normalise the weight once and set max_norm to None"
            )
        if module.scale_grad_by_freq:
            return (
                "has scale_grad_by_freq=True, which mixes the gradients of the examples of a "
                "batch, expected False; set it to False"
            )
        return None

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        rows = torch.arange(self.module.num_embeddings)
        if self.module.padding_idx is not None:
            rows = rows[rows != self.module.padding_idx]
        self._trained = rows

    @property
    def shape(self) -> tuple[int, int]:
        """`(embedding_dim, rows of the weight that are trained)`."""
        return self.module.embedding_dim, len(self._trained)

    @property
    def kernel(self) -> tuple[int, ...]:
        """One input mode."""
        return (len(self._trained),)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, T, 1, rows]` of indices x `[N, *positions]`."""
        N = x.shape[0]
        indices = x.reshape(N, -1, 1)
        ones = one_hot(indices, self.module.num_embeddings)
        ones = ones.to(self.module.weight.dtype)
        trained = self._trained.to(x.device)
        return ones[..., trained]

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, T, 1, embedding_dim]` of g `[R, N, *positions, embedding_dim]`."""
        R, N = g.shape[:2]
        embedding_dim = g.shape[-1]
        return g.reshape(R, N, -1, 1, embedding_dim)

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """The transposed weight without its padding row."""
        weight = tensors["weight"].transpose(-1, -2)
        trained = self._trained.to(weight.device)
        return weight[..., trained]

    def unpack(self, W: Tensor) -> dict[str, Tensor]:
        """The weight, zero in its padding row."""
        row = self.module.padding_idx
        if row is not None:
            before = W[..., :row]
            after = W[..., row:]
            before = pad(before, (0, 1))  # with a column of zeros for the padding row
            W = torch.cat([before, after], -1)
        return {"weight": W.transpose(-1, -2)}

    def factor_size(self) -> int:
        """The second moment of the one-hot inputs."""
        return len(self._trained) ** 2

    def notes(self) -> dict[str, Any]:
        """Also which row is left out."""
        found = super().notes()
        row = self.module.padding_idx
        if row is not None:
            found["left_out_row"] = f"padding_idx={row}"
        return found


class EmbeddingBagLayer(EmbeddingLayer):
    """nn.EmbeddingBag on bags `[N, length]`: a Linear layer without bias whose input counts the
    indices of a bag.

    With mode="mean" the counts are divided by the number of indices; those equal to `padding_idx`
    do not count.

    Example:
        >>> fl.layers.EmbeddingBagLayer("e", nn.EmbeddingBag(10, 4)).shape
        (4, 10)
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.EmbeddingBag,)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Also mode="max", which is not linear in the weight's rows."""
        if module.mode == "max":
            return (
                'has mode="max", whose input is no sum over rows, expected "sum" or "mean"; use '
                "an Embedding and amax"
            )
        return super().refusal(module)

    def unroll_input(self, x: Tensor) -> Tensor:
        """`[N, 1, 1, rows]` of bags x `[N, length]`."""
        if x.ndim != 2:
            raise ValueError(
                f"Layer {self.name!r} (EmbeddingBag) got indices of shape {tuple(x.shape)}, "
                "expected bags of equal length [N, length] without offsets; pad the bags and set "
                "padding_idx."
            )
        ones = super().unroll_input(x)
        counts = ones.sum(1, keepdim=True)
        if self.module.mode == "mean":
            lengths = counts.sum(-1, keepdim=True)
            counts = counts / lengths.clamp(min=1)  # of an empty bag nothing is left
        return counts

    def unroll_gradient(self, g: Tensor) -> Tensor:
        """`[R, N, 1, 1, embedding_dim]` of g `[R, N, embedding_dim]`."""
        return g[:, :, None, None, :]
