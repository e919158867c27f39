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


class Scores(nn.Module):
    """A model that returns two things, of which the second is z."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.first(x).tanh()
        return Two(hidden, self.second(hidden))


@pytest.mark.parametrize("name", [*fl.optim.registry()])
@pytest.mark.parametrize("output", ["scores", 1, lambda two: two.scores])
def test_every_optimizer_reads_the_output_that_is_named(name, output):
    """And trains as one of the same model that returns z alone."""
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    loss = nn.CrossEntropyLoss()
    found = []
    for wrapped in (False, True):
        torch.manual_seed(2)
        model = Scores()
        whole = model if not wrapped else Second(model)
        chosen = None if wrapped else output
        opt = training.make_optimizer(name, whole, loss, 0.05, output=chosen)
        training.fit(whole, opt, loss, (x, y), 2, batch=8, output=chosen)
        found.append(model)
    assert same(*found)


class Second(nn.Module):
    """z alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).scores


def test_what_an_optimizer_uses_is_measured_at_its_own_output():
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    model = Scores()
    opt = fl.optim.KFAC(model, nn.CrossEntropyLoss(), output="scores")
    opt.warm_start((x, y))
    assert opt.compare((x, y), errors=["trace"]).rows
    attached = opt.attach()
    model(x)
    attached.remove()
    assert opt.observed_at == 0


def test_an_output_that_is_no_tensor_says_how_to_name_one():
    model = Scores()
    opt = fl.optim.KFAC(model, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="output="), opt.observing():
        model(torch.randn(4, 4))


@pytest.mark.parametrize("name", ["KFAC", "SGD"])
def test_the_commands_read_the_output_and_the_labels_that_a_problem_names(tmp_path, name):
    data = {"x": torch.randn(16, 4), "target": torch.randint(0, 3, (16,))}
    problem = fl.problems.Problem(
        "mine", Scores(), nn.CrossEntropyLoss(), data, labels="target", output="scores"
    )
    path = tmp_path / "run.jsonl"
    records = training.train_command(problem, name, lr=0.05, epochs=1, output=path, measure_every=1)
    assert records[0]["loss"] > 0
    trials = training.tune_command(problem, name, lrs=(0.1,), dampings=(1.0,), epochs=1)
    assert trials[0]["loss"] > 0


def test_only_labels_that_the_loss_keeps_are_sampled():
    """The statistics of a batch with ignored labels are those of observing(kept=...)."""
    x = torch.randn(12, 4)
    y = torch.randint(0, 3, (12,))
    y[::3] = -100
    loss = nn.CrossEntropyLoss()
    found = []
    for given in (True, False):
        torch.manual_seed(3)
        model = nn.Linear(4, 3)
        opt = fl.NaturalGradient(model, loss, fl.KFAC(), 0.1, fisher="true")
        if given:
            training.fit(model, opt, loss, [(x, y)], 1)
        else:
            with opt.observing(kept=y != -100):
                z = model(x)
            loss(z, y).backward()
            opt.step()
        found.append(opt.matrices()[""].dense())
    assert torch.equal(*found)
    truth = fl.estimate(fl.KFAC(), start(), loss, (x, y))[""].dense()
    assert torch.allclose(found[0], truth.float(), atol=1e-6)


def start():
    torch.manual_seed(3)
    return nn.Linear(4, 3)


def test_class_weights_ask_an_optimizer_for_labels():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    data = torch.randn(8, 4), torch.randint(0, 3, (8,))
    model = nn.Linear(4, 3)
    opt = fl.optim.KFAC(model, loss)
    with pytest.raises(ValueError, match='fisher="empirical"'):
        training.fit(model, opt, loss, data, 1, batch=8)
    opt = fl.optim.KFAC(model, loss, fisher="empirical")
    assert training.fit(model, opt, loss, data, 1, batch=8)[0]["loss"] > 0


def test_classes_last_are_told_before_torch_fails():
    """Also by an optimizer, which is told the labels by `fit`; and outputs that are several."""
    x, y = torch.randn(8, 3, 4), torch.randint(0, 5, (8, 3))
    model = nn.Linear(4, 5)
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"Categorical\(\) or put classes second"):
        training.fit(model, fl.optim.KFAC(model, loss), loss, (x, y), 1, batch=8)
    with pytest.raises(TypeError, match=r"expected one tensor .*output="):
        fl.exact_fisher(Scores(), loss, (x[:, 0], y[:, 0]))
