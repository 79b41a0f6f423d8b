"""The folder of a data set: its files, their hashes, and whether they have them when it is opened.

The manifest has the hashes of the other files and its own. SHA-256 takes 0.7 s per GB here, so a
set of up to VERIFY_ALWAYS bytes is verified each time it is opened. A larger one is verified once,
and again when the size or time of a file changes: .verified.json beside its files remembers them;
if that cannot be written, the set is verified each time.
"""

import contextlib
import hashlib
import json
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from corpus.corpus import Corpus
from corpus.documents import note_shared
from corpus.text import file_sha256, read_blocks
from system.errors import first_line
from system.files import atomic_write
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer

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
    if devices := [path for path in folder.iterdir() if not (path.is_file() or path.is_dir())]:
        raise ValueError(f"{devices[0].name} is not a file")  # reading one may never end
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
    with contextlib.suppress(OSError, ValueError):  # there is no record, or it is damaged
        if large and json.loads((folder / VERIFIED).read_bytes()) == record:
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


def hash_ids(paths: list[Path], dtype: np.dtype) -> tuple[str, int]:
    """The SHA-256 of the concatenated token files, and the highest id."""
    digest, highest = hashlib.sha256(), 0
    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, desc="verifying", unit="B", unit_scale=True, leave=False, disable=None, delay=1
    ) as bar:
        for path in paths:
            for raw in read_blocks(path):
                digest.update(raw)
                highest = max(highest, int(np.frombuffer(raw, dtype).max()))
                bar.update(len(raw))
    return digest.hexdigest(), highest


def is_dataset_file(path: Path) -> bool:
    """Whether a file has a name that prepare.py gives."""
    return re.fullmatch(FILES, path.name) is not None


# --- token ids on disk


def token_files(folder: Path, split: str) -> list[Path]:
    """The token files of a split, in order: train.bin, train_00001.bin and so on."""
    return [folder / f"{split}.bin", *sorted(folder.glob(f"{split}_*.bin"))]


class Shards:
    """Several 1-D arrays that are indexed as if they were concatenated.

    >>> shards = Shards([np.array([0, 1, 2]), np.array([3, 4])])
    >>> len(shards), shards[np.array([4, 0])].tolist(), shards[1:4].tolist()
    (5, [4, 0], [1, 2, 3])
    """

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.dtype = arrays, arrays[0].dtype
        # (shards + 1,): where each array starts, and the total length
        self.offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        if isinstance(index, slice):  # with step 1
            start, stop, _ = index.indices(len(self))
            return np.concatenate(
                [
                    array[max(start - offset, 0) : max(stop - offset, 0)]
                    for array, offset in zip(self.arrays, self.offsets, strict=False)
                ]
            )
        shard = np.searchsorted(self.offsets, index, side="right") - 1
        values = np.empty(index.shape, self.dtype)
        for i in np.unique(shard):
            mask = shard == i
            values[mask] = self.arrays[i][index[mask] - self.offsets[i]]
        return values


def map_token_files(paths: list[Path], dtype: np.dtype | str) -> "np.ndarray | Shards":
    """The concatenated ids of token files, through memory maps: data is read when it is indexed."""
    arrays = []
    for path in paths:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(memory, "madvise"):
            # Reading ahead makes windows at random positions 50 times slower.
            memory.madvise(mmap.MADV_RANDOM)
        arrays.append(np.frombuffer(memory, dtype))
    return arrays[0] if len(arrays) == 1 else Shards(arrays)


def open_dataset(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, Corpus]:
    """Open a data set made by prepare.py, through memory maps. Raises UserError if it is damaged,
    see `verify`, or if its tokenizer differs from `tokenizer`."""
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest)
        tokenizer_dict = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        own_tokenizer = tokenizers.from_dict(tokenizer_dict)
        splits = [manifest["splits"][split] for split in ("train", "val")]
        train_ids, val_ids = (
            map_token_files(token_files(folder, split), manifest["dtype"])
            for split in ("train", "val")
        )
        info = {
            "name": manifest["name"],
            "sha256": manifest["sha256"],
            "bytes": sum(source["bytes"] for source in manifest["sources"]),
            "documents": sum(split["documents"] for split in splits),
        }
        train_bytes, val_bytes = (split["bytes"] for split in splits)
        train_docs = np.load(folder / "train_docs.npy", mmap_mode="r")
        separator = own_tokenizer.specials[END_OF_TEXT] if info["documents"] > 1 else None
        note_shared(manifest.get("shared_documents", 0), splits[1]["documents"])
    except MemoryError:
        raise
    except Exception as error:  # damage raises errors of many types
        raise UserError(
            f"{folder}/ is not a data set made by prepare.py, or is damaged "
            f"({first_line(error)[:200]}): run "
            "`python prepare.py FILE ... --name NAME`, then give --data data/NAME"
        ) from None
    if tokenizer is not None and tokenizer.to_dict() != tokenizer_dict:
        raise UserError(
            f"{folder}/ was made with another tokenizer than the checkpoint's: make it with "
            "`python prepare.py FILE ... --name NAME --tokenizer CHECKPOINT`"
        )
    corpus = Corpus(train_ids, val_ids, info, train_bytes, val_bytes, train_docs, separator)
    return own_tokenizer, corpus
