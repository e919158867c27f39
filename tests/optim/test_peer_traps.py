"""Mistakes that optimizers of other libraries shipped, one test each."""

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.helpers import assert_same
from tests.optim.support import PRESETS, batch, gradients, net, one_step, preset, train, weights

LIKELIHOOD = fl.Categorical()


@pytest.mark.parametrize("name", PRESETS)
def test_no_damping_drift(name):
    """Damping written into the statistics in place grows at every refresh: they must not change by
    refreshing.
    """
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    c = opt.curvature["0"]
    moments, inverse = {k: v.clone() for k, v in c.moments.items()}, c.inverse.dense()
    for _ in range(3):
        opt._refresh()
    assert all(torch.equal(moments[k], c.moments[k]) for k in moments)
    assert_same(c.inverse.dense(), inverse, 1e-12)


def test_no_accumulation_of_non_leaf_gradients():
    """Statistics of the real-label pass and the sampled pass must not add up: the loss's own labels
    leave no trace.
    """
    found = []
    for labels in (0, 2):
        model, (x, y) = net(), batch()
        opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.0, observe_every=1)
        train(opt, model, LIKELIHOOD, x, torch.full_like(y, labels), 3)
        found.append(opt.curvature["0"].moments["G"])
    assert torch.equal(*found)


def test_the_eigenbasis_is_applied_the_right_way_round():
    """Q_G^T g Q_A, not Q_G g Q_A^T: with non-symmetric eigenvectors only one of them
    diagonalises.
    """
    model, (x, y) = net(), batch()
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, fl.EKFAC(), 0.1, fisher="true", damping=0.1, momentum=0.0
    )
    opt.warm_start((x, y))
    W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
    F = fl.estimate(fl.EKFAC(), model, LIKELIHOOD, (x, None))
    one_step(opt, model, LIKELIHOOD, x, y, observe=False)
    for name in W:
        dense = F[name].dense()
        step = torch.linalg.solve(
            dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype), g[name].flatten()
        )
        assert_same(weights(model)[name], W[name] - 0.1 * step.view(W[name].shape))


@pytest.mark.parametrize("name", PRESETS)
def test_default_arguments_work(name):
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    one_step(preset(name, model, LIKELIHOOD, 0.01), model, LIKELIHOOD, x, y)


@pytest.mark.parametrize("name", PRESETS)
def test_no_layer_is_silently_left_without_preconditioning(name):
    """A small layer is preconditioned like any other: its step is not a multiple of its
    gradient.
    """
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.01)
    W, g = weights(model), gradients(model, LIKELIHOOD, x, y)
    one_step(opt, model, LIKELIHOOD, x, y)
    for layer in W:
        step = (W[layer] - weights(model)[layer]).flatten()
        cosine = torch.nn.functional.cosine_similarity(step, g[layer].flatten(), 0)
        assert cosine < 0.9999


class Everything(nn.Module):
    """Every sort of parameter: layers, norms, a bare parameter, a frozen one, an unknown module,
    tied weights.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm, self.conv, self.strange = (
            nn.LayerNorm(4),
            nn.Conv1d(4, 4, 3, padding=1),
            nn.Bilinear(4, 4, 4),
        )
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens):
        h = self.norm(self.embed(tokens))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2) * self.scale
        return self.head(self.frozen(self.strange(h, h))).mean(1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_trainable_parameter_is_trained_and_shown(name):
    """Parameters without adapter must neither be left out nor get the method's learning rate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokens, y = Everything(), torch.randint(7, (6, 5)), torch.randint(7, (6,))
    opt = preset(name, model, LIKELIHOOD, 1e-4, fallback_lr=2e-3)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    one_step(opt, model, LIKELIHOOD, tokens, y)
    text = repr(opt)
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) == key.startswith("frozen")
        assert key in text or key.rsplit(".", 1)[0] + ":" in text
    assert "fallback: AdamW, lr=0.002, fused" in text
    assert "frozen.weight (frozen)" in text
    moved = (model.scale - before["scale"]).abs()
    # the first step of Adam is its lr
    assert torch.allclose(moved, torch.full_like(moved, 2e-3), rtol=1e-2)


def test_a_parameter_that_is_thawed_later_is_trained():
    model, (x, y) = net(), batch()
    model[2].requires_grad_(False)
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = weights(model)["2"]
    model[2].requires_grad_(True)
    one_step(opt, model, LIKELIHOOD, x, y)
    assert not torch.equal(weights(model)["2"], before)


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_step_is_not_skipped(name):
    model, (x, y) = net(), batch()
    before = weights(model)
    one_step(preset(name, model, LIKELIHOOD, 0.01), model, LIKELIHOOD, x, y)
    assert all(not torch.equal(before[layer], W) for layer, W in weights(model).items())


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_are_neither_cleared_nor_changed(name):
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.01, weight_decay=0.1)
    with opt.observing():
        z = model(x)
    LIKELIHOOD.loss(z, y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_nan_does_not_poison_the_parameters():
    model, (x, y) = net(), batch()
    opt = optim.TNT(model, LIKELIHOOD, 0.01, observe_every=10)
    one_step(opt, model, LIKELIHOOD, x, y)
    before = weights(model)
    one_step(opt, model, LIKELIHOOD, x * float("nan"), y, observe=False)
    assert all(torch.equal(before[layer], W) for layer, W in weights(model).items())
    one_step(opt, model, LIKELIHOOD, x, y)
    assert all(bool(torch.isfinite(W).all()) for W in weights(model).values())


def test_a_closure_runs_with_gradients_enabled_even_under_no_grad():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.01)

    def closure():
        opt.zero_grad()
        with opt.observing():
            z = model(x)
        loss = LIKELIHOOD.loss(z, y)
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).requires_grad


@pytest.mark.parametrize("size", [4, 64])
def test_the_scale_of_the_statistics_does_not_depend_on_the_batch_size(size):
    """F of a batch made of copies is F of one copy: no 1/N twice, no division by positions."""
    model, (x, _) = net(), batch(4)
    opt = fl.NaturalGradient(model, LIKELIHOOD, fl.KFAC(), 0.1, fisher="true")
    with opt.observing():
        model(x.repeat(size // 4, 1))
    opt._refresh()
    expected = fl.estimate(fl.KFAC(), model, LIKELIHOOD, x)
    for name, matrix in opt.matrices().items():
        assert_same(matrix.dense(), expected[name].dense())


def test_all_groups_are_read_and_not_only_the_first():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(
        model, LIKELIHOOD, 0.01, groups=[{"layers": ["0"], "lr": 0.0}, {"layers": ["2"], "lr": 0.1}]
    )
    before = weights(model)
    one_step(opt, model, LIKELIHOOD, x, y)
    assert torch.equal(before["0"], weights(model)["0"])
    assert not torch.equal(before["2"], weights(model)["2"])


def test_gradient_clipping_and_accumulation_are_not_undone_by_the_statistics():
    """The step acts on `p.grad` as it is, not on a gradient recomputed from recorded inputs."""
    model, (x, y) = net(), batch()
    opt = optim.EKFAC(model, LIKELIHOOD, 0.1)
    with opt.observing():
        z = model(x)
    LIKELIHOOD.loss(z, y).backward()
    for p in model.parameters():
        p.grad.zero_()
    before = weights(model)
    opt.step()
    assert all(torch.equal(before[layer], W) for layer, W in weights(model).items())


def test_the_kl_clip_of_zero_gradients_is_no_division_by_zero():
    model, (x, y) = net(), batch()
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, kl_clip=1e-3)
    with opt.observing():
        z = model(x)
    (LIKELIHOOD.loss(z, y) * 0).backward()
    before = weights(model)
    opt.step()
    assert all(torch.equal(before[layer], W) for layer, W in weights(model).items())


def test_sparse_gradients_of_an_embedding_are_those_of_a_dense_one():
    x, y, loss = torch.arange(12).view(4, 3) % 7, torch.arange(4) % 2, nn.CrossEntropyLoss()
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 3, sparse=sparse), nn.Flatten(), nn.Linear(9, 2))
        opt = fl.optim.KFAC(model, loss, lr=0.1)
        for _ in range(3):
            with opt.observing():
                z = model(x)
            opt.zero_grad()
            loss(z, y).backward()
            assert model[0].weight.grad.is_sparse == sparse
            opt.step()
        found.append(model[0].weight)
    assert torch.equal(*found)
