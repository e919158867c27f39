"""The version of this package, as it was installed: it is written in pyproject.toml alone."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fisher-lab")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0+unknown"
