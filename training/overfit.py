"""A sanity check: a model that can learn overfits one batch."""

from typing import Any

from tqdm import tqdm


def overfit_batch(trainer: Any) -> int:
    """A sanity check that writes no files: train on one batch until its loss is below 0.01. Returns
    the exit status, 0 if that happens within max_steps."""
    with tqdm(total=trainer.config.max_steps, unit="step", leave=False, disable=None) as bar:
        while trainer.step < trainer.config.max_steps:
            loss = trainer.train_step()["loss"].item()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if loss < 0.01:
                print(f"one batch overfitted: loss {loss:.4f} at step {trainer.step}, as expected")
                return 0
    print(f"one batch could not be overfitted: loss {loss:.4f} after {trainer.step} steps")
    return 1
