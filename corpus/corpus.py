"""The corpus that a model is trained on: tokenized and split into training and validation ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tokenizer as tokenizers
from config import ENCODINGS
from system.settings import UserError
from tokenizer import END_OF_TEXT, Tokenizer

MAX_IN_MEMORY = 1 << 28  # bytes; more must be streamed, by prepare.py


@dataclass
class Corpus:
    """The token ids of a training and a validation split, and where they come from."""

    train_ids: np.ndarray  # (tokens,), in the smallest type for the vocabulary; perhaps on disk
    val_ids: np.ndarray
    info: dict[str, Any]  # name, bytes and sha256; documents, except of a text without a separator
    train_bytes: int  # of the text, in UTF-8
    val_bytes: int
    train_docs: np.ndarray | None = None  # (documents,), where each starts in train_ids
    separator: int | None = None  # the id that starts each document, if there are several

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, in the validation split."""
        return self.val_bytes / len(self.val_ids)

    def document_numbers(self, x: Any) -> Any:  # tensors: not imported, which takes seconds
        """Each token's document within its window, (B, T), for a mask; None for one document."""
        return None if self.separator is None else (x == self.separator).cumsum(dim=1)


def check_length(corpus: Corpus, block_size: int) -> None:
    """Raise UserError if the training split is too short for one window and its targets (except if
    it has documents or records, which are padded), or if a split has nothing to predict."""
    n_train, n_val = len(corpus.train_ids), len(corpus.val_ids)
    too_short = n_train <= block_size and corpus.train_docs is None
    if too_short or min(n_train, n_val) < 2:
        raise UserError(
            f"the corpus is too short: {n_train} tokens to train and {n_val} to validate on, and a "
            f"window needs {block_size + 1}: use a longer text, --separator for documents, or in "
            "train.py a smaller --block_size"
        )


def check_size(path: Path, n_bytes: int, tokenizer: Tokenizer | None) -> None:
    """Raise UserError if the texts of a file or folder are too large to be read into memory."""
    if n_bytes > MAX_IN_MEMORY:
        same_tokenizer = " --tokenizer CHECKPOINT" if tokenizer else ""
        raise UserError(
            f"{path} has {n_bytes / 1e6:,.0f} MB: run `python prepare.py {path} --name "
            f"NAME{same_tokenizer}` once, then give --data data/NAME"
        )


def make_tokenizer(
    kind: str, bpe_vocab_size: int, texts: Sequence[list[str]], specials: tuple[str, ...] = ()
) -> Tokenizer:
    """A tokenizer for the texts of both splits: all their characters (char), byte pairs learned
    from the training split (bpe), or one of tiktoken's encodings."""
    train_texts, val_texts = texts
    if kind == "char":
        return tokenizers.CharTokenizer.train(train_texts + val_texts, specials)
    from corpus import bpe  # only for byte pairs

    if kind in ENCODINGS:
        return bpe.from_tiktoken(kind)
    counts = bpe.count_pieces(train_texts)
    first_specials = [text for text in specials if text != END_OF_TEXT]  # train_bpe adds that one
    return bpe.train_bpe(counts, bpe_vocab_size, first_specials)


def utf8_length(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)
