"""Adapters of module types: how a layer's input and output gradient become `a` and `g`."""

from torch import nn

from fisher_lab.layers.base import Layer as Layer
from fisher_lab.layers.base import WeightBias as WeightBias
from fisher_lab.layers.conv import ConvLayer as ConvLayer
from fisher_lab.layers.embedding import EmbeddingBagLayer as EmbeddingBagLayer
from fisher_lab.layers.embedding import EmbeddingLayer as EmbeddingLayer
from fisher_lab.layers.gradient_form import GradientForm as GradientForm
from fisher_lab.layers.linear import LinearLayer as LinearLayer
from fisher_lab.layers.linear import TransposedLinearLayer as TransposedLinearLayer
from fisher_lab.layers.selection import Selection as Selection
from fisher_lab.layers.selection import adapt as adapt
from fisher_lab.layers.selection import select as select
from fisher_lab.layers.tied import TiedEmbedding as TiedEmbedding
from fisher_lab.layers.vocabulary import VocabularyLayer as VocabularyLayer


def registry() -> dict[type[nn.Module], type[Layer]]:
    """Adapter by module type."""
    return dict(Layer._registry)
