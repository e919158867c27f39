"""A small GPT-2 with thousands of tokens, all its layers."""

import pytest

import fisher_lab as fl
from analysis.benchmarks.cases import build

APPROXIMATIONS = [fl.KFAC(), fl.EKFAC(), fl.TN(), fl.TKFAC()]
ERRORS = ["trace", "frobenius", "spectral"]


@pytest.mark.slow
@pytest.mark.transformers
def test_all_layers_of_a_language_model():
    model, likelihood, data = build("gpt2", {"V": 5000, "N": 4})
    found = fl.compare(
        model,
        likelihood,
        data,
        APPROXIMATIONS,
        fisher="mc",
        errors=ERRORS,
        memory=2.0,
        progress=False,
    )
    about = found.settings["layers"]["transformer.wte"]
    assert about["factors"] == "those over the 5,000 rows are diagonal"
    assert about["checked"] < 1e-10
    layers = set(found.settings["layers"])
    assert len(layers) == 15
    asked = {(row.layer, row.approximation, row.error) for row in found.rows}
    assert len(asked) == (len(layers) + 1) * len(APPROXIMATIONS) * len(ERRORS)
    values = {}
    for row in found.rows:
        if row.layer == "transformer.wte":
            values[row.approximation, row.error] = row.value
    # these keep the trace of F, and EKFAC is the best diagonal in its basis
    assert values["EKFAC", "trace"] == pytest.approx(0, abs=1e-10)
    assert values["TN", "trace"] == pytest.approx(0, abs=1e-10)
    assert values["EKFAC", "frobenius"] <= values["KFAC", "frobenius"]
