"""fisher_lab: how far is each curvature approximation from the exact Fisher of a real net, and
training with it.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fisher_lab import errors as errors
from fisher_lab import optim as optim
from fisher_lab._ground.version import __version__ as __version__
from fisher_lab.approximations import EKFAC as EKFAC
from fisher_lab.approximations import KFAC as KFAC
from fisher_lab.approximations import KPSVD as KPSVD
from fisher_lab.approximations import LNGD as LNGD
from fisher_lab.approximations import TEKFAC as TEKFAC
from fisher_lab.approximations import TKFAC as TKFAC
from fisher_lab.approximations import TN as TN
from fisher_lab.approximations import Approximation as Approximation
from fisher_lab.approximations import Corrected as Corrected
from fisher_lab.approximations import Diagonal as Diagonal
from fisher_lab.approximations import Exact as Exact
from fisher_lab.approximations import MiniBlock as MiniBlock
from fisher_lab.approximations import Shampoo as Shampoo
from fisher_lab.approximations import TENGraD as TENGraD
from fisher_lab.approximations import default_approximations as default_approximations
from fisher_lab.diagnose import Comparison as Comparison
from fisher_lab.diagnose import budget as budget
from fisher_lab.diagnose import compare as compare
from fisher_lab.diagnose import load_comparison as load_comparison
from fisher_lab.estimation import estimate as estimate
from fisher_lab.estimation import exact_fisher as exact_fisher
from fisher_lab.likelihoods import Bernoulli as Bernoulli
from fisher_lab.likelihoods import Categorical as Categorical
from fisher_lab.likelihoods import Gaussian as Gaussian
from fisher_lab.likelihoods import Likelihood as Likelihood
from fisher_lab.matrices import FisherMatrix as FisherMatrix
from fisher_lab.optim import NaturalGradient as NaturalGradient
from fisher_lab.results import StepBudget as StepBudget
from fisher_lab.statistics import LayerStats as LayerStats
from fisher_lab.whole_network import NetworkFisher as NetworkFisher
from fisher_lab.whole_network import network as network

if TYPE_CHECKING:
    from fisher_lab import plots as plots
    from fisher_lab import problems as problems
    from fisher_lab import report as report
    from fisher_lab import training as training

# imported when first asked for: some load matplotlib or jinja2
LATE = ("plots", "problems", "report", "training")


def __getattr__(name: str) -> ModuleType:
    if name in LATE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
