"""From GPT-2's architecture to today's, one component at a time: what does each one gain?

python -m experiments.swaps
"""

from system.start import run

from experiments.study import parse_study, run_variants
from training.setup import Flags

SWAPS: dict[str, Flags] = {
    "GPT-2's architecture": {},
    "LayerNorm to RMSNorm": {"norm": "rmsnorm"},
    "GELU to ReLU": {"mlp": "relu"},
    "GELU to SiLU": {"mlp": "silu"},
    "GELU to ReLU squared": {"mlp": "relu2"},
    "GELU to SwiGLU": {"mlp": "swiglu"},  # about as many weights: its hidden width is 2/3
    "learned positions to sinusoidal": {"pos": "sinusoidal"},
    "learned positions to none": {"pos": "none"},
    "learned positions to RoPE": {"pos": "rope"},
    "QK-norm": {"qk_norm": True},
    "untied output layer": {"tie_weights": False},
    "no biases": {"bias": False},
    "post-norm": {"post_norm": True},
    "token shift": {"token_shift": True},
    "Qwen3's architecture": {"arch": "qwen3"},
    "Qwen3's architecture, token shift": {"arch": "qwen3", "token_shift": True},
}
SHARED: Flags = {"arch": "gpt2", "preset": "tiny", "n_layer": 3, "n_head": 4, "block_size": 96}
SHARED |= {"batch_size": 16, "max_steps": 400, "lr_max": 2e-3, "eval_every": 200, "compile": False}


def main(argv: list[str] | None = None) -> int:
    study = parse_study("swaps", argv, __doc__)
    return run_variants(study, SHARED, SWAPS, "One component at a time")


if __name__ == "__main__":
    run(main)
