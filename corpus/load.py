"""The corpus that a model is trained on: tokenized and split into training and validation ids.

It is loaded from a text file, a .jsonl file of documents, a .json file of question/answer records,
a named data set, or a folder made by prepare.py. A text is split at nine tenths of its characters,
unless a separator divides it into documents. Of several documents, each is assigned to one split,
pseudo-randomly, by its number. With --no-hold_out, both splits have everything. In the token stream
each document starts with <|endoftext|>, each record with <BOS>.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

import tokenizer as tokenizers
from config import ENCODINGS
from corpus.bpe import count_pieces, train_bpe
from corpus.download import DATASETS, fetch, known_name
from corpus.encodings import from_tiktoken
from corpus.files import (
    Shards,
    file_sha256,
    iter_documents,
    map_token_files,
    note,
    read_text,
    token_dtype,
    token_files,
)
from corpus.folder import read_manifest, verify
from corpus.records import Record, encode_record, read_records, record_text
from system.errors import first_line
from system.folders import restore_folder
from system.settings import UserError
from tokenizer import END_OF_TEXT, QA_SPECIALS, Tokenizer

if TYPE_CHECKING:  # prepare.py does not need torch
    from torch import Tensor

MAX_IN_MEMORY = 1 << 28  # bytes; larger files must be streamed, by prepare.py
SPLIT_SEED = 1337

Document = TypeVar("Document")


@dataclass
class Corpus:
    """The token ids of a training and a validation split, and where they come from."""

    train_ids: np.ndarray | Shards  # (tokens,), in the smallest type for the vocabulary
    val_ids: np.ndarray | Shards
    info: dict[str, Any]  # name, bytes and sha256; documents, except of a text without a separator
    train_bytes: int  # of the text, in UTF-8
    val_bytes: int
    train_docs: np.ndarray | None = None  # (documents,), where each starts in train_ids
    separator: int | None = None  # the id that starts each document, if there are several

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, in the validation split."""
        return self.val_bytes / len(self.val_ids)

    def document_numbers(self, x: "Tensor") -> "Tensor | None":
        """The number of each token's document within its window, (B, T), for a document mask; None
        if the corpus is one document."""
        return None if self.separator is None else (x == self.separator).cumsum(dim=1)


def check_length(corpus: Corpus, block_size: int) -> None:
    """Raise UserError if the training split is too short for one window and its targets (except if
    it has documents or records, which are padded), or if a split has nothing to predict."""
    n_train, n_val = len(corpus.train_ids), len(corpus.val_ids)
    too_short = n_train <= block_size and corpus.train_docs is None
    if too_short or min(n_train, n_val) < 2:
        raise UserError(
            f"the corpus is too short: {n_train} tokens to train and {n_val} to validate on, and a "
            f"window needs {block_size + 1}: use a longer text or a smaller --block_size"
        )


# --- splits


def hash_to_unit(number: int, seed: int = SPLIT_SEED) -> float:
    """A pseudo-random number in [0, 1), a pure function of a document's number and the seed."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_validation(number: int, share: float = 0.1, seed: int = SPLIT_SEED) -> bool:
    """Whether the document of this number is in the validation split; the first never is."""
    return number > 0 and hash_to_unit(number, seed) < share


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """The training and the validation documents, at least one of each. Raises UserError for less
    than two documents."""
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


def split_records(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The training and the validation records: those marked "held_out": true are for validation; if
    none or all are marked, they are split as documents are."""
    val = [record for record in records if record.get("held_out") is True]
    if not 0 < len(val) < len(records):
        return split_documents(records)
    return [record for record in records if record.get("held_out") is not True], val


# --- files to a corpus


def make_tokenizer(
    kind: str,
    bpe_vocab_size: int,
    texts: Sequence[list[str]],
    specials: tuple[str, ...] = (),
) -> Tokenizer:
    """A tokenizer for the texts of both splits: all their characters (char), byte pairs learned
    from the training split (bpe), or one of tiktoken's encodings."""
    train_texts, val_texts = texts
    if kind in ENCODINGS:
        return from_tiktoken(kind)
    if kind == "char":
        return tokenizers.CharTokenizer.train(train_texts + val_texts, specials)
    counts = count_pieces(train_texts)
    first_specials = [text for text in specials if text != END_OF_TEXT]  # train_bpe adds that one
    return train_bpe(counts, bpe_vocab_size, first_specials)


def utf8_length(texts: list[str]) -> int:
    """The total length of texts in UTF-8, in bytes."""
    return sum(len(text.encode()) for text in texts)


def file_info(path: Path) -> dict[str, Any]:
    """What identifies the text of a corpus, in checkpoints and logs."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def build_corpus(
    ids: Sequence[list[np.ndarray]],
    texts: Sequence[list[str]],
    info: dict[str, Any],
    separator: int,
    vocab_size: int,
    hold_out: bool,
) -> Corpus:
    """The corpus of encoded documents. ids and texts: the documents of the training and of the
    validation split, as ids (T,) and as text."""
    dtype = token_dtype(vocab_size)
    train_ids, val_ids = (np.concatenate(split).astype(dtype) for split in ids)
    if hold_out:
        train_texts = set(texts[0])
        note_shared(sum(text in train_texts for text in texts[1]), len(texts[1]))
    train_docs = np.cumsum([0] + [len(document) for document in ids[0][:-1]])
    info = info | {"documents": len(ids[0]) + hold_out * len(ids[1])}
    train_bytes, val_bytes = map(utf8_length, texts)
    return Corpus(train_ids, val_ids, info, train_bytes, val_bytes, train_docs, separator)


def load_text(
    path: Path, kind: str, bpe_vocab_size: int, tokenizer: Tokenizer | None, hold_out: bool = True
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a text file."""
    info = file_info(path)
    info["name"] = known_name(path, info["sha256"])
    text = read_text(path)
    note_end_of_text(path, text)
    boundary = len(text) * 9 // 10
    train, val = (text[:boundary], text[boundary:]) if hold_out else (text, text)
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, ([train], [val]))
    dtype = token_dtype(tokenizer.vocab_size)
    train_ids, val_ids = (tokenizer.encode(split).astype(dtype) for split in (train, val))
    return tokenizer, Corpus(train_ids, val_ids, info, utf8_length([train]), utf8_length([val]))


def load_documents(
    path: Path,
    kind: str,
    bpe_vocab_size: int,
    tokenizer: Tokenizer | None,
    hold_out: bool = True,
    separator: str = "",
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a .jsonl file, one document per line, or of a text file with separators."""
    info = file_info(path)
    documents = read_documents(path, separator)
    texts = split_documents(documents) if hold_out else (documents, documents)
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, texts, (END_OF_TEXT,))
    first_id = tokenizer.specials.get(END_OF_TEXT)
    if first_id is None:
        raise UserError(f"the tokenizer has no {END_OF_TEXT} to separate the documents of {path}")
    ids = [
        [np.concatenate([[first_id], tokenizer.encode(text)]) for text in split] for split in texts
    ]
    return tokenizer, build_corpus(ids, texts, info, first_id, tokenizer.vocab_size, hold_out)


def read_documents(path: Path, separator: str) -> list[str]:
    """The documents of a .jsonl file, or those between the separators of a text file; without blank
    ones, and without empty lines around a separator. Raises UserError if there are none, or no
    separator."""
    found = iter_documents(path, separator=separator)
    texts = [text.strip("\n") if separator else text for text, _ in found]
    if separator and len(texts) == 1:
        raise UserError(
            f"the separator {separator!r} does not occur in {path}: change it or leave it out"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} has no documents: all of it is blank")
    return texts


def load_records(
    path: Path, kind: str, bpe_vocab_size: int, tokenizer: Tokenizer | None, hold_out: bool = True
) -> tuple[Tokenizer, Corpus]:
    """The corpus of a file of question/answer records, each one a document."""
    info = file_info(path)
    records = read_records(path)
    splits = split_records(records) if hold_out else (records, records)
    if hold_out and tokenizer is None:  # a new run
        note(
            f"{len(splits[1])} of {len(records)} records are held out for validation: "
            "--no-hold_out trains on all"
        )
    texts = [[record_text(record) for record in split] for split in splits]
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, texts, QA_SPECIALS)
    ids = [[encode_record(tokenizer, record)[0] for record in split] for split in splits]
    return tokenizer, build_corpus(
        ids, texts, info, tokenizer.specials["<BOS>"], tokenizer.vocab_size, hold_out
    )


# --- notes


def note_end_of_text(path: Path, text: str) -> None:
    """Print how to make documents of a text that contains <|endoftext|>."""
    if END_OF_TEXT in text:
        note(
            f"{path} contains {END_OF_TEXT}, read as ordinary text: with --separator "
            f"'{END_OF_TEXT}' it starts a new document"
        )


def note_shared(n_shared: int, n_val: int) -> None:
    """Print how many validation documents are training documents too."""
    if n_shared:
        note(
            f"{n_shared:,} of {n_val:,} validation documents also occur in the training split, so "
            "the validation loss is too low: `python prepare.py --dedup` removes duplicates"
        )


# --- folders made by prepare.py


def is_dataset(data: str) -> bool:
    """Whether `data` is a folder, as prepare.py makes it, not a file."""
    if data == "tinystories" and not Path(data).exists():
        return Path("data/tinystories").is_dir()
    return Path(data).is_dir()


def open_dataset(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, Corpus]:
    """Open a data set made by prepare.py, through memory maps. Raises UserError if it is damaged
    (see `verify` in folder.py), or if its tokenizer differs from `tokenizer`."""
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest)
        tokenizer_dict = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        own_tokenizer = tokenizers.from_dict(tokenizer_dict)
        splits = [manifest["splits"][split] for split in ("train", "val")]
        train_ids, val_ids = (
            map_token_files(token_files(folder, split), manifest["dtype"])
            for split in ("train", "val")
        )
        lengths, expected = [len(train_ids), len(val_ids)], [split["tokens"] for split in splits]
        if lengths != expected:
            raise ValueError(f"{lengths} tokens, but the manifest says {expected}")
        info = {
            "name": manifest["name"],
            "sha256": manifest["sha256"],
            "bytes": sum(source["bytes"] for source in manifest["sources"]),
            "documents": sum(split["documents"] for split in splits),
        }
        train_bytes, val_bytes = (split["bytes"] for split in splits)
        train_docs = np.load(folder / "train_docs.npy", mmap_mode="r")
        separator = own_tokenizer.specials[END_OF_TEXT] if info["documents"] > 1 else None
        note_shared(manifest.get("shared_documents", 0), splits[1]["documents"])
    except MemoryError:
        raise
    except Exception as error:  # damage raises errors of many types
        raise UserError(
            f"{folder}/ is not a data set made by prepare.py, or is damaged "
            f"({first_line(error)[:200]}): run "
            "`python prepare.py FILE ... --name NAME`, then give --data data/NAME"
        ) from None
    if tokenizer is not None and tokenizer.to_dict() != tokenizer_dict:
        raise UserError(
            f"{folder}/ was made with another tokenizer than the checkpoint's: make it with "
            "`python prepare.py FILE ... --name NAME --tokenizer CHECKPOINT`"
        )
    corpus = Corpus(train_ids, val_ids, info, train_bytes, val_bytes, train_docs, separator)
    return own_tokenizer, corpus


# --- any corpus


def find_corpus(data: str) -> Path:
    """The path of a corpus; a named data set is downloaded if it does not exist. Raises UserError
    if there is no such corpus."""
    path = Path(data)
    restore_folder(path)
    if data == "tinystories" and not path.exists():
        path = Path("data/tinystories")
        if not path.is_dir():
            raise UserError(
                "tinystories has 2 GB: run `python prepare.py tinystories` once to download it"
            )
    elif data in DATASETS and not path.exists():
        path = fetch(data)["all"]
    if not path.exists():
        raise UserError(
            f"there is no {path}: give --data a file, a folder made by prepare.py, or one of "
            f"{', '.join(DATASETS)}"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a device or a pipe: give --data a file or a folder")
    return path


def load_corpus(
    data: str,
    kind: str = "char",
    bpe_vocab_size: int = 2000,
    tokenizer: Tokenizer | None = None,
    separator: str = "",
    hold_out: bool = True,
) -> tuple[Tokenizer, Corpus]:
    """Load the corpus `data`, a path or the name of a data set, and its tokenizer.

    If `tokenizer` is None, one is created: kind is "char", "bpe" (learned, with bpe_vocab_size
    tokens) or one of tiktoken's encodings. A folder made by prepare.py has its own tokenizer.
    separator: the text between the documents of a text file ("\\n" for a line end); "" if it is one
    document. hold_out: off puts the full text, or all documents, in both splits. Raises UserError
    if the corpus does not exist, is invalid or is too large.
    """
    path = find_corpus(data)
    suffix = path.suffix.lower()
    if separator and (path.is_dir() or suffix in (".json", ".jsonl")):
        raise UserError(f"--separator is for text files, and {path} is not one: leave it out")
    if path.is_dir() and not hold_out:
        raise UserError(f"--no-hold_out is for files, and {path}/ is split already: leave it out")
    if path.is_dir():
        return open_dataset(path, tokenizer)
    if path.stat().st_size > MAX_IN_MEMORY:
        same_tokenizer = " --tokenizer CHECKPOINT" if tokenizer else ""
        raise UserError(
            f"{path} has {path.stat().st_size / 1e6:,.0f} MB: run `python prepare.py {path} --name "
            f"NAME{same_tokenizer}` once, then give --data data/NAME"
        )
    if separator:
        separator = separator.replace("\\n", "\n")
        loaded = load_documents(path, kind, bpe_vocab_size, tokenizer, hold_out, separator)
    else:
        load = {".json": load_records, ".jsonl": load_documents}.get(suffix, load_text)
        loaded = load(path, kind, bpe_vocab_size, tokenizer, hold_out)
    if loaded[1].info["sha256"] != file_sha256(path):
        raise UserError(f"{path} changed while it was read: try again")
    return loaded


def training_corpus(tokenizer: Tokenizer, state: dict[str, Any]) -> Corpus:
    """The corpus that a checkpoint was trained on. Raises UserError if it is missing or has
    changed."""
    settings = state["train_config"]
    data = settings.get("data", "")
    if not data or not isinstance(data, str) or not state["corpus"]["sha256"]:
        raise UserError("the checkpoint does not name its corpus")
    hold_out, separator = settings.get("hold_out", True), settings.get("separator", "")
    _, corpus = load_corpus(data, tokenizer=tokenizer, separator=separator, hold_out=hold_out)
    if corpus.info["sha256"] != state["corpus"]["sha256"]:
        raise UserError(f"{data} is not what the checkpoint was trained on")
    return corpus
