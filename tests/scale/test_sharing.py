"""What is computed once and used again gives the same numbers."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from fisher_lab.approximations.base import build
from fisher_lab.matrices import Kronecker, LowRank
from fisher_lab.statistics import LayerStats, Sums, contractions
from fisher_lab.statistics.pieces import KEPT_BYTES


def shared(N: int = 8, T: int = 5, d_out: int = 4, d_in: int = 7, R: int = 2) -> LayerStats:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(N, T, 1, d_in, generator=generator, dtype=torch.float64)
    return LayerStats(a, torch.randn(R, N, T, 1, d_out, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    ("plain", "corrected"), [(fl.KFAC(), fl.EKFAC()), (fl.TKFAC(), fl.TEKFAC())]
)
def test_inner_products_from_known_squares(
    plain: fl.Approximation, corrected: fl.Approximation, monkeypatch
) -> None:
    stats = shared()
    sums = Sums(stats)
    K = build(plain, sums)
    expected = float((K.dense() * contractions.dense(stats)).sum())
    assert float(K.quadratic(sums)) == pytest.approx(expected, rel=1e-12)
    build(corrected, sums)
    monkeypatch.setattr(
        Sums, "left", lambda *_: pytest.fail("the squares in the eigenbasis are known")
    )
    assert float(K.quadratic(sums)) == pytest.approx(expected, rel=1e-12)


def test_squares_of_another_basis_are_not_used() -> None:
    stats = shared()
    sums = Sums(stats)
    build(fl.EKFAC(), sums)
    generator = torch.Generator().manual_seed(4)
    G, A = (torch.randn(1, n, n, generator=generator, dtype=torch.float64) for n in (4, 7))
    K = Kronecker((G @ G.mT, A @ A.mT))
    expected = float((K.dense() * contractions.dense(stats)).sum())
    assert float(K.quadratic(sums)) == pytest.approx(expected, rel=1e-12)


def test_norms_from_one_gram_matrix(monkeypatch) -> None:
    stats = shared(d_out=9, d_in=11)
    assert contractions.gram_pays(stats)
    dense = contractions.dense(stats)
    F = LowRank(stats)
    assert float(F.spectral_norm()) == pytest.approx(
        float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-10
    )
    monkeypatch.setattr(contractions, "gram", lambda *_: pytest.fail("it is known"))
    assert float(F.frobenius_norm()) == pytest.approx(float(dense.norm()), rel=1e-12)
    assert not contractions.gram_pays(shared(T=1, d_out=9, d_in=11))
    many = LayerStats(None, torch.empty(1, 6000, 1, 200, 200, dtype=torch.float64, device="meta"))
    assert KEPT_BYTES < 6000**2 * 8
    assert not contractions.gram_pays(many)


def test_one_batch_captured_in_pieces_is_kept_as_one() -> None:
    """Where the backward pass needs more memory than the columns do."""
    torch.manual_seed(0)
    hidden = [
        nn.Linear(4, 4),
        *(layer for _ in range(40) for layer in (nn.Tanh(), nn.Linear(40, 40))),
    ]
    hidden[0] = nn.Linear(4, 40)
    model = nn.Sequential(*hidden, nn.Tanh(), nn.Linear(40, 3))
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    whole = Source(Setup(model, nn.CrossEntropyLoss(), (x, y), layers=["0"]))
    pieces = Source(Setup(model, nn.CrossEntropyLoss(), (x, y), layers=["0"], memory=4e-4))
    assert pieces.chunk < 20 <= whole.chunk
    assert pieces.fits_at_once()
    (expected,), (found,) = list(whole.sweep()), list(pieces.sweep())
    assert found["0"].N == 20
    torch.testing.assert_close(found["0"].g, expected["0"].g)
    torch.testing.assert_close(found["0"].a, expected["0"].a)
    assert next(iter(pieces.sweep()))["0"] is found["0"]


@pytest.mark.parametrize("kept", [0, 1500])
def test_kpsvd_without_room_for_what_the_lanczos_method_saw(kept: int, monkeypatch) -> None:
    """What is not kept is computed once more, and nothing else changes."""
    stats = shared()
    expected = build(fl.KPSVD(), stats).dense()
    monkeypatch.setattr("fisher_lab.statistics.pieces.KEPT_BYTES", kept)
    calls, right = [], contractions.right
    monkeypatch.setattr(
        contractions, "right", lambda stats, G=None: (calls.append(stats), right(stats, G))[1]
    )
    found = build(fl.KPSVD(), stats).dense()
    few = len(calls)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    calls.clear()
    monkeypatch.setattr("fisher_lab.statistics.pieces.KEPT_BYTES", KEPT_BYTES)
    build(fl.KPSVD(), stats)
    assert few == len(calls) + 1


def test_kpsvd_of_gradients_whose_squares_vanish_in_single_precision() -> None:
    """Large inputs meet tiny output gradients and the other way round."""
    stats = shared(N=2, T=2)
    scale = torch.tensor([1.0, 1e-30], dtype=torch.float64)
    tiny = LayerStats(stats.a * scale.view(2, 1, 1, 1), stats.g * scale.flip(0).view(1, 2, 1, 1, 1))
    found, expected = (build(fl.KPSVD(), s).dense() for s in (tiny, stats))
    torch.testing.assert_close(found * 1e60, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("held", [False, True])
def test_pieces_of_gram_matrices_are_small(held: bool, monkeypatch) -> None:
    """Of many columns of a small weight, too, whose gradients fit into one piece."""
    stats = shared(N=60)
    if held:
        stats = stats.with_gradients()
    expected = float(contractions.overlap(stats, stats))
    monkeypatch.setattr("fisher_lab.statistics.pieces.CHUNK_BYTES", 2**13)
    monkeypatch.setattr("fisher_lab.statistics.pieces.KEPT_BYTES", 2**16)
    blocks = [block.nbytes for _, _, block in contractions.gram_pieces(stats, stats)]
    assert 2**12 < max(blocks) <= 2**13
    assert len(blocks) == 4 * 5 / 2
    assert float(contractions.overlap(stats, stats)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("fisher", ["true", "mc"])
def test_damped_errors_do_not_depend_on_the_memory(labelled: bool, fisher: str) -> None:
    """Labels are drawn for a whole batch before it is cut into pieces, also those of the
    gradient.
    """
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x = torch.randn(40, 5, generator=draw)
    data = (x, torch.arange(40) % 4) if labelled else x
    values = []
    for memory in (None, 1e-4, 5e-5, 3e-5):
        comparison = fl.compare(
            model,
            fl.Categorical(),
            data,
            [fl.KFAC()],
            fisher=fisher,
            errors=["damped_cosine"],
            dampings=[1e-2],
            layers=["0"],
            memory=memory,
        )
        values.append(comparison.value("0", "KFAC", "damped_cosine", 1e-2))
    assert values == pytest.approx([values[0]] * len(values), rel=1e-9)
