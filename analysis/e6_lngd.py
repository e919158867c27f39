"""E6, Liu et al. (2024): a block of a small network beside its LNGD approximation."""

import fisher_lab as fl
from analysis.common import Study, checkpoint, load

LAYER = "2"


def main() -> None:
    """Measure, save, draw."""
    study = Study("e6_lngd")
    problem = checkpoint("martens_grosse", 500, widths=(20, 20, 20), examples=500)
    methods = [fl.LNGD(), fl.TKFAC(), fl.KFAC(), fl.MiniBlock(), fl.Diagonal()]
    study.compare("500", problem, methods, layers=["2", "4", "6"])
    study.save()
    found = load("e6_lngd")["500"]
    head = ["Frobenius error", *(f"layer {name}" for name in found.layers)]
    study.table(
        head,
        [
            [label, *(found.value(n, label, "frobenius") for n in found.layers)]
            for label in found.approximations
        ],
    )
    data = (problem.model, problem.likelihood, problem.data)
    exact = fl.exact_fisher(*data, layers=[LAYER])[LAYER]
    others = {m.label: fl.estimate(m, *data, layers=[LAYER])[LAYER] for m in methods[:2]}
    study.draw(fl.plots.blocks(exact, others))


if __name__ == "__main__":
    main()
