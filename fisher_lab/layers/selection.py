"""Which modules of a model are layers, and which adapter understands them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter

from fisher_lab.layers.base import Layer


@dataclass(frozen=True)
class Selection:
    """Adapters by layer name, and what was left out with the reason."""

    layers: dict[str, Layer]
    left_out: dict[str, str] = field(default_factory=dict)


def select(
    model: nn.Module, names: Sequence[str] | None = None, on_unknown: Literal["error", "skip"] = "error"
) -> Selection:
    """Adapters for the named modules, or for every module that owns trainable parameters.

    Args:
        model: the model.
        names: module names as in `model.named_modules()`; None for all.
        on_unknown: "error" refuses modules that no adapter understands, "skip" leaves them out and says so.

    Raises:
        ValueError: unknown names or options, nothing to measure, a module that no adapter understands.
    """
    if on_unknown not in ("error", "skip"):
        raise ValueError(f'Got on_unknown={on_unknown!r}, expected "error" or "skip".')
    modules = dict(model.named_modules())
    chosen = _choose(modules, names)
    layers: dict[str, Layer] = {}
    left_out: dict[str, str] = {}
    for name in chosen:
        found = adapt(name, modules[name])
        if isinstance(found, str):
            if on_unknown == "error":
                raise ValueError(found)
            left_out[name] = found
            continue
        layers[name] = found
        left_out.update({found.full_name(p): "frozen (requires_grad=False)" for p in found.frozen})
    _check_shared(layers)
    if not layers:
        raise ValueError("No layer is left to measure, expected at least one; choose other layers.")
    return Selection(layers, left_out)


def _choose(modules: dict[str, nn.Module], names: Sequence[str] | None) -> list[str]:
    trainable = [
        name for name, module in modules.items() if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if names is None:
        if not trainable:
            raise ValueError("The model has no trainable parameters, expected at least one; set requires_grad.")
        return trainable
    if isinstance(names, str):
        raise TypeError(f"Got layers={names!r}, expected a list of names; write layers=[{names!r}].")
    for name in names:
        if name not in modules:
            raise ValueError(f"Got layer {name!r}, expected one of {', '.join(map(repr, trainable))}.")
        if name not in trainable:
            raise ValueError(
                f"Layer {name!r} ({type(modules[name]).__name__}) has no trainable parameters of its own, expected one "
                f"of {', '.join(map(repr, trainable))}."
            )
    if not names:
        raise ValueError("Got layers=[], expected at least one name, or None for all layers.")
    return list(dict.fromkeys(names))


def adapt(name: str, module: nn.Module) -> Layer | str:
    """The adapter of a module, or the sentence that says why there is none.

    A subclass is understood only if it inherits its forward from the known type.
    """
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        return (
            f"Layer {name!r} ({type(module).__name__}) has uninitialised parameters; run one batch through the model."
        )
    for module_type, adapter in Layer._registry.items():
        same = isinstance(module, module_type) and type(module).forward is module_type.forward
        if same and {key for key, _ in module.named_parameters(recurse=False)} <= set(adapter.parameter_names):
            return adapter(name, module)
    types = ", ".join(sorted(t.__name__ for t in Layer._registry))
    return (
        f"Layer {name!r} is a {type(module).__module__}.{type(module).__name__}, expected one of {types}; choose layers "
        'with layers=[...], leave it out with on_unknown="skip", or write an adapter (a subclass of '
        "fisher_lab.layers.Layer)."
    )


def _check_shared(layers: dict[str, Layer]) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for key, parameter in layer.parameters.items():
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(
                    f"Layers {other!r} and {name!r} share the parameter {key!r}, expected parameters of their own; "
                    "measure other layers with layers=[...]."
                )
