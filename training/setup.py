"""Prepare a run: resolve and check its settings, set up the machine, print a summary."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tokenizer as tokenizers
from config import (
    ARCH_FIELDS,
    ARCHS,
    PRESET_FIELDS,
    PRESETS,
    GPTConfig,
    TrainConfig,
    train_settings,
)
from corpus.load import Corpus, check_length, is_dataset
from system.device import check_memory, device_problems, pick_device
from system.folders import folder_problems
from system.settings import UserError, all_problems, from_dict, raise_problems
from training.distributed import broadcast_from_rank0, is_restart, is_torchrun, world_size
from training.machine import (
    has_bfloat16,
    keep_freed_memory,
    memory_estimate,
    pick_compile,
    pick_precision,
)
from training.run_log import run_files, writer_problems
from utils import count_params, matching_contents, read_checkpoint

NO_FLOAT16 = "--parallel fsdp has no loss scaling for float16"
Flags = dict[str, Any]  # given on the command line, by name
State = dict[str, Any]  # the contents of a checkpoint


def preset_table() -> str:
    """The presets and architectures as two tables, for --help."""
    lines = []
    for title, columns, table in (("preset", PRESET_FIELDS, PRESETS), ("arch", ARCH_FIELDS, ARCHS)):
        lines.append(f"{title:9}" + "".join(f"{column:>12}" for column in columns))
        for name, row in table.items():
            lines.append(f"{name:9}" + "".join(f"{row[column]!s:>12}" for column in columns))
            more = [f"{key} {value}" for key, value in row.items() if key not in columns]
            lines += [f"{'':9}    and {', '.join(more)}"] if more else []
    return "\n".join(lines)


# --- settings


def resolve_train(flags: Flags) -> tuple[GPTConfig, TrainConfig, State | None]:
    """The settings of a pretraining run from its flags, and the checkpoint that it resumes. Raises
    UserError for flags that do not fit the checkpoint or the data."""
    run_dir = Path(flags.get("out_dir", "checkpoints"), flags.get("tag", ""))
    flags, state = checkpoint_to_resume(flags, run_dir)
    if state and "finetune" in state:
        raise UserError("this is a run of finetune.py: resume it with finetune.py")
    if state:
        fixed = {"preset", "arch", "tokenizer", "seed", "minutes", "plan", *state["gpt_config"]}
        fixed -= {"dropout"}
        with matching_contents(run_dir / "latest.pt"):
            saved = saved_settings(state)
            fixed |= {"max_steps"} if saved["minutes"] else set()  # of its plan
            tokenizers.from_dict(state["tokenizer"])
        folder = {"out_dir": "checkpoints", "tag": ""} | flags
        flags = resumed_flags(flags, saved, fixed) | {n: folder[n] for n in ("out_dir", "tag")}
    else:
        raise_problems(tokenizer_problems(flags))
        flags = {"grad_accum": world_size()} | flags  # one micro-batch per process
    return *train_settings(flags, device_type(flags)), state


def saved_settings(state: State) -> Flags:
    """The settings in a checkpoint, those that it lacks with their defaults. Raises UserError if
    they are not valid."""
    configs = [
        from_dict(GPTConfig, state["gpt_config"]),
        from_dict(TrainConfig, state["train_config"]),
    ]
    raise_problems([problem for config in configs for problem in all_problems(config)])
    return asdict(configs[0]) | asdict(configs[1])


def checkpoint_to_resume(flags: Flags, run_dir: Path) -> tuple[Flags, State | None]:
    """The last checkpoint of a run, if --resume is given or torchrun restarted the process; and the
    flags, in that case with --resume, or --overwrite if nothing was saved."""
    latest = run_dir / "latest.pt"
    if is_restart():
        flags = flags | {"resume": latest.exists(), "overwrite": not latest.exists()}
    state = read_checkpoint(latest) if flags.get("resume") else None
    if state and flags.get("max_steps", state["step"]) < state["step"]:
        raise UserError(
            f"max_steps {flags['max_steps']} is below {state['step']}, where the run resumes"
        )
    return flags, state


def resumed_flags(flags: Flags, saved: Flags, fixed: set[str]) -> Flags:
    """The settings of a checkpoint, overridden by the flags. Raises UserError if a flag differs
    from the checkpoint in a setting that cannot change during a run."""
    fixed = fixed | {"optimizer", "weight_decay", "bpe_vocab_size", "separator", "hold_out"}
    raise_problems(
        [
            f"--{name} is {saved[name]!r} in the run to resume: leave it out, or start another run"
            for name in flags
            if name in fixed and flags[name] != saved.get(name, flags[name])
        ]
    )
    return saved | {"parallel": "ddp"} | flags  # how processes share the work is not saved


def device_type(flags: Flags) -> str:
    """The type of the device that the flags name; cpu for an invalid name, which is reported
    later."""
    name = flags.get("device", "auto")
    return "cpu" if device_problems(name) else pick_device(name).type


def tokenizer_problems(flags: Flags) -> list[str]:
    """Tokenizer flags that have no effect."""
    data, tokenizer = flags.get("data", TrainConfig.data), flags.get("tokenizer", "char")
    if is_dataset(data) and flags.keys() & {"tokenizer", "bpe_vocab_size"}:
        return [f"{data} already has a tokenizer: leave out --tokenizer and --vocab_size"]
    if "bpe_vocab_size" in flags and tokenizer != "bpe":
        return ["--vocab_size is for --tokenizer bpe; other vocabularies have a fixed size"]
    return []


def check_run(config: TrainConfig) -> list[str]:
    """What prevents this run on this machine, in its folder, or with these processes."""
    found = device_problems(config.device) + writer_problems(config)
    if config.parallel == "fsdp" and not is_torchrun():
        found.append("--parallel fsdp needs several processes: start them with torchrun")
    if (
        config.precision == "bfloat16"
        and not found
        and not has_bfloat16(pick_device(config.device))
    ):
        found.append("this GPU only emulates bfloat16, slowly: use --precision float16")
    if config.parallel == "fsdp" and config.precision == "float16":
        found.append(f"{NO_FLOAT16}: use --precision bfloat16, or float32")
    if config.grad_accum % world_size():
        found.append(
            f"{world_size()} processes cannot share {config.grad_accum} micro-batches per step: "
            "start a number of processes that divides it, or give another --grad_accum"
        )
    if config.dry_run or config.plan:  # write no files
        return found
    if config.overfit_batch:  # nor does this
        return found + ["--resume and --overfit_batch: give one of them"] * config.resume
    run_dir = Path(config.out_dir, config.tag)
    found += folder_problems(run_dir)
    if not found and not (config.resume or config.overwrite) and (files := run_files(run_dir)):
        options = "--resume it, --overwrite it, or give this run a --tag"
        found.append(f"{run_dir}/ already contains a run ({files[0].name}): {options}")
    return found


def check_current(run_dir: Path, config: TrainConfig, state: State | None) -> None:
    """Raise UserError if another process has changed the run since this one read its checkpoint.
    Called with the folder locked."""
    latest = run_dir / "latest.pt"
    now = read_checkpoint(latest)["step"] if latest.exists() else None
    if now != (state and state["step"]) and not config.overwrite:
        raise UserError(f"another process has changed the run in {run_dir}/: run the command again")


def check_corpus(corpus: Corpus, config: TrainConfig, block_size: int, state: State | None) -> None:
    """Raise UserError if the corpus does not fit the settings or the run to resume."""
    check_length(corpus, block_size)
    check_unchanged(corpus.info, config, state)
    if config.doc_mask and corpus.separator is None:
        raise UserError(f"{config.data} is one document: --doc_mask is for several documents")


def check_unchanged(info: dict[str, Any], config: TrainConfig, state: State | None) -> None:
    """Raise UserError if the data are not those of the run to resume."""
    if state and state["corpus"]["sha256"] != info["sha256"]:
        raise UserError(f"{config.data} has changed since this run began")


# --- machine


def setup_machine(config: TrainConfig, device: torch.device, state: State | None = None) -> str:
    """Decide the precision and whether to compile, in config, and seed the random numbers. Returns
    the reason for the precision. `state` is the checkpoint that is resumed."""
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)
    picked = broadcast_from_rank0(lambda: pick_precision(config.precision, device))
    if picked[0] == "float16" and config.parallel == "fsdp":
        picked = ("float32", NO_FLOAT16)
    config.precision, why = picked
    if state and config.precision == state["train_config"].get("precision"):
        why = "as before"
    if device.type == "cpu":
        keep_freed_memory()
    config.compile = pick_compile(config.compile, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    return why


def machine_line(config: TrainConfig, device: torch.device, why_precision: str) -> str:
    """The device, precision and processes in one line."""
    compiled = "compiled, so the first step is slow" if config.compile else "eager"
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    if world_size() > 1:
        threads += f" in {world_size()} processes, {config.parallel}"
    return f"machine: {device}{threads}, {config.precision} ({why_precision}), {compiled}"


def print_summary(
    gpt: GPTConfig, config: TrainConfig, corpus: Corpus, device: torch.device, why_precision: str
) -> None:
    """Print what will be trained, on what, and how, before anything slow starts. Raises UserError
    if it does not fit in memory."""
    memory = memory_estimate(gpt, config)
    uses = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items())
    print(
        f"{machine_line(config, device, why_precision)}\n"
        f"corpus: {corpus.info['name']}, {corpus.info['bytes']:,} bytes; {len(corpus.train_ids):,} "
        f"training tokens, {len(corpus.val_ids):,} validation tokens, vocabulary {gpt.vocab_size}, "
        f"{corpus.bytes_per_token:.2f} bytes per token\n"
        f"model: {gpt.n_layer} layers, {gpt.n_head} heads, {gpt.n_embd} channels, window "
        f"{gpt.block_size}; {gpt.norm}, {gpt.mlp}, {gpt.pos}; {count_params(gpt)[0]:,} parameters\n"
        f"memory: about {sum(memory.values()) / 1e6:,.0f} MB ({uses})\n"
        f"run: preset {config.preset}, {config.max_steps} steps of {config.batch_size} x "
        f"{config.grad_accum} sequences, learning rate {config.lr_max:g} to {config.lr_min:g}\n"
        f"uniform guessing would give a loss of ln({gpt.vocab_size}) = "
        f"{math.log(gpt.vocab_size):.4f}",
        flush=True,
    )
    if not config.dry_run:  # which says more first
        check_memory(sum(memory.values()), device, "this run")
