"""The user's model: an evaluation copy, how it is called, and what of its output is z."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fisher_lab._ground.arguments import check_kind
from fisher_lab._ground.tolerances import agreement, agreement_inside
from fisher_lab._passes.batches import Batch, Inputs, leading, mapped
from fisher_lab._passes.labels import Outputs

NOT_FINITE = (
    "The model returned NaN or infinite outputs, expected finite ones; check inputs and parameters."
)

REENTRANT = (
    "The model checkpoints activations with use_reentrant=True, expected a graph that can be "
    "derived in parts; use checkpoint(..., use_reentrant=False)."
)


def evaluation_copy(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None
) -> nn.Module:
    """A copy of the model in `dtype`, its gradients dropped; the model itself is not touched.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: a parallel wrapper, inference mode, NaN or infinite parameters, or modules in a
            mode in which examples interact or are random.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Got a {type(model).__name__} as model, expected a torch.nn.Module.")
    model = getattr(model, "_orig_mod", model)  # a compiled model is measured as what it compiles
    for module in model.modules():
        check_program(module)
    _check_real(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"Got a {type(model).__name__} as model, expected the module inside; pass model.module."
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Got a call under torch.inference_mode(), expected gradients to be possible; call it "
            "outside, or use torch.no_grad()."
        )
    check_mode(model)
    if str(device) == "meta" or any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "Got the device meta, which holds no numbers, expected another; load the model there."
        )
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            continue
        finite = torch.isfinite(p).all()
        if not bool(finite):
            raise ValueError(
                f"Parameter {name!r} has NaN or infinite values, expected finite ones; check the "
                "training."
            )
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"Got dtype={dtype!r}, expected torch.float64 or torch.float32.")
    _check_copyable(model)
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The model cannot be copied ({str(error).splitlines()[0]}), expected a module that "
            "copy.deepcopy accepts; drop tensors with a graph, locks and handles from it, and use "
            "torch.nn.utils.parametrizations instead of the old weight_norm."
        ) from error
    for p in twin.parameters():
        p.grad = None
    try:
        return twin.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Got device={device!r} ({reason}), expected a device of this machine."
        ) from error


def check_program(module: nn.Module) -> None:
    """Refuse a compiled program, which has no modules to hook."""
    if isinstance(module, torch.jit.ScriptModule):
        found = "scripted or traced"
    elif isinstance(module, torch.fx.GraphModule) and hasattr(module, "_guards_fn"):
        found = "exported"
    else:
        return
    raise ValueError(
        f"Got a model that was {found}, expected the module it was made from, whose layers can be "
        "hooked; pass that module."
    )


def _check_real(model: nn.Module) -> None:
    """Refuse complex parameters."""
    for name, p in model.named_parameters():
        if p.is_complex():
            raise ValueError(
                f"Parameter {name!r} is complex, expected real ones: the Fisher of complex "
                "parameters is not defined here; keep real and imaginary part as two parameters."
            )


def _check_copyable(model: nn.Module) -> None:
    """Refuse modules whose parameter was replaced by a tensor computed from others before forward,
    which torch cannot copy.
    """
    for name, module in model.named_modules():
        for key in ("weight", "bias"):
            tensor = vars(module).get(key)
            if not isinstance(tensor, Tensor) or tensor.grad_fn is None:
                continue
            cure = "use torch.nn.utils.parametrizations instead of the old spectral or weight norm"
            if f"{key}_mask" in module._buffers:
                cure = f"make it permanent with torch.nn.utils.prune.remove(module, {key!r})"
            raise ValueError(
                f"Module {name!r} ({type(module).__name__}) computes its {key} from other tensors "
                f"in a hook, expected a parameter, as the model cannot be copied; {cure}."
            )


def check_mode(model: nn.Module) -> None:
    """Refuse modules that couple or randomise examples in their present mode."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        untracked = getattr(module, "running_mean", None) is None
        if isinstance(module, _BatchNorm) and (module.training or untracked):
            raise ValueError(
                f"Module {name!r} ({kind}) uses batch statistics, in which examples interact, "
                "expected evaluation mode; call model.eval() first (and track running statistics)."
            )
        changing = isinstance(module, _InstanceNorm) and module.track_running_stats
        if module.training and (changing or isinstance(module, _SpectralNorm)):
            raise ValueError(
                f"Module {name!r} ({kind}) changes its buffers with every call in training mode, "
                "expected evaluation mode; call model.eval() first."
            )
        if module.training and _is_random(module):
            raise ValueError(
                f"Module {name!r} ({kind}) is random in training mode, expected evaluation mode; "
                "call model.eval() first."
            )


def _is_random(module: nn.Module) -> bool:
    """Whether a module draws in training mode: dropout, also as an option of others, or RReLU."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return True
    dropout = getattr(module, "dropout", 0.0)
    return isinstance(dropout, float) and dropout > 0


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave torch's global random state as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


Output = str | int | Callable[[Any], Tensor]


@dataclass(frozen=True)
class Forward:
    """The model as a function of the inputs of a batch.

    Attributes:
        module: the model.
        output: what of its output is z: a name (an attribute or a key), an index, a function of it,
            or None for a tensor itself, or what has `logits` (the outputs of the transformers
            library).
        inside: the lowest precision in which the forward pass computes, as far as it is known (see
            `lowest_precision`).
    """

    module: nn.Module
    output: Output | None = None
    inside: torch.dtype | None = None

    def agreement(self, dtype: torch.dtype) -> float:
        """Relative deviation up to which two ways to compute outputs or gradients of that type
        agree.
        """
        if self.inside is None:
            return agreement(dtype)
        return agreement_inside(dtype, self.inside)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The output z `[N, *output]`; the inputs are copied, since the first operation may work in
        place.
        """
        copies = mapped(inputs, Tensor.clone)
        args, kwargs = arguments(copies)
        return self.picked(self.module(*args, **kwargs))

    def of_tensors(self, tensors: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """The output as a function of all parameters and buffers, by name."""
        copies = mapped(inputs, Tensor.clone)
        args, kwargs = arguments(copies)
        found = functional_call(self.module, tensors, args, kwargs, tie_weights=False)
        return self.picked(found)

    def picked(self, found: Any) -> Tensor:
        """z of what the model returned.

        Raises:
            TypeError: if `output` names nothing in it, or what it names is no tensor.
        """
        if self.output is None:
            return default_output(found)
        try:
            z = _picked(found, self.output)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise TypeError(
                f"The model returned a {type(found).__name__} without output={self.output!r}, "
                "expected one that has it; give the name, the index or a function of the output."
            ) from error
        if not isinstance(z, Tensor):
            raise TypeError(
                f"output={self.output!r} of the model is a {type(z).__name__}, expected a tensor "
                "[N, *output]; name another part of its output."
            )
        return z


def default_output(found: Any) -> Any:
    """A tensor as it is, or the `logits` of what has them (the outputs of the transformers
    library).
    """
    if isinstance(found, Tensor):
        return found
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return found


def _picked(found: Any, output: Output) -> Any:
    if not callable(output):
        check_kind("output", output, (str, int), "a name, an index or a function of the output")
    if callable(output):
        return output(found)
    if isinstance(output, str) and not isinstance(found, Mapping):
        return getattr(found, output)
    return found[output]


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments that inputs stand for."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


class _Precisions(TorchDispatchMode):
    """Notes the floating types of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        several = isinstance(result, tuple | list)
        for tensor in result if several else [result]:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.numel() > 1:  # single numbers are constants more often than results
                self.found.add(tensor.dtype)
        return result


def lowest_precision(forward: Forward, batch: Batch, dtype: torch.dtype) -> torch.dtype:
    """The lowest precision in which the model really computes for an example, whatever its
    parameters are.

    Args:
        forward: the model.
        batch: some examples.
        dtype: precision of the model.
    """
    one = batch.part(slice(0, 1)).inputs
    with torch.no_grad(), plain_kernels(), _Precisions() as seen:
        forward(one)
    lowest = dtype
    for kind in seen.found:
        if torch.finfo(kind).eps > torch.finfo(lowest).eps:
            lowest = kind
    return lowest


def probe(forward: Forward, batch: Batch) -> Tensor:
    """The model's output for the first example of a batch.

    Raises:
        ValueError: if the model cannot take it.
    """
    one = batch.part(slice(0, 1)).inputs
    try:
        with torch.no_grad():
            return forward(one)
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        if "does not require grad" in reason:
            raise ValueError(
                "The model derives inside its forward pass (torch.autograd.grad), expected a plain "
                "function of its inputs: hooks do not see how weights act through derivatives; "
                "measure the network inside by itself."
            ) from error
        x = leading(one)
        raise ValueError(
            f"The model failed on one example of shape {tuple(x.shape)} and type {x.dtype} "
            f"({reason}), expected inputs that it takes; check the data (x.float() for integers "
            "that are numbers)."
        ) from error


def outputs_of(forward: Forward, batch: Batch, output: tuple[int, ...], chunk: int) -> Outputs:
    """The outputs of a batch, computed `chunk` examples at a time.

    Args:
        forward: the model.
        batch: the examples.
        output: shape of an example's output.
        chunk: most examples in a forward pass.
    """

    def compute(some: slice) -> Tensor:
        pieces = []
        for start in range(some.start, some.stop, chunk):
            stop = min(start + chunk, some.stop)
            part = batch.part(slice(start, stop))
            with torch.no_grad():
                z = forward(part.inputs).detach()  # models may switch gradients on
            pieces.append(z)
        return torch.cat(pieces)

    return Outputs(batch.N, math.prod(output), compute)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """No fused attention: its fast path leaves out the modules inside, and its kernels have no
    second derivative.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
