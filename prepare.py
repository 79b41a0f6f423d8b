"""Make a data set of any text, large or small: cleaned, tokenized, split, on disk.

    python prepare.py book.txt --tokenizer bpe --vocab_size 2000      data/book/ from one file
    python prepare.py letters/ --name letters --whitespace --dedup    from all files in a folder
    python prepare.py posts.jsonl --text_field body --tokenizer gpt2
    python prepare.py tinystories --stats                             a corpus known by name
    python prepare.py --name letters --stats                          look at one made before

A file is a document, unless --separator says what stands between documents; a .jsonl file has one
in each line. A document goes to training or to validation as a whole. Cleaning is by choice, in the
order of the flags below. The set, data/NAME/, has train.bin and val.bin (token ids; more than 268
million go on in train_00001.bin and so on), train_docs.npy (where documents begin), tokenizer.json
and manifest.json. Next: python train.py --data data/NAME
"""

import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import tokenizer as tokenizers
from config import (
    ENCODINGS,
    PRESETS,
    UserError,
    from_dict,
    limit_problems,
    parse_flags,
    raise_problems,
    run,
    setting,
    train_settings,
)
from corpora import (
    documents,
    draw,
    is_validation,
    make_tokenizer,
    open_dataset,
    token_files,
)
from model import GPT
from tokenizer import END_OF_TEXT, Tokenizer
from tracks import TRACKS, fetch
from utils import map_ids, whole_characters

PART_SIZE = 1 << 22  # characters: a longer document is handled in parts of about this size
BATCH_SIZE = 1 << 20  # characters that a worker gets at once
SAMPLE_SIZE = 1 << 27  # bytes of text, about, that a vocabulary is learned from
SHARD_SIZE = 1 << 28  # tokens in a file
ONE_PROCESS = 1 << 24  # bytes: a smaller corpus is done before other processes have started

METADATA = (
    r"(?i)^\s*(\*\*\*\s?(start|end) of|"
    r"(title|author|translator|illustrator|editor|release date|last updated|language|credits|"
    r"character set encoding|isbn|url|source)\s*:|"
    r"(produced|transcribed|scanned) by |copyright |https?://\S+\s*$|\[illustration|page \d+\s*$)"
)


@dataclass
class PrepareConfig:
    """How a data set is made."""

    sources: tuple[str, ...] = setting((), "files, folders, or " + " | ".join(TRACKS))
    name: str = setting("", "it becomes data/NAME; default: the source's name", group="data set")
    tokenizer: str = setting("bpe", "text to ids", choices=("char", "bpe", *ENCODINGS))
    vocab_size: int = setting(8192, "tokens that bpe learns", low=258)
    text_field: str = setting("text", "where a .jsonl record has its text")
    separator: str = setting(
        "", "what stands between the documents of a text file; \\n: a line end"
    )
    val_share: float = setting(0.1, "share of the documents to validate on", above=0, below=1)
    seed: int = setting(1337, "of the choice of these documents", low=0)
    overwrite: bool = setting(False, "replace a set of this name")
    metadata: bool = setting(
        False, "drop lines such as `Title: ...` and `*** START OF ...`", group="cleaning"
    )
    drop_lines: str = setting("", "a regular expression: drop the lines in which it is found")
    whitespace: bool = setting(False, "drop spaces at line ends, and all but one empty line")
    min_chars: int = setting(0, "drop shorter documents", low=0)
    max_chars: int = setting(0, "drop longer documents; 0: none", low=0)
    dedup: bool = setting(
        False, "drop documents equal to an earlier one (not those above 4 M characters)"
    )
    bad_bytes: str = setting("stop", "where text is not UTF-8", choices=("stop", "replace"))
    stats: bool = setting(False, "print lengths, and what window and preset fit", group="other")
    workers: int = setting(0, "processes; 0: one a core", low=0)

    def problems(self) -> list[str]:
        """What is wrong with these settings, a sentence each."""
        found = limit_problems(self)
        if 0 < self.max_chars < self.min_chars:
            found.append(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            found.append(f"name {self.name!r} must be a plain name: the set is data/NAME")
        if self.max_chars > PART_SIZE:
            found.append(f"max_chars must be at most {PART_SIZE}, not {self.max_chars}")
        found += [
            f"{s} holds records: give it to train.py as it is"
            for s in self.sources
            if s.lower().endswith(".json")
        ]
        try:
            re.compile(self.drop_lines)
        except re.error as error:
            found.append(f"drop_lines is no regular expression: {error}")
        return found


# --- cleaning


@dataclass
class Removed:
    """What a step of the cleaning took away, with two examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, *examples: str) -> None:
        """Count more of it."""
        self.count += count
        shown = [repr(text.strip()[:60]) for text in examples]
        self.examples = (self.examples + shown)[:2]


STEPS = {
    "metadata": "lines of metadata",
    "whitespace": "characters of white space",
    "empty": "empty documents",
    "length": "documents outside the range of lengths",
    "duplicates": "documents equal to an earlier one",
}


@dataclass
class Part:
    """A document, or a part of a long one, as text."""

    number: int  # of the document, over all sources
    text: str
    first: bool
    whole: bool
    split: str  # train or val


def clean(part: Part, config: PrepareConfig, removed: dict[str, Removed]) -> str | None:
    """The text of a part after all steps but the last (duplicates), or None if it goes; what goes
    is added to `removed`.

    >>> removed = {step: Removed() for step in STEPS}
    >>> config = PrepareConfig(metadata=True, whitespace=True, min_chars=5)
    >>> clean(Part(0, "Title: Emma\\n\\n\\n\\nA novel. \\n", True, True, "train"), config, removed)
    'A novel.'
    >>> removed["metadata"]
    Removed(count=1, examples=["'Title: Emma'"])
    """
    text = part.text
    patterns = [METADATA] * config.metadata + [config.drop_lines] * bool(config.drop_lines)
    if patterns:
        lines = text.split("\n")
        drop = [any(re.search(pattern, line) for pattern in patterns) for line in lines]
        if any(drop):
            dropped = [line for line, gone in zip(lines, drop, strict=True) if gone]
            removed["metadata"].add(len(dropped), *dropped[:2])
            text = "\n".join(line for line, gone in zip(lines, drop, strict=True) if not gone)
    if config.whitespace:
        before = text
        text = re.sub(r"[^\S\n]+$", "", text, flags=re.M)
        text = re.sub(r"\n{3,}", "\n\n", text)
        text = text.strip("\n") if part.whole else text
        if len(text) < len(before):
            changed = (a for a in before.split("\n") if a.strip() and a != a.rstrip())
            removed["whitespace"].add(len(before) - len(text), next(changed, text))
    if not text.strip() and part.whole:
        removed["empty"].add(1)
        return None
    too_long = config.max_chars and (len(text) > config.max_chars or not part.whole)
    if too_long or (part.whole and len(text) < config.min_chars):
        removed["length"].add(int(part.first), text)
        return None
    return text


# --- what the workers do: a batch of parts at a time


@dataclass
class Encoded:
    """A part as token ids, with what the manifest counts."""

    number: int
    ids: np.ndarray
    first: bool
    split: str
    chars: int
    bytes: int
    digest: bytes | None  # of a whole document
    start: str  # its first characters


@functools.lru_cache(maxsize=1)
def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, read once in each process."""
    return tokenizers.from_dict(json.loads(path.read_text(encoding="utf-8")))


def learn_batch(config: PrepareConfig, batch: list[Part]) -> Counter[str]:
    """The pieces, or the characters, in the cleaned text of a batch, with how often."""
    removed = {step: Removed() for step in STEPS}
    texts = [text for part in batch if (text := clean(part, config, removed)) is not None]
    if config.tokenizer == "char":
        return Counter(dict.fromkeys(set().union(*map(set, texts)), 1))
    return tokenizers.count_pieces(texts)


def encode_batch(
    config: PrepareConfig, tokenizer_path: Path, batch: list[Part]
) -> tuple[list[Encoded], dict[str, Removed]]:
    """A batch cleaned and encoded, and what the cleaning removed."""
    tokenizer = read_tokenizer(tokenizer_path)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    removed = {step: Removed() for step in STEPS}
    done = []
    for part in batch:
        text = clean(part, config, removed)
        if text is not None:
            raw = text.encode()
            digest = hashlib.blake2b(raw, digest_size=16).digest() if part.whole else None
            ids = tokenizer.encode(text).astype(dtype)
            counts = len(text), len(raw)
            done.append(
                Encoded(part.number, ids, part.first, part.split, *counts, digest, text[:60])
            )
    return done, removed


def watch_parent() -> None:
    """Set up a worker: it leaves Ctrl-C to its parent, and ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def bounded_map(
    function: Callable[[list[Part]], Any], batches: Iterable[list[Part]], workers: int
) -> Iterator[Any]:
    """function(batch) of each batch, in their order, in several processes; only as many batches are
    read ahead as keep them busy."""
    if workers < 2:
        yield from map(function, batches)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=watch_parent)
    try:
        running: deque[Future] = deque()
        for batch in batches:
            running.append(pool.submit(function, batch))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, for want of memory perhaps: try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- sources


def find_sources(config: PrepareConfig) -> list[tuple[Path, str]]:
    """The files to read, each with the split that its documents belong to, "" where they are to be
    split. Raises UserError for one that is not there or not readable."""
    found: list[tuple[Path, str]] = []
    for source in config.sources:
        path = Path(source)
        if source in TRACKS and not path.exists():
            files = fetch(source)
            found += [(file, "" if split == "all" else split) for split, file in files.items()]
        elif path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.is_file()]
            hidden = re.compile(r"(^|[/\\])\.")
            shown = [f for f in files if not hidden.search(str(f.relative_to(path)))]
            binary = {f for f in shown if is_binary(f)}
            if binary:
                names = ", ".join(sorted(f.name for f in binary)[:3])
                names += ", ..." * (len(binary) > 3)
                print(f"{source}: {len(binary)} binary files left out ({names})")
            if len(binary) == len(shown):
                raise UserError(f"there is no text file in the folder {source}")
            found += [(f, "") for f in shown if f not in binary]
        elif path.is_file():
            found.append((path, ""))
        else:
            raise UserError(f"there is no {source}: give files, folders, or {', '.join(TRACKS)}")
    for path, _ in found:
        if is_binary(path):
            raise UserError(f"{path} is a binary file: give text, or .jsonl")
    return found


def is_binary(path: Path) -> bool:
    """Whether a file begins as no text does. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(8192)
            return b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


class Reader:
    """Reads the sources, as often as it is asked to, and notes what it read."""

    def __init__(self, config: PrepareConfig, sources: list[tuple[Path, str]]):
        self.config, self.sources = config, sources
        self.total = sum(path.stat().st_size for path, _ in sources)
        self.read: list[dict[str, Any]] = []  # path, bytes, sha256 of each source

    def parts(self, title: str) -> Iterator[Part]:
        """All documents of all sources, the long ones in parts, with a progress bar."""
        config, number, self.read = self.config, 0, []
        errors = "strict" if config.bad_bytes == "stop" else "replace"
        stories = any(source == "tinystories" for source in config.sources)
        separator = config.separator.replace("\\n", "\n") or (END_OF_TEXT if stories else "")
        with tqdm(
            total=self.total, desc=title, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            for path, split in self.sources:
                digest, n_bytes = hashlib.sha256(), 0

                def watch(raw: bytes, digest: Any = digest) -> None:
                    nonlocal n_bytes
                    digest.update(raw)
                    n_bytes += len(raw)
                    bar.update(len(raw))

                first = True
                found = documents(path, config.text_field, separator, errors, watch, PART_SIZE)
                for text, ends in found:
                    text = text.strip("\n") if separator and first and ends else text
                    drawn = is_validation(number, config.val_share, config.seed)
                    own_split = split or ("val" if drawn else "train")
                    yield Part(number, text, first, first and ends, own_split)
                    blank = first and ends and not text.strip()  # does not count as a document
                    number, first = number + (ends and not blank), ends
                record = {
                    "path": whole_characters(str(path)),
                    "bytes": n_bytes,
                    "sha256": digest.hexdigest(),
                }
                self.read.append(record)

    def batches(self, title: str, share: float = 1.0) -> Iterator[list[Part]]:
        """The parts in batches of about BATCH_SIZE characters; or a share of them, drawn."""
        batch: list[Part] = []
        size = 0
        for i, part in enumerate(self.parts(title)):
            if share < 1 and draw(i, self.config.seed + 1) >= share:
                continue
            batch.append(part)
            size += len(part.text) + 100
            if size >= BATCH_SIZE:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


# --- the data set


def learn_tokenizer(config: PrepareConfig, reader: Reader, workers: int) -> Tokenizer:
    """The tokenizer of the set: tiktoken's, or one learned from the documents: byte pairs from
    those to train on, of a large corpus a sample; characters from all."""
    if config.tokenizer in ENCODINGS:
        return make_tokenizer(config.tokenizer, 0, [], [])
    counts: Counter[str] = Counter()
    chars = config.tokenizer == "char"
    share = 1.0 if chars else SAMPLE_SIZE / max(reader.total, 1)
    batches = reader.batches("learning the vocabulary", share)
    wanted = ([part for part in batch if chars or part.split == "train"] for batch in batches)
    for found in bounded_map(functools.partial(learn_batch, config), wanted, workers):
        counts.update(found)
    if not counts:
        raise UserError(
            "no text is left to learn from: the sources are empty, or cleaned away, or all drawn "
            "for validation (then try another --seed)"
        )
    if chars:
        return tokenizers.CharTokenizer(sorted(counts), (END_OF_TEXT,))
    return tokenizers.BPETokenizer.train(counts, config.vocab_size)


class Writer:
    """Writes the token files of a set and counts what goes into them."""

    def __init__(self, folder: Path, separator: int, dtype: np.dtype):
        self.folder, self.separator, self.dtype = folder, separator, dtype
        self.files: dict[str, BinaryIO] = {}  # the last of each split
        self.starts = {"train": array("q"), "val": array("q")}  # where the documents begin
        keys = ("documents", "tokens", "characters", "bytes")
        self.counts = {split: dict.fromkeys(keys, 0) for split in self.starts}
        self.seen: set[bytes] = set()
        for split in self.starts:
            self.begin_file(split, f"{split}.bin")

    def begin_file(self, split: str, name: str) -> None:
        """Begin another file of a split."""
        if split in self.files:
            self.close(split)
        self.files[split] = open(self.folder / name, "wb")  # noqa: SIM115 (`close` closes it)

    def close(self, split: str) -> None:
        """Have the last file of a split on the disk."""
        self.files[split].flush()
        os.fsync(self.files[split].fileno())
        self.files[split].close()

    def append(self, split: str, ids: np.ndarray) -> None:
        """Write ids behind those of a split, into further files as they get full."""
        counts = self.counts[split]
        while len(ids):
            number, filled = divmod(counts["tokens"], SHARD_SIZE)
            if number and not filled:
                self.begin_file(split, f"{split}_{number:05d}.bin")
            room = SHARD_SIZE - filled
            block, ids = ids[:room], ids[room:]
            self.files[split].write(block.tobytes())
            counts["tokens"] += len(block)

    def write(self, part: Encoded) -> None:
        """Append a part to its split, the first of a document after a separator."""
        counts, ids = self.counts[part.split], part.ids
        if part.first:
            ids = np.concatenate([np.array([self.separator], dtype=self.dtype), ids])
            self.starts[part.split].append(counts["tokens"])
            counts["documents"] += 1
        self.append(part.split, ids)
        counts["characters"] += part.chars
        counts["bytes"] += part.bytes

    def finish(self, tokenizer: Tokenizer) -> None:
        """Close the files, after making sure that there is something to validate on."""
        self.close("train")
        if not self.counts["val"]["tokens"] and self.counts["train"]["tokens"]:
            self.move_last(tokenizer)
        self.close("val")
        np.save(self.folder / "train_docs.npy", np.array(self.starts["train"], dtype=np.int64))

    def move_last(self, tokenizer: Tokenizer) -> None:
        """Move the last document to validation; of a corpus that is one document, its last tenth,
        which is the only case where a document is split."""
        train, val = self.counts["train"], self.counts["val"]
        files = token_files(self.folder, "train")
        ids = map_ids(files, str(self.dtype))
        n_documents = int(train["documents"] > 1)
        start = self.starts["train"].pop() if n_documents else len(ids) * 9 // 10
        moved = {"documents": n_documents, "characters": 0, "bytes": 0}
        for first in range(start, len(ids), BATCH_SIZE):
            block = ids[first : first + BATCH_SIZE]
            self.append("val", block)
            raw = tokenizer.decode_bytes(block[block != self.separator].tolist())
            moved["bytes"] += len(raw)
            moved["characters"] += sum(b & 0xC0 != 0x80 for b in raw)  # the rest go on with one
        del ids, block  # Windows cuts no file that is mapped
        for number, file in enumerate(files):
            if left := max(start - number * SHARD_SIZE, 0):
                os.truncate(file, min(left, SHARD_SIZE) * self.dtype.itemsize)
            else:
                file.unlink()
        train["tokens"] = start
        for key, count in moved.items():
            train[key] -= count
            val[key] += count
        if n_documents:
            print(f"few documents: the last one, {val['tokens']:,} tokens, is to validate on")
        else:
            print("the corpus is one document: its last tenth is to validate on")


def make_set(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write the data set of the sources into an empty folder. Returns its manifest."""
    sources = find_sources(config)
    reader = Reader(config, sources)
    workers = config.workers or os.cpu_count() or 1
    workers = 1 if reader.total < ONE_PROCESS else workers
    tokenizer = learn_tokenizer(config, reader, workers)
    read_tokenizer.cache_clear()
    (folder / "tokenizer.json").write_bytes(tokenizers.to_json(tokenizer))
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    writer = Writer(folder, tokenizer.specials[END_OF_TEXT], dtype)
    removed = {step: Removed() for step in STEPS}
    encode = functools.partial(encode_batch, config, folder / "tokenizer.json")
    for parts, batch_removed in bounded_map(encode, reader.batches("encoding"), workers):
        for step, what in batch_removed.items():
            removed[step].count += what.count
            removed[step].examples = (removed[step].examples + what.examples)[:2]
        for part in parts:
            if config.dedup and part.digest in writer.seen:
                removed["duplicates"].add(1, part.start)
                continue
            if config.dedup and part.digest:
                writer.seen.add(part.digest)
            writer.write(part)
    writer.finish(tokenizer)
    if not writer.counts["train"]["tokens"]:
        raise UserError("no text is left to train on: the sources are empty, or cleaned away")
    return {
        "name": config.name,
        "sources": reader.read,
        "settings": asdict(config),
        "removed": {step: asdict(what) for step, what in removed.items()},
        "splits": writer.counts,
        "vocab_size": tokenizer.vocab_size,
        "dtype": str(dtype),
        "sha256": hash_files(*token_files(folder, "train"), *token_files(folder, "val")),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tiktoken": tiktoken.__version__,
        },
    }


def hash_files(*paths: Path) -> str:
    """The hash of the contents of several files together."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(BATCH_SIZE):
                digest.update(block)
    return digest.hexdigest()


def describe(manifest: dict[str, Any]) -> str:
    """What was removed and what there is, for people."""
    lines = []
    for step, what in manifest["removed"].items():
        if what["count"]:
            examples = "".join(
                f", e.g. {' and '.join(what['examples'])}" for _ in what["examples"][:1]
            )
            lines.append(f"removed: {what['count']:,} {STEPS[step]}{examples}")
    for split, counts in manifest["splits"].items():
        tokens = max(counts["tokens"], 1)
        lines.append(
            f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens of "
            f"{counts['characters'] / tokens:.2f} characters, {counts['bytes'] / tokens:.2f} bytes"
        )
    lines.append(f"vocabulary: {manifest['vocab_size']:,} tokens, {manifest['dtype']} on disk")
    return "\n".join(lines)


# --- statistics


def statistics(folder: Path) -> str:
    """The lengths of a set's documents, the window that fits them, and how many tokens there are
    for each parameter of the presets; as text."""
    tokenizer, corpus = open_dataset(folder)
    lengths = np.diff(np.append(corpus.train_docs, len(corpus.train_ids)))
    median, long = (int(np.percentile(lengths, p)) for p in (50, 95))
    window = suggest_block_size(long)
    whole = (lengths <= window).mean()
    lines = [
        f"documents: {len(lengths):,} to train on; tokens in one: median {median:,}, 95th "
        f"percentile {long:,}, longest {lengths.max():,}",
        f"window: --block_size {window} takes {whole:.0%} of the documents whole"
        + (" (packed: see train.py's --doc_mask)" if median < window else ""),
        "tokens a parameter (20 make the best use of a training budget, Hoffmann et al. 2022):",
    ]
    ratios = {}
    for name in [
        name for name in PRESETS if name not in ("quick", "baseline")
    ]:  # of the same sizes as others
        gpt, _ = train_settings({"preset": name, "vocab_size": tokenizer.vocab_size}, "cpu")
        with torch.device("meta"):
            n_params = GPT(gpt).num_params()
        ratios[name] = len(corpus.train_ids) / n_params
        lines.append(f"    {name:8}{n_params / 1e6:8.2f} M parameters{ratios[name]:10.2f}")
    fitting = [name for name, ratio in ratios.items() if ratio >= 20]
    if fitting:
        lines.append(f"{min(fitting, key=ratios.get)} is the largest preset that this corpus feeds")
    else:
        name = max(ratios, key=ratios.get)
        lines.append(
            f"little text: even {name} will see it many times; watch the validation loss, and try "
            "--dropout"
        )
    return "\n".join(lines)


def suggest_block_size(length: int) -> int:
    """The power of two, of 64 to 1024, that a document of so many tokens fits in.

    >>> [suggest_block_size(n) for n in (10, 128, 129, 9999)]
    [64, 128, 256, 1024]
    """
    return min(max(64, 1 << (length - 1).bit_length()), 1024)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a folder in the place of another, which is there until the new one is."""
    old = new.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, PrepareConfig)
    config = from_dict(PrepareConfig, flags)
    if config.sources and not config.name:
        config.name = re.sub(r"[^\w.-]", "_", Path(config.sources[0]).resolve().stem)
    problems += config.problems()
    if not config.sources and not (config.stats and config.name):
        problems.append("give files, folders, or the name of a corpus (see --help)")
    raise_problems(problems)
    folder = Path("data", config.name)
    if not config.sources:
        print(statistics(folder))
        return 0
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is there, but no data set: give the set another --name")
    if folder.exists() and not config.overwrite:
        raise UserError(f"{folder}/ exists: --overwrite it, or give the set another --name")
    if any(
        folder.resolve() in (p := Path(s).resolve()).parents or p == folder.resolve()
        for s in config.sources
    ):
        raise UserError(f"{folder}/ is a source itself: give the set another --name")
    part = folder.with_name(f".{config.name}.part")  # a run that was killed may have left one
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        manifest = make_set(config, part)
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (part / "manifest.json").write_bytes(text.encode("utf-8", "replace"))
        replace_folder(part, folder)
    except OSError as error:
        raise UserError(f"{folder}/ could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(describe(manifest))
    if config.stats:
        print(statistics(folder))
    print(f"next: python train.py --data {folder}")
    return 0


if __name__ == "__main__":
    run(main)
