"""compare(): the exact Fisher block of every layer against every approximation."""

from fisher_lab.diagnose.entry import compare as compare
from fisher_lab.diagnose.run import DifferentRunError as DifferentRunError
from fisher_lab.results.comparison import Comparison as Comparison
from fisher_lab.results.comparison import load_comparison as load_comparison
