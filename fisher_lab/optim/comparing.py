"""The matrices that an optimizer uses against the exact Fisher."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fisher_lab.diagnose import compare
from fisher_lab.likelihoods import Likelihood
from fisher_lab.matrices import FisherMatrix
from fisher_lab.optim.reductions import Reductions
from fisher_lab.results import Comparison


def compare_in_use(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    label: str,
    matrices: dict[str, FisherMatrix],
    about: dict[str, Any],
    options: dict[str, Any],
    reductions: Reductions,
) -> Comparison:
    """Errors of ready matrices against the exact Fisher at the present weights of a model.

    A copy of the model in evaluation mode is measured, which the settings of the result record.

    Args:
        model: the model in training.
        likelihood: its loss.
        data: as in `fl.compare`.
        label: the method's name in the result.
        matrices: by layer.
        about: facts for the settings of the result.
        options: further arguments of `fl.compare`.
        reductions: of the processes that train together, which share the work.
    """
    twin = copy.deepcopy(model).eval()
    reductions.share_buffers(twin)
    given = options.pop("problem", {})
    problem = {**given, **about, "mode": "copy in evaluation mode"}
    chosen = {
        "layers": list(matrices),
        "fisher": "true",
        "progress": False,
        **options,
    }
    return compare(twin, likelihood, data, {label: matrices}, problem=problem, **chosen)
