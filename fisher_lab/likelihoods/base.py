"""The Likelihood noun: p(y | z) of a model output z, and the output columns from which every Fisher is built."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

FisherKind = Literal["true", "mc", "empirical"]


class Likelihood(ABC):
    """A distribution p(y | z) of labels y given the output z `[N, *output]`; positions of an example are summed.

    A subclass writes `factor`, `sample` and `log_prob`, and may refine `check_output` and `check_labels`.
    """

    _registry: ClassVar[dict[str, type[Likelihood]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Likelihood._registry[cls.__name__] = cls

    @abstractmethod
    def factor(self, z: Tensor) -> Tensor:
        """S `[R, N, *output]` with sum_r S_r S_r^T = Hessian of -log p(y_n | z_n) in z_n, which no label enters."""

    @abstractmethod
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels y drawn from p(y | z), one per example (and position)."""

    @abstractmethod
    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p(y_n | z_n) `[N]`, summed over the positions of an example."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean over the examples of -log p(y | z), a scalar."""
        return -self.log_prob(z, y).mean()

    def kappa(self, z: Tensor) -> float:  # noqa: ARG002 - torch's losses scale with the shape of the output
        """Loss per example divided by the negative log-likelihood."""
        return 1.0

    summed: bool = False  # whether the loss is a sum over the examples, which scales the assembled matrix by N

    def directions(self, z: Tensor, fisher: FisherKind) -> int:
        """Number R of columns per example of `columns`."""
        return math.prod(z.shape[1:]) if fisher == "true" else 1

    def columns(
        self, z: Tensor, fisher: FisherKind, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Output columns S `[R, N, *output]`; the Fisher is the mean over n of sum_r (J_n^T S_rn)(J_n^T S_rn)^T.

        Args:
            z: model output `[N, *output]`.
            fisher: "true" (label expectation in closed form), "mc" (one sampled label per example) or "empirical"
                (the labels given: not the Fisher, but what many trainers use).
            y: the data's labels for "empirical"; for "mc" labels already sampled from the model, None to draw them;
                for "true" the data's labels where there are any, read only by losses that weigh or ignore positions.
            generator: source of the labels drawn.

        Raises:
            ValueError: unknown `fisher`, or "empirical" without labels.
        """
        check_fisher(fisher)
        z = z.detach()
        if fisher == "true":
            S = self.factor(z)
            if S.shape[1:] != z.shape:
                raise ValueError(
                    f"{self.name}.factor returned shape {tuple(S.shape)} for outputs {tuple(z.shape)}, expected "
                    "[R, *the shape of the outputs]."
                )
            return S * math.sqrt(self.kappa(z))
        if fisher == "mc":
            return self._score(z, self.sample(z, generator) if y is None else y) * math.sqrt(self.kappa(z))
        if y is None:
            raise ValueError('fisher="empirical" needs labels, got none; pass data as (x, y) or use fisher="true".')
        return self._score(z, y) * self.kappa(z)

    def masked(self, sampled: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Labels `sampled` from the model, with those of the data's y that the loss ignores put back in."""
        return sampled

    def _score(self, z: Tensor, y: Tensor) -> Tensor:
        """Gradient of log p(y | z) in z, as one column `[1, N, *output]`."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(z, y).sum(), z)
        return score.unsqueeze(0)

    def check_output(self, z: Any) -> None:
        """Raise ValueError or TypeError where the model output cannot be z."""
        if not isinstance(z, Tensor):
            raise TypeError(
                f"The model returned {type(z).__name__}, expected one tensor [N, *output]; "
                "wrap the model in a module that returns its output tensor."
            )
        if not z.is_floating_point() or z.ndim < 2:
            raise ValueError(
                f"The model returned a {z.dtype} tensor of shape {tuple(z.shape)}, expected floating point "
                "[N, *output] with at least two dimensions; a scalar output per example needs shape [N, 1]."
            )

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """Raise ValueError where the labels do not fit the output (default: same shape as z, finite)."""
        if y.shape != z.shape:
            raise ValueError(
                f"{self.name} got labels of shape {tuple(y.shape)} for outputs {tuple(z.shape)}, expected the same "
                "shape; reshape the labels."
            )
        if y.is_floating_point() and not bool(torch.isfinite(y).all()):
            raise ValueError(f"{self.name} got NaN or infinite labels, expected finite values; clean the labels.")

    def check_unlabelled(self, z: Tensor) -> None:  # noqa: B027 - nothing to refuse unless a subclass says so
        """Raise ValueError where data without labels leaves open what the output means (default: never)."""

    @property
    def name(self) -> str:
        """How the likelihood is called in results."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.name}()"


def check_fisher(fisher: str) -> None:
    """Raise ValueError for an unknown kind of Fisher."""
    if fisher not in get_args(FisherKind):
        raise ValueError(f'Got fisher={fisher!r}, expected "true", "mc" or "empirical".')


def diagonal_columns(root: Tensor) -> Tensor:
    """Columns root_c e_c `[K, N, *output]` of independent outputs: `root` `[N, *output]`, K outputs per example."""
    flat = root.flatten(1)
    return torch.diag_embed(flat).permute(1, 0, 2).reshape(-1, *root.shape)
