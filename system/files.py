"""Files that are complete or not written at all, and locks of folders and files."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from system.settings import UserError, first_line


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` once it is complete and on disk.

    A process killed at any moment leaves either the old file or the new one. Raises UserError if
    the file cannot be written, for example on a full disk; the old file is kept.
    """
    tmp_path = part_path(path)
    try:
        with open(tmp_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(tmp_path, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if a write fails
        reason = getattr(error, "strerror", None) or first_line(error)
        with contextlib.suppress(OSError):
            if shutil.disk_usage(path.parent).free < 1 << 20:
                reason = "the disk is full"
        unchanged = "; the previous file is unchanged" if path.exists() else ""
        raise UserError(f"{path} could not be written ({reason}){unchanged}") from error
    finally:
        with contextlib.suppress(OSError):
            tmp_path.unlink()


def replace_file(source: Path, target: Path) -> None:
    """os.replace. Windows refuses it while another program, such as generate.py or a virus scanner,
    reads the target: wait for that, for up to ten seconds."""
    for _ in range(100 if sys.platform == "win32" else 0):
        with contextlib.suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(0.1)
    os.replace(source, target)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, with the keys of utils.CHECKPOINT_TYPES or more, atomically."""
    import torch  # slow to import

    with atomic_write(path) as file:
        torch.save(state, file)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically. (A hard link would be faster, but `cp` to one name changes both.)"""
    with open(source, "rb") as content, atomic_write(target) as file:
        shutil.copyfileobj(content, file)


def part_path(path: Path) -> Path:
    """Where the new content of a file is until it is complete."""
    return path.with_name(path.name + ".part")


def file_problems(path: Path, mark: bytes = b"") -> list[str]:
    """Why `atomic_write` cannot write a file; empty if it can. mark: what our files have in their
    first 1000 bytes; a file without it is not replaced."""
    try:
        if path.is_dir():
            return [f"{path} is a folder: give the name of a file"]
        if path.exists() and not path.is_file():  # /dev/null, which would be replaced by a file
            return [f"{path} is not a regular file"]
        if not path.parent.is_dir():
            return [f"there is no folder {path.parent}"]
        if mark and path.exists():
            with path.open("rb") as file:
                head = file.read(1000)
            if head and mark not in head:
                return [f"{path} is not an earlier output: choose another name"]
        in_use = part_path(path).exists()  # by another process
        part_path(path).open("ab").close()
        if not in_use:
            part_path(path).unlink()
    except OSError as error:
        return [f"{path} cannot be written: {error.strerror}"]
    return []


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
    process however that ends; the file PATH/lock remains and means nothing. A new folder to which
    nothing is written is deleted at the end. If there is a lock_dir, the file is in that folder,
    which is deleted too. It also works between machines that share a file system, if that supports
    locks (NFS 4, Lustre, SMB).
    """
    folder = lock_dir or path
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
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
        if lock_dir or (made and [file.name for file in folder.glob("*")] == ["lock"]):
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        for parent in (folder, *made[1:]):  # Windows' rmtree cannot delete the open file
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def locked_file(path: Path, what: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a file, which need not exist."""
    return locked(path, what, path.with_name(f".{path.name}.lock"))
