"""K-BFGS: Goldfarb, Ren & Bahamou (2020), a Kronecker-factored quasi-Newton method.

There is no matrix, only an inverse, H_g (x) H_a.

H_a ~ (A + sqrt(lambda) I)^-1 by BFGS with s = H_a abar, y = (A + sqrt(lambda) I) s; H_g ~ the
inverse Hessian of the loss in the pre-activations by BFGS with the change of their batch means over
the step, doubly damped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_lab._ground.arguments import check_kind, number
from fisher_lab._ground.linalg import kept, spd_inverse, symmetrize
from fisher_lab._passes.capture import hooked
from fisher_lab._passes.model import Output
from fisher_lab._passes.placement import Use
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import Kronecker
from fisher_lab.optim.base import LayerOptimizer
from fisher_lab.optim.bfgs import bfgs_, double_damping
from fisher_lab.optim.finite import all_finite, where_ok
from fisher_lab.optim.options import Options, Settings
from fisher_lab.optim.saving import decode
from fisher_lab.optim.vectors import Share

MU1 = 0.2  # Powell's constant [official code]
GUARD = 1e-4  # an update with s'y <= GUARD |s|^2 |g| is left out [official code]


class Means(NamedTuple):
    """Of one layer over a pass: pre-activations h `[d_out]`, the loss's gradient in them, g."""

    h: Tensor
    g: Tensor


class Pass:
    """What one layer saw in one call of the closure, all its forward passes together.

    Args:
        dtype: working precision of the layer.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.a: list[Tensor] = []  # inputs with the bias column [N, d_in]
        self.h: list[Tensor] = []  # sums over examples of the pre-activations [d_out]
        self.g: list[Tensor] = []  # the same of the loss's gradient in them

    def see(self, use: Use, output: Tensor) -> None:
        """Add one use of the layer, whose gradient is still to come."""
        positions = math.prod(use.a.shape[1:3])
        if positions != 1:
            raise ValueError(
                f"Layer {use.layer.name!r} is used at {positions} positions, expected one: K-BFGS "
                "for shared weights is not defined here; leave it to the fallback with "
                "layers=[...]."
            )
        # one group, one position
        a = use.a[:, 0, 0]
        self.a.append(a.to(self.dtype))
        h = output.detach().flatten(1).to(self.dtype)
        self.h.append(h.sum(0))
        arrive = partial(self._arrive, use.layer)
        output.register_hook(arrive)

    def _arrive(self, layer: Layer, gradient: Tensor) -> None:
        (g,) = layer.unroll_gradient(gradient[None])
        by_example = g.flatten(1)
        total = by_example.sum(0)
        self.g.append(total.to(self.dtype))

    def inputs(self) -> Tensor:
        """Those of all forward passes `[N, d_in]`."""
        if len(self.a) == 1:
            return self.a[0]
        return torch.cat(self.a)

    def means(self, scale: Tensor | None) -> Means | None:
        """The means over the examples; None if nothing was differentiated.

        Args:
            scale: by which a GradScaler multiplied the loss; None for an unscaled one.
        """
        if not self.g:
            return None
        examples = sum(map(len, self.a))
        h = sum(self.h[1:], self.h[0])
        # of a mean loss, which divides by the examples itself
        g = sum(self.g[1:], self.g[0])
        if scale is not None:
            g = g / scale
        return Means(h / examples, g)


class Inputs:
    """The inputs of a layer in a pass, of which the averages are read.

    Args:
        a: `[N, d_in]`.
    """

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def size(self) -> Tensor:
        """The sum of squares, which is finite if a^T a is."""
        flat = self.a.flatten()
        return flat @ flat

    def kept(self, ok: Tensor) -> Inputs:
        """These where ok, zeros otherwise."""
        return Inputs(kept(ok, self.a))

    def join(self, A: Tensor, weight: float) -> None:
        """A += weight a^T a / N, in place."""
        a = self.a
        A.addmm_(a.T, a, alpha=weight / len(a))

    def second(self) -> Tensor:
        """a^T a / N."""
        return self.a.T @ self.a / len(self.a)

    def mean(self) -> Tensor:
        """The mean input `[d_in]`."""
        return self.a.mean(0)


class SummedInputs(Inputs):
    """The same of all ranks, which know the sums alone.

    Args:
        squares: a^T a `[d_in, d_in]`.
        total: sum of a `[d_in]`.
        examples: N, a 0-d tensor.
    """

    def __init__(self, squares: Tensor, total: Tensor, examples: Tensor) -> None:
        self.squares = squares
        self.total = total
        self.examples = examples

    def size(self) -> Tensor:
        """The trace."""
        return self.squares.trace()

    def kept(self, ok: Tensor) -> Inputs:
        """Zeros where not ok."""
        return SummedInputs(kept(ok, self.squares), kept(ok, self.total), self.examples)

    def join(self, A: Tensor, weight: float) -> None:
        """A += weight a^T a / N, in place."""
        A.add_(self.second(), alpha=weight)

    def second(self) -> Tensor:
        """a^T a / N."""
        return self.squares / self.examples

    def mean(self) -> Tensor:
        """The mean input `[d_in]`."""
        return self.total / self.examples


class Seen(NamedTuple):
    """What all ranks saw of a layer in a pass; None for means of what was not differentiated."""

    inputs: Inputs
    means: Means | None


@dataclass
class Factors:
    """What K-BFGS keeps of a layer, which is what a checkpoint holds of it; steps change it in
    place.

    Attributes:
        A: moving average of the inputs' second moment `[d_in, d_in]`.
        H_a: approximate inverse of A + sqrt(lambda) I.
        H_g: approximate inverse Hessian of the loss in the pre-activations `[d_out, d_out]`.
        s: moving average of the change of the mean pre-activations in a step `[d_out]`.
        y: the same of their gradients.
    """

    A: Tensor
    H_a: Tensor
    H_g: Tensor
    s: Tensor
    y: Tensor

    @classmethod
    def start(cls, A: Tensor, rows: int, root: float) -> Factors:
        """H_a as the damped inverse, H_g as the identity.

        Args:
            A: second moment of the inputs `[d_in, d_in]`.
            rows: d_out.
            root: sqrt(lambda).
        """
        finite = torch.isfinite(A).all()
        A = torch.where(finite, A, 0.0)
        like_A: dict[str, Any] = {"dtype": A.dtype, "device": A.device}
        identity = torch.eye(len(A), **like_A)
        damped = symmetrize(A) + root * identity
        H_a = spd_inverse(damped)
        H_g = torch.eye(rows, **like_A)
        s = torch.zeros(rows, **like_A)
        y = torch.zeros(rows, **like_A)
        return cls(A, H_a, H_g, s, y)

    def learn(self, inputs: Inputs, before: Means, after: Means, decay: float, root: float) -> None:
        """Both quasi-Newton updates, in place; nothing where something is not finite.

        Args:
            inputs: at the old weights.
            before: means at the old weights.
            after: means at the new weights.
            decay: of the averages.
            root: sqrt(lambda).
        """
        rest = 1 - decay
        # a^T a is finite if the sum of squares is
        ok = all_finite([inputs.size(), *before, *after])
        inputs = inputs.kept(ok)
        # the average of A, where a is zero if not ok
        left = where_ok(ok, decay, 1.0, self.A.dtype)
        self.A.mul_(left)
        inputs.join(self.A, rest)
        # the averages of s and y
        moved = after.h - before.h
        turned = after.g - before.g
        s = decay * self.s + rest * moved
        y = decay * self.y + rest * turned
        self.s = torch.where(ok, s, self.s)
        self.y = torch.where(ok, y, self.y)
        # the inverse of A + sqrt(lambda) I: a step along the mean input, whose product with it is
        # known
        abar = inputs.mean()
        s = self.H_a @ abar
        y = self.A @ s + root * s
        bfgs_(self.H_a, s, y, ok)
        # the inverse Hessian in the pre-activations
        s, y = double_damping(self.H_g, self.s, self.y, MU1, root)
        size = s.square().sum()
        guard = GUARD * size * before.g.norm()
        bfgs_(self.H_g, s, y, ok, guard)

    def inverse(self) -> Kronecker:
        """H_g (x) H_a, copied."""
        H_g = self.H_g.clone()
        H_a = self.H_a.clone()
        return Kronecker((H_g[None], H_a[None]))

    def state(self) -> dict[str, Tensor]:
        """All factors, copied."""
        copies = {}
        for name, tensor in vars(self).items():
            copies[name] = tensor.clone()
        return copies


def _sums(seen: Pass, scale: Tensor | None) -> dict[str, Tensor]:
    """What ranks exchange of a layer."""
    a = seen.inputs()
    n = len(a)
    found = {"examples": a.new_tensor(n), "squares": a.T @ a, "total": a.sum(0)}
    means = seen.means(scale)
    if means is not None:
        found["h"] = means.h * n
        found["g"] = means.g * n
    return found


@dataclass(frozen=True)
class KBFGSSettings(Settings):
    """Settings of a group: as every optimizer's, but A may be singular without damping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(self.damping) > 0:
            raise ValueError(
                f"Got damping={self.damping!r}, expected a positive number: A may be singular."
            )


class KBFGS(LayerOptimizer):
    """K-BFGS with full matrices, for Linear layers at one position; everything else goes to the
    fallback.

    Needs a second forward and backward pass at the new weights, so `step` takes a closure and calls
    it twice, as torch's LBFGS does; the second call leaves its gradients in `p.grad`. With dropout
    both calls should draw alike. The likelihood is not used: there are no sampled labels.

    Momentum 0.9 before preconditioning, moving averages 0.9 of A, s and y, mu_1 = 0.2 [official
    code]. Published for the MNIST autoencoder: lr 0.3, lambda 0.3 (the default damping), weight
    decay 1e-5, and a pass over the data first: `warm_start(data)` [official code].

    Args:
        model: the model.
        likelihood: accepted for uniformity.
        lr: learning rate.
        damping: lambda; sqrt(lambda) is added to A and is mu_2.
        momentum: 0 for none.
        weight_decay: added to the gradient, or taken from W if `decoupled`.
        decoupled: see `weight_decay`.
        decay: of the averages of A, s and y.
        dtype: of all matrices; None for the parameters' own, at least float32.
        layers: names of layers; None for all that are nn.Linear.
        groups: settings of some layers, as NaturalGradient's.
        fallback_lr: learning rate of AdamW for all other parameters.
        output: what of the model's output is z, as NaturalGradient's.

    Example:
        >>> opt = fl.optim.KBFGS(model, loss)
        >>> def closure():
        ...     opt.zero_grad()
        ...     value = loss(model(x), y)
        ...     value.backward()
        ...     return value
        >>> value = opt.step(closure)
    """

    own_key = "factors"

    needs_closure = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module | None,  # noqa: ARG002
        lr: float | Tensor = 0.3,
        *,
        damping: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        decay: float = 0.9,
        dtype: torch.dtype | None = None,
        layers: Sequence[str] | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        fallback_lr: float = 1e-2,
        output: Output | None = None,
    ) -> None:
        if layers is None:
            layers = _trainable_linear(model)
        options = Options(decay=decay, dtype=dtype, fallback_lr=fallback_lr)
        settings = KBFGSSettings(
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        super().__init__(model, options, settings, layers, groups, output)
        self.factors: dict[str, Factors] = {}

    def observing(
        self,
        y: Tensor | None = None,  # noqa: ARG002
        *,
        kept: Tensor | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Nothing: the closure's own passes are watched."""
        return nullcontext()

    @contextmanager
    def _watching(self) -> Iterator[dict[str, Pass]]:
        """Record what every layer sees while the `with` lasts."""
        passes = {}
        for name, layer in self.layers.items():
            dtype = self.dtype_of(layer)
            passes[name] = Pass(dtype)

        def used(name: str, use: Use, output: Tensor) -> None:
            passes[name].see(use, output)

        with hooked(self.layers, used):
            yield passes

    def warm_start(self, data: Any) -> None:
        """The mean of A over the data, and H_a as its damped inverse."""
        totals: dict[str, dict[str, Tensor]] = {}
        for batch in self.batches(data):
            with self._watching() as passes:
                self.forward(batch.inputs)
            for name, seen in passes.items():
                if not seen.a:
                    continue
                a = seen.inputs()
                total = {"examples": a.new_tensor(len(a)), "squares": a.T @ a}
                if name in totals:
                    for key, x in totals[name].items():
                        total[key] = x + total[key]
                totals[name] = total
        for name, total in self.reductions.totals(totals, self._no_sums).items():
            A = total["squares"] / total["examples"]
            self._start(name, A)

    def _start(self, name: str, A: Tensor) -> None:
        rows, _ = self.layers[name].shape
        self.factors[name] = Factors.start(A, rows, self._root(name))

    def _root(self, name: str) -> float:
        """sqrt(lambda) of a layer."""
        for group in self.method_groups:
            if name in group["layers"]:
                return float(group["damping"] ** 0.5)
        raise KeyError(name)

    # -- the step ----------------------------------------------------------------------------------
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            raise ValueError(
                "KBFGS got no closure, expected one: it needs a second pass; write "
                "opt.step(closure)."
            )
        # the gradients that arrive are those of the scaled loss in both passes
        scale = getattr(self, "grad_scale", None)
        with torch.enable_grad(), self._watching() as before:
            loss = closure()
        with torch.no_grad(), self.plain_precision(self.device):
            old = self._seen(before, scale)
            self._start_new(old)
            self.update(loss)
        with torch.enable_grad(), self._watching() as after:
            closure()
        with torch.no_grad(), self.plain_precision(self.device):
            self._learn(old, self._seen(after, scale))
        self.steps += 1
        return loss

    def _seen(self, passes: dict[str, Pass], scale: Tensor | None) -> dict[str, Seen]:
        """What every layer saw that was used, of all ranks' examples.

        Args:
            passes: of this rank.
            scale: by which a GradScaler multiplied the loss; None for an unscaled one.
        """
        found = {}
        if self.reductions.ranks.alone:
            for name, seen in passes.items():
                if seen.a:
                    found[name] = Seen(Inputs(seen.inputs()), seen.means(scale))
            return found
        sums = {}
        sizes = [0]
        for name, seen in passes.items():
            if seen.a:
                sums[name] = _sums(seen, scale)
                sizes.append(sum(map(len, seen.a)))
        # gradients that are averaged over the ranks are of parts of one size
        self.reductions.places(lambda: [(max(sizes),)], equal=True)
        for name, total in self.reductions.totals(sums, self._no_sums).items():
            n = total["examples"]
            means = None
            if "g" in total:
                # the loss is a mean over the examples, of each rank over its own
                means = Means(total["h"] / n, total["g"] / n)
            inputs = SummedInputs(total["squares"], total["total"], n)
            found[name] = Seen(inputs, means)
        return found

    def _no_sums(self, name: str) -> dict[str, Tensor]:
        """The sums of a layer that was not used."""
        layer = self.layers[name]
        rows, columns = layer.shape
        like: dict[str, Any] = {"dtype": self.dtype_of(layer), "device": self.device}
        return {
            "examples": torch.zeros((), **like),
            "squares": torch.zeros(columns, columns, **like),
            "total": torch.zeros(columns, **like),
            "h": torch.zeros(rows, **like),
            "g": torch.zeros(rows, **like),
        }

    def _learn(self, before: dict[str, Seen], after: dict[str, Seen]) -> None:
        """Let every layer that was differentiated in both passes learn from them."""
        for name, seen in before.items():
            first = seen.means
            second = after[name].means if name in after else None
            if first is None or second is None:
                continue
            root = self._root(name)
            self.factors[name].learn(seen.inputs, first, second, self.options.decay, root)

    def _start_new(self, passes: dict[str, Seen]) -> None:
        """Factors of the layers that are differentiated for the first time."""
        for name, seen in passes.items():
            if seen.means is not None and name not in self.factors:
                self._start(name, seen.inputs.second())

    def update(self, loss: Any) -> None:
        """W <- W - lr H_g m H_a."""
        shares = self.gather(self.factors)
        if not self.has_gradients(shares):
            return
        ok = self.healthy(shares, loss)
        for share in shares:
            self.add_decay(share, ok)
            share.vectors = self.momentum(share, share.vectors, ok)
            self._precondition(share)
        self.apply(shares, ok, 1.0)

    def _precondition(self, share: Share) -> None:
        """The directions of a group."""
        share.directions = list(share.vectors)  # each of them is replaced
        for index, layer in enumerate(share.layers):
            if not share.places[index]:
                continue
            factors = self.factors[layer.name]
            m = share.packed(share.vectors, index)
            D = factors.H_g @ m @ factors.H_a
            share.set_direction(index, D)

    # -- what is used ------------------------------------------------------------------------------
    def inverses(self) -> dict[str, Kronecker]:
        """H_g (x) H_a of every layer, which multiplies its gradient; copies."""
        found = {}
        for name, factors in self.factors.items():
            found[name] = factors.inverse()
        return found

    def method_of(self, name: str) -> str:  # noqa: ARG002
        """What is done to a layer, in words."""
        return "K-BFGS"

    def own_state(self) -> dict[str, Any]:
        """All factors, copied because steps change them in place."""
        saved = {}
        for name, factors in self.factors.items():
            saved[name] = factors.state()
        return {"factors": saved}

    def load_own_state(self, saved: dict[str, Any]) -> None:
        """The inverse of `own_state`."""
        self.factors = {}
        for name, tensors in saved["factors"].items():
            dtype = self.dtype_of(self.layers[name])
            fields = decode(tensors, self.device, dtype)
            self.factors[name] = Factors(**fields)


def _trainable_linear(model: nn.Module) -> list[str]:
    """Names of the Linear layers with something to train.

    Raises:
        TypeError: for what is no model.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module, not its parameters")
    found = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:  # a subclass may compute something else
            continue
        if any(p.requires_grad for p in module.parameters()):
            found.append(name)
    if not found:
        raise ValueError(
            "The model has no trainable nn.Linear, expected one for KBFGS; use another optimizer."
        )
    return found
