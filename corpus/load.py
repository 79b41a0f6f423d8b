"""The corpus that a model is trained on: tokenized and split into training and validation ids.

It is loaded from a text file, a folder of them, a .jsonl file of documents, a file of
conversations, a named data set, or a data set made by prepare.py. A text is split at nine tenths of
its characters, unless a separator divides it into documents. The number of a document selects its
split, pseudo-randomly. With --no-hold_out, both splits have all. <|endoftext|> starts each
document, <BOS> each turn.
"""

from pathlib import Path
from typing import Any

from corpus.corpus import Corpus, check_size, make_tokenizer, utf8_length
from corpus.text import file_info, file_sha256, note_end_of_text, read_text, token_dtype
from system.settings import UserError
from tokenizer import Tokenizer


def load_text(
    path: Path,
    kind: str,
    bpe_vocab_size: int,
    tokenizer: Tokenizer | None,
    hold_out: bool = True,
    encoding: str = "utf-8",
) -> tuple[Tokenizer, Corpus]:
    info, text = file_info(path), read_text(path, encoding)
    note_end_of_text(path, text)
    boundary = len(text) * 9 // 10
    train, val = (text[:boundary], text[boundary:]) if hold_out else (text, text)
    tokenizer = tokenizer or make_tokenizer(kind, bpe_vocab_size, ([train], [val]))
    dtype = token_dtype(tokenizer.vocab_size)
    train_ids, val_ids = (tokenizer.encode(split).astype(dtype) for split in (train, val))
    return tokenizer, Corpus(train_ids, val_ids, info, utf8_length([train]), utf8_length([val]))


def local_path(data: str) -> Path:
    """The path of a corpus on disk; tinystories is a folder made by prepare.py."""
    named = data == "tinystories" and not Path(data).exists()
    return Path("data/tinystories" if named else data)


def is_dataset(data: str) -> bool:
    """Whether `data` is a folder made by prepare.py, not a file or a folder of texts."""
    return (local_path(data) / "manifest.json").is_file()


def find_corpus(data: str) -> Path:
    """The path of a corpus, downloaded if it has a name. Raises UserError if there is none."""
    path = local_path(data or "''")  # Path("") is the current folder
    if path.is_file() or path.is_dir():
        return path
    from corpus.download import DATASETS, fetch  # only for data that are not on disk
    from system.folders import restore_folder

    restore_folder(path)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a device or a pipe: give a file or a folder")
    if data == "tinystories":
        raise UserError(
            "tinystories has 2 GB: run `python prepare.py tinystories` once to download it"
        )
    if data in DATASETS:
        return fetch(data)["all"]
    raise UserError(f"there is no {path}: give a file, a folder, or one of {', '.join(DATASETS)}")


def load_corpus(
    data: str,
    kind: str = "char",
    bpe_vocab_size: int = 2000,
    tokenizer: Tokenizer | None = None,
    separator: str = "",
    hold_out: bool = True,
    encoding: str = "utf-8",
    skip_bad: bool = False,
) -> tuple[Tokenizer, Corpus]:
    """Load the corpus `data`, a path or the name of a data set, and its tokenizer.

    If `tokenizer` is None, one is created: kind is "char", "bpe" (learned, with bpe_vocab_size
    tokens) or one of tiktoken's encodings. A folder made by prepare.py has its own tokenizer.
    separator: the text between the documents of a text file ("\\n" for a line end); "" if it is one
    document. hold_out: off puts everything in both splits. skip_bad leaves out invalid records.
    Raises UserError if the corpus does not exist, is invalid or is too large.
    """
    path, records = find_corpus(data), False
    if path.suffix.lower() in (".json", ".jsonl", ".csv"):
        from corpus.documents import has_records  # only for such files

        records = has_records(path, encoding)
    if separator and (path.is_dir() or records or path.suffix.lower() == ".jsonl"):
        raise UserError(f"--separator is for text files, and {path} is not one: leave it out")
    if skip_bad and not records:
        raise UserError(f"--skip_bad is for questions and answers, not for {path}: leave it out")
    if encoding != "utf-8" and is_dataset(data):
        raise UserError(f"--encoding is for files of text, and {path}/ has token ids: leave it out")
    if is_dataset(data) and not hold_out:
        raise UserError(f"--no-hold_out is for files, and {path}/ is split already: leave it out")
    if is_dataset(data):
        from corpus.folder import open_dataset  # only for folders made by prepare.py

        return open_dataset(path, tokenizer)
    check_size(path, path.stat().st_size, tokenizer)
    options = (kind, bpe_vocab_size, tokenizer, hold_out)
    if records:
        from corpus.records import load_records  # only for questions and answers

        loaded = load_records(path, *options, skip_bad, encoding)
    elif separator or path.suffix.lower() == ".jsonl" or path.is_dir():
        from corpus.documents import load_documents  # only for several documents

        loaded = load_documents(path, *options, separator, encoding)
    else:
        loaded = load_text(path, *options, encoding)
    if path.is_file() and loaded[1].info["sha256"] != file_sha256(path):
        raise UserError(f"{path} changed while it was read: try again")
    return loaded


def training_corpus(tokenizer: Tokenizer, state: dict[str, Any]) -> Corpus:
    """The corpus of a checkpoint's run. Raises UserError if it is missing or has changed."""
    settings = state["train_config"]
    data = settings.get("data", "")
    if not data or not isinstance(data, str) or not state["corpus"]["sha256"]:
        raise UserError("the checkpoint does not name its corpus")
    own = {"separator", "hold_out", "encoding", "skip_bad"} & settings.keys()
    _, corpus = load_corpus(data, tokenizer=tokenizer, **{n: settings[n] for n in own})
    found, named = corpus.info, state["corpus"]  # questions must not load as text
    if found["sha256"] != named["sha256"] or "questions" in named.keys() - found.keys():
        raise UserError(f"{data} is not what the checkpoint was trained on")
    return corpus
