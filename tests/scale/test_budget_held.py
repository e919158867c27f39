"""memory= is a promise: what cannot fit is refused first, and what is measured stays within it."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch import nn

import fisher_lab as fl

LOSS = nn.CrossEntropyLoss()


def question(d_in: int, d_out: int, N: int = 4):
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out), LOSS, (torch.randn(N, d_in), torch.zeros(N, dtype=torch.int64))


@pytest.mark.parametrize(
    "approximation",
    [
        fl.KFAC(),
        fl.EKFAC(),
        fl.TKFAC(),
        fl.TEKFAC(),
        fl.TN(),
        fl.Shampoo(),
        fl.LNGD(),
        fl.MiniBlock("row_avg"),
        fl.Corrected(fl.TKFAC()),
    ],
    ids=repr,
)
def test_a_factor_that_does_not_fit_is_refused_in_the_first_second(approximation):
    model, loss, data = question(9000, 4)
    started = time.process_time()
    for ask in (
        lambda: fl.estimate(approximation, model, loss, data, memory=1.0),
        lambda: fl.compare(model, loss, data, [approximation], memory=1.0),
    ):
        with pytest.raises(ValueError, match=r"factors of .*9001.* rows.*raise memory= to 2\.4"):
            ask()
    assert time.process_time() - started < 2


def test_the_least_that_is_named_will_do():
    model, loss, data = question(400, 3)
    with pytest.raises(ValueError, match="raise memory= to ") as caught:
        fl.estimate(fl.KFAC(), model, loss, data, memory=1e-3)
    (least,) = re.findall(r"memory= to ([\d.]+)\.$", str(caught.value))
    fl.estimate(fl.KFAC(), model, loss, data, memory=float(least))
    with pytest.raises(ValueError, match="raise memory="):
        fl.estimate(fl.KFAC(), model, loss, data, memory=0.9 * float(least))


@pytest.mark.parametrize("approximation", [fl.Diagonal(), fl.TENGraD(), fl.KPSVD()], ids=repr)
def test_what_holds_no_factor_is_measured(approximation):
    model, loss, data = question(9000, 4)
    assert fl.estimate(approximation, model, loss, data, memory=1.0)
