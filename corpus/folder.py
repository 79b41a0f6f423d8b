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
import os
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from corpus.corpus import Corpus
from corpus.documents import note_shared
from corpus.text import file_sha256, read_blocks, token_dtype
from system.errors import first_line
from system.files import atomic_write
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer

SHARD_SIZE = 1 << 28  # tokens per file
DECODE_SIZE = 1 << 20  # tokens decoded at once
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


# --- writing


@dataclass
class EncodedChunk:
    """A cleaned chunk as token ids, with the statistics that are recorded."""

    ids: np.ndarray  # (tokens,)
    first: bool  # starts its document
    complete: bool  # is all of it
    split: str  # train or val
    n_chars: int
    n_bytes: int  # in UTF-8
    digest: bytes  # of the text: equal for duplicates
    example: str  # its first characters


class DatasetWriter:
    """Writes the token files of both splits, and counts what they contain."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.separator = tokenizer.specials[END_OF_TEXT]
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.files: dict[str, BinaryIO] = {}  # the last file of each split
        self.train_docs = array("q")  # where each document starts in the training ids
        # 8 bytes per document: to find validation documents in the training split
        self.digests = {"train": array("q"), "val": array("q")}
        keys = ("documents", "tokens", "characters", "bytes")
        self.counts = {split: dict.fromkeys(keys, 0) for split in ("train", "val")}

    def write(self, chunk: EncodedChunk) -> None:
        """Append a chunk to its split; the first chunk of a document follows a separator."""
        counts, ids = self.counts[chunk.split], chunk.ids
        if chunk.first:
            ids = np.concatenate([np.array([self.separator], dtype=self.dtype), ids])
            if chunk.split == "train":
                self.train_docs.append(counts["tokens"])
            self.digests[chunk.split].frombytes(chunk.digest[:8])
            counts["documents"] += 1
        self.append(chunk.split, ids)
        counts["characters"] += chunk.n_chars
        counts["bytes"] += chunk.n_bytes

    def append(self, split: str, ids: np.ndarray) -> None:
        """Append ids to a split, starting another file whenever one is full."""
        counts = self.counts[split]
        while len(ids):
            shard, n_written = divmod(counts["tokens"], SHARD_SIZE)
            if not n_written:
                if shard:
                    self.files[split].close()
                path = self.folder / (f"{split}_{shard:05d}.bin" if shard else f"{split}.bin")
                self.files[split] = open(path, "wb")  # noqa: SIM115 (`finish` closes it)
            fitting, ids = ids[: SHARD_SIZE - n_written], ids[SHARD_SIZE - n_written :]
            self.files[split].write(fitting.tobytes())
            counts["tokens"] += len(fitting)

    def finish(self) -> None:
        """Close the files, after making sure that the validation split is not empty. Raises
        UserError if there is no training text."""
        if not self.counts["train"]["tokens"]:
            raise UserError(
                "no training text remains: the sources are empty, or cleaning removed all"
            )
        self.files["train"].close()
        if not self.counts["val"]["tokens"]:
            self.move_to_validation()
        self.files["val"].close()
        np.save(self.folder / "train_docs.npy", np.array(self.train_docs, dtype=np.int64))

    def move_to_validation(self) -> None:
        """Move the last document to the validation split. If there is only one document, move its
        last tenth: only then is a document divided between the splits."""
        train, val = self.counts["train"], self.counts["val"]
        ids = map_token_files(token_files(self.folder, "train"), self.dtype)
        n_documents = int(train["documents"] > 1)
        start = self.train_docs.pop() if n_documents else len(ids) * 9 // 10
        moved = {"documents": n_documents, "characters": 0, "bytes": 0}
        for position in range(start, len(ids), DECODE_SIZE):
            tail = ids[position : position + DECODE_SIZE]
            self.append("val", tail)
            raw = self.tokenizer.decode_bytes(tail[tail != self.separator].tolist())
            moved["bytes"] += len(raw)
            # A character may be divided between tokens: count the bytes that start one.
            moved["characters"] += sum(byte & 0xC0 != 0x80 for byte in raw)
        del ids, tail  # Windows cannot truncate a file that is mapped
        self.truncate_train(start)
        for key, count in moved.items():
            train[key] -= count
            val[key] += count
        if n_documents:
            self.digests["val"].append(self.digests["train"].pop())
            print(f"few documents: the last one ({val['tokens']:,} tokens) is for validation")
        else:
            print("the corpus is one document: its last tenth is for validation")

    def n_shared(self) -> int:
        """The number of validation documents that are training documents too; long ones count if
        their first chunks are equal."""
        train, val = (np.array(self.digests[split]) for split in ("train", "val"))
        return int(np.isin(val, train).sum())

    def truncate_train(self, n_tokens: int) -> None:
        """Keep only the first n_tokens of the training files."""
        for shard, path in enumerate(token_files(self.folder, "train")):
            n_kept = min(max(n_tokens - shard * SHARD_SIZE, 0), SHARD_SIZE)
            if n_kept:
                os.truncate(path, n_kept * self.dtype.itemsize)
            else:
                path.unlink()
        self.counts["train"]["tokens"] = n_tokens
