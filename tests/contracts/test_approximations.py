"""What every approximation promises, for everything in the registry, one written here included."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fisher_lab as fl
from fisher_lab import approximations
from fisher_lab.approximations import (
    EKFAC,
    KFAC,
    KPSVD,
    TEKFAC,
    TKFAC,
    TN,
    Corrected,
    MiniBlock,
    Shampoo,
    TENGraD,
    build,
)
from fisher_lab.approximations.base import Approximation, assembled, carried, observed
from fisher_lab.approximations.moments import Means, Moments
from fisher_lab.matrices import DiagonalMatrix, FisherMatrix
from fisher_lab.statistics import LayerStats, Sums
from tests.helpers import assert_psd, assert_same, dense_fisher, gradients, random_stats


@dataclass(frozen=True)
class Isotropic(Approximation):
    """A user's own approximation, written outside of the package: tr F / d times the identity.

    Args:
        factor: multiplies the matrix.
    """

    factor: float = 1.0

    def moments(self, sums: Sums) -> dict[str, Tensor]:
        """The mean eigenvalue, in the shape of W."""
        squares = sums.squares().flatten(0, 1)
        return {"mean": squares.mean().expand_as(squares)}

    def assemble(self, moments: Moments) -> FisherMatrix:
        """The same number everywhere."""
        return DiagonalMatrix(self.factor * moments["mean"])


ARGUMENTS = {"Corrected": (KFAC(),)}  # what cannot be built without
INSTANCES = [cls(*ARGUMENTS.get(name, ())) for name, cls in approximations.registry().items()]
INSTANCES += [
    KFAC("reduce"),
    TKFAC("full"),
    EKFAC("reduce"),
    TEKFAC("full"),
    TN(2),
    TN(4),
    MiniBlock("col"),
    MiniBlock("row_avg"),
    MiniBlock("col_avg"),
    MiniBlock(conv="filter"),
    TENGraD(spatial="reduce_sum"),
    TENGraD(spatial="reduce_mean"),
    Shampoo(match_trace=False),
    Corrected(TKFAC("full")),
    Corrected(KPSVD()),
    Isotropic(2.0),
]
# Definitions of other test files in the same process are not meant, and this one shall not be seen
# there.
Approximation._registry.pop("Isotropic")

SHAPES = {
    "linear": {"d_out": 3, "d_in": 4},
    "linear with bias": {"d_out": 3, "kernel": (3,), "bias": True},
    "sequence": {"T": 3, "d_out": 3, "d_in": 4},
    "convolution": {"T": 3, "Q": 2, "d_out": 2, "kernel": (2, 1, 2), "bias": True},
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The user's approximation is known while these tests run."""
    Approximation._registry["Isotropic"] = Isotropic
    yield
    Approximation._registry.pop("Isotropic", None)


@pytest.fixture(params=INSTANCES, ids=lambda approximation: approximation.label)
def approximation(request) -> Approximation:
    return request.param


@pytest.fixture(params=SHAPES)
def sizes(request) -> dict:
    return SHAPES[request.param]


def build_in_batches(approximation: Approximation, batches: list[LayerStats]) -> FisherMatrix:
    """All sweeps over the batches, mixed as a running mean over examples."""
    matrix = None
    for _ in range(approximation.sweeps):
        moments, seen = None, 0
        for batch in batches:
            new = observed(approximation, Sums(batch), matrix)
            seen += batch.N
            moments = new if moments is None else moments.mix(new, batch.N / seen)
        matrix = assembled(approximation, moments, matrix)
    return matrix


def split(stats: LayerStats, sizes: list[int]) -> list[LayerStats]:
    """Consecutive batches of the given sizes."""
    ends = list(itertools.accumulate(sizes))
    assert ends[-1] == stats.N
    return [stats.examples(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


# ---------------------------------------------------------------- the registry


def test_the_users_approximation_is_registered() -> None:
    """Defining a subclass, anywhere, is all it takes to be in the registry and in `compare`'s
    default list.
    """
    assert approximations.registry()["Isotropic"] is Isotropic
    assert Isotropic() in approximations.default_approximations()


def test_the_users_approximation_is_compared() -> None:
    """It appears in `compare` without another edit."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    comparison = fl.compare(model, nn.CrossEntropyLoss(), (x, torch.arange(6) % 2))
    assert comparison.value("0", "Isotropic", "trace") == pytest.approx(0, abs=1e-12)
    assert comparison.value("2", "Isotropic", "frobenius") > 0


NAMES = (
    "KFAC",
    "EKFAC",
    "TKFAC",
    "TEKFAC",
    "TN",
    "MiniBlock",
    "TENGraD",
    "Shampoo",
    "KPSVD",
    "Diagonal",
    "LNGD",
)
NAMES += ("Exact", "Corrected")


def test_the_names_promised() -> None:
    """The registry has every promised approximation under its class name, and the package exports
    it.
    """
    for name in NAMES:
        assert approximations.registry()[name].__name__ == name
        assert getattr(fl, name) is getattr(approximations, name) is approximations.registry()[name]


def test_default_list() -> None:
    """`compare`'s default list has one of each, without the exact block and without what needs
    arguments.
    """
    labels = [approximation.label for approximation in approximations.default_approximations()]
    assert len(set(labels)) == len(labels)
    assert "KFAC" in labels
    assert "Exact" not in labels
    assert not any(label.startswith("Corrected") for label in labels)


def test_a_name_of_the_package_is_not_taken_over() -> None:
    """A user's class called as one of the package's is refused and does not replace it."""
    with pytest.raises(ValueError, match="KFAC"):
        type("KFAC", (Approximation,), {"moments": lambda *_: {}, "assemble": lambda *_: None})
    assert approximations.registry()["KFAC"] is KFAC


@pytest.mark.parametrize("name", ["average", "keeps_examples", "carry", "reassemble"])
def test_what_nothing_asks_for_any_more_is_refused_with_the_cure(name) -> None:
    """Methods that classes of earlier versions defined would else be passed over in silence."""
    of_earlier = 1.0 if name == "keeps_examples" else lambda *_: None
    with pytest.raises(TypeError, match=f"defines {name}.*fl.approximations"):
        type("OfEarlierVersions", (Approximation,), {name: of_earlier})
    assert "OfEarlierVersions" not in approximations.registry()


def test_options_and_helpers_of_those_names_are_ones_own() -> None:
    """Only what earlier versions would have asked for is refused."""
    before = approximations.registry()
    try:

        @dataclass(frozen=True)
        class OwnOptions(Isotropic):
            average: bool = True
            carry: float = 0.5
            keeps_examples: int = 3

            def reassemble(self, x):
                return x

        assert OwnOptions(average=False).label == "OwnOptions(average=False)"
    finally:
        Approximation._registry.clear()
        Approximation._registry.update(before)


def test_a_class_of_earlier_versions_sees_the_matrix() -> None:
    """`moments(stats, matrix=None)` and `assemble(moments, matrix=None)` are called as
    they were.
    """
    seen = []

    class Earlier(Approximation, register=False):
        sweeps = 2

        def moments(self, stats, matrix=None):
            seen.append(matrix)
            return {"squares": stats.squares().flatten(0, 1)}

        def assemble(self, moments, matrix=None):
            seen.append(matrix)
            return DiagonalMatrix(moments["squares"])

    matrix = build(Earlier(), random_stats(0))
    assert seen[:2] == [None, None]
    assert isinstance(seen[2], DiagonalMatrix)
    assert seen[2] is seen[3]
    assert matrix is not seen[2]


@pytest.mark.parametrize("returned", [None, [torch.ones(2)], {"mean": 1.0}])
def test_what_is_no_moments_is_refused(returned) -> None:
    """A dictionary of tensors is expected, or Moments."""

    class Wrong(Approximation, register=False):
        def moments(self, sums):
            return returned

        def assemble(self, moments):
            return None

    with pytest.raises(
        TypeError, match=r"Wrong.moments returned .*, expected a dictionary of named tensors"
    ):
        build(Wrong(), random_stats(0))


def test_intermediate_classes_need_not_be_registered() -> None:
    """An intermediate class, written with `register=False`, is no approximation."""

    class Intermediate(Approximation, register=False):
        pass

    assert "Intermediate" not in approximations.registry()
    assert "EigenvalueCorrected" not in approximations.registry()


@pytest.mark.parametrize(
    ("approximation", "label"),
    [
        (KFAC(), "KFAC"),
        (KFAC("reduce"), "KFAC(spatial=reduce)"),
        (MiniBlock(linear="col"), "MiniBlock(linear=col)"),
        (MiniBlock("row_avg", "filter"), "MiniBlock(linear=row_avg, conv=filter)"),
        (TENGraD(), "TENGraD"),
        (TENGraD(batch=3, spatial="reduce_sum"), "TENGraD(batch=3, spatial=reduce_sum)"),
        (Shampoo(match_trace=False), "Shampoo(match_trace=False)"),
        (Isotropic(2.0), "Isotropic(factor=2.0)"),
    ],
)
def test_labels(approximation: Approximation, label: str) -> None:
    """The label is the class name, then the non-default options in brackets."""
    assert approximation.label == label


def test_label_is_one_line(approximation) -> None:
    """Every label is one line that starts with the class name; labels tell instances apart."""
    assert approximation.label.startswith(type(approximation).__name__)
    assert "\n" not in approximation.label
    assert [other.label for other in INSTANCES].count(approximation.label) == INSTANCES.count(
        approximation
    )


def test_frozen_and_comparable(approximation) -> None:
    """An approximation is a value: frozen, equal to its copy, hashable."""
    copy = dataclasses.replace(approximation)
    assert copy == approximation
    assert hash(copy) == hash(approximation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        approximation.spatial = "expand"


@pytest.mark.parametrize(
    "make",
    [
        lambda: KFAC(spatial="mean"),
        lambda: EKFAC(spatial="full"),
        lambda: TKFAC(spatial="reduce"),
        lambda: TEKFAC(spatial="reduce"),
        lambda: TN(modes=0),
        lambda: MiniBlock(linear="rows"),
        lambda: MiniBlock(conv="row"),
        lambda: TENGraD(batch=0),
        lambda: TENGraD(spatial="reduce"),
    ],
)
def test_bad_options_are_refused(make) -> None:
    """Options out of range are refused when the approximation is made, with the value in the
    sentence.
    """
    with pytest.raises(ValueError, match="expected"):
        make()


# ---------------------------------------------------------------- the matrix


@pytest.mark.parametrize("seed", range(3))
def test_matrix(approximation, sizes: dict, seed: int) -> None:
    """The result is a FisherMatrix over the weight's shape, finite and PSD; its numbers are those
    of its dense form.
    """
    stats = random_stats(seed, "norm-dependent", N=6, **sizes)
    matrix = build(approximation, stats)
    assert isinstance(matrix, FisherMatrix)
    assert tuple(matrix.shape) == stats.shape
    M, F = matrix.dense(), dense_fisher(stats)
    assert_psd(M)
    assert bool(torch.isfinite(M).all())
    assert float(matrix.quadratic(stats)) == pytest.approx(float((F * M).sum()), rel=1e-9)
    assert float(matrix.trace()) == pytest.approx(float(torch.trace(M)), rel=1e-9)
    assert float(matrix.frobenius_norm()) == pytest.approx(float(M.norm()), rel=1e-9)


def test_damped_inverse(approximation, sizes: dict) -> None:
    """The damped inverse is that of the dense matrix, and the trainer's exponent is a power the
    matrix can take.
    """
    stats = random_stats(0, N=6, **sizes)
    matrix = build(approximation, stats)
    X = torch.randn(*matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    damped = matrix.dense() + 0.1 * torch.eye(X.numel(), dtype=torch.float64)
    assert_same(
        matrix.solve(X, damping=0.1),
        torch.linalg.solve(damped, X.reshape(-1)).reshape(X.shape),
        1e-8,
    )
    assert approximation.exponent < 0
    assert bool(torch.isfinite(matrix.power(X, approximation.exponent, damping=0.1)).all())


@pytest.mark.parametrize("batches", [[3, 5], [1, 3, 4], [8], [5, 2, 1]])
def test_unequal_batches_are_one_batch(approximation, sizes: dict, batches: list[int]) -> None:
    """Unequal batches, mixed with running-mean weights, are one batch of all examples."""
    stats = random_stats(3, N=8, **sizes)
    got = build_in_batches(approximation, split(stats, batches)).dense()
    assert_same(got, build(approximation, stats).dense(), 1e-8)


@pytest.mark.parametrize(
    "approximation", [x for x in INSTANCES if not x.needs_factors], ids=lambda x: x.label
)
def test_mixing_weights(approximation, sizes: dict) -> None:
    """`old.mix(new, w)` weighs old examples by 1 - w, new ones by w (KFAC weighs inputs and
    gradients apart).
    """
    stats = random_stats(4, N=5, **sizes)
    first, second = split(stats, [3, 2])
    weight = 0.25
    # the same weights, as sizes of the gradients of one batch
    scale = torch.tensor(
        [(1 - weight) / 3 * 5] * 3 + [weight / 2 * 5] * 2, dtype=torch.float64
    ).sqrt()
    weighted = stats.like(stats.a, stats.g * scale[None, :, None, None, None])
    matrix = None
    for _ in range(approximation.sweeps):
        older, newer = (observed(approximation, Sums(batch), matrix) for batch in (first, second))
        matrix = assembled(approximation, older.mix(newer, weight), matrix)
    assert_same(matrix.dense(), build(approximation, weighted).dense(), 1e-8)


@pytest.mark.parametrize(
    "approximation", [EKFAC(), EKFAC("reduce"), TEKFAC(), Corrected(TKFAC("full"))], ids=str
)
@pytest.mark.parametrize("Q", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_corrected_eigenvalues_follow_a_basis_change(approximation, Q: int, seed: int) -> None:
    """Eigenvalues of an old basis become the diagonal of the same matrix in the new basis, which
    keeps the trace.
    """
    first, second = (random_stats(seed + k, N=12, T=2, Q=Q, d_out=3, d_in=4) for k in (0, 50))
    old = build(approximation, first)
    # factors of the second batch, its squares in the old basis
    moments = observed(approximation, Sums(second), old)
    new = assembled(approximation, moments, old)
    held = dataclasses.replace(old, values=moments["s"]).dense()
    basis = dataclasses.replace(build(approximation, second), values=torch.ones_like(moments["s"]))
    units = torch.eye(12 * Q, dtype=torch.float64).reshape(12 * Q, *basis.values.shape)
    # projectors
    vectors = torch.stack([dataclasses.replace(basis, values=unit).dense() for unit in units])
    expected = sum(projector * (projector * held).sum() for projector in vectors)
    assert_same(new.dense(), expected, 1e-8)
    assert float(new.trace()) == pytest.approx(float(torch.trace(dense_fisher(second))), rel=1e-9)
    after = carried(approximation, moments, new)
    assert_same(assembled(approximation, after, new).dense(), new.dense(), 1e-8)


def test_moments_are_tensors_and_inputs_stay(approximation, sizes: dict) -> None:
    """Moments are named tensors; neither `moments`, `assemble` nor mixing changes what it was
    given.
    """
    stats = random_stats(5, N=6, **sizes)
    a, g = stats.a.clone(), stats.g.clone()
    moments = observed(approximation, Sums(stats), None)
    assert moments
    for name, tensor in moments.items():
        assert isinstance(name, str)
        assert isinstance(tensor, Tensor)
    before = {name: tensor.clone() for name, tensor in moments.items()}
    assembled(approximation, moments, None)
    moments.mix(observed(approximation, Sums(random_stats(6, N=6, **sizes)), None), 0.5)
    assert torch.equal(stats.a, a)
    assert torch.equal(stats.g, g)
    assert all(torch.equal(moments[name], before[name]) for name in before)


@pytest.mark.parametrize("N", [1, 4])
def test_all_zero_gradients(approximation, sizes: dict, N: int) -> None:
    """All-zero gradients give the zero matrix: finite moments, finite damped inverse."""
    stats = random_stats(0, N=N, **sizes)
    zero = stats.like(stats.a, torch.zeros_like(stats.g))
    for name, tensor in observed(approximation, Sums(zero), None).items():
        assert bool(torch.isfinite(tensor).all()), name
    matrix = build(approximation, zero)
    assert float(matrix.dense().abs().max()) == 0.0
    X = torch.ones(*matrix.shape, dtype=torch.float64)
    assert_same(matrix.solve(X, damping=0.5), 2 * X, 1e-12)


def test_dead_inputs_and_outputs(approximation, sizes: dict) -> None:
    """An input that is always zero and an output without gradient (dead units) do no harm."""
    stats = random_stats(0, "relu", N=6, **sizes)
    a, g = stats.a.clone(), stats.g.clone()
    a[..., 0], g[..., -1] = 0.0, 0.0
    matrix = build(approximation, stats.like(a, g))
    assert_psd(matrix.dense())
    X = torch.ones(*matrix.shape, dtype=torch.float64)
    assert bool(torch.isfinite(matrix.solve(X, damping=1e-3)).all())


@pytest.mark.parametrize("R", [1, 3])
def test_batch_of_one(approximation, sizes: dict, R: int) -> None:
    """A batch of one example gives finite moments and a PSD matrix."""
    stats = random_stats(1, N=1, R=R, **sizes)
    assert all(
        bool(torch.isfinite(tensor).all())
        for tensor in observed(approximation, Sums(stats), None).values()
    )
    assert_psd(build(approximation, stats).dense())


@pytest.mark.parametrize("c", [1e-12, 37.0, 1e12])
def test_p28_homogeneity(approximation, sizes: dict, c: float) -> None:
    """P28: scaling F by c scales F^ by c, over many orders of magnitude."""
    stats = random_stats(2, N=12, **sizes)
    scaled = build(approximation, stats.like(stats.a, stats.g * c**0.5)).dense()
    assert_same(scaled, c * build(approximation, stats).dense(), 1e-8)


def test_p28_order_of_examples(approximation, sizes: dict) -> None:
    """P28: permuting the examples, or the directions, changes nothing."""
    stats = random_stats(2, N=12, R=3, **sizes)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = stats.like(stats.a[order], stats.g[[2, 0, 1]][:, order])
    assert_same(build(approximation, permuted).dense(), build(approximation, stats).dense(), 1e-8)


def test_repeated_examples(approximation, sizes: dict) -> None:
    """The same examples twice are the same distribution."""
    stats = random_stats(2, N=12, **sizes)
    twice = stats.like(torch.cat([stats.a, stats.a]), torch.cat([stats.g, stats.g], 1))
    assert_same(build(approximation, twice).dense(), build(approximation, stats).dense(), 1e-8)


def test_explicit_gradients(approximation, sizes: dict) -> None:
    """Without factors (batch-mean statistics) a method that needs them refuses; the others take
    explicit gradients.
    """
    stats = random_stats(2, N=12, **sizes)
    explicit = LayerStats.of_gradients(gradients(stats), stats.kernel, stats.bias)
    if approximation.needs_factors:
        with pytest.raises(ValueError, match="per-example"):
            build(approximation, explicit)
        return
    matrix = build(approximation, explicit)
    assert tuple(matrix.shape) == stats.shape
    assert_psd(matrix.dense())
    if getattr(approximation, "spatial", "exact") == "exact" and "spatial" not in repr(
        approximation
    ):
        assert_same(matrix.dense(), build(approximation, stats).dense(), 1e-8)


def test_single_precision(approximation, sizes: dict) -> None:
    """float32 statistics give a float32 matrix, near the float64 one."""
    stats = random_stats(2, N=12, **sizes)
    matrix = build(approximation, stats.like(stats.a.float(), stats.g.float()))
    assert matrix.dtype == torch.float32
    assert_same(matrix.dense().double(), build(approximation, stats).dense(), 1e-3)


def test_moments_of_any_type_are_averaged() -> None:
    """Also counts; the weight may be a tensor, of another precision."""
    older = Means({"n": torch.tensor(2), "x": torch.ones(3)}, (1, 3))
    newer = Means({"n": torch.tensor(4), "x": torch.zeros(3)}, (1, 3))
    mixed = older.mix(newer, 0.25)
    assert float(mixed["n"]) == 2.5
    assert torch.equal(mixed["x"], torch.full((3,), 0.75))
    weight = torch.tensor(0.25, dtype=torch.float64)
    assert torch.equal(older.mix(newer, weight)["x"], mixed["x"])


class Named(Approximation, register=False):
    """KFAC, with one more tensor in batches of some sizes."""

    def __init__(self, more):
        self.more = more

    @property
    def label(self):
        return "Named"

    def moments(self, sums):
        A, G = sums.factors()
        found = {"A": A, "G": G}
        if self.more == sums.N:
            found["extra"] = A
        return found

    def assemble(self, moments):
        return fl.matrices.Kronecker((moments["G"], moments["A"]))


@pytest.mark.parametrize("more", [4, 5])
def test_moments_of_other_names_in_another_batch_are_refused(more: int) -> None:
    """What the last batch lacked was dropped, what it added weighed all."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(9, 3)
    with pytest.raises(ValueError, match=r"^Named\.moments returned .* the same names"):
        fl.estimate(Named(more), model, fl.Categorical(), [(x[:4],), (x[4:],)])


@pytest.mark.parametrize("more", [4, 5])
def test_moments_of_other_names_in_another_observation_are_refused(more: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = fl.NaturalGradient(
        model, fl.Categorical(), Named(more), lr=0.1, observe_every=1, refresh_every=1
    )

    def step(n: int) -> None:
        opt.zero_grad()
        with opt.observing():
            z = model(torch.randn(n, 3))
        nn.functional.cross_entropy(z, torch.zeros(n, dtype=torch.long)).backward()
        opt.step()

    step(4)
    with pytest.raises(ValueError, match=r"^Named\.moments returned .* the same names"):
        step(5)
