"""attach() observes the training forward passes of loops that are not one's own."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.helpers import assert_same
from tests.optim.support import PRESETS, batch, net, one_step, preset

LIKELIHOOD = fl.Categorical()


def plain_step(opt, model, x, y, parts: int = 1) -> None:
    """A step that knows nothing of observing, of some micro-batches."""
    opt.zero_grad()
    for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        loss = LIKELIHOOD.loss(model(some_x), some_y)
        (loss / parts).backward()
    opt.step()


@pytest.mark.parametrize("name", PRESETS)
def test_an_attached_optimizer_steps_as_with_observing(name):
    (x, y), periods = batch(), {"observe_every": 2, "refresh_every": 4}
    model, twin = net(), net()
    opt = preset(name, model, LIKELIHOOD, **periods)
    other = preset(name, twin, LIKELIHOOD, **periods)
    other.attach()
    for _ in range(5):
        one_step(opt, model, LIKELIHOOD, x, y)
        plain_step(other, twin, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_micro_batches_of_a_step_are_one_observation():
    x, y = batch()
    model, twin = net(), net()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, fisher="true")
    other = optim.KFAC(twin, LIKELIHOOD, 0.1, fisher="true")
    other.attach()
    one_step(opt, model, LIKELIHOOD, x, y)
    plain_step(other, twin, x, y, parts=3)
    for name, matrix in opt.matrices().items():
        assert_same(matrix.dense(), other.matrices()[name].dense())


def test_passes_that_do_not_train_are_left_alone():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=1)
    opt.attach()
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert opt.observed_at is None
    plain_step(opt, model, x, y)
    before = opt.curvature["0"].moments["A"].clone()
    model.eval()
    model(5 * x)
    model.train()
    with torch.no_grad():
        model(5 * x)
    assert torch.equal(opt.curvature["0"].moments["A"], before)


def test_only_due_steps_are_watched_and_none_after_removal():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=3)
    attached = opt.attach()
    for _ in range(5):
        plain_step(opt, model, x, y)
    assert opt.observed_at == 3
    attached.remove()
    for _ in range(2):
        plain_step(opt, model, x, y)
    assert opt.observed_at == 3
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_attaching_twice_or_with_observing_counts_a_pass_once():
    x, y = batch()
    model, twin = net(), net()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    other = optim.KFAC(twin, LIKELIHOOD, 0.1)
    other.attach()
    other.attach()
    one_step(opt, model, LIKELIHOOD, x, y)
    one_step(other, twin, LIKELIHOOD, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_pass_that_raises_leaves_no_hooks_behind():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    opt.attach()
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert not any(module._forward_hooks for module in model.modules())
    plain_step(opt, model, x, y)
    assert opt.observed_at == 0


def test_a_copied_or_pickled_model_is_not_watched():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=1)
    opt.attach()
    plain_step(opt, model, x, y)
    before = opt.curvature["0"].moments["A"].clone()
    copy.deepcopy(model)(5 * x)
    pickle.loads(pickle.dumps(model))(5 * x)
    assert torch.equal(opt.curvature["0"].moments["A"], before)
    opt.compare((x, y))  # of a copy


def test_the_hooks_do_not_keep_the_optimizer_alive():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    opt.attach()
    plain_step(opt, model, x, y)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    model(x)


def test_labels_of_the_data_cannot_be_attached():
    opt = optim.KFAC(net(), LIKELIHOOD, 0.1, fisher="empirical")
    with pytest.raises(ValueError, match=r'fisher="empirical" with attach\(\), expected "mc"'):
        opt.attach()


def test_a_model_that_returns_an_object_with_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return Output(self.inner(x))

    model, (x, y) = Wrapped(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1)
    opt.attach()
    opt.zero_grad()
    LIKELIHOOD.loss(model(x).logits, y).backward()
    opt.step()
    assert opt.observed_at == 0


def test_the_second_missed_observation_is_told_once():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=2)
    one_step(opt, model, LIKELIHOOD, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            plain_step(opt, model, x, y)
    with pytest.warns(RuntimeWarning, match=r"nothing was observed since step 0.*opt.attach\(\)"):
        plain_step(opt, model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            plain_step(opt, model, x, y)
