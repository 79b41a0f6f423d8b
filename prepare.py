"""Make a data set from any amount of text: cleaned, tokenized, split and written to disk.

    python prepare.py book.txt --tokenizer bpe --vocab_size 2000      one file, to data/book/
    python prepare.py letters/ --name letters --whitespace --dedup    all files in a folder
    python prepare.py posts.jsonl --text_field body --tokenizer gpt2
    python prepare.py new.txt --tokenizer checkpoints/best.pt         for finetune.py
    python prepare.py tinystories --stats                             a named data set
    python prepare.py --name letters --stats                          statistics of an existing one

A file is one document, unless --separator gives the text between documents; a .jsonl file has one
document per line, and lines without text are skipped and counted. Line ends become \\n, also those
inside JSON. Each document is in one split, training or validation. Cleaning steps are optional and
run in the order of their flags below. The data set, data/NAME/, consists of train.bin
and val.bin (token ids), train_docs.npy (where documents start), tokenizer.json and manifest.json.
Next: python train.py --data data/NAME
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any
from system.start import run

import numpy as np

from corpus.clean import STEPS, CleanConfig
from corpus.dataset import make_dataset
from corpus.documents import note_shared
from corpus.folder import is_dataset_file, open_dataset
from corpus.sources import DatasetConfig
from system.command_line import parse_args
from system.folders import check_replaceable, replacing
from system.settings import UserError


def summary(manifest: dict[str, Any]) -> str:
    """What was removed and what the data set contains, as text."""
    lines = []
    for step, removed in manifest["removed"].items():
        if removed["count"]:
            examples = ", e.g. " * bool(removed["examples"]) + " and ".join(removed["examples"])
            lines.append(f"removed: {removed['count']:,} {STEPS[step]}{examples}")
    for split, counts in manifest["splits"].items():
        n_tokens = max(counts["tokens"], 1)
        lines.append(
            f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['characters'] / n_tokens:.2f} characters and "
            f"{counts['bytes'] / n_tokens:.2f} bytes per token"
        )
    lines.append(f"vocabulary: {manifest['vocab_size']:,} tokens, {manifest['dtype']} on disk")
    return "\n".join(lines)


def statistics(folder: Path) -> str:
    """The lengths of documents, and the window and the size that suit them, as text."""
    _, corpus = open_dataset(folder)
    assert corpus.train_docs is not None
    n_tokens = len(corpus.train_ids)
    lengths = np.diff(np.append(corpus.train_docs, n_tokens))
    median, percentile_95 = (int(np.percentile(lengths, p)) for p in (50, 95))
    # The smallest power of two, from 64 to 1024, that is at least the 95th percentile
    block_size = min(max(64, 1 << (percentile_95 - 1).bit_length()), 1024)
    fitting = (lengths <= block_size).mean()
    packed = " (short ones are packed: see train.py's --doc_mask)" if median < block_size else ""
    return "\n".join(
        [
            f"documents: {len(lengths):,} for training; tokens per document: median {median:,}, "
            f"95th percentile {percentile_95:,}, longest {lengths.max():,}",
            f"window: --block_size {block_size} fits {fitting:.0%} of the documents{packed}",
            f"size: {n_tokens // 20:,} parameters make the best use of a training budget "
            "(Hoffmann et al. 2022); larger models read the text many times: try --weight_decay 1",
        ]
    )


def check_folder(folder: Path, config: DatasetConfig) -> None:
    """Raise UserError if the data set must not be written to the folder."""
    check_replaceable(folder, "prepare.py", "manifest.json", config.overwrite, is_dataset_file)
    for source in config.sources:
        path = Path(os.path.realpath(source))  # resolve() raises RuntimeError for a loop
        if Path(os.path.realpath(folder)) in (path, *path.parents):
            raise UserError(f"{folder}/ is a source itself: give another --name")


def main(argv: list[str] | None = None) -> int:
    config, cleaning = parse_args((DatasetConfig, CleanConfig), argv, __doc__)
    folder = Path("data", config.name)
    if not config.sources:
        if not (config.stats and config.name):
            raise UserError("give files, folders, or the name of a data set (see --help)")
        print(statistics(folder))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # to clean up
    with replacing(folder, "prepare.py", lambda: check_folder(folder, config)) as new:
        manifest = make_dataset(new, config, cleaning)
    print(summary(manifest))
    note_shared(manifest["shared_documents"], manifest["splits"]["val"]["documents"])
    if config.stats:
        print(statistics(folder))
    print(f"next: python train.py --data {folder}")
    return 0


if __name__ == "__main__":
    run(main)
