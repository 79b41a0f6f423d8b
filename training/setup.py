"""Prepare a run: its settings, its data, what this machine can do, and a summary."""

import ctypes
import math
import sys
import timeit
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tokenizer as tokenizers
from config import (
    ARCH_FIELDS,
    ARCHS,
    OPTIMIZERS,
    PRESET_FIELDS,
    PRESETS,
    GPTConfig,
    TrainConfig,
    train_settings,
)
from corpus.corpus import Corpus, check_length
from corpus.load import is_dataset, load_corpus
from corpus.text import note
from model import GPT
from system.device import check_memory, compiler_problem, device_problems, has_bfloat16, pick_device
from system.files import folder_problems
from system.settings import UserError, all_problems, raise_problems
from tokenizer import Tokenizer
from training.distributed import (
    broadcast_from_rank0,
    is_restart,
    is_torchrun,
    local_rank_zero_first,
    world_size,
)
from training.run_log import run_files
from utils import count_params, read_checkpoint

SMALL_TEXT = 45_000  # bytes of training text, nine tenths of the 50 kB that the README asks for
MIN_COMPILED_STEPS = 300  # on a CPU; with fewer, compiling takes longer than it saves
MAX_GRAPH_PARAMS = 20_000_000  # of a model whose kernels are launched by CUDA graphs
WORTHWHILE_SPEEDUP = 1.5  # of bfloat16 on a CPU; a smaller one is lost to the conversions
LESS_MEMORY = "use a lower --batch_size with --grad_accum, --grad_checkpoint, or smaller sizes"
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


def resolve_train(flags: Flags) -> tuple[GPTConfig, TrainConfig, State | None, Flags]:
    """The settings of a pretraining run from its flags, the checkpoint that it resumes, and the
    flags. Raises UserError for flags that do not fit the checkpoint or the data."""
    given, state = flags, None
    if flags.get("resume") or is_restart():
        from training.resume import resume_pretraining  # only to resume

        flags, state = resume_pretraining(flags)
    elif flags.get("plan") or "minutes" in flags:
        from training.plan import plan_flags  # only with --plan or --minutes

        flags = plan_flags(flags)
    device = flags.get("device", "auto")
    if not state:
        teacher, data = flags.get("teacher"), flags.get("data", TrainConfig.data)
        if flags.keys() & {"tokenizer", "bpe_vocab_size"} and (teacher or is_dataset(data)):
            data = teacher or data
            raise UserError(f"{data} already has a tokenizer: leave out --tokenizer, --vocab_size")
        if teacher:
            from training.teachers import corpus_settings  # only with --teacher

            flags = corpus_settings(flags) | flags
        elif "minutes" not in flags and flags.keys() & {"teacher_share", "teacher_temperature"}:
            raise UserError("--teacher_share and --teacher_temperature need --teacher")
        if "bpe_vocab_size" in flags and flags.get("tokenizer") != "bpe":
            raise UserError("--vocab_size is for --tokenizer bpe; others have a fixed size")
        flags = {"grad_accum": world_size()} | flags  # one micro-batch per process
    device_type = "cpu" if device_problems(device) else pick_device(device).type  # reported later
    return *train_settings(flags, device_type), state, given


def check_run(gpt_config: GPTConfig, config: TrainConfig, *others: Any) -> list[str]:
    """What prevents this run on this machine, in its folder, or with these processes."""
    found = device_problems(config.device)
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and find_spec(name) is None:
            found.append(f"--{name} needs a package: pip install {name}")
    if config.parallel == "fsdp" and not is_torchrun():
        found.append("--parallel fsdp needs several processes: start them with torchrun")
    bfloat16 = config.precision == "bfloat16"
    if bfloat16 and not found and not has_bfloat16(pick_device(config.device)):
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
    if config.overwrite:
        return
    now = read_checkpoint(latest)["step"] if latest.exists() else None
    if now != (state and state["step"]):
        raise UserError(f"another process has changed the run in {run_dir}/: run the command again")


def on_checked_device(gpt_config: GPTConfig, config: TrainConfig, *others: Any) -> tuple[Any, ...]:
    """The settings of a run; for the CPU, if a GPU computes wrong numbers or is slower. `others`:
    of pretraining, whose flags are the last."""
    device, results = pick_device(config.device), (gpt_config, config, *others)
    if is_torchrun() or device.type == "cpu":
        return results
    from training.device_check import passes_check  # only on a GPU

    precision, _ = pick_precision(config.precision, device)
    if not passes_check(gpt_config, config, device, precision):
        config.device = "cpu"
        if others:  # the preset too can be another one
            results = resolve_train(others[-1] | {"device": "cpu"})
            raise_problems(all_problems(results[0]) + all_problems(results[1]))
    return results


# --- data


class Data(NamedTuple):
    """What a model learns from."""

    tokenizer: Tokenizer
    corpus: Corpus
    teachers: Any = None  # training.teachers.Teachers


def load_data(
    gpt_config: GPTConfig, config: TrainConfig, state: State | None, known: Tokenizer | None = None
) -> Data:
    """The corpus of a run, and its tokenizer: `known`, or that of the run to resume, or a new one.
    Raises UserError if they do not fit the settings or the run to resume."""
    teachers = None
    if config.teacher and known is None:
        from training.teachers import load_teachers  # only with --teacher

        teachers = load_teachers(gpt_config, config, state)
        known = teachers.tokenizer
    elif state and known is None:
        known = tokenizers.from_dict(state["tokenizer"])
    new = (config.tokenizer, config.bpe_vocab_size)
    own = (config.separator, config.hold_out, config.encoding, config.skip_bad)
    with local_rank_zero_first():
        tokenizer, corpus = load_corpus(config.data, *new, known, *own)
    check_length(corpus, gpt_config.block_size)
    check_unchanged(corpus.info, config, state)
    if teachers and "<UNK>" in tokenizer.specials and "questions" not in corpus.info:
        raise UserError(f"{config.teacher} answers questions, and {config.data} is a text")
    if config.doc_mask and corpus.separator is None:
        raise UserError(f"{config.data} is one document (or chats): --doc_mask is for several")
    if teachers or is_dataset(config.data):  # they have their own tokenizer
        config.tokenizer = tokenizer.to_dict()["kind"]
    return Data(tokenizer, corpus, teachers)


def check_unchanged(info: dict[str, Any], config: TrainConfig, state: State | None) -> None:
    """Raise UserError if the data are not those of the run to resume."""
    if state and state["corpus"]["sha256"] != info["sha256"]:
        raise UserError(f"{config.data} has changed since this run began")


# --- machine


def setup_machine(config: TrainConfig, device: torch.device, state: State | None = None) -> None:
    """Set the precision and whether to compile, in config, print both, and seed the random numbers.
    `state` is the checkpoint that is resumed."""
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)
    if config.precision == "auto":
        config.precision_for = device.type
    picked = broadcast_from_rank0(lambda: pick_precision(config.precision, device))
    if picked[0] == "float16" and config.parallel == "fsdp":
        picked = ("float32", NO_FLOAT16)
    config.precision, why = picked
    if state and (before := state["train_config"].get("precision")):
        why = "as before" if config.precision == before else f"{why}; {before} before"
    if device.type == "cpu":
        keep_freed_memory()
    config.compile = pick_compile(config, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    how = {False: "eager", True: "compiled, so the first step is slow", None: "compiled if faster"}
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    if world_size() > 1:
        threads += f" in {world_size()} processes, {config.parallel}"
    print(f"machine: {device}{threads}, {config.precision} ({why}), {how[config.compile]}")


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision of matrix products, and why. `auto`: the fastest that trains well here."""
    if name != "auto":
        return name, "as requested"
    if device.type == "cuda":
        if has_bfloat16(device):
            return "bfloat16", "supported by this GPU"
        return "float16", "this GPU has no bfloat16"
    if device.type == "cpu":
        ratio = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
        reason = f"bfloat16 matrix products are {ratio:.2g} times as fast as float32 here"
        return "bfloat16" if ratio > WORTHWHILE_SPEEDUP else "float32", reason
    return "float32", "the default on this device"


def matmul_seconds(dtype: torch.dtype) -> float:
    """The time of a product of two 512 x 512 matrices on the CPU, the best of sixteen, or of those
    that fit in 0.2 s: an emulated one takes that long. In one thread: several wait for each other
    while other programs run, now more and now less."""
    a, n_threads = torch.ones(512, 512, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: list[float] = []
    while len(seconds) < 16 and sum(seconds) < 0.2:
        seconds.append(timeit.timeit(lambda: a @ a, number=1))
    torch.set_num_threads(n_threads)
    return min(seconds)


def pick_compile(config: TrainConfig, device: torch.device) -> bool | None:
    """Whether to use torch.compile: as requested, else if it works. None: on a CPU, if it makes a
    run of many steps faster. Raises UserError if it is requested and does not work."""
    wanted = config.compile
    if wanted is None and device.type == "cpu":
        return None if config.max_steps >= MIN_COMPILED_STEPS and world_size() == 1 else False
    if wanted is False or (wanted is None and device.type == "mps"):
        return False
    problem = compiler_problem(device)
    if problem and wanted:
        raise UserError(f"--compile does not work here ({problem}): give --no-compile")
    if problem:
        print(f"not compiling: {problem}")
    return not problem


def decide_compile(model: GPT, task: Any, config: TrainConfig) -> None:
    """Measure whether to compile, if pick_compile has left it open."""
    if config.compile is None:
        from training.auto_compile import compile_if_faster  # only on a CPU, for many steps

        config.compile = compile_if_faster(model, task, config)


def compile_model(model: GPT, config: TrainConfig, device: torch.device, same_shapes: bool) -> None:
    """Compile the model in place, before it is wrapped with DDP or FSDP.

    On a GPU it is one graph, as PyTorch's documentation recommends ("Where to apply torch.compile":
    the highest level), so that the loss too is fused. By default, a second shape makes
    torch.compile generate more general kernels, for dynamic shapes. This is turned off if all
    batches have the same shape, or one of a few (grow_windows has three). On a CPU, where compiling
    takes as long as many steps, and with FSDP, which gathers the weights of a block between the
    graphs, each block is compiled: blocks are alike, so one compilation serves all.

    The kernels of a small model take less time than launching them. CUDA graphs ("reduce-overhead")
    launch them all at once. A graph writes its results to the same memory every time, gradients
    included, so a second micro-step would overwrite the sum (pytorch issues 96693 and 169545), and
    DDP reads gradients by itself: only steps of one micro-step in one process use them.
    """
    if device.type == "cuda" and config.parallel != "fsdp":
        one_batch = same_shapes and config.grad_accum == world_size() == 1
        mode = "reduce-overhead" if one_batch and model.num_params() <= MAX_GRAPH_PARAMS else None
        model.compile(dynamic=False if same_shapes else None, mode=mode)
        return
    for block in model.blocks:
        block.compile()


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones. Otherwise Linux takes
    it back and clears it every step, and training on a CPU takes a quarter longer."""
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        m_mmap_max, m_trim_threshold = -4, -1  # from malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def memory_estimate(gpt: GPTConfig, config: TrainConfig) -> dict[str, int]:
    """The memory that training needs per process, in bytes, by use. FSDP divides weights, gradients
    and optimizer state by the number of processes.

    The activations are counted from the formulas of model.py: for GPT-2's components, 10 C + 3 F
    numbers per block and token; newer components have more operations (compiling fuses some of
    them). With grad_checkpoint only C per block and token are kept, plus all those of the block
    being recomputed. The logits count twice, once in float32, with their gradient.
    """
    n_params, n_per_block = count_params(gpt)
    spec = OPTIMIZERS[config.optimizer]
    n_own = gpt.n_layer * n_per_block if spec.matrices_only else n_params  # the rest has AdamW
    n_averages = n_own * len(spec.averages) + (n_params - n_own) * len(OPTIMIZERS["adamw"].averages)
    n_shards = world_size() if config.parallel == "fsdp" else 1
    width = 4 if config.precision == "float32" else 2
    C = 10 + 4 * (gpt.norm == "rmsnorm") + 4 * gpt.qk_norm + 2 * (gpt.pos == "rope")
    per_block = (C * gpt.n_embd + (5 if gpt.mlp == "swiglu" else 3) * gpt.n_inner) * width
    all_blocks = gpt.n_layer * per_block
    if config.grad_checkpoint:
        all_blocks = gpt.n_layer * gpt.n_embd * 4 + per_block
    per_token = all_blocks + gpt.vocab_size * (width + 8)
    n_tokens = config.batch_size * gpt.block_size
    return {
        "weights": 4 * n_params // n_shards,
        "gradients": 4 * n_params // n_shards,
        "optimizer": 4 * n_averages // n_shards,
        "activations": n_tokens * per_token,
        "batches": n_tokens * 16 * config.grad_accum // world_size(),
    }


# --- summary


def print_summary(
    gpt: GPTConfig, config: TrainConfig, corpus: Corpus, device: torch.device
) -> None:
    """Print what will be trained, before anything slow. Raises UserError if memory is too small."""
    if corpus.train_bytes < SMALL_TEXT:
        note(
            f"{corpus.train_bytes:,} bytes of training text are few, a new model will memorize "
            "them: use 50 kB or more, or fine-tune a trained model (finetune.py)"
        )
    memory = memory_estimate(gpt, config)
    uses = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items())
    share = f"teachers: {config.teacher}, {config.teacher_share:.0%} of the loss\n"
    print(
        f"corpus: {corpus.info['name']}, {corpus.info['bytes']:,} bytes; {len(corpus.train_ids):,} "
        f"training tokens, {len(corpus.val_ids):,} validation tokens, vocabulary {gpt.vocab_size}, "
        f"{corpus.bytes_per_token:.2f} bytes per token\n"
        f"model: {gpt.n_layer} layers, {gpt.n_head} heads of {gpt.head_size}, {gpt.n_embd} "
        f"channels, window {gpt.block_size}; {gpt.norm}, {gpt.mlp}, {gpt.pos}; "
        f"{count_params(gpt)[0]:,} parameters\n"
        f"memory: about {sum(memory.values()) / 1e6:,.0f} MB ({uses})\n"
        f"run: preset {config.preset}, {config.max_steps} steps of {config.batch_size} x "
        f"{config.grad_accum} sequences, learning rate {config.lr_max:g} to {config.lr_min:g}\n"
        f"{share * bool(config.teacher)}"
        f"uniform guessing would give a loss of ln({gpt.vocab_size}) = "
        f"{math.log(gpt.vocab_size):.4f}",
        flush=True,
    )
    if not config.dry_run:  # which says more first
        check_memory(sum(memory.values()), device, "this run", LESS_MEMORY)
