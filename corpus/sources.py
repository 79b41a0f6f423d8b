"""The source files of a data set, read as a stream of documents, each assigned to a split, and work
on batches of them, divided among processes."""

import functools
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from config import TEXT_ENCODINGS, TOKENIZERS
from corpus.clean import Chunk, CleanConfig, RemovalStats, chunk_end, clean, new_stats
from corpus.documents import (
    file_start,
    hash_to_unit,
    is_validation,
    iter_documents,
    note_skipped,
    replace_surrogates,
    text_files,
)
from corpus.download import DATASETS, fetch
from corpus.load import find_corpus
from corpus.text import check_is_text, note_end_of_text, read_blocks
from system.settings import UserError, setting
from tokenizer import END_OF_TEXT

Result = TypeVar("Result")

BATCH_SIZE = 1 << 20  # characters that a worker process receives at once
CHUNK_COST = 100  # characters added to the size of each chunk, to limit the chunks per batch


@dataclass
class DatasetConfig:
    """The sources of a data set, and how they are tokenized and split."""

    sources: tuple[str, ...] = setting(
        (), "files, folders, or " + " | ".join(DATASETS), positional=True
    )
    name: str = setting("", "of data/NAME; default: that of the first source", group="data set")
    tokenizer: str = setting("bpe", f"{' | '.join(TOKENIZERS)} | a checkpoint, for its tokenizer")
    bpe_vocab_size: int = setting(8192, "of --tokenizer bpe", low=258, alias="vocab_size")
    encoding: str = setting("utf-8", "of the text", choices=TEXT_ENCODINGS)
    text_field: str = setting("text", "field of a .jsonl record that contains the text")
    separator: str = setting("", "text between the documents of a text file; \\n for a line end")
    val_share: float = setting(0.1, "share of documents in the validation split", above=0, below=1)
    seed: int = setting(1337, "seed of the choice of validation documents", low=0)
    overwrite: bool = setting(False, "replace the data set of this name")
    stats: bool = setting(False, "print document lengths, and a suitable window and size")
    workers: int = setting(0, "number of processes; 0: one per core", low=0)

    def __post_init__(self) -> None:
        if self.sources and not self.name:
            self.name = re.sub(r"[^\w.-]", "_", Path(os.path.realpath(self.sources[0])).stem)[:60]

    def problems(self) -> list[str]:
        found = []
        if self.name and not re.fullmatch(r"\w[\w.-]*", self.name):
            found.append(f"name {self.name!r} must be a plain name: the data set is data/NAME")
        if self.tokenizer not in TOKENIZERS and not os.path.isfile(self.tokenizer):
            found.append(
                f"tokenizer must be one of {', '.join(TOKENIZERS)} or a checkpoint, "
                f"not {self.tokenizer!r}"
            )
        others = [s for s in self.sources if Path(s).is_file() and not s.lower().endswith(".jsonl")]
        if others and self.text_field != "text":
            found.append(f"--text_field is for .jsonl files, not {others[0]}: leave it out")
        return found + [
            f"{source} contains question/answer records: use it with train.py directly"
            for source in self.sources
            if source.lower().endswith((".json", ".csv"))
        ]


def find_sources(names: Sequence[str]) -> list[tuple[Path, str]]:
    """The files that names (of files, folders, data sets) refer to, each with the split of all its
    documents, or "" to assign each. Raises UserError if one does not exist or is not text."""
    sources: list[tuple[Path, str]] = []
    for name in names:
        if name in DATASETS and not Path(name).exists():
            for split, file in fetch(name).items():
                sources.append((file, "" if split == "all" else split))
            continue
        path = find_corpus(name)
        files = [path]
        if path.is_dir():
            files, skipped = text_files(path)
            note_skipped(path, files, skipped, "binary or .json")
        sources += [(file, "") for file in files]
    for path, _ in sources:
        check_is_text(file_start(path), path)
    return sources


class SourceReader:
    """Reads the sources as a stream, as often as needed."""

    def __init__(self, config: DatasetConfig, cleaning: CleanConfig):
        self.config, self.cleaning, self.workers = config, cleaning, 1
        self.sources = find_sources(config.sources)
        self.n_bytes = sum(path.stat().st_size for path, _ in self.sources)
        separator = END_OF_TEXT if "tinystories" in config.sources else ""
        self.separator = config.separator or separator
        self.bad_bytes = "strict" if cleaning.bad_bytes == "stop" else "replace"
        # From this chunk on, and this position in its text, all is for validation (see `hold_out`).
        self.val_start = (sys.maxsize, 0)
        # path, bytes and sha256 of each file that was read; complete at the end of the stream
        self.files_read: list[dict[str, Any]] = []
        self.removed = new_stats()  # also at the end

    def batches(self, title: str, share: float = 1.0) -> Iterator[list[Chunk]]:
        """Yield batches of about BATCH_SIZE characters, of a pseudo-random share of the chunks."""
        batch: list[Chunk] = []
        size = 0
        for chunk in self.chunks(title):
            if hash_to_unit(chunk.number, self.config.seed + 1) < share:
                batch.append(chunk)
                size += len(chunk.text) + CHUNK_COST
            if size >= BATCH_SIZE:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def process(
        self, function: Callable[[str], Result], title: str, share: float = 1.0
    ) -> Iterator[tuple[Chunk, Result]]:
        """Yield the cleaned chunks without duplicate documents, with the function of their texts,
        computed in several processes. share: see `batches`."""
        work = functools.partial(process_batch, function, self.cleaning)
        self.removed, digests = new_stats(), set()
        for processed, removed in parallel_map(work, self.batches(title, share), self.workers):
            for step, stats in removed.items():
                self.removed[step].merge(stats)
            for chunk, result in processed:
                if self.cleaning.dedup and chunk.complete:
                    if chunk.digest in digests:
                        self.removed["duplicates"].add(1, chunk.text[:60])
                        continue
                    digests.add(chunk.digest)
                yield chunk, result

    def chunks(self, title: str) -> Iterator[Chunk]:
        """Yield all documents of all sources, long ones in several chunks, with a progress bar."""
        self.files_read = []
        n_chunks = number = 0  # of all sources; number: of the document
        with tqdm(
            total=self.n_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            for path, own_split in self.sources:
                first, blocks = True, self.read(path, bar)
                field, separator = self.config.text_field, self.separator
                ends = functools.partial(chunk_end, config=self.cleaning)
                options = (self.bad_bytes, ends, blocks, self.config.encoding)
                for text, last in iter_documents(path, field, separator, *options):
                    if not separator and path.suffix.lower() != ".jsonl":
                        note_end_of_text(path, text)
                    is_val = is_validation(number, self.config.val_share, self.config.seed)
                    is_val = own_split == "val" if own_split else is_val
                    split = "val" if is_val or n_chunks >= self.val_start[0] else "train"
                    start = self.val_start[1] if n_chunks == self.val_start[0] else 0
                    chunk = Chunk(text, first, last, split, n_chunks, start)
                    chunk.text = chunk.stripped(text) if separator else text
                    yield chunk
                    # Blank documents are not numbered: load_corpus skips them, and with the same
                    # numbers it selects the same validation documents.
                    number += last and not (chunk.complete and not text.strip())
                    n_chunks += 1
                    first = last

    def read(self, path: Path, bar: tqdm) -> Iterator[bytes]:
        """Yield the bytes of a file, then add it to files_read."""
        digest, n_bytes = hashlib.sha256(), 0
        for raw in read_blocks(path):
            digest.update(raw)
            n_bytes += len(raw)
            bar.update(len(raw))
            yield raw
        file = {"path": replace_surrogates(str(path)), "bytes": n_bytes}
        self.files_read.append(file | {"sha256": digest.hexdigest()})


def process_batch(
    function: Callable[[str], Result], cleaning: CleanConfig, batch: list[Chunk]
) -> tuple[list[tuple[Chunk, Result]], dict[str, RemovalStats]]:
    """Clean a batch: the chunks that remain, with the function of their texts, and what was
    removed. The chunk in which the validation split starts becomes two."""
    removed, found = new_stats(), []
    for chunk in batch:
        text, start = clean(chunk, cleaning, removed), chunk.val_start
        if text is not None:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if start:
                train = replace(chunk, text=text[:start], split="train", digest=digest)
                found.append((train, function(train.text)))
            first = chunk.first and not start
            chunk = replace(chunk, text=text[start:], first=first, digest=digest)
            found.append((chunk, function(chunk.text)))
    return found, removed


def init_worker() -> None:
    """Let only the parent process handle Ctrl-C, and exit when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def parallel_map(
    function: Callable[[list[Chunk]], Result], batches: Iterable[list[Chunk]], workers: int
) -> Iterator[Result]:
    """Yield function(batch) of each batch, in order, computed in several processes. Only as many
    batches are read ahead as keep them busy. Raises UserError if a process is killed."""
    if workers < 2:
        yield from map(function, batches)
        return
    if sys.platform == "win32":
        workers = min(workers, 61)  # ProcessPoolExecutor raises ValueError for more
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=init_worker)
    try:
        pending: deque[Future[Result]] = deque()
        for batch in batches:
            pending.append(pool.submit(function, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out: try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
