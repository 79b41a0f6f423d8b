"""Generations: each model learns a short text and the predictions of the model before it. Compared
with one model that trains longer than two of them together.

python -m experiments.teachers
"""

from pathlib import Path
from system.start import run

from experiments.comparison import Row, mean
from experiments.study import Runs, parse_study, write_variants
from training.setup import Flags

# With more weights than characters, ten times the usual weight decay (docs/settings.md).
SHARED: Flags = {"preset": "fast", "weight_decay": 1.0, "max_steps": 250, "eval_every": 50}
LONGER: Flags = {"max_steps": 590, "dropout": 0.2}  # without dropout it would overfit
SHARE = 0.1  # of the training text
GENERATIONS = 3


def main(argv: list[str] | None = None) -> int:
    study = parse_study("teachers", argv, __doc__)
    seeds = range(1, study.config.seeds + 1)
    study.n_runs = (1 + GENERATIONS) * len(seeds)
    runs: Runs = {"one longer run": study.with_seeds("longer", SHARED | LONGER, SHARE)}
    flags = [SHARED | {"seed": seed} for seed in seeds]
    for n in range(1, GENERATIONS + 1):
        generation = [study.make_run(f"{n}-{own['seed']}", own, SHARE) for own in flags]
        runs[f"generation {n}"] = generation
        folders = [Path(result["flags"]["out_dir"]) for result in generation]
        flags = [own | {"teacher": f"{f}/best.pt"} for own, f in zip(flags, folders, strict=True)]

    def columns(name: str) -> Row:
        seconds = round(mean([result["seconds"] for result in runs[name]]))
        return {"model": name, "steps": runs[name][0]["flags"]["max_steps"], "seconds": seconds}

    return write_variants(study, runs, columns, "Generations")


if __name__ == "__main__":
    run(main)
