"""E4, Soori et al. (2022): inverse blocks of a small convolutional network, exact, by TENGraD and
by KFAC.
"""

import fisher_lab as fl
from analysis.common import Study, along, checkpoint, values

STEPS = (0, 50, 300)
DAMPING = 0.1
LAYER = "0"


def main() -> None:
    """Measure, save, draw."""
    study = Study("e4_tengrad")
    methods = [
        fl.TENGraD(batch=32),
        fl.TENGraD(batch=128),
        fl.KFAC(),
        fl.KFAC(spatial="reduce"),
        fl.EKFAC(),
    ]
    for step in STEPS:
        problem = checkpoint("mnist_cnn", step)
        errors = ["frobenius", "damped_spectral", "damped_cosine"]
        study.compare(step, problem, methods, errors=errors, dampings=[DAMPING], layers=[LAYER])
    study.save()
    found = along("e4_tengrad")
    head = [f"inverse block of layer {LAYER}, spectral error", *(f"step {s}" for s in STEPS)]
    study.table(head, values(found, LAYER, "damped_spectral", DAMPING))
    study.draw(fl.plots.training(found, "damped_spectral", damping=DAMPING))
    options = {"layers": [LAYER]}
    data = (problem.model, problem.likelihood, problem.data)
    exact = fl.estimate(fl.Exact(), *data, **options)[LAYER]
    others = {m.label: fl.estimate(m, *data, **options)[LAYER] for m in (methods[1], methods[2])}
    study.draw(fl.plots.blocks(exact, others, inverse_damping=DAMPING), "blocks")


if __name__ == "__main__":
    main()
