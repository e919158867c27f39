"""What cannot be measured says so in a sentence with a cure, not in an error of torch."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fisher_lab as fl

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = net()
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


class Checkpointed(Wrapped):
    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(self.encoder, self.first(x), use_reentrant=self.reentrant)
        return self.head(h)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.w.dtype) @ self.w).abs()


class Slope(nn.Module):
    """The derivative of a net in its input, as in physics-informed nets."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        x = x.requires_grad_()
        u = self.net(x).sum()
        return torch.autograd.grad(u, x, create_graph=True)[0]


def pruned():
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def old_norm():
    model = net()
    model[0] = nn.utils.spectral_norm(model[0])
    model(X)
    return model.eval()


def estimate(model, data=X, **options):
    return fl.estimate(fl.KFAC(), model, fl.Gaussian(), data, **options)


def test_a_container_stands_for_the_layers_inside():
    assert list(estimate(Wrapped(), layers=["encoder"])) == ["encoder.0", "encoder.2"]
    assert list(estimate(Wrapped(), layers=["head", "encoder"])) == [
        "head",
        "encoder.0",
        "encoder.2",
    ]
    named_twice = estimate(Wrapped(), layers=["encoder", "encoder.2"])
    assert list(named_twice) == ["encoder.0", "encoder.2"]
    with pytest.raises(ValueError, match="no trainable parameters"):
        estimate(net(), layers=["1"])


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is deprecated
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.jit.trace(net(), X), "scripted or traced"),
        (lambda: torch.export.export(net(), (X,)).module(), "exported"),
        (pruned, r"prune\.remove\(module, 'weight'\)"),
        (old_norm, "parametrizations instead of the old spectral"),
        (Complex, "'w' is complex"),
        (lambda: Checkpointed(True), "use_reentrant=False"),
        (Slope, r"derives inside its forward pass"),
    ],
)
def test_models(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimate(make())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (X.to_sparse(), r"sparse_coo.*to_dense"),
        (X.to("meta"), "device meta"),
        ((X, torch.randn(5, 2, device="meta")), "device meta"),
    ],
)
def test_data(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimate(net(), data)


def test_the_cures_work():
    assert len(estimate(Checkpointed(False))) == 4
    model = pruned()
    prune.remove(model[0], "weight")
    assert len(estimate(model)) == 2


@pytest.mark.filterwarnings("ignore")  # torch warns of inputs without gradients
def test_exact_fisher_and_reentrant_checkpoint():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        fl.exact_fisher(Checkpointed(True), fl.Categorical(), X)
    assert len(fl.exact_fisher(Checkpointed(False), fl.Categorical(), X)) == 4


def test_optimizer_and_reentrant_checkpoint():
    model = Checkpointed(True)
    optimizer = fl.optim.KFAC(model, fl.Gaussian(), 0.1)
    with pytest.raises(ValueError, match="use_reentrant=False"), optimizer.observing():
        model(X)


@pytest.mark.filterwarnings("ignore")  # torch calls tracing deprecated
def test_optimizers_refuse_programs_too():
    with pytest.raises(ValueError, match="scripted or traced"):
        fl.optim.KFAC(torch.jit.trace(net(), X), fl.Categorical(), 0.1)


@pytest.mark.parametrize("labelled", [True, False])
def test_packed_sequences_are_packed_inside_the_model(labelled):
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(5, 4, 3), torch.tensor([4, 3, 3, 2, 1]), batch_first=True
    )
    data = (packed, torch.zeros(5, dtype=torch.long)) if labelled else packed
    with pytest.raises(TypeError, match="pack them inside the model"):
        estimate(net(), data)


def test_all_layers_that_an_optimizer_never_saw_are_named():
    class Uncalled(Wrapped):
        def forward(self, x):
            h = nn.functional.linear(x, self.encoder[0].weight, self.encoder[0].bias)
            return self.head(nn.functional.linear(h, self.encoder[2].weight))

    model = Uncalled()
    opt = fl.optim.KFAC(model, fl.Categorical(), 0.1)
    with opt.observing():
        z = model(X)
    z.square().sum().backward()
    with pytest.raises(ValueError, match=r"'encoder.0', 'encoder.2' .*layers="):
        opt.step()
