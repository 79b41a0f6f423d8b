"""Is my change real? Train with and without it, with several seeds, and test the difference.

python -m experiments.compare --flags="--preset quick" --change="--lr_max 2e-2"
python -m experiments.compare --flags="--preset quick" --revision HEAD      my edits of the code
python -m experiments.compare --flags="--data my.txt" --change=--no-qk_norm --seeds 5

Both runs of a pair have the same seed, which sets the initial weights and the batches. The answer
is that of a paired t-test over the validation losses at 0.05: of twenty changes without any effect,
it calls about one real. Decide on the number of seeds beforehand: who adds seeds until the answer
pleases will be wrong more often.
"""

import contextlib
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from system.start import run

from tqdm import tqdm

from experiments.comparison import margin, mean, p_value
from experiments.speedrun import half_losses
from experiments.timing import ROOT, git
from system.command_line import parse_args
from system.settings import UserError, setting


@dataclass
class CompareConfig:
    flags: str = setting("--preset quick", "flags of train.py for all runs")
    change: str = setting("", "flags that the second run of each pair has too")
    revision: str = setting("", "git revision of the first run's code; default: as it is now")
    seeds: int = setting(8, "pairs of runs", low=2)
    minutes: float = setting(60.0, "begin no pair that would end after this time", above=0)

    def problems(self) -> list[str]:
        same = not (self.change or self.revision)
        return ["give --change, --revision, or both: what is compared?"] * same


@contextlib.contextmanager
def code_of(revision: str) -> Iterator[Path]:
    """A folder with the code of a revision; the project's own if it is empty."""
    if not revision:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        try:
            git("worktree", "add", "--detach", str(code), revision)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"git cannot check out {revision!r}: {error}") from None
        try:
            yield code
        finally:
            git("worktree", "remove", "--force", str(code))


def train_loss(code: Path, flags: list[str], seed: int) -> float:
    """The loss of a run of this code over the first half of the validation split, on which settings
    are chosen; infinite if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(code / "train.py"), *flags, f"--seed={seed}"]
        command.append(f"--out_dir={folder}")
        done = subprocess.run(command, capture_output=True, text=True)
        if "diverged" in done.stderr:
            return math.inf
        if done.returncode:
            raise UserError(f"train.py {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
        return half_losses(folder, record=False)["first_half"]


def answer(pairs: list[tuple[float, float]]) -> str:
    """One sentence: does the change lower or raise the loss?"""
    before, after = zip(*pairs, strict=True)
    n_diverged = [sum(map(math.isinf, losses)) for losses in (before, after)]
    if any(n_diverged):
        return "runs diverged: {} without and {} with the change".format(*n_diverged)
    differences = [b - a for a, b in pairs]
    center, half, p = mean(differences), margin(differences), p_value(differences)
    numbers = f"from {mean(before):.4f} to {mean(after):.4f}, by {center:+.4f}"
    if len(set(differences)) > 1:
        numbers += f" with a margin of {half:.4f} (95%), p = {p:.2g}"
    numbers += f"; {len(pairs)} pairs"
    if p < 0.05:
        return f"real: the change {'lowers' if center < 0 else 'raises'} the loss {numbers}"
    return f"not clear whether the change has an effect: the loss goes {numbers}"


def main(argv: list[str] | None = None) -> int:
    config = parse_args(CompareConfig, argv, __doc__)
    flags, pairs = shlex.split(config.flags), list[tuple[float, float]]()
    start = time.perf_counter()
    with code_of(config.revision) as old:
        for seed in tqdm(range(1, config.seeds + 1), unit="pair", disable=None):
            seconds = time.perf_counter() - start
            if len(pairs) > 1 and seconds * (1 + 1 / len(pairs)) > 60 * config.minutes:
                print(f"{len(pairs)} of {config.seeds} pairs fit in {config.minutes:g} minutes")
                break
            before = train_loss(old, flags, seed)
            after = train_loss(ROOT, flags + shlex.split(config.change), seed)
            pairs.append((before, after))
            tqdm.write(f"seed {seed}: {before:.4f}, with the change {after:.4f}")
    print(answer(pairs))
    return 0


if __name__ == "__main__":
    run(main)
