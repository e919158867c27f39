"""What may come of a call: a right result, or one sentence of the library's own."""

from __future__ import annotations

import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fisher_lab

PACKAGE = str(Path(fisher_lab.__file__).parent)
SECONDS = 10.0
# documented where they are raised
KINDS = (ValueError, TypeError, KeyError)


class TooLongError(BaseException):
    """A call that does not end: no Exception, so that nobody takes it for his own."""


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Stop what takes longer."""

    def stop(*_: object) -> None:
        raise TooLongError

    # of the processor: other processes are not the library's
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def verdict(call: Callable[[], Any]) -> str | None:
    """What is wrong with the outcome of a call, None for nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited():
                result = call()
                str(result)
        except TooLongError:
            return "it does not end"
        except Exception as error:
            return fault(error)
    return None


def fault(error: BaseException) -> str | None:
    """What is wrong with an exception, None for a sentence of our own."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    for frame in reversed(frames):
        if frame.filename.startswith(PACKAGE):
            place = f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}, {place}"
            break
    # what the caller's own model says about its inputs, while it is trained, is not translated
    own_model = any(frame.name == "forward" and "/torch/" in frame.filename for frame in frames)
    if own_model and any(frame.name == "train_step" for frame in frames):
        return None
    # nor what a function of the caller's does
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    called = (ours[-1].line or "") if ours else ""
    if "closure()" in called or called == "return output(found)":
        return None
    told = f"{type(error).__name__} at {place}: {error}"[:300]
    if not isinstance(error, KINDS) or isinstance(error, UnicodeError):
        return f"raw {told}"
    if not last.filename.startswith(PACKAGE) or not (last.line or "").startswith("raise"):
        return f"raw {told}"
    text = str(error.args[0]) if error.args else ""
    if not is_sentence(text):
        return f"no sentence: {told}"
    return None


def is_sentence(text: str) -> bool:
    """Whether a message is one sentence that ends, without an address of memory."""
    return bool(re.search(r"[.!?\"')]$", text.strip())) and " " in text and len(text) < 3000
