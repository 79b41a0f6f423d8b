"""A corpus to train on, from a text file, JSONL, question/answer JSON, a named corpus, or a folder
that prepare.py made.

A corpus is one text or several documents. One text is split at nine tenths of its characters;
documents go to one split or the other as wholes, drawn by number. In the token stream each
document begins with <|endoftext|>, a question/answer record with <BOS>.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tokenizer as tokenizers
from config import ENCODINGS, UserError
from qa import encode_record, read_records, record_text
from tokenizer import END_OF_TEXT, QA_SPECIALS, Tokenizer
from tracks import TRACKS, fetch, known_name
from utils import BLOCK_SIZE, Corpus, map_ids, read_text, text_blocks, whole_characters

IN_MEMORY = 1 << 28  # bytes: a larger corpus is for prepare.py
SPLIT_SEED = 1337


def load_corpus(
    data: str, kind: str, vocab_size: int, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, Corpus]:
    """The corpus that `data` names, and its tokenizer: the one given, or one of that kind (char,
    bpe with vocab_size, a tiktoken encoding), trained where it has to be.

    Raises UserError for a corpus that is not there, not readable or too large.
    """
    path = find_corpus(data)
    if path.is_dir():
        tokenizer, corpus = open_dataset(path, tokenizer)
    elif path.stat().st_size > IN_MEMORY:
        raise UserError(
            f"{path} has {path.stat().st_size / 1e6:,.0f} MB: run `python prepare.py {path} --name "
            "NAME` once, then give --data data/NAME"
        )
    elif path.suffix.lower() == ".json":
        tokenizer, corpus = load_records(path, kind, vocab_size, tokenizer)
    else:
        tokenizer, corpus = load_texts(path, kind, vocab_size, tokenizer)
    return tokenizer, corpus


def find_corpus(data: str) -> Path:
    """The file or folder of a corpus; a named one is fetched if it is not there."""
    path = Path(data)
    if data == "tinystories" and not path.exists():
        path = Path("data/tinystories")
        if not path.is_dir():
            raise UserError(
                "tinystories has 2 GB: run `python prepare.py tinystories` once, which fetches it"
            )
    elif data in TRACKS and not path.exists():
        path = fetch(data)["all"]
    if not path.exists():
        raise UserError(f"there is no {path}: give --data a file, a prepared folder, or a name")
    return path


def is_dataset(data: str) -> bool:
    """Whether `data` names a folder, which prepare.py should have made."""
    if data == "tinystories" and not Path(data).exists():
        return Path("data/tinystories").is_dir()
    return Path(data).is_dir()


def load_texts(
    path: Path, kind: str, vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a file: one text, or a .jsonl file's documents."""
    info: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    info = {"name": known_name(path, info["sha256"])} | info
    if path.suffix.lower() != ".jsonl":
        text = read_text(path)
        train, val = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        tokenizer = tokenizer or make_tokenizer(kind, vocab_size, [train], [val])
        ids = [smallest_ints(tokenizer.encode(part), tokenizer) for part in (train, val)]
        return tokenizer, Corpus(*ids, info, n_bytes([train]), n_bytes([val]))
    texts = [text for text, _ in documents(path) if text.strip()]
    train_texts, val_texts = split_documents(texts)
    specials = (END_OF_TEXT,)
    tokenizer = tokenizer or make_tokenizer(kind, vocab_size, train_texts, val_texts, specials)
    separator = tokenizer.specials.get(END_OF_TEXT)
    if separator is None:
        raise UserError(f"the tokenizer has no {END_OF_TEXT} to begin the documents of {path} with")

    def encode(text: str) -> np.ndarray:
        return np.concatenate([[separator], tokenizer.encode(text)])

    splits = [[encode(text) for text in split] for split in (train_texts, val_texts)]
    return tokenizer, join(splits, (train_texts, val_texts), tokenizer, info, separator)


def load_records(
    path: Path, kind: str, vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a question/answer file, a document a record."""
    info = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    train, val = split_records(read_records(path))
    texts = [[record_text(record) for record in split] for split in (train, val)]
    tokenizer = tokenizer or make_tokenizer(kind, vocab_size, *texts, QA_SPECIALS)
    splits = [[encode_record(tokenizer, record)[0] for record in split] for split in (train, val)]
    return tokenizer, join(splits, texts, tokenizer, info, tokenizer.specials["<BOS>"])


def join(
    splits: Sequence[list[np.ndarray]],
    texts: Sequence[list[str]],
    tokenizer: Tokenizer,
    info: dict[str, Any],
    separator: int,
) -> Corpus:
    """The corpus of the encoded documents of both splits."""
    train_ids, val_ids = (smallest_ints(np.concatenate(split), tokenizer) for split in splits)
    docs = np.cumsum([0] + [len(ids) for ids in splits[0][:-1]])
    info = info | {"documents": sum(map(len, splits))}
    return Corpus(train_ids, val_ids, info, *map(n_bytes, texts), docs, separator)


def n_bytes(texts: list[str]) -> int:
    """The length of texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def open_dataset(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, Corpus]:
    """The corpus in a folder that prepare.py made, through memory maps. Raises UserError where it
    is damaged, or its tokenizer is not the one given."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        own = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        train_ids, val_ids = (
            map_ids(token_files(folder, split), manifest["dtype"]) for split in ("train", "val")
        )
        docs = np.load(folder / "train_docs.npy", mmap_mode="r")
        found = [len(train_ids), len(val_ids)]
        wanted = [manifest["splits"][split]["tokens"] for split in ("train", "val")]
        if found != wanted:
            raise ValueError(f"{found} tokens where its manifest has {wanted}")
        info = {"name": manifest["name"], "sha256": manifest["sha256"]}
        info["bytes"] = sum(source["bytes"] for source in manifest["sources"])
        info["documents"] = sum(split["documents"] for split in manifest["splits"].values())
        sizes = [manifest["splits"][split]["bytes"] for split in ("train", "val")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/ is no data set that prepare.py made, or damaged ({error}): run "
            "`python prepare.py FILE ... --name NAME`, then give --data data/NAME"
        ) from None
    if tokenizer is not None and tokenizer.to_dict() != own:
        raise UserError(f"{folder}/ was made with another tokenizer than the checkpoint's")
    tokenizer = tokenizers.from_dict(own)
    separator = tokenizer.specials[END_OF_TEXT] if info["documents"] > 1 else None
    return tokenizer, Corpus(train_ids, val_ids, info, *sizes, docs, separator)


def token_files(folder: Path, split: str) -> list[Path]:
    """The files of a split's token ids, in order: train.bin, train_00001.bin and so on."""
    return [folder / f"{split}.bin", *sorted(folder.glob(f"{split}_*.bin"))]


# --- tokenizers and splits


def make_tokenizer(
    kind: str,
    vocab_size: int,
    train_texts: list[str],
    val_texts: list[str],
    specials: tuple[str, ...] = (),
) -> Tokenizer:
    """A tokenizer of the kind: characters of both splits, byte pairs learned from the training
    texts, or one of tiktoken's."""
    if kind in ENCODINGS:
        return tokenizers.from_tiktoken(kind)
    if kind == "char":
        return tokenizers.CharTokenizer.train(train_texts + val_texts, specials)
    counts = tokenizers.count_pieces(train_texts)
    first = [text for text in specials if text != END_OF_TEXT]
    return tokenizers.BPETokenizer.train(counts, vocab_size or 2000, first)


def smallest_ints(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids in the smallest integer type that holds the vocabulary."""
    return ids.astype(np.min_scalar_type(tokenizer.vocab_size - 1))


def draw(number: int, seed: int = SPLIT_SEED) -> float:
    """A random number in [0, 1) that depends on a document's number and the seed alone."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_validation(number: int, share: float = 0.1, seed: int = SPLIT_SEED) -> bool:
    """Whether a document is one to validate on; the first is not."""
    return number > 0 and draw(number, seed) < share


def split_documents(documents: list[Any]) -> tuple[list[Any], list[Any]]:
    """Documents to train and to validate on; of at least two, one at least is to validate on."""
    if len(documents) < 2:
        raise UserError(f"a corpus needs two documents at least, and this has {len(documents)}")
    val = [i for i in range(len(documents)) if is_validation(i)] or [len(documents) - 1]
    chosen = set(val)
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in val]


def split_records(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ...]:
    """Records to train and to validate on: those marked "held_out": true, else as documents."""
    val = [record for record in records if record.get("held_out") is True]
    if not 0 < len(val) < len(records):
        return split_documents(records)
    return [record for record in records if record.get("held_out") is not True], val


# --- files to documents


def documents(
    path: Path,
    text_field: str = "text",
    separator: str = "",
    bad_bytes: str = "strict",
    watch: Callable[[bytes], None] = lambda raw: None,
    part_size: int | None = None,
) -> Iterator[tuple[str, bool]]:
    """The documents of a file: a .jsonl file's records, or a text file cut at each separator (all
    of it, where there is none).

    Yields (text, whether the document ends with it): all True, except that a document of more than
    part_size characters comes in parts, cut at line ends. bad_bytes: what to do where the file is
    not UTF-8, "strict" or "replace". `watch` is given each block of bytes as it is read. Raises
    UserError for a file that cannot be read, with the place.
    """
    blocks = text_blocks(path, bad_bytes, watch)
    if path.suffix.lower() != ".jsonl":
        yield from cut(blocks, separator, part_size)
        return
    for number, (line, _) in enumerate(cut(blocks, "\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON ({error})") from None
        fields = record if isinstance(record, dict) else {}
        texts = {name: text for name, text in fields.items() if isinstance(text, str)}
        if text_field not in texts:
            names = ", ".join(texts) or "in no field"
            raise UserError(
                f"{path}, line {number}: no text in {text_field!r} (there is text in: {names}): "
                "give --text_field the name of the field"
            )
        yield from cut([whole_characters(texts[text_field])], "", part_size)


def cut(
    blocks: Iterable[str], separator: str, part_size: int | None = None
) -> Iterator[tuple[str, bool]]:
    r"""The pieces between separators of a text that comes in blocks, each with whether it ends
    there; longer ones than part_size in parts, at line ends where there are any.

    >>> list(cut(["one|t", "wo|three"], "|"))
    [('one', True), ('two', True), ('three', True)]
    >>> list(cut(["one\ntwo\n", "three"], "", part_size=6))
    [('one\n', False), ('two\n', False), ('three', True)]
    """
    buffer = ""
    for block in blocks:
        buffer += block
        if separator:
            *pieces, buffer = buffer.split(separator)
            for piece in pieces:
                yield piece, True
        while part_size and len(buffer) > part_size + len(separator):
            end = buffer.rfind("\n", part_size // 2, part_size) + 1 or part_size
            yield buffer[:end], False
            buffer = buffer[end:]
    yield buffer, True


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(BLOCK_SIZE):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
