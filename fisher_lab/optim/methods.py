"""The papers' optimizers: NaturalGradient with their approximation; one class is one entry.

Each takes NaturalGradient's arguments. Marks: [paper], [official code] read there; [ours] chosen
here. The published settings stand in the docstrings; the defaults are ours, one set for all
problems, see `DEFAULTS`. Damping is always lambda on the scale of F. Published values for
statistics of the batch-mean gradient, whose outer product estimates F/m for a batch of m examples,
convert by TN(F/m, eps) = TN(F, eps m^(1/k)) / m: lambda = m eps^k and lr = m lr_published. Labels
are sampled from the model by default ("mc"); where a paper uses the data's labels, `observing(y)`
gives those.

A new optimizer is one class here, or in a file of a user's: a docstring, its defaults and `build`.
`registry()`, the command line, `training.make_optimizer` and the tests then know it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fisher_lab import approximations
from fisher_lab._ground.arguments import is_whole, shown
from fisher_lab.approximations import Approximation, MiniBlock
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.optim.groups import ByLayer
from fisher_lab.optim.natural_gradient import NaturalGradient

AnyLikelihood = Likelihood | nn.Module

# One set for all problems, chosen on five small ones (an MLP, a BatchNorm-CNN, a Conv1d network, a
# regression, a transformer), other seeds than those of `analysis.benchmarks.defaults`. The clip
# bounds the steps while F changes quickly; lr / damping bounds them where F has become small, and
# lr / (1 - momentum) the noise of natural gradients at the end.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "lr": 0.01,
        "damping": 0.003,
        "kl_clip": 0.01,
        "observe_every": 2,
        "refresh_every": 20,
        "fallback_lr": 0.01,
    }
)


class Method(NaturalGradient, register=False):
    """A named optimizer: NaturalGradient with an approximation and defaults of its own.

    A subclass says its defaults in its head, `class TNT(Method, decay=0.9)`, and gives `build`,
    which makes the approximation; the arguments of `build` become arguments of the optimizer.
    Defining it registers it by its name.

    Args:
        model: as NaturalGradient's.
        likelihood: as NaturalGradient's.
        lr: learning rate; the method's own by default.
        **options: arguments of `build`, and further arguments of NaturalGradient; those left out
            are `DEFAULTS`, but for what the method says in its head.

    Raises:
        TypeError: a subclass without `build`.

    See Also:
        NaturalGradient, for an approximation without a name of its own.

    Example:
        >>> class Rows(fl.optim.Method, register=False, damping=0.1):
        ...     "Mini-blocks of rows."
        ...
        ...     @classmethod
        ...     def build(cls):
        ...         return fl.MiniBlock()
        >>> opt = Rows(model, loss)
    """

    build: ClassVar[Callable[..., Approximation | ByLayer]]
    # `defaults` is torch's name for a group's
    own_defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    def __init_subclass__(cls, register: bool = True, **defaults: Any) -> None:
        if not hasattr(cls, "build"):
            raise TypeError(
                f"The optimizer {cls.__name__} has no `build`, expected a static method that "
                "makes its approximation; write one."
            )
        super().__init_subclass__(register)
        cls.own_defaults = MappingProxyType({**cls.own_defaults, **defaults})
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    def __new__(cls, *given: Any, **options: Any) -> Self:
        """Tell who calls it as torch's optimizers are called what to write instead."""
        # a subclass may say all its arguments itself
        ours = cls.__init__ is Method.__init__
        if ours and len(given) < 2 and "likelihood" not in options:
            raise TypeError(
                "Got no likelihood, expected the model itself and the loss it is trained with; "
                f"write {cls.__name__}(model, nn.CrossEntropyLoss(), lr=...), not "
                "model.parameters()."
            )
        return super().__new__(cls)

    def __init__(
        self, model: nn.Module, likelihood: AnyLikelihood, lr: Any = ..., **options: Any
    ) -> None:
        # what belongs to the approximation; the rest is the optimizer's
        chosen = {}
        for name in inspect.signature(self.build).parameters:
            if name in options:
                chosen[name] = options.pop(name)
        approximation = self.build(**chosen)
        # a user's own word stands above the method's
        given = {**self.own_defaults, **options}
        if lr is not ...:
            given["lr"] = lr
        super().__init__(model, likelihood, approximation, **given)


# people and tools read the arguments of a class from __new__ where it has one
_without_self = list(inspect.signature(Method.__init__).parameters.values())[1:]
Method.__signature__ = inspect.Signature(_without_self)  # type: ignore[attr-defined]


def _signature(cls: type[Method]) -> inspect.Signature:
    """The signature for people: Method's, with its own lr and the arguments of `build` by name."""
    given = inspect.signature(cls.__init__)
    arguments = list(given.parameters.values())
    # without self, as a class is called
    _, *named, rest = arguments
    if rest.kind is not inspect.Parameter.VAR_KEYWORD:
        # a subclass that says all its arguments itself
        return given.replace(parameters=[*named, rest])
    own_lr = cls.own_defaults["lr"]
    for index, parameter in enumerate(named):
        if parameter.default is ...:
            named[index] = parameter.replace(default=own_lr)
    own = []
    building = inspect.signature(cls.build)
    for parameter in building.parameters.values():
        by_name = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        own.append(by_name)
    return given.replace(parameters=[*named, *own, rest])


class TNT(Method, damping_style="factored", statistics="mean", decay=0.9):
    """Tensor Normal Training, Ren & Goldfarb (2021): the inverse of TN, applied to the momentum.

    Statistics of the batch-mean gradient with sampled labels, decay 0.9, momentum 0.9 before
    preconditioning, the same eps added to every mode, coupled weight decay, periods 10/100 for
    convolutional nets and 1/20 for autoencoders [official code]. Published: MNIST autoencoder lr
    1e-4, eps 0.1, batch 1000: here lr=0.1, damping=10. CIFAR-10 lr 1e-4, eps 0.01, batch 128: here
    lr=0.0128 and damping=0.0128 for two modes, 1.28e-4 for three. The authors start with a pass
    over the data: `warm_start(data)`. Periods, learning rate, damping and clip: `DEFAULTS` [ours].

    Example:
        >>> opt = fl.optim.TNT(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(modes: int | None = None) -> Approximation:
        """The approximation."""
        return approximations.TN(modes)


class KFAC(Method, damping_style="factored"):
    """K-FAC, Martens & Grosse (2015), with fixed damping and momentum before preconditioning.

    Per-example statistics with sampled labels [paper], decay min(1 - 1/k, 0.95) [paper], damping
    split by pi between the factors [paper], momentum 0.9 before preconditioning and periods 10/100
    [official code of TNT's baseline; others have momentum after it, which keeps steps of an
    earlier, smaller F going]. Published for the MNIST autoencoder: lr 3e-3, lambda 0.3 in TNT's
    code, lr 1, lambda 3 in K-BFGS's code [official code]; lambda needs no conversion. The
    defaults are `DEFAULTS` [ours]. Not here: adapted damping and the quadratic-model step size.

    Example:
        >>> opt = fl.optim.KFAC(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(spatial: Literal["expand", "reduce"] = "expand") -> Approximation:
        """The approximation."""
        return approximations.KFAC(spatial)


class EKFAC(Method, damping=0.01):
    """EKFAC, George et al. (2018): KFAC's eigenbasis with re-estimated eigenvalues, exact damping.

    Momentum after preconditioning; basis every 50 to 100 steps; empirical labels [official code:
    `observing(y)`]. Here eigenvalues are averaged like the factors, carried over exactly when the
    basis changes, and used from the next refresh on. Momentum before preconditioning, as the clip
    then bounds the step that is made; damping 0.01, decay 0.95, the rest `DEFAULTS` [ours].

    Example:
        >>> opt = fl.optim.EKFAC(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(spatial: Literal["expand", "reduce"] = "expand") -> Approximation:
        """The approximation."""
        return approximations.EKFAC(spatial)


class TKFAC(Method, damping_style="factored"):
    """TKFAC, Gao et al. (2020): trace-restricted KFAC, its factors damped alike.

    The paper has momentum after preconditioning, and adds sqrt(lambda) to factors of equal trace;
    here to factors of equal mean eigenvalue, the one rule of this library. Momentum before it,
    decay 0.95 and `DEFAULTS` [ours].

    Example:
        >>> opt = fl.optim.TKFAC(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(spatial: Literal["expand", "full"] = "expand") -> Approximation:
        """The approximation."""
        return approximations.TKFAC(spatial)


class TEKFAC(Method, damping=0.01):
    """TEKFAC, Gao et al. (2020): TKFAC's eigenbasis with re-estimated eigenvalues, exact damping.

    The paper has momentum after preconditioning. Before it here, damping 0.01, decay 0.95, the rest
    `DEFAULTS` [ours]; the paper's damping of convolutions by their trace is not here.

    Example:
        >>> opt = fl.optim.TEKFAC(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(spatial: Literal["expand", "full"] = "expand") -> Approximation:
        """The approximation."""
        return approximations.TEKFAC(spatial)


class MBF(Method, damping=0.01, statistics="mean", decay=0.9):
    """Mini-block Fisher, Bahamou, Goldfarb & Ren (2022): small dense blocks applied to the
    momentum.

    Statistics of the batch mean, decay 0.9, momentum 0.9 before preconditioning, coupled weight
    decay, periods 10/100 for convolutional nets and 2/25 for autoencoders [official code]; its
    training statistics use the data's labels: `observing(y)`. One block per kernel of a
    convolution; one per row of a Linear layer where these fit, otherwise one average block for all
    rows [official code: all-to-one average]; `print(opt)` shows which. Published lambda converts to
    m lambda. Damping 0.01, the rest `DEFAULTS` [ours].

    Args:
        model: as NaturalGradient's.
        likelihood: as NaturalGradient's.
        lr: as NaturalGradient's.
        max_block_bytes: most bytes for the row blocks of one layer, which every step reads: 64 MiB
            take as long as a product of 700 x 700 matrices; those of the MNIST autoencoder's two
            small layers take 0.3% of its step.
        **options: further arguments of NaturalGradient.

    Example:
        >>> opt = fl.optim.MBF(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(max_block_bytes: int = 64 * 2**20) -> ByLayer:
        """The approximation."""
        if not is_whole(max_block_bytes, 0):
            raise ValueError(
                f"Got max_block_bytes={shown(max_block_bytes)}, expected a whole number of bytes."
            )
        return RowBlocksThatFit(max_block_bytes)


@dataclass(frozen=True)
class RowBlocksThatFit(ByLayer):
    """Row blocks where they fit, the average block otherwise; kernels stay kernels.

    Args:
        max_block_bytes: most bytes for the row blocks of one layer.
    """

    max_block_bytes: int

    def choose(self, layer: Layer, dtype: torch.dtype) -> Approximation:
        """MiniBlock, of rows or of their average."""
        is_convolution = len(layer.kernel) > 1
        rows, columns = layer.shape
        block_bytes = rows * columns**2 * dtype.itemsize
        if is_convolution or block_bytes <= self.max_block_bytes:
            return MiniBlock()
        return MiniBlock("row_avg")


class TENGraD(Method, lr=0.1, damping=0.1, decay=0.0):
    """TENGraD, Soori et al. (2022): the exact block of one batch, inverted by Woodbury's identity.

    One sampled label per example, no averaging over batches, reuse for 100 steps, momentum 0.9
    after preconditioning [official code]. Published for VGG16 on CIFAR-10: batch 128, lr 0.1,
    lambda 0.2, weight decay 3e-3 [official code]. Momentum before preconditioning, learning rate
    and damping 0.1, the rest `DEFAULTS`; batches of up to 1000 examples are kept whole [ours]: with
    128 of 1000 a step does up to 250 times what <p, m> says.

    Example:
        >>> opt = fl.optim.TENGraD(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build(batch: int = 1000) -> Approximation:
        """The approximation."""
        return approximations.TENGraD(batch)


class Shampoo(
    Method,
    lr=0.3,
    damping=0.3,
    kl_clip=0.1,
    statistics="gradient",
    decay=0.9,
    damping_style="factored",
):
    """Shampoo, Gupta, Koren & Singer (2018): inverse roots of the gradient's mode covariances.

    Reads `p.grad` and needs no second backward pass; `observing()` only counts the examples, so
    that statistics are on the scale of F. Decay 0.9 instead of a sum, eps added, momentum 0.9
    before preconditioning [official code of TNT's baseline]. lr = sqrt(m) lr_published; lambda = m
    eps agrees where the covariances vanish (MNIST autoencoder lr 3e-4, eps 3e-4, batch 1000: here
    lr=9.5e-3, damping=0.3). The published eps is added before the root. Learning rate and damping
    0.3 with a clip of 0.1 of its own F, the rest `DEFAULTS` [ours].

    Example:
        >>> opt = fl.optim.Shampoo(model, loss)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    @staticmethod
    def build() -> Approximation:
        """The approximation."""
        return approximations.Shampoo(match_trace=False)


def _methods() -> list[str]:
    """Names of the classes of this file that are optimizers."""
    found = []
    for name, value in globals().items():
        if not inspect.isclass(value):
            continue
        if issubclass(value, Method):
            found.append(name)
    return found


__all__ = _methods()
