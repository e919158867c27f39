"""The training loop: what it records, and that a killed run goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim, training
from tests.optim.support import batch, net

LIKELIHOOD = fl.Categorical()
ALL = training.optimizer_names()


def parts(name="KFAC", dtype=torch.float32, lr=0.01, dropout=0.0):
    model = nn.Sequential(net(dtype), nn.Dropout(dropout)) if dropout else net(dtype)
    return model, training.make_optimizer(name, model, LIKELIHOOD, lr), batch(60, dtype)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_trains_and_records(name, tmp_path):
    model, opt, (x, y) = parts(name)
    y = (x.sum(1) > 0) + (x[:, 0] > 0).to(torch.int64)
    file = tmp_path / "metrics.jsonl"
    records = training.fit(
        model, opt, LIKELIHOOD, (x, y), 5, batch=20, test_data=(x, y), metrics=file
    )
    assert training.load_metrics(file) == records
    assert [r["step"] for r in records] == [3, 6, 9, 12, 15]
    assert all({"epoch", "step", "loss", "seconds", "lr", "test_loss"} <= set(r) for r in records)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("name", ["KFAC", "KBFGS", "SGD", "Adam"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name):
    found = []
    for seed in (0, 0, 1):
        model, opt, data = parts(name)
        training.fit(model, opt, LIKELIHOOD, data, 2, batch=20, seed=seed)
        found.append(model)
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


class Killed(Exception):
    pass


def kill_at(step):
    def hook(optimizer, args, kwargs):
        hook.count += 1
        if hook.count > step:
            raise Killed

    hook.count = 0
    return hook


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("killed_after", [4, 5, 8])
def test_a_killed_run_goes_on_bit_by_bit(name, killed_after, tmp_path):
    """Checkpoints every 2 steps, 3 steps an epoch: the kill is inside an epoch, after a checkpoint
    or between two.
    """
    arguments = {"batch": 20, "checkpoint_every": 2, "seed": 3}
    whole, opt, data = parts(name, dropout=0.3)
    torch.manual_seed(0)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)
    expected = training.fit(whole, opt, LIKELIHOOD, data, 4, schedule=schedule, **arguments)

    files = {"checkpoint": tmp_path / "run.pt", "metrics": tmp_path / "run.jsonl"}
    model, opt, data = parts(name, dropout=0.3)
    torch.manual_seed(0)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)
    handle = opt.register_step_pre_hook(kill_at(killed_after))
    with pytest.raises(Killed):
        training.fit(model, opt, LIKELIHOOD, data, 4, schedule=schedule, **arguments, **files)
    handle.remove()
    model, opt, data = parts(name, dropout=0.3)
    torch.manual_seed(99)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)
    found = training.fit(
        model, opt, LIKELIHOOD, data, 4, schedule=schedule, resume=True, **arguments, **files
    )
    assert same(model, whole)
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
    assert strip(found) == strip(expected)
    assert training.load_metrics(files["metrics"]) == found


SCRIPT = """
import sys, torch, fisher_lab as fl
from fisher_lab import training
from tests.training.test_fit import parts, LIKELIHOOD
model, opt, data = parts("TNT")
slow = lambda *a: __import__("time").sleep(0.02)
opt.register_step_post_hook(slow)
files = {"metrics": sys.argv[1] + "/m.jsonl", "checkpoint": sys.argv[1] + "/c.pt"}
training.fit(model, opt, LIKELIHOOD, data, 40, batch=20, checkpoint_every=1, resume=True, **files)
torch.save(model.state_dict(), sys.argv[1] + "/done.pt")
"""


def test_a_process_killed_outright_leaves_a_checkpoint_that_loads(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command)
    for _ in range(3600):  # the start alone takes half a minute on a busy machine
        time.sleep(0.05)
        if (tmp_path / "c.pt").exists():
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "done.pt").exists()
    step = torch.load(tmp_path / "c.pt", weights_only=True)["step"]
    assert 1 <= step < 120
    subprocess.run(command, check=True)
    model, opt, data = parts("TNT")
    training.fit(model, opt, LIKELIHOOD, data, 40, batch=20)
    found = torch.load(tmp_path / "done.pt", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert [
        json.loads(line)["epoch"] for line in (tmp_path / "m.jsonl").read_text().splitlines()
    ] == list(range(1, 41))


def test_without_resume_an_old_run_is_begun_anew(tmp_path):
    files = {"checkpoint": tmp_path / "run.pt", "metrics": tmp_path / "run.jsonl"}
    for _ in range(2):
        model, opt, data = parts()
        records = training.fit(model, opt, LIKELIHOOD, data, 2, batch=20, **files)
    assert len(files["metrics"].read_text().splitlines()) == len(records) == 2


def test_more_epochs_go_on_from_a_finished_run(tmp_path):
    whole, opt, data = parts()
    training.fit(whole, opt, LIKELIHOOD, data, 5, batch=20)
    for epochs in (2, 5):
        model, opt, data = parts()
        records = training.fit(
            model,
            opt,
            LIKELIHOOD,
            data,
            epochs,
            batch=20,
            checkpoint=tmp_path / "run.pt",
            resume=True,
        )
    assert same(model, whole)
    assert len(records) == 5


def test_a_divergence_ends_the_run_and_is_recorded():
    model, opt, (x, y) = parts("SGD", lr=1e30)
    records = training.fit(model, opt, LIKELIHOOD, (x, y), 10, batch=20)
    assert records[-1]["diverged"]
    assert len(records) < 10
    json.dumps(records, allow_nan=False)


def test_a_bad_batch_does_not_end_a_run_of_an_optimizer_that_skips_it():
    model, opt, (x, y) = parts("KFAC")
    x[7] = float("nan")
    with pytest.warns(RuntimeWarning, match="non-finite"):
        records = training.fit(
            model, opt, LIKELIHOOD, [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)], 3
        )
    assert len(records) == 3
    assert not any("diverged" in r for r in records)


def test_batches_of_a_data_loader_and_evaluation_mode_come_back():
    model, opt, (x, y) = parts(dropout=0.5)
    model.eval()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 15)
    records = training.fit(model, opt, LIKELIHOOD, loader, 2)
    assert records[-1]["step"] == 8
    assert not model.training


def test_errors_of_the_matrices_in_use_are_recorded_along_a_training(tmp_path):
    model, opt, data = parts(dtype=torch.float64)
    measure = training.record_errors(data, every=2, errors=["frobenius"])
    records = training.fit(
        model, opt, LIKELIHOOD, data, 4, batch=20, callbacks=[measure], metrics=tmp_path / "m.jsonl"
    )
    assert ["errors" in r for r in records] == [False, True, False, True]
    row = records[1]["errors"][0]
    assert row["layer"] == "0"
    assert row["approximation"] == "KFAC"
    assert row["value"] > 0
    assert training.record_errors(data)(torch.optim.SGD(model.parameters(), 0.1), 1) == {}


def test_progress_shows_epoch_loss_and_speed(monkeypatch):
    """The bar itself adds the time left; its total is known, so that it can."""
    said, totals = [], []

    class Bar(training.fitting.Progress):
        def __init__(self, enabled, total):
            super().__init__(enabled, total)
            self.every = 0.5
            totals.append(total)

        def say(self, what):
            said.append(what)

    monkeypatch.setattr(training.fitting, "Progress", Bar)
    model, opt, data = parts()
    opt.register_step_post_hook(lambda *a: time.sleep(0.3))
    training.fit(model, opt, LIKELIHOOD, data, 2, batch=20, progress=True)
    assert totals == [6]
    assert said
    assert all(re.fullmatch(r"epoch [12]/2  loss [\d.]+  [\d.]+ steps/s", what) for what in said)


WRONG = [
    ({"epochs": 0}, "epochs=0"),
    ({"epochs": 1, "batch": 61}, "batch=61"),
    ({"epochs": 1, "resume": True}, "resume=True without a checkpoint"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments_are_refused(options, message):
    model, opt, data = parts()
    with pytest.raises(ValueError, match=message):
        training.fit(model, opt, LIKELIHOOD, data, **{"batch": 20, **options})


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    for seed in (0, 1):
        model, opt, data = parts()
        arguments = {"batch": 20, "seed": seed, "checkpoint": tmp_path / "c.pt", "resume": True}
        if seed:
            with pytest.raises(ValueError, match=r"made with seed=0, expected 1"):
                training.fit(model, opt, LIKELIHOOD, data, 1, **arguments)
        else:
            training.fit(model, opt, LIKELIHOOD, data, 1, **arguments)


def test_empirical_statistics_get_the_labels():
    model, _, data = parts()
    opt = training.make_optimizer("TKFAC", model, LIKELIHOOD, 0.01, fisher="empirical")
    assert len(training.fit(model, opt, LIKELIHOOD, data, 1, batch=20)) == 1


def test_optimizers_by_name():
    model = net()
    assert isinstance(training.make_optimizer("TNT", model, LIKELIHOOD, 0.1, 0.5), optim.TNT)
    assert (
        training.make_optimizer("KFAC", model, LIKELIHOOD, 0.1, 0.5).param_groups[0]["damping"]
        == 0.5
    )
    assert training.make_optimizer("SGD", model, LIKELIHOOD, 0.1).param_groups[0]["momentum"] == 0.9
    with pytest.raises(ValueError, match="expected one of TNT"):
        training.make_optimizer("Newton", model, LIKELIHOOD, 0.1)
    with pytest.raises(ValueError, match=r"damping=1\.0 for Adam"):
        training.make_optimizer("Adam", model, LIKELIHOOD, 0.1, 1.0)


def test_metrics_are_not_appended_through_a_link(tmp_path):
    victim, metrics = tmp_path / "victim", tmp_path / "metrics.jsonl"
    victim.write_text("precious")

    def plant(optimizer, epoch):
        if epoch == 2:
            metrics.unlink()
            metrics.symlink_to(victim)
        return {}

    model, opt, data = parts("SGD")
    with pytest.raises(ValueError, match="is a link, expected a regular file"):
        training.fit(model, opt, LIKELIHOOD, data, 2, batch=20, metrics=metrics, callbacks=[plant])
    assert victim.read_text() == "precious"


def test_going_on_rewrites_the_metrics_and_not_what_a_link_points_to(tmp_path):
    victim, files = (
        tmp_path / "victim",
        {"metrics": tmp_path / "m.jsonl", "checkpoint": tmp_path / "c.pt"},
    )
    victim.write_text("precious")
    for epochs in (1, 2):
        model, opt, data = parts("SGD")
        training.fit(model, opt, LIKELIHOOD, data, epochs, batch=20, resume=True, **files)
        if epochs == 1:
            files["metrics"].unlink()
            files["metrics"].symlink_to(victim)
    assert victim.read_text() == "precious"
    assert len(files["metrics"].read_text().splitlines()) == 2


def test_an_interrupted_checkpoint_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    files = {"checkpoint": tmp_path / "run.pt"}
    model, opt, data = parts("SGD")
    training.fit(model, opt, LIKELIHOOD, data, 1, batch=20, **files)
    before = files["checkpoint"].read_bytes()

    def interrupted(state, file):
        with open(file, "wb") if isinstance(file, os.PathLike) else nullcontext(file) as out:
            out.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.fit(model, opt, LIKELIHOOD, data, 2, batch=20, resume=True, **files)
    assert files["checkpoint"].read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_errors_of_a_net_without_a_dense_block_are_recorded():
    """Every layer of the autoencoder is too large for a dense block, so that nothing but ready
    matrices is measured.
    """
    from fisher_lab import problems

    problem = problems.load("mnist_autoencoder", steps=0, examples=20)
    x, y = (part[:20] for part in problem.train_data)
    opt = fl.optim.KFAC(problem.model, problem.likelihood, 0.01, layers=["7", "9"], damping=0.1)
    with opt.observing():
        z = problem.model(x)
    problem.likelihood.loss(z, y).backward()
    opt.step()
    measure = training.record_errors((x[:5], y[:5]), every=1, errors=["trace"], fisher="mc")
    assert measure(opt, 1)
