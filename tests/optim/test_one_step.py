"""One step of every method equals the dense formula in float64."""

import pytest
import torch

import fisher_lab as fl
from fisher_lab import optim
from fisher_lab.matrices import Kronecker
from tests import helpers, naive
from tests.optim.support import batch, gradients, layer_stats, net, one_step, preset, weights

LIKELIHOOD = fl.Categorical()
LAMBDA = 0.05


def kron_factors(name, stats):
    """Factors G, A with F = G (x) A."""
    if name == "KFAC":
        return naive.kfac_factors(stats.a[:, :, 0], stats.g[:, :, :, 0])
    P = helpers.gradients(stats)[:, :, 0].flatten(0, 1)
    U1 = torch.einsum("noi,npi->op", P, P) / stats.N
    U2 = torch.einsum("noi,noj->ij", P, P) / stats.N
    return U1, U2 / U1.trace()


def factored_inverse(G, A, damping):
    """Both factors to equal mean eigenvalue, sqrt(lambda) on each, inverted densely."""
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    G, A = G * pi, A / pi
    eye = torch.eye
    left = torch.linalg.inv(G + damping**0.5 * eye(len(G), dtype=G.dtype))
    return torch.kron(left, torch.linalg.inv(A + damping**0.5 * eye(len(A), dtype=A.dtype)))


def dense_direction(name, stats, V, style):
    if style == "factored":
        inverse = factored_inverse(*kron_factors(name, stats), LAMBDA)
    else:
        F = {
            "KFAC": lambda: torch.kron(*kron_factors("KFAC", stats)),
            "EKFAC": lambda: naive.naive_ekfac(stats),
            "TKFAC": lambda: naive.naive_tkfac(stats),
            "TEKFAC": lambda: naive.naive_tekfac(stats),
            "TN": lambda: naive.naive_tn(stats),
            "MiniBlock": lambda: naive.naive_mini_block(stats),
            "Diagonal": lambda: naive.naive_diagonal(stats),
            "LNGD": lambda: naive.naive_lngd(stats),
            "TENGraD": lambda: naive.naive_tengrad(stats),
            "Exact": lambda: helpers.dense_fisher(stats),
            "KPSVD": lambda: naive.naive_kpsvd(stats),
        }[name]()
        inverse = torch.linalg.inv(F + LAMBDA * torch.eye(len(F), dtype=F.dtype))
    return (inverse @ V.flatten()).view(V.shape)


ONE_SWEEP = ("KFAC", "TKFAC", "TN", "MiniBlock", "Diagonal", "LNGD", "TENGraD", "Exact", "KPSVD")
CASES = [(name, "exact") for name in ONE_SWEEP] + [
    (name, "factored") for name in ("KFAC", "TKFAC", "TN")
]


@pytest.mark.parametrize(("name", "style"), CASES)
@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_one_step_equals_the_dense_formula(name, style, fisher):
    model, (x, y) = net(), batch()
    g, stats = gradients(model, LIKELIHOOD, x, y), layer_stats(model, LIKELIHOOD, x, fisher, y)
    before = weights(model)
    opt = fl.NaturalGradient(
        model,
        LIKELIHOOD,
        getattr(fl, name)(),
        lr=0.3,
        damping=LAMBDA,
        damping_style=style,
        fisher=fisher,
    )
    one_step(opt, model, LIKELIHOOD, x, y, labels=y if fisher == "empirical" else None)
    for layer, W in weights(model).items():
        helpers.assert_same(
            W, before[layer] - 0.3 * dense_direction(name, stats[layer], g[layer], style)
        )


@pytest.mark.parametrize("name", ["EKFAC", "TEKFAC"])
def test_the_first_step_of_a_corrected_method_uses_the_factors_eigenvalues(name):
    model, (x, y) = net(), batch()
    g, stats = gradients(model, LIKELIHOOD, x, y), layer_stats(model, LIKELIHOOD, x, "true")
    before = weights(model)
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, getattr(fl, name)(), lr=0.3, damping=LAMBDA, fisher="true"
    )
    one_step(opt, model, LIKELIHOOD, x, y)
    for layer, W in weights(model).items():
        base = {"EKFAC": "KFAC", "TEKFAC": "TKFAC"}[name]
        expected = dense_direction(base, stats[layer], g[layer], "exact")
        helpers.assert_same(W, before[layer] - 0.3 * expected)


@pytest.mark.parametrize("name", ["EKFAC", "TEKFAC"])
def test_after_a_warm_start_a_corrected_method_uses_corrected_eigenvalues(name):
    model, (x, y) = net(), batch()
    g, stats = gradients(model, LIKELIHOOD, x, y), layer_stats(model, LIKELIHOOD, x, "true")
    before = weights(model)
    opt = fl.NaturalGradient(
        model, LIKELIHOOD, getattr(fl, name)(), lr=0.3, damping=LAMBDA, fisher="true"
    )
    opt.warm_start((x, y))
    one_step(opt, model, LIKELIHOOD, x, y, observe=False)
    for layer, W in weights(model).items():
        helpers.assert_same(
            W, before[layer] - 0.3 * dense_direction(name, stats[layer], g[layer], "exact")
        )


def sampled_gradient(model, x, generator):
    """Batch-mean gradient for the labels that the optimizer's own generator gives."""
    z = model(x)
    labels = LIKELIHOOD.sample(z.detach(), generator)
    return gradients(model, LIKELIHOOD, x, labels)


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_tnt_equals_the_dense_formula_of_the_batch_mean_on_the_scale_of_f(style):
    model, (x, y) = net(), batch()
    options = {"damping": LAMBDA, "damping_style": style, "seed": 3, "kl_clip": None}
    opt = optim.TNT(model, LIKELIHOOD, 0.1, **options)
    g, mean = (
        gradients(model, LIKELIHOOD, x, y),
        sampled_gradient(model, x, torch.Generator().manual_seed(3)),
    )
    before = weights(model)
    one_step(opt, model, LIKELIHOOD, x, y)
    for layer, W in weights(model).items():
        U1, U2 = len(x) * mean[layer] @ mean[layer].T, len(x) * mean[layer].T @ mean[layer]
        U2 = U2 / U1.trace()
        if style == "factored":
            inverse = factored_inverse(U1, U2, LAMBDA)
        else:
            F = torch.kron(U1, U2)
            inverse = torch.linalg.inv(F + LAMBDA * torch.eye(len(F), dtype=F.dtype))
        expected = before[layer] - 0.1 * (inverse @ g[layer].flatten()).view(W.shape)
        helpers.assert_same(W, expected)


def test_published_tnt_settings_convert_as_documented():
    """The authors' step: factors of F/m of equal mean eigenvalue, eps on each, lr; ours: damping m
    eps^k, lr m lr.
    """
    model, (x, y) = net(), batch()
    eps, lr, m = 0.1, 0.01, len(x)
    opt = optim.TNT(model, LIKELIHOOD, m * lr, damping=m * eps**2, seed=3)
    g, mean = (
        gradients(model, LIKELIHOOD, x, y),
        sampled_gradient(model, x, torch.Generator().manual_seed(3)),
    )
    before = weights(model)
    one_step(opt, model, LIKELIHOOD, x, y)
    for layer, W in weights(model).items():
        H = [mean[layer] @ mean[layer].T, mean[layer].T @ mean[layer]]
        n = [len(M) for M in H]
        c = (H[0].trace() / (n[0] * n[1])) ** 0.5
        damped = [
            M / (c * other) + eps * torch.eye(len(M), dtype=M.dtype)
            for M, other in zip(H, n[::-1], strict=True)
        ]
        expected = torch.linalg.inv(damped[0]) @ g[layer] @ torch.linalg.inv(damped[1])
        helpers.assert_same(W, before[layer] - lr * expected)


@pytest.mark.parametrize("limit", [2**26, 100])
def test_mbf_uses_row_blocks_where_they_fit_and_the_average_block_otherwise(limit):
    model, (x, y) = net(), batch()
    options = {"damping": LAMBDA, "seed": 3, "kl_clip": None}
    opt = optim.MBF(model, LIKELIHOOD, 0.1, max_block_bytes=limit, **options)
    assert ("row_avg" in repr(opt)) == (limit == 100)
    g, mean = (
        gradients(model, LIKELIHOOD, x, y),
        sampled_gradient(model, x, torch.Generator().manual_seed(3)),
    )
    before = weights(model)
    one_step(opt, model, LIKELIHOOD, x, y)
    for layer, W in weights(model).items():
        rows = len(x) * torch.einsum("oi,oj->oij", mean[layer], mean[layer])
        if limit == 100:
            rows = rows.mean(0, keepdim=True).expand_as(rows)
        inverse = torch.linalg.inv(rows + LAMBDA * torch.eye(rows.shape[1], dtype=rows.dtype))
        helpers.assert_same(W, before[layer] - 0.1 * (inverse @ g[layer].unsqueeze(-1)).squeeze(-1))


def test_shampoo_reads_the_gradient_of_its_own_step():
    model, (x, y) = net(), batch()
    opt = optim.Shampoo(model, LIKELIHOOD, 0.1, damping=LAMBDA, kl_clip=None)
    g, before, m = gradients(model, LIKELIHOOD, x, y), weights(model), len(x)
    one_step(opt, model, LIKELIHOOD, x, y)
    for layer, W in weights(model).items():
        L, R = (naive.root(m * M, 2) for M in (g[layer] @ g[layer].T, g[layer].T @ g[layer]))
        pi = ((R.trace() / len(R)) / (L.trace() / len(L))).sqrt()
        L, R = L * pi, R / pi
        powers = []
        for M in (L, R):
            values, vectors = torch.linalg.eigh(M)
            powers.append(
                vectors @ torch.diag((values.clamp(min=0) + LAMBDA**0.5) ** -0.5) @ vectors.T
            )
        helpers.assert_same(W, before[layer] - 0.1 * powers[0] @ g[layer] @ powers[1])


@pytest.mark.parametrize("conv", [False, True])
def test_shampoo_decomposes_every_factor_once_per_refresh_and_applies_one_product_per_mode(
    monkeypatch, conv
):
    """Also where layers of equal shape are joined, and beside the bias block of a convolution."""
    linear = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)]
    layers = [torch.nn.Conv2d(2, 4, 2), torch.nn.Flatten()] if conv else linear
    model = torch.nn.Sequential(*layers).double()
    x = torch.randn(5, 2, 2, 2).double() if conv else torch.randn(5, 4).double()
    y = torch.randint(3, (5,))
    real, sizes = torch.linalg.eigh, []

    def counted(M):
        sizes.extend([M.shape[-1]] * (M.numel() // M.shape[-1] ** 2))
        return real(M)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    opt = optim.Shampoo(model, LIKELIHOOD, 0.1)
    one_step(opt, model, LIKELIHOOD, x, y)
    # of the convolution: three modes and the bias block
    assert sorted(sizes) == ([2, 4, 4, 4] if conv else [3, 4, 4, 5, 5, 5])
    for c in opt.curvature.values():
        weight = c.inverse.parts[0] if conv else c.inverse
        assert isinstance(weight, Kronecker)
        assert len(weight.factors) == (3 if conv else 2)
        # nothing held that `nbytes` does not count
        assert not (c.matrix.parts[0] if conv else c.matrix).decomposed


@pytest.mark.parametrize("name", ["KFAC", "TKFAC", "TENGraD"])
def test_per_example_presets_take_one_sampled_label_per_example(name):
    model, (x, y) = net(), batch()
    opt = preset(name, model, LIKELIHOOD, 0.1, damping=LAMBDA, seed=3, kl_clip=None)
    g = gradients(model, LIKELIHOOD, x, y)
    labels = LIKELIHOOD.sample(model(x).detach(), torch.Generator().manual_seed(3))
    stats = layer_stats(model, LIKELIHOOD, x, "mc", labels)
    before = weights(model)
    one_step(opt, model, LIKELIHOOD, x, y)
    style = opt.param_groups[0]["damping_style"]
    for layer, W in weights(model).items():
        helpers.assert_same(
            W, before[layer] - 0.1 * dense_direction(name, stats[layer], g[layer], style)
        )


def test_batch_mean_statistics_average_to_f_over_the_labels():
    """m times the outer product of the mean gradient, averaged over every possible labelling with
    its probability.
    """
    model, (x, _) = net(widths=(2, 3, 2)), batch(N=3, widths=(2, 3, 2))
    z = model(x).detach()
    total = dict.fromkeys(weights(model), 0.0)
    for labels in torch.cartesian_prod(*[torch.arange(2)] * 3):
        probability = LIKELIHOOD.log_prob(z, labels).sum().exp()
        opt = fl.NaturalGradient(
            model, LIKELIHOOD, fl.Exact(), 0.1, statistics="mean", fisher="empirical"
        )
        with opt.observing(labels):
            model(x)
        opt._refresh()
        for name, F in opt.matrices().items():
            total[name] = total[name] + probability * F.dense()
    for name, F in fl.exact_fisher(model, LIKELIHOOD, (x, None)).items():
        helpers.assert_same(total[name], F.dense())


CONV = (
    "KFAC",
    "EKFAC",
    "TKFAC",
    "TEKFAC",
    "TN",
    "MiniBlock",
    "TENGraD",
    "Diagonal",
    "Exact",
    "KPSVD",
    "LNGD",
)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", CONV)
def test_one_step_of_a_convolution_equals_the_dense_solution(name, groups):
    """With bias, stride and padding; the damped block of the approximation, formed and solved
    densely.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(2, 4, 2, stride=2, padding=1, groups=groups).double()
        x, y = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 4, 2, 2).double()
    likelihood = fl.Gaussian()
    W = torch.cat([model.weight.flatten(1), model.bias[:, None]], 1).detach()
    grads = torch.autograd.grad(likelihood.loss(model(x), y), list(model.parameters()))
    g = torch.cat([grads[0].flatten(1), grads[1][:, None]], 1)
    F = fl.estimate(getattr(fl, name)(), model, likelihood, (x, None))[""].dense()
    opt = fl.NaturalGradient(
        model, likelihood, getattr(fl, name)(), lr=0.1, damping=LAMBDA, fisher="true"
    )
    opt.warm_start((x, y))
    one_step(opt, model, likelihood, x, y, observe=False)
    step = torch.linalg.solve(F + LAMBDA * torch.eye(len(F), dtype=F.dtype), g.flatten()).view(
        W.shape
    )
    found = torch.cat([model.weight.flatten(1), model.bias[:, None]], 1).detach()
    helpers.assert_same(found, W - 0.1 * step)
