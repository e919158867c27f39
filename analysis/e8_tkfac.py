"""E8, Gao et al. (2020): is TKFAC's error smaller than KFAC's?"""

import fisher_lab as fl
from analysis.common import Study, along, checkpoint, numbers, values

STEPS = (0, 10, 100, 500, 1000)


def main() -> None:
    """Measure, save, draw."""
    study = Study("e8_tkfac")
    methods = [fl.KFAC(), fl.TKFAC(), fl.KPSVD()]
    ratios = []
    for step in STEPS:
        problem = checkpoint("martens_grosse", step, examples=500)
        found = study.compare(step, problem, methods, errors=["frobenius", "trace"])
        ratios += [
            found.value(n, "TKFAC", "frobenius") / found.value(n, "KFAC", "frobenius")
            for n in found.layers
        ]
    study.numbers = {
        "TKFAC smaller": sum(r < 1 for r in ratios),
        "of": len(ratios),
        "smallest ratio": min(ratios),
    }
    study.numbers["largest ratio"] = max(ratios)
    study.save()
    found = along("e8_tkfac")
    rows = [
        [f"{row[0]} {error}", *row[1:]]
        for error in ("frobenius", "trace")
        for row in values(found, "(all)", error)
    ]
    rows.append(
        [
            f"layers where TKFAC is nearer: {numbers('e8_tkfac')['TKFAC smaller']} of "
            f"{len(ratios)}",
            *[""] * len(STEPS),
        ]
    )
    study.table(["all layers", *(f"step {s}" for s in STEPS)], rows)
    study.draw(fl.plots.training(found, "frobenius"))


if __name__ == "__main__":
    main()
