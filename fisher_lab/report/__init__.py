"""One self-contained HTML page about comparisons: the answer first, then figures and numbers."""

from fisher_lab.report.answers import Answer as Answer
from fisher_lab.report.answers import answers as answers
from fisher_lab.report.page import write_report as write_report
