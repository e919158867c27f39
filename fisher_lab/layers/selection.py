"""Which modules of a model are layers, and which adapter understands them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fisher_lab._ground.arguments import names_of
from fisher_lab._ground.text import did_you_mean
from fisher_lab.layers.base import Layer, WeightBias, owned_parameters
from fisher_lab.layers.gradient_form import GradientForm
from fisher_lab.layers.tied import TiedEmbedding

OnUnknown = Literal["error", "skip", "flatten"]
FROZEN = "frozen (requires_grad=False)"
# parameters of a module of unknown type: its block then takes 128 MB in float64
LARGEST_UNKNOWN = 4096
# what a subclass may define anew and still behave like the class
HARMLESS = {
    "__init__",
    "extra_repr",
    "reset_parameters",
    "__repr__",
    "__doc__",
    "__module__",
    "__qualname__",
}


@dataclass(frozen=True)
class Selection:
    """Adapters by layer name, and what was left out with the reason."""

    layers: dict[str, Layer]
    left_out: dict[str, str] = field(default_factory=dict)

    def for_directions(self) -> Selection:
        """The same blocks for several directions an example: those that pay for one only are in
        gradient form.
        """
        layers: dict[str, Layer] = {}
        for name, layer in self.layers.items():
            if layer.one_direction:
                reason = "its lookups would have inputs of their own for every direction"
                layer = GradientForm.joined(layer.uses, reason)
            layers[name] = layer
        return Selection(layers, self.left_out)


def select(
    model: nn.Module, names: Sequence[str] | None = None, on_unknown: OnUnknown = "error"
) -> Selection:
    """Adapters for the named modules, or for every module that owns trainable parameters.

    Modules that share a parameter are one block, under the name of the first of them.

    Args:
        model: the model.
        names: module names as in `model.named_modules()`; None for all.
        on_unknown: what becomes of modules that no adapter understands. "error" measures those with
            few parameters in the gradient form, over their flattened parameters, and refuses larger
            ones; "skip" leaves them out and says so; "flatten" takes the gradient form whatever
            their size.

    Raises:
        ValueError: unknown names or options, nothing to measure, a module that no adapter
            understands.
    """
    if on_unknown not in ("error", "skip", "flatten"):
        raise ValueError(f'Got on_unknown={on_unknown!r}, expected "error" or "skip".')
    owners = _owners(model)
    shared = _sharing(owners)
    layers: dict[str, Layer] = {}
    left_out: dict[str, str] = {}
    for name in _choose(model, owners, shared, names):
        members = {other: owners[other] for other in shared[name]}
        found = _block(model, members, on_unknown)
        if isinstance(found, Layer):
            layers[name] = found
            for parameter in found.frozen:
                full_name = found.full_name(parameter)
                left_out[full_name] = FROZEN
        elif on_unknown == "skip":
            left_out[name] = found
        else:
            raise ValueError(found)
    if names is None:  # modules without any trainable parameter too
        for full_name, own in model.named_parameters():
            if not own.requires_grad:
                left_out[full_name] = FROZEN
    if not layers:
        raise ValueError("No layer is left to measure, expected at least one; choose other layers.")
    return Selection(layers, left_out)


def adapt(name: str, module: nn.Module, container: bool = False) -> Layer | str:
    """The adapter of a module, or the sentence that says why there is none.

    Known are the module types that an adapter names, and subclasses of them that change nothing but
    their construction. Every type is known to the gradient form behind a parametrisation of a known
    type, where a container (a module with children, or the whole model) owns bare parameters, and
    where the module's own parameters are few: that form needs no knowledge of the module. Nothing
    is guessed from a class or from the names of its parameters.

    Args:
        name: the module's name.
        module: the module.
        container: whether it is the whole model.
    """
    kind = type_before_parametrizations(module)
    own = owned_parameters(module)
    if _uninitialised(module):
        return (
            f"Layer {name!r} ({kind.__name__}) has uninitialised parameters, expected them to be "
            "initialised; run one batch through the model."
        )
    replaced = "forward" in vars(module)  # of this one instance
    adapter = None
    if not replaced:
        adapter = _adapter_of(kind)
    if adapter is not None:
        layer = _known(name, module, adapter)
        if layer is not None:
            return layer
    elif (container or _has_children(module)) and not isinstance(module, tuple(Layer._registry)):
        # bare parameters of a container; a child of a known type that changes it is none
        return GradientForm(name, module)
    sizes = [p.numel() for p in own.values() if p.requires_grad]
    count = sum(sizes)
    if count <= LARGEST_UNKNOWN and not replaced:
        layer = GradientForm(name, module)
        layer.unknown = True
        return layer
    found = f"has {count:,} parameters and no adapter"
    if replaced:
        found = "has a forward of its own"
    return (
        f"Layer {name!r} ({kind.__module__}.{kind.__name__}) {found}, expected a type that has "
        "one, or at most "
        f"{LARGEST_UNKNOWN:,} parameters; choose layers with layers=[...], leave it out with "
        'on_unknown="skip", or '
        "write an adapter (a subclass of fisher_lab.layers.Layer, or of "
        f"fisher_lab.layers.GradientForm with types = ({kind.__name__},))."
    )


def _known(name: str, module: nn.Module, adapter: type[Layer]) -> Layer | str | None:
    """A module of a type that an adapter names; None where it has other parameters, too."""
    reason = adapter.refusal(module)
    if reason is not None:
        kind = type_before_parametrizations(module)
        return f"Layer {name!r} ({kind.__name__}) {reason}, or leave it out with layers=[...]."
    if is_parametrized(module):
        return GradientForm(name, module)
    own = owned_parameters(module)
    understood = adapter.parameter_names
    if understood is None or set(own) <= set(understood):
        return adapter(name, module)
    return None


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _uninitialised(module: nn.Module) -> bool:
    """Whether a lazy module has not seen an input yet."""
    return any(isinstance(p, UninitializedParameter) for p in owned_parameters(module).values())


def _adapter_of(kind: type) -> type[Layer] | None:
    """The adapter of a module class: its own, or that of a class it inherits all its behaviour
    from.
    """
    if kind in Layer._registry:
        return Layer._registry[kind]
    for known, adapter in Layer._registry.items():
        if issubclass(kind, known) and _overridden(kind, known) <= HARMLESS:
            return adapter
    for known in kind.__mro__:
        named = Layer._by_name.get(f"{known.__module__}.{known.__qualname__}")
        if named is not None and _overridden(kind, known) <= HARMLESS:
            return named
    return None


def _overridden(kind: type, known: type) -> set[str]:
    """Names of a known type that a subclass, or a class between the two, defines anew."""
    names: set[str] = set()
    for cls in kind.__mro__:
        if cls is known:
            break
        names |= set(vars(cls))
    return names & set(dir(known))


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own trainable parameters, each of them with what is behind its own
    parametrisations.
    """
    owners: dict[str, nn.Module] = {}
    hidden: set[nn.Module] = set()  # behind parametrisations
    for name, module in model.named_modules():
        if is_parametrized(module):
            behind = module.get_submodule("parametrizations")
            hidden.update(behind.modules())
        if module in hidden:
            continue
        own = owned_parameters(module).values()
        if any(p.requires_grad for p in own):
            owners[name] = module
    return owners


def _sharing(owners: dict[str, nn.Module]) -> dict[str, list[str]]:
    """For every owner the list of owners it shares trainable parameters with, itself included, in
    their order.
    """
    sharing = {name: [name] for name in owners}
    first: dict[int, str] = {}
    for name, module in owners.items():
        for parameter in owned_parameters(module).values():
            if not parameter.requires_grad:
                continue
            other = first.setdefault(id(parameter), name)
            if sharing[other] is sharing[name]:
                continue
            # both lists become one, which all members point to
            sharing[other] += sharing[name]
            for member in sharing[name]:
                sharing[member] = sharing[other]
    order = list(owners)
    return {name: sorted(members, key=order.index) for name, members in sharing.items()}


def _choose(
    model: nn.Module,
    owners: dict[str, nn.Module],
    shared: dict[str, list[str]],
    names: Sequence[str] | None,
) -> list[str]:
    """The names of the blocks that are asked for, each that of the first module in it."""
    known = [name for name in owners if name == shared[name][0]]
    if names is None:
        if not known:
            raise ValueError(
                "The model has no trainable parameters, expected at least one; set requires_grad."
            )
        return known
    modules = dict(model.named_modules(remove_duplicate=False))
    names = _with_children(names_of("layers", names), modules, owners, known)
    for name in names:
        if not isinstance(name, str) or name not in modules:
            guess = did_you_mean(str(name), known)
            raise ValueError(f"Got layer {name!r}{guess}, expected one of {_listed(known)}.")
        if names.count(name) > 1:
            raise ValueError(f"Got layer {name!r} twice, expected every layer once.")
        _check_name(name, modules[name], owners, shared, known)
    if not names:
        raise ValueError("Got layers=[], expected at least one name, or None for all layers.")
    return names


def _with_children(
    names: list[str],
    modules: dict[str, nn.Module],
    owners: dict[str, nn.Module],
    known: list[str],
) -> list[str]:
    """The names, those of containers without parameters of their own replaced by the blocks inside,
    of which others may be named, too.
    """
    found: list[str] = []
    for name in names:
        module = modules.get(name) if isinstance(name, str) else None
        inside = []
        if module is not None and module not in owners.values():
            start = f"{name}." if name else ""
            inside = [other for other in known if other.startswith(start)]
        if not inside:
            found.append(name)
        found += [other for other in inside if other not in found and other not in names]
    return found


def _check_name(
    name: str,
    module: nn.Module,
    owners: dict[str, nn.Module],
    shared: dict[str, list[str]],
    known: list[str],
) -> None:
    """Refuse a module without parameters of its own, and any but the first name of a block."""
    first = None
    for other, owner in owners.items():
        if owner is module:
            first = other
    if first is None:
        raise ValueError(
            f"Layer {name!r} ({type(module).__name__}) has no trainable parameters of its own, "
            f"expected one of {_listed(known)}."
        )
    if first != name:
        raise ValueError(
            f"Layer {name!r} is the module {first!r} used again, expected its first name, whose "
            f"block covers all uses; write layers=[{first!r}]."
        )
    if name not in known:
        block = shared[name][0]
        raise ValueError(
            f"Layer {name!r} shares a parameter with {block!r}, expected the name of the first of "
            f"them, whose block covers all uses; write layers=[{block!r}]."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _block(model: nn.Module, members: dict[str, nn.Module], on_unknown: OnUnknown) -> Layer | str:
    """One adapter for the modules that share parameters (most often a single one), or why there is
    none.
    """
    found: list[Layer] = []
    for name, module in members.items():
        layer = adapt(name, module, container=module is model)
        if isinstance(layer, str):
            if on_unknown != "flatten" or _uninitialised(module):
                return layer
            layer = GradientForm(name, module)
        if layer.unknown and on_unknown == "skip":
            kind = type(module)
            return f"no adapter for {kind.__module__}.{kind.__name__}"
        found.append(layer)
    if len(found) == 1:
        return found[0]
    return _tied(found)


def _tied(members: list[Layer]) -> Layer:
    """One adapter for several layers that share parameters."""
    if TiedEmbedding.fits(members):
        return TiedEmbedding(members)
    block = members[0]
    for other in members[1:]:
        if not _alike(block, other):
            return GradientForm.joined(members)
    block.uses = tuple(members)
    block.tied = tuple(layer.name for layer in members)
    return block


def _alike(one: Layer, other: Layer) -> bool:
    """Whether two layers use the same parameters as the same W, so that uses of both are positions
    of one layer.
    """
    if not isinstance(one, WeightBias) or type(one) is not type(other):
        return False
    if one.parameters.keys() != other.parameters.keys():
        return False
    for key, parameter in one.parameters.items():
        if parameter is not other.parameters[key]:
            return False
    if one.kernel != other.kernel or one.groups != other.groups:
        return False
    return one.shape == other.shape
