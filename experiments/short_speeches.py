"""Teach a Shakespeare model by DPO to prefer short speeches, and measure the effect.

    python -m experiments.short_speeches checkpoints/best.pt

Writes pairs of a short and a long speech of the corpus, after the same speaker's name, to
data/short_speeches.jsonl, runs finetune.py on them, and compares the lengths of 100 speeches
sampled before and after.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import finetune
from config import SampleConfig
from corpus.load import find_corpus
from corpus.text import read_text
from generate import sample_text
from system.command_line import parse_args
from system.errors import run
from system.files import atomic_write
from system.settings import setting
from utils import load_checkpoint, read_checkpoint

PAIRS_FILE = Path("data/short_speeches.jsonl")
TAG = "short"  # of the fine-tuned run
SHORT = range(61)  # characters of a chosen speech
LONG = range(110, 161)  # of a rejected one
SPEAKERS = ("ROMEO", "KING RICHARD III", "First Citizen", "JULIET")


@dataclass
class SpeechesConfig:
    """The model to fine-tune, and the pairs."""

    checkpoint: str = setting("checkpoints/best.pt", "model trained on the plays", positional=True)
    pairs: int = setting(600, "number of training pairs", low=2)
    seed: int = setting(1337, "seed of the pairs and the samples", low=0)


def make_pairs(text: str, config: SpeechesConfig) -> list[dict[str, str]]:
    """Preference records: a short speech is preferred to a long one, both after the name of the
    short one's speaker."""
    speeches = [s.split(":\n", 1) for s in text.split("\n\n") if ":\n" in s]
    short = [(name, speech) for name, speech in speeches if len(speech) in SHORT]
    long = [speech for _, speech in speeches if len(speech) in LONG]
    rng = np.random.default_rng(config.seed)
    chosen = rng.permutation(len(short))[: config.pairs]
    rejected = rng.permutation(len(long))[: config.pairs]
    return [
        {
            "prompt": f"\n{short[i][0]}:\n",
            "chosen": f"{short[i][1]}\n\n",
            "rejected": f"{long[j]}\n\n",
        }
        for i, j in zip(chosen, rejected, strict=False)
    ]


def sample_speeches(path: Path, config: SpeechesConfig) -> list[str]:
    """Speeches by each speaker, sampled from a checkpoint."""
    model, tokenizer, _ = load_checkpoint(path, torch.device("cpu"))
    speeches = []
    for i, name in enumerate(SPEAKERS):
        prompt = f"\n{name}:\n"
        settings = SampleConfig(
            prompt=prompt, num_samples=25, max_new_tokens=400, stop="\n\n", seed=config.seed + i
        )
        speeches += [text[len(prompt) :] for text in sample_text(model, tokenizer, settings)]
    return speeches


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    config = parse_args(SpeechesConfig, argv, __doc__)
    base = Path(config.checkpoint)
    text = read_text(find_corpus(read_checkpoint(base)["train_config"]["data"]))
    with atomic_write(PAIRS_FILE) as file:
        for pair in make_pairs(text, config):
            file.write((json.dumps(pair) + "\n").encode())
    flags = ["--objective=dpo", f"--data={PAIRS_FILE}", f"--tag={TAG}", "--overwrite"]
    finetune.main([config.checkpoint, *flags])
    for path in (base, Path("checkpoints", TAG, "best.pt")):
        speeches = sample_speeches(path, config)
        length = np.mean([len(speech) for speech in speeches])
        print(f"\n{path}: {length:.0f} characters per speech; the first three:")
        print("\n--\n".join(speeches[:3]))
    return 0


if __name__ == "__main__":
    run(main)
