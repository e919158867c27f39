"""Batches as people have them: mappings, tuples of inputs, outputs that hold logits."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fisher_lab as fl
from fisher_lab import training

V, L, N = 7, 5, 24
Two = namedtuple("Two", "hidden scores")


class Classifier(nn.Module):
    """As in the transformers library: named inputs, and an output with `logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None  # which the loss gets, not the model
        weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = (self.embedding(input_ids) * weight[..., None]).mean(1)
        return SimpleNamespace(logits=self.head(hidden.tanh()))


def rows():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (N, L), generator=draw)
    mask = (torch.rand(N, L, generator=draw) < 0.8).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def fitted(name, data, model=None, epochs=2, **options):
    torch.manual_seed(0)
    model = Classifier() if model is None else model
    opt = training.make_optimizer(name, model, nn.CrossEntropyLoss(), 0.05)
    records = training.fit(model, opt, nn.CrossEntropyLoss(), data, epochs, batch=8, **options)
    return model, records


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def as_dicts(whole):
    return [{key: value[n] for key, value in whole.items()} for n in range(N)]


@pytest.mark.parametrize("name", ["KFAC", "KBFGS", "SGD"])
def test_mappings_from_a_data_loader(name):
    """One step is that of the model called by hand."""
    whole = rows()
    loader = DataLoader(as_dicts(whole), batch_size=8)
    model, records = fitted(name, loader, test_data=whole)
    assert [r["step"] for r in records] == [3, 6]
    assert records[1]["test_loss"] < records[0]["test_loss"]
    pairs = []
    for given in loader:
        y = given.pop("labels")
        pairs.append((given, y))
    other, _ = fitted(name, pairs)
    assert same(model, other)
    if name == "SGD":
        torch.manual_seed(0)
        byhand = Classifier()
        opt = torch.optim.SGD(byhand.parameters(), lr=0.05, momentum=0.9)
        for _ in range(2):
            for given, y in pairs:
                opt.zero_grad()
                nn.functional.cross_entropy(byhand(**given).logits, y).backward()
                opt.step()
        assert same(model, byhand)


def test_one_mapping_is_shuffled_as_the_pair_is():
    whole = rows()
    inputs = {key: value for key, value in whole.items() if key != "labels"}
    found = [fitted("KFAC", data)[0] for data in (whole, (inputs, whole["labels"]))]
    renamed = {**inputs, "target": whole["labels"]}
    found.append(fitted("KFAC", renamed, labels="target")[0])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_several_inputs_and_a_named_output():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, a, b):
            return Two(a, self.left(a) + self.right(b))

    a, b = torch.randn(N, 4), torch.randn(N, 2)
    y = (a.sum(1) > 0).long()
    data = ((a, b), y)
    found = []
    for output in ("scores", 1, lambda two: two.scores):
        torch.manual_seed(1)
        model = Both()
        found.append(fitted("SGD", data, model, output=output, test_data=data)[0])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    with pytest.raises(TypeError, match=r"without output='nothing'"):
        fitted("SGD", data, Both(), output="nothing")


def test_training_without_labels_is_a_sentence():
    for data in (torch.randn(4, 3), {"input_ids": torch.ones(4, 2)}, [torch.randn(4, 3)], 3):
        with pytest.raises((ValueError, TypeError), match="labels"):
            fitted("SGD", data)


def test_the_command_takes_a_problem_of_mappings(tmp_path):
    whole = rows()
    for data in (whole, list(DataLoader(as_dicts(whole), batch_size=6))):
        torch.manual_seed(0)
        problem = fl.problems.Problem("mine", Classifier(), nn.CrossEntropyLoss(), data)
        records = training.train_command(
            problem, "KFAC", lr=0.05, epochs=2, batch=100, output=tmp_path / "run.jsonl"
        )
        assert len(records) == 2
        trials = training.tune_command(problem, "KFAC", lrs=(0.1,), dampings=(1.0,), epochs=1)
        assert trials[0]["loss"] > 0
