"""A Linear layer to the logits of a softmax over many classes, perhaps tied to the Embedding of the
same classes: what is larger than everything else in a language model.

W `[V, d]` (and its bias). Its factors over the V rows, V x V, would not fit anywhere; measured are
their diagonals. That goes through `statistics.VocabularyStats`, which hold a few numbers for each
position in the place of its V output gradients.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from fisher_lab.layers.base import Layer
from fisher_lab.layers.embedding import EmbeddingLayer
from fisher_lab.layers.linear import LinearLayer
from fisher_lab.layers.tied import TiedEmbedding

LARGEST_FACTOR = 4096  # rows up to which a factor over them is a matrix: 134 MB in float64


class VocabularyLayer(LinearLayer):
    """A Linear layer of more than `LARGEST_FACTOR` classes, or such a tied embedding.

    Args:
        layer: its adapter.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    type_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layer: Layer) -> None:
        linear = layer.module
        super().__init__(layer.name, linear)
        self._names = {key: layer.full_name(key) for key in self.parameters}
        self.tied = layer.tied
        self.uses = layer.uses

    @staticmethod
    def may_be(layer: Layer) -> bool:
        """Whether a layer is large enough, and of a form that has the logits of one Linear."""
        if type(layer) not in (LinearLayer, TiedEmbedding):
            return False
        linear = [use for use in layer.uses if isinstance(use, LinearLayer)]
        whole = "weight" in layer.parameters and not layer.frozen
        return len(linear) == 1 and whole and layer.shape[0] > LARGEST_FACTOR

    def full_name(self, parameter: str) -> str:
        """Name of a parameter in the whole model."""
        return self._names[parameter]

    @cached_property
    def weight(self) -> Tensor:
        """W `[V, d_in]`, the same for all that is captured."""
        values = {key: parameter.detach() for key, parameter in self.parameters.items()}
        if not self.bias:
            return values["weight"]
        return self.pack(values)

    def trained(self, index: Tensor, use: Layer) -> Tensor:
        """Indices that an Embedding looked up, -1 where their row is not trained."""
        assert isinstance(use, EmbeddingLayer)
        row = use.module.padding_idx
        if row is None:
            return index
        return index.masked_fill(index == row, -1)

    def captured_numbers(self, use: Layer, a: Tensor) -> int:
        """Numbers that one use takes while it is captured, half of them copies.

        Args:
            use: adapter of the module.
            a: from its `unroll_input`.
        """
        if isinstance(use, EmbeddingLayer):
            return a.numel()
        positions = a[..., 0].numel()
        # logits and softmax are computed again, and held against the output gradients
        return a.numel() + 3 * positions * self.shape[0]

    def notes(self) -> dict[str, Any]:
        """Also that factors over the rows are diagonal."""
        found = super().notes()
        found["factors"] = f"those over the {self.shape[0]:,} rows are diagonal"
        if self.tied:
            found["lookups"] = "positions with one-hot rows, beside those of the Linear layer"
        return found
