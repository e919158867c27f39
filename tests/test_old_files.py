"""Files of an earlier version, in tests/files, are read as meant: numbers, reasons, later steps."""

import json
from pathlib import Path

import pytest
import torch

import fisher_lab as fl
from tests.files import make

FILES = Path(make.__file__).parent
EXPECTED = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))
# Of another processor's rounding, some steps on.
ACCURACY = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def checkpoints():
    return torch.load(FILES / "checkpoints.pt", weights_only=True)


def test_every_file_is_expected_and_the_other_way_round():
    there = {path.name for path in FILES.iterdir() if path.suffix in (".json", ".csv", ".pt")}
    assert there == {*EXPECTED["comparisons"], "checkpoints.pt", "expected.json"}
    assert set(EXPECTED["checkpoints"]) == set(make.OPTIMIZERS)


@pytest.mark.parametrize("name", EXPECTED["comparisons"])
def test_an_old_comparison_has_its_numbers(name):
    found, expected = fl.load_comparison(FILES / name), EXPECTED["comparisons"][name]
    assert make.kept(found) == expected
    assert {row.precision for row in found.rows} == {None}  # which they do not tell
    layer, approximation, error, value, _, damping = expected["rows"][0][:6]
    assert found.value(layer, approximation, error, damping) == float(value)


@pytest.mark.parametrize("name", EXPECTED["comparisons"])
def test_an_old_comparison_is_shown_with_what_was_left_out(name):
    found = fl.load_comparison(FILES / name)
    shown = str(found)
    assert all(label in shown for label in found.approximations)
    assert all(f"Left out: {what}" in shown for what in found.settings["left_out"])


@pytest.mark.parametrize("ending", [".json", ".csv"])
@pytest.mark.parametrize("name", EXPECTED["comparisons"])
def test_an_old_comparison_is_saved_again_without_loss(tmp_path, name, ending):
    found = fl.load_comparison(FILES / name)
    again = fl.load_comparison(found.save(tmp_path / f"again{ending}"))
    assert again == found


# With kl_clip, which bounds p^T F p itself since these files were written and bounded <p, m> then:
# they load and train, in steps of other lengths.
BOUNDED = ("MiniBlock",)


@pytest.mark.filterwarnings("ignore:.*of the 6 examples of a batch")
@pytest.mark.parametrize("name", make.OPTIMIZERS)
def test_training_goes_on_from_an_old_checkpoint(name, checkpoints):
    dtype, expected = make.dtype_of(name), EXPECTED["checkpoints"][name]
    model = make.net(dtype)
    model.load_state_dict(checkpoints[name]["model"])
    opt = make.OPTIMIZERS[name](model)
    opt.load_state_dict(checkpoints[name]["optimizer"])
    losses = make.train(opt, model, dtype, make.BEFORE, make.AFTER)
    if name in BOUNDED:
        assert losses[-1] < losses[0]
        return
    torch.testing.assert_close(
        torch.tensor(losses + make.flat(model), dtype=torch.float64),
        torch.tensor(expected["losses"] + expected["parameters"], dtype=torch.float64),
        rtol=ACCURACY[dtype], atol=ACCURACY[dtype],
    )  # fmt: skip
