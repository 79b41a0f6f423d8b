"""The folders that an export writes, which replace only another export.

The last file of an export, MARKER, lists the others with their hashes.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus.text import file_sha256
from system.files import file_problems
from system.folders import check_replaceable, replacing
from system.settings import VERSION, UserError, first_line, raise_problems

MARKER = "tinyllm.json"


def import_optional(module: str) -> Any:
    """A module of an optional package. Raises UserError if the package is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {package}: pip install {package}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, an object. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, huge numbers
        raise UserError(f"{path} is not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object")
    return content


def read_marker(folder: Path) -> dict[str, str]:
    """The files that an export wrote to a folder, with their hashes."""
    files = read_json(folder / MARKER).get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise UserError(f"{folder / MARKER} is damaged")
    return files


def check_files(folder: Path, names: list[str]) -> None:
    """Raise UserError if an export wrote the folder and one of these files has changed since."""
    known = read_marker(folder) if (folder / MARKER).exists() else {}
    for name in names:
        if name in known and file_sha256(folder / name) != known[name]:
            raise UserError(
                f"{folder / name} was changed or damaged after the export (its sha256 is not the "
                f"one in {MARKER}): delete {MARKER} if this is what you want to import"
            )


def is_exported(path: Path) -> bool:
    """Whether an export wrote this file, and nothing has changed it since."""
    return path.name == MARKER or file_sha256(path) == read_marker(path.parent).get(path.name)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless an export can be written to a folder."""
    check_replaceable(folder, "export.py", MARKER, overwrite, is_exported)


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write files to. At the end it becomes `folder`; after an error it is
    deleted, and an old `folder` is unchanged."""
    with replacing(folder, "export.py", lambda: check_target(folder, overwrite)) as new:
        yield new
        files = {path.name: file_sha256(path) for path in sorted(new.iterdir())}
        write_json(new / MARKER, {"tinyllm": VERSION, "files": files})


def check_file(path: Path, mark: bytes, overwrite: bool) -> None:
    """Raise UserError unless a file can be written: it does not exist, or it may be replaced and is
    an earlier export, which has this mark at its beginning."""
    raise_problems(file_problems(path, mark))
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: add --overwrite or choose another name")
