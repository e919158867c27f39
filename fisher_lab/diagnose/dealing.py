"""Layers measured in groups, each by one of the processes that share the work.

A layer is measured by the very code that one process runs, on the same pieces of the data, so that
its numbers do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fisher_lab._ground.progress import Progress
from fisher_lab._ground.ranks import Ranks, dealt
from fisher_lab.diagnose.influence import Influences
from fisher_lab.diagnose.layer import Asked, Blocks, LayerResult, measure_group
from fisher_lab.diagnose.plan import Group, plan


class Share(NamedTuple):
    """What one rank measured.

    Attributes:
        results: of its layers.
        influences: what the examples do to these layers, for standard errors over all.
    """

    results: list[LayerResult]
    influences: dict[tuple[str, str], Influences]


def measure_dealt(
    asked: Asked,
    results: dict[str, LayerResult],
    ranks: Ranks,
    bar: Progress,
    save: Callable[[], None],
) -> None:
    """Measure the layers that have no result yet, so that every rank has the results of all.

    Args:
        asked: the question.
        results: by layer; added to.
        ranks: who shares the work.
        bar: progress of this rank.
        save: called after every group of layers.
    """
    todo = []
    if asked.wanted or asked.steps.measures:
        todo = [name for name in asked.source.layers if name not in results]
    groups = plan(asked.source, todo, len(asked.candidates), asked.exact)
    costs = {name: asked.work[name] for name in todo}
    own = dealt(costs, ranks.count)[ranks.own]
    shared = Blocks(asked.source, own)
    if not ranks.alone:
        asked.source.take(own, [group.names for group in groups])

    def measure() -> Share:
        for group in groups:
            _measure(asked, group.only(own), results, shared, bar)
            if ranks.alone:
                _add_steps(asked, results, group.names)  # which then need not be held
            save()
        return _share(asked, own, results)

    for share in ranks.gathered(measure):
        for result in share.results:
            results[result.layer] = result
        if asked.standard_errors is not None:
            asked.standard_errors.influences |= share.influences
    _add_steps(asked, results, todo)


def _measure(
    asked: Asked, group: Group, results: dict[str, LayerResult], shared: Blocks, bar: Progress
) -> None:
    """Measure the layers of a group that are this rank's."""
    if not group.layers:
        return
    for result in measure_group(asked, group, shared, bar):
        results[result.layer] = result


def _add_steps(asked: Asked, results: dict[str, LayerResult], names: Sequence[str]) -> None:
    """Add the layers' parts of the whole network's steps, in the order of the layers."""
    for name in names:
        asked.steps.add(results[name].steps)
        results[name].steps = {}


def _share(asked: Asked, own: Sequence[str], results: dict[str, LayerResult]) -> Share:
    """What this rank hands to the others."""
    influences = {}
    if asked.standard_errors is not None:
        for key, found in asked.standard_errors.influences.items():
            layer, _ = key
            if layer in own:
                influences[key] = found
    return Share([results[name] for name in own], influences)
