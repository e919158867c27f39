"""Numerics that the structures rely on."""

import pytest
import torch

from fisher_lab import linalg


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
        torch.testing.assert_close(vectors[k] @ values[k].diag() @ vectors[k].T, M[k], rtol=1e-4, atol=1e-4)
