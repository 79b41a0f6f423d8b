"""The folders that an export writes: complete or not at all, and replacing only another export.

The last file of an export, MARKER, lists the others with their hashes. A folder is replaced only if
it has that file, and no file that is not listed.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import VERSION, UserError

MARKER = "tinyllm.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, an object. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, huge numbers
        raise UserError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object")
    return content


def sha256(path: Path) -> str:
    """The hash of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_marker(folder: Path) -> dict[str, str]:
    """The files that an export wrote to a folder, with their hashes."""
    files = read_json(folder / MARKER).get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise UserError(f"{folder / MARKER} is damaged")
    return files


def check_files(folder: Path, names: list[str], advice: str) -> None:
    """Raise UserError if an export wrote the folder and one of these files has changed since."""
    if not (folder / MARKER).exists():
        return
    known = read_marker(folder)
    for name in names:
        if name in known and sha256(folder / name) != known[name]:
            raise UserError(
                f"{folder / name} was changed or damaged after the export (its sha256 is not the "
                f"one in {MARKER}): {advice}"
            )


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless a folder can be written: it does not exist, or it may be replaced and
    contains nothing but an export."""
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise UserError(f"{folder} exists: add --overwrite or choose another path")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: choose another path")
    real, here, home = (Path(os.path.realpath(p)) for p in (folder, ".", os.path.expanduser("~")))
    if real in (here, home, *here.parents, *home.parents):
        raise UserError(f"{folder} contains your working or home folder: choose another path")
    if not (folder / MARKER).is_file():
        raise UserError(
            f"{folder}/ was not written by export.py (no {MARKER}): choose another path"
        )
    known = read_marker(folder)
    for path in sorted(folder.iterdir()):
        written = path.name == MARKER or path.name in known
        if not written or not path.is_file() or path.is_symlink():
            raise UserError(
                f"{folder}/ contains {path.name}, which export.py did not write: move it, or "
                "choose another path"
            )
    present = [name for name in known if (folder / name).exists()]
    check_files(folder, present, "choose another path, or move it")


def remove_export(folder: Path) -> None:
    """Delete the files that an export wrote, and the folder if nothing else is in it."""
    for name in (*read_marker(folder), MARKER):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def aside(folder: Path, kind: str) -> Path:
    """A new path next to a folder, for a temporary folder: NAME.1a2b3c4d.part or .old."""
    return folder.with_name(f"{folder.name[:50]}.{secrets.token_hex(4)}.{kind}")


def report_leftovers(folder: Path) -> None:
    """Print the temporary folders of exports to `folder` that were killed, or are still running."""
    pattern = re.compile(re.escape(folder.name[:50]) + r"\.[0-9a-f]{8}\.(old|part)")
    names = os.listdir(folder.parent) if folder.parent.is_dir() else []
    for name in filter(pattern.fullmatch, sorted(names)):
        what = "the folder before" if name.endswith(".old") else "a new folder of"
        print(
            f"note: {folder.parent / name}/ is {what} an interrupted export: rename or delete it",
            file=sys.stderr,
        )


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write files to. At the end it becomes `folder`; after an error it is
    deleted, and an old `folder` is unchanged.

    An old folder is moved aside, and deleted once the new one is in its place. A process killed in
    between leaves both, complete, next to where they belong; the next export reports them.
    """
    check_target(folder, overwrite)
    folder = Path(os.path.realpath(folder))  # a link stays a link
    tmp_path, old = aside(folder, "part"), aside(folder, "old")
    missing = [parent for parent in folder.parents if not os.path.lexists(parent)]
    try:
        tmp_path.mkdir(parents=True)
        yield tmp_path
        files = {path.name: sha256(path) for path in sorted(tmp_path.iterdir())}
        write_json(tmp_path / MARKER, {"tinyllm": VERSION, "files": files})
        for path in (*tmp_path.iterdir(), tmp_path):
            sync(path)
        check_target(folder, overwrite)  # again: files may have been added since
        try:
            if folder.exists():
                folder.rename(old)
            tmp_path.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        sync(folder.parent)
        if old.exists():
            with contextlib.suppress(OSError, UserError):
                remove_export(old)
        report_leftovers(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
        for parent in missing:  # those that were created for nothing
            with contextlib.suppress(OSError):
                parent.rmdir()


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on disk."""
    if os.name != "posix":
        return  # other systems cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
