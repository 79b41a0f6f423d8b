"""The folder of a data set: its files, their hashes, and whether they have them when it is opened.

The manifest has the hashes of the other files and its own. SHA-256 takes 0.7 s per GB here, so a
set of up to VERIFY_ALWAYS bytes is verified each time it is opened. A larger one is verified once,
and again when the size or time of a file changes: .verified.json beside its files remembers them;
if that cannot be written, the set is verified each time.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from corpus.files import READ_SIZE, file_sha256, token_files
from system.files import atomic_write
from system.settings import UserError

VERIFY_ALWAYS = 1 << 30  # bytes
HASHED = ("tokenizer.json", "train_docs.npy")  # besides the token files
VERIFIED = ".verified.json"
FILES = r"(train|val)(_\d{5,})?\.bin|train_docs\.npy|(tokenizer|manifest|\.verified)\.json(\.part)?"


def checksum(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its checksum."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a data set whose other files are complete."""
    manifest["files"] = {name: file_sha256(folder / name) for name in HASHED}
    manifest["checksum"] = checksum(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set. Raises ValueError if it is damaged. (Those of earlier versions
    have no checksum and no hashes but that of the token ids.)"""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    hashed = "checksum" in manifest or "files" in manifest
    if hashed and manifest["checksum"] != checksum(manifest):
        raise ValueError("manifest.json does not have its checksum")
    return manifest


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError unless the files of a data set have the hashes in its manifest and all ids
    are in the vocabulary."""
    paths = [*token_files(folder, "train"), *token_files(folder, "val")]
    stats = {path.name: path.stat() for path in (*paths, *(folder / name for name in HASHED))}
    state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    record = {"sha256": manifest["sha256"], "files": state}
    large = sum(stat.st_size for stat in stats.values()) > VERIFY_ALWAYS
    if large and read_verified(folder) == record:
        return
    for name, sha256 in manifest.get("files", {}).items():
        if file_sha256(folder / name) != sha256:
            raise ValueError(f"{name} does not have its hash")
    sha256, highest = hash_ids(paths, np.dtype(manifest["dtype"]))
    if sha256 != manifest["sha256"]:
        raise ValueError("the token ids do not have their hash")
    if highest >= manifest["vocab_size"]:
        raise ValueError(f"id {highest} in a vocabulary of {manifest['vocab_size']}")
    if large:
        with contextlib.suppress(UserError, OSError), atomic_write(folder / VERIFIED) as file:
            file.write(json.dumps(record).encode())


def read_verified(folder: Path) -> Any:
    """The record of the last verification; None if there is none."""
    try:
        return json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError):
        return None


def hash_ids(paths: list[Path], dtype: np.dtype) -> tuple[str, int]:
    """The SHA-256 of the concatenated token files, and the highest id."""
    digest, highest = hashlib.sha256(), 0
    total = sum(path.stat().st_size for path in paths)
    large = total > VERIFY_ALWAYS
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, leave=False,
              disable=None if large else True) as bar:  # fmt: skip
        for path in paths:
            with open(path, "rb") as file:
                while raw := file.read(READ_SIZE):
                    digest.update(raw)
                    highest = max(highest, int(np.frombuffer(raw, dtype).max()))
                    bar.update(len(raw))
    return digest.hexdigest(), highest


def foreign_files(folder: Path) -> list[str]:
    """The names in a folder that are not those of a data set's files."""
    return sorted(path.name for path in folder.iterdir() if not re.fullmatch(FILES, path.name))
