"""Cleaning the documents of a data set: what prepare.py can remove, and how much it removed."""

import re
from dataclasses import dataclass, field, replace

from system.settings import setting

CHUNK_SIZE = 1 << 22  # characters: a longer document is processed in chunks of at most this size

METADATA = (
    r"(?i)^\s*(\*\*\*\s?(start|end) of|"
    r"(title|author|translator|illustrator|editor|release date|last updated|language|credits|"
    r"character set encoding|isbn|url|source)\s*:|"
    r"(produced|transcribed|scanned) by |copyright |https?://\S+\s*$|\[illustration|page \d+\s*$)"
)

# What each step removes, in their order. The keys are those of the manifest.
STEPS = {
    "metadata": "lines",
    "whitespace": "whitespace characters",
    "empty": "empty documents",
    "length": "documents outside the length limits",
    "duplicates": "duplicate documents",
}


@dataclass
class CleanConfig:
    """What is removed from the documents."""

    metadata: bool = setting(
        False, "drop lines such as `Title: ...` and `*** START OF ...`", group="cleaning"
    )
    drop_lines: str = setting("", "a regular expression: drop the lines that it matches")
    whitespace: bool = setting(
        False, "drop whitespace at line ends and more than one empty line in a row"
    )
    min_chars: int = setting(0, "drop documents with fewer characters", low=0)
    max_chars: int = setting(
        0, "drop documents with more characters; 0: no limit", low=0, high=CHUNK_SIZE
    )
    dedup: bool = setting(
        False, f"drop duplicate documents (except those of more than {CHUNK_SIZE} characters)"
    )
    bad_bytes: str = setting("stop", "if a file is not UTF-8", choices=("stop", "replace"))

    def problems(self) -> list[str]:
        """Invalid combinations of settings."""
        found = []
        if 0 < self.max_chars < self.min_chars:
            found.append(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        try:
            re.compile(self.drop_lines)
        except re.error as error:
            found.append(f"drop_lines is not a valid regular expression: {error}")
        return found


@dataclass
class RemovalStats:
    """How much a cleaning step removed, and up to two examples of it."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, *texts: str) -> None:
        """Count more removals, of which texts are examples."""
        self.merge(RemovalStats(count, [repr(text.strip()[:60]) for text in texts]))

    def merge(self, other: "RemovalStats") -> None:
        """Add the counts and examples of another batch."""
        self.count += other.count
        self.examples = (self.examples + other.examples)[:2]


def new_stats() -> dict[str, RemovalStats]:
    """Statistics of all steps, with nothing removed."""
    return {step: RemovalStats() for step in STEPS}


@dataclass
class Chunk:
    """The text of a document, or a part of the text of a long one."""

    text: str
    first: bool  # starts its document
    last: bool  # ends its document
    split: str  # train or val

    @property
    def complete(self) -> bool:
        """Whether this is a full document."""
        return self.first and self.last


def drop_lines(text: str, patterns: list[str], removed: RemovalStats) -> str:
    """The text without the lines in which one of the patterns is found."""
    lines = text.split("\n")
    dropped = [line for line in lines if any(re.search(pattern, line) for pattern in patterns)]
    removed.add(len(dropped), *dropped[:2])
    unwanted = set(dropped)
    return "\n".join(line for line in lines if line not in unwanted)


def drop_whitespace(text: str, complete: bool, removed: RemovalStats) -> str:
    """The text without whitespace at line ends and without more than one empty line in a row; that
    of a complete document also without empty lines at its start and end."""
    shorter = re.sub(r"[^\S\n]+$", "", text, flags=re.M)
    shorter = re.sub(r"\n{3,}", "\n\n", shorter)
    shorter = shorter.strip("\n") if complete else shorter
    if len(shorter) < len(text):
        changed = (line for line in text.split("\n") if line.strip() and line != line.rstrip())
        removed.add(len(text) - len(shorter), next(changed, shorter))
    return shorter


def clean(chunk: Chunk, config: CleanConfig, removed: dict[str, RemovalStats]) -> str | None:
    r"""The cleaned text of a chunk, or None if it is removed. Adds what was removed to `removed`.
    Duplicates are removed later, because they can be in different batches.

    >>> removed = new_stats()
    >>> config = CleanConfig(metadata=True, whitespace=True, min_chars=5)
    >>> clean(Chunk("Title: Emma\n\n\n\nA novel. \n", True, True, "train"), config, removed)
    'A novel.'
    >>> removed["metadata"]
    RemovalStats(count=1, examples=["'Title: Emma'"])
    """
    text = chunk.text
    patterns = [METADATA] * config.metadata + [config.drop_lines] * bool(config.drop_lines)
    if patterns:
        text = drop_lines(text, patterns, removed["metadata"])
    if config.whitespace:
        text = drop_whitespace(text, chunk.complete, removed["whitespace"])
    if chunk.complete and not text.strip():
        removed["empty"].add(1)
        return None
    # Only a complete document can be too short; a chunk of a longer one exceeds every max_chars.
    too_short = chunk.complete and len(text) < config.min_chars
    too_long = config.max_chars and (len(text) > config.max_chars or not chunk.complete)
    if too_short or too_long:
        removed["length"].add(int(chunk.first), text)
        return None
    return text


def clean_batch(
    batch: list[Chunk], config: CleanConfig, removed: dict[str, RemovalStats]
) -> list[Chunk]:
    """The chunks that are not removed, with their cleaned text; see `clean`."""
    texts = [clean(chunk, config, removed) for chunk in batch]
    pairs = zip(batch, texts, strict=True)
    return [replace(chunk, text=text) for chunk, text in pairs if text is not None]
