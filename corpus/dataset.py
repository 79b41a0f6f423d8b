"""Making a data set: the sources are read, cleaned, tokenized and written in one stream.

A SourceReader yields batches of chunks; worker processes clean and encode them; the DatasetWriter
writes the ids in the order in which they were read, so the result does not depend on the number of
workers. `open_dataset` in folder.py reads what is written here.
"""

import functools
import hashlib
import json
import os
import platform
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken

import tokenizer as tokenizers
from config import ENCODINGS, TOKENIZERS
from corpus.bpe import count_pieces, from_tiktoken, train_bpe
from corpus.clean import Chunk, CleanConfig, RemovalStats, clean_batch, new_stats
from corpus.folder import map_token_files, token_files, write_manifest
from corpus.sources import DatasetConfig, SourceReader, parallel_map
from corpus.text import file_sha256, token_dtype
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer
from utils import matching_contents, read_checkpoint

SAMPLE_SIZE = 1 << 27  # bytes: a BPE vocabulary is learned from a sample of about this size
SHARD_SIZE = 1 << 28  # tokens per file
DECODE_SIZE = 1 << 20  # tokens decoded at once
MIN_PARALLEL = 1 << 24  # bytes: smaller sources take less time than starting worker processes


# --- the tokenizer


def characters(texts: Iterable[str]) -> set[str]:
    """The characters in texts."""
    return set().union(*texts)


def find_in_batch(
    find: Callable[[Iterable[str]], Iterable[str]], cleaning: CleanConfig, batch: list[Chunk]
) -> Iterable[str]:
    """What `find` finds in the cleaned texts of a batch."""
    return find(chunk.text for chunk in clean_batch(batch, cleaning, new_stats()))


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises UserError if it cannot separate documents."""
    state = read_checkpoint(path)
    with matching_contents(path):
        tokenizer = tokenizers.from_dict(state["tokenizer"])
    if END_OF_TEXT not in tokenizer.specials:
        raise UserError(
            f"the tokenizer of {path} has no {END_OF_TEXT}, with which documents of a data set "
            "begin: give another --tokenizer"
        )
    return tokenizer


def learn_tokenizer(
    config: DatasetConfig, cleaning: CleanConfig, reader: SourceReader, workers: int
) -> Tokenizer:
    """The tokenizer of the data set: one of tiktoken's, that of a checkpoint, the characters of all
    documents, or byte pairs learned from the training documents (from a sample if the sources are
    large)."""
    if config.tokenizer in ENCODINGS:
        return from_tiktoken(config.tokenizer)
    if config.tokenizer not in TOKENIZERS:
        return checkpoint_tokenizer(Path(config.tokenizer))
    bpe = config.tokenizer == "bpe"
    share = SAMPLE_SIZE / max(reader.n_bytes, 1) if bpe else 1.0
    batches = (
        [chunk for chunk in batch if chunk.split == "train" or not bpe]
        for batch in reader.batches("learning the vocabulary", share)
    )
    find = functools.partial(find_in_batch, count_pieces if bpe else characters, cleaning)
    counts: Counter[str] = Counter()
    for found in parallel_map(find, batches, workers):
        counts.update(found)
    if not counts:
        raise UserError(
            "no text remains to learn the vocabulary from: the sources are empty, cleaning removed "
            "all, or all documents are in the validation split (then try another --seed)"
        )
    if bpe:
        return train_bpe(counts, config.bpe_vocab_size)
    return tokenizers.CharTokenizer(sorted(counts), (END_OF_TEXT,))


# --- text to tokens


@functools.lru_cache(maxsize=1)
def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, read once per process."""
    return tokenizers.from_dict(json.loads(path.read_text(encoding="utf-8")))


def encode_batch(
    cleaning: CleanConfig, tokenizer_path: Path, batch: list[Chunk]
) -> tuple[list[tuple[Chunk, np.ndarray]], dict[str, RemovalStats]]:
    """Clean a batch, and encode what remains: chunks with their ids (tokens,). Also returns what
    cleaning removed."""
    tokenizer = read_tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    removed = new_stats()
    cleaned = clean_batch(batch, cleaning, removed)
    return [(chunk, tokenizer.encode(chunk.text).astype(dtype)) for chunk in cleaned], removed


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

    def write(self, chunk: Chunk, ids: np.ndarray, digest: bytes) -> None:
        """Append the ids of a chunk (tokens,) to its split; the first chunk of a document follows a
        separator. digest: of the chunk's text."""
        counts = self.counts[chunk.split]
        if chunk.first:
            ids = np.concatenate([np.array([self.separator], dtype=self.dtype), ids])
            if chunk.split == "train":
                self.train_docs.append(counts["tokens"])
            self.digests[chunk.split].frombytes(digest[:8])
            counts["documents"] += 1
        self.append(chunk.split, ids)
        counts["characters"] += len(chunk.text)
        counts["bytes"] += len(chunk.text.encode())

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


def write_tokens(
    writer: DatasetWriter, cleaning: CleanConfig, reader: SourceReader, workers: int
) -> dict[str, RemovalStats]:
    """Clean, encode and write all sources. Returns what was removed."""
    read_tokenizer.cache_clear()  # an earlier data set in this process had the same path
    encode = functools.partial(encode_batch, cleaning, writer.folder / "tokenizer.json")
    removed = new_stats()
    digests: set[bytes] = set()
    for encoded, batch_removed in parallel_map(encode, reader.batches("encoding"), workers):
        for step, stats in batch_removed.items():
            removed[step].merge(stats)
        for chunk, ids in encoded:
            digest = hashlib.blake2b(chunk.text.encode(), digest_size=16).digest()
            if cleaning.dedup and chunk.complete:
                if digest in digests:
                    removed["duplicates"].add(1, chunk.text[:60])
                    continue
                digests.add(digest)
            writer.write(chunk, ids, digest)
    writer.finish()
    return removed


# --- the data set


def make_dataset(
    folder: Path,
    config: DatasetConfig,
    cleaning: CleanConfig,
    workers: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write a data set into an empty folder. Returns its manifest.

    workers: number of processes; 0: one per core. settings: recorded in the manifest. Raises
    UserError if a source is invalid or no text remains.
    """
    reader = SourceReader(config, cleaning)
    workers = (workers or os.cpu_count() or 1) if reader.n_bytes >= MIN_PARALLEL else 1
    tokenizer = learn_tokenizer(config, cleaning, reader, workers)
    text = json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=0)  # people can read it
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    files_read = reader.files_read  # by learning the vocabulary
    writer = DatasetWriter(folder, tokenizer)
    removed = write_tokens(writer, cleaning, reader, workers)
    if files_read and files_read != reader.files_read:
        raise UserError("a source changed while it was read: try again")
    manifest = {
        "name": config.name,
        "sources": reader.files_read,
        "settings": settings,
        "removed": {step: asdict(stats) for step, stats in removed.items()},
        "splits": writer.counts,
        "shared_documents": writer.n_shared(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(writer.dtype),
        "sha256": file_sha256(*token_files(folder, "train"), *token_files(folder, "val")),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tiktoken": tiktoken.__version__,
        },
    }
    write_manifest(folder, manifest)
    return manifest
