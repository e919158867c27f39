"""compare(): the exact Fisher block of every layer against every approximation."""

from fisher_lab.diagnose.budget import budget as budget
from fisher_lab.diagnose.comparing import compare as compare
from fisher_lab.diagnose.resuming import DifferentRunError as DifferentRunError
from fisher_lab.results import Comparison as Comparison
from fisher_lab.results import load_comparison as load_comparison
