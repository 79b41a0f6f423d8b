"""Every setting there is: the model's (GPTConfig), the run's (TrainConfig), the sampler's
(SampleConfig).

A setting is one line, `name: type = setting(default, help, limits)`. The command line's flags, the
text of --help and the checks are all made from these lines. A value is taken from the first of
these that has it: the flag, --arch, --preset, the default here.
"""

import argparse
import difflib
import importlib.util
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any

MISSING = "\0"  # stands on the command line where a flag's value should
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
ENCODINGS = ("gpt2", "r50k_base", "cl100k_base", "o200k_base")  # of tiktoken


class UserError(Exception):
    """A mistake that the user can mend; its text says what is wrong and what to do."""


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text and its limits.

    Limits are low and high (allowed themselves), above and below (not allowed themselves), choices.
    `group` begins a heading in --help; `positional=True` also takes it without its flag. A tuple
    takes all the positional arguments, and has no flag.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class GPTConfig:
    """The model."""

    vocab_size: int = setting(
        0, "tokens that --tokenizer bpe learns; 0: 2000", low=0, group="model: sizes"
    )
    block_size: int = setting(256, "window: tokens the model sees", low=1)
    n_layer: int = setting(6, "blocks", low=1)
    n_head: int = setting(0, "attention heads; 0: n_embd // 64", low=0)
    n_embd: int = setting(384, "channels", low=1)
    n_kv_head: int = setting(
        0, "heads of keys and values, shared by the query heads; 0: n_head", low=0
    )
    head_size: int = setting(0, "channels of a head; 0: n_embd / n_head", low=0)
    n_inner: int = setting(0, "hidden width of the MLP; 0: 4 n_embd, for swiglu 8/3", low=0)
    dropout: float = setting(0.0, "share of what blocks add, dropped in training", low=0, below=1)
    norm: str = setting("rmsnorm", "", choices=("layernorm", "rmsnorm"), group="model: parts")
    mlp: str = setting("swiglu", "", choices=("gelu", "relu", "silu", "relu2", "swiglu"))
    pos: str = setting("rope", "", choices=("none", "learned", "sinusoidal", "rope"))
    post_norm: bool = setting(False, "norm what a part adds up to, not what it reads")
    token_shift: bool = setting(False, "half of what a part reads is from the token before")
    qk_norm: bool = setting(True, "norm queries and keys")
    tie_weights: bool = setting(True, "one matrix for token embeddings and output")
    bias: bool = setting(False, "biases in linear layers and layernorms")
    norm_eps: float = setting(0.0, "added to variances; 0: 1e-5, for rmsnorm 1e-6", low=0)
    rope_theta: float = setting(1e4, "slowest turn of rope, in positions / 2 pi", above=0)

    def __post_init__(self) -> None:
        if not self.n_head:
            self.n_head = max(1, self.n_embd // 64)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.norm_eps = self.norm_eps or (1e-6 if self.norm == "rmsnorm" else 1e-5)
        if not self.n_inner:  # 2 x 4 C and 3 x 8/3 C are as many weights; hardware likes 32s
            width = 8 / 3 if self.mlp == "swiglu" else 4
            self.n_inner = math.ceil(width * self.n_embd / 32) * 32

    def problems(self) -> list[str]:
        """What is wrong with these settings, a sentence each."""
        found = limit_problems(self)
        if self.n_embd < 1 or self.n_head < 1:
            return found
        if self.head_size == self.n_embd // self.n_head and self.n_embd % self.n_head:
            found.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        elif self.pos == "rope" and self.head_size % 2:
            found.append(f"rope needs an even head size, and n_embd / n_head is {self.head_size}")
        if self.n_head % self.n_kv_head:
            found.append(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.pos == "sinusoidal" and self.n_embd % 2:
            found.append(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        if self.token_shift and self.n_embd % 2:
            found.append(f"token_shift needs an even n_embd, not {self.n_embd}")
        return found


@dataclass
class TrainConfig:
    """The run."""

    preset: str = setting("auto", "see below; auto: laptop on a CPU, else medium", group="run")
    arch: str = setting("", "a known combination of parts, of the table below")
    data: str = setting(
        "shakespeare",
        "a text file, a .jsonl or question/answer .json file, a folder that prepare.py made, or "
        "shakespeare | plays | tinystories, which are fetched",
    )
    tokenizer: str = setting("char", "text to ids", choices=("char", "bpe", *ENCODINGS))
    doc_mask: bool = setting(False, "keep attention inside documents, where they are packed")
    out_dir: str = setting("checkpoints", "folder of the runs")
    tag: str = setting("", "name of this run, which gets the folder OUT_DIR/TAG for itself")
    resume: bool = setting(False, "go on from latest.pt")
    overwrite: bool = setting(False, "start anew where there is a run")
    seed: int = setting(1337, "of weights, batches and dropout", low=0)
    max_steps: int = setting(5000, "optimizer steps", low=1, group="training")
    batch_size: int = setting(64, "windows in a batch", low=1)
    grad_accum: int = setting(1, "batches in a step, one after the other (in each process)", low=1)
    lr_max: float = setting(1e-3, "peak learning rate", above=0)
    lr_min: float = setting(0.0, "learning rate at the end", low=0)
    schedule: str = setting("cosine", "of the fall to lr_min", choices=("cosine", "linear"))
    warmup_steps: int | None = setting(None, "first steps; default: 100, or a tenth of them", low=0)
    weight_decay: float = setting(0.1, "shrinks matrices, not biases and gains", low=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: any", low=0)
    patience: int = setting(
        0, "stop after so many evaluations without a better one; 0: never", low=0
    )
    optimizer: str = setting("adamw", "adamw; muon: for the blocks", choices=("adamw", "muon"))
    overfit_batch: bool = setting(False, "sanity check: one batch, until its loss is under 0.01")
    eval_every: int = setting(250, "steps between evaluations", low=1, group="watching")
    eval_windows: int = setting(128, "windows that an evaluation scores, of each split", low=1)
    sample_tokens: int = setting(200, "tokens of sample text at each evaluation", low=0)
    save_every: int = setting(0, "steps between kept checkpoints, ckpt_01000.pt; 0: none", low=0)
    tensorboard: bool = setting(False, "log to TensorBoard too, in the run's folder")
    wandb: bool = setting(False, "log to Weights & Biases too")
    device: str = setting(
        "auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is", group="machine"
    )
    precision: str = setting("auto", "auto: the fastest here", choices=PRECISIONS)
    compile: bool | None = setting(None, "torch.compile; default: as the preset, or if it can be")
    grad_checkpoint: bool = setting(False, "compute activations twice instead of keeping them")
    parallel: str = setting(
        "ddp", "under torchrun: whole copies, or slices of the model", choices=("ddp", "fsdp")
    )

    def __post_init__(self) -> None:
        if self.warmup_steps is None:
            self.warmup_steps = min(100, self.max_steps // 10)

    def problems(self) -> list[str]:
        """What is wrong with these settings, a sentence each."""
        found = limit_problems(self)
        for name, known in (("preset", PRESETS), ("arch", {"": {}} | ARCHS)):
            if getattr(self, name) not in known:
                found.append(f"{name} must be one of {', '.join(filter(None, known))}")
        if 0 < self.lr_max < self.lr_min:
            found.append(f"lr_min {self.lr_min:g} is above lr_max {self.lr_max:g}")
        if self.warmup_steps > self.max_steps:
            found.append(f"warmup_steps {self.warmup_steps} is above max_steps {self.max_steps}")
        if self.resume and self.overwrite:
            found.append("--resume goes on and --overwrite starts anew: give one of them")
        if self.tag in (".", "..") or "/" in self.tag or "\\" in self.tag:
            found.append(f"tag {self.tag!r} must be a plain name: paths go to --out_dir")
        for name in ("tensorboard", "wandb"):
            if getattr(self, name) and importlib.util.find_spec(name) is None:
                found.append(f"--{name} needs a package: pip install {name}")
        return found


@dataclass
class SampleConfig:
    """How text is sampled."""

    checkpoint: str = setting(
        "", "default: the newest run's best.pt, else latest.pt", positional=True
    )
    prompt: str = setting("\n", "text to go on from", group="sampling")
    prompt_file: str = setting("", "file with the text to go on from")
    max_new_tokens: int = setting(500, "tokens to write", low=1)
    num_samples: int = setting(1, "texts, sampled as one batch", low=1)
    temperature: float = setting(0.8, "lower: likelier tokens oftener; 0: the likeliest", low=0)
    top_k: int = setting(0, "choose among the k likeliest tokens; 0: all", low=0)
    top_p: float = setting(1.0, "choose among the likeliest, to this total", above=0, high=1)
    min_p: float = setting(0.0, "no token below this share of the likeliest's", low=0, below=1)
    repetition_penalty: float = setting(1.0, "above 1: tokens in the text get rarer", above=0)
    beams: int = setting(0, "beam search with so many, instead of sampling; 0: none", low=0)
    stop: str = setting("", "end a text before this string, or one of several: 'A|B'")
    seed: int = setting(1337, "sample i of a seed is always the same text", low=0)
    chat: bool = setting(False, "talk with the model", group="ways to look")
    show_probs: bool = setting(False, "show the five likeliest tokens at each step")
    sweep: str = setting("", "compare settings: 'temperature=0.5,0.8,1.1 top_k=20,40'")
    stream: bool | None = setting(None, "write as it comes; default: one sample, to a terminal")
    output_file: str = setting("", "file to write to, with the command that writes it again")
    device: str = setting(
        "auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is", group="machine"
    )
    precision: str = setting(
        "float32", "of the weights; lower is faster", choices=(*PRECISIONS[1:], "int8")
    )
    compile: bool = setting(False, "torch.compile: up to a minute first, then faster")
    cache: bool = setting(True, "keep keys and values; off: compute all anew for each token")

    def problems(self) -> list[str]:
        """What is wrong with these settings, a sentence each."""
        return limit_problems(self)


# name: layers, heads, channels, window, batch, steps, peak rate, dropout, steps between evaluations
PRESET_TABLE = {
    "laptop": (4, 2, 128, 192, 12, 1000, 6e-3, 0.0, 200),
    "tiny": (2, 2, 128, 128, 32, 3000, 3e-3, 0.0, 250),
    "small": (4, 4, 256, 256, 64, 5000, 2e-3, 0.1, 250),
    "medium": (6, 6, 384, 256, 64, 5000, 1e-3, 0.2, 250),
    "large": (8, 8, 512, 512, 64, 10000, 1e-3, 0.2, 500),
    "gpt2": (12, 12, 768, 1024, 32, 20000, 6e-4, 0.0, 500),
    "quick": (2, 2, 128, 64, 24, 120, 1e-2, 0.0, 120),
    "baseline": (4, 4, 128, 64, 12, 2000, 1e-3, 0.0, 250),
}
PRESET_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_steps", "lr_max")
PRESET_FIELDS += ("dropout", "eval_every")
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(PRESET_FIELDS, row, strict=True)) for name, row in PRESET_TABLE.items()
}
# First to a loss on a CPU, where LayerNorm is one kernel and RMSNorm six operations, a square is
# faster than a sigmoid, and compiling takes longer than it saves in a thousand steps.
FAST = {"optimizer": "muon", "schedule": "linear", "compile": False}
FAST |= {"norm": "layernorm", "mlp": "relu2", "token_shift": True}
PRESETS["laptop"] |= FAST
PRESETS["quick"] |= FAST
# nanoGPT's recipe for a CPU, to compare with
PLAIN = {"arch": "gpt2", "precision": "float32", "compile": False, "lr_min": 1e-4}
PRESETS["baseline"] |= PLAIN

# Each is exactly a Hugging Face architecture: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM.
ARCH_FIELDS = ("norm", "mlp", "pos", "qk_norm", "tie_weights", "bias")
ARCH_FIELDS += ("post_norm", "token_shift")
ARCHS: dict[str, dict[str, Any]] = {
    name: dict(zip(ARCH_FIELDS, (*row, False, False), strict=True))
    for name, row in {
        "gpt2": ("layernorm", "gelu", "learned", False, True, True),
        "llama": ("rmsnorm", "swiglu", "rope", False, False, False),
        "qwen3": ("rmsnorm", "swiglu", "rope", True, True, False),
    }.items()
}

# Flags as other code bases spell them.
ALIASES: dict[str, str] = {
    "d_model": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_ff": "n_inner",
    "context_length": "block_size",
    "max_iters": "max_steps",
    "warmup": "warmup_steps",
    "learning_rate": "lr_max",
    "max_tokens": "max_new_tokens",
    "from": "source",
}


def train_settings(flags: dict[str, Any], device: str) -> tuple[GPTConfig, TrainConfig]:
    """The model's and the run's settings from the flags that were given, over --arch, over the
    preset, over the defaults.

    `device` is the type of the machine's device, which chooses the preset where none is named.
    Raises nothing: ask `problems()` of both.
    """
    name = flags.get("preset", "auto")
    name = ("laptop" if device == "cpu" else "medium") if name == "auto" else name
    preset = PRESETS.get(name, {})
    arch = ARCHS.get(flags.get("arch", preset.get("arch", "")), {})
    values = preset | arch | flags | {"preset": name}
    if "n_embd" in flags and "n_head" not in flags:
        values["n_head"] = 0  # the preset's heads were for the preset's width
    return from_dict(GPTConfig, values), from_dict(TrainConfig, values)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass from those of the values that it has a field for."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


# --- checks


def limit_problems(config: Any) -> list[str]:
    """Every field whose value is outside the limits of its `setting` line."""
    tests: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
        "low": ("at least", lambda value, limit: value >= limit),
        "high": ("at most", lambda value, limit: value <= limit),
        "above": ("above", lambda value, limit: value > limit),
        "below": ("below", lambda value, limit: value < limit),
        "choices": ("one of", lambda value, limit: value in limit),
    }
    found = []
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{f.name} must be a finite number, not {value}")
            continue
        for key in tests.keys() & f.metadata.keys():
            words, holds = tests[key]
            limit = f.metadata[key]
            if not holds(value, limit):
                limit = ", ".join(limit) if key == "choices" else limit
                found.append(f"{f.name} must be {words} {limit}, not {value!r}")
    return found


def raise_problems(problems: list[str]) -> None:
    """Report all problems in one line, if there are any."""
    if problems:
        raise UserError("; ".join(problems))


# --- command line


def parse_flags(
    argv: list[str] | None, doc: str, *classes: type
) -> tuple[dict[str, Any], list[str]]:
    """Read the flags of the given dataclasses from a command line (sys.argv if None).

    Returns the values that were given, by field name, and the problems found: unknown flags with
    the nearest known one, values of the wrong type. `--n-embd`, `--n_embd`, `--n_embd=8` are the
    same flag. --help prints and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, known = build_parser(doc, classes)
    words = [re.sub(r"^--[\w-]+", spell_flag, word) for word in argv]
    valued = {flag for a in parser._actions if a.metavar for flag in a.option_strings}
    for i in reversed(range(len(words))):  # argparse would stop at a missing value; note it instead
        if words[i] in valued and (i + 1 == len(words) or words[i + 1].startswith("--")):
            words.insert(i + 1, MISSING)
    namespace, unknown = parser.parse_known_intermixed_args(words)
    values, problems = {}, []
    for name, text in vars(namespace).items():
        try:
            if isinstance(text, list):
                values[name] = tuple(convert(known[name], word) for word in text)
            else:
                values[name] = text if isinstance(text, bool) else convert(known[name], text)
        except ValueError as error:
            problems.append(str(error))
    return values, problems + unknown_flags(unknown, parser)


def spell_flag(flag: re.Match[str]) -> str:
    """A flag as the parser knows it: --n-embd as --n_embd, --no_compile as --no-compile."""
    return re.sub("^--no_", "--no-", "--" + flag[0][2:].replace("-", "_"))


def kind_of(f: Field) -> type:
    """The type of a field's values; of `float | None` it is float."""
    return (typing.get_args(f.type) or (f.type,))[0]


def convert(f: Field, text: str) -> Any:
    """The text of a flag as its field's type. Raises ValueError where it is none."""
    kind = kind_of(f)
    words = {int: "a whole number", float: "a number", str: "text"}[kind]
    if text == MISSING:
        hint = f" (one that begins with - as --{f.name}=TEXT)" if kind is str else ""
        raise ValueError(f"--{f.name} needs {words} after it{hint}")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--{f.name} must be {words}, not {text!r}") from None


def unknown_flags(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """A sentence for each flag that does not exist, with the nearest that does."""
    problems = []
    flags = [option for action in parser._actions for option in action.option_strings]
    for i, word in enumerate(words):
        if word.startswith("-"):
            flag = word.split("=")[0]
            near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.7)
            problems.append(f"unknown flag {flag}" + "".join(f": did you mean {n}?" for n in near))
        elif i == 0 or not words[i - 1].startswith("-"):  # else it was the unknown flag's value
            problems.append(f"unexpected argument {word!r}")
    return problems


def build_parser(
    doc: str, classes: tuple[type, ...]
) -> tuple[argparse.ArgumentParser, dict[str, Field]]:
    """A parser with one flag per setting and its aliases, and the fields by name."""
    parser = argparse.ArgumentParser(
        usage=f"python %(prog)s [flags]{positional_names(classes)}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    known = {f.name: f for cls in classes for f in fields(cls)}
    aliases = {name: [a for a, target in ALIASES.items() if target == name] for name in known}
    group = parser
    for f in known.values():
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        names = [f"--{name}" for name in (f.name, *aliases[f.name])]
        if typing.get_origin(f.type) is tuple:
            group.add_argument(f.name, nargs="*", metavar=f.name.upper(), help=help_text(f))
        elif kind_of(f) is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, help=help_text(f))
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[kind_of(f)]
            group.add_argument(*names, metavar=metavar, help=help_text(f))
        if f.metadata.get("positional"):
            group.add_argument(f.name, nargs="?", help=argparse.SUPPRESS)
    return parser, known


def positional_names(classes: tuple[type, ...]) -> str:
    """What may stand on the command line without a flag, for the usage line."""
    return "".join(
        f" [{f.name.upper()} ...]"
        for cls in classes
        for f in fields(cls)
        if typing.get_origin(f.type) is tuple
    )


def help_text(f: Field) -> str:
    """The line of --help for a field: what it is, its choices, its default."""
    choices = " | ".join(f.metadata.get("choices", ()))
    words = ", ".join(word for word in (f.metadata["help"], choices) if word)
    if f.default is None or f.default in ("", ()):
        return words
    default = {"False": "off", "True": "on"}.get(str(f.default), repr(f.default).strip("'"))
    return f"{words} [{default}]".replace("%", "%%")


def preset_table() -> str:
    """The presets and the architectures as text, for --help."""
    lines = []
    tables = (("preset", PRESET_FIELDS, PRESETS), ("arch", ARCH_FIELDS, ARCHS))
    for title, columns, table in tables:
        lines.append(f"{title:8}" + "".join(f"{column:>12}" for column in columns))
        for name, row in table.items():
            line = f"{name:8}" + "".join(f"{row[column]!s:>12}" for column in columns)
            more = [f"{key} {value}" for key, value in row.items() if key not in columns]
            lines.append(line + "  " * bool(more) + ", ".join(more))
    return "\n".join(lines)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: a user's mistake is one line on stderr and status 2, without a
    traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))  # of several processes that torchrun started
        print(f"error{f' in process {rank}' * (rank > 0)}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
