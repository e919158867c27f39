"""Files: names made from any text, and contents that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fisher_lab._ground.arguments import path_of

OWN = "expected a regular file of your own; remove it or choose another place"
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # 0 where the system has no such thing: Windows

# Characters of a name in ASCII: file systems take 255 bytes, an ending and a number come on top.
LONGEST = 100


# -- names -----------------------------------------------------------------------------------------
def file_names(wishes: Iterable[str]) -> list[str]:
    """Names of files, one for every wish, whoever wrote the wishes.

    A wish of ASCII letters, digits, "_", "-" and single "." is its own name. Everything else
    becomes "-", and a checksum of the whole wish is put behind it, so that wishes that differ keep
    names that differ.

    Args:
        wishes: what the files are to be called, without endings.

    Returns:
        Names without folders and without endings, no two alike, also where upper and lower case are
        the same.
    """
    names: list[str] = []
    taken: set[str] = set()
    for wish in wishes:
        name = _safe(wish)
        unique = name
        number = 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        names.append(unique)
    return names


def _safe(wish: str) -> str:
    """The wish in a safe alphabet; the same wish always gives the same name."""
    # A name that begins with a dot is hidden, one that begins with a hyphen is an option to other
    # programs.
    name = re.sub(r"[^A-Za-z0-9_.-]+|\.\.+", "-", wish).lstrip(".-")[:LONGEST]
    if name == wish and name:
        return name
    checksum = hashlib.sha256(wish.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name or 'unnamed'}-{checksum[:8]}"


def inside(folder: Path, name: str) -> Path:
    """The path of a file of that name in a folder.

    Raises:
        ValueError: if it would lie outside of the folder, also by way of a link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"Got file name {name!r}, expected one that lies in {str(folder)!r}; rename or remove "
            "it."
        )
    return path


class UnwrittenError(ValueError):
    """The system refused to write a file."""


# -- contents --------------------------------------------------------------------------------------
def check_output(path: str | Path, endings: tuple[str, ...] = (".json", ".csv")) -> Path:
    """The path, if a file with one of these endings can be written there.

    Nothing is created but missing folders.

    Raises:
        ValueError: for another ending or a place that cannot be written.
        TypeError: for what is no path.
    """
    path = path_of("path", path)
    if path.suffix not in endings:
        raise ValueError(
            f"Got output file {str(path)!r}, expected one ending in {' or '.join(endings)}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder of {str(path)!r} cannot be created ({error}), expected a writable place."
        ) from error
    try:
        # Only the attempt tells: read-only file systems and quotas do not show in the permissions.
        handle, temporary = _create_beside(path)
        os.close(handle)
        temporary.unlink()
        # a pipe or a device would be replaced by a file
        odd = path.exists() and not path.is_file()
        refused = odd or (path.exists() and not os.access(path, os.W_OK))
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be written ({error}), expected a writable file."
        ) from error
    if refused:
        raise ValueError(
            f"{str(path)!r} cannot be written, expected a writable file; choose another place."
        )
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write the whole content (text as UTF-8) or nothing; see `replacing`."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends.

    If it ends with an exception, the new file is gone and `path` is as it was.
    Whoever reads `path` meanwhile, or after a crash, finds the old file or the new one and never
    half of it. A link at `path` is replaced, not followed. The permissions are those of any new
    file (the umask).

    Args:
        path: where the file is to be; missing folders are made.

    Raises:
        UnwrittenError: where the system refuses: no room, no rights, a broken disk.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _create_beside(path)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # a KeyboardInterrupt too
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses, in a sentence."""
    try:
        yield
    except OSError as error:
        raise UnwrittenError(
            f"{path} could not be written ({error.strerror or error}), expected a place with room; "
            "what stood there is as it was, choose another place or free some."
        ) from error


def _create_beside(path: Path) -> tuple[int, Path]:
    """A new file in the folder of `path`, open for writing."""
    # Only from the same folder (or file system) can it be renamed to `path` in one step.
    # As tempfile.mkstemp, whose files only their owner may read whatever the umask says: nobody can
    # foresee the name, and O_EXCL refuses what exists already, a link included.
    flags = (
        os.O_CREAT
        | os.O_EXCL
        | os.O_WRONLY
        | getattr(os, "O_BINARY", 0)
        | getattr(os, "O_CLOEXEC", 0)
    )
    # The start of the old name tells whose file this was, should the machine stop meanwhile.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    return os.open(temporary, flags, 0o666), temporary


# -- files with names that anybody can foresee -----------------------------------------------------
class NotOwnFileError(ValueError):
    """A file with a foreseeable name is a link, no regular file, or somebody else's."""


def read_own(path: Path) -> bytes | None:
    """What a file holds that an interrupted run left under a fixed name; None if there is none.

    In a folder that others can write to, somebody else may have put something there first.

    Raises:
        NotOwnFileError: for a link, what is no regular file, or a file of another user.
        OSError: for a file that cannot be read.
    """
    # Without waiting: opening a pipe would last until somebody writes to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = _open_no_link(path, flags)
    except FileNotFoundError:
        return None
    try:
        # Of what was opened, not of what may stand under the name by now.
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise NotOwnFileError(f"{path} is no file, {OWN}.")
        if hasattr(os, "geteuid") and about.st_uid != os.geteuid():
            raise NotOwnFileError(f"{path} belongs to another user, {OWN}.")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, which is made if it is missing.

    Raises:
        NotOwnFileError: for a link.
        UnwrittenError: where the system refuses; the file is then as it was, or longer by a part of
            the text.
    """
    with _told(path):
        handle = _open_no_link(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))


def _open_no_link(path: Path, flags: int) -> int:
    """The number of an opened file, in bytes and not in text; a link is refused."""
    link = NotOwnFileError(f"{path} is a link, {OWN}.")
    if not NO_LINKS and path.is_symlink():
        raise link
    try:
        return os.open(path, flags | NO_LINKS | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        # Systems have several numbers for the refusal of a link.
        if path.is_symlink():
            raise link from error
        raise
