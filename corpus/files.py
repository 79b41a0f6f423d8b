"""Reading files as a stream of text or of documents, hashing them, and token files on disk.

The token ids of a split are in one or more files, train.bin, train_00001.bin and so on. They are
read through memory maps, so a data set can be larger than memory.
"""

import codecs
import functools
import hashlib
import io
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from system.settings import UserError

READ_SIZE = 1 << 20  # bytes per read
MAX_WITHOUT_TEXT = 1000  # lines at the start of a .jsonl file, until its field counts as wrong


def ignore(raw: bytes) -> None:
    """The default `on_read`."""


@functools.cache
def note(text: str) -> None:
    """Print a note about the data once, also if they are read several times or by several processes
    of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


# --- text


def iter_text(
    path: Path, bad_bytes: str = "strict", on_read: Callable[[bytes], None] = ignore
) -> Iterator[str]:
    r"""Yield the text of a file piece by piece, with line ends as \n.

    bad_bytes: "strict" raises UserError if the file is not UTF-8, "replace" replaces invalid bytes
    by U+FFFD. on_read(raw) is called with the bytes of each read. Raises UserError if the file
    cannot be read, is binary or is UTF-16.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")(bad_bytes)
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    n_read = 0
    try:
        with open(path, "rb") as file:
            while raw := file.read(READ_SIZE):
                if not n_read and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path} is UTF-16 text: save it as UTF-8")
                on_read(raw)
                if (position := raw.find(b"\0")) >= 0:
                    raise UserError(
                        f"{path} is a binary file or UTF-16 text (byte {n_read + position} is 0): "
                        "save it as UTF-8 text"
                    )
                n_read += len(raw)
                yield decoder.decode(raw)
            yield decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        # error.object also holds the incomplete character at the end of the previous read.
        position = n_read - len(error.object) + error.start
        byte = error.object[error.start]
        raise UserError(
            f"{path} is not UTF-8 text (byte {position} is 0x{byte:02x}): save it as UTF-8 (or, to "
            "train on it, make a data set with `prepare.py --bad_bytes replace`)"
        ) from None


def read_text(path: Path) -> str:
    r"""The full text of a file, with line ends as \n. Raises UserError if it is empty or not UTF-8
    text."""
    text = "".join(iter_text(path))
    if not text:
        raise UserError(f"{path} is empty")
    return text


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates, which JSON can contain and UTF-8 cannot, replaced by "?"."""
    return text.encode("utf-8", "replace").decode()


def json_text(text: str) -> str:
    r"""A text from JSON as `iter_text` would read it from a file: lone surrogates are replaced, and
    line ends are \n."""
    return replace_surrogates(text).replace("\r\n", "\n").replace("\r", "\n")


# --- documents


def split_stream(
    stream: Iterable[str], separator: str, chunk_size: int | None = None
) -> Iterator[tuple[str, bool]]:
    r"""Split a text, given as a stream of strings, at each separator; no split if it is "".

    Yields (text, ends) as `iter_documents` does. Chunks end at a line end if there is one in their
    second half.

    >>> list(split_stream(["one|t", "wo|three"], "|"))
    [('one', True), ('two', True), ('three', True)]
    >>> list(split_stream(["one\ntwo\n", "three"], "", chunk_size=6))
    [('one\n', False), ('two\n', False), ('three', True)]
    """
    buffer = ""
    for text in stream:
        searched = max(0, len(buffer) - len(separator) + 1)  # without a separator
        buffer += text
        if separator and buffer.find(separator, searched) >= 0:
            *documents, buffer = buffer.split(separator)
            for document in documents:
                yield document, True
        # The end of the buffer may be the beginning of a separator.
        while chunk_size and len(buffer) > chunk_size + len(separator):
            end = buffer.rfind("\n", chunk_size // 2, chunk_size) + 1 or chunk_size
            yield buffer[:end], False
            buffer = buffer[end:]
    yield buffer, True


def read_line(line: str, place: str) -> dict[str, str]:
    """The fields with text in a line of a .jsonl file. Raises UserError, which begins with `place`,
    if the line is not JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: invalid JSON ({error})") from None
    fields = record.items() if isinstance(record, dict) else ()
    return {name: json_text(text) for name, text in fields if isinstance(text, str)}


def jsonl_texts(lines: Iterable[str], path: Path, text_field: str) -> Iterator[str]:
    """Yield the texts in the lines of a .jsonl file. Lines without text in the field are skipped,
    and their number is printed. Raises UserError if none of the first MAX_WITHOUT_TEXT lines, or
    of all, has text, and if a line is not JSON."""
    n_texts = n_skipped = first = 0
    names = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = read_line(line, f"{path}, line {number}")
        if text_field in fields:
            n_texts += 1
            yield fields[text_field]
            continue
        n_skipped += 1
        if n_skipped == 1:
            first, names = number, ", ".join(fields) or "none"
        if not n_texts and n_skipped == MAX_WITHOUT_TEXT:
            break
    if n_skipped and not n_texts:
        raise UserError(
            f"{path}, line {first}: no text in field {text_field!r} (fields with text: {names}): "
            f"name another field with `python prepare.py {path} --text_field NAME`"
        )
    if n_skipped:
        note(
            f"{path}: skipped {n_skipped:,} lines without text in field {text_field!r}; the first "
            f"is line {first}"
        )


def iter_documents(
    path: Path,
    text_field: str = "text",
    separator: str = "",
    bad_bytes: str = "strict",
    on_read: Callable[[bytes], None] = ignore,
    chunk_size: int | None = None,
) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a file: the text_field of each line of a .jsonl file, see
    `jsonl_texts`; otherwise the text between separators, which is the full text if separator is "".

    Yields (text, ends): `ends` tells whether the text is the end of its document. It is always True
    if chunk_size is None; otherwise documents of more than chunk_size characters come in several
    chunks. bad_bytes, on_read: see `iter_text`. Raises UserError, with the position, if the file
    cannot be read.
    """
    stream = iter_text(path, bad_bytes, on_read)
    if path.suffix.lower() != ".jsonl":
        yield from split_stream(stream, separator, chunk_size)
        return
    lines = (line for line, _ in split_stream(stream, "\n"))
    for text in jsonl_texts(lines, path, text_field):
        yield from split_stream([text], "", chunk_size)


# --- hashes


def file_sha256(*paths: Path) -> str:
    """The SHA-256, in hexadecimal, of the concatenated contents of files. Raises UserError if one
    cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                while raw := file.read(READ_SIZE):
                    digest.update(raw)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


# --- token files


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that can represent all token ids.

    >>> token_dtype(256), token_dtype(257)
    (dtype('uint8'), dtype('uint16'))
    """
    return np.min_scalar_type(vocab_size - 1)


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
        if hasattr(
            memory, "madvise"
        ):  # read-ahead makes windows at random positions 50 times slower
            memory.madvise(mmap.MADV_RANDOM)
        arrays.append(np.frombuffer(memory, dtype))
    return arrays[0] if len(arrays) == 1 else Shards(arrays)
