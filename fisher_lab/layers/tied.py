"""One weight that is looked up and multiplied with: an Embedding and the Linear layers behind it.

The block is that of the Linear layer, W `[V, d]` (and its bias). A lookup of row x whose result has
the gradient e adds the term onehot(x) e^T to the gradient of W, so it is one more position,

    a = sqrt(d) e / |e|      g = |e| / sqrt(d) onehot(x).

Any split of e between the two gives the same P. This one leaves the size of a gradient in g, and
gives a the size that a normalised input has; KFAC, which averages a a^T and g g^T apart, would
otherwise multiply ones of lookups with squared inputs of the Linear layer. TKFAC, TN and the exact
block do not depend on it.

With several directions each has positions of its own, R T of them, since a differs between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from fisher_lab.layers.base import Layer
from fisher_lab.layers.embedding import EmbeddingLayer
from fisher_lab.layers.linear import LinearLayer


class TiedEmbedding(LinearLayer):
    """Embeddings and Linear layers with one weight, as one Linear layer at the positions of both.

    Args:
        members: their adapters, at least one of each kind.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    type_names: ClassVar[tuple[str, ...]] = ()
    one_direction = True

    def __init__(self, members: Sequence[Layer]) -> None:
        first = members[0]
        linear = next(member for member in members if isinstance(member, LinearLayer))
        super().__init__(first.name, linear.module)
        self._names = {key: linear.full_name(key) for key in (*self.parameters, *self.frozen)}
        # torch calls a shared parameter by its first name
        self._names["weight"] = first.full_name("weight")
        uses: list[Layer] = []
        for member in members:
            if isinstance(member, EmbeddingLayer):
                member = _Lookup(member, self.bias)
            uses.append(member)
        self.uses = tuple(uses)
        self.tied = tuple(member.name for member in members)

    @staticmethod
    def fits(members: Sequence[Layer]) -> bool:
        """Whether all members are Embeddings and Linear layers that share all they have."""
        kinds = {type(member) for member in members}
        if kinds != {EmbeddingLayer, LinearLayer}:
            return False
        weights = {id(member.parameters.get("weight")) for member in members}
        linear = [member for member in members if isinstance(member, LinearLayer)]
        biases = {id(member.parameters.get("bias")) for member in linear}
        return len(weights) == 1 and len(biases) == 1

    def full_name(self, parameter: str) -> str:
        """Name of a parameter in the whole model."""
        return self._names[parameter]

    def factor_size(self) -> int:
        """The second moment of the rows, for which no method has a leaner way."""
        return self.shape[0] ** 2

    def notes(self) -> dict[str, Any]:
        """Also how lookups are counted."""
        found = super().notes()
        found["lookups"] = "positions with one-hot rows, beside those of the Linear layer"
        return found


class _Lookup(EmbeddingLayer):
    """The Embedding's part: its input are the indices, which become rows of the block.

    Args:
        embedding: its adapter.
        bias: whether the block has a bias, which a lookup does not use.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, embedding: EmbeddingLayer, bias: bool) -> None:
        super().__init__(embedding.name, embedding.module)
        self._bias_of_block = bias

    def unroll_input(self, x: Tensor) -> Tensor:
        """Indices `[N, T, 1, 1]`."""
        N = x.shape[0]
        return x.reshape(N, -1, 1, 1).clone()

    def unrolled_numbers(self, a: Tensor) -> int:
        """Those of the one-hot rows."""
        return a.numel() * self.module.num_embeddings

    def in_block(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Terms a `[N, R T, 1, d]` and g `[R, N, R T, 1, V]` of indices and gradients.

        Args:
            a: indices `[N, T, 1, 1]`.
            g: gradients of what was looked up `[R, N, T, 1, d]`.
        """
        R, N, T, _, d = g.shape
        V = self.module.num_embeddings
        rows = one_hot(a.squeeze(-1), V).to(g.dtype)  # [N, T, 1, V]
        if self.module.padding_idx is not None:  # its lookups have no gradient
            rows[..., self.module.padding_idx] = 0
        size = g.norm(dim=-1, keepdim=True) / math.sqrt(d)
        tiny = torch.finfo(g.dtype).tiny
        inputs = g / size.clamp(min=tiny)
        inputs = inputs.transpose(0, 1).reshape(N, R * T, 1, d)
        if self._bias_of_block:
            inputs = pad(inputs, (0, 1))
        # a position belongs to one direction: for the others its gradient is zero
        gradients = g.new_zeros(R, N, R, T, 1, V)
        for r in range(R):
            gradients[r, :, r] = size[r] * rows
        return inputs, gradients.reshape(R, N, R * T, 1, V)
