"""LayerStats, the inputs and output gradients of one layer, and the sums over them that approximations are made of."""

from fisher_lab.statistics.layer_stats import LayerStats as LayerStats
from fisher_lab.statistics.layer_stats import joined as joined
