"""Named problems on real data: offline, seeded, with settings.

`names()` and `describe()` list them, `load("martens_grosse", steps=100)` builds one,
`load("path/file.py:function")` a user's own. Importing this package imports torch only:
scikit-learn, mlxtend and scikit-image are imported when a problem that needs them is built.
"""

import importlib
import pkgutil

from fisher_lab.problems.loading import load
from fisher_lab.problems.registry import Description, Problem, describe, names, problem

# Every file of this package may register problems: adding one takes one file.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Description", "Problem", "describe", "load", "names", "problem"]
