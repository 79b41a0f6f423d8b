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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

import tokenizer as tokenizers
from config import ENCODINGS, TOKENIZERS
from corpus.bpe import count_pieces, from_tiktoken, train_bpe
from corpus.clean import Chunk, CleanConfig, RemovalStats, clean, new_stats
from corpus.folder import DatasetWriter, EncodedChunk, token_files, write_manifest
from corpus.sources import DatasetConfig, SourceReader, parallel_map
from corpus.text import file_sha256, token_dtype
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer
from utils import matching_contents, read_checkpoint

SAMPLE_SIZE = 1 << 27  # bytes: a BPE vocabulary is learned from a sample of about this size
MIN_PARALLEL = 1 << 24  # bytes: smaller sources take less time than starting worker processes


# --- the tokenizer


def characters(texts: Iterable[str]) -> set[str]:
    """The characters in texts."""
    return set().union(*texts)


def find_in_batch(
    find: Callable[[Iterable[str]], Iterable[str]], cleaning: CleanConfig, batch: list[Chunk]
) -> Iterable[str]:
    """What `find` finds in the cleaned texts of a batch."""
    texts = (clean(chunk, cleaning, new_stats()) for chunk in batch)
    return find(text for text in texts if text is not None)


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
) -> tuple[list[EncodedChunk], dict[str, RemovalStats]]:
    """Clean and encode a batch. Also returns what cleaning removed."""
    tokenizer = read_tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    removed = new_stats()
    encoded = []
    for chunk in batch:
        text = clean(chunk, cleaning, removed)
        if text is None:
            continue
        raw = text.encode()
        encoded.append(
            EncodedChunk(
                ids=tokenizer.encode(text).astype(dtype),
                first=chunk.first,
                complete=chunk.complete,
                split=chunk.split,
                n_chars=len(text),
                n_bytes=len(raw),
                digest=hashlib.blake2b(raw, digest_size=16).digest(),
                example=text[:60],
            )
        )
    return encoded, removed


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
        for chunk in encoded:
            if cleaning.dedup and chunk.complete:
                if chunk.digest in digests:
                    removed["duplicates"].add(1, chunk.example)
                    continue
                digests.add(chunk.digest)
            writer.write(chunk)
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
