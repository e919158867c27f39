"""Quasi-Newton updates of an approximate inverse H of a matrix, from a step s and what the matrix
makes of it, y.

Broyden, Fletcher, Goldfarb and Shanno's, with rho = 1 / s'y; afterwards H y = s:

    H <- (I - rho s y') H (I - rho y s') + rho s s'

Double damping: Goldfarb, Ren & Bahamou (2020). Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def double_damping(
    H: Tensor, s: Tensor, y: Tensor, mu1: float, mu2: float
) -> tuple[Tensor, Tensor]:
    """s and y changed so that s'y >= mu1 y'Hy (Powell, on H) and then s'y >= mu2 s's
    (Levenberg-Marquardt).

    Args:
        H: positive definite `[n, n]`.
        s: change of the point `[n]`.
        y: change of the gradient `[n]`.
        mu1: in (0, 1).
        mu2: > 0.

    Returns:
        s and y.
    """
    # Powell's: s towards H y, whose inner product with y is y'Hy itself
    Hy = H @ y
    sy = s @ y
    yHy = y @ Hy
    theta = _theta(sy, yHy, mu1)
    rest = 1 - theta
    s = theta * s + rest * Hy
    # Levenberg and Marquardt's: y towards s
    sy = s @ y
    ss = s @ s
    theta = _theta(sy, ss, mu2)
    rest = 1 - theta
    y = theta * y + rest * s
    return s, y


def _theta(inner: Tensor, square: Tensor, mu: float) -> Tensor:
    """The weight of a vector in its mixture; 1 where inner >= mu square already."""
    one = torch.ones_like(square)
    least = mu * square
    short = inner < least
    # theta inner + (1 - theta) square = mu square, solved for theta; 1 in the branch that is not
    # taken, so that nothing is divided by zero
    gap = torch.where(short, square - inner, one)
    mixed = (1 - mu) * square / gap
    return torch.where(short, mixed, one)


def bfgs_(
    H: Tensor,
    s: Tensor,
    y: Tensor,
    ok: Tensor | bool = True,
    guard: Tensor | float = 0.0,
) -> Tensor:
    """The update of H, in place, in one pass over H.

    H stays as it is where not ok, where s'y <= guard, or where the update is not finite.

    Args:
        H: symmetric `[n, n]`.
        s: change of the point `[n]`.
        y: change of the gradient `[n]`.
        ok: whether to update.
        guard: least s'y that is trusted.

    Returns:
        H itself.
    """
    sy = s @ y
    good = sy > guard
    rho = 1 / torch.where(good, sy, 1.0)
    # multiplied out, the update is s q' + q s'
    Hy = H @ y
    yHy = y @ Hy
    twice = rho * rho * yHy + rho
    along = twice / 2
    q = along * s - rho * Hy
    # the product of two finite norms bounds every entry of s q'
    size = s.norm() * q.norm()
    finite = torch.isfinite(size)
    good = good & ok & finite
    s = torch.where(good, s, 0.0)
    q = torch.where(good, q, 0.0)
    # both outer products in one pass
    left = torch.stack([s, q], 1)
    right = torch.stack([q, s])
    return H.addmm_(left, right)
