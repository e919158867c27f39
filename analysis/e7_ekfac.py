"""E7, George et al. (2018): KFAC and EKFAC in an autoencoder along training, fresh and
gone stale.
"""

import fisher_lab as fl
from analysis.common import Study, along, checkpoint, values

STEPS = (0, 10, 100, 200, 500, 1000)
STALE = 100  # matrices of this step are also measured at all later ones


def main() -> None:
    """Measure, save, draw."""
    study = Study("e7_ekfac")
    old = {}
    for step in STEPS:
        problem = checkpoint("mnist_autoencoder", step)
        methods = {"KFAC": fl.KFAC(), "EKFAC": fl.EKFAC()}
        if step == STALE:
            data = (problem.model, problem.likelihood, problem.data)
            old = {f"{name}(of step {STALE})": fl.estimate(m, *data) for name, m in methods.items()}
        study.compare(step, problem, methods | old, errors=["frobenius"])
    study.save()
    found = along("e7_ekfac")
    late = {step: comparison for step, comparison in found.items() if step >= STALE}
    study.table(["all layers", *(f"step {s}" for s in late)], values(late, "(all)", "frobenius"))
    study.draw(fl.plots.training(found, "frobenius", layers=["0", "4", "7", "(all)"]))


if __name__ == "__main__":
    main()
