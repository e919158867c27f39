"""The way of a gradient through a step: lists of vectors, one for each group.

    gradients --weight decay, momentum--> vectors --packed, times the inverse, unpacked-->
    directions --> parameters

Where a layer's part of the lists stands is known by its place, so that nothing is looked up by
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_lab.layers import Layer
from fisher_lab.matrices import FisherMatrix


class Bucket(NamedTuple):
    """Layers of a group whose inverses are of equal structure, and these inverses as one matrix.

    Attributes:
        members: positions of the layers in their group.
        inverse: over the rows of all members.
    """

    members: list[int]
    inverse: FisherMatrix


@dataclass
class Share:
    """One group's share of a step.

    Attributes:
        group: the group's settings.
        layers: its layers, in order.
        places: for every layer, where in the lists its parameters stand, by their names in the
            layer; empty for a layer without a gradient in this step.
        params: the parameters with a gradient, layer by layer.
        vectors: one for each: its gradient, then what weight decay and momentum make of it.
        directions: one for each: what is subtracted from it, times the learning rate.
    """

    group: dict[str, Any]
    layers: list[Layer]
    places: list[dict[str, int]] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)

    @classmethod
    def gather(
        cls,
        group: dict[str, Any],
        layers: list[Layer],
        dtype_of: Callable[[Tensor], torch.dtype],
        scale: Tensor | None,
    ) -> Share:
        """The gradients of a group's layers.

        Args:
            group: the group.
            layers: those of its layers that take part.
            dtype_of: working precision of a parameter.
            scale: by which a GradScaler multiplied the gradients; None if they are unscaled.
        """
        share = cls(group, layers)
        for layer in layers:
            place = {}
            for key, p in layer.parameters.items():
                if p.grad is None:
                    continue
                dense = p.grad.to_dense()
                gradient = dense.to(dtype_of(p))
                if scale is not None:
                    gradient = gradient / scale
                place[key] = len(share.params)
                share.params.append(p)
                share.vectors.append(gradient)
            share.places.append(place)
        return share

    def packed(self, vectors: list[Tensor], index: int) -> Tensor:
        """A layer's part of a list as one W `[Q * d_out, d_in]`; parameters without a gradient
        count as zero.

        Args:
            vectors: the vectors or the directions.
            index: position of a layer that has a gradient.
        """
        layer = self.layers[index]
        place = self.places[index]
        start = min(place.values())
        dtype = vectors[start].dtype
        tensors = {}
        for key, p in layer.parameters.items():
            if key in place:
                position = place[key]
                tensors[key] = vectors[position]
            else:
                tensors[key] = torch.zeros_like(p, dtype=dtype)
        return layer.pack(tensors)

    def set_direction(self, index: int, D: Tensor) -> None:
        """Hand a layer's direction D `[Q * d_out, d_in]` to its parameters."""
        place = self.places[index]
        unpacked = self.layers[index].unpack(D)
        for key, tensor in unpacked.items():
            # a parameter without a gradient (a frozen bias) does not move
            if key in place:
                position = place[key]
                self.directions[position] = tensor

    def inner(self) -> Tensor:
        """<directions, vectors> of a group with gradients, a 0-d tensor."""
        dots = []
        for d, v in zip(self.directions, self.vectors, strict=True):
            product = d * v
            dots.append(product.sum())
        return sum(dots[1:], dots[0])


def precondition(share: Share, buckets: Sequence[Bucket]) -> None:
    """The directions of a group: the inverses times its vectors, equal layers in one product."""
    share.directions = list(share.vectors)  # each of them is replaced
    treated: set[int] = set()
    for bucket in buckets:
        treated.update(bucket.members)
        _multiply(share, bucket)
    for index, place in enumerate(share.places):
        if index in treated:
            continue
        # a layer without finite statistics so far stays where it is
        for position in place.values():
            vector = share.vectors[position]
            share.directions[position] = torch.zeros_like(vector)


def _multiply(share: Share, bucket: Bucket) -> None:
    """The directions of the layers of one bucket."""
    used = [index for index in bucket.members if share.places[index]]
    if not used:
        return
    Ws = {}
    for index in used:
        Ws[index] = share.packed(share.vectors, index)
    first = Ws[used[0]]
    if len(bucket.members) == 1:
        D = bucket.inverse @ first
        share.set_direction(used[0], D)
        return
    # a layer without a gradient keeps its place in the joined matrix
    zero = torch.zeros_like(first)
    rows = []
    for index in bucket.members:
        W = Ws.get(index, zero)
        rows.append(W)
    together = torch.cat(rows)
    joined = bucket.inverse @ together
    pieces = joined.chunk(len(rows))
    for index, D in zip(bucket.members, pieces, strict=True):
        share.set_direction(index, D)
