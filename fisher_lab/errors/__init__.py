"""Error measures: how far an approximation is from the exact block, one function each."""

from fisher_lab.errors.damped import DAMPINGS as DAMPINGS
from fisher_lab.errors.damped import DampedPair as DampedPair
from fisher_lab.errors.damped import absolute_damping as absolute_damping
from fisher_lab.errors.measures import MEASURES as MEASURES
from fisher_lab.errors.measures import Measure as Measure
from fisher_lab.errors.measures import chosen as chosen
from fisher_lab.errors.measures import cosine as cosine
from fisher_lab.errors.measures import damped_cosine as damped_cosine
from fisher_lab.errors.measures import damped_efficiency as damped_efficiency
from fisher_lab.errors.measures import damped_spectral as damped_spectral
from fisher_lab.errors.measures import exact_value as exact_value
from fisher_lab.errors.measures import frobenius as frobenius
from fisher_lab.errors.measures import frobenius_rescaled as frobenius_rescaled
from fisher_lab.errors.measures import judging as judging
from fisher_lab.errors.measures import measure as measure
from fisher_lab.errors.measures import spectral as spectral
from fisher_lab.errors.measures import spectrum as spectrum
from fisher_lab.errors.measures import trace as trace
from fisher_lab.errors.measures import trace_ratio as trace_ratio
from fisher_lab.errors.pair import DENSE_DIM as DENSE_DIM
from fisher_lab.errors.pair import Pair as Pair
from fisher_lab.errors.pair import advance as advance
from fisher_lab.errors.pair import pairs as pairs
from fisher_lab.errors.quantities import Measured as Measured
from fisher_lab.errors.quantities import Quantities as Quantities
from fisher_lab.errors.quantities import Total as Total
