"""training.fit on several ranks: the run of one process, one writer, and what faults leave behind."""

import json
import os
import time
from datetime import timedelta

import pytest
import torch
from torch import nn

from fisher_lab.training import fit, record_errors
from tests.ranks.crew import Crew, rank
from tests.ranks.test_training import LOSS, distance, flat, net, optimizer

EPOCHS = 3


def data():
    torch.manual_seed(9)
    return torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 4, (50,))


def fitted(folder, name="KFAC", resume=False, epochs=EPOCHS, fault=None, **options):
    """The records, and the weights."""
    model = nn.Sequential(*net(), nn.Dropout(0.2))  # each rank draws its own masks
    if not options.pop("dropout", True):
        model = net()
    callbacks = [record_errors(data(), 2, errors=["frobenius"])]
    if fault is not None:
        callbacks.append(lambda opt, epoch: fault(epoch) or {})
    records = fit(
        model,
        optimizer(name, model),
        LOSS,
        data(),
        epochs,
        batch=12,
        test_data=data(),
        metrics=f"{folder}/run.jsonl",
        checkpoint=f"{folder}/run.pt",
        resume=resume,
        callbacks=callbacks,
        progress=False,
    )
    return records, flat(model)


def plain(folder, name):
    return fitted(folder, name, dropout=False)


def without_times(records):
    """Records without their seconds, and the digests that cover them."""
    found = []
    for record in records:
        found.append({key: x for key, x in record.items() if key not in ("seconds", "digest")})
    return found


@pytest.mark.parametrize("name", ["KFAC", "KBFGS"])
def test_a_run_is_that_of_one_process_and_is_written_once(crews, tmp_path, name):
    (tmp_path / "one").mkdir()
    alone, weights = plain(tmp_path / "one", name)
    (tmp_path / "three").mkdir()
    every = crews.of(3).run(plain, str(tmp_path / "three"), name)
    for records, theirs in every:
        assert torch.equal(theirs, every[0][1])
        assert distance(theirs, weights) < 1e-9
        for record, expected in zip(records, alone, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-9)
            assert record["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-9)
            assert len(record.get("errors", ())) == len(expected.get("errors", ()))
    lines = (tmp_path / "three" / "run.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert without_times(written) == without_times(every[0][0])
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == ["run.jsonl", "run.pt"]


def test_a_checkpoint_goes_on_with_another_number_of_ranks(crews, tmp_path):
    started = crews.of(2).run(short, str(tmp_path))
    gone_on = crews.of(3).run(plain_resumed, str(tmp_path))
    (tmp_path / "whole").mkdir()
    records, weights = plain(tmp_path / "whole", "KFAC")
    assert len(started[0][0]) == 2
    for found, theirs in gone_on:
        assert len(found) == len(records)
        assert distance(theirs, weights) < 1e-9


def short(folder):
    return fitted(folder, epochs=2, dropout=False)


def plain_resumed(folder):
    return fitted(folder, resume=True, dropout=False)


def indivisible():
    model = net()
    fit(model, optimizer("KFAC", model), LOSS, data(), 1, batch=15, progress=False)


def test_a_batch_that_cannot_be_shared_is_refused(crews):
    for error in crews.of(2).errors(indivisible):
        assert "batch=15 on 2 ranks, expected a multiple" in error


# -- faults ----------------------------------------------------------------------------------------
def raising(epoch):
    if rank() == 1 and epoch == 2:
        raise KeyError("a fault of a user's own")


def dying(epoch):
    if rank() == 1 and epoch == 2:
        os._exit(9)


def hanging(epoch):
    if rank() == 1 and epoch == 2:
        time.sleep(16)


def faulty(folder, fault):
    return fitted(folder, fault=fault)


def gone_on(folder):
    return fitted(folder, resume=True)


@pytest.fixture(scope="module")
def whole(crews, tmp_path_factory):
    """The run without a fault."""
    return crews.of(2).run(fitted, str(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("fault", [raising, dying, hanging])
def test_a_fault_ends_all_ranks_and_the_checkpoint_is_whole(crews, tmp_path, whole, fault):
    crew = Crew(2, tmp_path, collective=timedelta(seconds=10))
    started = time.monotonic()
    first, second = crew.outcomes(faulty, str(tmp_path), fault)
    crew.end()
    assert time.monotonic() - started < 60
    kind, text = first
    assert kind == "error"
    assert "waited in vain for another rank" in text.splitlines()[-1]
    assert second[0] == ("gone" if fault is dying else "error")
    if fault is raising:
        assert "a fault of a user's own" in second[1]
    # the checkpoint of the epoch before
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1
    for (records, weights), (expected, theirs) in zip(
        crews.of(2).run(gone_on, str(tmp_path)), whole, strict=True
    ):
        assert torch.equal(weights, theirs)
        assert repr(without_times(records)) == repr(without_times(expected))
