"""What was measured: rows, costs and settings, their files and tables."""

from fisher_lab.results.budget import Stage as Stage
from fisher_lab.results.budget import StepBudget as StepBudget
from fisher_lab.results.comparison import Comparison as Comparison
from fisher_lab.results.comparison import load_comparison as load_comparison
from fisher_lab.results.comparison import load_unfinished as load_unfinished
from fisher_lab.results.recommendation import Choice as Choice
from fisher_lab.results.recommendation import Recommendation as Recommendation
from fisher_lab.results.rows import ALL as ALL
from fisher_lab.results.rows import Cost as Cost
from fisher_lab.results.rows import LayerAbout as LayerAbout
from fisher_lab.results.rows import Row as Row
from fisher_lab.results.rows import Settings as Settings
