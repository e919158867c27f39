"""How long a comparison takes is said before it begins, and how long is left while it goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab._ground import progress
from fisher_lab._ground.progress import Progress, duration
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from fisher_lab.diagnose import cost

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def compare(**options):
    return fl.compare(
        net(), fl.Categorical(), X, [fl.KFAC(), fl.TN()], errors=["frobenius"], **options
    )


def test_one_line_before_what_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(cost, "WORTH_TELLING", 0.0)
    compare()
    line = capsys.readouterr().err
    assert line.startswith("2 layers, largest 5 x 7, R = 2, N = 12: about 1 s; fisher='mc' about 1")
    assert line.count("\n") == 1
    compare(fisher="mc")
    assert capsys.readouterr().err.strip() == "2 layers, largest 5 x 7, R = 1, N = 12: about 1 s"
    compare(progress=False)
    assert capsys.readouterr().err == ""


def test_nothing_is_said_of_what_is_short(capsys):
    compare()
    assert capsys.readouterr().err == ""


def test_what_an_earlier_run_finished_is_not_counted(monkeypatch, capsys, tmp_path):
    path = tmp_path / "run.json"
    compare(resume=path)
    monkeypatch.setattr(cost, "WORTH_TELLING", 0.0)
    compare(resume=path)
    assert capsys.readouterr().err == ""


def test_a_line_now_and_then_where_stderr_is_a_file(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Progress(None, 4) as bar:
        bar.weigh(2)
        bar.say("building")
        bar.advance()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0%  building"
    assert second == "50%, 1 s left  building"
    with Progress(False, 4) as bar:
        bar.announce("a line")
        bar.advance()
    assert capsys.readouterr().err == ""


def test_all_work_is_done_at_the_end(monkeypatch):
    bars = []

    class Noted(Progress):
        def __enter__(self):
            bars.append(self)
            return super().__enter__()

    monkeypatch.setattr(fl.diagnose.comparing, "Progress", Noted)
    compare()
    (bar,) = bars
    assert bar.done == pytest.approx(bar.total)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (7.4, "7 s"), (44, "40 s"), (100, "2 min"), (1300, "20 min"), (9000, "2.5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def operations(model, likelihood, data, fisher="true", dampings=0) -> float:
    source = Source(Setup(model, likelihood, data, fisher=fisher))
    return cost.of_comparison(source, list(source.layers), 11, dampings)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def test_more_takes_longer():
    """Wider, more examples, more directions, more dampings."""
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    plain = operations(mlp(64), fl.Categorical(), x)
    assert operations(mlp(64), fl.Categorical(), x.repeat(10, 1)) > plain
    assert operations(mlp(256), fl.Categorical(), torch.randn(200, 256)) > 4 * plain
    assert operations(mlp(64), fl.Categorical(), x, "mc") < plain
    assert operations(mlp(64), fl.Categorical(), x, dampings=3) > plain


SPEED = 48e9  # operations a second of the processor on which these seconds were measured
SECONDS = {
    "char_transformer": 2.1,
    "martens_grosse": 1.9,
    "mnist_autoencoder": 3.6,
    "mnist_cnn": 1.1,
    "photo_patches_cnn": 1.4,
}
SHORT = {"digits_mlp": 0.2, "iris_regression": 0.1, "mnist1d_conv1d": 0.7, "segmentation": 1.6}


@pytest.mark.parametrize("name", [*SECONDS, *SHORT])
def test_of_the_problems(name):
    """Beside what was measured once; short ones, of which nothing is said, are known less well."""
    problem = fl.problems.load(name, steps=0)
    predicted = operations(problem.model, problem.likelihood, problem.data, problem.fisher) / SPEED
    factor = 2.0 if name in SECONDS else 4.0
    measured = (SECONDS | SHORT)[name]
    assert measured / factor < predicted < measured * factor


class Recurrent(nn.Module):
    """An LSTM, whose block is over its flattened parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 16, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.inner(x)[0][:, -1])


@pytest.mark.parametrize(
    ("make", "x", "fisher", "measured"),
    [
        (
            lambda: nn.Sequential(nn.Linear(512, 512), nn.Tanh(), mlp(512)),
            torch.randn(200, 512),
            "true",
            15.6,
        ),
        (
            lambda: nn.Sequential(nn.Linear(784, 1000), nn.Tanh(), nn.Linear(1000, 10)),
            torch.randn(64, 784),
            "mc",
            25.5,
        ),
        (Recurrent, torch.randn(20, 6, 8), "true", 26.0),
    ],
    ids=["wide", "wider, mc", "recurrent"],
)
def test_of_what_takes_longer(make, x, fisher, measured):
    torch.manual_seed(0)
    predicted = operations(make(), fl.Categorical(), x, fisher) / SPEED
    assert measured / 2 < predicted < measured * 2
