"""Figures of results: every function takes results, returns a matplotlib Figure, measures
nothing.
"""

from fisher_lab.plots.bars import errors as errors
from fisher_lab.plots.cost import cost as cost
from fisher_lab.plots.heatmap import heatmap as heatmap
from fisher_lab.plots.matrices import blocks as blocks
from fisher_lab.plots.matrices import spectrum as spectrum
from fisher_lab.plots.output import figures as figures
from fisher_lab.plots.output import save as save
from fisher_lab.plots.output import svg as svg
from fisher_lab.plots.sweeps import damping as damping
from fisher_lab.plots.sweeps import training as training
from fisher_lab.plots.traces import traces as traces
from fisher_lab.plots.waterfall import waterfall as waterfall
