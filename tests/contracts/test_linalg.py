"""Numerics that the structures rely on."""

import pytest
import torch

from fisher_lab._ground import linalg


def test_eigh_falls_back_to_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def fails_in_single(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if M.dtype == torch.float32 or not bool(torch.isfinite(M).all()):
            raise torch.linalg.LinAlgError("failed to converge")
        return real(M)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    M = torch.randn(3, 5, 5)
    M = M @ M.mT
    M[1, 0, 0] = torch.nan
    values, vectors = linalg.eigh(M)
    assert values.dtype == vectors.dtype == torch.float32
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    for k in (0, 2):
        torch.testing.assert_close(
            vectors[k] @ values[k].diag() @ vectors[k].T, M[k], rtol=1e-4, atol=1e-4
        )


def test_eigh_in_single_precision_sees_no_zeros_on_the_diagonal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Divide and conquer fails on many a factor with dead units (a third of a large autoencoder's),
    at full cost.
    """
    real, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: (seen.append(M), real(M))[1])
    X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    X[:, :3] = 0
    M = torch.cat([X @ X.mT, torch.zeros(1, 6, 6)])
    values, vectors = linalg.eigh(M)
    assert bool((seen[0][:2].diagonal(dim1=1, dim2=2) > 0).all())
    expected = real(M.double())[0]
    assert float((values - expected).abs().max()) < 1e-6 * float(expected.max())
    assert float(values[2].abs().max()) == 0
    torch.testing.assert_close(
        vectors @ torch.diag_embed(values) @ vectors.mT, M, rtol=1e-5, atol=1e-5
    )
    linalg.eigh(M.double())
    assert torch.equal(seen[1], M.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_kept_is_where_without_its_cost(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.5, torch.nan, torch.inf], [-2.0, 0.0, 3.0]], dtype=dtype)[:, 1:]
    yes, no = torch.tensor(True), torch.tensor(False)
    assert linalg.kept(yes, x).dtype == dtype
    torch.testing.assert_close(linalg.kept(yes, x), x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(linalg.kept(no, x), torch.zeros_like(x))
    assert linalg.kept(yes, x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e20), (torch.float64, 1e160)])
def test_eigh_of_entries_whose_squares_overflow(dtype: torch.dtype, size: float) -> None:
    M = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype) * size
    values, vectors = linalg.eigh(M)
    torch.testing.assert_close(values / size, torch.tensor([1.0, 3.0], dtype=dtype))
    torch.testing.assert_close(vectors * (values / size) @ vectors.T, M / size)


def test_roots_of_a_matrix_with_zeros_have_the_right_derivative() -> None:
    """Eigenvectors whose entries are 0 turn all the same; what is null has derivative 0,
    not NaN.
    """
    M = torch.diag(torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64))
    E = torch.zeros_like(M)
    E[0, 1] = E[1, 0] = 1.0

    def root(M: torch.Tensor) -> torch.Tensor:
        values, vectors = linalg.eigh(M)
        return (vectors * linalg.shifted_power(values, 0.5)) @ vectors.T

    for i, j, expected in ((0, 0, 1 / 2), (1, 1, 1 / 4), (0, 1, 1 / 3), (2, 2, 0.0)):
        leaf = M.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(root(leaf)[i, j], leaf)
        assert float((gradient + gradient.T)[i, j] / 2) * (1 if i == j else 2) == pytest.approx(
            expected, abs=1e-12
        )


@pytest.mark.parametrize("p", [-1.0, -0.5, 0.5, 2.0])
def test_a_power_of_nan_is_nan(p: float) -> None:
    """An inverse that failed must not look like one of zeros."""
    values = torch.tensor([torch.nan, 1.0])
    for damping in (0.0, 0.1, torch.tensor(0.1)):
        assert bool(linalg.shifted_power(values, p, damping)[0].isnan())


def test_eigenvalues_that_single_precision_cannot_find_are_found_in_double(monkeypatch) -> None:
    """LAPACK's routine gave NaN for a difference of the size of rounding, with finite entries."""
    routine = torch.linalg.eigvalsh

    def fails_in_single(M: torch.Tensor) -> torch.Tensor:
        return routine(M) if M.dtype == torch.float64 else torch.full_like(M[0], torch.nan)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_in_single)
    found = linalg.eigenvalues(torch.diag(torch.tensor([3.0, 1.0, 2.0])))
    assert found.dtype == torch.float32
    assert found.tolist() == [1.0, 2.0, 3.0]
