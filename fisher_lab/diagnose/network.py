"""Errors of the whole network: from the columns of all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fisher_lab._ground.memory import readable
from fisher_lab._passes.source import Source
from fisher_lab.diagnose.inside import floor_inside, precision_inside
from fisher_lab.diagnose.layer import Asked
from fisher_lab.diagnose.steps import EXACT
from fisher_lab.errors import Measure, Network
from fisher_lab.matrices import Streamed
from fisher_lab.results import ALL, Row


def of_network(asked: Asked, measures: Sequence[Measure]) -> list[Row]:
    """Rows of layer "(all)" and approximation "Exact".

    Args:
        asked: the question.
        measures: of the network.

    Raises:
        ValueError: if the columns of all layers do not fit the budget together.
    """
    source = asked.source
    if not measures:
        return []
    first = measures[0]
    pieces = _columns(source, first.name)
    deviations = [_deviation(asked, name, pieces) for name in source.layers]
    checked = max(deviations)
    network = Network(pieces)
    floor = floor_inside(source, network, damped=False)
    rows = []
    for m in measures:
        value, noise = m.formula(network)
        noise = max(noise, floor)
        row = Row(
            layer=ALL,
            approximation=EXACT,
            error=m.name,
            value=value,
            noise=noise,
            checked=checked,
            fisher=source.fisher,
            precision=precision_inside(source),
        )
        rows.append(row)
    return rows


def _columns(source: Source, name: str) -> list[dict[str, Any]]:
    """The columns of all layers, some examples at a time."""
    need = source.N * source.example_bytes(source.layers)
    if need > source.budget.total:
        raise ValueError(
            f"{name} needs the columns of all layers at once, {readable(need)}, expected at most "
            f'{readable(source.budget.total)}; use fewer examples, fisher="mc", or raise memory=.'
        )
    return list(source.sweep())


def _deviation(asked: Asked, name: str, pieces: Sequence[dict[str, Any]]) -> float:
    """How far the block of a layer's columns is from torch.func."""
    columns = [piece[name] for piece in pieces]
    first = columns[0]
    one = first.g.new_ones(())
    # as the columns are in memory, every product reads them anew at no cost
    block = Streamed(partial(iter, columns), asked.source.N, first.shape, factor=one)
    return asked.check.deviation(name, block)
