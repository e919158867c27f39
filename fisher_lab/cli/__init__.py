"""Measure how far curvature approximations are from a network's exact Fisher; train with them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

from fisher_lab import problems as named_problems
from fisher_lab._ground.ranks import is_shared
from fisher_lab._ground.text import printable
from fisher_lab._ground.version import __version__
from fisher_lab.cli.measuring import compare, plot, recommend, report
from fisher_lab.cli.processes import joined
from fisher_lab.cli.training import train, tune

SIGNALS = ("SIGTERM", "SIGHUP")


def problems() -> None:
    """List the problems with their settings."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("problem", no_wrap=True)
    table.add_column("what it is")
    table.add_column("settings")
    for name, about in named_problems.describe().items():
        settings = []
        for key, value in about.settings.items():
            settings.append(f"{key}={value}")
        table.add_row(name, about.summary, ", ".join(settings))
    Console().print(table)
    print(
        "\nYour own: --problem package.module:function or path/file.py:function, returning "
        "(model, likelihood, data). That code is run."
    )


COMMANDS: dict[str, Any] = {
    "compare": compare,
    "recommend": recommend,
    "plot": plot,
    "report": report,
    "train": train,
    "tune": tune,
    "problems": problems,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `fisher-lab`; bad input ends with one sentence and exit code 2, an error of
    what it calls with a traceback.
    """
    given = arguments
    if given is None:
        given = sys.argv[1:]
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        with _ending_on(*SIGNALS), joined() as ranks:
            ranks.agreed(lambda: _run(given))
        sys.stdout.flush()  # what is still to be written fails here, not after the last handler
    except BrokenPipeError:
        _write_nowhere()
        raise SystemExit(141) from None  # as a shell's own programs end
    except (ValueError, TypeError) as error:
        # what another library or the user's own code raised is no sentence of ours: its place tells
        # more than its words
        if debug or not _is_ours(error):
            print(printable(traceback.format_exc()), file=sys.stderr)
            raise SystemExit(2 if _is_ours(error) else 1) from None
        if os.environ.get("RANK", "0") == "0" or not is_shared(error):
            print(f"fisher-lab: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised an error, and not what it calls."""
    trace = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).resolve().parent.parent
    return Path(trace[-1].filename).is_relative_to(here)


@contextmanager
def _ending_on(*names: str) -> Iterator[None]:
    """Signals end the program as an exception does, so that half-written files are removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {}
    # signals belong to the main thread; Windows has no SIGHUP
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            # nohup ignores it, and that stays
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: list[str]) -> None:
    """One command."""
    if arguments == ["--version"]:
        print(f"fisher-lab {__version__}")
        return
    about = (
        f"{__doc__}\n\n`fisher-lab --version` prints the version; --debug behind any command keeps "
        "the traceback of a mistake."
    )
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="fisher-lab",
        description=about,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _write_nowhere() -> None:
    """Whoever read the output has left, as `| head` does: the last write is not to fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
