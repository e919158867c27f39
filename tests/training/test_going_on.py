"""Going on with a training: nothing mixed, nothing lost, every refusal a sentence before
any work.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import training
from fisher_lab.training import checkpoints
from tests.optim.support import batch, net

LIKELIHOOD = fl.Categorical()
TINY = {
    "problem": "mnist_autoencoder",
    "settings": {"widths": (8, 3), "examples": 20},
    "epochs": 1,
    "batch": 500,
}


def trained(folder, epochs=1, size=20, name="KFAC", lr=0.01, resume=False, model=None, **options):
    model = net() if model is None else model
    opt = training.make_optimizer(name, model, LIKELIHOOD, lr, **options)
    files = {"metrics": folder / "m.jsonl", "checkpoint": folder / "c.pt"}
    records = training.fit(
        model, opt, LIKELIHOOD, batch(60), epochs, batch=size, resume=resume, **files
    )
    return model, records


CHANGED = [
    ({"lr": 0.5}, "lr=0.01, expected 0.5"),
    ({"damping": 3.0}, "damping=.*, expected 3"),
    ({"momentum": 0.2}, "momentum=0.9, expected 0.2"),
    ({"size": 30}, "batch=20, expected 30"),
    ({"refresh_every": 7}, "refresh_every=.*, expected 7"),
    ({"observe_every": 3}, "observe_every=.*, expected 3"),
    ({"name": "TNT"}, "optimizer='?KFAC'?, expected '?TNT"),
    ({"lr": 0.5, "size": 30}, "lr=0.01, expected 0.5.* and batch=20, expected 30"),
]


@pytest.mark.parametrize(("changed", "message"), CHANGED)
def test_what_differs_from_the_checkpoint_is_refused_by_name(changed, message, tmp_path):
    trained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        trained(tmp_path, epochs=2, resume=True, model=model, **changed)
    assert "give the same again" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_the_same_goes_on_also_where_a_schedule_has_changed_the_learning_rate(tmp_path):
    for epochs in (2, 4):
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        records = training.fit(
            model, opt, LIKELIHOOD, batch(60), epochs, batch=20, schedule=schedule,
            checkpoint=tmp_path / "c.pt", resume=True,
        )  # fmt: skip
    assert [r["lr"] for r in records] == [0.1, 0.05, 0.025, 0.0125]


def test_the_command_refuses_what_differs(tmp_path):
    arguments = {**TINY, "optimizer": "SGD", "output": tmp_path / "run.jsonl"}
    training.train_command(**arguments, lr=0.01)
    with pytest.raises(ValueError, match=r"lr=0\.01, expected 0\.02"):
        training.train_command(**{**arguments, "epochs": 2}, lr=0.02, resume=True)
    with pytest.raises(ValueError, match=r"momentum=0\.9, expected 0\.5"):
        training.train_command(
            **{**arguments, "epochs": 2}, lr=0.01, resume=True, options={"momentum": 0.5}
        )


# -- damaged, foreign and other-sized --------------------------------------------------------------
def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"precious",
    "a state dict": saved({"weight": torch.ones(2)}),
    "a tensor": saved(torch.ones(2)),
    "a module": saved(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_checkpoint_is_refused_and_kept(content, resume, tmp_path):
    (tmp_path / "c.pt").write_bytes(content)
    (tmp_path / "m.jsonl").write_text("precious")
    with pytest.raises(ValueError, match=r"c\.pt .*(foreign|damaged).*expected a checkpoint"):
        trained(tmp_path, resume=resume)
    assert (tmp_path / "c.pt").read_bytes() == content
    assert (tmp_path / "m.jsonl").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["c.pt", "m.jsonl"]


def test_half_a_checkpoint_is_refused(tmp_path):
    trained(tmp_path)
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"damaged or foreign"):
        trained(tmp_path, epochs=2, resume=True)


def test_a_flipped_bit_in_the_name_of_the_digest_is_seen(tmp_path):
    trained(tmp_path)
    path = tmp_path / "c.pt"
    whole = path.read_bytes()
    assert whole.count(b"digest") == 1
    path.write_bytes(whole.replace(b"digest", b"diwest"))
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.read(path)


def test_no_flipped_bit_loads_as_something_else(tmp_path):
    trained(tmp_path)
    path = tmp_path / "c.pt"
    whole = bytearray(path.read_bytes())
    right = checkpoints.digest(checkpoints.read(path))
    draw = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(whole), (60,), generator=draw).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        try:
            found = checkpoints.read(path)
        except ValueError:
            refused += 1
        else:  # in the padding between the records
            assert checkpoints.digest(found) == right
    assert refused > 10


def test_a_checkpoint_without_a_digest_is_read(tmp_path):
    trained(tmp_path)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    for key in ("digest", "asked"):
        del state[key]
    torch.save(state, tmp_path / "c.pt")
    _, records = trained(tmp_path, epochs=2, resume=True)
    assert len(records) == 2


def test_the_checkpoint_of_another_model_changes_nothing(tmp_path):
    trained(tmp_path, name="SGD")
    other = net()
    first = next(module for module in other.modules() if isinstance(module, nn.Linear))
    first.weight = nn.Parameter(torch.zeros(first.out_features, first.in_features + 1))
    start = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another model: '0.weight' has shape .*, expected"):
        trained(tmp_path, epochs=2, resume=True, name="SGD", model=other)
    assert all(torch.equal(value, start[name]) for name, value in other.state_dict().items())


# -- places and arguments before work --------------------------------------------------------------
def test_arguments_are_checked_before_the_old_metrics_go(tmp_path):
    (tmp_path / "m.jsonl").write_text("precious")
    model, data = net(), batch(60)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong = [
        {"epochs": 0},
        {"batch": 0},
        {"checkpoint_every": 0},
        {"resume": True},
        {"seed": "x"},
        {"test_data": "nothing"},
    ]
    for options in wrong:
        arguments = {"epochs": 1, "batch": 20, "metrics": tmp_path / "m.jsonl", **options}
        with pytest.raises((ValueError, TypeError), match="expected"):
            training.fit(model, opt, LIKELIHOOD, data, **arguments)
    assert (tmp_path / "m.jsonl").read_text() == "precious"


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_place_that_cannot_be_written_is_told_before_work(command, tmp_path, monkeypatch):
    def started(*arguments, **options):
        raise AssertionError("work began")

    monkeypatch.setattr(training.commands, "start", started)
    (tmp_path / "file").write_text("no folder")
    ending = ".jsonl" if command == "train" else ".json"
    output = tmp_path / "file" / f"run{ending}"
    run = training.tune_command
    if command == "train":
        run = partial(training.train_command, lr=0.1)
    with pytest.raises(ValueError, match=r"expected a writable"):
        run("digits_mlp", "SGD", output=output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": (0.0,)}, r"Got 0\.0 in lrs"),
        ({"lrs": (0.1, float("nan"))}, "Got nan in lrs"),
        ({"lrs": ()}, "Got no lrs"),
        ({"dampings": (-1.0,)}, r"Got -1\.0 in dampings"),
        ({"dampings": ()}, "Got no dampings"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_told_before_work(options, message, monkeypatch):
    monkeypatch.delattr(training.commands, "start")
    with pytest.raises(ValueError, match=message):
        training.tune_command("digits_mlp", "SGD", **options)


def test_a_model_beside_the_metrics_is_not_replaced(tmp_path, monkeypatch):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    monkeypatch.delattr(training.commands, "start")
    with pytest.raises(ValueError, match=r"model\.pt is foreign, expected a checkpoint"):
        training.train_command("digits_mlp", "SGD", lr=0.1, output=tmp_path / "model.jsonl")
    assert (tmp_path / "model.pt").read_bytes() == before


# -- one run at a time -----------------------------------------------------------------------------
HOLD = """
import sys
from pathlib import Path
from fisher_lab.training.places import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["fit", "tune"])
def test_two_runs_do_not_write_to_one_file(command, tmp_path):
    path = tmp_path / "m.jsonl"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline().strip() == b"held"
        run = partial(trained, tmp_path)
        if command == "tune":
            run = partial(training.tune_command, "digits_mlp", "SGD", output=path)
        with pytest.raises(ValueError, match=r"Another run writes to .*m\.jsonl"):
            run()
        holder.kill()  # outright: nothing is held any more
        holder.wait()
        trained(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert sorted(os.listdir(tmp_path)) == ["c.pt", "m.jsonl"]


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".m.jsonl.lock").symlink_to(victim)
    with pytest.raises(ValueError, match="is a link"):
        trained(tmp_path)
    assert victim.read_text() == "precious"


# -- diverged --------------------------------------------------------------------------------------
def test_a_diverged_trial_has_no_loss_and_comes_last(tmp_path):
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1e38)
    records = training.fit(
        model, opt, LIKELIHOOD, batch(60), 3, batch=20, metrics=tmp_path / "m.jsonl"
    )
    assert records[-1]["diverged"]
    assert records[-1]["loss"] is None
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])["loss"] is None
    trials = training.tune_command(**TINY, optimizer="SGD", lrs=(1e38, 0.01), dampings=(1.0,))
    assert [trial["loss"] is None for trial in trials] == [False, True]
