"""How large a step is in the outputs: p^T F p of the whole network, on examples observed last.

`kl_clip` bounds lr^2 p^T F p. What a step knows for nothing is <p, m> with p = (F^ + lambda)^-1 m,
that is p^T (F^ + lambda) p of the approximation F^: of one block for each layer, averaged and
perhaps stale, and with the damping in it. The captured statistics give the number itself, with all
couplings between the layers, for the price of one product of each layer's inputs with p:

    p^T F p = 1/N sum_{r,n} (sum_layers <P_rn, p>)^2

It is taken in steps that were observed; in those between, <p, m> times the ratio found last. On
small networks the ratio was 5 to 10 in the middle of a training, and far below 1 where the damping
outweighs F. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisher_lab.optim.observation import Observed
from fisher_lab.optim.saving import copied, decode, encode
from fisher_lab.optim.vectors import Share
from fisher_lab.statistics import LayerStats
from fisher_lab.statistics.contractions import project

# examples of which the number is the mean: of 128 its relative error is about sqrt(2 / 128)
EXAMPLES = 128
LEAST = 8
Summed = Callable[[Tensor], Tensor]
# they are held from the forward pass to the step, and patches of convolutions are large
HELD_BYTES = 256 * 2**20


@dataclass
class StepSize:
    """What is known of the size of steps.

    Attributes:
        seen: statistics of the present observation, by layer, of every forward pass in it.
        ratio: p^T F p over the number that was assumed, in the last step that was observed, a 0-d
            tensor; None before.
        passed: examples of the present observation on all ranks, kept or not.
    """

    seen: list[dict[str, LayerStats]] = field(default_factory=list)
    ratio: Tensor | None = None
    passed: int = 0

    def see(self, found: Mapping[str, Observed], before: int, examples: int) -> None:
        """Keep some examples of a forward pass.

        Args:
            found: the statistics of every layer.
            before: examples of the pass that other ranks have and that come first.
            examples: of the pass, on all ranks.
        """
        room = EXAMPLES - self.passed - before
        self.passed += examples
        stats = {name: observed.stats for name, observed in found.items()}
        if room <= 0 or not stats:
            return
        each = sum(s.nbytes / s.N for s in stats.values())
        affordable = max(int(HELD_BYTES / each), LEAST)
        first = slice(0, min(room, affordable))
        kept = {}
        for name, s in stats.items():
            kept[name] = _copied_part(s, first)
        self.seen.append(kept)

    def of(self, shares: Sequence[Share], assumed: Tensor, summed: Summed) -> Tensor:
        """lr^2 p^T F p of a step, a 0-d tensor.

        Args:
            shares: of the groups, with their directions.
            assumed: what <p, m> says of it, a 0-d tensor.
            summed: the sum of a tensor over the ranks.
        """
        if self.passed:
            self.ratio = self._compared(shares, assumed, summed)
            self.forget()
        if self.ratio is None:
            return assumed
        return self.ratio * assumed

    def forget(self) -> None:
        """No step belongs to the examples that are kept, or it is made."""
        self.seen = []
        self.passed = 0

    def _compared(self, shares: Sequence[Share], assumed: Tensor, summed: Summed) -> Tensor:
        """The new ratio; the last one where a step is zero or not finite."""
        total = torch.zeros_like(assumed)
        examples = 0
        for stats in self.seen:
            total = total + _sum_of_squares(stats, shares)
            examples += _examples_of(stats)
        both = torch.stack([total, torch.full_like(total, examples)])
        total, counted = summed(both)
        tiny = torch.finfo(assumed.dtype).tiny
        ratio = total / counted / assumed.clamp(min=tiny)
        good = torch.isfinite(ratio) & (ratio > 0)
        before = self.ratio
        if before is None:
            before = torch.ones_like(ratio)
        return torch.where(good, ratio, before)

    def state(self) -> dict[str, Any]:
        """Everything, as plain containers."""
        seen = tuple(encode(stats) for stats in self.seen)
        return {"ratio": self.ratio, "seen": seen, "passed": self.passed}

    @classmethod
    def of_state(
        cls, saved: dict[str, Any] | None, device: torch.device, dtype: torch.dtype
    ) -> StepSize:
        """The inverse of `state`; what is saved by an earlier version has none."""
        if saved is None:
            return cls()
        seen = decode(saved["seen"], device, dtype)
        passed = sum(map(_examples_of, seen))  # as saved before there were several processes
        return cls(list(seen), copied(saved["ratio"], device), saved.get("passed", passed))


def _sum_of_squares(stats: Mapping[str, LayerStats], shares: Sequence[Share]) -> Tensor:
    """The sum over examples and directions of (sum over layers of <P_rn, lr p>)^2."""
    # sums `[R, N]`; layers that count other examples than the rest stand for themselves
    sums: dict[torch.Size, Tensor] = {}
    for share in shares:
        lr = share.group["lr"]
        for index, layer in enumerate(share.layers):
            if not share.places[index] or layer.name not in stats:
                continue
            p = share.packed(share.directions, index)
            change = lr * project(stats[layer.name], p)
            if change.shape in sums:
                change = sums[change.shape] + change
            sums[change.shape] = change
    squares = [change.square().sum() for change in sums.values()]
    if not squares:
        return torch.zeros(())  # no layer of theirs has a gradient
    return torch.stack(squares).sum()


def _examples_of(stats: Mapping[str, LayerStats]) -> int:
    """Of how many examples the statistics of one forward pass are."""
    return max(s.N for s in stats.values())


def _copied_part(stats: LayerStats, part: slice) -> LayerStats:
    """Some examples, without holding the memory of the others."""
    if part.stop >= stats.N:
        return stats
    some = stats.examples(part)
    a = some.a
    if a is not None:
        a = a.clone()
    return some.like(a, some.g.clone())
