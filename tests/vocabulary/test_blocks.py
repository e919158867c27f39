"""A layer to the logits of many classes: every matrix, entry by entry, beside plain autograd."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab.errors import pair
from fisher_lab.matrices import VocabularyBlock
from fisher_lab.statistics import pieces
from tests.vocabulary.support import (
    N,
    V,
    data,
    expected_blocks,
    model_of,
    small_factors,  # noqa: F401
    terms,
)

APPROXIMATIONS = {
    "KFAC": fl.KFAC(),
    "EKFAC": fl.EKFAC(),
    "TKFAC": fl.TKFAC(),
    "TKFAC(spatial=full)": fl.TKFAC(spatial="full"),
    "TEKFAC": fl.TEKFAC(),
    "TN": fl.TN(),
    "LNGD": fl.LNGD(),
    "Diagonal": fl.Diagonal(),
}
KINDS = [
    pytest.param((True, False, None), id="tied"),
    pytest.param((True, True, None), id="tied, bias"),
    pytest.param((True, True, 2), id="tied, bias, padding"),
    pytest.param((False, False, None), id="head"),
    pytest.param((False, True, None), id="head, bias"),
]
pytestmark = pytest.mark.usefixtures("small_factors")


def layer_of(kind):
    return "encode" if kind[0] else "decode"


@pytest.fixture(autouse=True)
def several_slices(monkeypatch):
    """Two rows of W at a time."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 2000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_every_approximation_entry_by_entry(kind, name):
    model = model_of(*kind)
    x, y = data()
    expected = expected_blocks(*terms(model, x, y))[name]
    layer = layer_of(kind)
    found = fl.estimate(
        APPROXIMATIONS[name], model, fl.Categorical(), (x, y), fisher="empirical", layers=[layer]
    )
    torch.testing.assert_close(found[layer].dense(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_errors_beside_dense_matrices(kind, large, monkeypatch):
    if large:  # no dense differences: inner products and the norm of a difference by passes
        monkeypatch.setattr(pair, "DENSE_DIM", 0)
    model = model_of(*kind)
    x, y = data()
    layer = layer_of(kind)
    expected = expected_blocks(*terms(model, x, y))
    F = expected.pop("Exact")
    found = fl.compare(
        model,
        fl.Categorical(),
        (x, y),
        APPROXIMATIONS,
        fisher="empirical",
        layers=[layer],
        errors=["trace", "frobenius", "cosine", "spectral"],
    )
    about = found.settings["layers"][layer]
    assert "some rows of W at a time" in about["route"]
    assert f"over the {V} rows are diagonal" in about["factors"]
    assert about["checked"] < 1e-12
    for name, K in expected.items():
        cosine = (F * K).sum() / F.norm() / K.norm()
        values = {
            "trace": ((K.trace() - F.trace()) / F.trace(), 1e-10),
            "frobenius": ((F - K).norm() / F.norm(), 1e-10),
            "cosine": (cosine, 1e-10),
            "spectral": (torch.linalg.matrix_norm(F - K, 2) / torch.linalg.matrix_norm(F, 2), 2e-3),
        }
        for row in found.rows:
            if row.approximation == name and row.layer == layer:
                value, tolerance = values[row.error]
                assert row.value == pytest.approx(float(value), abs=tolerance), (name, row.error)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_labels_and_the_scale_of_a_loss(kind):
    """What is measured of drawn labels is what the ordinary form has of them."""
    model = model_of(*kind)
    x, _ = data()
    layer = layer_of(kind)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x).mT  # classes second, as torch's loss takes them

    truth = fl.exact_fisher(
        Turned(), nn.CrossEntropyLoss(), (x, x), fisher="mc", layers=[f"inner.{layer}"]
    )
    found = fl.compare(
        Turned(),
        nn.CrossEntropyLoss(),
        (x, x),
        {"truth": truth, "KFAC": fl.KFAC()},
        fisher="mc",
        layers=[f"inner.{layer}"],
        errors=["frobenius"],
    )
    values = {row.approximation: row.value for row in found.rows}
    assert values["truth"] < 1e-12
    assert values["KFAC"] > 0.1


def block_of(kind, x, y):
    source = fl._passes.source.Source(
        fl._passes.setup.Setup(
            model_of(*kind), fl.Categorical(), (x, y), fisher="empirical", layers=[layer_of(kind)]
        ),
        vocabularies=True,
    )
    (whole,) = source.sweep()
    return VocabularyBlock(fl.statistics.sums_over(whole[layer_of(kind)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0, 3.0, 100.0])
def test_norm_of_a_difference_whichever_end_is_larger(kind, size):
    x, y = data()
    block = block_of(kind, x, y)
    F = block.dense()
    rows = torch.linspace(0.1, 1.0, block.shape[0], dtype=F.dtype)
    columns = torch.diag(torch.linspace(1.0, 0.2, block.shape[1], dtype=F.dtype))
    scale = size * float(torch.linalg.matrix_norm(F, 2))
    K = fl.matrices.Kronecker((scale * rows[None], columns[None]))
    expected = float(torch.linalg.matrix_norm(F - K.dense(), 2))
    found = block.norm_of_difference(K)
    assert found is not None
    norm, unknown = found
    assert norm == pytest.approx(expected, rel=3e-3)
    assert unknown <= 4e-3 * expected


def test_products_and_columns_of_the_block():
    x, y = data()
    kind = (True, True, 2)
    block = block_of(kind, x, y)
    F = expected_blocks(*terms(model_of(*kind), x, y))["Exact"]
    torch.testing.assert_close(block.dense(), F, rtol=1e-10, atol=1e-13)
    X = torch.randn(2, *block.shape, dtype=F.dtype)
    expected = (X.flatten(1) @ F).view(X.shape)
    torch.testing.assert_close(block @ X, expected, rtol=1e-10, atol=1e-13)
    half = block.sums.examples(slice(0, N // 2))
    assert half.N == N // 2
    torch.testing.assert_close(block.scaled(3.0).dense(), 3 * F, rtol=1e-10, atol=1e-13)
