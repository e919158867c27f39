"""Adapters of module types: how a layer's input and output gradient become `a` and `g`."""

from fisher_lab.layers.base import Layer as Layer
from fisher_lab.layers.base import WeightBias as WeightBias
from fisher_lab.layers.linear import LinearLayer as LinearLayer
from fisher_lab.layers.selection import Selection as Selection
from fisher_lab.layers.selection import adapt as adapt
from fisher_lab.layers.selection import select as select


def registry() -> dict[type, type[Layer]]:
    """Adapter by module type."""
    return dict(Layer._registry)
