"""What each part of the fast preset contributes: it is trained without one part at a time.

python -m experiments.ablation

AdamW has the learning rate of the laptop preset, all other variants that of the fast preset. A rate
that is tuned for the variant could make a difference smaller.
"""

from system.start import run

from experiments.study import parse_study, run_variants
from training.setup import Flags

VARIANTS: dict[str, Flags] = {
    "fast": {},
    "AdamW instead of Muon": {"optimizer": "adamw", "lr_max": 4e-3},
    "cosine instead of linear decay": {"schedule": "cosine"},
    "no token shift": {"token_shift": False},
    "windows do not grow": {"grow_windows": False},
    "windows of 192, batch size 12": {"block_size": 192, "batch_size": 12},
    "RMSNorm instead of LayerNorm": {"norm": "rmsnorm"},
    "SwiGLU instead of squared ReLU": {"mlp": "swiglu"},
    "four heads instead of two": {"n_head": 4},
    "no QK-norm": {"qk_norm": False},
    "learning rate 4e-3 instead of 6e-3": {"lr_max": 4e-3},
    "learning rate 9e-3": {"lr_max": 9e-3},
    "weight decay 0 instead of 0.1": {"weight_decay": 0.0},
    "weight decay 0.3": {"weight_decay": 0.3},
}
SHARED: Flags = {"preset": "fast", "max_steps": 500, "eval_every": 500}


def main(argv: list[str] | None = None) -> int:
    study = parse_study("ablation", argv, __doc__)
    return run_variants(study, SHARED, VARIANTS, "Without one part of the fast preset")


if __name__ == "__main__":
    run(main)
