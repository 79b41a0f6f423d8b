"""Folders: whether they can be written to, locks, atomic replacement, the newest run."""

import contextlib
import ctypes
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import filelock

from system.settings import UserError


def folder_problems(folder: Path) -> list[str]:
    """Why files cannot be written to a folder, which need not exist yet; empty if they can."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            return []
    except OSError as error:
        return [f"cannot write to the folder {folder}: {error.strerror}"]


class SystemLock(filelock.FileLock):  # type: ignore[misc,valid-type]  # depends on the system
    """A lock of the operating system, or none. Instead of one, new versions of filelock take the
    existence of the file for a lock, and the file remains after each run."""

    def _fallback_to_soft_lock(self) -> None:
        raise NotImplementedError("the file system has no locks")


@contextlib.contextmanager
def locked(path: Path, what: str, lock_dir: Path | None = None) -> Iterator[None]:
    """Hold the lock of a folder or file. Raises UserError, which names the holder, if another
    process holds it.

    The lock is the operating system's (flock, or msvcrt.locking on Windows), so it ends with its
    process however that ends; the file PATH/lock remains and means nothing. If there is a lock_dir,
    the file is in that folder, which is deleted at the end. It also works between machines that
    share a file system, if that supports locks (NFS 4, Lustre, SMB).
    """
    folder = lock_dir or path
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "lock.txt"
    lock = SystemLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with contextlib.suppress(OSError):
            what = holder.read_text(encoding="utf-8")
        raise UserError(f"{path} is in use by {what}: wait, or use another name") from None
    except (OSError, NotImplementedError) as error:
        print(f"warning: {path} cannot be locked ({error}): use it for one run at a time")
    since = datetime.now().isoformat(" ", "seconds")
    text = f"{what}, process {os.getpid()} on {socket.gethostname()} since {since}"
    try:
        with contextlib.suppress(OSError):  # a full disk is reported where it loses something
            holder.write_text(text, encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        if lock_dir:
            shutil.rmtree(lock_dir, ignore_errors=True)
        lock.release()
        if lock_dir and sys.platform == "win32":  # where rmtree cannot delete the open file
            with contextlib.suppress(OSError):
                lock_dir.rmdir()


def locked_file(path: Path, what: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a file, which need not exist."""
    return locked(path, what, path.with_name(f".{path.name}.lock"))


# --- replacing a folder by a new one


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
    work = work_folder(target)
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


def work_folder(folder: Path) -> Path:
    """The folder in which another one is made."""
    return folder.parent / f".{folder.name}.part"


def restore_folder(folder: Path) -> None:
    """Return the folder that an interrupted replacement has moved away."""
    target = Path(os.path.realpath(folder))
    old = work_folder(target) / "old"
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


# --- runs
