"""Approximations of a layer's Fisher block, one method a file."""

from fisher_lab.approximations.base import Approximation as Approximation
from fisher_lab.approximations.base import Iterated as Iterated
from fisher_lab.approximations.base import build as build
from fisher_lab.approximations.base import check_approximation as check_approximation
from fisher_lab.approximations.base import default_approximations as default_approximations
from fisher_lab.approximations.base import registry as registry
from fisher_lab.approximations.moments import Columns as Columns
from fisher_lab.approximations.moments import Means as Means
from fisher_lab.approximations.moments import Moments as Moments
from fisher_lab.approximations.moments import Rows as Rows

# the order here is the order in tables and figures
from fisher_lab.approximations.kfac import KFAC as KFAC  # isort: skip
from fisher_lab.approximations.ekfac import EKFAC as EKFAC  # isort: skip
from fisher_lab.approximations.tkfac import TKFAC as TKFAC  # isort: skip
from fisher_lab.approximations.tekfac import TEKFAC as TEKFAC  # isort: skip
from fisher_lab.approximations.corrected import Corrected as Corrected  # isort: skip
from fisher_lab.approximations.tn import TN as TN  # isort: skip
from fisher_lab.approximations.mini_block import MiniBlock as MiniBlock  # isort: skip
from fisher_lab.approximations.tengrad import TENGraD as TENGraD  # isort: skip
from fisher_lab.approximations.shampoo import Shampoo as Shampoo  # isort: skip
from fisher_lab.approximations.kpsvd import KPSVD as KPSVD  # isort: skip
from fisher_lab.approximations.diagonal import Diagonal as Diagonal  # isort: skip
from fisher_lab.approximations.lngd import LNGD as LNGD  # isort: skip
from fisher_lab.approximations.exact import Exact as Exact  # isort: skip
