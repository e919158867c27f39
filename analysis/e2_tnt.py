"""E2, Ren & Goldfarb (2021): cosine between damped steps of approximations and of the exact block,
along training.
"""

import fisher_lab as fl
from analysis.common import SMALL, Study, along, checkpoint, values

STEPS = (0, 10, 100, 500, 1000)
DAMPING = 0.1


def main() -> None:
    """Measure, save, draw."""
    study = Study("e2_tnt")
    methods = [fl.TN(), fl.KFAC(), fl.Shampoo(), fl.MiniBlock(), fl.Diagonal()]
    for step in STEPS:
        problem = checkpoint("martens_grosse", step, examples=500)
        study.compare(
            step, problem, methods, layers=SMALL, errors=["damped_cosine"], dampings=[DAMPING]
        )
    study.save()
    found = along("e2_tnt")
    study.table(
        ["all five layers", *(f"step {s}" for s in STEPS)],
        values(found, "(all)", "damped_cosine", DAMPING),
    )
    study.draw(fl.plots.training(found, "damped_cosine", damping=DAMPING))


if __name__ == "__main__":
    main()
