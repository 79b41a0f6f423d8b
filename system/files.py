"""Files that are complete or not written at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from system.errors import first_line
from system.settings import UserError


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
        os.replace(tmp_path, path)
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


def part_path(path: Path) -> Path:
    """Where the new content of a file is until it is complete."""
    return path.with_name(path.name + ".part")


def file_problems(path: Path) -> list[str]:
    """Why `atomic_write` cannot write a file; empty if it can."""
    try:
        if path.is_dir():
            return [f"{path} is a folder: give the name of a file"]
        if path.exists() and not path.is_file():  # /dev/null, which would be replaced by a file
            return [f"{path} is not a regular file"]
        if not path.parent.is_dir():
            return [f"there is no folder {path.parent}"]
        in_use = part_path(path).exists()  # by another process
        part_path(path).open("ab").close()
        if not in_use:
            part_path(path).unlink()
    except OSError as error:
        return [f"{path} cannot be written: {error.strerror}"]
    return []
