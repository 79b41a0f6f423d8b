"""Teach a Shakespeare model to prefer short speeches, by preferences, and measure what that does.

python experiments/short_speeches.py checkpoints/best.pt

Pairs a short and a long speech of the corpus, both after the same name, in
data/short_speeches.jsonl, runs finetune.py on them, and measures 100 speeches sampled before and
after.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune
import utils
from config import SampleConfig, limit_problems, parse_flags, raise_problems, run, setting
from corpora import find_corpus
from generate import sample_text


@dataclass
class SpeechesConfig:
    """What is taught to which model."""

    checkpoint: str = setting("checkpoints/best.pt", "a model of the plays", positional=True)
    pairs: int = setting(600, "pairs to learn from", low=2)
    short: int = setting(60, "characters that a chosen speech has at most", low=1)
    long: int = setting(110, "characters that a rejected speech has at least", low=1)
    seed: int = setting(1337, "of the pairs and the samples", low=0)


def make_pairs(text: str, config: SpeechesConfig) -> list[dict[str, str]]:
    """Pairs of a short and a long speech, both after the name of the short one's speaker."""
    speeches = [s.split(":\n", 1) for s in text.split("\n\n") if ":\n" in s]
    short = [(name, said) for name, said in speeches if len(said) <= config.short]
    long = [said for _, said in speeches if config.long <= len(said) <= config.long + 50]
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


def measure(path: Path, config: SpeechesConfig) -> tuple[float, list[str]]:
    """The mean length in characters of 100 speeches, at most 400 each, and three of them."""
    model, tokenizer, _ = utils.load_checkpoint(path, torch.device("cpu"))
    speeches = []
    for i, name in enumerate(("ROMEO", "KING RICHARD III", "First Citizen", "JULIET")):
        prompt = f"\n{name}:\n"
        settings = SampleConfig(
            prompt=prompt, num_samples=25, max_new_tokens=400, stop="\n\n", seed=config.seed + i
        )
        speeches += [text[len(prompt) :] for text in sample_text(model, tokenizer, settings)]
    return float(np.mean([len(speech) for speech in speeches])), speeches[:3]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, SpeechesConfig)
    config = SpeechesConfig(**flags)
    raise_problems(problems + limit_problems(config))
    base = Path(config.checkpoint)
    text = utils.read_text(find_corpus(utils.read_checkpoint(base)["train_config"]["data"]))
    pairs = Path("data/short_speeches.jsonl")
    with utils.atomic_write(pairs) as file:
        file.write("".join(json.dumps(p) + "\n" for p in make_pairs(text, config)).encode())
    words = [config.checkpoint, "--objective=dpo", f"--data={pairs}", "--tag=short", "--overwrite"]
    finetune.main(words)
    for path in (base, Path("checkpoints/short/best.pt")):
        length, samples = measure(path, config)
        print(f"\n{path}: {length:.0f} characters a speech; the first three:")
        print("\n--\n".join(samples))
    return 0


if __name__ == "__main__":
    run(main)
