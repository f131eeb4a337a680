"""Files that are whole or not there: what every command of this project writes goes through here.

A file is written under a temporary name beside its place and renamed in the end. Only a regular
file is ever replaced. A symbolic link is followed: the file that it names is replaced, and the link
stays.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from agc.errors import FormatError

__all__ = [
    "check_source",
    "check_target",
    "named_files",
    "put",
    "replacing",
    "target_of",
    "write_text",
    "written",
]

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of writing, which name no file."""


@contextmanager
def named_files() -> Iterator[None]:
    """Report a file that cannot be opened, read or written as one of this project's errors."""
    try:
        yield
    except OSError as error:
        raise FormatError(str(error)) from None


def target_of(path: Path) -> Path:
    """Return the file that writing to a path replaces: itself, or what a symbolic link names."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def written(path: Path) -> str:
    """Name what was written: the path and, if it is a symbolic link, the file behind it."""
    return f"{target_of(path)}, which {path} links to" if path.is_symlink() else str(path)


def check_source(path: Path) -> None:
    """Raise if a file cannot be read again and again: a pipe, a device, a socket.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If it is none that can be read so.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = f"it is {_kind(mode)}, which cannot be read twice; save it as a regular file first"
        raise _refused(OSError, errno.ESPIPE, path, what)


def check_target(path: Path) -> None:
    """Raise unless a regular file can be written at this path, or behind the symbolic link there.

    Raises
    ------
    IsADirectoryError
        If a folder is there.
    FileExistsError
        If anything else that is not a regular file is there: a device, a pipe, a socket.
    FileNotFoundError
        If the folder that the file would be in does not exist.
    PermissionError
        If the file or its folder cannot be written to.
    OSError
        If symbolic links lead to each other in a circle.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    target = target_of(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise _refused(IsADirectoryError, errno.EISDIR, path, "name a file in it")
    if mode is not None and not stat.S_ISREG(mode):
        what = f"it is {_kind(mode)}, which is never replaced; name a regular file"
        raise _refused(FileExistsError, errno.EEXIST, path, what)
    if not target.parent.is_dir():
        raise _refused(FileNotFoundError, errno.ENOENT, path, "make its folder first")
    if mode is not None and not os.access(target, os.W_OK):
        raise _refused(PermissionError, errno.EACCES, path, "the file is write-protected")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        what = "choose a folder that can be written to"
        raise _refused(PermissionError, errno.EACCES, path, what)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes its place in the end, or leaves no trace.

    Whatever stands there stays until everything is written, and its permissions stay. A symbolic
    link is followed; other hard links to the file keep the old content.

    Raises
    ------
    OSError
        As :func:`check_target`, before anything is written and again before the file is replaced;
        or if writing fails; never in the temporary name.
    """
    check_target(path)
    target = target_of(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put(part, path)
    except OSError as error:
        if error.filename != str(part) and error.errno not in _FULL:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def put(part: Path, path: Path) -> None:
    """Rename a complete temporary file to its place, or to the place that a link there names."""
    check_target(path)
    target = target_of(path)
    if target.exists():
        part.chmod(stat.S_IMODE(target.stat().st_mode))
    part.replace(target)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raise OSError as :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def _refused(kind: type[OSError], number: int, path: Path, what: str) -> OSError:
    return kind(number, f"{os.strerror(number)}, {what}", str(path))


def _kind(mode: int) -> str:
    """Say what a file that is not regular is."""
    kinds = (
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((words for test, words in kinds if test(mode)), "not a regular file")
