"""The independent check: v^T F v of one random direction v per layer, by torch.func alone."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from fisher_lab._ground.progress import Progress
from fisher_lab._passes.batches import batch_checksum, checksum
from fisher_lab._passes.derivatives import column_derivatives
from fisher_lab._passes.source import Source
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

    def run(self, bar: Progress) -> None:
        """One pass over the data."""
        source, generator = self.source, torch.Generator().manual_seed(self.source.seed)
        crc = 0
        for tensor in (*source.model.parameters(), *source.model.buffers()):
            crc = checksum(tensor, crc)
        for name, layer in source.layers.items():
            V = torch.randn(layer.shape, generator=generator, dtype=torch.float64)
            self._directions[name] = V.to(next(source.model.parameters()))
        sums = dict.fromkeys(source.layers, 0.0)
        for piece in source.parts():
            inputs = piece.batch.inputs
            crc = batch_checksum(
                inputs, None, crc if piece.batch.y is None else checksum(piece.batch.y, crc)
            )
            with torch.no_grad():
                z = source.forward(inputs)
            S = source.factors_of(piece)(z)
            for name, layer in source.layers.items():
                bar.say(f"checking {name}")
                parts = layer.unpack(self._directions[name])
                tangent = {layer.full_name(key): part for key, part in parts.items()}
                derivatives = column_derivatives(source.forward, tangent, inputs, S)
                sums[name] += float(derivatives.square().sum())
        bar.advance(len(source.layers))
        self._expected = {name: total / source.N for name, total in sums.items()}
        # v^T F v tells what no tensor does: the forward function, the likelihood and its settings
        seen = ",".join(f"{value:.6e}" for value in self._expected.values())
        self.fingerprint = f"{zlib.crc32(seen.encode(), crc):08x}"

    def deviation(self, name: str, exact: FisherMatrix) -> float:
        """Relative deviation of a captured block from the check.

        Also of use with exact="func": the approximations are built from what was captured.

        Raises:
            ValueError: where it is more than rounding.
        """
        V, most = self._directions[name], self.source.forward.agreement(self.source.dtype)
        found, expected = float((V * (exact @ V)).sum()), self._expected[name]
        # Directional derivatives have rounding errors on the scale of the largest one: where
        # gradients cancel (the bias of a key in attention, a normalised scalar) they are all there
        # is. Hence roots, and a floor relative to it.
        floor = (
            1e4
            * torch.finfo(self.source.dtype).eps
            / most
            * math.sqrt(max(self._expected.values()))
        )
        difference = abs(math.sqrt(max(found, 0.0)) - math.sqrt(expected))
        deviation = 0.0 if found == expected else 2 * difference / max(math.sqrt(expected), floor)
        if not deviation <= most:
            raise ValueError(
                f"The captured block of layer {name!r} deviates from torch.func by "
                f"{deviation:.1e}, expected at most {most:g}: examples interact, the model is "
                "random, or its weight is used in a way hooks do not see; make the model act per "
                "example, or leave the layer out."
            )
        return deviation
