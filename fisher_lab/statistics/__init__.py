"""Statistics of a layer: its inputs and output gradients, formulas of them, and the sums that
several readers share.
"""

from fisher_lab.statistics.gathering import Gathered as Gathered
from fisher_lab.statistics.layer_stats import LayerStats as LayerStats
from fisher_lab.statistics.layer_stats import joined as joined
from fisher_lab.statistics.sums import Sums as Sums
from fisher_lab.statistics.sums import as_sums as as_sums
from fisher_lab.statistics.vocabulary import OutOfReachError as OutOfReachError
from fisher_lab.statistics.vocabulary import VocabularyStats as VocabularyStats
from fisher_lab.statistics.vocabulary import VocabularySums as VocabularySums
from fisher_lab.statistics.vocabulary import joined_vocabulary as joined_vocabulary
from fisher_lab.statistics.vocabulary import sums_over as sums_over
