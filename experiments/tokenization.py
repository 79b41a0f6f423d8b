"""Characters, byte pairs or GPT-2's tokens? Bits per byte of models trained for the same time.

    python -m experiments.tokenization

A token of a larger vocabulary covers more text, so a window reaches further and a step reads more;
but the output layer grows with the vocabulary, and a step takes longer. The time per step is
measured first; then each tokenizer gets as many steps as fit into the same time.
"""

import math
from system.start import run

from corpus.bpe import from_tiktoken
from corpus.load import is_dataset
from experiments.comparison import Row, add_differences, mean, mean_columns, plot_seeds
from experiments.study import Study, kept, parse_study, val_losses
from system.settings import UserError
from training.plan import seconds_per_step
from training.setup import Flags
from viz.curve import COLORS, new_figure

SHARED: Flags = {"preset": "quick", "eval_windows": 32}
BPE_VOCAB_SIZES = (500, 2000)
SECONDS = 20.0  # of training per run
BASE = "characters"
EVALUATIONS = 6  # per run


def tokenizer_flags() -> dict[str, Flags]:
    """The flags of each tokenizer, by its name in the table; GPT-2's only if it can be loaded."""
    found: dict[str, Flags] = {BASE: {"tokenizer": "char"}}
    for size in BPE_VOCAB_SIZES:
        found[f"byte pairs, {size:,}"] = {"tokenizer": "bpe", "bpe_vocab_size": size}
    try:
        from_tiktoken("gpt2")
        found["GPT-2's"] = {"tokenizer": "gpt2"}
    except UserError as error:
        print(f"without GPT-2's tokenizer: {error}")
    return found


def steps_within(study: Study, name: str, flags: Flags) -> int:
    """How many steps fit into the time: measured once, then read from a file."""

    def measure() -> int:
        seconds = seconds_per_step(study.make_trainer(flags))
        return max(1, round(SECONDS / seconds))

    steps: int = kept(study.folder / f"{name}-steps.json", measure)
    return steps


def main(argv: list[str] | None = None) -> int:
    study = parse_study("tokenization", argv, __doc__, data="plays")
    if is_dataset(study.config.data):
        raise UserError(f"{study.config.data} already has a tokenizer: give --data a text")
    choices = tokenizer_flags()
    study.n_runs = len(choices) * study.config.seeds
    rows: list[Row] = []
    bits: dict[str, list[float]] = {}
    for name, choice in choices.items():
        tokenizer, corpus = study.corpus(choice)
        folder = f"{'-'.join(map(str, choice.values()))}-{SECONDS:g}s"
        flags = SHARED | choice
        steps = steps_within(study, folder, flags)
        flags |= {"max_steps": steps, "eval_every": math.ceil(steps / EVALUATIONS)}
        runs = study.with_seeds(folder, flags)
        bits[name] = [result["bpb"] for result in runs]
        rows.append(
            {
                "tokenizer": name,
                "vocabulary": tokenizer.vocab_size,
                "bytes per token": round(corpus.bytes_per_token, 2),
                "parameters": runs[0]["params"],
                "steps": steps,
                "seconds": mean([result["seconds"] for result in runs]),
                "loss per token": mean(val_losses(runs)),
                **mean_columns("bits per byte", bits[name]),
            }
        )
    tables = {"Tokenizers at equal time": add_differences(rows, bits.values())}
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    plot_seeds(axes, bits, COLORS)
    axes.set(xlabel="bits per byte, validation split")
    axes.set_title("At equal time: one dot per seed, bars: 95% interval")
    study.write_results(tables, figure)
    return 0


if __name__ == "__main__":
    run(main)
