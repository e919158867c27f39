"""Training with any optimizer: the loop with metrics, checkpoints and exact resume; named problems;
a tuning grid.
"""

from fisher_lab.training.commands import grid as grid
from fisher_lab.training.commands import make_optimizer as make_optimizer
from fisher_lab.training.commands import optimizer_names as optimizer_names
from fisher_lab.training.commands import start as start
from fisher_lab.training.commands import train_command as train_command
from fisher_lab.training.commands import tune_command as tune_command
from fisher_lab.training.fitting import fit as fit
from fisher_lab.training.fitting import record_errors as record_errors
from fisher_lab.training.fitting import train_step as train_step
from fisher_lab.training.metrics import load_metrics as load_metrics
