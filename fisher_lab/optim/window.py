"""The state machine of observing: which step was observed last, and whether the present one is.

    closed --open--> open --open, the next micro-batch--> open --close, at the end of a step-->
    closed

One observation is everything that is watched between two steps. The hooks of `attach` and a `with`
block drive it alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_lab.optim.finite import count_failure
from fisher_lab.optim.saving import copied

PATIENCE = 10  # observations that may be left out before a step is refused


@dataclass
class Window:
    """What an optimizer knows about its observations as a whole; the layers' own part is their
    LayerState.

    Attributes:
        observed_at: step of the last observation; None before the first.
        is_open: whether the present step has been observed; what else is seen before it belongs to
            the same observation.
        fresh: whether something was observed since the last refresh of the inverses.
        examples: of the present observation, where the training gradient itself is the statistic.
        lost: layer statistics dropped as non-finite, a 0-d tensor; None for none.
        entered: `with` blocks that were entered and not left.
    """

    observed_at: int | None = None
    is_open: bool = False
    fresh: bool = False
    examples: int = 0
    lost: Tensor | None = None
    entered: int = 0

    def due(self, step: int, every: int) -> bool:
        """Whether the forward passes of a step are to be watched."""
        if self.is_open or self.observed_at is None:
            return True
        return step - self.observed_at >= every

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Know, while the `with` lasts, that it does."""
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    def open(self, step: int) -> None:
        """Something of this step was absorbed."""
        self.observed_at = step
        self.is_open = True
        self.fresh = True

    def count(self, examples: int) -> None:
        """Examples of this step that were seen, before it is opened."""
        if not self.is_open:
            self.examples = 0
        self.examples += examples

    def close(self) -> None:
        """The step is made: what is watched from now on is another observation."""
        self.is_open = False

    def lose(self, ok: Tensor) -> None:
        """Count the statistics of a layer as lost where not ok."""
        self.lost = count_failure(self.lost, ok)

    def check(self, optimizer: str, step: int, every: int) -> None:
        """Refuse a step inside a window, without statistics, or with statistics that nobody renews.

        Args:
            optimizer: its name.
            step: the present step.
            every: steps between observations.

        Raises:
            ValueError: if the window is not left yet, if nothing was observed, or nothing for long.
        """
        if self.entered:
            raise ValueError(
                "step() was called inside `with opt.observing():`, expected after it; the block "
                "ends behind the forward pass, before loss.backward()."
            )
        if self.observed_at is None:
            raise ValueError(
                f"{optimizer} has observed nothing yet, expected the forward pass inside "
                "`with opt.observing():`, or opt.attach() or opt.warm_start(data) first."
            )
        age = step - self.observed_at
        if age > (PATIENCE + 1) * every:
            raise ValueError(
                f"The last observation was {age} steps ago, expected one every {every}; put the "
                "forward pass inside `with opt.observing():`."
            )

    def is_missed(self, step: int, every: int) -> bool:
        """Whether an observation is left out for the second time in a row, in this very step."""
        return self.observed_at is not None and step - self.observed_at == 2 * every

    def state(self) -> dict[str, Any]:
        """Everything, as plain containers."""
        return {
            "observed_at": self.observed_at,
            "fresh": self.fresh,
            "open": self.is_open,
            "examples": self.examples,
            "lost": self.lost,
        }

    @classmethod
    def of_state(cls, saved: dict[str, Any], device: torch.device) -> Window:
        """The inverse of `state`."""
        return cls(
            observed_at=saved["observed_at"],
            is_open=saved["open"],
            fresh=saved["fresh"],
            examples=saved["examples"],
            lost=copied(saved["lost"], device),
        )
