"""Every problem that comes along goes through compare, all layers and all approximations, to the
end.
"""

from __future__ import annotations

import pytest

import fisher_lab as fl
from fisher_lab import problems


@pytest.mark.parametrize("name", problems.names())
def test_compare_problem(name: str) -> None:
    """Untrained and with few examples, for speed; each layer's captured block agrees with
    torch.func.
    """
    problem = problems.load(name, {"steps": 0, "examples": 20})
    comparison = fl.compare(problem.model, problem.likelihood, problem.data, fisher=problem.fisher)
    assert all(row.checked < 1e-10 for row in comparison.rows)
    assert all(row.fisher == problem.fisher for row in comparison.rows)
    owners = [
        n
        for n, m in problem.model.named_modules()
        if any(True for _ in m.parameters(recurse=False))
    ]
    assert [layer for layer in comparison.layers if layer != "(all)"] == owners
    assert comparison.value(owners[0], "EKFAC", "trace") == pytest.approx(0, abs=1e-9)
    labels = {approximation.label for approximation in fl.approximations.default_approximations()}
    assert labels <= {row.approximation for row in comparison.rows}
