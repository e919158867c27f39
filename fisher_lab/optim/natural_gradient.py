"""NaturalGradient: a torch.optim.Optimizer for any Approximation.

Step k: g = gradient (+ weight decay);  m = momentum of g;  p = (F + lambda)^-1 m;  W <- W - lr nu p
(nu: KL-clip).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab._ground.linalg import kept
from fisher_lab._passes.batches import Batch
from fisher_lab._passes.capture import Placements, is_shared
from fisher_lab._passes.labels import Empirical, FisherKind, Labels
from fisher_lab._passes.model import Output
from fisher_lab.approximations import Approximation, check_approximation
from fisher_lab.layers import Layer
from fisher_lab.likelihoods import Likelihood, as_likelihood
from fisher_lab.matrices import FisherMatrix
from fisher_lab.optim.attaching import Attachment
from fisher_lab.optim.base import LayerOptimizer
from fisher_lab.optim.comparing import compare_in_use
from fisher_lab.optim.finite import as_int
from fisher_lab.optim.groups import ByLayer
from fisher_lab.optim.layer_state import Contribution, LayerCurvature
from fisher_lab.optim.observation import (
    Observed,
    Uncompiled,
    Watched,
    check_forwards,
    check_kept,
    check_labels,
    of_gradient,
    statistics,
    watching,
)
from fisher_lab.optim.options import (
    DampingStyle,
    MomentumOrder,
    NaturalOptions,
    NaturalSettings,
    Option,
    Refreshing,
    Statistics,
)
from fisher_lab.optim.reductions import Place, Shape
from fisher_lab.optim.refresh import joined, refresh, refresh_dealt
from fisher_lab.optim.size import StepSize
from fisher_lab.optim.vectors import Bucket, Share, precondition
from fisher_lab.optim.window import Window
from fisher_lab.results import Comparison

# steps after which what went wrong is read where no refresh does it: a host read in every 20th step
TELL_EVERY = 20


class NaturalGradient(LayerOptimizer, register=False):
    """Preconditions every layer's gradient with the damped inverse of an approximation of its
    Fisher block.

    Use it as any torch optimizer, with the forward pass inside `with opt.observing():`. Parameters
    that no layer adapter covers are trained by `torch.optim.AdamW` at `fallback_lr`; `print(opt)`
    shows which.

    Args:
        model: the model that is trained; the forward passes observed are its own.
        likelihood: a Likelihood or a torch loss module: the loss that is minimised.
        approximation: for instance `fl.KFAC()`; or a `ByLayer`, which chooses one for each layer.
        lr: learning rate.
        damping: lambda, on the scale of F; with a larger learning rate it must be larger too.
        damping_style: "exact" (F + lambda I) or "factored" (Kronecker products: lambda^(1/k) on
            each of k balanced factors; Cholesky instead of an eigendecomposition).
        momentum: 0 for none.
        momentum_order: momentum "before" preconditioning (the preconditioner acts on the momentum)
            or "after".
        weight_decay: added to the gradient, or W <- (1 - lr weight_decay) W if `decoupled`.
        decoupled: see `weight_decay`.
        kl_clip: largest lr^2 p^T F p of a step, F of the whole network on (up to 128 of) the
            examples observed last; in steps between observations lr^2 <p, m> times the ratio found
            last. Statistics of the training gradient know only the approximation's own F. None for
            no limit.
        decay: rho of the moving averages; the k-th observation weighs 1 - min(1 - 1/k, rho) where
            all have as many examples, and otherwise in proportion to them
            (`fisher_lab.estimation.average`).
        observe_every: steps between observations.
        refresh_every: steps between refreshes of the inverses; until that step one follows every
            observation.
        fisher: labels of the statistics: "mc" (sampled from the model), "true" (expectation) or
            "empirical".
        statistics: "per_example", or "mean": the outer product of the batch-mean gradient, times
            the batch size.
        refresh: in several processes, whether every rank factorises all matrices ("replicated") or
            each its share ("sharded"), which are then sent; None for what takes less time.
        dtype: of moments and inverses; None for the parameters' own, at least float32.
        layers: names of the layers to precondition; None for all that have an adapter.
        groups: settings of some layers, as
            `[{"layers": [...], "lr": ..., "damping": ..., "approximation": ...}]`.
        fallback_lr: learning rate of AdamW for all other parameters.
        seed: of sampled labels.
        output: what of the model's output is z: a name, an index or a function; None for a tensor,
            or `logits`.

    Raises:
        ValueError, TypeError: settings out of range, unknown layers, statistics that the
            approximation cannot use.

    See Also:
        fisher_lab.optim: the methods of the papers with their defaults.

    Example:
        >>> opt = fl.NaturalGradient(model, loss, fl.EKFAC(), lr=0.1, damping=0.01)
        >>> with opt.observing():
        ...     value = loss(model(x), y)
        >>> value.backward()
        >>> opt.step()
    """

    own_key = "layers"
    group_extras = ("approximation",)

    options: NaturalOptions
    kl_clip = Option()
    observe_every = Option()
    refresh_every = Option()
    fisher = Option()
    statistics = Option()
    refresh = Option()

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module,
        approximation: Approximation | ByLayer,
        lr: float | Tensor,
        *,
        damping: float = 1.0,
        damping_style: DampingStyle = "exact",
        momentum: float = 0.9,
        momentum_order: MomentumOrder = "before",
        weight_decay: float = 0.0,
        decoupled: bool = False,
        kl_clip: float | None = None,
        decay: float = 0.95,
        observe_every: int = 10,
        refresh_every: int = 100,
        fisher: FisherKind = "mc",
        statistics: Statistics = "per_example",
        refresh: Refreshing | None = None,
        dtype: torch.dtype | None = None,
        layers: Sequence[str] | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        fallback_lr: float = 1e-3,
        seed: int = 0,
        output: Output | None = None,
    ) -> None:
        options = NaturalOptions(
            decay=decay,
            dtype=dtype,
            fallback_lr=fallback_lr,
            seed=seed,
            kl_clip=kl_clip,
            observe_every=observe_every,
            refresh_every=refresh_every,
            fisher=fisher,
            statistics=statistics,
            refresh=refresh,
        )
        settings = NaturalSettings(
            lr=lr,
            damping=damping,
            damping_style=damping_style,
            momentum=momentum,
            momentum_order=momentum_order,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        super().__init__(model, options, settings, layers, groups, output)
        self.approximation = approximation
        self.likelihood = as_likelihood(likelihood)
        self.curvature = self._new_curvature(groups or ())
        _check_factors(statistics, self.curvature)
        self.window = Window()
        self.step_size = StepSize()
        self._attachment: Attachment | None = None
        self._buckets: list[list[Bucket]] = [[] for _ in self.method_groups]  # of every group
        self._placements: Placements = {}  # of layers whose rows are not the examples
        self._sub_sampled: str | None = None  # the sentence that says so, which is told once
        self._read_at = 0  # step at which the counters of what went wrong were read last
        self._enter = torch.compiler.disable(type(self)._observe)  # see LayerOptimizer

    def _new_curvature(self, groups: Sequence[dict[str, Any]]) -> dict[str, LayerCurvature]:
        """Every layer with the approximation of its group, or else the optimizer's."""
        given: dict[str, Approximation | ByLayer] = dict.fromkeys(self.layers, self.approximation)
        # the groups made stand in the order of those given; one of all other layers follows
        for made, group in zip(self.method_groups, groups, strict=False):
            if "approximation" in group:
                own = dict.fromkeys(made["layers"], group["approximation"])
                given.update(own)
        found = {}
        for name, layer in self.layers.items():
            rule = given[name]
            if not isinstance(rule, ByLayer):
                check_approximation(rule)
            approximation = self.choose(layer, rule)
            found[name] = LayerCurvature(layer, approximation)
        return found

    def choose(self, layer: Layer, approximation: Approximation | ByLayer) -> Approximation:
        """The approximation of one layer."""
        if isinstance(approximation, ByLayer):
            dtype = self.dtype_of(layer)
            return approximation.choose(layer, dtype)
        return approximation

    @property
    def observed_at(self) -> int | None:
        """Step of the last observation; None before the first."""
        return self.window.observed_at

    # -- observing ---------------------------------------------------------------------------------
    def observing(
        self, y: Tensor | None = None, *, kept: Tensor | None = None
    ) -> AbstractContextManager[Any]:
        """Watch the forward passes inside the `with` on steps that are due; on all others this does
        nothing.

        On leaving, one extra backward pass with sampled labels goes through the graph, which stays
        for the loss. Windows of one step (gradient accumulation) and forward passes in one window
        add examples.

        Without `kept` nothing is known of `ignore_index`: "mc" and "true" statistics are then of
        all positions, also of those that the loss ignores.

        Args:
            y: labels of the data, for empirical statistics of this window.
            kept: which labels the loss keeps, of their shape, for "mc" and "true":
                `kept=y != -100`.

        Raises:
            ValueError: no forward pass of the model, or one without gradients; `kept` for a loss
                that ignores nothing, or beside labels.
        """
        return self._enter(self, y, kept)

    def _observe(self, y: Tensor | None, kept: Tensor | None = None) -> AbstractContextManager[Any]:
        if not self.is_due():
            return nullcontext()
        if kept is not None:
            check_kept(kept, y)
        return Uncompiled(self._watched(y, kept))

    def attach(self) -> Attachment:
        """Watch every training forward pass of the model that is due, without `observing()`.

        For loops that are not one's own: those of Hugging Face's Trainer, accelerate or Lightning.
        Passes in evaluation mode or without gradients are left alone; the micro-batches of a step
        join one observation.

        Returns:
            What ends it: `attach().remove()`. It ends by itself with the optimizer.

        Raises:
            ValueError: for `fisher="empirical"`, whose labels a forward pass does not see.
        """
        if self.options.labels.needs_data_labels:
            raise ValueError(
                f'Got fisher="{self.options.fisher}" with attach(), expected "mc" or "true": a '
                "forward pass does not know the labels; use observing(y) in the loop."
            )
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = Attachment(self)
        return self._attachment

    def is_due(self) -> bool:
        """Whether the forward passes of the present step are to be watched."""
        return self.window.due(self.steps, self.options.observe_every)

    def watched_layers(self) -> dict[str, Layer]:
        """Whose inputs and output gradients are recorded."""
        if self.options.statistics == "gradient":
            # examples are counted, nothing else
            return {}
        return self.layers

    @contextmanager
    def _watched(self, y: Tensor | None, kept: Tensor | None) -> Iterator[None]:
        layers = self.watched_layers()
        with self.window.inside(), watching(self.forward, layers) as forwards:
            yield
        self.conclude(forwards, y, kept)

    def conclude(
        self, forwards: list[Watched], y: Tensor | None, kept: Tensor | None = None
    ) -> None:
        """Let recorded forward passes join the present observation.

        Args:
            forwards: what was recorded.
            y: labels of all their examples; None for the optimizer's own kind.
            kept: which labels the loss keeps; None for all.

        Raises:
            ValueError: no forward pass of the model, or one without gradients; labels of another
                number.
        """

        def shapes() -> list[Shape]:
            # numbers are read once: later steps wait for nothing
            check_forwards(forwards, self.likelihood, values=self.steps == 0)
            found = [tuple(forward.z.shape) for forward in forwards]
            examples = sum(shape[0] for shape in found)
            check_labels(y, examples)
            check_labels(kept, examples)
            if self.steps == 0:
                self._check_shapes(forwards, y, kept)
            return found

        places = self.reductions.places(shapes, equal=True)
        if self.options.statistics == "gradient":
            self.window.count(sum(place.examples for place in places))
        else:
            self._absorb(forwards, places, y, kept)
        self.window.open(self.steps)

    def _check_shapes(
        self, forwards: Sequence[Watched], y: Tensor | None, kept: Tensor | None
    ) -> None:
        """Refuse labels that do not fit the outputs, before torch's loss does."""
        if kept is not None:
            y = self.likelihood.labels_kept(kept)
        if y is None or y.is_meta:
            return
        started = 0
        for z, _ in forwards:
            stopped = started + len(z)
            self.likelihood.check_labels(z.detach(), y[started:stopped])
            started = stopped

    def _absorb(
        self,
        forwards: Sequence[Watched],
        places: Sequence[Place],
        y: Tensor | None,
        kept: Tensor | None = None,
    ) -> None:
        """Let forward passes join the present observation.

        Args:
            forwards: what was recorded of them.
            places: where their examples stand among those of all ranks; a rank that has fewer
                forward passes than others takes part with nothing.
            y: labels of all their examples, which make the statistics empirical; None for the
                optimizer's own kind.
            kept: which labels the loss keeps; None for all.
        """
        if self.likelihood.summed and (self.window.is_open or len(forwards) > 1):
            raise ValueError(
                "Several forward passes in one step got a loss with reduction='sum', expected "
                "'mean': the scale of their Fisher is not defined; average the loss."
            )
        # labels that are given are those of the data, whatever is drawn otherwise
        kind = self.options.labels if y is None else Empirical()
        if kept is not None:
            # of labels nothing but the places that are ignored is read by the other kinds
            y = self.likelihood.labels_kept(kept)
        if self.likelihood.summed and not self.reductions.ranks.alone:
            raise ValueError(
                "Several processes got a loss with reduction='sum', expected 'mean': their "
                "gradients are averaged; average the loss."
            )
        started = 0
        for index, place in enumerate(places):
            with self.plain_precision(self.device):
                if index < len(forwards):
                    forward = forwards[index]
                    stopped = started + len(forward.z)
                    labels = None if y is None else y[started:stopped]
                    started = stopped
                    found = self._statistics(forward, place, kind, labels)
                else:
                    found = self._no_statistics(place, kind)
                with torch.no_grad():
                    self._join(found, place)

    def _statistics(
        self, forward: Watched, place: Place, kind: Labels, labels: Tensor | None
    ) -> dict[str, Observed]:
        """Those of one forward pass.

        Args:
            forward: what was recorded.
            place: of its examples among those of all ranks.
            kind: which Fisher.
            labels: of its examples.
        """
        found = statistics(
            forward,
            self.layers,
            self.likelihood,
            kind,
            labels,
            self._generator(forward.z.device),
            self.options.dtype,
            self._placements,
            partial(self.reductions.sample, place=place),
        )
        self._check_apart()
        return found

    def _no_statistics(self, place: Place, kind: Labels) -> dict[str, Observed]:
        """Of a forward pass that only other ranks made; its random numbers are drawn here, too."""
        if kind.draws:
            p = self.param_groups[0]["params"][0]
            (shape, *_) = [shape for shape in place.shapes if shape is not None]
            z = torch.zeros(0, *shape[1:], dtype=self.working_dtype(p), device=p.device)
            self.reductions.sample(self.likelihood, z, self._generator(p.device), place)
        return {}

    def _check_apart(self) -> None:
        """Refuse layers of which several processes have statistics that do not add up."""
        if self.reductions.ranks.alone:
            return
        for name, found in self._placements.items():
            if is_shared(found):
                raise ValueError(
                    f"Layer {name!r} has rows that all examples share, expected rows of its "
                    "examples in several processes; leave it to the fallback with layers=[...]."
                )

    def _join(self, found: dict[str, Observed], place: Place) -> None:
        """Let the statistics of one forward pass join the present observation of their layers."""
        if self.options.kl_clip is not None:
            self.step_size.see(found, place.before, place.examples)
        mean = self.options.statistics == "mean"
        if mean:
            found = self.reductions.batch_means(found, self.layers, place)
        contributions = {}
        for name, observed in found.items():
            contributions[name] = self.curvature[name].contribution(observed)
        if not mean:  # those of the mean are of all ranks already
            contributions = self.reductions.contributions(contributions, self._nothing_of)
        for name, new in contributions.items():
            c = self.curvature[name]
            if self._sub_sampled is None:
                self._sub_sampled = c.sub_sampled(new.moments, 1 if mean else place.examples)
            c.absorb(new, self.options.decay)
            self.window.lose(new.ok)

    def _nothing_of(self, name: str) -> Contribution:
        """What a forward pass gives to a layer that it did not use."""
        c = self.curvature[name]
        return c.nothing(self.dtype_of(c.layer), self.device)

    def warm_start(self, data: Any) -> None:
        """Take the statistics of one pass over the data (one per sweep of the approximation) as the
        first moments.

        Args:
            data: (x, y), a DataLoader or an iterable of batches; labels are used for empirical
                statistics only.

        Raises:
            ValueError: for statistics of the training gradient, and for a summed loss in several
                batches.
        """
        if self.options.statistics == "gradient":
            raise ValueError(
                f"{type(self).__name__} reads the gradients of its own steps, expected no warm "
                "start; leave it out."
            )
        sweeps = 1
        for c in self.curvature.values():
            sweeps = max(sweeps, c.approximation.sweeps)
        # a refresh after each, as the next one reads the matrix (EKFAC's basis)
        for _ in range(sweeps):
            self._sweep(data)
            self._refresh()
        self.window.fresh = False

    def _sweep(self, data: Any) -> None:
        """One pass over the data, which replaces the moments."""
        self.window.close()
        for batch in self.reductions.in_step(self.batches(data)):
            forwards, places = self._one_pass(batch)
            if not self.window.is_open:
                # only now: data that cannot be used must not cost what was learnt before
                for c in self.curvature.values():
                    c.restart()
            labels = None
            if self.options.labels.needs_data_labels and batch is not None:
                labels = batch.y
            self._absorb(forwards, places, labels)
            self.window.open(self.steps)
        for c in self.curvature.values():
            c.settle(self.options.decay)
        self.window.close()
        # no step belongs to these examples
        self.step_size.forget()

    def _one_pass(self, batch: Batch | None) -> tuple[list[Watched], list[Place]]:
        """A forward pass of a batch, and its place among those of the other ranks."""
        forwards: list[Watched] = []

        def shapes() -> list[Shape]:
            if batch is None:  # only other ranks have one
                return []
            with watching(self.forward, self.layers) as watched:
                self.forward(batch.inputs)
            check_forwards(watched, self.likelihood)
            forwards.extend(watched)
            return [tuple(forward.z.shape) for forward in watched]

        places = self.reductions.places(shapes, equal=False)
        return forwards, places

    # -- the step ----------------------------------------------------------------------------------
    def update(self, loss: Any) -> None:
        """One step from the gradients in `p.grad`."""
        shares = self.gather()
        if not self.has_gradients(shares):
            return
        ok = self.healthy(shares, loss)
        clip: float | Tensor = 1.0
        if any(share.params for share in shares):
            self._renew(shares, ok)
            for share, prepared in zip(shares, self._buckets, strict=True):
                self.add_decay(share, ok)
                if share.group["momentum_order"] == "before":
                    share.vectors = self.momentum(share, share.vectors, ok)
                precondition(share, prepared)
            clip = self._clip(shares)
        self.apply(shares, ok, clip)

    def _renew(self, shares: Sequence[Share], ok: Tensor) -> None:
        """The present observation is complete; new inverses where they are due."""
        self._check_observed(shares)
        if self.options.statistics == "gradient" and self.window.is_open:
            self._absorb_gradients(shares, ok)
        if self.window.fresh and self._refresh_is_due():
            self._refresh()
        elif self.steps - self._read_at >= TELL_EVERY:
            self._tell_counters()
        self.window.close()
        for c in self.curvature.values():
            c.close()

    def _refresh_is_due(self) -> bool:
        """Early on after every observation, later at multiples of the period."""
        every = self.options.refresh_every
        return self.steps <= every or self.steps % every == 0

    def _check_observed(self, shares: Sequence[Share]) -> None:
        """Refuse to go on without statistics, or with statistics that nobody renews."""
        every = self.options.observe_every
        self.window.check(type(self).__name__, self.steps, every)
        if self.window.is_missed(self.steps, every):
            self.warn(
                f"nothing was observed since step {self.window.observed_at}, expected an "
                f"observation every {every} steps; put every training forward pass inside "
                "`with opt.observing():`, or call opt.attach() once."
            )
        if self.options.statistics == "gradient":
            return
        missing = []
        for share in shares:
            for layer, place in zip(share.layers, share.places, strict=True):
                if place and self.curvature[layer.name].moments is None:
                    missing.append(layer.name)
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(
                f"Layer {names} has a gradient but was never observed, expected it in an observed "
                "forward pass; leave it to the fallback by naming the other layers in "
                "layers=[...]."
            )

    def _clip(self, shares: Sequence[Share]) -> Tensor | float:
        """nu, by which the step is shortened so that lr^2 <p, m> is at most `kl_clip`."""
        if self.options.kl_clip is None:
            return 1.0
        power: float | Tensor = 0.0
        for share in shares:
            if not share.params:
                continue
            lr = share.group["lr"]
            power = power + lr**2 * self._power(share)
        if not isinstance(power, Tensor):
            return 1.0
        # a zero step is not divided by; rounding may leave one below zero
        tiny = torch.finfo(power.dtype).tiny
        power = self.step_size.of(shares, power.abs(), self.reductions.summed)
        power = power.clamp(min=tiny)
        nu = (self.options.kl_clip / power).sqrt()
        return nu.clamp(max=1.0)

    def _power(self, share: Share) -> Tensor:
        """p^T F p of a group as the approximation has it, a 0-d tensor."""
        curvatures = [self.curvature[layer.name] for layer in share.layers]
        exponents = {c.approximation.exponent for c in curvatures}
        inner = share.inner()
        if exponents == {-1}:
            # p = (F + lambda)^-1 m, so that <p, m> is p^T (F + lambda) p
            return inner
        total = torch.zeros_like(inner)
        for index, c in enumerate(curvatures):
            if not share.places[index] or c.matrix is None:
                continue
            p = share.packed(share.directions, index)
            if c.approximation.exponent == -1:
                Fp = share.packed(share.vectors, index)
            else:
                # of a root, whose own product with m is no quadratic form of F
                Fp = c.matrix @ p
            products = p * Fp
            total = total + products.sum()
        return total

    def _absorb_gradients(self, shares: Sequence[Share], ok: Tensor) -> None:
        """The batch-mean gradient of this very step, times the root of its number of examples."""
        examples = self.window.examples
        for share in shares:
            for index, layer in enumerate(share.layers):
                if not share.places[index]:
                    continue
                gradient = share.packed(share.vectors, index)
                W = kept(ok, gradient) * examples**0.5
                stats = of_gradient(W, layer.groups, layer.kernel, layer.bias)
                c = self.curvature[layer.name]
                new = c.contribution(Observed(stats, ok, examples))
                c.absorb(new, self.options.decay)

    # -- refreshes ---------------------------------------------------------------------------------
    def _refresh(self) -> None:
        """Matrices and inverses from the moments; counters come with the same host read."""
        observed = []
        settings = []
        for group in self.method_groups:
            for name in group["layers"]:
                c = self.curvature[name]
                if c.moments is not None:
                    observed.append(c)
                    settings.append(group)
        if not observed:
            return
        self.reductions.check_alike(self.model.parameters(), self.steps)
        shapes = {c.layer.name: c.layer.shape for c in observed}
        owners = self.reductions.owners(shapes, self.options.refresh)
        if owners:
            notes, (skipped, lost) = refresh_dealt(
                observed, settings, self._counters(), owners, self.reductions
            )
        else:
            notes, (skipped, lost) = refresh(observed, settings, self._counters())
        if self._sub_sampled:
            notes.append(self._sub_sampled)
            self._sub_sampled = ""
        self.window.fresh = False
        self._read_at = self.steps
        self._collect()
        self.tell(skipped, lost, notes)

    def _collect(self) -> None:
        """Buckets of layers of equal structure, whose inverses are applied in one product."""
        self._buckets = []
        for group in self.method_groups:
            curvatures = [self.curvature[name] for name in group["layers"]]
            buckets = joined(curvatures, group)
            self._buckets.append(buckets)

    def _counters(self) -> Tensor:
        """Updates skipped and statistics lost so far, `[2]`."""
        counters = torch.zeros(2, device=self.device)
        if self._skipped is not None:
            counters[0] = self._skipped
        if self.window.lost is not None:
            counters[1] = self.window.lost
        return counters

    def _tell_counters(self) -> None:
        """Read the counters between refreshes that are far apart."""
        # dead training must not go on without a word
        self._read_at = self.steps
        counters = self._counters()
        if not counters.is_meta:
            skipped, lost = counters.tolist()
            self.tell(skipped, lost, [])

    # -- checkpoints -------------------------------------------------------------------------------
    def own_state(self) -> dict[str, Any]:
        """Periods, pending windows, and every layer's moments, matrix and inverse."""
        layers = {}
        for name, c in self.curvature.items():
            layers[name] = c.state()
        return {
            **self.window.state(),
            "step_size": self.step_size.state(),
            "layers": layers,
        }

    def load_own_state(self, saved: dict[str, Any]) -> None:
        """The inverse of `own_state`."""
        self.window = Window.of_state(saved, self.device)
        dtype = self.working_dtype(self.param_groups[0]["params"][0])
        self.step_size = StepSize.of_state(saved.get("step_size"), self.device, dtype)
        self._read_at = self.steps
        for name, c in self.curvature.items():
            p = next(iter(c.layer.parameters.values()))
            own = saved["layers"][name]
            c.load(own, p.device, self.dtype_of(c.layer))
        self._collect()

    def method_of(self, name: str) -> str:
        """What is done to a layer, in words."""
        c = self.curvature[name]
        label = c.approximation.label
        if c.jitter:
            label += f", jitter {c.jitter:g}"
        return label

    def troubles(self) -> dict[str, int]:
        """Counters of what went wrong; reads them from the device."""
        troubles = super().troubles()
        troubles["non-finite layer statistics dropped"] = as_int(self.window.lost)
        return troubles

    # -- what is used ------------------------------------------------------------------------------
    def matrices(self) -> dict[str, FisherMatrix]:
        """The undamped matrices that the steps use, by layer: averaged, of the last refresh."""
        found = {}
        for name, c in self.curvature.items():
            if c.matrix is not None:
                found[name] = c.matrix
        if not found:
            raise ValueError(
                "Nothing was observed yet, expected at least one step; train or call warm_start "
                "first."
            )
        return found

    def compare(self, data: Any, **options: Any) -> Comparison:
        """Errors of `matrices()` against the exact Fisher at the present weights, of a copy in
        evaluation mode.

        Args:
            data: as in `fl.compare`.
            **options: further arguments of `fl.compare`.
        """
        labels = []
        for c in self.curvature.values():
            if c.approximation.label not in labels:
                labels.append(c.approximation.label)
        label = " | ".join(labels)
        about = {
            "optimizer": type(self).__name__,
            "step": self.steps,
            "statistics": self.options.statistics,
            "labels": self.options.fisher,
        }
        matrices = self.matrices()
        options = {"output": self.forward.output, **options}
        return compare_in_use(
            self.model,
            self.likelihood,
            data,
            label,
            matrices,
            about,
            options,
            self.reductions,
        )


def _check_factors(statistics: Statistics, curvature: Mapping[str, LayerCurvature]) -> None:
    """Refuse batch means for an approximation that needs inputs and output gradients apart."""
    if statistics == "per_example":
        return
    for c in curvature.values():
        if c.approximation.needs_factors:
            raise ValueError(
                f"{c.approximation.label} needs layer inputs and output gradients apart, got "
                f'statistics={statistics!r}, expected "per_example".'
            )
