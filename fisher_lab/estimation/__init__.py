"""Approximations and exact blocks of every layer from data."""

from fisher_lab.estimation.exact import exact_fisher as exact_fisher
from fisher_lab.estimation.running import Running as Running
from fisher_lab.estimation.running import estimate as estimate
from fisher_lab.estimation.running import estimated as estimated
