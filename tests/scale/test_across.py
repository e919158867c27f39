"""Entries of the whole network's Fisher between layers."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    ).eval()


def share(found: fl.Comparison) -> float:
    return found.value("(all)", "Exact", "off_block")


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_off_block_equals_the_dense_fisher_of_the_network(loss: nn.Module) -> None:
    x = torch.randn(7, 1, 4, 4)
    found = fl.compare(network(), loss, x, [fl.KFAC()], errors=["frobenius", "off_block"])
    stats = next(iter(Source(Setup(network(), loss, x)).sweep()))
    U = torch.cat([s.gradients().flatten(2).flatten(0, 1) for s in stats.values()], 1)
    F = U.T @ U
    blocks = torch.block_diag(
        *(
            F[p : p + s.dim, p : p + s.dim]
            for p, s in zip(_starts(stats), stats.values(), strict=True)
        )
    )
    assert share(found) == pytest.approx(float((F - blocks).norm() / F.norm()), rel=1e-10)
    assert 0.1 < share(found) < 1
    pieces = fl.compare(
        network(), loss, list(x.split(3)), [fl.KFAC()], errors=["frobenius", "off_block"]
    )
    assert share(pieces) == pytest.approx(share(found), rel=1e-10)


def _starts(stats: dict[str, fl.LayerStats]) -> list[int]:
    sizes = [s.dim for s in stats.values()]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def test_one_layer_has_nothing_outside() -> None:
    x = torch.randn(4, 1, 4, 4)
    found = fl.compare(
        network(),
        nn.CrossEntropyLoss(),
        x,
        [fl.KFAC()],
        layers=["3"],
        errors=["trace", "off_block"],
    )
    assert share(found) == 0


def test_off_block_alone(tmp_path) -> None:
    """One row, which can be saved, shown and gone on from like any other."""
    x = torch.randn(4, 1, 4, 4)
    both = fl.compare(
        network(), nn.CrossEntropyLoss(), x, [fl.KFAC()], errors=["trace", "off_block"]
    )
    path = tmp_path / "run.json"
    for _ in range(2):
        alone = fl.compare(
            network(), nn.CrossEntropyLoss(), x, [fl.KFAC()], errors="off_block", resume=path
        )
        assert [row.error for row in alone.rows] == ["off_block"]
        assert share(alone) == share(both)
    assert "block" in str(fl.load_comparison(path))
    fl.report.write_report(fl.load_comparison(path), tmp_path / "run.html")
    assert (tmp_path / "run.html").exists()
