"""Rows of a layer that are not the examples in order: found, put in order, and measured like any
other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

import fisher_lab as fl
from tests import naive
from tests.helpers import assert_same
from tests.layers.oracle import normal, randomised
from tests.real import oracle

N, L, WIDTH = 5, 4, 3
X = normal(N, L, WIDTH)


class Parts(nn.Module):
    """One Linear layer `inner` at positions, whose outputs are summed for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)


class BatchSecond(Parts):
    """Positions first, as with batch_first=False."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.transpose(0, 1)).tanh()
        return self.out(h.sum(0))


class Flattened(Parts):
    """Examples and positions in one dimension, an example's positions one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.flatten(0, 1)).tanh()
        return self.out(h.unflatten(0, (-1, L)).sum(1))


class Strided(Parts):
    """Positions and examples in one dimension, position by position."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.transpose(0, 1).flatten(0, 1)).tanh()
        return self.out(h.unflatten(0, (L, -1)).sum(0))


class Sorted(Parts):
    """Examples in another order inside, as sequences that are packed by their length."""

    def forward(self, x: Tensor) -> Tensor:
        order = x.sum((1, 2)).argsort()
        h = self.inner(x[order]).tanh().sum(1)
        return self.out(h[order.argsort()])


class Experts(Parts):
    """Every position goes to the first or the second expert, whichever it fits."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        first = rows[:, 0] > 0
        index = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
        h = torch.zeros(len(x), WIDTH, dtype=x.dtype)
        h = h.index_add(0, index[first], self.inner(rows[first]).tanh())
        h = h.index_add(0, index[~first], self.other(rows[~first]).sin())
        return self.out(h)


class Learned(nn.Module):
    """Learned positions `[1, L]` that all examples share, added to what every example has of its
    own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(L, WIDTH)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(L, device=x.device)[None]
        return self.out((x * self.position(places)).tanh().sum(1))


class Relative(nn.Module):
    """A table over pairs of positions, which all examples read: no row of its own for any
    of them.
    """

    def __init__(self, pairs: int = L) -> None:
        super().__init__()
        self.bias = nn.Embedding(pairs, 1)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(L, device=x.device)
        table = self.bias((place[:, None] - place[None]).abs())[..., 0]
        return self.out((table.softmax(1) @ x).tanh().sum(1))


def linear(
    module: nn.Linear,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], bool]:
    """How inputs and gradients of a Linear layer are laid out."""

    def unroll(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)

    return unroll, lambda w, b: torch.cat([w, b[:, None]], 1), (module.in_features,), True


def embedding(
    module: nn.Embedding,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], bool]:
    """The same for an Embedding."""
    rows = module.num_embeddings
    return lambda x: one_hot(x.flatten(), rows).double(), lambda w: w.T, (rows,), False


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch second": (BatchSecond, "inner"),
    "flattened": (Flattened, "inner"),
    "strided": (Strided, "inner"),
    "sorted": (Sorted, "inner"),
    "first expert": (Experts, "inner"),
    "second expert": (Experts, "other"),
    "learned positions": (Learned, "position"),
}
METHODS: dict[str, Callable[..., Tensor]] = {
    "EKFAC": naive.naive_ekfac,
    "TKFAC": naive.naive_tkfac,
    "TN": naive.naive_tn,
    "MiniBlock": naive.naive_mini_block,
    "KPSVD": naive.naive_kpsvd,
    "Diagonal": naive.naive_diagonal,
}


def quadratic(z: Tensor, n: int) -> Tensor:
    """Half squared error, whose Hessian is the identity."""
    return 0.5 * z.square().sum()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("memory", [None, 1e-5])
def test_exact_block(name: str, memory: float | None) -> None:
    """At once and in small pieces, entry by entry against one example at a time."""
    make, layer = CASES[name]
    model = randomised(make())
    module: Any = model.get_submodule(layer)
    _, pack, _, _ = linear(module) if isinstance(module, nn.Linear) else embedding(module)
    block = fl.estimate(fl.Exact(), model, fl.Gaussian(), X, memory=memory)[layer]
    parameters = list(module.parameters())
    expected = oracle.dense_block(
        model, lambda n: model(X[n : n + 1]), N, parameters, pack, quadratic
    )
    assert_same(block.dense(), expected, 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_approximations(name: str, method: str) -> None:
    """Every structure from inputs and output gradients of single examples."""
    make, layer = CASES[name]
    model = randomised(make())
    module: Any = model.get_submodule(layer)
    unroll, _, kernel, bias = linear(module) if isinstance(module, nn.Linear) else embedding(module)
    stats = oracle.layer_stats(
        model, lambda n: model(X[n : n + 1]), N, module, unroll, quadratic, kernel, bias
    )
    found = fl.estimate(getattr(fl, method)(), model, fl.Gaussian(), X)[layer]
    assert_same(found.dense(), METHODS[method](stats), 1e-9)


def test_what_examples_share_in_another_way_is_measured_over_its_parameters() -> None:
    """The gradient form for that layer, and the result says why."""
    model = randomised(Relative())
    comparison = fl.compare(model, fl.Gaussian(), X, [fl.KFAC()], errors=["frobenius"])
    about = comparison.settings["layers"]["bias"]
    assert about["form"] == "gradient"
    assert "shared" in about["reason"]
    parameters = list(model.bias.parameters())
    expected = oracle.dense_block(
        model, lambda n: model(X[n : n + 1]), N, parameters, lambda w: w.flatten(), quadratic
    )
    block = fl.estimate(fl.Exact(), model, fl.Gaussian(), X)["bias"]
    assert_same(block.dense(), expected, 1e-10)


def test_a_table_that_is_too_large_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"'bias' .*needs .* expected at most"):
        fl.compare(randomised(Relative(3000)), fl.Gaussian(), X, [fl.KFAC()], memory=0.1)


def test_examples_in_another_order_do_not_change_sums_over_layers() -> None:
    """off_block mixes layers example by example: the order inside one of them must not matter."""

    class Plain(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x).tanh().sum(1))

    plain, sorted_inside = randomised(Plain()), randomised(Sorted())
    values = []
    for model in (plain, sorted_inside):
        comparison = fl.compare(
            model, fl.Gaussian(), X, [fl.TENGraD(batch=2)], errors=["frobenius", "off_block"]
        )
        values.append([row.value for row in comparison.rows])
    assert values[0] == pytest.approx(values[1], rel=1e-10)


class Mixing(Parts):
    """Something that depends on the last examples only."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh().sum(1)
        return self.out(h + torch.cat([torch.zeros_like(h[:1]), h[:-1]]))  # example n sees n - 1


class Random(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x).tanh().sum(1) + torch.randn(len(x), WIDTH, dtype=x.dtype))


@pytest.mark.parametrize("model", [Mixing(), Random()], ids=["along the batch", "random"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda model: fl.estimate(fl.KFAC(), model, fl.Gaussian(), X),
        lambda model: fl.exact_fisher(model, fl.Gaussian(), X),
        lambda model: fl.compare(model, fl.Gaussian(), X, [fl.KFAC()], errors=["trace"]),
    ],
    ids=["estimate", "exact_fisher", "compare"],
)
def test_interacting_examples_and_random_models_are_refused(
    model: nn.Module, ask: Callable[..., Any]
) -> None:
    """By the first and the last example alone, by all three alike."""
    with pytest.raises(ValueError, match="examples interact or the model is random"):
        ask(randomised(model))


def test_generator_is_not_touched() -> None:
    """Finding out draws from no global state."""
    model = randomised(BatchSecond())
    before = torch.get_rng_state()
    fl.estimate(fl.KFAC(), model, fl.Gaussian(), X)
    assert torch.equal(before, torch.get_rng_state())


class Repeated(nn.Module):
    """A table of prompts `[1, L]` that the model repeats for every example by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Embedding(L, WIDTH)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        table = self.prompt(torch.arange(L, device=x.device)[None])
        return self.out((x * table.repeat(len(x), 1, 1)).tanh().sum(1))


class Uncalled(Parts):
    """A weight that is read, of a module that is never called."""

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.inner.weight, self.inner.bias).tanh()
        return self.out(h.sum(1))


class Derived(Parts):
    """A derivative by torch.func inside, so that the layer sees one example without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        one = torch.func.jacrev(lambda row: self.inner(row).tanh())
        return self.out(torch.func.vmap(one)(x[:, 0]).sum(1))


class Physics(Parts):
    """A derivative by autograd inside."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            h = self.inner(x).tanh().square().sum()
            (derivative,) = torch.autograd.grad(h, x, create_graph=True)
        return self.out(derivative.sum(1))


class Counting(Parts):
    """A buffer that counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.out(self.inner(x).tanh().sum(1))


class Checkpointed(Parts):
    """Activations that are computed again."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: self.inner(x).tanh(), x, use_reentrant=False)
        return self.out(h.sum(1))


class OldFunction(torch.autograd.Function):
    """Without `setup_context`, which torch.func asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())


class NoBatches(torch.autograd.Function):
    """Whose backward cannot be vectorised, since it reads a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * float(g.isfinite().all())


class Scalar(Parts):
    """With such a function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(NoBatches.apply(self.inner(x).sum(1)))


class Old(Parts):
    """With such a function, and a norm layer, whose block asks for gradients of single examples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(OldFunction.apply(self.norm(self.inner(x))).sum(1))


BY_PARAMETERS = {
    "repeated by the model": (Repeated, "prompt", "shared"),
    "never called": (Uncalled, "inner", "never called"),
    "a function that torch.func cannot derive": (Old, "norm", None),
}


@pytest.mark.parametrize("name", BY_PARAMETERS)
def test_blocks_over_flattened_parameters(name: str) -> None:
    """What has no inputs of its own for every example, or no derivative by torch.func."""
    make, layer, reason = BY_PARAMETERS[name]
    model = randomised(make())
    comparison = fl.compare(model, fl.Gaussian(), X, [fl.KFAC()], errors=["frobenius"])
    assert max(row.checked for row in comparison.rows) < 1e-9
    about = comparison.settings["layers"][layer]
    assert about["form"] == "gradient"
    if reason is not None:
        assert reason in about["reason"]
    parameters = list(model.get_submodule(layer).parameters())

    def flat(*tensors: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in tensors])

    expected = oracle.dense_block(
        model, lambda n: model(X[n : n + 1]), N, parameters, flat, quadratic
    )
    block = fl.estimate(fl.Exact(), model, fl.Gaussian(), X)[layer]
    assert_same(block.dense(), expected, 1e-10)
    truth = fl.exact_fisher(model, fl.Gaussian(), X)[layer]
    # its parameters may be in another order
    assert float(truth.trace()) == pytest.approx(float(block.trace()), rel=1e-10)


@pytest.mark.parametrize("make", [Derived, Physics, Counting, Checkpointed, Old])
def test_exact_fisher_of_models_that_torch_func_cannot_derive(
    make: Callable[[], nn.Module],
) -> None:
    model = randomised(make())
    module: Any = model.get_submodule("inner")
    _, pack, _, _ = linear(module)
    expected = oracle.dense_block(
        model, lambda n: model(X[n : n + 1]), N, list(module.parameters()), pack, quadratic
    )
    block = fl.exact_fisher(model, fl.Gaussian(), X)["inner"]
    assert_same(block.dense(), expected, 1e-10)


@pytest.mark.parametrize("make", [Derived, Physics])
def test_derivatives_inside_are_refused_where_hooks_would_not_see_them(
    make: Callable[[], nn.Module],
) -> None:
    model = randomised(make())
    with pytest.raises(ValueError, match=r"'inner' .*exact_fisher"):
        fl.estimate(fl.KFAC(), model, fl.Gaussian(), X)
    opt = fl.optim.KFAC(model, fl.Gaussian(), 0.1)
    if make is Derived:  # what a derivative of autograd hides, only a check of the sums finds
        with pytest.raises(ValueError, match=r"'inner' .*layers="), opt.observing():
            model(X)


def test_derivatives_that_cannot_be_vectorised_are_taken_one_by_one() -> None:
    model = randomised(Scalar())
    block = fl.estimate(fl.Exact(), model, fl.Gaussian(), X)["inner"]
    _, pack, _, _ = linear(model.inner)
    parameters = list(model.inner.parameters())
    expected = oracle.dense_block(
        model, lambda n: model(X[n : n + 1]), N, parameters, pack, quadratic
    )
    assert_same(block.dense(), expected, 1e-10)


def test_sparse_inputs_are_refused_by_optimizers_too() -> None:
    model = nn.Linear(WIDTH, 2).double()
    opt = fl.optim.KFAC(model, fl.Gaussian(), 0.1)
    with pytest.raises(ValueError, match="dense"), opt.observing():
        model(X[:, 0].to_sparse())


def test_a_layer_that_nobody_reads_is_refused() -> None:
    class Idle(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(x.sum(1))

    with pytest.raises(ValueError, match=r"'inner' .*not called"):
        fl.estimate(fl.KFAC(), randomised(Idle()), fl.Gaussian(), X)
