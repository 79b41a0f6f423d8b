"""Reading the text of files, their hashes, and what corpora of all kinds share."""

import codecs
import functools
import hashlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from system.settings import UserError
from tokenizer import END_OF_TEXT

READ_SIZE = 1 << 20  # bytes per read
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
REBUILT_SHA256 = "192307a120fe7a6baf5cd8ede631e049ddcdbc55f47ccc6a06579e9e0aafcfce"
# Of texts that are recognized by their hash
KNOWN_NAMES = {SHAKESPEARE_SHA256: "tinyshakespeare", REBUILT_SHA256: "tinyshakespeare, rebuilt"}


class NotTextError(UserError):
    """A file is not text in its encoding."""


@functools.cache
def note(text: str) -> None:
    """Print a note about the data once, also if several processes of torchrun read them."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, READ_SIZE at a time. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            while raw := file.read(READ_SIZE):
                yield raw
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def check_is_text(raw: bytes, path: Path, start: int = 0) -> None:
    """Raise UserError if these bytes of a file, which begin at `start`, are UTF-16 or binary."""
    if not start and raw.startswith(UTF16_MARKS):
        raise NotTextError(f"{path} is UTF-16 text: save it as UTF-8")
    if (position := raw.find(b"\0")) >= 0:
        advice = "save it as UTF-8 text"
        if path.suffix == ".pt":
            advice = "to continue the run of a checkpoint, give --resume and its --tag"
        raise NotTextError(
            f"{path} is a binary file or UTF-16 text (byte {start + position} is 0): {advice}"
        )


def decode_blocks(
    blocks: Iterable[bytes], path: Path, bad_bytes: str = "strict", encoding: str = "utf-8"
) -> Iterator[str]:
    r"""Yield the text of a file, given its bytes as a stream, with line ends as \n.

    bad_bytes: "strict" raises UserError if the file is not in this encoding, "replace" replaces
    invalid bytes by U+FFFD and prints how many. Raises UserError if it is binary or UTF-16.
    """
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(codec)(bad_bytes), True)
    n_read = n_replaced = 0
    try:
        for raw in blocks:
            check_is_text(raw, path, n_read)
            n_read += len(raw)
            text = decoder.decode(raw)
            n_replaced += text.count("\ufffd")
            yield text
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # error.object also holds the incomplete character at the end of the previous block.
        raw, position = error.object, n_read - len(error.object) + error.start
        raise NotTextError(
            f"{path} is not {encoding.upper()} text (byte {position} is 0x{raw[error.start]:02x}): "
            f"{likely_encodings(raw, error.start)}; or convert it with `iconv -f ENCODING -t UTF-8 "
            f"{path}`, or make a data set with `prepare.py --bad_bytes replace`"
        ) from None
    if n_replaced and bad_bytes == "replace":
        note(f"{path}: {n_replaced:,} characters are U+FFFD, in place of bytes that are invalid")


def likely_encodings(raw: bytes, at: int) -> str:
    """The line around byte `at` in the two most likely encodings that can read it, with their
    flags: those of some accents or, if most bytes are not ASCII, of Japanese, Chinese, Cyrillic."""
    line = raw[raw.rfind(b"\n", 0, at) + 1 :].partition(b"\n")[0]
    latin = 2 * sum(byte > 127 for byte in line) < len(line)
    names = ("cp1252", "mac_roman") if latin else ("shift_jis", "gb18030", "cp1251", "mac_roman")
    found: list[str] = []
    for name in names:
        try:  # the line may end within a character
            text = codecs.getincrementaldecoder(name)().decode(line).strip()
        except UnicodeDecodeError:
            continue
        start = max(0, next((i for i, c in enumerate(text) if not c.isascii()), 0) - 20)
        found.append(f"--encoding {name} reads {text[start : start + 40]!r}")
    return ", ".join(found[:2])


def read_text(path: Path, encoding: str = "utf-8") -> str:
    r"""The text of a file, with line ends as \n. Raises UserError if it is empty or invalid."""
    text = "".join(decode_blocks(read_blocks(path), path, encoding=encoding))
    if not text:
        raise UserError(f"{path} is empty")
    return text


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    for raw in read_blocks(path):
        digest.update(raw)
    return digest.hexdigest()


def file_info(path: Path) -> dict[str, Any]:
    """What identifies the text of a corpus, in checkpoints and logs."""
    info: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return {"name": KNOWN_NAMES.get(info["sha256"], path.name), **info}


def note_end_of_text(path: Path, text: str) -> None:
    """Print how to make documents of a text that contains <|endoftext|>."""
    if END_OF_TEXT in text:
        note(
            f"{path} contains {END_OF_TEXT}, read as ordinary text: with --separator "
            f'"{END_OF_TEXT}" it starts a new document'
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that can represent all token ids.

    >>> token_dtype(256), token_dtype(257)
    (dtype('uint8'), dtype('uint16'))
    """
    return np.min_scalar_type(vocab_size - 1)
