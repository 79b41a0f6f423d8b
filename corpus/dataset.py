"""Making a data set: the sources are read, cleaned, tokenized and written in one stream.

A SourceReader yields batches of chunks; worker processes clean and encode them; the DatasetWriter
writes the ids in the order in which they were read, so the result does not depend on the number of
workers. `open_dataset` in folder.py reads what is written here.
"""

import functools
import json
import os
import platform
from array import array
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

import tokenizer as tokenizers
from config import ENCODINGS, TOKENIZERS
from corpus.bpe import count_pieces, from_tiktoken, train_bpe
from corpus.clean import Chunk, CleanConfig
from corpus.documents import check_known, special_id
from corpus.folder import write_manifest
from corpus.sources import DatasetConfig, SourceReader
from corpus.text import token_dtype
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer

SAMPLE_SIZE = 1 << 27  # bytes: a BPE vocabulary is learned from a sample of about this size
MIN_PARALLEL = 1 << 24  # bytes: smaller sources take less time than starting worker processes


def hold_out(reader: SourceReader) -> None:
    """If no document is in the validation split, move the last one there; if there is only one, its
    last tenth: only then is a document divided. Raises UserError if there is no training text."""
    n_documents, splits = 0, set()
    chunks: list[tuple[int, int]] = []  # number and length, of the last document
    for chunk, length in reader.process(len, "counting documents"):
        splits.add(chunk.split)
        if len(splits) == 2:
            return
        n_documents += chunk.first
        chunks = [*([] if chunk.first else chunks), (chunk.number, length)]
    start = sum(length for _, length in chunks) * 9 // 10 if n_documents == 1 else 0
    if splits != {"train"} or (n_documents == 1 and not start):
        raise UserError(
            "no text remains to learn from: the sources are empty, cleaning removed all, or all "
            "documents are in the validation split (then try another --seed)"
        )
    what = "few documents: the last one" if n_documents > 1 else "one document: its last tenth"
    print(f"{what} is for validation")
    while start >= chunks[0][1]:
        start -= chunks.pop(0)[1]
    reader.val_start = chunks[0][0], start


def count_text(text: str) -> Counter[str]:
    return count_pieces([text])


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    from utils import matching_contents, read_checkpoint  # only here: PyTorch is slow to import

    state = read_checkpoint(path)
    with matching_contents(path):
        return tokenizers.from_dict(state["tokenizer"])


def learn_tokenizer(config: DatasetConfig, reader: SourceReader) -> Tokenizer:
    """The tokenizer of the data set: one of tiktoken's, that of a checkpoint, the characters of all
    documents, or byte pairs learned from the training documents, from a sample if they are many."""
    if config.tokenizer in ENCODINGS:
        return from_tiktoken(config.tokenizer)
    if config.tokenizer not in TOKENIZERS:
        return checkpoint_tokenizer(Path(config.tokenizer))
    title = "learning the vocabulary"
    if config.tokenizer == "char":
        found = ("".join(chars) for _, chars in reader.process(set, title))
        return tokenizers.CharTokenizer.train(found, (END_OF_TEXT,))
    counts: Counter[str] = Counter()
    for chunk, pieces in reader.process(count_text, title, SAMPLE_SIZE / reader.n_bytes):
        if chunk.split == "train":
            counts.update(pieces)
    return train_bpe(counts, config.bpe_vocab_size)


@functools.lru_cache(maxsize=1)
def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, read once per process."""
    return tokenizers.from_dict(json.loads(path.read_text(encoding="utf-8")))


def encode(tokenizer_path: Path, text: str) -> np.ndarray:
    """The ids of a text (tokens,). Raises UserError for characters that are not in the vocabulary,
    also if the tokenizer has <UNK>: models are not trained on it."""
    tokenizer = read_tokenizer(tokenizer_path)
    if "<UNK>" in tokenizer.specials:
        check_known(tokenizer, [text], "a source")
    return tokenizer.encode(text).astype(token_dtype(tokenizer.vocab_size))


class DatasetWriter:
    """Writes the token files of both splits, and counts what they contain."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.separator = special_id(tokenizer, END_OF_TEXT)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in ("train", "val")}  # noqa: SIM115
        self.train_docs = array("q")  # where each document starts in the training ids
        # 8 bytes per document: to find validation documents in the training split
        self.digests = {"train": array("q"), "val": array("q")}
        keys = ("documents", "tokens", "characters", "bytes")
        self.counts = {split: dict.fromkeys(keys, 0) for split in ("train", "val")}

    def write(self, chunk: Chunk, ids: np.ndarray) -> None:
        """Append the ids of a chunk (tokens,) to its split; a separator precedes each document."""
        counts = self.counts[chunk.split]
        if chunk.first:
            ids = np.insert(ids, 0, self.separator)
            if chunk.split == "train":
                self.train_docs.append(counts["tokens"])
            self.digests[chunk.split].frombytes(chunk.digest[:8])
            counts["documents"] += 1
        self.files[chunk.split].write(ids.tobytes())
        counts["tokens"] += len(ids)
        counts["characters"] += len(chunk.text)
        counts["bytes"] += len(chunk.text.encode())

    def n_shared(self) -> int:
        """The number of validation documents whose first chunks are those of training documents."""
        train, val = (np.array(self.digests[split]) for split in ("train", "val"))
        return int(np.isin(val, train).sum())


def make_dataset(folder: Path, config: DatasetConfig, cleaning: CleanConfig) -> dict[str, Any]:
    """Write a data set into an empty folder. Returns its manifest, or raises UserError."""
    reader = SourceReader(config, cleaning)
    hold_out(reader)  # mostly reads one batch: not worth starting worker processes
    if reader.n_bytes >= MIN_PARALLEL:
        reader.workers = config.workers or os.cpu_count() or 1
    tokenizer = learn_tokenizer(config, reader)
    text = json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=0)  # people can read it
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    files_read = reader.files_read  # until here, perhaps not all
    writer = DatasetWriter(folder, tokenizer)
    read_tokenizer.cache_clear()  # an earlier data set in this process had the same path
    function = functools.partial(encode, folder / "tokenizer.json")
    for chunk, ids in reader.process(function, "encoding"):
        writer.write(chunk, ids)
    for file in writer.files.values():
        file.close()
    np.save(folder / "train_docs.npy", np.array(writer.train_docs, dtype=np.int64))
    if files_read != reader.files_read[: len(files_read)]:
        raise UserError("a source changed while it was read: try again")
    versions = {module.__name__: module.__version__ for module in (np, tiktoken)}
    manifest = {
        "name": config.name,
        "sources": reader.files_read,
        "settings": asdict(config) | asdict(cleaning),
        "removed": {step: asdict(stats) for step, stats in reader.removed.items()},
        "splits": writer.counts,
        "shared_documents": writer.n_shared(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(writer.dtype),
        "versions": versions | {"python": platform.python_version()},
    }
    write_manifest(folder, manifest)
    return manifest
