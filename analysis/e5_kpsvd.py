"""E5, Koroko et al. (2022): Frobenius and spectrum error in an autoencoder's fifth linear layer,
along training.
"""

import fisher_lab as fl
from analysis.common import Study, along, checkpoint, values

STEPS = (0, 10, 100, 500, 2000)
LAYER = "7"  # the fifth linear layer, 16 -> 32


def main() -> None:
    """Measure, save, draw."""
    study = Study("e5_kpsvd")
    methods = [fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.KPSVD()]
    for step in STEPS:
        problem = checkpoint("mnist_autoencoder", step, examples=512)
        study.compare(
            step, problem, methods, fisher="mc", layers=[LAYER], errors=["frobenius", "spectrum"]
        )
    study.save()
    found = along("e5_kpsvd")
    head = [f"layer {LAYER}", *(f"step {s}" for s in STEPS)]
    rows = [
        [f"{row[0]} {error}", *row[1:]]
        for error in ("frobenius", "spectrum")
        for row in values(found, LAYER, error)
    ]
    study.table(head, rows)
    study.draw(fl.plots.training(found, "frobenius"))
    study.draw(fl.plots.training(found, "spectrum"), "spectrum")


if __name__ == "__main__":
    main()
