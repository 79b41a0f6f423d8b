"""Cleaning the documents of a data set: what prepare.py can remove, and how much it removed."""

import re
from dataclasses import dataclass, field, replace

from system.settings import setting

CHUNK_SIZE = 1 << 22  # characters: a longer document is processed in chunks of about this size

# Prose has such words too, so names must begin with a capital, and sentences are kept.
METADATA = (
    r"(?i)^\s*(\*\*\*\s?(start|end) of|"
    r"(title|author|translator|illustrator|editor|language|credits|source)\s*:\s*"
    r"(https?://|(?-i:[^a-z\s])(.*[^.!?\s])?\s*$)|"
    r"(release date|last updated|character set encoding|isbn|url)\s*:|"
    r"(produced|transcribed|scanned) by (?-i:[A-Z])|copyright,?\s+(by .*)?(\(c\)|©|\d{4})|"
    r"https?://\S+\s*$|\[illustration|page \d+\s*$)"
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
    metadata: bool = setting(False, "drop lines such as `Title: ...`, `Page 7`", group="cleaning")
    drop_lines: str = setting("", "a regular expression: drop the lines that it matches")
    whitespace: bool = setting(False, "drop whitespace at line ends and repeated empty lines")
    min_chars: int = setting(0, "drop documents with fewer characters", low=0)
    max_chars: int = setting(0, "drop documents with more; 0: no limit", low=0, high=CHUNK_SIZE)
    dedup: bool = setting(False, f"drop duplicate documents of up to {CHUNK_SIZE} characters")
    bad_bytes: str = setting("stop", "if a file is not UTF-8", choices=("stop", "replace"))

    @property
    def patterns(self) -> list[str]:
        return [METADATA] * self.metadata + [self.drop_lines] * bool(self.drop_lines)

    def problems(self) -> list[str]:
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
    return {step: RemovalStats() for step in STEPS}


@dataclass
class Chunk:
    """The text of a document, or a part of the text of a long one."""

    text: str
    first: bool  # starts its document
    last: bool  # ends its document
    split: str  # train or val
    number: int = 0  # of all chunks of the sources
    val_start: int = 0  # where the validation split starts in the cleaned text, if not at 0
    digest: bytes = b""  # of the cleaned text

    @property
    def complete(self) -> bool:
        return self.first and self.last

    def stripped(self, text: str) -> str:
        """A text of this chunk without empty lines at the start and the end of the document."""
        text = text.lstrip("\n") if self.first else text
        return text.rstrip("\n") if self.last else text


def is_unwanted(line: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, line) for pattern in patterns)


def chunk_end(text: str, limit: int, config: CleanConfig) -> int:
    """Where the first chunk of a text ends, from CHUNK_SIZE to `limit`; 0 if the text is a chunk.
    Cleaned, the chunks together are the cleaned text: they end before whitespace, or, if lines are
    dropped, at the end of a line that is kept."""
    border = re.compile(r"\n(?<=\S\n)" if config.patterns else r"\s(?<=\S\s)")
    for end in border.finditer(text, CHUNK_SIZE, limit):
        line = text[text.rfind("\n", 0, end.start()) + 1 : end.start()]
        if not is_unwanted(line, config.patterns):
            return end.start()
    return 0


def drop_lines(chunk: Chunk, patterns: list[str], removed: RemovalStats) -> str:
    """The text of a chunk without the lines in which one of the patterns is found."""
    lines = chunk.text.split("\n")
    start = 0 if chunk.first else 1  # a later chunk begins with the end of a line
    dropped = [line for line in lines[start:] if is_unwanted(line, patterns)]
    removed.add(len(dropped), *dropped[:2])
    unwanted = set(dropped)
    return "\n".join(lines[:start] + [line for line in lines[start:] if line not in unwanted])


def drop_whitespace(chunk: Chunk, removed: RemovalStats) -> str:
    """The text of a chunk without whitespace at line ends, more than one empty line in a row, and
    empty lines at the start and the end of the document."""
    text = chunk.text
    shorter = re.sub(r"[^\S\n]+$", "", text, flags=re.M)
    shorter = chunk.stripped(re.sub(r"\n{3,}", "\n\n", shorter))
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
    if config.patterns:
        chunk = replace(chunk, text=drop_lines(chunk, config.patterns, removed["metadata"]))
    text = drop_whitespace(chunk, removed["whitespace"]) if config.whitespace else chunk.text
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
