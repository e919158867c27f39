"""The independent check: v^T F v of one random direction v per layer, by torch.func alone."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_lab._ground.progress import Progress
from fisher_lab._ground.ranks import ALONE, Ranks, check_alike
from fisher_lab._passes.batches import Inputs, batch_checksum, checksum, taken
from fisher_lab._passes.derivatives import column_derivatives, per_example_gradients
from fisher_lab._passes.source import Source
from fisher_lab.layers import VocabularyLayer
from fisher_lab.matrices import FisherMatrix


class Check:
    """What every captured block is held against, and the fingerprint of all that a comparison
    depends on.

    Args:
        source: model and data.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.fingerprint = ""
        self._expected: dict[str, float] = {}  # v^T F v
        self._directions: dict[str, Tensor] = {}

    def run(self, bar: Progress, ranks: Ranks = ALONE) -> None:
        """One pass over the data, each rank for some of the layers.

        Raises:
            ValueError: where the ranks measure different models or data.
        """
        self._draw_directions()
        names = list(self.source.layers)
        own = names[ranks.own :: ranks.count]
        parts = ranks.gathered(lambda: self._pass(own, bar))
        sums: dict[str, float] = {}
        checksums = []
        for found, crc in parts:
            sums |= found
            checksums.append(crc)
        check_alike(checksums)
        for name in names:
            self._expected[name] = sums[name] / self.source.N
        self.fingerprint = self._fingerprint(checksums[0])

    def _pass(self, names: Sequence[str], bar: Progress) -> tuple[dict[str, float], int]:
        """N v^T F v of some layers, and the checksum of the model and of all data."""
        source = self.source
        crc = source.prepared.model_checksum()
        sums = dict.fromkeys(names, 0.0)
        for piece in source.parts():
            inputs = piece.batch.inputs
            if piece.batch.y is not None:
                crc = checksum(piece.batch.y, crc)
            crc = batch_checksum(inputs, None, crc)
            with torch.no_grad():
                z = source.forward(inputs)
            factors = source.factors_of(piece)
            S = factors(z)
            share = piece.batch.N / source.about_N
            if self._through_gradients:
                bar.say("checking all layers")
                self._add_all(sums, inputs, S)
                bar.advance(share * len(names))
                continue
            for name in names:
                bar.say(f"checking {name}")
                sums[name] += self._of_piece(name, inputs, S)
                bar.advance(share)
        return sums, crc

    def _draw_directions(self) -> None:
        """One random v for every layer, the same on every device and in every precision."""
        source = self.source
        like = next(source.model.parameters())
        generator = torch.Generator().manual_seed(source.seed)
        for name, layer in source.layers.items():
            V = torch.randn(layer.shape, generator=generator, dtype=torch.float64)
            self._directions[name] = V.to(like)

    @property
    def _through_gradients(self) -> bool:
        """Whether all per-example gradients cost less than a derivative along v for every layer:
        behind a vocabulary each of those takes the largest products of the network again.
        """
        return any(isinstance(layer, VocabularyLayer) for layer in self.source.layers.values())

    def _add_all(self, sums: dict[str, float], inputs: Inputs, S: Tensor) -> None:
        """Add the sums of (S^T J v)^2 over the examples of a piece, a few examples at a time."""
        source = self.source
        tangents = {name: self._tangent(name) for name in source.layers}
        names = [key for tangent in tangents.values() for key in tangent]
        size = sum(self._directions[name].numel() for name in source.layers)
        # gradients, the terms of a tied weight apart, and products with v
        of_example = 4 * size * S.element_size()
        step = max(1, source.budget.for_jacobian // of_example)
        N = S.shape[1]
        for start in range(0, N, step):
            some = slice(start, start + step)
            part = taken(inputs, some)
            gradients = per_example_gradients(source.forward, names, part, S[:, some])
            for name, tangent in tangents.items():
                terms = []
                for key, direction in tangent.items():
                    gradient = gradients[key].flatten(2)
                    terms.append(gradient @ direction.flatten())
                derivatives = torch.stack(terms).sum(0)
                sums[name] += float(derivatives.square().sum())

    def _tangent(self, name: str) -> dict[str, Tensor]:
        """v of a layer by parameter."""
        layer = self.source.layers[name]
        parts = layer.unpack(self._directions[name])
        return {layer.full_name(key): part for key, part in parts.items()}

    def _of_piece(self, name: str, inputs: Inputs, S: Tensor) -> float:
        """Sum of (S^T J v)^2 over the examples of a piece, by forward derivatives along v."""
        tangent = self._tangent(name)
        derivatives = column_derivatives(self.source.forward, tangent, inputs, S)
        return float(derivatives.square().sum())

    def _fingerprint(self, crc: int) -> str:
        """Of the tensors' checksum and the numbers of this check.

        v^T F v tells what no tensor does: the forward function, the likelihood and its settings.
        """
        seen = ",".join(f"{value:.6e}" for value in self._expected.values())
        crc = zlib.crc32(seen.encode(), crc)
        return f"{crc:08x}"

    def deviation(self, name: str, exact: FisherMatrix) -> float:
        """Relative deviation of a captured block from the check.

        Also of use with exact="func": the approximations are built from what was captured.

        Raises:
            ValueError: where it is more than rounding.
        """
        most = self.source.forward.agreement(self.source.dtype)
        expected = self._expected[name]
        V = self._directions[name]
        found = float((V * (exact @ V)).sum())
        deviation = 0.0
        if found != expected:
            # Directional derivatives have rounding errors on the scale of the largest one: where
            # gradients cancel (the bias of a key in attention, a normalised scalar) they are all
            # there is. Hence roots, and a floor relative to it.
            rounding = 1e4 * torch.finfo(self.source.dtype).eps
            largest = math.sqrt(max(self._expected.values()))
            floor = rounding / most * largest
            root = math.sqrt(expected)
            difference = abs(math.sqrt(max(found, 0.0)) - root)
            # of squares: twice that of the roots
            deviation = 2 * difference / max(root, floor)
        # NaN is no agreement
        if not deviation <= most:
            raise ValueError(
                f"The captured block of layer {name!r} deviates from torch.func by "
                f"{deviation:.1e}, expected at most {most:g}: examples interact, the model is "
                "random, or its weight is used in a way hooks do not see; make the model act per "
                "example, or leave the layer out."
            )
        return deviation
