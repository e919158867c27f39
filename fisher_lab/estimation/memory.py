"""What the matrices of approximations take, told from the sizes of the layers alone."""

from __future__ import annotations

from collections.abc import Iterable

from fisher_lab._ground.memory import Budget, least, readable
from fisher_lab._passes.source import Source
from fisher_lab.approximations import Approximation
from fisher_lab.layers import Layer, VocabularyLayer


def check_fits(approximations: Iterable[Approximation], source: Source) -> None:
    """Refuse approximations whose factors do not fit the budget, before anything is computed.

    Args:
        approximations: what is to be built of every layer.
        source: the question.

    Raises:
        ValueError: naming the layer that needs most, and the least memory that will do.
    """
    most = 0.0
    about = ""
    for approximation in approximations:
        for name, layer in source.layers.items():
            sizes = _sizes(approximation, layer)
            need = _work_bytes(sizes, layer.groups, source.dtype.itemsize)
            if need > most:
                most = need
                rows, columns = layer.shape
                factors = " and ".join(map(str, sizes))
                about = (
                    f"{approximation.label} of layer {name!r} ({type(layer.module).__name__}, W "
                    f"{rows} x {columns}) has factors of {factors} rows, whose decompositions need"
                )
    if most > source.budget.total:
        raise ValueError(
            f"{about} {readable(most)}, expected at most {readable(source.budget.total)}; leave "
            f"the layer or the approximation out, or raise memory= to {least(most)}."
        )


def _sizes(approximation: Approximation, layer: Layer) -> tuple[int, ...]:
    rows, columns = layer.shape
    if isinstance(layer, VocabularyLayer):  # whose factor over the rows is a diagonal
        return (columns,)
    return approximation.factor_sizes(rows // layer.groups, layer.kernel, layer.bias)


def _work_bytes(sizes: Iterable[int], groups: int, itemsize: int) -> float:
    """All factors, and what the largest takes while it is decomposed."""
    numbers = [groups * float(size) ** 2 for size in sizes]
    if not numbers:
        return 0.0
    held = itemsize * sum(numbers)
    largest = itemsize * max(numbers)
    return held - largest + Budget.for_factor(largest)
