"""Likelihoods p(y | z) of a model output z, and torch's losses in their place."""

from fisher_lab.likelihoods.base import Likelihood as Likelihood
from fisher_lab.likelihoods.bernoulli import Bernoulli as Bernoulli
from fisher_lab.likelihoods.bernoulli import BernoulliProbability as BernoulliProbability
from fisher_lab.likelihoods.categorical import Categorical as Categorical
from fisher_lab.likelihoods.gaussian import Gaussian as Gaussian
from fisher_lab.likelihoods.gaussian import GaussianVariance as GaussianVariance
from fisher_lab.likelihoods.huber import Huber as Huber
from fisher_lab.likelihoods.losses import TorchLoss as TorchLoss
from fisher_lab.likelihoods.losses import as_likelihood as as_likelihood
from fisher_lab.likelihoods.poisson import Poisson as Poisson


def registry() -> dict[str, type[Likelihood]]:
    """Every likelihood known, by class name (`TorchLoss` wraps the others and is left out)."""
    return {name: cls for name, cls in Likelihood._registry.items() if cls is not TorchLoss}
