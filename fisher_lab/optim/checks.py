"""What NaturalGradient refuses: settings that cannot work, and steps without statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from fisher_lab._ground.arguments import is_whole, number
from fisher_lab.likelihoods import check_fisher

if TYPE_CHECKING:
    from fisher_lab.optim.natural_gradient import NaturalGradient

Statistics = Literal["per_example", "mean", "gradient"]


def check_arguments(opt: NaturalGradient) -> None:
    """Refuse settings that cannot work, before anything is computed."""
    for name in ("observe_every", "refresh_every"):
        value = getattr(opt, name)
        if not is_whole(value, 1):
            raise ValueError(f"Got {name}={value!r}, expected a whole number of steps, 1 or more.")
    if not 0 <= number(opt.decay) < 1:
        raise ValueError(f"Got decay={opt.decay!r}, expected a number from 0 to below 1.")
    if opt.kl_clip is not None and not number(opt.kl_clip) > 0:
        raise ValueError(f"Got kl_clip={opt.kl_clip!r}, expected a positive number, or None for no limit.")
    check_fisher(opt.fisher)
    if opt.statistics not in get_args(Statistics):
        raise ValueError(f'Got statistics={opt.statistics!r}, expected "per_example", "mean" or "gradient".')
    if opt.statistics == "mean" and opt.fisher == "true":
        raise ValueError('Got statistics="mean" with fisher="true", expected "mc" or "empirical": the mean over '
                         "examples of an expectation over labels is no gradient.")  # fmt: skip
    factors = [c.label for c in opt.approximations.values() if c.needs_factors]
    if opt.statistics != "per_example" and factors:
        raise ValueError(
            f"{factors[0]} needs layer inputs and output gradients apart, got statistics={opt.statistics!r}, "
            'expected "per_example".'
        )


def check_observed(opt: NaturalGradient, grads: dict[Tensor, Tensor]) -> None:
    """Refuse to go on without statistics, or with statistics that nobody renews."""
    if opt.observed_at is None:
        raise ValueError(
            f"{type(opt).__name__} has observed nothing yet, expected the forward pass inside "
            "`with opt.observing():`, or opt.warm_start(data) first."
        )
    overdue = opt.steps - opt.observed_at - opt.observe_every
    if overdue > 10 * opt.observe_every:
        raise ValueError(
            f"The last observation was {opt.steps - opt.observed_at} steps ago, expected one every "
            f"{opt.observe_every}; put the forward pass inside `with opt.observing():`."
        )
    for name, c in opt.curvature.items():
        used = any(p in grads for p in c.layer.parameters.values())
        if c.moments is None and opt.statistics != "gradient" and used:
            raise ValueError(
                f"Layer {name!r} has a gradient but was never observed, expected it in an observed forward pass; "
                "leave it to the fallback with layers=[...]."
            )
