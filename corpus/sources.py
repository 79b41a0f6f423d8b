"""The source files of a data set, read as a stream of documents, each assigned to a split."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from corpus.clean import CHUNK_SIZE, Chunk
from corpus.documents import SPLIT_SEED, hash_to_unit, is_validation, iter_documents
from corpus.download import DATASETS, fetch
from corpus.text import note_end_of_text, replace_surrogates
from system.settings import UserError

BATCH_SIZE = 1 << 20  # characters that a worker process receives at once
CHUNK_COST = 100  # characters added to the size of each chunk, to limit the chunks per batch
SNIFF_SIZE = 8192  # bytes at the start of a file in which a zero byte shows that it is binary


@dataclass
class Source:
    """A file to read."""

    path: Path
    split: str = ""  # train or val, for all its documents; "": each document is assigned to one


def is_binary(path: Path) -> bool:
    """Whether the start of a file is not text. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(SNIFF_SIZE)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    is_utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))  # has its own message, in iter_text
    return b"\0" in start and not is_utf16


def text_files(folder: Path) -> list[Path]:
    """The text files in a folder and its subfolders, sorted, without hidden and binary ones (which
    are reported). Raises UserError if there are none."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hidden = re.compile(r"(^|[/\\])\.")
    files = [path for path in files if not hidden.search(str(path.relative_to(folder)))]
    binary = {path for path in files if is_binary(path)}
    if binary:
        names = ", ".join(sorted(path.name for path in binary)[:3]) + ", ..." * (len(binary) > 3)
        print(f"{folder}: skipping {len(binary)} binary files ({names})")
    if len(binary) == len(files):
        raise UserError(f"there is no text file in the folder {folder}")
    return [path for path in files if path not in binary]


def find_sources(names: Sequence[str]) -> list[Source]:
    """The files that names refer to: files, folders, named data sets. Raises UserError if one does
    not exist or is not text."""
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if name in DATASETS and not path.exists():
            files = fetch(name)
            sources += [
                Source(file, "" if split == "all" else split) for split, file in files.items()
            ]
        elif path.is_dir():
            sources += map(Source, text_files(path))
        elif path.is_file():
            sources.append(Source(path))
        elif path.exists():
            raise UserError(f"{name} is a device or a pipe: give files or folders")
        else:
            raise UserError(f"there is no {name}: give files, folders, or {', '.join(DATASETS)}")
    for source in sources:
        if is_binary(source.path):
            raise UserError(f"{source.path} is a binary file or UTF-16 text: save it as UTF-8 text")
    return sources


@dataclass
class SourceReader:
    """Reads the sources as a stream, as often as needed."""

    sources: list[Source]
    text_field: str = "text"
    separator: str = ""
    bad_bytes: str = "strict"
    val_share: float = 0.1
    seed: int = SPLIT_SEED
    # path, bytes and sha256 of each file that was read; complete at the end of the stream
    files_read: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """The total size of the sources."""
        return sum(source.path.stat().st_size for source in self.sources)

    def batches(self, title: str, share: float = 1.0) -> Iterator[list[Chunk]]:
        """Yield the chunks in batches of about BATCH_SIZE characters. With a share below 1, a
        pseudo-random selection of them."""
        batch: list[Chunk] = []
        size = 0
        for i, chunk in enumerate(self.chunks(title)):
            if share < 1 and hash_to_unit(i, self.seed + 1) >= share:
                continue
            batch.append(chunk)
            size += len(chunk.text) + CHUNK_COST
            if size >= BATCH_SIZE:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def chunks(self, title: str) -> Iterator[Chunk]:
        """Yield all documents of all sources, long ones in several chunks, with a progress bar."""
        self.files_read = []
        number = 0  # of the document, over all sources
        with tqdm(
            total=self.n_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            for source in self.sources:
                first = True
                for text, last in self.read_file(source.path, bar):
                    if not self.separator and source.path.suffix.lower() != ".jsonl":
                        note_end_of_text(source.path, text)
                    complete = first and last
                    text = text.strip("\n") if self.separator and complete else text
                    is_val = is_validation(number, self.val_share, self.seed)
                    yield Chunk(text, first, last, source.split or ("val" if is_val else "train"))
                    # Blank documents are not numbered: load_corpus skips them, and with the same
                    # numbers it selects the same validation documents.
                    blank = complete and not text.strip()
                    number += last and not blank
                    first = last

    def read_file(self, path: Path, bar: tqdm) -> Iterator[tuple[str, bool]]:
        """Yield the documents of a file as `iter_documents` does, then add it to files_read."""
        digest, n_bytes = hashlib.sha256(), 0

        def on_read(raw: bytes) -> None:
            nonlocal n_bytes
            digest.update(raw)
            n_bytes += len(raw)
            bar.update(len(raw))

        yield from iter_documents(
            path, self.text_field, self.separator, self.bad_bytes, on_read, CHUNK_SIZE
        )
        file = {"path": replace_surrogates(str(path)), "bytes": n_bytes}
        self.files_read.append(file | {"sha256": digest.hexdigest()})
