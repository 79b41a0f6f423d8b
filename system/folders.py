"""Folders of runs: finding the newest, locking one, checking that it can be written to."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import filelock

from config import UserError


def folder_problems(folder: Path) -> list[str]:
    """Why files cannot be written to a folder, which need not exist yet; empty if they can."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            return []
    except OSError as error:
        return [f"cannot write to the folder {folder}: {error.strerror}"]


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder. Raises UserError, which names the holder, if another process holds
    it.

    The lock is the operating system's (flock, or msvcrt.locking on Windows), so it ends with its
    process however that ends; the file FOLDER/lock remains and means nothing. It also works between
    machines that share a file system, if that supports locks (NFS 4, Lustre, SMB).
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "lock.txt"
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with contextlib.suppress(OSError):
            what = holder.read_text(encoding="utf-8")
        raise UserError(f"{folder}/ is in use by {what}: wait, or use another folder") from None
    except (OSError, NotImplementedError) as error:
        print(f"warning: {folder}/ cannot be locked ({error}): use it for one run at a time")
    since = datetime.now().isoformat(" ", "seconds")
    text = f"{what}, process {os.getpid()} on {socket.gethostname()} since {since}"
    try:
        holder.write_text(text, encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def newest_checkpoint(out_dir: Path) -> Path:
    """best.pt, else latest.pt, of the most recently written run in out_dir or a folder in it."""
    names = ("best.pt", "latest.pt")
    files = [file for name in names for file in (*out_dir.glob(name), *out_dir.glob(f"*/{name}"))]
    if not files:
        raise UserError(f"there is no checkpoint in {out_dir}/: train one with `python train.py`")
    run_dir = max(files, key=lambda file: file.stat().st_mtime).parent
    return next(run_dir / name for name in names if (run_dir / name).exists())
