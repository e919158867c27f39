"""Libraries that come with an extra of this package, imported where they are first used."""

import warnings
from importlib import import_module
from typing import Any


def require(module: str, package: str) -> Any:
    """Import a module of the extra `data`, or say in one sentence how to install it.

    Args:
        module: what is imported, for instance "sklearn.datasets".
        package: the distribution it belongs to, for instance "scikit-learn".

    Raises:
        ValueError: if it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            # another package's deprecations are not the user's concern here
            warnings.simplefilter("ignore")
            return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"Got no {package} ({error}), expected the libraries of the extra 'data'; "
            "run pip install 'fisher-lab[data]'."
        ) from None
