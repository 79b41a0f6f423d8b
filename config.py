"""All settings: of the model (GPTConfig), a training run (TrainConfig), the sampler (SampleConfig).

A setting is one line, `name: type = setting(default, help, limits)`. system/command_line.py makes
the flags and the text of --help from these lines, and all_problems the validation. A value comes
from the first of these that defines it: the flag, --arch, --preset, the default here.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from system.settings import from_dict, setting

fixed = partial(setting, fixed=True)  # it cannot change when a run is resumed
pretrain = partial(fixed, pretrain=True)  # nor has fine-tuning this flag
derived = partial(setting, 0, low=0)  # 0: GPTConfig computes it from the settings `of`
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
ENCODINGS = ("gpt2", "r50k_base", "cl100k_base", "o200k_base")  # of tiktoken
TEXT_ENCODINGS = ("utf-8", "cp1252", "mac_roman", "cp1250", "cp1251", "gb18030", "shift_jis")
TOKENIZERS = ("char", "bpe", *ENCODINGS)
PRESET_HELP = "auto: laptop on a CPU, medium on a GPU"
DEVICE_HELP = "cpu, cuda, cuda:1 or mps; auto: the fastest available"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer: what the command line, training, memory estimates and checkpoints need."""

    path: str  # of its class, which is imported when it is used
    averages: tuple[str, ...]  # states with the shape of the parameter
    scalars: tuple[str, ...] = ()  # smaller states
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class
    matrices_only: bool = False  # of the blocks; AdamW has the other parameters
    defaults: dict[str, Any] = field(default_factory=dict)  # settings, instead of the preset's
    adamw_lr: float | None = 1.0  # AdamW's best rate divided by its best; None: unrelated


OPTIMIZERS = {
    "adamw": OptimizerSpec(
        "torch.optim:AdamW",
        averages=("exp_avg", "exp_avg_sq"),
        scalars=("step",),
        options={"betas": (0.9, 0.95), "fused": True},
    ),
    "muon": OptimizerSpec(
        "training.muon:Muon",
        averages=("momentum_buffer",),
        scalars=("row_squares",),
        matrices_only=True,
        adamw_lr=0.5,
    ),
    "sgd": OptimizerSpec(
        "torch.optim:SGD",
        averages=("momentum_buffer",),
        options={"momentum": 0.9},
        # the best rate for the quick preset, from 0.01 to 3: SGD's updates are small
        defaults={"lr_max": 0.1, "weight_decay": 0.0},
        adamw_lr=None,
    ),
}
OPTIMIZER_HELP = "muon: matrices only, AdamW for the rest; sgd: for comparison, lr_max 0.1"

# name: layers, heads, channels, window, batch, steps, peak rate, dropout, steps between evaluations
PRESET_FIELDS: tuple[str, ...] = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
PRESET_FIELDS += ("max_steps", "lr_max", "dropout", "eval_every")
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(PRESET_FIELDS, row, strict=True))
    for name, row in {
        "laptop": (4, 4, 128, 256, 9, 2400, 4e-3, 0.0, 300),
        "tiny": (2, 2, 128, 128, 32, 3000, 3e-3, 0.0, 250),
        "small": (4, 4, 256, 256, 64, 5000, 2e-3, 0.1, 250),
        "medium": (6, 6, 384, 256, 16, 1800, 2e-3, 0.0, 300),
        "large": (8, 8, 512, 512, 64, 10000, 1e-3, 0.2, 500),
        "gpt2": (12, 12, 768, 1024, 32, 20000, 6e-4, 0.0, 500),
        "fast": (4, 2, 128, 256, 9, 1600, 6e-3, 0.0, 400),
        "quick": (2, 2, 128, 64, 24, 120, 1e-2, 0.0, 120),
        "baseline": (4, 4, 128, 64, 12, 2000, 1e-3, 0.0, 250),
    }.items()
}
# With more weights than characters in the text, 30 times the usual decay (Kim et al. 2025).
PRESETS["medium"] |= {"weight_decay": 3.0}
# Lowest loss in a given time on a CPU: there LayerNorm is one kernel and RMSNorm six operations,
# and a square is faster than a sigmoid. experiments/README.md has the effect of each.
FAST = {"optimizer": "muon", "schedule": "linear", "compile": False}
FAST |= {"norm": "layernorm", "mlp": "relu2", "token_shift": True}
PRESETS["fast"] |= FAST | {"grow_windows": True}
PRESETS["quick"] |= FAST
# nanoGPT's recipe for a CPU, for comparison
PRESETS["baseline"] |= {"arch": "gpt2", "precision": "float32", "compile": False, "lr_min": 1e-4}

# Each equals a Hugging Face architecture: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM.
ARCH_FIELDS = ("norm", "mlp", "pos", "qk_norm", "tie_weights", "bias", "post_norm", "token_shift")
ARCHS: dict[str, dict[str, Any]] = {
    name: dict(zip(ARCH_FIELDS, row, strict=True))
    for name, row in {
        "gpt2": ("layernorm", "gelu", "learned", False, True, True, False, False),
        "llama": ("rmsnorm", "swiglu", "rope", False, False, False, False, False),
        "qwen3": ("rmsnorm", "swiglu", "rope", True, True, False, False, False),
    }.items()
}


@dataclass
class GPTConfig:
    """The model. The defaults have GPT-2's vocabulary and today's usual components."""

    vocab_size: int = setting(50257, "token ids; the tokenizer's", low=1, flag=False)
    block_size: int = setting(256, "context window", low=1, group="sizes", alias="context_length")
    n_layer: int = setting(6, "number of blocks", low=1, alias="n_layers")
    n_head: int = derived(
        "attention heads; with another n_embd, or 0: n_embd / 64", of=("n_embd",), alias="n_heads"
    )
    n_embd: int = setting(384, "channels of the residual stream", low=1, alias="d_model")
    n_kv_head: int = derived("key/value heads (grouped-query attention); 0: n_head", of=("n_head",))
    head_size: int = derived("channels per head; 0: n_embd / n_head", of=("n_embd", "n_head"))
    n_inner: int = derived("hidden width of the MLP; 0: 4 or 8/3 n_embd", alias="d_ff",
                           of=("n_embd", "mlp"))  # fmt: skip
    dropout: float = setting(0.0, "dropout of embeddings and residual branches", low=0, below=1,
                             computes=False)  # fmt: skip
    norm: str = setting("rmsnorm", "", choices=("layernorm", "rmsnorm"), group="model components")
    mlp: str = setting("swiglu", "activation", choices=("gelu", "relu", "silu", "relu2", "swiglu"))
    pos: str = setting("rope", "positions", choices=("none", "learned", "sinusoidal", "rope"))
    post_norm: bool = setting(False, "post-norm: normalize after the residual addition")
    token_shift: bool = setting(False, "half of each layer's input comes from the previous token")
    qk_norm: bool = setting(True, "normalize queries and keys")
    tie_weights: bool = setting(True, "one matrix for token embedding and output layer")
    bias: bool = setting(False, "biases in linear layers and LayerNorms")
    norm_eps: float = derived("epsilon of the norms; 0: 1e-5, for rmsnorm 1e-6", of=("norm",))
    rope_theta: float = setting(1e4, "RoPE base frequency", above=0)

    def __post_init__(self) -> None:
        if not self.n_head:
            heads = range(max(1, self.n_embd // 64), 0, -1)  # RoPE needs an even head size
            self.n_head = next(h for h in heads if self.n_embd % (2 * h) == 0 or h == 1)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.norm_eps = self.norm_eps or (1e-6 if self.norm == "rmsnorm" else 1e-5)
        if not self.n_inner:  # 3 matrices of 8/3 C have as many weights as 2 of 4 C
            width = 8 / 3 if self.mlp == "swiglu" else 4
            self.n_inner = math.ceil(width * self.n_embd / 32) * 32  # hardware prefers multiples

    def beyond(self, known: Collection[str]) -> list[str]:
        """The settings that an export which represents only the `known` ones would lose: those that
        differ from their defaults, except what matters for training only."""
        computing = [f for f in fields(self) if f.metadata.get("computes", True)]
        return [f.name for f in computing
                if f.name not in known and getattr(self, f.name) != f.default]  # fmt: skip

    def problems(self) -> list[str]:
        if self.n_embd < 1 or self.n_head < 1:
            return []  # reported already, as values outside their limits
        found = []
        if self.head_size == self.n_embd // self.n_head and self.n_embd % self.n_head:
            found.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        elif self.pos == "rope" and self.head_size % 2:
            found.append(f"rope needs an even head size, not {self.head_size}")
        if self.n_head % self.n_kv_head:
            found.append(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            found.append(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if self.token_shift and self.n_embd % 2:
            found.append(f"token_shift needs an even n_embd, not {self.n_embd}")
        rows = (self.vocab_size, self.block_size, self.n_inner, self.n_head * self.head_size)
        if max(rows) * self.n_embd >= 2**58:  # PyTorch cannot count the bytes
            found.append("the sizes of the model are too large for any machine: use smaller ones")
        return found


@dataclass
class TrainConfig:
    """A training run."""

    data: str = setting("shakespeare", "file or folder, or shakespeare | plays | tinystories",
                        positional=True, group="run")  # fmt: skip
    preset: str = pretrain("auto", PRESET_HELP, choices=("auto", *PRESETS))
    arch: str = pretrain("", "components of a known architecture", choices=("", *ARCHS))
    tokenizer: str = pretrain("char", "characters, byte pairs, or tiktoken's", choices=TOKENIZERS)
    bpe_vocab_size: int = pretrain(2000, "size of a bpe vocabulary", low=257, alias="vocab_size")
    separator: str = fixed("", "text between documents of a file; \\n: newline; default: none")
    encoding: str = fixed("utf-8", "of a text file", choices=TEXT_ENCODINGS)
    hold_out: bool = fixed(True, "validate on a part that is not trained on; off: train on all")
    skip_bad: bool = fixed(False, "leave out invalid questions and answers, and count them")
    doc_mask: bool = setting(False, "let tokens attend only within their own document")
    out_dir: str = setting("checkpoints", "folder of runs")
    tag: str = setting("", "name of this run; its files go to OUT_DIR/TAG/")
    resume: bool = setting(False, "continue the run of this tag from latest.pt, to --max_steps")
    overwrite: bool = setting(False, "delete the run of this tag and start a new one")
    seed: int = fixed(1337, "seed of initial weights, batches and dropout", low=0)
    minutes: float | None = pretrain(None, "train the best run that fits in N minutes", above=0)
    plan: bool = pretrain(False, "print the best plans for 1 to 240 minutes, and exit")
    max_steps: int = setting(5000, "optimizer steps", low=1, group="training", alias="max_iters")
    batch_size: int = setting(64, "sequences per micro-batch", low=1)
    grad_accum: int = setting(1, "micro-batches per step, over all processes", low=1)
    lr_max: float = setting(1e-3, "peak learning rate", above=0, high=1e9, alias="learning_rate")
    lr_min: float = setting(0.0, "final learning rate", low=0)
    schedule: str = setting("cosine", "decay to lr_min", choices=("cosine", "linear"))
    warmup_steps: int | None = setting(
        None, "linear warmup; default: 100, or max_steps / 10 if less", low=0, alias="warmup"
    )
    weight_decay: float = fixed(0.1, "weight decay of matrices and embeddings", low=0)
    grad_clip: float = setting(1.0, "clip gradients to this norm; 0: no clipping", low=0)
    patience: int = setting(0, "stop after N evaluations without improvement; 0: never", low=0)
    grow_windows: bool = setting(False, "begin with windows of block_size / 4, then / 2: faster")
    optimizer: str = fixed("adamw", OPTIMIZER_HELP, choices=tuple(OPTIMIZERS))
    teacher: str = setting("", "checkpoints, CK,CK..., whose probabilities are learned too")
    teacher_share: float = fixed(0.5, "weight of their loss", low=0, high=1)
    teacher_temperature: float = fixed(1.0, "of all distributions in it", above=0)
    overfit_batch: bool = setting(False, "sanity check: train on one batch to a loss below 0.01")
    dry_run: bool = setting(False, "print what would be trained, write nothing, and exit")
    eval_every: int = setting(250, "steps between evaluations", low=1, group="evaluation and logs")
    eval_windows: int = setting(128, "windows per split and evaluation", low=1)
    log_every: int = setting(10, "steps between logged losses", low=1, alias="log_interval")
    sample_tokens: int = setting(200, "tokens of sample text; 0: none", low=0, high=100_000)
    save_every: int = setting(0, "also keep a checkpoint every N steps; 0: never", low=0)
    tensorboard: bool = setting(False, "also log to TensorBoard, in the run's folder")
    wandb: bool = setting(False, "also log to Weights & Biases")
    device: str = setting("auto", DEVICE_HELP, group="machine")
    precision: str = setting("auto", "auto: the fastest here", choices=PRECISIONS)
    compile: bool | None = setting(None, "torch.compile; default: if it is faster here")
    grad_checkpoint: bool = setting(False, "recompute activations in the backward pass")
    parallel: str = setting("ddp", "fsdp: shard the model", choices=("ddp", "fsdp"), pretrain=True)
    lr_scale: float = setting(1.0, "of a schedule that --minutes changed", above=0, flag=False)
    planned_steps: int = setting(0, "max_steps before --minutes changed it", low=0, flag=False)
    student_minutes: float = setting(0.0, "when its student must end, with --minutes", flag=False)
    precision_for: str = setting("", "type of device that auto chose it for", flag=False)

    def __post_init__(self) -> None:
        if self.warmup_steps is None:
            self.warmup_steps = min(100, self.max_steps // 10)

    def problems(self) -> list[str]:
        found = []
        if 0 < self.lr_max < self.lr_min:
            found.append(f"lr_min {self.lr_min:g} is above lr_max {self.lr_max:g}")
        if (self.warmup_steps or 0) > self.max_steps:
            found.append(f"warmup_steps {self.warmup_steps} is above max_steps {self.max_steps}")
        if self.resume and self.overwrite:
            found.append("--resume continues a run and --overwrite deletes it: give one of them")
        if self.tag.endswith(".") or set(self.tag) & set('/\\:*?"<>|'):  # Windows has no such names
            found.append(f"tag {self.tag!r} must be a plain name: paths belong in --out_dir")
        return found


@dataclass
class SampleConfig:
    """How text is sampled."""

    checkpoint: str = setting("", "the model; default: best.pt of the newest run", positional=True)
    prompt: str = setting("\n", "text to continue, or question to answer (\\n: newline, \\\\: "
                          "backslash)", escapes=True, group="sampling")  # fmt: skip
    prompt_file: str = setting("", "file with the prompt, read as it is")
    qa: bool = setting(True, "a model trained on questions answers the prompt; off: continues it")
    max_new_tokens: int = setting(500, "maximum number of new tokens", low=1, alias="max_tokens")
    num_samples: int = setting(1, "number of texts to generate, as one batch", low=1)
    temperature: float = setting(0.8, "higher: more varied; 0: always the most likely token", low=0)
    top_k: int = setting(0, "only the k most likely tokens; 0: all", low=0)
    top_p: float = setting(1.0, "nucleus sampling: only the most likely tokens with this total "
                           "probability; 1: all", above=0, high=1)  # fmt: skip
    min_p: float = setting(0.0, "only tokens with at least this fraction of the highest "
                           "probability; 0: all", low=0, below=1)  # fmt: skip
    repetition_penalty: float = setting(1.0, "above 1: less repetition", low=0.01, high=100)
    beams: int = setting(0, "beam search with this many beams, instead of sampling; 0: off", low=0)
    stop: str = setting("", "end the text before this string, or before one of several: 'A|B' "
                        "(\\n: newline, \\\\: backslash)", escapes=True)  # fmt: skip
    seed: int | None = setting(None, "same seed, same text; default: a new one, printed", low=0)
    stream: bool | None = setting(None, "print text as it is generated; default: on a terminal")
    output_file: str = setting("", "write to this file, below the command that reproduces it")
    device: str = setting("auto", DEVICE_HELP, group="machine")
    precision: str = setting("float32", "of the weights; lower ones need less memory",
                             choices=(*PRECISIONS[1:], "int8"))  # fmt: skip
    compile: bool = setting(False, "torch.compile: takes 15 seconds or more, then faster")
    cache: bool = setting(True, "keep a KV cache; off: recompute everything for each token")


def train_settings(flags: dict[str, Any], device_type: str) -> tuple[GPTConfig, TrainConfig]:
    """The settings of the model and of the run: the given flags, then --arch, then the preset, then
    the defaults. The device type selects the preset if none is named."""
    name = flags.get("preset", "auto")
    name = ("laptop" if device_type == "cpu" else "medium") if name == "auto" else name
    preset = PRESETS.get(name, {})
    if "optimizer" in flags and flags["optimizer"] in OPTIMIZERS:
        preset = preset | OPTIMIZERS[flags["optimizer"]].defaults
    arch = ARCHS.get(flags.get("arch", preset.get("arch", "")), {})
    values = preset | arch | flags | {"preset": name}
    if values.get("n_embd") != preset.get("n_embd") and "n_head" not in flags:
        values["n_head"] = 0  # the preset's heads belong to the preset's width
    return from_dict(GPTConfig, values), from_dict(TrainConfig, values)
