"""Layers whose columns do not fit into the memory: read anew for every product, with the same
errors.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab.approximations import default_approximations
from fisher_lab.approximations.corrected import Corrected

SMALL = 0.0015  # GiB: less than the columns of the second convolution


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 24, 3, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 5),
    ).eval()  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(
        20
    ) % 5


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
@pytest.mark.parametrize("cuts", [[20], [8, 12]])
def test_errors_are_those_of_columns_in_memory(loss: nn.Module, cuts: list[int]) -> None:
    x, y = batch()
    data = (x, y) if len(cuts) == 1 else list(zip(x.split(cuts), y.split(cuts), strict=True))
    candidates = [
        fl.TENGraD(batch=4),
        *(a for a in default_approximations() if a.label != "TENGraD"),
    ]
    whole = fl.compare(network(), loss, (x, y), candidates, layers=["2"])
    pieces = fl.compare(network(), loss, data, candidates, layers=["2"], memory=SMALL)
    assert whole.settings["layers"]["2"]["route"].startswith("columns, gradients")
    assert pieces.settings["layers"]["2"]["route"] == "columns, read anew for every product"
    found = {(row.approximation, row.error): row for row in pieces.rows}
    assert {row.approximation for row in whole.rows} - {name for name, _ in found} == {"KPSVD"}
    assert "Left out: damped errors of layer '2'" in str(pieces)
    for row in whole.rows:
        if row.approximation != "KPSVD" and row.damping is None:
            other = found[row.approximation, row.error]
            assert other.value == pytest.approx(
                row.value, rel=1e-6, abs=1e-7 + row.noise + other.noise
            ), row


def test_what_is_left_out_is_said_and_in_no_total(tmp_path: Path) -> None:
    small = fl.compare(
        network(),
        nn.CrossEntropyLoss(),
        batch(),
        [fl.KFAC(), fl.KPSVD(), fl.TENGraD(), Corrected(fl.KPSVD())],
        errors=["frobenius", "damped_cosine"],
        dampings=[0.1],
        memory=SMALL,
    )
    assert "Left out: KPSVD of layer '2': needs more columns than fit" in str(small)
    assert {"TENGraD of layer '2'", "Corrected(base=KPSVD()) of layer '2'"} < set(
        small.settings["left_out"]
    )
    assert "Left out: damped errors of layer '2'" in str(small)
    rows = {(row.layer, row.approximation, row.error) for row in small.rows}
    assert ("0", "KPSVD", "damped_cosine") in rows
    assert ("(all)", "KFAC", "frobenius") in rows
    assert (
        not {
            ("(all)", "KPSVD", "frobenius"),
            ("(all)", "KFAC", "damped_cosine"),
            ("2", "KFAC", "damped_cosine"),
        }
        & rows
    )
    small.save(tmp_path / "small.json")
    assert fl.load_comparison(tmp_path / "small.json").rows == small.rows


def test_resumed_totals_leave_out_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = {"errors": ["frobenius"], "memory": SMALL, "resume": path}
    first = fl.compare(
        network(), nn.CrossEntropyLoss(), batch(), [fl.KPSVD(), fl.KFAC()], **options
    )
    again = fl.compare(
        network(), nn.CrossEntropyLoss(), batch(), [fl.KPSVD(), fl.KFAC()], **options
    )
    assert again.rows == first.rows
    assert again.settings["left_out"] == first.settings["left_out"] != {}
