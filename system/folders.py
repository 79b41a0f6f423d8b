"""Replace a folder by a new one, completely or not at all."""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from system.files import locked
from system.settings import UserError


@contextlib.contextmanager
def replacing(folder: Path, what: str, check: Callable[[], None]) -> Iterator[Path]:
    """A new folder to write files to. At the end it becomes `folder`; after an error it is deleted,
    and an old `folder` is unchanged. Until then it is in .NAME.part, beside `folder`.

    check() is called at the start and at the end, and raises UserError if `folder` must not be
    replaced. `what` names this process to another one that wants to replace the same folder. Raises
    UserError if files cannot be written.

    Where folders can be exchanged (Linux, macOS), a process killed at any moment leaves the old
    folder or the new one. Elsewhere the old one can remain in .NAME.part, from which
    `restore_folder` returns it.
    """
    target = Path(os.path.realpath(folder))  # a link stays a link
    work = target.parent / f".{target.name}.part"
    new, old = work / "new", work / "old"
    missing = [parent for parent in target.parents if not os.path.lexists(parent)]
    try:
        with locked(folder, what, work):
            restore_folder(folder)
            check()
            for path in (new, old):  # a killed process may have left them
                shutil.rmtree(path, ignore_errors=True)
            new.mkdir()
            yield new
            for path in (*new.iterdir(), new):
                sync(path)
            check()
            if not target.exists():
                new.rename(target)
            elif not exchange(new, target):
                target.rename(old)
                try:
                    new.rename(target)
                finally:
                    restore_folder(folder)
            sync(target.parent)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        for parent in missing:  # those that were created for nothing
            with contextlib.suppress(OSError):
                parent.rmdir()


def restore_folder(folder: Path) -> None:
    """Return the folder that an interrupted replacement has moved away."""
    target = Path(os.path.realpath(folder))
    old = target.parent / f".{target.name}.part" / "old"
    if old.exists() and not target.exists():
        old.rename(target)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one atomic operation. Returns whether the system can."""
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0
        here = -100  # AT_FDCWD: relative paths start at the current folder
        return libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2) == 0
    except (OSError, TypeError, AttributeError):
        return False


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on disk."""
    if os.name != "posix":
        return  # other systems cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
