"""Speed, measured side by side in one run, for machines are noisy and ratios less so.

python experiments/bench.py tokenizers --data data/plays.jsonl --vocab_size 10000
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizer as tokenizers
from config import UserError, from_dict, limit_problems, parse_flags, raise_problems, run, setting
from corpora import documents, find_corpus


@dataclass
class BenchConfig:
    """What is measured."""

    what: str = setting("tokenizers", "", choices=("tokenizers",), positional=True)
    data: str = setting("plays", "the text")
    vocab_size: int = setting(10_000, "tokens that byte-pair encoding learns", low=258)
    repeats: int = setting(3, "runs of each, of which the median counts", low=1)


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median time of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def bench_tokenizers(config: BenchConfig) -> str:
    """Training and encoding: ours, Hugging Face's `tokenizers` where it is installed, tiktoken's
    encoder with the vocabulary that ours learned."""
    path = find_corpus(config.data)
    texts = [text for text, _ in documents(path)]
    text = "\n".join(texts)

    def train() -> tokenizers.BPETokenizer:
        return tokenizers.BPETokenizer.train(tokenizers.count_pieces(texts), config.vocab_size)

    ours = train()
    ours.encode(text[:1000])
    rows = {
        "ours, train": train,
        "ours, encode": lambda: ours.encode(text),
        "tiktoken, encode": lambda: ours.encoding.encode_ordinary(text),
    }
    try:
        import tokenizers as hf

        theirs = hf.ByteLevelBPETokenizer()
        rows["Hugging Face, train"] = lambda: theirs.train_from_iterator(
            texts, config.vocab_size, show_progress=False
        )
        rows["Hugging Face, encode"] = lambda: theirs.encode(text)
    except ImportError:
        print("tokenizers is not installed: pip install tokenizers, to compare with it")
    lines = [f"{path}: {len(text.encode()) / 1e6:.2f} MB, {config.vocab_size} tokens"]
    # Hugging Face's trainer comes before its encoder, which takes what was learned.
    for name, function in rows.items():
        seconds = median_seconds(function, config.repeats)
        lines.append(f"{name:24}{seconds:8.2f} s{len(text.encode()) / 1e6 / seconds:10.1f} MB/s")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, BenchConfig)
    config = from_dict(BenchConfig, flags)
    raise_problems(problems + limit_problems(config))
    try:
        print({"tokenizers": bench_tokenizers}[config.what](config))
    except OSError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run(main)
