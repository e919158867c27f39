"""Optimizers under DistributedDataParallel: the numbers of one process, the same on every rank."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fisher_lab as fl
from tests.ranks.crew import rank

WORLDS = (2, 3)
STEPS = 6
N = 24  # of a step, over all ranks
NAMES = ("TNT", "KFAC", "EKFAC", "TKFAC", "TEKFAC", "MBF", "TENGraD", "Shampoo", "KBFGS")
LOSS = nn.CrossEntropyLoss()


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()


def batches(order=None):
    """Different data in every step; `order` permutes the examples of each."""
    torch.manual_seed(4)
    found = []
    for _ in range(STEPS):
        x = torch.randn(N, 6, dtype=torch.float64)
        y = torch.randint(0, 4, (N,))
        if order is not None:
            x, y = x[order], y[order]
        found.append((x, y))
    return found


def optimizer(name, model, **options):
    if name == "KBFGS":
        return fl.optim.KBFGS(model, LOSS, lr=0.05, **options)
    periods = {"observe_every": 1, "refresh_every": 2}
    return getattr(fl.optim, name)(model, LOSS, 0.05, **{**periods, **options})


def step(opt, model, x, y, labels):
    def closure():
        with opt.observing(*labels):
            z = model(x)
        loss = LOSS(z, y)
        opt.zero_grad()
        loss.backward()
        return loss

    if opt.needs_closure:
        opt.step(closure)
    else:
        closure()
        opt.step()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def mine(x, world):
    """This rank's part of a batch."""
    return x.chunk(world)[rank()]


def trained(name, sampled, world=1, order=None, **options):
    """The weights after some steps, and after a second optimizer's first ones."""
    model = net()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    opt = optimizer(name, model, **options)
    for x, y in batches(order):
        if world > 1:
            x, y = mine(x, world), mine(y, world)
        labels = () if sampled else (y,)
        step(opt, wrapped, x, y, labels)
    return flat(model)


def distance(x, y):
    return float((x - y).norm() / y.norm())


def all_trained(sampled, world):
    return {name: trained(name, sampled, world) for name in NAMES}


@pytest.fixture(scope="module")
def rounding():
    """How far a permutation of the examples takes every optimizer, with labels of the data."""
    torch.manual_seed(5)
    found = {}
    orders = [torch.randperm(N) for _ in range(3)]
    for name in NAMES:
        alone = trained(name, sampled=False)
        apart = [distance(trained(name, sampled=False, order=o), alone) for o in orders]
        found[name] = max(apart) + torch.finfo(torch.float64).eps
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_weights_are_those_of_one_process_and_the_same_everywhere(
    crews, rounding, sampled, world
):
    every = crews.of(world).run(all_trained, sampled, world)
    for name in NAMES:
        first = every[0][name]
        assert not torch.equal(first, flat(net())), name
        for theirs in every:
            assert torch.equal(theirs[name], first), name
        assert distance(first, trained(name, sampled)) <= 10 * rounding[name], name


# -- what else a training does ---------------------------------------------------------------------
class Branches(nn.Module):
    """A layer that only some batches use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.first = nn.Linear(6, 5)
        self.sometimes = nn.Linear(5, 5)
        self.last = nn.Linear(5, 4)

    def forward(self, x, use=True):
        h = self.first(x).tanh()
        if use:
            h = h + self.sometimes(h)
        return self.last(h)


def unused_on_one_rank(name):
    model = Branches().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    opt = optimizer(name, model)
    for x, y in batches():
        x, y = mine(x, 2), mine(y, 2)
        used = rank() == 0
        step(opt, lambda x: wrapped(x, used), x, y, ())  # noqa: B023
    return flat(model)


def nan_on_one_rank(name):
    """Skipped updates, lost statistics, and the weights, after a step with one bad example."""
    model = net()
    wrapped = DistributedDataParallel(model)
    opt = optimizer(name, model)
    for index, (x, y) in enumerate(batches()):
        x, y = mine(x, 2), mine(y, 2)
        if index == 3 and rank() == 1:
            x = x.clone()
            x[0, 0] = float("nan")
        step(opt, wrapped, x, y, ())
    return opt.troubles(), flat(model)


def nan_alone(name):
    model = net()
    opt = optimizer(name, model)
    for index, (x, y) in enumerate(batches()):
        if index == 3:
            x[N // 2, 0] = float("nan")
        step(opt, model, x, y, ())
    return opt.troubles(), flat(model)


SOME = ("TNT", "KFAC", "EKFAC", "TENGraD", "Shampoo", "KBFGS")


def of_each(function):
    return {name: function(name) for name in SOME}


def test_a_layer_that_one_rank_did_not_use_is_trained_alike_on_all(crews):
    first, second = crews.of(2).run(of_each, unused_on_one_rank)
    for name in SOME:
        assert torch.equal(first[name], second[name]), name
        assert first[name].isfinite().all(), name


@pytest.mark.filterwarnings("ignore:.*non-finite:RuntimeWarning")
def test_all_ranks_leave_out_what_is_not_finite_on_one(crews, rounding):
    first, second = crews.of(2).run(of_each, nan_on_one_rank)
    for name in SOME:
        troubles, weights = nan_alone(name)
        assert first[name][0] == second[name][0] == troubles, name
        assert troubles["updates skipped as non-finite"] == 1
        assert torch.equal(first[name][1], second[name][1]), name
        assert distance(first[name][1], weights) <= 10 * rounding[name], name


def unequal(name):
    model = net()
    opt = optimizer(name, model)
    x, y = batches()[0]
    n = 5 + rank()
    step(opt, model, x[:n], y[:n], ())


@pytest.mark.parametrize("name", ["KFAC", "Shampoo", "KBFGS"])
def test_unequal_parts_of_a_step_are_refused(crews, name):
    for error in crews.of(2).errors(unequal, name):
        assert "Rank 1 has 6 examples in this step and rank 0 has 5" in error


def warm(name, world):
    """The matrices after a pass over uneven parts of the data, in batches of uneven number."""
    x, _ = batches()[0]
    first, beside, second, third = x.split((5, 3, 7, 9))
    # the batches of two ranks side by side are those of one process
    parts = [torch.cat([first, beside]), second, third]
    if world == 2:
        parts = [first, second, third] if rank() == 0 else [beside]
    opt = optimizer(name, net())
    opt.warm_start(parts)
    return {layer: matrix.dense() for layer, matrix in opt.matrices().items()}


def all_warm(world):
    return {name: warm(name, world) for name in ("TNT", "KFAC", "TKFAC", "TENGraD", "MBF")}


def test_a_warm_start_reads_uneven_parts(crews):
    first, second = crews.of(2).run(all_warm, 2)
    for name, matrices in all_warm(1).items():
        for layer, matrix in matrices.items():
            assert torch.equal(first[name][layer], second[name][layer]), name
            assert distance(first[name][layer], matrix) < 1e-13, name


def two_ways(name):
    """Weights with factorisations of every rank, and with those dealt out; traffic of both."""
    found = []
    for refresh in ("replicated", "sharded"):
        model = net()
        wrapped = DistributedDataParallel(model)
        opt = optimizer(name, model, refresh=refresh)
        factorised = watched_factorisations(opt)
        for x, y in batches():
            step(opt, wrapped, mine(x, 2), mine(y, 2), ())
        found.append((flat(model), factorised, vars(opt.reductions.traffic)))
    return found


def watched_factorisations(opt):
    """The layers whose matrices this rank assembles."""
    seen = set()
    for layer, c in opt.curvature.items():
        plain = c.assembled

        def assembled(plain=plain, layer=layer):
            seen.add(layer)
            return plain()

        c.assembled = assembled
    return seen


DEALT = ("TNT", "KFAC", "EKFAC", "TENGraD", "Shampoo", "MBF")


def all_two_ways():
    return {name: two_ways(name) for name in DEALT}


def test_dealt_factorisations_are_sent_and_give_the_same(crews, rounding):
    first, second = crews.of(2).run(all_two_ways)
    for name in DEALT:
        (replicated, everything, _), (dealt_out, own, _) = first[name]
        _, (theirs, rest, _) = second[name]
        assert torch.equal(dealt_out, theirs), name
        assert distance(dealt_out, replicated) <= 10 * rounding[name], name
        assert everything == {"0", "2", "4"}
        assert own | rest == everything
        assert not own & rest
        assert own


def measured_in_training():
    """opt.compare with batch statistics that differ between the ranks."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    opt = optimizer("KFAC", model)
    wrapped = DistributedDataParallel(model)
    for x, y in batches()[:2]:
        step(opt, wrapped, mine(x, 2), mine(y, 2), ())
    x, y = batches()[0]
    return opt.compare((x, y), errors=["frobenius"]).rows


def test_an_optimizer_compares_its_matrices_with_all_ranks(crews):
    first, second = crews.of(2).run(measured_in_training)
    assert repr(first) == repr(second)
    assert first


def counted(name, refresh):
    """Tensor collectives and bytes of each of some steps."""
    model = net()
    wrapped = DistributedDataParallel(model)
    opt = optimizer(name, model, observe_every=2, refresh_every=4, refresh=refresh)
    found = []
    for x, y in batches():
        before = opt.reductions.traffic.calls, opt.reductions.traffic.nbytes
        step(opt, wrapped, mine(x, 2), mine(y, 2), ())
        after = opt.reductions.traffic.calls, opt.reductions.traffic.nbytes
        found.append((after[0] - before[0], after[1] - before[1]))
    return found


def all_counted():
    return {name: counted(name, "replicated") for name in ("KFAC", "TNT", "Shampoo")}


def test_what_is_exchanged_is_the_plan(crews):
    first, second = crews.of(2).run(all_counted)
    assert first == second
    shapes = [(5, 7), (5, 6), (4, 6)]
    factors = sum(rows**2 + columns**2 for rows, columns in shapes)
    weights = sum(rows * columns for rows, columns in shapes)
    labels = N * 4
    size = 2  # of p^T F p: its sum and the examples
    for name, numbers in {
        "KFAC": [labels, factors + 2 * 3, size],  # examples and failures of three layers
        "TNT": [labels, weights + 3, size],
        "Shampoo": [],
    }.items():
        observed = (len(numbers), 8 * sum(numbers))
        assert first[name] == [observed, (0, 0)] * 3, name


def without_wrapper(name):
    """Every rank trains on its own, which nobody wants."""
    model = net()
    opt = optimizer(name, model)
    for x, y in batches():
        step(opt, model, mine(x, 2), mine(y, 2), ())


def sharded_model(name):
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    optimizer(name, model)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (without_wrapper, "other parameters than rank 0 in step 1"),
        (sharded_model, "is sharded over several processes"),
    ],
)
def test_models_that_are_not_the_same_everywhere_are_refused(crews, function, words):
    for error in crews.of(2).errors(function, "KFAC"):
        assert words in error.splitlines()[-1] or words in error.splitlines()[-2]
