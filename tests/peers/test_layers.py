"""Layer types beyond plain Linear, where curvlinops and nngeometry are right too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_lab as fl
from fisher_lab.layers import select
from tests.helpers import assert_same
from tests.layers.cases import CASES
from tests.layers.oracle import normal, randomised

pytestmark = [
    pytest.mark.peers,
    # of the other libraries, on their first use of torch.jit
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*performance drop.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

# no forward mode or no batching rule in torch for what curvlinops does with these
WITHOUT_GGN = ("RNN", "LSTM", "GRU", "PReLU", "Multihead", "weight norm")
GGN = [name for name in CASES if not name.startswith(WITHOUT_GGN) and "Embedding" not in name]


def in_our_order(M: Tensor, layer: fl.layers.Layer, own: list[Tensor]) -> Tensor:
    """From parameters flattened one after the other to the order of W."""
    places, start = {}, 0
    for key, parameter in zip(layer.parameters, own, strict=True):
        places[key] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    order = layer.pack({key: place.double() for key, place in places.items()}).flatten().long()
    return M[order][:, order]


@pytest.mark.parametrize("name", GGN)
def test_curvlinops_ggn(peers: SimpleNamespace, name: str) -> None:
    """The Gauss-Newton operator of curvlinops, applied to the identity, is our block."""
    case = CASES[name]()
    layer = select(case.model, [case.layer]).layers[case.layer]
    params, y = list(layer.parameters.values()), torch.arange(len(case.x)) % 3
    loss = nn.CrossEntropyLoss()
    operator = peers.curvlinops.GGNLinearOperator(
        case.model, loss, params, [(case.x, y)], check_deterministic=False
    )
    theirs = (operator @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)).detach()
    ours = fl.estimate(fl.Exact(), case.model, loss, (case.x, y), layers=[case.layer])[case.layer]
    assert_same(ours.dense(), in_our_order(theirs, layer, params), 1e-10)


def pooled() -> nn.Module:
    """A convolution whose positions are pooled (the setting of "reduce")."""
    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 3),
        )
    )


@pytest.mark.parametrize(
    ("kind", "spatial"), [("KFAC", "expand"), ("KFAC", "reduce"), ("EKFAC", "expand")]
)
def test_curvlinops_kfac_of_convolutions(peers: SimpleNamespace, kind: str, spatial: str) -> None:
    """KFAC, expand and reduce, and EKFAC of a convolution and of the Linear behind it."""
    from curvlinops.kfac import FisherType

    model, x, y = pooled(), normal(30, 2, 5, 5), torch.arange(30) % 3
    ours = fl.estimate(getattr(fl, kind)(spatial=spatial), model, nn.CrossEntropyLoss(), (x, y))
    for name, layer in select(model).layers.items():
        params = list(layer.parameters.values())
        operator = getattr(peers.curvlinops, f"{kind}LinearOperator")(
            model,
            nn.CrossEntropyLoss(),
            params,
            [(x, y)],
            check_deterministic=False,
            fisher_type=FisherType.TYPE2,
            separate_weight_and_bias=False,
            kfac_approx=spatial,
        )
        theirs = (
            operator @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)
        ).detach()
        assert_same(ours[name].dense(), in_our_order(theirs, layer, params), 1e-8)


class Sums(nn.Module):
    """Adds up the positions of `[N, T, C]` or `[N, C, *positions]`."""

    def __init__(self, dim: int | tuple[int, ...]) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dim)


POOL = [nn.Tanh(), Sums((2, 3))]
NNGEOMETRY = {
    "Conv1d": lambda: ([nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), Sums(2), nn.Linear(3, 3)], (2, 8)),
    "Conv2d": lambda: (
        [nn.Conv2d(2, 3, (2, 3), padding=1, dilation=(1, 2)), *POOL, nn.Linear(3, 3)],
        (2, 5, 6),
    ),
    "ConvTranspose2d": lambda: (
        [nn.ConvTranspose2d(2, 3, (3, 2)), *POOL, nn.Linear(3, 3)],
        (2, 3, 3),
    ),
    "LayerNorm": lambda: ([nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)], (4,)),
    "BatchNorm1d": lambda: ([nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)], (4,)),
    "GroupNorm": lambda: (
        [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), *POOL, nn.Linear(4, 3)],
        (2, 5, 5),
    ),
}


def nngeometry_blocks(model: nn.Module, x: Tensor, representation: str) -> dict[str, Tensor]:
    """Diagonal blocks of nngeometry's matrix, in our order."""
    from nngeometry import object as representations
    from nngeometry.metrics import FIM

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=len(x))
    torch.set_default_dtype(torch.float64)  # it allocates dense matrices in the default type
    try:
        kind = getattr(representations, representation)
        dense = FIM(model, loader, kind, variant="classif_logits", device="cpu").to_torch()
    finally:
        torch.set_default_dtype(torch.float32)
    found, start = {}, 0
    for name, layer in select(model).layers.items():
        params = list(layer.parameters.values())
        size = sum(p.numel() for p in params)
        found[name] = in_our_order(dense[start : start + size, start : start + size], layer, params)
        start += size
    return found


def assert_agreement(name: str, kind: str, approximation: fl.Approximation) -> None:
    """NNGeometry's matrix of this kind is our approximation, on every layer of a case."""
    layers, shape = NNGEOMETRY[name]()
    model, x = randomised(nn.Sequential(*layers)), normal(6, *shape)
    ours = fl.estimate(approximation, model, fl.Categorical(), x)
    for layer, block in nngeometry_blocks(model, x, kind).items():
        assert_same(ours[layer].dense(), block, 1e-10)


@pytest.mark.parametrize("name", NNGEOMETRY)
def test_nngeometry_blocks(peers: SimpleNamespace, name: str) -> None:
    """Exact blocks of convolutions, transposed ones and norm layers."""
    assert_agreement(name, "PMatBlockDiag", fl.Exact())


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_nngeometry_kfac(peers: SimpleNamespace, name: str) -> None:
    """KFAC of convolutions, in KFC's scale."""
    assert_agreement(name, "PMatKFAC", fl.KFAC())
