"""The problems that ship with the library: what they hold, that they are seeded, what
they refuse.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fisher_lab import problems
from fisher_lab.problems import training
from tests.problems.support import quick

SHAPES = {
    "digits_mlp": ((200, 64), (200,), (200, 10)),
    "iris_regression": ((120, 2), (120, 2), (120, 2)),
    "martens_grosse": ((1000, 256), (1000,), (1000, 10)),
    "mnist_autoencoder": ((200, 64), (200, 64), (200, 64)),
    "mnist_cnn": ((200, 1, 14, 14), (200,), (200, 10)),
    "mnist1d_conv1d": ((200, 1, 40), (200,), (200, 10)),
    "photo_patches_cnn": ((100, 3, 32, 32), (100,), (100, 2)),
    "char_transformer": ((100, 24), (100, 24), (100, 24, 70)),
    "segmentation": ((100, 1, 16, 16), (100, 1, 16, 16), (100, 1, 16, 16)),
}
NAMES = sorted(SHAPES)


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    return quick(request.param)


def parameters(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def test_every_problem_of_the_package_is_tested_here():
    ours = {name for name in problems.names() if registered_in_package(name)}
    assert ours == set(SHAPES)


def registered_in_package(name):
    return problems.registry.registered(name).__module__.startswith("fisher_lab.problems.")


def test_data_and_outputs_have_the_promised_shapes(made):
    x, y = made.data
    x_shape, y_shape, z_shape = SHAPES[made.name]
    assert (tuple(x.shape), tuple(y.shape)) == (x_shape, y_shape)
    with torch.no_grad():
        assert tuple(made.model(x).shape) == z_shape


def test_the_model_is_ready_to_be_measured(made):
    assert not any(module.training for module in made.model.modules())
    assert all(
        p.dtype == torch.float32 and p.grad is None and p.requires_grad
        for p in made.model.parameters()
    )
    assert all(b.dtype == torch.float32 for b in made.model.buffers() if b.is_floating_point())
    assert made.data[0].dtype in (torch.float32, torch.int64)
    assert made.data[1].dtype in (torch.float32, torch.int64)


def test_labels_and_outputs_fit_the_likelihood(made):
    for x, y in (made.data, made.test_data):
        with torch.no_grad():
            z = made.model(x[:20])
        made.likelihood.check_output(z)
        made.likelihood.check_labels(z, y[:20])
        assert torch.isfinite(made.likelihood.loss(z, y[:20]))


def test_measuring_examples_are_the_first_training_examples(made):
    for part, whole in zip(made.data, made.train_data, strict=True):
        assert torch.equal(part, whole[: len(part)])


def test_settings_are_json_and_make_the_same_problem_again(made):
    recorded = json.loads(json.dumps(made.settings))
    assert recorded == made.settings
    assert len(recorded["data_sha256"]) == 64
    arguments = problems.describe()[made.name].settings
    again = problems.load(
        made.name, **{key: value for key, value in recorded.items() if key in arguments}
    )
    assert again.settings == made.settings
    assert torch.equal(parameters(again), parameters(made))
    assert all(torch.equal(a, b) for a, b in zip(again.data, made.data, strict=True))


def test_the_seed_changes_the_model_and_not_the_data(made):
    other = quick(made.name, seed=1)
    assert not torch.equal(parameters(other), parameters(made))
    assert all(torch.equal(a, b) for a, b in zip(other.data, made.data, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_is_neither_read_nor_changed(name):
    first = quick(name)
    torch.manual_seed(123)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state
    second = quick(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)  # noqa: NPY002
    assert torch.equal(parameters(first), parameters(second))


def test_another_default_dtype_or_device_and_disabled_gradients_make_no_difference(made):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):
            got = quick(made.name)
            assert torch.get_default_dtype() == torch.float64
            assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(parameters(got), parameters(made))
    assert all(torch.equal(a, b) for a, b in zip(got.data, made.data, strict=True))


def test_the_number_of_threads_makes_no_difference(made):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))  # 1 where there were several, else 2
        other = quick(made.name)
        assert torch.get_num_threads() == 3 - min(threads, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(parameters(other), parameters(made))


def test_an_output_depends_on_its_own_example_only(made):
    x, _ = made.data
    with torch.no_grad():
        together, alone = made.model(x[:4]), torch.cat([made.model(x[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


# torch's own, inside its jvp
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_per_example_reverse_and_forward_mode_agree(made):
    """What the exact Fisher needs of a model: torch.func through vmap, both ways, in float64."""
    model = copy.deepcopy(made.model).double()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    x = made.data[0][:3]
    x = x.double() if x.is_floating_point() else x

    def output(theta, one):
        return torch.func.functional_call(model, theta, (one.unsqueeze(0),)).squeeze(0)

    def forwards(one):
        return torch.func.jvp(lambda t: output(t, one), (theta,), (direction,))[1]

    def backwards(one, weight):
        (gradient,) = torch.func.vjp(lambda t: output(t, one), theta)[1](weight)
        return sum((gradient[name] * direction[name]).sum() for name in theta)

    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in theta.items()
    }
    tangents = torch.func.vmap(forwards)(x)
    weights = torch.randn(tangents.shape, generator=generator, dtype=tangents.dtype)
    products = torch.func.vmap(backwards)(x, weights)
    torch.testing.assert_close((tangents * weights).flatten(1).sum(1), products)


def test_training_lowers_the_loss(made):
    untrained, trained = quick(made.name, steps=0), quick(made.name, steps=40)
    assert trained.settings["final_training_loss"] < untrained.settings["final_training_loss"]


def test_the_quick_problem_learns():
    made = problems.load("digits_mlp")
    x, y = made.test_data
    with torch.no_grad():
        assert (made.model(x).argmax(1) == y).float().mean() > 0.9


def test_zero_steps_is_the_start():
    made = problems.load("digits_mlp", steps=0)
    with training.seeded(0):
        start = training.mlp((64, 20, 10), torch.nn.Tanh)
    assert torch.equal(
        parameters(made), torch.cat([p.detach().flatten() for p in start.parameters()])
    )


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"examples": 0}, ValueError, "examples=0, expected a whole number from 1 to 1400"),
        ({"examples": 1401}, ValueError, "there are no more training examples"),
        (
            {"steps": -1},
            ValueError,
            "steps=-1, expected a whole number, 0 or more: use 0 for the untrained model",
        ),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"batch": 1401}, ValueError, "batch=1401"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"lr": 0.0}, ValueError, "lr=0.0, expected a positive finite number"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"widths": ()}, TypeError, "at least one width"),
        ({"widths": (20, 0)}, ValueError, "a layer needs at least one unit"),
        ({"steps": 2.5}, TypeError, "expected a whole number"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, error, words):
    with pytest.raises(error, match=words) as caught:
        problems.load("digits_mlp", **settings)
    assert "\n" not in str(caught.value)


def test_a_training_that_diverges_is_refused():
    with pytest.raises(
        ValueError,
        match=r"training loss is (inf|nan) after 3 steps with lr=1e\+30.*use a smaller lr",
    ):
        quick("iris_regression", lr=1e30)


def test_a_direct_call_refuses_wrong_types_too():
    from fisher_lab.problems.digits_mlp import digits_mlp

    with pytest.raises(TypeError, match=r"steps=2.5 of type float"):
        digits_mlp(steps=2.5)
    with pytest.raises(TypeError, match=r"lr='fast' of type str"):
        digits_mlp(lr="fast")


def test_importing_the_problems_imports_no_data_package():
    late = ["sklearn", "skimage", "mlxtend", "pandas", "matplotlib", "pydoc_data"]
    code = f"import sys, fisher_lab.problems; print([m for m in {late} if m in sys.modules])"
    root = Path(problems.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "[]"
