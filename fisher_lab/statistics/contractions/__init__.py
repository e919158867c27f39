"""Sums over examples, positions and directions as pure functions of LayerStats, each in the order
that costs least.

Symbols as in `layer_stats`: a `[N, T, Q, d_in]`, g `[R, N, T, Q, d_out]`, P = sum_t g a^T
`[R, N, Q, d_out, d_in]`. Every docstring names the naive form of its formula and the test that
holds both together.
"""

from fisher_lab.statistics.contractions.between_layers import Columns as Columns
from fisher_lab.statistics.contractions.between_layers import gram_products as gram_products
from fisher_lab.statistics.contractions.blocks import Basis as Basis
from fisher_lab.statistics.contractions.blocks import column_blocks as column_blocks
from fisher_lab.statistics.contractions.blocks import dense as dense
from fisher_lab.statistics.contractions.blocks import row_blocks as row_blocks
from fisher_lab.statistics.contractions.blocks import squares as squares
from fisher_lab.statistics.contractions.gram import example_grams as example_grams
from fisher_lab.statistics.contractions.gram import gram as gram
from fisher_lab.statistics.contractions.gram import gram_pays as gram_pays
from fisher_lab.statistics.contractions.gram import gram_pieces as gram_pieces
from fisher_lab.statistics.contractions.gram import outer_gram as outer_gram
from fisher_lab.statistics.contractions.gram import overlap as overlap
from fisher_lab.statistics.contractions.gram import route as route
from fisher_lab.statistics.contractions.gram import squared_gram as squared_gram
from fisher_lab.statistics.contractions.products import apply as apply
from fisher_lab.statistics.contractions.products import combine as combine
from fisher_lab.statistics.contractions.products import project as project
from fisher_lab.statistics.contractions.products import with_gradients as with_gradients
from fisher_lab.statistics.contractions.second_moments import (
    input_and_gradient_moments as input_and_gradient_moments,
)
from fisher_lab.statistics.contractions.second_moments import left as left
from fisher_lab.statistics.contractions.second_moments import modes as modes
from fisher_lab.statistics.contractions.second_moments import right as right
from fisher_lab.statistics.contractions.second_moments import second_moment as second_moment
from fisher_lab.statistics.contractions.second_moments import (
    uncorrelated_positions as uncorrelated_positions,
)
