"""Which approximation gives the best step depends on the damping."""

import fisher_lab as fl
from analysis.common import Study, checkpoint, load

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LAYERS = ("4", "8", "10")


def main() -> None:
    """Measure, save, draw."""
    study = Study("damping")
    problem = checkpoint("martens_grosse", 500, examples=500)
    study.compare(
        "500",
        problem,
        layers=LAYERS,
        errors=["frobenius", "damped_cosine", "damped_efficiency"],
        dampings=DAMPINGS,
    )
    study.save()
    found = load("damping")["500"]
    rows = [
        [label, *(found.value("8", label, "damped_efficiency", d) for d in DAMPINGS)]
        for label in found.approximations
    ]
    study.table(["efficiency, layer 8", *(f"damping {d:g}" for d in DAMPINGS)], rows)
    study.draw(fl.plots.damping(found, "damped_efficiency"))
    study.draw(fl.plots.damping(found, "damped_cosine"), "cosine")


if __name__ == "__main__":
    main()
