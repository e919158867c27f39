"""K-BFGS: Goldfarb, Ren & Bahamou (2020): a Kronecker-factored quasi-Newton method; only an inverse, H_g (x) H_a.

H_a ~ (A + sqrt(lambda) I)^-1 by BFGS with s = H_a abar, y = (A + sqrt(lambda) I) s; H_g ~ the inverse Hessian of the
loss in the pre-activations by BFGS with the change of their batch means over the step, doubly damped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.arguments import number
from fisher_lab._ground.linalg import kept, spd_inverse, symmetrize
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import Kronecker
from fisher_lab.optim.base import LayerOptimizer
from fisher_lab.optim.finite import all_finite, where_ok
from fisher_lab.optim.options import Options, Settings
from fisher_lab.optim.saving import decode

MU1 = 0.2  # Powell's constant [official code]
GUARD = 1e-4  # an update with s'y <= GUARD |s|^2 |g| is left out [official code]


class Pass:
    """Sums of one layer over one call of the closure."""

    def __init__(self) -> None:
        self.a: list[Tensor] = []  # inputs with the bias column [N, d_in], where they are asked for
        self.h: Tensor | None = None  # sum over examples of the pre-activations [d_out]
        self.g: Tensor | None = None  # mean over examples of the loss's gradient in h [d_out]
        self.N = 0

    def see(self, h: Tensor) -> None:
        """Add pre-activations `[N, d_out]`."""
        total = h.sum(0)
        self.h = total if self.h is None else self.h + total
        self.N += len(h)

    def inputs(self) -> Tensor:
        """Those of all forward passes `[N, d_in]`."""
        return self.a[0] if len(self.a) == 1 else torch.cat(self.a)

    def means(self) -> tuple[Tensor, Tensor] | None:
        """Of pre-activations and of their gradients, `[d_out]` each; None if nothing was differentiated."""
        return None if self.h is None or self.g is None else (self.h / self.N, self.g)


@dataclass(frozen=True)
class KBFGSSettings(Settings):
    """Settings of a group: as every optimizer's, but A may be singular without damping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(self.damping) > 0:
            raise ValueError(f"Got damping={self.damping!r}, expected a positive number: A may be singular.")


class KBFGS(LayerOptimizer):
    """K-BFGS with full matrices, for Linear layers at one position; everything else goes to the fallback.

    Needs a second forward and backward pass at the new weights, so `step` takes a closure and calls it twice, as
    torch's LBFGS does; the second call leaves its gradients in `p.grad`. With dropout both calls should draw alike.
    The likelihood is not used: there are no sampled labels.

    Momentum 0.9 before preconditioning, moving averages 0.9 of A, s and y, mu_1 = 0.2 [official code]. Published for
    the MNIST autoencoder: lr 0.3, lambda 0.3 (the default damping), weight decay 1e-5, and a pass over the data first:
    `warm_start(data)` [official code].

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
    """

    needs_closure = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module | None,  # noqa: ARG002
        lr: float | Tensor,
        *,
        damping: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        decay: float = 0.9,
        dtype: torch.dtype | None = None,
        layers: Sequence[str] | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        fallback_lr: float = 1e-3,
    ) -> None:
        if layers is None:
            layers = _trainable_linear(model)
        options = Options(decay=decay, dtype=dtype, fallback_lr=fallback_lr)
        settings = KBFGSSettings(
            lr=lr, damping=damping, momentum=momentum, weight_decay=weight_decay, decoupled=decoupled
        )
        super().__init__(model, options, settings, layers, groups)
        self.factors: dict[str, dict[str, Tensor]] = {}

    def observing(self, y: Tensor | None = None) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing: the closure's own passes are watched."""
        return nullcontext()

    @contextmanager
    def _watching(self, inputs: bool = True) -> Iterator[dict[str, Pass]]:
        passes = {name: Pass() for name in self.layers}
        handles: list[Any] = []

        def hook_for(layer: Layer, seen: Pass) -> Any:
            dtype = self.working_dtype(next(iter(layer.parameters.values())))

            def arrived(g: Tensor) -> None:
                total = layer.unroll_gradient(g[None])[0].flatten(1).sum(0).to(dtype)
                seen.g = total if seen.g is None else seen.g + total

            def hook(module: nn.Module, x: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
                positions = math.prod(output.shape[1:-1])
                if positions != 1:
                    raise ValueError(
                        f"Layer {layer.name!r} is used at {positions} positions, expected one: K-BFGS for shared "
                        "weights is not defined here; leave it to the fallback with layers=[...]."
                    )
                if inputs:
                    seen.a.append(layer.unroll_input(x[0].detach())[:, 0, 0].to(dtype))
                seen.see(output.detach().flatten(1).to(dtype))
                if output.requires_grad:
                    handles.append(output.register_hook(arrived))

            return hook

        handles += [layer.module.register_forward_hook(hook_for(layer, passes[n])) for n, layer in self.layers.items()]
        try:
            yield passes
        finally:
            for handle in handles:
                handle.remove()

    def warm_start(self, data: Any) -> None:
        """The mean of A over the data, and H_a as its damped inverse."""
        sums: dict[str, tuple[Tensor | float, int]] = dict.fromkeys(self.layers, (0.0, 0))
        for x, _ in self.batches(data):
            with torch.no_grad(), self._watching() as passes:
                self.model(x)
            for name, seen in passes.items():
                if seen.a:
                    a = seen.inputs()
                    total, N = sums[name]
                    sums[name] = (total + a.T @ a, N + len(a))
        for name, (total, N) in sums.items():
            if isinstance(total, Tensor):
                self.factors[name] = self._start(name, total / N)

    def _start(self, name: str, A: Tensor) -> dict[str, Tensor]:
        A = torch.where(torch.isfinite(A).all(), A, 0.0)
        rows = self.layers[name].shape[0]
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        zero = A.new_zeros(rows)
        H_a = spd_inverse(symmetrize(A) + self._root(name) * eye)
        return {
            "A": A,
            "H_a": H_a,
            "H_g": torch.eye(rows, dtype=A.dtype, device=A.device),
            "s": zero,
            "y": zero.clone(),
        }

    def _root(self, name: str) -> float:
        group = next(group for group in self.method_groups if name in group["layers"])
        return float(group["damping"] ** 0.5)

    # -- the step --------------------------------------------------------------------------------------------------
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            raise ValueError("KBFGS got no closure, expected one: it needs a second pass; write opt.step(closure).")
        with torch.enable_grad(), self._watching() as before:
            loss = closure()
        with torch.no_grad(), self.plain_precision(self.device):
            found = {name: (seen.inputs(), means) for name, seen in before.items() if (means := seen.means())}
            for name, (a, _) in found.items():
                if name not in self.factors:
                    self.factors[name] = self._start(name, a.T @ a / len(a))
            self.update(loss)
        with torch.enable_grad(), self._watching(inputs=False) as after:
            closure()
        with torch.no_grad(), self.plain_precision(self.device):
            for name, (a, means) in found.items():
                second = after[name].means()
                if second is not None:
                    self._learn(name, a, means, second)
        self.steps += 1
        return loss

    def update(self, loss: Any) -> None:
        """W <- W - lr H_g m H_a."""
        shares = self.gather(self.factors)
        ok = self.healthy(shares, loss)
        for share in shares:
            self.add_decay(share, ok)
            share.vectors = self.momentum(share, share.vectors, ok)
            share.directions = list(share.vectors)
            for index, layer in enumerate(share.layers):
                factors = self.factors[layer.name]
                D = factors["H_g"] @ share.packed(index) @ factors["H_a"]
                share.set_direction(index, D)
        self.apply(shares, ok, 1.0)

    def _learn(self, name: str, a: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
        """Both quasi-Newton updates of a layer, in place; nothing where something is not finite."""
        found, root, rest = self.factors[name], self._root(name), 1 - self.decay
        # a^T a is finite if the sum of squares is
        ok = all_finite([a.flatten() @ a.flatten(), *before, *after])
        a = kept(ok, a)
        found["A"].mul_(where_ok(ok, self.decay, 1.0, a.dtype)).addmm_(a.T, a, alpha=rest / len(a))
        for key, x, y in zip("sy", before, after, strict=True):
            found[key] = torch.where(ok, self.decay * found[key] + rest * (y - x), found[key])
        s = found["H_a"] @ a.mean(0)
        bfgs_(found["H_a"], s, found["A"] @ s + root * s, ok)
        s, y = double_damping(found["H_g"], found["s"], found["y"], MU1, root)
        bfgs_(found["H_g"], s, y, ok, GUARD * s.square().sum() * before[1].norm())

    # -- what is used ----------------------------------------------------------------------------------------------
    def inverses(self) -> dict[str, Kronecker]:
        """H_g (x) H_a of every layer: what multiplies its gradient (copies: steps change the factors in place)."""
        return {name: Kronecker((f["H_g"][None].clone(), f["H_a"][None].clone())) for name, f in self.factors.items()}

    def method_of(self, name: str) -> str:  # noqa: ARG002
        """What is done to a layer, in words."""
        return "K-BFGS"

    def own_state(self) -> dict[str, Any]:
        """All factors, copied because steps change them in place."""
        return {"factors": {name: {key: x.clone() for key, x in f.items()} for name, f in self.factors.items()}}

    def load_own_state(self, saved: dict[str, Any]) -> None:
        """The inverse of `own_state`."""
        self.factors = decode(saved["factors"], self.device)


def _trainable_linear(model: nn.Module) -> list[str]:
    """Names of the Linear layers with something to train."""
    found = []
    for name, module in model.named_modules():
        trainable = any(p.requires_grad for p in module.parameters())
        if type(module) is nn.Linear and trainable:
            found.append(name)
    if not found:
        raise ValueError("The model has no trainable nn.Linear, expected one for KBFGS; use another optimizer.")
    return found


def double_damping(H: Tensor, s: Tensor, y: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """s and y changed so that s'y >= mu1 y'Hy (Powell, on H) and then s'y >= mu2 s's (Levenberg-Marquardt).

    Args:
        H: positive definite `[n, n]`.
        s: change of the point `[n]`.
        y: change of the gradient `[n]`.
        mu1: in (0, 1).
        mu2: > 0.
    """
    Hy = H @ y
    sy, yHy = s @ y, y @ Hy
    theta = _theta(sy, yHy, mu1)
    s = theta * s + (1 - theta) * Hy
    sy, ss = s @ y, s @ s
    theta = _theta(sy, ss, mu2)
    return s, theta * y + (1 - theta) * s


def _theta(inner: Tensor, square: Tensor, mu: float) -> Tensor:
    """1 where inner >= mu square, otherwise the weight that makes the mixture's inner product mu square."""
    short = inner < mu * square
    gap = torch.where(short, square - inner, torch.ones_like(square))
    return torch.where(short, (1 - mu) * square / gap, torch.ones_like(square))


def bfgs_(H: Tensor, s: Tensor, y: Tensor, ok: Tensor | bool = True, guard: Tensor | float = 0.0) -> Tensor:
    """H <- (I - rho s y') H (I - rho y s') + rho s s' with rho = 1 / s'y, in place, in one pass over H.

    H stays as it is where not ok, where s'y <= guard, or where the update is not finite.

    Args:
        H: symmetric `[n, n]`.
        s: change of the point `[n]`.
        y: change of the gradient `[n]`.
        ok: whether to update.
        guard: least s'y that is trusted.
    """
    sy = s @ y
    good = sy > guard
    rho = 1 / torch.where(good, sy, 1.0)
    # the update is s q' + q s'
    Hy = H @ y
    q = (rho * rho * (y @ Hy) + rho) / 2 * s - rho * Hy
    good = good & ok & torch.isfinite(s.norm() * q.norm())
    s, q = torch.where(good, s, 0.0), torch.where(good, q, 0.0)
    return H.addmm_(torch.stack([s, q], 1), torch.stack([q, s]))
