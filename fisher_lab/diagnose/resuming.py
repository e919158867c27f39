"""Going on from the file of an interrupted run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fisher_lab.diagnose.layer import Asked, LayerResult
from fisher_lab.diagnose.standard_errors import StandardErrors
from fisher_lab.diagnose.steps import is_of_steps
from fisher_lab.errors import MEASURES
from fisher_lab.results import Comparison, Settings

# what must be the same for an earlier run to be gone on with
SAME_RUN = (
    "fingerprint",
    "own_code",
    "fisher",
    "likelihood",
    "seed",
    "dtype",
    "candidates",
    "errors",
    "dampings",
    "exact",
    "versions",
    "standard_errors",
)

# Beside the numbers of a layer in the file of a run that is not complete: what every example did to
# them, which the standard errors over all layers need. None where that is not known.
INFLUENCES = "influences"


class DifferentRunError(ValueError):
    """The file to go on from holds another comparison."""


def check_same_run(earlier: Comparison, settings: Settings, path: Path) -> None:
    """Raise DifferentRunError if a file holds another comparison.

    Args:
        earlier: what the file holds.
        settings: of this run.
        path: of the file.
    """
    differing = []
    for key in SAME_RUN:
        if earlier.settings.get(key) != settings.get(key):
            differing.append(key)
    if differing:
        raise DifferentRunError(
            f"{path} holds another comparison ({', '.join(differing)} differ), expected the same "
            "run; choose another file or delete it."
        )


def is_whole(earlier: Comparison, asked: Asked) -> bool:
    """Whether a file says that it is complete, and holds rows of every layer.

    Args:
        earlier: what the file holds.
        asked: the question.
    """
    if not earlier.settings.complete:
        return False
    if not asked.wanted:
        return True  # measures of the whole network have no rows of layers
    # one that was cut by hand says still that it is complete
    return set(asked.source.layers) <= set(earlier.layers)


def finished(asked: Asked, earlier: Comparison) -> dict[str, LayerResult]:
    """The layers that an interrupted run of the same comparison finished.

    Args:
        asked: the question; its standard errors learn what the examples did to these layers.
        earlier: what the file of that run holds.
    """
    measures = [MEASURES[name] for name in earlier.settings.errors or ()]
    if any(map(is_of_steps, measures)):
        return {}  # no file holds the steps of a layer: every one is taken again
    results = {}
    for name in asked.source.layers:
        result = _of_layer(earlier, name)
        # both are there once a layer is measured
        if result.about.route is None or not result.rows:
            continue
        if asked.standard_errors is not None and not _learned(asked, result):
            continue
        results[name] = result
    return results


def _of_layer(earlier: Comparison, name: str) -> LayerResult:
    """Everything that a file holds of one layer."""
    return LayerResult(
        name,
        earlier.settings.about(name),
        rows=[row for row in earlier.rows if row.layer == name],
        costs=[cost for cost in earlier.costs if cost.layer == name],
        quantities=[dict(numbers) for numbers in earlier.quantities if numbers["layer"] == name],
        covariances=[found for found in earlier.covariances if found["layer"] == name],
        left_out=_left_out_of(name, earlier.settings),
    )


def _left_out_of(layer: str, settings: Settings) -> dict[str, str]:
    """What a run left out of one layer."""
    ending = f" of layer {layer!r}"
    found = {}
    for what, reason in (settings.left_out or {}).items():
        if what.endswith(ending):
            found[what] = reason
    return found


def _learned(asked: Asked, result: LayerResult) -> bool:
    """Take out of the numbers of a layer what the examples did to them; False where a file of
    another version does not hold it, so that the layer must be measured again.
    """
    assert asked.standard_errors is not None
    like = next(asked.source.model.parameters())
    for numbers in result.quantities:
        if numbers["damping"] is not None:
            continue
        if INFLUENCES not in numbers:
            return False
        influences = numbers.pop(INFLUENCES)
        if influences is None:
            continue
        found = {}
        for name, values in influences.items():
            found[name] = torch.tensor(values, dtype=torch.float64).to(like)
        label = numbers["approximation"]
        asked.standard_errors.influences[result.layer, label] = found
    return True


def with_influences(
    quantities: list[dict[str, Any]], standard_errors: StandardErrors
) -> list[dict[str, Any]]:
    """The numbers of layers as the file of an unfinished run holds them."""
    found = []
    for numbers in quantities:
        entry = dict(numbers)
        if numbers["damping"] is None:
            key = (numbers["layer"], numbers["approximation"])
            entry[INFLUENCES] = _plain(standard_errors.influences.get(key))
        found.append(entry)
    return found


def _plain(influences: Mapping[str, torch.Tensor] | None) -> dict[str, list[float]] | None:
    if influences is None:
        return None
    return {name: values.tolist() for name, values in influences.items()}
