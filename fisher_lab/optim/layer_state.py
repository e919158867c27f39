"""One layer's curvature inside an optimizer: what is kept, and how an observation joins it.

Nothing here waits for the device; statistics that are not finite change nothing, by masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_lab.approximations import Approximation, Moments
from fisher_lab.approximations.base import assembled, carried, check_names
from fisher_lab.approximations.base import observed as moments_of
from fisher_lab.approximations.earlier import moments_of_any_version
from fisher_lab.estimation.average import Average, Mean
from fisher_lab.layers import Layer
from fisher_lab.matrices import FisherMatrix
from fisher_lab.optim.finite import all_finite
from fisher_lab.optim.observation import Observed
from fisher_lab.optim.saving import decode, encode
from fisher_lab.statistics import LayerStats, Sums


class Contribution(NamedTuple):
    """What one window gives to a layer.

    Attributes:
        moments: of its examples; zero where not ok.
        examples: how many, 0 where not ok; a 0-d tensor.
        ok: whether statistics and moments are finite, a 0-d tensor.
    """

    moments: Moments
    examples: Tensor
    ok: Tensor


@dataclass
class LayerState:
    """What an optimizer knows of a layer's curvature, which is what a checkpoint holds of it.

    Attributes:
        past: moving average of the moments over the observations that are complete.
        present: the mean over the windows of the present observation; empty between steps.
        now: moving average with the present observation.
        matrix: assembled at the last refresh that succeeded; None before.
        inverse: its damped power, as the steps apply it.
        jitter: added to the damping since factorisations failed, relative to the mean eigenvalue.
    """

    past: Average = field(default_factory=Average)
    present: Mean = field(default_factory=Mean)
    now: Average = field(default_factory=Average)
    matrix: FisherMatrix | None = None
    inverse: FisherMatrix | None = None
    jitter: float = 0.0

    @property
    def moments(self) -> Moments | None:
        """The moments as far as they are known; None before the first observation."""
        return self.now.moments

    @property
    def is_open(self) -> bool:
        """Whether the present observation has begun."""
        return self.present.moments is not None

    def seen(self) -> Tensor:
        """Whether anything finite was observed, a 0-d tensor; after the first observation."""
        assert self.now.count is not None
        return self.now.count > 0

    def encoded(self) -> dict[str, Any]:
        """Everything, as plain containers of tensors."""
        # with the present observation, so that a reader needs no other entry
        saved = {
            "moments": encode(self.now.moments),
            "matrix": encode(self.matrix),
            "inverse": encode(self.inverse),
            "jitter": self.jitter,
            "count": self.past.count,
            "size": self.past.size,
            # of the present observation; None between steps
            "before": None,
            "latest": None,
            "window": None,
        }
        if self.is_open:
            saved["before"] = encode(self.past.moments)
            saved["latest"] = encode(self.present.moments)
            saved["window"] = self.present.examples
        return saved

    def restore(self, found: dict[str, Any]) -> None:
        """The inverse of `encoded`.

        Args:
            found: what it gave, decoded.
        """
        self.matrix = found["matrix"]
        self.inverse = found["inverse"]
        self.jitter = found["jitter"]
        count = found["count"]
        size = found.get("size")
        if count is not None and size is None:
            # version 1 did not know the sizes of its observations
            size = torch.zeros_like(count)
        moments = found["moments"]
        self.past = Average(moments, count, size)
        self.present = Mean()
        self.now = self.past
        if found["latest"] is not None:
            # saved within an observation
            examples = found["window"]
            self.past = Average(found["before"], count, size)
            self.present = Mean(found["latest"], examples)
            count, size = self.past.counted(examples)
            self.now = Average(moments, count, size)


class LayerCurvature(LayerState):
    """The state of one layer, with the approximation that it is the state of.

    All windows of one optimizer step (gradient accumulation) are one observation: their examples
    count alike.

    Args:
        layer: the adapter.
        approximation: what to build.
    """

    def __init__(self, layer: Layer, approximation: Approximation) -> None:
        super().__init__()
        self.layer = layer
        self.approximation = approximation

    def contribution(self, observed: Observed) -> Contribution:
        """The moments of one window."""
        stats = observed.stats
        sums = Sums(stats, shared=False)  # nobody else will ask
        moments = moments_of(self.approximation, sums, self.matrix)
        tensors = moments.tensors()
        # finite statistics may have moments that overflow
        ok = observed.ok & all_finite(tensors.values())
        examples = ok.to(stats.g.dtype) * observed.examples
        return Contribution(moments.masked(ok), examples, ok)

    def nothing(self, dtype: torch.dtype, device: torch.device) -> Contribution:
        """What a window gives in which the layer was not used: moments of no example.

        Args:
            dtype: of the moments.
            device: where they are.
        """
        rows, columns = self.layer.shape
        Q = self.layer.groups
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        a = torch.zeros(1, 1, Q, columns, **like)
        g = torch.zeros(1, 1, 1, Q, rows // Q, **like)
        stats = LayerStats(a, g, self.layer.kernel, self.layer.bias)
        fine = torch.ones((), dtype=torch.bool, device=device)
        return self.contribution(Observed(stats, fine, 0))

    def sub_sampled(self, moments: Moments, examples: int) -> str | None:
        """What there is to say where moments hold columns of fewer than all examples."""
        held = moments.examples_held
        if held == 0 or held >= examples:  # 0: they are of all examples, and hold none
            return None
        return (
            f"{self.approximation.label} keeps {held:.0f} of the {examples} examples of a batch, "
            "expected all: outside the span of those kept only the damping bounds a step; keep "
            "more, or raise the damping"
        )

    def absorb(self, new: Contribution, decay: float) -> None:
        """Let a window join the present observation."""
        for older in (self.past.moments, self.present.moments):
            check_names(self.approximation, older, new.moments, self.matrix)
        self.present.add(new.moments, new.examples)
        self.now = self.past.followed_by(self.present, decay)

    def close(self) -> None:
        """The present observation is complete."""
        self.past = self.now
        self.present = Mean()

    def settle(self, decay: float) -> None:
        """Count what was seen (a warm start) as many observations: the next one weighs 1 - rho."""
        self.now = self.now.settled(decay)
        self.close()

    def restart(self) -> None:
        """Forget the moments, but not the matrix."""
        self.now = Average()
        self.close()

    def assembled(self) -> FisherMatrix:
        """The matrix of the moments."""
        assert self.now.moments is not None
        return assembled(self.approximation, self.now.moments, self.matrix)

    def accept(self, matrix: FisherMatrix, inverse: FisherMatrix) -> None:
        """Let the steps use a new inverse; the moments follow the matrix that was assembled from
        them.
        """
        self.matrix = matrix
        self.inverse = inverse
        moments = self.now.moments
        if moments is not None:
            self.now.moments = carried(self.approximation, moments, matrix)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"approximation": self.approximation.label, **self.encoded()}

    def load(self, saved: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """The inverse of `state`.

        Args:
            saved: what `state` gave.
            device: where the layer is.
            dtype: that it works in; a state of another precision is converted.

        Raises:
            ValueError: the state of another approximation.
        """
        given = dict(saved)
        label = given.pop("approximation")
        expected = self.approximation.label
        if label != expected:
            raise ValueError(
                f"The state of layer {self.layer.name!r} is one of {label}, expected one of "
                f"{expected}; build the optimizer with the same arguments as the one that was "
                "saved."
            )
        found = {}
        for name, value in given.items():
            found[name] = decode(value, device, dtype)
        for name in ("moments", "before", "latest"):
            stored = found[name]
            found[name] = moments_of_any_version(stored, self.approximation, self.layer)
        self.restore(found)
