"""What every optimizer of this package shares.

Layers and groups, the fallback, momentum, weight decay, the guarded step, checkpoints.
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fisher_lab._ground.arguments import check_kind, shown
from fisher_lab._ground.linalg import kept
from fisher_lab._ground.memory import budget_bytes
from fisher_lab._passes.batches import Batch, Batches
from fisher_lab._passes.model import Forward, Output, check_program
from fisher_lab.layers import Layer
from fisher_lab.optim.describing import (
    describe_fallback,
    describe_groups,
    describe_troubles,
    told,
)
from fisher_lab.optim.fallback import gradients_of, make_fallback, step_fallback
from fisher_lab.optim.finite import all_finite, as_int, count_failure, where_ok
from fisher_lab.optim.groups import choose_layers, make_groups
from fisher_lab.optim.observation import statistics_dtype
from fisher_lab.optim.options import Option, Options, Settings
from fisher_lab.optim.reductions import reductions_of
from fisher_lab.optim.saving import copied
from fisher_lab.optim.vectors import Share

# of what `state_dict` holds beside torch's state: 1 did not know the sizes of its observations
VERSION = 2


class LayerOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose groups are layers; all parameters without adapter go to AdamW.

    A step with a non-finite loss, gradient or update changes nothing (by `torch.where`, without a
    host read).

    Args:
        model: the model.
        options: what holds for all layers.
        settings: defaults of every group.
        layers: names of layers to treat, None for all.
        groups: `[{"layers": names, setting: value, ...}]`; all other layers are one group with the
            defaults.
        output: what of the model's output is z; see `Forward`.

    Attributes:
        forward: the model, and what of its output is z.
    """

    # GradScaler hands over its scale and its found_inf instead of reading it
    _step_supports_amp_scaling = True
    _registry: ClassVar[dict[str, type[LayerOptimizer]]] = {}

    needs_closure: ClassVar[bool] = False  # whether `step` calls its closure more than once
    own_key: ClassVar[str] = ""  # what every `own_state` of its kind holds
    group_extras: ClassVar[tuple[str, ...]] = ()  # what a group may name beside layers and settings

    options: Options
    decay = Option()
    dtype = Option()
    seed = Option()

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not register:
            return
        name = cls.__name__
        known = LayerOptimizer._registry.get(name)
        if known is not None:
            _check_free(name, known.__module__, cls.__module__)
        LayerOptimizer._registry[name] = cls

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        settings: Settings,
        layers: Sequence[str] | None,
        groups: Sequence[dict[str, Any]] | None,
        output: Output | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            found = type(model).__name__
            raise TypeError(
                f"Got a {found} as model, expected a torch.nn.Module, not its parameters."
            )
        self.model: nn.Module = _inside(model)
        check_program(self.model)
        self.forward = Forward(self.model, output)
        self.options = options
        self.layers = choose_layers(self.model, layers)
        self.steps = 0
        self.generator: torch.Generator | None = None
        self._generator_state: Tensor | None = None
        self._skipped: Tensor | None = None  # updates, a 0-d tensor
        self._told = (0.0, 0.0)  # updates skipped and statistics lost, of which the user was warned
        self._complete = False
        made = make_groups(self.layers, settings, groups, self.group_extras)
        super().__init__(made, settings.as_group())
        self.fallback = self._fallback()
        self.reductions = reductions_of(self.device, self.dtype_of)
        # dynamo does not guard an optimizer's attributes: a compiled step would keep using those of
        # its first call (the plain function, as a bound method would be a cycle that keeps the
        # memory after the last reference)
        plain_step = type(self)._step
        self._run = torch.compiler.disable(plain_step)
        self._complete = True

    # -- layers and groups -------------------------------------------------------------------------
    def _fallback(self) -> torch.optim.AdamW | None:
        """AdamW for all parameters that no layer covers; None if there are none."""
        covered: set[nn.Parameter] = set()
        for layer in self.layers.values():
            own = layer.parameters
            covered.update(own.values())
        rest = []
        for p in self.model.parameters():
            if p not in covered:
                rest.append(p)
        if not rest:
            return None
        fallback = make_fallback(rest, self.options.fallback_lr)
        # schedulers and checkpoints see one optimizer: its group is our last, its state is ours
        (group,) = fallback.param_groups
        self.param_groups.append(group)
        fallback.state = self.state
        return fallback

    @property
    def method_groups(self) -> list[dict[str, Any]]:
        """The parameter groups without the fallback's."""
        found = []
        for group in self.param_groups:
            if "layers" in group:
                found.append(group)
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are given at construction, by layer."""
        if getattr(self, "_complete", False):
            raise ValueError(
                "Got a new parameter group, expected groups=[...] at construction; build a new "
                "optimizer."
            )
        super().add_param_group(param_group)

    # -- precision, randomness, data ---------------------------------------------------------------
    def working_dtype(self, p: Tensor) -> torch.dtype:
        """Precision of everything that belongs to a parameter."""
        return statistics_dtype(p.dtype, self.options.dtype)

    def dtype_of(self, layer: Layer) -> torch.dtype:
        """Precision of a layer's moments and inverse."""
        first = next(iter(layer.parameters.values()))
        return self.working_dtype(first)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        first = self.param_groups[0]["params"][0]
        return first.device

    @staticmethod
    def plain_precision(device: torch.device) -> AbstractContextManager[Any]:
        """No autocast: statistics and steps are computed in the working precision."""
        if device.type == "meta":
            return nullcontext()
        return torch.autocast(device.type, enabled=False)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """The source of sampled labels, on the device of the outputs."""
        # nothing is drawn on meta
        if device.type == "meta":
            return None
        if self.generator is None:
            self.generator = torch.Generator(device)
            self.generator.manual_seed(self.options.seed)
            if self._generator_state is not None:
                self.generator.set_state(self._generator_state)
        return self.generator

    def batches(self, data: Any) -> Iterator[Batch]:
        """The data in batches, on the parameters' device and in their type."""
        p = self.param_groups[0]["params"][0]
        memory = budget_bytes()
        yield from Batches(data, p.dtype, p.device, memory)

    # -- the step ----------------------------------------------------------------------------------
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from `p.grad`; a closure, if given, is called first, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            TypeError: for a closure that cannot be called.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                f"Got closure={shown(closure)}, expected a function without arguments that returns "
                "the loss, or None."
            )
        return self._run(self, closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), self.plain_precision(self.device):
            self.update(loss)
        self.steps += 1
        return loss

    @abstractmethod
    def update(self, loss: Any) -> None:
        """Change the parameters."""

    def gather(self, names: Container[str] | None = None) -> list[Share]:
        """The gradients of every group, in working precision and unscaled.

        Args:
            names: layers that take part; None for all.
        """
        scale = getattr(self, "grad_scale", None)
        shares = []
        for group in self.method_groups:
            layers = []
            for name in group["layers"]:
                takes_part = names is None or name in names
                if takes_part:
                    layers.append(self.layers[name])
            share = Share.gather(group, layers, self.working_dtype, scale)
            shares.append(share)
        return shares

    def has_gradients(self, shares: Sequence[Share]) -> bool:
        """Whether any parameter has a gradient, of the layers or of the fallback."""
        of_layers = any(share.params for share in shares)
        return of_layers or bool(gradients_of(self.fallback))

    def healthy(self, shares: Sequence[Share], loss: Any) -> Tensor:
        """Whether loss and all gradients are finite, a 0-d tensor."""
        found: list[Tensor] = []
        for share in shares:
            found += share.vectors
        found += gradients_of(self.fallback)
        ok = all_finite(found)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            ok = ok & (found_inf == 0)
        if isinstance(loss, Tensor):
            finite = torch.isfinite(loss.detach())
            # a loss is each rank's own; gradients are averaged, and finite on all or on none
            ok = self.reductions.all_ok(ok & finite.all())
        return ok

    @staticmethod
    def add_decay(share: Share, ok: Tensor) -> None:
        """Coupled weight decay joins the gradients; they are zero where not ok."""
        decay = share.group["weight_decay"]
        decoupled = share.group["decoupled"]
        if decay and share.params and not decoupled:
            added = torch._foreach_add(share.vectors, share.params, alpha=decay)
            share.vectors = list(added)
        share.vectors = [kept(ok, g) for g in share.vectors]

    def momentum(self, share: Share, new: list[Tensor], ok: Tensor) -> list[Tensor]:
        """m <- momentum m + new, in place; m stays as it is where not ok (then `new` is zero).

        Args:
            share: whose parameters these are.
            new: one vector for each.
            ok: whether the step is made.
        """
        rate = share.group["momentum"]
        if not rate or not share.params:
            return new
        buffers = []
        for p, x in zip(share.params, new, strict=True):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(x)
            buffers.append(state["momentum_buffer"])
        factor = where_ok(ok, rate, 1.0, buffers[0].dtype)
        torch._foreach_mul_(buffers, factor)
        torch._foreach_add_(buffers, new)
        return buffers

    def apply(self, shares: Sequence[Share], ok: Tensor, clip: float | Tensor) -> None:
        """W <- W - lr clip p in all groups, and a step of the fallback.

        Args:
            shares: of the groups.
            ok: whether anything may change; nor does it where a direction is not finite.
            clip: factor of all steps.
        """
        directions: list[Tensor] = []
        for share in shares:
            directions += share.directions
        if directions:
            ok = ok & all_finite(directions)
        for share in shares:
            if share.params:
                self._move(share, ok, clip)
        if self.fallback is not None:
            scale = getattr(self, "grad_scale", None)
            step_fallback(self.fallback, ok, scale)
        self._skipped = count_failure(self._skipped, ok)

    def _move(self, share: Share, ok: Tensor, clip: float | Tensor) -> None:
        """The part of `apply` of one group; the directions are used up."""
        group = share.group
        rate = -group["lr"]
        found = [kept(ok, d) for d in share.directions]
        dtype = found[0].dtype
        if group["momentum_order"] == "after" and group["momentum"]:
            if isinstance(clip, Tensor):
                torch._foreach_mul_(found, clip)
            buffers = self.momentum(share, found, ok)
            # the buffers hold earlier directions too: where not ok they must not move anything
            factor = where_ok(ok, rate, 0.0, dtype)
            found = list(torch._foreach_mul(buffers, factor))
            rate = 1.0
        elif isinstance(rate * clip, Tensor):
            torch._foreach_mul_(found, rate * clip)
            rate = 1.0
        if group["weight_decay"] and group["decoupled"]:
            left = 1 - group["lr"] * group["weight_decay"]
            factor = where_ok(ok, left, 1.0, dtype)
            torch._foreach_mul_(share.params, factor)
        torch._foreach_add_(share.params, found, alpha=rate)

    # -- what is told ------------------------------------------------------------------------------
    def tell(self, skipped: float, lost: float, notes: list[str]) -> None:
        """Warn of what went wrong since the last refresh."""
        skipped_before, lost_before = self._told
        self._told = (skipped, lost)
        sentences = told(skipped - skipped_before, lost - lost_before, notes)
        if sentences:
            self.warn("; ".join(sentences) + ".")

    def warn(self, sentence: str) -> None:
        """A RuntimeWarning that points at the user's own line."""
        name = type(self).__name__
        message = f"{name}, step {self.steps}: {sentence}"
        warnings.warn(message, RuntimeWarning, stacklevel=_level_of_caller())

    def troubles(self) -> dict[str, int]:
        """Counters of what went wrong; reads them from the device."""
        return {"updates skipped as non-finite": as_int(self._skipped)}

    def __repr__(self) -> str:
        methods = {}
        for name in self.layers:
            methods[name] = self.method_of(name)
        lines = [f"{type(self).__name__}, step {self.steps}"]
        lines += describe_groups(self.method_groups, self.layers, methods)
        if self.fallback is not None:
            (group,) = self.fallback.param_groups
            lines += describe_fallback(group, self.model)
        troubles = self.troubles()
        lines += describe_troubles(troubles)
        return "\n".join(lines)

    def method_of(self, name: str) -> str:
        """What is done to a layer, in words."""
        raise NotImplementedError

    # -- checkpoints -------------------------------------------------------------------------------
    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """Everything beside torch's state, as plain containers."""

    @abstractmethod
    def load_own_state(self, saved: dict[str, Any]) -> None:
        """The inverse of `own_state`."""

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"A {type(self).__name__} belongs to its model and cannot be copied or pickled, "
            "expected its state; use state_dict() and load_state_dict()."
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit by bit; loads with `torch.load(weights_only=True)`."""
        generator = self._generator_state
        if self.generator is not None:
            generator = self.generator.get_state()
        own = {
            "version": VERSION,
            "steps": self.steps,
            "generator": generator,
            "skipped": self._skipped,
            "told": self._told,
        }
        own.update(self.own_state())
        return {**super().state_dict(), "fisher_lab": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on the parameters' devices and in working precision.

        Raises:
            ValueError: a state of another optimizer, of other layers, or of a later version.
        """
        self._check_state(state_dict)
        own = state_dict["fisher_lab"]
        super().load_state_dict(state_dict)
        self._load_momentum(state_dict)
        if self.fallback is not None:
            # torch has made new groups; the fallback's is the last
            self.fallback.param_groups = self.param_groups[-1:]
            self.fallback.state = self.state
        self.steps = own["steps"]
        self.generator = None
        self._generator_state = copied(own["generator"], torch.device("cpu"))
        self._skipped = copied(own["skipped"], self.device)
        self._told = own["told"] or (0.0, 0.0)
        self.load_own_state(own)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of something else."""
        check_kind("state_dict", state_dict, dict, "what opt.state_dict() returned")
        own = state_dict.get("fisher_lab")
        saved = None
        # torch's own optimizers have nothing of this, other methods other things
        if own is not None and (not self.own_key or self.own_key in own):
            saved = _layers_of(state_dict["param_groups"])
        if saved != _layers_of(self.param_groups):
            raise ValueError(
                f"The state is not one of a {type(self).__name__} with these layers and groups, "
                "expected one; build the optimizer with the same arguments as the one that was "
                "saved."
            )
        assert own is not None
        version = own.get("version", 1)
        if version > VERSION:
            raise ValueError(
                f"Got a state of version {version}, expected {VERSION} or an earlier one; install "
                "the fisher_lab that wrote it, or a later one."
            )

    def _load_momentum(self, state_dict: dict[str, Any]) -> None:
        """Momentum in its own precision, where torch casts it to the parameter's."""
        states = state_dict["state"]
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            # a checkpoint knows parameters by their number
            for number, p in zip(saved["params"], group["params"], strict=True):
                state = states.get(number, {})
                buffer = state.get("momentum_buffer")
                if buffer is None:
                    continue
                dtype = self.working_dtype(p)
                self.state[p]["momentum_buffer"] = buffer.to(p.device, dtype, copy=True)


def _layers_of(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """The names of the layers of every group; None for the fallback's."""
    return [group.get("layers") for group in groups]


def registry() -> dict[str, type[LayerOptimizer]]:
    """Every optimizer by name, in order of definition, built as `cls(model, likelihood,
    lr, ...)`.
    """
    return dict(LayerOptimizer._registry)


def _level_of_caller() -> int:
    """`stacklevel` of the first line outside of fisher_lab and torch."""
    frame = inspect.currentframe()
    level = 0
    # counted, as torch's wrappers of `step` come and go
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package, _, _ = module.partition(".")
        if package not in ("fisher_lab", "torch"):
            break
        frame = frame.f_back
        level += 1
    return level


def _check_free(name: str, owner: str, module: str) -> None:
    """Refuse to give a name of the library's to another optimizer; a user's own may be defined
    anew.

    Args:
        name: of the class.
        owner: module of the optimizer of that name.
        module: of the new one.
    """
    if owner.startswith("fisher_lab.") and owner != module:
        raise ValueError(
            f"An optimizer named {name} is part of fisher_lab ({owner}), expected a new name; "
            "rename the class."
        )


def _inside(model: nn.Module) -> nn.Module:
    """The module inside a compiled or a parallel one."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    if isinstance(original, nn.DataParallel):
        raise ValueError(
            "Got a model in nn.DataParallel, expected one process for each device; wrap it in "
            "DistributedDataParallel."
        )
    if torch.distributed.is_available() and isinstance(
        original, nn.parallel.DistributedDataParallel
    ):
        return _inside(original.module)
    for name, p in original.named_parameters():
        # DTensors, told without loading what defines them
        if hasattr(p, "device_mesh") or type(original).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"Got a model whose parameter {name!r} is sharded over several processes, expected "
                "whole ones on each; use DistributedDataParallel."
            )
    return original
