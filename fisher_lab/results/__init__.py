"""What was measured: rows, costs and settings, their files and tables."""

from fisher_lab.results.comparison import ALL as ALL
from fisher_lab.results.comparison import Comparison as Comparison
from fisher_lab.results.comparison import Cost as Cost
from fisher_lab.results.comparison import Row as Row
from fisher_lab.results.comparison import load_comparison as load_comparison
