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
import re
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken

import tokenizer as tokenizers
from config import ENCODINGS, TOKENIZERS
from corpus.bpe import count_pieces, train_bpe
from corpus.clean import Chunk, CleanConfig, RemovalStats, clean, new_stats
from corpus.download import DATASETS
from corpus.encodings import from_tiktoken
from corpus.folder import map_token_files, token_files
from corpus.sources import SourceReader, find_sources
from corpus.text import file_sha256, token_dtype
from corpus.workers import parallel_map
from system.settings import UserError, setting
from tokenizer import END_OF_TEXT, Tokenizer
from utils import matching_contents, read_checkpoint

SAMPLE_SIZE = 1 << 27  # bytes: a BPE vocabulary is learned from a sample of about this size
SHARD_SIZE = 1 << 28  # tokens per file
DECODE_SIZE = 1 << 20  # tokens decoded at once
MIN_PARALLEL = 1 << 24  # bytes: smaller sources take less time than starting worker processes


@dataclass
class DatasetConfig:
    """The sources of a data set, and how they are tokenized and split."""

    sources: tuple[str, ...] = setting(
        (), "files, folders, or " + " | ".join(DATASETS), positional=True
    )
    name: str = setting(
        "",
        "written to data/NAME; default: the name of the first source",
        group="data set",
    )
    tokenizer: str = setting(
        "bpe", f"{' | '.join(TOKENIZERS)} | a checkpoint, whose tokenizer is used"
    )
    bpe_vocab_size: int = setting(8192, "of --tokenizer bpe", low=258, alias="vocab_size")
    text_field: str = setting("text", "field of a .jsonl record that contains the text")
    separator: str = setting(
        "", "text between the documents of a text file; \\n for a line end; default: one document"
    )
    val_share: float = setting(0.1, "share of documents in the validation split", above=0, below=1)
    seed: int = setting(1337, "seed of the choice of validation documents", low=0)
    overwrite: bool = setting(False, "replace the data set of this name")

    def __post_init__(self) -> None:
        if self.sources and not self.name:
            self.name = re.sub(r"[^\w.-]", "_", Path(os.path.realpath(self.sources[0])).stem)[:60]

    def problems(self) -> list[str]:
        """Invalid settings."""
        found = []
        if self.name and not re.fullmatch(r"\w[\w.-]*", self.name):
            found.append(f"name {self.name!r} must be a plain name: the data set is data/NAME")
        if self.tokenizer not in TOKENIZERS and not os.path.isfile(self.tokenizer):
            found.append(
                f"tokenizer must be one of {', '.join(TOKENIZERS)} or a checkpoint, "
                f"not {self.tokenizer!r}"
            )
        if len(self.name.encode("utf-8", "replace")) > 200:
            found.append("name is too long: give a --name of at most 200 bytes")
        return found + [
            f"{source} contains question/answer records: use it with train.py directly"
            for source in self.sources
            if source.lower().endswith(".json")
        ]


# --- the tokenizer


def cleaned_texts(cleaning: CleanConfig, batch: list[Chunk]) -> list[str]:
    """The cleaned texts of the chunks that are not removed."""
    texts = (clean(chunk, cleaning, new_stats()) for chunk in batch)
    return [text for text in texts if text is not None]


def batch_chars(cleaning: CleanConfig, batch: list[Chunk]) -> set[str]:
    """The characters in the cleaned text of a batch."""
    return set().union(*cleaned_texts(cleaning, batch))


def batch_pieces(cleaning: CleanConfig, batch: list[Chunk]) -> Counter[str]:
    """How often each BPE piece occurs in the cleaned text of a batch."""
    return count_pieces(cleaned_texts(cleaning, batch))


def require_text(found: set[str] | Counter[str]) -> None:
    """Raise UserError if there is nothing to learn a vocabulary from."""
    if not found:
        raise UserError(
            "no text remains to learn the vocabulary from: the sources are empty, cleaning removed "
            "all, or all documents are in the validation split (then try another --seed)"
        )


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
    if config.tokenizer == "char":
        batches = reader.batches("learning the vocabulary")
        chars: set[str] = set()
        for found in parallel_map(functools.partial(batch_chars, cleaning), batches, workers):
            chars |= found
        require_text(chars)
        return tokenizers.CharTokenizer(sorted(chars), (END_OF_TEXT,))
    share = SAMPLE_SIZE / max(reader.n_bytes, 1)
    train_batches = (
        [chunk for chunk in batch if chunk.split == "train"]
        for batch in reader.batches("learning the vocabulary", share)
    )
    counts: Counter[str] = Counter()
    for pieces in parallel_map(functools.partial(batch_pieces, cleaning), train_batches, workers):
        counts.update(pieces)
    require_text(counts)
    return train_bpe(counts, config.bpe_vocab_size)


# --- tokens to files


@dataclass
class EncodedChunk:
    """A cleaned chunk as token ids, with the statistics that are recorded."""

    ids: np.ndarray  # (tokens,)
    first: bool  # starts its document
    split: str  # train or val
    n_chars: int
    n_bytes: int  # in UTF-8
    digest: bytes | None  # of a complete document: equal for duplicates
    example: str  # its first characters


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
                split=chunk.split,
                n_chars=len(text),
                n_bytes=len(raw),
                digest=hashlib.blake2b(raw, digest_size=16).digest() if chunk.complete else None,
                example=text[:60],
            )
        )
    return encoded, removed


class DatasetWriter:
    """Writes the token files of both splits, and counts what they contain."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.separator = tokenizer.specials[END_OF_TEXT]
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.files: dict[str, BinaryIO] = {}  # the last file of each split
        self.train_docs = array("q")  # where each document starts in the training ids
        # Of the text of each document, 8 bytes: to find validation documents in the training split
        self.digests = {"train": array("q"), "val": array("q")}
        self.last_digest = 0  # where that of the last training document is; a long one has none
        keys = ("documents", "tokens", "characters", "bytes")
        self.counts = {split: dict.fromkeys(keys, 0) for split in ("train", "val")}
        for split in self.counts:
            self.open_file(split, f"{split}.bin")

    def open_file(self, split: str, name: str) -> None:
        """Start the next file of a split."""
        if split in self.files:
            self.close(split)
        self.files[split] = open(self.folder / name, "wb")  # noqa: SIM115 (`close` closes it)

    def close(self, split: str) -> None:
        """Close the last file of a split."""
        self.files[split].close()

    def write(self, chunk: EncodedChunk) -> None:
        """Append a chunk to its split; the first chunk of a document follows a separator."""
        counts, ids = self.counts[chunk.split], chunk.ids
        if chunk.first:
            ids = np.concatenate([np.array([self.separator], dtype=self.dtype), ids])
            if chunk.split == "train":
                self.train_docs.append(counts["tokens"])
                self.last_digest = len(self.digests["train"])
            counts["documents"] += 1
        if chunk.digest:
            self.digests[chunk.split].frombytes(chunk.digest[:8])
        self.append(chunk.split, ids)
        counts["characters"] += chunk.n_chars
        counts["bytes"] += chunk.n_bytes

    def append(self, split: str, ids: np.ndarray) -> None:
        """Append ids to a split, starting another file whenever one is full."""
        counts = self.counts[split]
        while len(ids):
            shard, n_written = divmod(counts["tokens"], SHARD_SIZE)
            if shard and not n_written:
                self.open_file(split, f"{split}_{shard:05d}.bin")
            fitting, ids = ids[: SHARD_SIZE - n_written], ids[SHARD_SIZE - n_written :]
            self.files[split].write(fitting.tobytes())
            counts["tokens"] += len(fitting)

    def finish(self) -> None:
        """Close the files, after making sure that the validation split is not empty."""
        self.close("train")
        if not self.counts["val"]["tokens"] and self.counts["train"]["tokens"]:
            self.move_to_validation()
        self.close("val")
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
            self.digests["val"].extend(self.digests["train"][self.last_digest :])
            del self.digests["train"][self.last_digest :]
            print(f"few documents: the last one ({val['tokens']:,} tokens) is for validation")
        else:
            print("the corpus is one document: its last tenth is for validation")

    def n_shared(self) -> int:
        """The number of validation documents that are training documents too."""
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
        for chunk in encoded:
            if cleaning.dedup and chunk.digest in digests:
                removed["duplicates"].add(1, chunk.example)
                continue
            if cleaning.dedup and chunk.digest:
                digests.add(chunk.digest)
            writer.write(chunk)
    writer.finish()
    return removed


# --- the data set


def document_separator(config: DatasetConfig) -> str:
    """The text between documents, "" if a file is one document."""
    default = END_OF_TEXT if "tinystories" in config.sources else ""
    return config.separator.replace("\\n", "\n") or default


def make_dataset(
    folder: Path,
    config: DatasetConfig,
    cleaning: CleanConfig,
    workers: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write a data set into an empty folder, all files but the manifest, which is returned.

    workers: number of processes; 0: one per core. settings: recorded in the manifest. Raises
    UserError if a source is invalid or no text remains.
    """
    reader = SourceReader(
        sources=find_sources(config.sources),
        text_field=config.text_field,
        separator=document_separator(config),
        bad_bytes="strict" if cleaning.bad_bytes == "stop" else "replace",
        val_share=config.val_share,
        seed=config.seed,
    )
    workers = (workers or os.cpu_count() or 1) if reader.n_bytes >= MIN_PARALLEL else 1
    tokenizer = learn_tokenizer(config, cleaning, reader, workers)
    text = json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=0)  # people can read it
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    files_read = reader.files_read  # by learning the vocabulary
    writer = DatasetWriter(folder, tokenizer)
    removed = write_tokens(writer, cleaning, reader, workers)
    if files_read and files_read != reader.files_read:
        raise UserError("a source changed while it was read: try again")
    if not writer.counts["train"]["tokens"]:
        raise UserError("no training text remains: the sources are empty, or cleaning removed all")
    return {
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
