"""The Likelihood noun: p(y | z) of a model output z, and the factors of its Hessian.

Every Fisher is built from them: with J_n the Jacobian of the outputs of example n and S S^T the
Hessian of -log p in z_n, the Fisher is the mean of (J_n^T S)(J_n^T S)^T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class Likelihood(ABC):
    """A distribution p(y | z) of labels y given z `[N, *output]`; positions are summed.

    A subclass writes `factor`, `sample` and `log_prob`, and may refine `check_output` and
    `check_labels`.

    Example:
        >>> z = model(x)
        >>> y = fl.Categorical().sample(z)
        >>> fl.Categorical().loss(z, y).shape
        torch.Size([])
    """

    _registry: ClassVar[dict[str, type[Likelihood]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Likelihood._registry[cls.__name__] = cls

    @abstractmethod
    def factor(self, z: Tensor) -> Tensor:
        """S `[R, N, *output]`: sum_r S_r S_r^T is the Hessian of -log p(y_n | z_n) in z_n.

        Where the Hessian depends on the label, it is its expectation over p(y | z).
        """

    @abstractmethod
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels y drawn from p(y | z), one per example (and position)."""

    @abstractmethod
    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log p(y_n | z_n) `[N]`, summed over the positions of an example."""

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean over the examples of -log p(y | z), a scalar."""
        return -self.log_prob(z, y).mean()

    def kappa(self, z: Tensor) -> float | Tensor:  # noqa: ARG002 - torch's losses scale with the shape of the output
        """Loss per example divided by the negative log-likelihood."""
        return 1.0

    # whether the loss is a sum over the examples, which scales the assembled matrix by N
    summed: bool = False

    weighted: bool = False  # whether the weight of an example follows from its label

    def rank(self, z: Tensor) -> int:
        """Number of output factors per example that `factor` gives."""
        return math.prod(z.shape[1:])

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Gradient of log p(y | z) in z, as one column `[1, N, *output]`."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            log_prob = self.log_prob(leaf, y).sum()
            (gradient,) = torch.autograd.grad(log_prob, leaf)
        return gradient.unsqueeze(0)

    def data_score(self, z: Tensor, y: Tensor) -> Tensor:
        """Minus the gradient of the loss over kappa at the data's labels y, `[1, N, *output]`."""
        S = self.score(z, self.known(y))
        if y.is_floating_point():  # their weights are in the gradient already
            return S
        weight = self.weights(z, y)
        if weight is None:
            return S
        return S * weight  # the gradient of a weighted term has the weight, not its root

    def of_batch(self, y: Tensor | None) -> Likelihood:  # noqa: ARG002
        """The likelihood with what follows from the labels y of a whole batch.

        A mean over the labels that a loss keeps has the scale of their number.
        """
        return self

    def kept(self, y: Tensor) -> Tensor | None:  # noqa: ARG002
        """Which labels the loss keeps, as a mask of their shape; None where it keeps all."""
        return None

    def labels_kept(self, kept: Tensor) -> Tensor:  # noqa: ARG002
        """Labels that say nothing but which of them the loss keeps, of a mask of their shape."""
        raise ValueError(
            f"{self.name} keeps all labels, expected a loss that ignores some of them such as "
            "CrossEntropyLoss(ignore_index=...); leave kept out."
        )

    def known(self, y: Tensor) -> Tensor:
        """Labels y with something harmless in place of those that the loss ignores."""
        return y

    def weights(self, z: Tensor, y: Tensor) -> Tensor | None:  # noqa: ARG002
        """Weights of the loss's terms, to be multiplied with the outputs `[N, *output]`.

        None where all are 1.
        """
        return None

    def check_output(self, z: Any) -> None:
        """Raise ValueError or TypeError where the model output cannot be z."""
        if not isinstance(z, Tensor):
            raise TypeError(
                f"The model returned {type(z).__name__}, expected one tensor [N, *output]; "
                "say which part of its output is meant with output= (a name, an index or a "
                "function)."
            )
        if not z.is_floating_point() or z.ndim < 2:
            raise ValueError(
                f"The model returned a {z.dtype} tensor of shape {tuple(z.shape)}, expected "
                "floating point [N, *output] with at least two dimensions; a scalar output per "
                "example needs shape [N, 1]."
            )

    def check_values(self, z: Tensor) -> None:  # noqa: B027 - every number is an output
        """Raise ValueError where an output's numbers are not what the likelihood reads."""

    def check_labels(self, z: Tensor, y: Tensor) -> None:
        """Raise ValueError where the labels do not fit the output.

        By default they have the shape of z and are finite.
        """
        if y.shape != z.shape:
            raise ValueError(
                f"{self.name} got labels of shape {tuple(y.shape)} for outputs {tuple(z.shape)}, "
                "expected the same shape; reshape the labels."
            )
        if y.is_floating_point() and not bool(torch.isfinite(y).all()):
            raise ValueError(
                f"{self.name} got NaN or infinite labels, expected finite values; clean the labels."
            )

    def check_unlabelled(self, z: Tensor) -> None:  # noqa: B027 - nothing to refuse unless a subclass says so
        """Raise ValueError where data without labels leaves open what the output means.

        By default never.
        """

    @property
    def name(self) -> str:
        """How the likelihood is called in results."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.name}()"


def diagonal_factors(root: Tensor) -> Tensor:
    """Factors root_c e_c `[K, N, *output]` of the K independent outputs of every example.

    Args:
        root: root of the second derivative in each output `[N, *output]`.
    """
    flat = root.flatten(1)
    diagonal = torch.diag_embed(flat)  # [N, K, K]
    columns = diagonal.permute(1, 0, 2)
    return columns.reshape(-1, *root.shape)
