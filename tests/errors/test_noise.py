"""Noise floors are those of the values as they are computed."""

import torch
from torch import nn

import fisher_lab as fl


def test_the_order_of_the_examples_changes_errors_within_their_noise() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).eval(), torch.randn(30, 5)
    candidates = [fl.KFAC(), fl.TKFAC(), fl.EKFAC(), fl.Diagonal(), fl.MiniBlock(), fl.LNGD()]
    errors = ["frobenius", "frobenius_rescaled", "spectral", "trace", "spectrum"]
    found = [
        fl.compare(model, fl.Categorical(), data, candidates, errors=errors).rows
        for data in (x, x.flip(0))
    ]
    for one, other in zip(*found, strict=True):
        assert abs(one.value - other.value) <= one.noise + other.noise, one
