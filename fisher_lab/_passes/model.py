"""The model as a pure function: an evaluation copy, per-example gradients and directional derivatives by torch.func.

Nothing here knows of layers or hooks, so that it can check what `capture` does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm

NOT_FINITE = "The model returned NaN or infinite outputs, expected finite ones; check inputs and parameters."


def evaluation_copy(model: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None) -> nn.Module:
    """A copy of the model in `dtype`, its gradients dropped; the model itself is not touched.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: a parallel wrapper, inference mode, NaN or infinite parameters, or modules in a mode in which
            examples interact or are random.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Got a {type(model).__name__} as model, expected a torch.nn.Module.")
    model = getattr(model, "_orig_mod", model)  # a compiled model is measured as what it compiles
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"Got a {type(model).__name__} as model, expected the module inside; pass model.module.")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Got a call under torch.inference_mode(), expected gradients to be possible; call it outside, or use "
            "torch.no_grad()."
        )
    check_mode(model)
    if str(device) == "meta" or any(p.is_meta for p in model.parameters()):
        raise ValueError("Got the device meta, which holds no numbers, expected another; load the model there.")
    for name, p in model.named_parameters():
        if not isinstance(p, nn.parameter.UninitializedParameter) and not bool(torch.isfinite(p).all()):
            raise ValueError(
                f"Parameter {name!r} has NaN or infinite values, expected finite ones; check the training."
            )
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"Got dtype={dtype!r}, expected torch.float64 or torch.float32.")
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The model cannot be copied ({str(error).splitlines()[0]}), expected a module that copy.deepcopy accepts; "
            "drop tensors with a graph, locks and handles from it, and use torch.nn.utils.parametrizations instead of "
            "the old weight_norm."
        ) from error
    for p in twin.parameters():
        p.grad = None
    try:
        return twin.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Got device={device!r} ({reason}), expected a device of this machine.") from error


def check_mode(model: nn.Module) -> None:
    """Refuse modules that couple or randomise examples in their present mode."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"Module {name!r} ({kind}) uses batch statistics, in which examples interact, expected evaluation "
                "mode; call model.eval() first (and track running statistics)."
            )
        changing = isinstance(module, _InstanceNorm) and module.track_running_stats
        if module.training and (changing or isinstance(module, _SpectralNorm)):
            raise ValueError(
                f"Module {name!r} ({kind}) changes its buffers with every call in training mode, expected evaluation "
                "mode; call model.eval() first."
            )
        dropout = getattr(module, "dropout", 0.0)
        random = (isinstance(module, _DropoutNd) and module.p > 0) or (isinstance(dropout, float) and dropout > 0)
        if module.training and (random or isinstance(module, nn.RReLU)):
            raise ValueError(
                f"Module {name!r} ({kind}) is random in training mode, expected evaluation mode; "
                "call model.eval() first."
            )


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave torch's global random state as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def probe(model: nn.Module, x: Tensor) -> Any:
    """The model's output for the first example of x `[N, ...]`.

    Raises:
        ValueError: if the model cannot take it.
    """
    try:
        with torch.no_grad():
            return model(x[:1].clone())
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The model failed on one example of shape {tuple(x[:1].shape)} and type {x.dtype} ({reason}), expected "
            "inputs that it takes; check the data (x.float() for integers that are numbers)."
        ) from error


@contextmanager
def plain_kernels() -> Iterator[None]:
    """No fused attention: its fast path leaves out the modules inside, and its kernels have no second derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def label_seed(seed: int, batch: int) -> int:
    """Seed of the labels sampled for one batch: the same in every pass and every way to compute."""
    return (seed * 1_000_003 + batch) % 2**63


def sample_labels(model: nn.Module, draw: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    """Labels `draw(z)` for the outputs z of all examples x `[N, ...]`, sampled in one go whatever the chunk size."""
    with torch.no_grad():
        return draw(torch.cat([model(part.clone()) for part in x.split(chunk)]))


def per_example_gradients(model: nn.Module, names: list[str], x: Tensor, S: Tensor) -> dict[str, Tensor]:
    """S_rn^T J_n for the named parameters: `{name: [R, N, *shape]}`, by vmap of vjp.

    Where an operation cannot be vectorised (recurrent layers, branches on data), example by example.

    Args:
        model: the model, acting per example.
        names: parameter names.
        x: inputs `[N, ...]`.
        S: output columns `[R, N, *output]`.
    """
    chosen, call = _pure(model, names)

    def pull_back(example: Tensor) -> Any:
        def output(params: dict[str, Tensor]) -> Tensor:
            return call(params, example.unsqueeze(0)).squeeze(0)

        return vjp(output, chosen)[1]

    def one_example(example: Tensor, columns: Tensor) -> dict[str, Tensor]:
        pull = pull_back(example)
        return vmap(lambda s: pull(s)[0])(columns)

    with plain_kernels(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes that an operation is vectorised by a loop
        try:
            return vmap(one_example, in_dims=(0, 1), out_dims=1, randomness="error")(x, S)
        except RuntimeError:
            rows = [[pull(s)[0] for s in S[:, n]] for n, pull in enumerate(map(pull_back, x))]
    return {name: torch.stack([torch.stack([g[name] for g in row]) for row in rows], 1) for name in chosen}


Output = Callable[[dict[str, Tensor]], Tensor]
SMALL = 10**8  # examples times parameters up to which reverse mode twice takes no time


def directional_derivative(model: nn.Module, V: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Output z `[N, *output]` and its derivative J V `[N, *output]` in the direction V of the named parameters.

    In forward mode, whose first use loads modules for two seconds; small models derive the gradient again instead, and
    so do operations without forward mode.
    """
    chosen, call = _pure(model, list(V))

    def output(params: dict[str, Tensor]) -> Tensor:
        return call(params, x)

    first, second = _forward_mode, _reverse_mode
    if x.shape[0] * sum(p.numel() for p in model.parameters()) <= SMALL:
        first, second = second, first
    try:
        return first(output, chosen, V)
    except (NotImplementedError, RuntimeError):
        return second(output, chosen, V)


def _forward_mode(output: Output, chosen: dict[str, Tensor], V: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with plain_kernels(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of the first use of forward mode
        derived = jvp(output, (chosen,), (V,))
        return derived[0], derived[1]


def _reverse_mode(output: Output, chosen: dict[str, Tensor], V: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with plain_kernels(), torch.enable_grad():
        params = {name: p.clone().requires_grad_() for name, p in chosen.items()}
        z = output(params)
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, list(params.values()), u, create_graph=True)
        inner = torch.stack([(g * V[name]).sum() for name, g in zip(params, pulled, strict=True)]).sum()
        return z.detach(), torch.autograd.grad(inner, u)[0]


def _pure(
    model: nn.Module, names: list[str]
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """The named parameters, and the model as a function of them and of x `[N, ...]`.

    Parameters and buffers that modules share are passed under all their names: torch's own tying leaves tensors behind
    where one module has two names. The input is copied, since the first operation may work in place.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}  # by identity: the name in model.named_parameters()
    shared: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            if tensor is not None and first.setdefault(id(tensor), name) == name:
                tensors[name] = tensor.detach()
            elif tensor is not None:
                shared[name] = first[id(tensor)]
    chosen = {name: tensors.pop(name) for name in names}

    def call(params: dict[str, Tensor], x: Tensor) -> Tensor:
        known = tensors | params
        everything = known | {name: known[source] for name, source in shared.items()}
        return functional_call(model, everything, (x.clone(),), tie_weights=False)

    return chosen, call
