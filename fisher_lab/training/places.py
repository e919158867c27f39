"""Where a run writes: checked before any work, and kept from every other run meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fisher_lab._ground.files import NotOwnFileError, check_output


@contextmanager
def alone(*paths: Path | None) -> Iterator[None]:
    """Be the only run that writes to these files until the block ends.

    Every file has a lock `.NAME.lock` beside it, which is gone afterwards; a run that is killed
    leaves it, but nothing is held by it.

    Args:
        paths: the files; None for one that is not written.

    Raises:
        ValueError: if another run holds one of them, or a place cannot be written.
    """
    with ExitStack() as stack:
        for path in paths:
            if path is not None:
                check_output(path, (path.suffix,))
                stack.enter_context(_held(path))
        yield


@contextmanager
def _held(path: Path) -> Iterator[None]:
    place = path.with_name(f".{path.name}.lock")
    if place.is_symlink():
        raise NotOwnFileError(
            f"{place} is a link, expected a lock of your own; remove it or choose another place."
        )
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another run writes to {path}, expected one at a time; wait until it has ended, or "
            "choose another file."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be locked ({error}), expected a writable place; choose another."
        ) from error
    try:
        yield
    finally:
        # While it is held: whoever takes the lock of a file that is gone notices and tries again.
        place.unlink(missing_ok=True)
        lock.release()
