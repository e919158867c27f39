"""What all tests share: reproducible property tests; helpers (peers, a browser) that never go
missing silently.
"""

import importlib
import importlib.util
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

# Read once, when numpy and torch are loaded, and by the processes that tests start: more threads
# only wait for each other over tensors this small, beside other workers (pytest -n) above all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn, never shown

import hypothesis
import numpy
import pytest
import torch

hypothesis.settings.register_profile("fisher_lab", derandomize=True, max_examples=20, deadline=None)
hypothesis.settings.load_profile("fisher_lab")

PEERS = ("curvlinops", "nngeometry", "backpack")
BROWSER_PROGRAMS = ("chromium", "chromedriver")


def required(what: str) -> bool:
    """Whether a missing helper (PEERS, BROWSER) is an error: in continuous integration, or when
    asked for.
    """
    values = [os.environ.get(name, "").lower() for name in ("CI", f"FISHER_LAB_REQUIRE_{what}")]
    return any(value in {"1", "true", "yes"} for value in values)


def missing_peers() -> list[str]:
    """Names of the peer libraries that cannot be found, without importing those that can."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def import_peers() -> SimpleNamespace:
    """Import the peer libraries; only here may they warn (they still compile with torch.jit, which
    is deprecated).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return SimpleNamespace(**{name: importlib.import_module(name) for name in PEERS})


def missing_browser() -> list[str]:
    """Names of what a browser test needs and this machine does not have."""
    missing = [name for name in BROWSER_PROGRAMS if shutil.which(name) is None]
    return missing + ["selenium"] * (importlib.util.find_spec("selenium") is None)


def missing_lightning() -> list[str]:
    """Lightning, if it cannot be found."""
    return [] if importlib.util.find_spec("lightning") else ["lightning"]


def missing_transformers() -> list[str]:
    """Transformers and peft, as far as they cannot be found."""
    return [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]


NEEDS = {
    "transformers": (missing_transformers, "pip install -c constraints.txt 'fisher-lab[dev]'"),
    "lightning": (missing_lightning, "pip install --no-deps -r requirements-peers.txt"),
    "peers": (missing_peers, "pip install --no-deps -r requirements-peers.txt"),
    "browser": (missing_browser, "apt-get install chromium chromium-driver; pip install selenium"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for the fixture `peers` is a peers test, marked or not."""
    for item in items:
        if "peers" in getattr(item, "fixturenames", ()):
            item.add_marker("peers")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose helper is missing, or fail it where the helper is required."""
    for marker, (find_missing, cure) in NEEDS.items():
        if item.get_closest_marker(marker) and (missing := find_missing()):
            message = f"{marker}: {', '.join(missing)} not found; {cure}"
            if required(marker.upper()):
                pytest.fail(message, pytrace=False)
            pytest.skip(message)
    if item.get_closest_marker("peers"):
        import_peers()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud what was not checked for want of a helper."""
    skipped = terminalreporter.stats.get("skipped", [])
    for marker, (_, cure) in NEEDS.items():
        # by what the tests said: with several workers this is all that they send
        count = sum(f"Skipped: {marker}: " in str(report.longrepr) for report in skipped)
        if count:
            line = f"NOT CHECKED: {count} tests need {marker}; {cure}"
            terminalreporter.write_sep("!", line, red=True, bold=True)


@pytest.fixture
def peers() -> SimpleNamespace:
    """The libraries to compare with, imported when a test asks for them: `peers.curvlinops` and so
    on.
    """
    return import_peers()


def global_state() -> dict[str, object]:
    """Everything global that a library must leave as it found it."""
    return {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state(legacy=False)),  # noqa: NPY002 the legacy state is the global one
        "python random state": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "number of threads": torch.get_num_threads(),
    }


@pytest.fixture
def restores_global_state() -> Iterator[None]:
    """Check that the test, and so what it called, changed nothing global: random states, default
    dtype, modes.
    """
    before = global_state()
    yield
    after = global_state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"the test changed the {', the '.join(changed)}"


@pytest.fixture(autouse=True)
def default_dtype_untouched() -> Iterator[None]:
    """A default dtype left behind would silently change the precision of every later test."""
    before = torch.get_default_dtype()
    yield
    after = torch.get_default_dtype()
    torch.set_default_dtype(before)
    assert after == before, f"the test left the default dtype at {after}"
