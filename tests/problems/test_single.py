"""What is true of one problem or the other."""

import pytest
import torch

from fisher_lab import problems
from tests.problems.support import quick


def test_the_full_autoencoder_has_the_papers_layers_and_asks_for_monte_carlo():
    made = problems.load("mnist_autoencoder", full="true", steps=0, examples=2)
    sizes = [m.in_features for m in made.model if isinstance(m, torch.nn.Linear)]
    assert sizes == [784, 1000, 500, 250, 30, 250, 500, 1000]
    assert made.settings["widths"] == [1000, 500, 250, 30]
    assert made.settings["side"] == 28
    assert made.fisher == "mc"
    activations = [isinstance(m, torch.nn.ReLU) for m in made.model]
    assert activations.count(True) == 6
    with pytest.raises(ValueError, match="full=True together with widths"):
        problems.load("mnist_autoencoder", full=True, widths=(20, 5))


def test_the_autoencoders_code_and_output_are_linear():
    model = problems.load("mnist_autoencoder", steps=0).model
    kinds = [type(m).__name__ for m in model]
    assert kinds == ["Linear", "ReLU"] * 2 + ["Linear"] + ["Linear", "ReLU"] * 2 + ["Linear"]


def test_the_transformer_is_causal():
    made = quick("char_transformer")
    x = made.data[0][:5]
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 70
    with torch.no_grad():
        before, after = made.model(x), made.model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_the_transformer_predicts_the_next_character_of_the_text():
    x, y = quick("char_transformer").data
    assert torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize(
    ("name", "fisher"), [("char_transformer", "mc"), ("segmentation", "mc"), ("mnist_cnn", "true")]
)
def test_problems_with_many_outputs_ask_for_monte_carlo(name, fisher):
    assert quick(name).fisher == fisher


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("mnist_cnn", {"channels": (2, 2, 2, 2)}, "expected at most 3"),
        ("mnist1d_conv1d", {"channels": (2,) * 5}, "expected at most 4"),
        ("photo_patches_cnn", {"channels": (3, 4)}, "expected two even numbers"),
        ("photo_patches_cnn", {"photos": "mine"}, "expected 'all' or 'scikit-learn'"),
        ("char_transformer", {"heads": 3}, "expected a divisor of width=16"),
        ("char_transformer", {"context": 0}, "context=0"),
        ("segmentation", {"channels": "4"}, "expected two numbers"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(name, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        quick(name, **settings)
    assert "\n" not in str(caught.value)


def test_all_nine_photos_are_classes():
    made = problems.load("photo_patches_cnn", steps=0)
    assert made.settings["classes"][:3] == ["china", "flower", "astronaut"]
    assert made.model(made.data[0][:2]).shape == (2, 9)
    assert torch.equal(made.train_data[1].bincount(), torch.full((9,), 200))


def test_patches_have_no_mean_colour():
    x, _ = quick("photo_patches_cnn").train_data
    torch.testing.assert_close(x.mean((2, 3)), torch.zeros(x.shape[:2]), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy"), [("mnist_cnn", 0.75), ("mnist1d_conv1d", 0.6), ("martens_grosse", 0.85)]
)
def test_default_training_classifies_new_examples(name, accuracy):
    made = problems.load(name)
    x, y = made.test_data
    with torch.no_grad():
        assert (made.model(x).argmax(1) == y).float().mean() > accuracy


def test_the_bernoulli_loss_sums_over_pixels_and_averages_over_images():
    made = quick("mnist_autoencoder")
    x, y = made.data
    with torch.no_grad():
        z = made.model(x)
    expected = torch.nn.BCEWithLogitsLoss()(z, y) * z.shape[1]
    torch.testing.assert_close(made.likelihood.loss(z, y), expected)
