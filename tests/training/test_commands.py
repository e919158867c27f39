"""Training and tuning named problems, as the command line does."""

import inspect
import json

import pytest
import torch

from fisher_lab import problems, training
from fisher_lab.cli import training as command_line

TINY = {
    "problem": "mnist_autoencoder",
    "settings": {"widths": (8, 3), "examples": 20},
    "epochs": 1,
    "batch": 500,
}


@pytest.mark.parametrize("optimizer", ["TNT", "SGD"])
def test_train_a_named_problem_and_go_on(optimizer, tmp_path):
    output = tmp_path / "run.jsonl"
    arguments = {**TINY, "optimizer": optimizer, "lr": 0.01, "output": output}
    arguments |= {"damping": 10.0} if optimizer == "TNT" else {}
    first = training.train_command(**arguments)
    more = training.train_command(**{**arguments, "epochs": 2}, resume=True)
    assert more[0] == first[0]
    assert len(output.read_text().splitlines()) == 2
    assert "test_loss" in more[1]
    assert (tmp_path / "run.pt").exists()


@pytest.mark.parametrize(("optimizer", "own"), [("KFAC", 0.01), ("TENGraD", 0.1), ("SGD", 0.001)])
def test_without_a_learning_rate_the_optimizer_has_its_own(optimizer, own):
    records = training.train_command(**TINY, optimizer=optimizer)
    assert [record["lr"] for record in records] == [own]
    given = training.train_command(**TINY, optimizer=optimizer, lr=0.02)
    assert [record["lr"] for record in given] == [0.02]


def test_the_command_line_leaves_the_learning_rate_to_the_optimizer():
    default = inspect.signature(command_line.train).parameters["lr"].default
    assert default is None


def test_a_named_problem_is_trained_from_its_untrained_start():
    loaded = problems.load("mnist_autoencoder", steps=0, widths=(8, 3))
    before = [p.detach().clone() for p in loaded.model.parameters()]
    training.train_command(loaded, "SGD", lr=0.0, epochs=1, batch=500)
    assert all(torch.equal(p, b) for p, b in zip(loaded.model.parameters(), before, strict=True))


def test_the_matrices_in_use_are_measured_on_the_problems_data(tmp_path):
    records = training.train_command(**TINY, optimizer="KFAC", lr=0.01, measure_every=1)
    assert {row["error"] for row in records[0]["errors"]} >= {"frobenius", "trace"}


def test_output_must_be_json_lines(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        training.train_command(**TINY, optimizer="SGD", lr=0.01, output=tmp_path / "run.csv")


def test_tuning_tries_the_grid_once_and_sorts_by_loss(tmp_path, monkeypatch):
    output = tmp_path / "trials.json"
    arguments = {
        **TINY,
        "optimizer": "KFAC",
        "lrs": (0.001, 0.1),
        "dampings": (0.1, 1.0),
        "output": output,
    }
    trials = training.tune_command(**arguments)
    assert {(t["lr"], t["damping"]) for t in trials} == {
        (0.001, 0.1),
        (0.001, 1.0),
        (0.1, 0.1),
        (0.1, 1.0),
    }
    losses = [t["loss"] for t in trials if t["loss"] is not None]
    assert losses == sorted(losses)
    saved = json.loads(output.read_text())
    saved["trials"] = saved["trials"][:3]
    del saved["digest"]  # as a file of before there was one
    output.write_text(json.dumps(saved))
    fitted = []
    original = training.commands.fit
    monkeypatch.setattr(
        training.commands, "fit", lambda *a, **o: fitted.append(1) or original(*a, **o)
    )
    again = training.tune_command(**arguments)
    assert len(fitted) == 1
    strip = lambda found: [{k: v for k, v in t.items() if k != "seconds"} for t in found]  # noqa: E731
    assert strip(again) == strip(trials)


def test_trials_of_another_budget_are_not_mixed_in(tmp_path):
    arguments = {
        **TINY,
        "optimizer": "SGD",
        "lrs": (0.01,),
        "dampings": (1.0,),
        "output": tmp_path / "trials.json",
    }
    training.tune_command(**arguments)
    with pytest.raises(ValueError, match="another problem or budget"):
        training.tune_command(**{**arguments, "epochs": 2})


def test_every_optimizer_gets_the_same_number_of_trials():
    for name in training.optimizer_names():
        trials = training.grid(name, (0.001, 0.01, 0.1, 1.0), (0.1, 1.0, 10.0))
        assert len(trials) == len(set(trials)) == 12
        assert min(lr for lr, _ in trials) == 0.001
        assert max(lr for lr, _ in trials) == 1.0


@pytest.mark.parametrize("command", ["train", "tune"])
def test_nothing_is_written_through_links(command, tmp_path):
    names = ["run.jsonl", "run.pt"] if command == "train" else ["run.json"]
    for name in names:
        for link in (tmp_path / name, tmp_path / f".{name}.partial"):
            victim = tmp_path / f"victim of {link.name}"
            victim.write_text("precious")
            if command == "train" or link.name != name:  # trials that are there already are read
                link.symlink_to(victim)
    if command == "train":
        training.train_command(**TINY, optimizer="SGD", lr=0.01, output=tmp_path / "run.jsonl")
    else:
        output = tmp_path / "run.json"
        training.tune_command(**TINY, optimizer="SGD", lrs=(0.01,), dampings=(1.0,), output=output)
    assert {path.read_text() for path in tmp_path.glob("victim*")} == {"precious"}
    assert all((tmp_path / name).is_file() and not (tmp_path / name).is_symlink() for name in names)


@pytest.mark.parametrize("content", ["{}", "[]", '{"about": 1}', "{", "3", '{"trials": []}'])
def test_a_file_that_holds_no_trials_is_refused_and_kept(content, tmp_path):
    output = tmp_path / "trials.json"
    output.write_text(content)
    with pytest.raises(ValueError, match="expected"):
        training.tune_command(**TINY, optimizer="SGD", lrs=(0.01,), dampings=(1.0,), output=output)
    assert output.read_text() == content
