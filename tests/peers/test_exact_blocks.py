"""Exact blocks, KFAC and EKFAC agree with curvlinops (type-2) and nngeometry to 1e-10 in
float64.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from tests.diagnose.support import LOSSES, TORCH_LOSSES

pytestmark = [
    pytest.mark.peers,
    # of the other libraries, on their first use of torch.jit
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LAYERS = ("0", "2", "4")
OURS = {"exact": fl.Exact(), "KFAC": fl.KFAC(), "EKFAC": fl.EKFAC()}


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)
        )
    return model.double().eval()


def batch(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, dtype=torch.float64, generator=generator)
    values = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    labels = {"classes": values.argmax(1), "values": values, "binary": (values > 0).double()}
    return x, labels[kind]


def in_our_order(M: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """From [weight, bias] one after the other to W = [weight | bias] row by row."""
    if layer.bias is None:
        return M
    rows, columns = layer.weight.shape
    weight = torch.arange(rows * columns).view(rows, columns)
    order = torch.cat([weight, rows * columns + torch.arange(rows)[:, None]], 1).flatten()
    return M[order][:, order]


def curvlinops_blocks(
    peers: SimpleNamespace, kind: str, loss: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> dict:
    """One operator per layer, so that entries between layers do not count."""
    model, found = net(), {}
    from curvlinops.kfac import FisherType

    for name in LAYERS:
        layer = model.get_submodule(name)
        params = list(layer.parameters())
        arguments = (model, loss, params, [(x, y)])
        if kind == "exact":
            operator = peers.curvlinops.GGNLinearOperator(*arguments, check_deterministic=False)
        else:
            cls = getattr(peers.curvlinops, f"{kind}LinearOperator")
            operator = cls(
                *arguments,
                check_deterministic=False,
                fisher_type=FisherType.TYPE2,
                separate_weight_and_bias=False,
            )
        eye = torch.eye(sum(p.numel() for p in params), dtype=torch.float64)
        found[name] = in_our_order((operator @ eye).detach(), layer)
    return found


@pytest.mark.parametrize("kind", ["exact", "KFAC", "EKFAC"])
@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_curvlinops(peers: SimpleNamespace, name: str, kind: str) -> None:
    loss, labels = LOSSES[name]
    x, y = batch(labels)
    theirs = curvlinops_blocks(peers, kind, loss, x, y)
    ours = fl.estimate(OURS[kind], net(), loss, (x, y))
    for layer in LAYERS:
        error = (ours[layer].dense() - theirs[layer]).norm() / theirs[layer].norm()
        assert float(error) < 1e-10, (layer, float(error))


@pytest.mark.parametrize("kind", ["exact", "KFAC", "EKFAC"])
@pytest.mark.parametrize("likelihood", ["classif_logits", "regression"])
def test_nngeometry(peers: SimpleNamespace, likelihood: str, kind: str) -> None:
    from nngeometry.metrics import FIM
    from nngeometry.object.pspace import PMatBlockDiag, PMatEKFAC, PMatKFAC

    ours_of = {"classif_logits": fl.Categorical(), "regression": fl.Gaussian()}
    x, y = batch("classes" if likelihood == "classif_logits" else "values")
    model, loader = net(), DataLoader(TensorDataset(x, y), batch_size=20)
    representation = {"exact": PMatBlockDiag, "KFAC": PMatKFAC, "EKFAC": PMatEKFAC}[kind]
    torch.set_default_dtype(torch.float64)  # it allocates dense matrices in the default type
    try:
        theirs = FIM(model, loader, representation, variant=likelihood, device="cpu")
        if kind == "EKFAC":  # without this it equals KFAC
            theirs.update_diag(loader)
        dense = theirs.to_torch()
    finally:
        torch.set_default_dtype(torch.float32)
    start = 0
    ours = fl.estimate(OURS[kind], net(), ours_of[likelihood], (x, y))
    for layer in LAYERS:
        module = model.get_submodule(layer)
        size = sum(p.numel() for p in module.parameters())
        part = slice(start, start + size)
        start += size
        block = in_our_order(dense[part, part], module)
        error = (ours[layer].dense() - block).norm() / block.norm()
        assert float(error) < 1e-10, (layer, float(error))
