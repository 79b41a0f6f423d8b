"""Replace a folder by a new one, completely or not at all, and only what the program wrote."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from system.files import locked, replace_file
from system.settings import UserError


def check_replaceable(
    folder: Path, program: str, marker: str, overwrite: bool, is_own: Callable[[Path], bool]
) -> None:
    """Raise UserError unless a folder can be written: it does not exist or is empty, or it may be
    replaced and contains only files of the program: one called `marker`, and is_own for each."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: choose another name")
    real, here, home = (Path(os.path.realpath(p)) for p in (folder, ".", os.path.expanduser("~")))
    if real in (here, home, *here.parents, *home.parents):
        raise UserError(f"{folder} contains your working or home folder: choose another name")
    if not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise UserError(
            f"{folder}/ was not written by {program} (no {marker}): choose another name"
        )
    if not overwrite:
        raise UserError(f"{folder} exists: add --overwrite or choose another name")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or not is_own(path):
            raise UserError(
                f"{folder}/ contains {path.name}, which {program} did not write, or which was "
                "changed since: move it, or choose another name"
            )


@contextlib.contextmanager
def replacing(folder: Path, what: str, check: Callable[[], None]) -> Iterator[Path]:
    """A new folder to write files to. At the end it becomes `folder`; after an error it is deleted,
    and an old `folder` is unchanged. Until then it is in .NAME.part, beside `folder`.

    check() is called at the start and at the end: it raises UserError if `folder` must not be
    replaced, see `check_replaceable`. `what` names this process to another one that wants to
    replace the same folder. Raises UserError if files cannot be written.

    A process killed at any moment leaves the old folder or the new one, or the old one in
    .NAME.part, from which `restore_folder` returns it.
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
            try:
                if target.exists():
                    replace_file(target, old)
                replace_file(new, target)
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
        replace_file(old, target)


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on disk."""
    if os.name != "posix":
        return  # other systems cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
