"""Categorical likelihood: softmax over classes, -log p = cross-entropy.

Its Hessian diag(p) - p p^T has rank C - 1. With u = sqrt(p), of norm 1, it is
diag(u) (I - u u^T) diag(u). The reflection that maps u to -e_C is I - v v^T / (1 + u_C) with
v = u + e_C, and its first C - 1 columns are a basis of what is orthogonal to u; so

    S_ij = u_i (delta_ij - v_i u_j / (1 + u_C)),   j < C,

written below with 1 = sum of p, so that no entry cancels however sure the model is of its answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisher_lab.likelihoods.base import Likelihood


class Categorical(Likelihood):
    """Labels y (class indices) with probabilities softmax(z) along `dim`.

    All other dimensions are positions. The factor has C - 1 columns per position, whose outer
    products sum to diag(p) - p p^T.

    Args:
        dim: dimension of z that holds the classes; -1 for `[N, C]` and `[N, L, C]`, 1 for torch's
            `[N, C, L]`.

    Example:
        >>> likelihood = fl.Categorical()
        >>> z, y = torch.randn(5, 3), torch.arange(5) % 3
        >>> likelihood.log_prob(z, y).shape, likelihood.factor(z).shape[1:]
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def factor(self, z: Tensor) -> Tensor:
        """S `[L * (C - 1), N, *output]`, L positions."""
        p = z.movedim(self.dim, -1).softmax(-1)
        N = p.shape[0]
        positions = p.shape[1:-1]
        C = p.shape[-1]
        p = p.reshape(N, -1, C)
        L = p.shape[1]
        columns = _root(p).permute(3, 0, 1, 2)  # [C - 1, N, L, C]
        if L > 1:  # one column touches one position
            eye = torch.eye(L, dtype=z.dtype, device=z.device)
            columns = torch.einsum("cnlk,lm->lcnmk", columns, eye)
            columns = columns.flatten(0, 1)  # [L * (C - 1), N, L, C]
        S = columns.reshape(-1, N, *positions, C)
        class_dim = self._class_dim(z) + 1  # behind the columns
        return S.movedim(-1, class_dim)

    def rank(self, z: Tensor) -> int:
        """L * (C - 1)."""
        C = z.shape[self.dim]
        L = math.prod(z.shape[1:]) // C
        return L * (C - 1)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class indices `[N, *positions]`."""
        p = z.movedim(self.dim, -1).softmax(-1)
        # the exponential race draws from p without a host read, unlike torch.multinomial
        times = torch.empty_like(p).exponential_(generator=generator)
        return (p / times).argmax(-1)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p `[N]` of y: class indices `[N, *positions]`, or probabilities of the shape of z."""
        N = z.shape[0]
        logp = z.movedim(self.dim, -1).log_softmax(-1)
        if y.is_floating_point():
            terms = logp * y.movedim(self.dim, -1)
            picked = terms.sum(-1)
        else:
            index = y.long().unsqueeze(-1)
            picked = logp.gather(-1, index).squeeze(-1)
        return picked.reshape(N, -1).sum(1)

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:  # noqa: ARG002
        """The sums of class probabilities, which need not be 1.

        The Hessian of -sum(y log p) is sum(y) times that of one label.
        """
        if not y.is_floating_point():
            return None
        return y.sum(self.dim, keepdim=True)

    def check_output(self, z: Tensor) -> None:
        """At least two classes along `dim`."""
        super().check_output(z)
        # dimension 0 are the examples, which -z.ndim names too
        exists = -z.ndim < self.dim < z.ndim and self.dim != 0
        if not exists or z.shape[self.dim] < 2:
            raise ValueError(
                f"The model returned shape {tuple(z.shape)}, but {self!r} expects at least 2 "
                f"classes along dimension {self.dim}; for one logit per label use Bernoulli() or "
                "BCEWithLogitsLoss."
            )

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """Class indices in range, one per position, or probabilities of the shape of z."""
        expected = list(z.shape)
        C = expected.pop(self.dim)
        given = list(y.shape)
        if y.is_floating_point() and given == expected:
            raise ValueError(
                f"{self.name} got {y.dtype} class labels, expected integers; convert them with "
                "y.long()."
            )
        if y.is_floating_point():
            super().check_labels(z, y)
            if bool((y < 0).any()):
                raise ValueError(
                    f"{self.name} got class probabilities down to {float(y.min()):g}, expected >= "
                    "0; check the labels."
                )
            return
        if given != expected or y.dtype == torch.bool:
            raise ValueError(
                f"{self.name} got labels {y.dtype} {tuple(y.shape)} for outputs {tuple(z.shape)} "
                f"with classes along dimension {self.dim}, expected class indices of shape "
                f"{tuple(expected)}."
            )
        if y.numel() == 0:  # which has no least and no largest label to name
            return
        least = int(y.min())
        largest = int(y.max())
        if least < 0 or largest >= C:
            raise ValueError(
                f"{self.name} got labels from {least} to {largest}, expected 0 to {C - 1} for {C} "
                "outputs; check the labels and the model's last layer, or ignore labels by "
                "CrossEntropyLoss(ignore_index=...)."
            )

    def _class_dim(self, z: Tensor) -> int:
        return self.dim % z.ndim

    def __repr__(self) -> str:
        return f"Categorical(dim={self.dim})"


def _root(p: Tensor) -> Tensor:
    """Square root `[..., C, C - 1]` of diag(p) - p p^T for p `[..., C]`; see the top of
    this file.
    """
    C = p.shape[-1]
    eye = torch.eye(C, dtype=p.dtype, device=p.device)
    others = p @ (1 - eye)  # 1 - p_c, without the cancellation
    u = p.sqrt()
    last = p[..., -1:].sqrt()  # u_C
    # off the diagonal: -u_i v_i u_j / (1 + u_C), where v_i = u_i but v_C = 1 + u_C
    first = p[..., :-1] / (1 + last)
    weights = torch.cat([first, last], -1)
    S = -weights.unsqueeze(-1) * u[..., None, :-1]
    # on it: u_i (1 - u_i^2 / (1 + u_C)) = u_i (u_C + the other p) / (1 + u_C)
    entries = u * (last + others) / (1 + last)
    diagonal = torch.diag_embed(entries)
    on_diagonal = eye[:, :-1] > 0
    return torch.where(on_diagonal, diagonal[..., :-1], S)
