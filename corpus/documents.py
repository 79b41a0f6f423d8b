"""Corpora of several documents, from .jsonl files, texts with separators and folders."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from corpus.corpus import Corpus, check_size, make_tokenizer, utf8_length
from corpus.text import (
    UTF16_MARKS,
    NotTextError,
    decode_blocks,
    file_info,
    note,
    read_blocks,
    token_dtype,
)
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer

MAX_WITHOUT_TEXT = 1000  # lines at the start of a .jsonl file, until its field counts as wrong
SNIFF_SIZE = 8192  # bytes at the start of a file in which a zero byte shows that it is binary
SPLIT_SEED = 1337

Document = TypeVar("Document")
# Where the first chunk of a text ends, at a position below a limit; 0 if there is no such position
ChunkEnd = Callable[[str, int], int]


def split_stream(
    stream: Iterable[str], separator: str, chunk_end: ChunkEnd = lambda text, limit: 0
) -> Iterator[tuple[str, bool]]:
    r"""Split a text, given as a stream of strings, at each separator; no split if it is "".

    Yields (text, ends) as `iter_documents` does. The chunks of a document depend neither on the
    documents after it nor on the strings of the stream.

    >>> list(split_stream(["one|t", "wo|three"], "|"))
    [('one', True), ('two', True), ('three', True)]
    """
    buffer = ""
    for text in stream:
        searched = max(0, len(buffer) - len(separator) + 1)  # without a separator
        buffer += text
        if separator and buffer.find(separator, searched) >= 0:
            *documents, buffer = buffer.split(separator)
            for document in documents:
                yield from split_stream([document], "", chunk_end)
        # The end of the buffer may be the beginning of a separator.
        while end := chunk_end(buffer, len(buffer) - len(separator) + 1):
            yield buffer[:end], False
            buffer = buffer[end:]
    yield from split_stream([buffer], "", chunk_end) if separator else [(buffer, True)]


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates, which JSON can contain and UTF-8 cannot, replaced by "?"."""
    return text.encode("utf-8", "replace").decode()


def json_text(text: str) -> str:
    r"""A text from JSON as if read from a file: with line ends as \n, without lone surrogates."""
    return replace_surrogates(text).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """The value of a JSON text; if it is invalid, the error, a ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"invalid JSON ({error})")


def has_records(path: Path, encoding: str) -> bool:
    """Whether a file has questions and answers: .json, .csv, .jsonl without the field "text"."""
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix != ".jsonl":
        return suffix in (".json", ".csv")
    stream = decode_blocks(read_blocks(path), path, encoding=encoding)
    lines = islice(split_stream(stream, "\n"), MAX_WITHOUT_TEXT)
    records = (parse_json(line) for line, _ in lines)
    return not any("text" in record for record in records if isinstance(record, dict))


def jsonl_texts(lines: Iterable[str], path: Path, text_field: str) -> Iterator[str]:
    """Yield the texts in the lines of a .jsonl file. Lines without text in the field are skipped,
    and their number is printed. Raises UserError if none of the first MAX_WITHOUT_TEXT lines, or
    of all, has text, and if a line is not JSON."""
    n_texts = n_skipped = first = 0
    names: list[str] = []  # of the fields with text in the first line that is skipped
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_json(line)
        if isinstance(record, ValueError):
            raise UserError(f"{path}, line {number}: {record}")
        fields = record if isinstance(record, dict) else {}
        if isinstance(fields.get(text_field), str):
            n_texts += 1
            yield json_text(fields[text_field])
            continue
        n_skipped += 1
        if n_skipped == 1:
            first, names = number, [name for name in fields if isinstance(fields[name], str)]
        if not n_texts and n_skipped == MAX_WITHOUT_TEXT:
            break
    if n_skipped and not n_texts:
        raise UserError(
            f"{path}, line {first}: no text in field {text_field!r} (fields with text: "
            f"{', '.join(names) or 'none'}): name another field with `python prepare.py {path} "
            "--text_field NAME`; questions and answers are used with train.py directly"
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
    chunk_end: ChunkEnd = lambda text, limit: 0,
    blocks: Iterable[bytes] | None = None,
    encoding: str = "utf-8",
) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a file: the text_field of each line of a .jsonl file, see
    `jsonl_texts`; otherwise the text between separators, which is the full text if separator is "".

    Yields (text, ends): `ends` tells whether the text is the end of its document. It is always True
    unless chunk_end divides long documents into chunks. bad_bytes: see `decode_blocks`. blocks: the
    file's bytes, if the caller reads them. Raises UserError, with the position, if the file is
    invalid.
    """
    separator = separator.replace("\\n", "\n")
    stream = decode_blocks(blocks or read_blocks(path), path, bad_bytes, encoding)
    if path.suffix.lower() != ".jsonl":
        yield from split_stream(stream, separator, chunk_end)
        return
    lines = (line for line, _ in split_stream(stream, "\n"))
    for text in jsonl_texts(lines, path, text_field):
        yield from split_stream([text], "", chunk_end)


def read_documents(path: Path, separator: str, encoding: str = "utf-8") -> list[str]:
    """The documents of a .jsonl file, or those between the separators of a text file, without blank
    ones and empty lines around a separator. Raises UserError without documents or separators."""
    found = iter_documents(path, separator=separator, encoding=encoding)
    texts = [text.strip("\n") if separator else text for text, _ in found]
    if separator and len(texts) == 1:
        raise UserError(
            f"the separator '{separator}' does not occur in {path}: change it or leave it out"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} has no documents: all of it is blank")
    return texts


def file_start(path: Path) -> bytes:
    """The first bytes of a file. Raises UserError if it cannot be read."""
    return next(read_blocks(path), b"")[:SNIFF_SIZE]


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The text files in a folder and its subfolders, without hidden ones; and those to skip, which
    are binary or .json. In the same order on every system."""
    names = {p: p.relative_to(folder).parts for p in folder.rglob("*") if p.is_file()}
    hidden = {path for path in names if any(name.startswith(".") for name in names[path])}
    texts: list[Path] = []
    skipped: list[Path] = []
    for path in sorted(names.keys() - hidden, key=names.__getitem__):
        start = file_start(path)
        binary = b"\0" in start and not start.startswith(UTF16_MARKS)  # UTF-16 is reported
        if binary or path.suffix.lower() == ".json":
            skipped.append(path)
        else:
            texts.append(path)
    return texts, skipped


def note_skipped(folder: Path, texts: Sequence[object], skipped: list[Path], kinds: str) -> None:
    """Print which files of a folder are not read. Raises UserError if no texts are left."""
    if not texts:
        raise UserError(f"there is no text in the folder {folder} ({len(skipped)} {kinds} files)")
    if skipped:
        names = ", ".join(sorted(path.name for path in skipped)[:3]) + ", ..." * (len(skipped) > 3)
        note(f"{folder}: skipping {len(skipped)} {kinds} files ({names})")


def read_folder(folder: Path, encoding: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """The documents in the text files of a folder, without blank ones. Skips files in another
    encoding or of questions and answers. Raises UserError if there are none, or too many."""
    files, skipped = text_files(folder)
    check_size(folder, sum(path.stat().st_size for path in files), tokenizer)
    texts: list[str] = []
    for path in files:
        try:
            if path.suffix.lower() == ".jsonl" and has_records(path, encoding):
                skipped.append(path)
                continue
            texts += [text for text, _ in iter_documents(path, encoding=encoding) if text.strip()]
        except NotTextError:
            skipped.append(path)
    note_skipped(folder, texts, skipped, f"binary, question or not {encoding.upper()}")
    return texts


def hash_to_unit(number: int, seed: int = SPLIT_SEED) -> float:
    """A pseudo-random number in [0, 1), a pure function of a document's number and the seed."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_validation(number: int, share: float = 0.1, seed: int = SPLIT_SEED) -> bool:
    """Whether the document of this number is in the validation split; the first never is."""
    return number > 0 and hash_to_unit(number, seed) < share


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """The training and the validation documents. Raises UserError for less than two documents."""
    if len(documents) < 2:
        raise UserError(
            "a corpus needs at least two documents or records, because one is held out, and this "
            f"one has {len(documents)}: add some, or train on all with --no-hold_out"
        )
    val = {i for i in range(len(documents)) if is_validation(i)} or {len(documents) - 1}
    return (
        [document for i, document in enumerate(documents) if i not in val],
        [document for i, document in enumerate(documents) if i in val],
    )


def special_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a special token. Raises UserError if the tokenizer does not have it."""
    if text not in tokenizer.specials:
        raise UserError(
            f"the tokenizer has no {text} token, which separates documents or records: a new model "
            "with --tokenizer bpe or char has it, and finetune.py --objective text or chat adds it"
        )
    return tokenizer.specials[text]


def check_known(tokenizer: Tokenizer, texts: Iterable[str], what: str) -> None:
    """Raise UserError if a character tokenizer would read characters of the texts as <UNK>."""
    known = getattr(tokenizer, "chars", None)
    if known and (unknown := sorted(set().union(*texts).difference(known))):
        names = " ".join(map(repr, unknown[:10])) + " ..." * (len(unknown) > 10)
        raise UserError(
            f"{what} has characters that the model does not know: {names}; remove them, or "
            "fine-tune the model on a text with them first"
        )


def build_corpus(
    ids: Sequence[list[np.ndarray]],
    texts: Sequence[list[str]],
    info: dict[str, Any],
    vocab_size: int,
    hold_out: bool,
) -> Corpus:
    """The corpus of encoded documents. ids and texts: the documents of the training and of the
    validation split, as ids (T,), which start with the same special token, and as text."""
    dtype = token_dtype(vocab_size)
    train_ids, val_ids = (np.concatenate(split).astype(dtype) for split in ids)
    if hold_out:
        train_texts = set(texts[0])
        note_shared(sum(text in train_texts for text in texts[1]), len(texts[1]))
    train_docs = np.cumsum([0] + [len(document) for document in ids[0][:-1]])
    info = info | {"documents": len(ids[0]) + hold_out * len(ids[1])}
    train_bytes, val_bytes = map(utf8_length, texts)
    return Corpus(
        train_ids, val_ids, info, train_bytes, val_bytes, train_docs, separator=int(train_ids[0])
    )


def load_documents(
    path: Path,
    kind: str,
    bpe_vocab_size: int,
    tokenizer: Tokenizer | None,
    hold_out: bool = True,
    separator: str = "",
    encoding: str = "utf-8",
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a .jsonl file, of a text file with separators, or of the texts in a folder."""
    if path.is_dir():
        documents = read_folder(path, encoding, tokenizer)
        # what identifies them, see `file_info`: not the names of the files
        sha256 = hashlib.sha256("".join(text + "\0" for text in documents).encode()).hexdigest()
        name = Path(os.path.realpath(path)).name
        info = {"name": name, "bytes": utf8_length(documents), "sha256": sha256}
    else:
        info = file_info(path)
        documents = read_documents(path, separator, encoding)
    texts = split_documents(documents) if hold_out else (documents, documents)
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, texts, (END_OF_TEXT,))
    first = special_id(tokenizer, END_OF_TEXT)
    ids = [[np.concatenate([[first], tokenizer.encode(text)]) for text in split] for split in texts]
    return tokenizer, build_corpus(ids, texts, info, tokenizer.vocab_size, hold_out)


def note_shared(n_shared: int, n_val: int) -> None:
    """Print how many validation documents are training documents too."""
    if n_shared:
        note(
            f"{n_shared:,} of {n_val:,} validation documents also occur in the training split, so "
            "the validation loss is too low: `python prepare.py --dedup` removes duplicates"
        )
