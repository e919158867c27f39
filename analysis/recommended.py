"""The recommended study: every approximation, five hidden tanh layers, along training; with the
theorems checked.
"""

import fisher_lab as fl
from analysis.common import SMALL, Study, along, checkpoint, numbers, values

STEPS = (0, 10, 100, 1000, 4000)
DAMPING = 0.1
# (smaller, larger): Frobenius errors whose order is a theorem
ORDERS = [
    ("EKFAC", "KFAC"),
    ("TEKFAC", "TKFAC"),
    ("KPSVD", "KFAC"),
    ("KPSVD", "TKFAC"),
    ("KPSVD", "LNGD"),
    ("KPSVD", "Shampoo"),
    ("MiniBlock", "LNGD"),
    ("MiniBlock", "Diagonal"),
]
TRACE_KEPT = ("TKFAC", "EKFAC", "TEKFAC", "TN", "MiniBlock", "Shampoo", "Diagonal", "LNGD")


def main() -> None:
    """Measure, save, draw."""
    study = Study("recommended")
    broken = checks = 0
    for step in STEPS:
        problem = checkpoint("martens_grosse", step, examples=500)
        names = ["trace", "frobenius", "spectral", "cosine"]
        found = study.compare(
            step, problem, errors=[*names, "damped_efficiency"], dampings=[DAMPING], layers=SMALL
        )
        for layer in found.layers:
            for small, large in ORDERS:
                a, b = (found.value(layer, label, "frobenius") for label in (small, large))
                broken, checks = broken + (a > b * (1 + 1e-9)), checks + 1
            for label in TRACE_KEPT:
                broken, checks = (
                    broken + (abs(found.value(layer, label, "trace")) > 1e-9),
                    checks + 1,
                )
    study.numbers = {"theorems checked": checks, "broken": broken}
    study.save()
    found = along("recommended")
    head = ["layer 6", *(f"step {s}" for s in STEPS)]
    rows = [[f"{r[0]}", *r[1:]] for r in values(found, "6", "frobenius")]
    study.table(["Frobenius, " + head[0], *head[1:]], rows)
    efficiency = values(found, "6", "damped_efficiency", DAMPING)
    study.table(["efficiency, " + head[0], *head[1:]], efficiency, "efficiency")
    study.draw(fl.plots.training(found, "frobenius"))
    study.draw(fl.plots.training(found, "damped_efficiency", damping=DAMPING), "efficiency")
    print(numbers("recommended"))


if __name__ == "__main__":
    main()
