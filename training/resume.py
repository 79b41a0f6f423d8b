"""Resume a run from its latest checkpoint."""

import hashlib
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenizer as tokenizers
from config import GPTConfig, TrainConfig
from system.device import device_problems, pick_device
from system.settings import UserError, all_problems, from_dict, raise_problems
from training.distributed import is_restart
from utils import matching_contents, read_checkpoint

Flags = dict[str, Any]  # given on the command line, by name


def resume_pretraining(flags: Flags) -> tuple[Flags, dict[str, Any] | None]:
    """The flags of a pretraining run to resume, with the settings in its checkpoint, and the
    checkpoint. Raises UserError for flags that do not fit it."""
    flags = {"out_dir": "checkpoints", "tag": ""} | flags  # the folder may have been renamed
    run_dir = Path(flags["out_dir"], flags["tag"])
    flags, state = checkpoint_to_resume(flags, run_dir)
    if state is None:
        return flags, None
    if "finetune" in state:
        raise UserError("this is a run of finetune.py: resume it with finetune.py")
    with matching_contents(run_dir / "latest.pt"):
        saved = saved_settings(state)
        tokenizers.from_dict(state["tokenizer"])
    planned = {"max_steps"} if saved["minutes"] else set()
    share, minutes = saved["minutes"], saved["student_minutes"] or saved["minutes"]  # of both runs
    return resumed_flags(flags, saved | {"minutes": minutes}, planned) | {"minutes": share}, state


def saved_settings(state: dict[str, Any]) -> Flags:
    """The settings in a checkpoint, or their defaults. Raises UserError if they are not valid."""
    gpt = from_dict(GPTConfig, state["gpt_config"])
    config = from_dict(TrainConfig, state["train_config"])
    raise_problems(all_problems(gpt) + all_problems(config))
    return asdict(gpt) | asdict(config)


def checkpoint_to_resume(flags: Flags, run_dir: Path) -> tuple[Flags, dict[str, Any] | None]:
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


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """The hash of the names, shapes, types and values of weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resumed_flags(flags: Flags, saved: Flags, fixed: Collection[str] = ()) -> Flags:
    """The settings of a checkpoint, overridden by the flags. Raises UserError if a flag differs in
    what the model computes, or in a setting that cannot change, here or in TrainConfig."""
    fixed = {*fixed, *(f.name for f in fields(TrainConfig) if f.metadata.get("fixed"))}
    fixed |= {f.name for f in fields(GPTConfig) if f.metadata.get("computes", True)}
    if "" in (saved["teacher"], flags.get("teacher")):  # it may be moved, but not come or go
        fixed.add("teacher")
    changed = [n for n in flags if n in fixed and flags[n] != saved.get(n, flags[n])]
    advice = "in the run to resume: leave it out, or start another run"
    raise_problems([f"--{name} is {saved[name]!r} {advice}" for name in changed])
    # how processes share the work is not saved
    return saved | {"parallel": "ddp"} | resumed_precision(flags, saved) | flags


def resumed_precision(flags: Flags, saved: Flags) -> Flags:
    """A precision that was chosen automatically is chosen again, so that a run can move to another
    machine: except on a CPU, where it is measured and could change between runs of one machine. On
    another kind of device, whether to compile is chosen again too."""
    name, chosen_for, found = (saved | flags)["device"], saved["precision_for"], Flags()
    device_type = "" if device_problems(name) else pick_device(name).type  # reported later
    if saved["compile"] and chosen_for not in ("", device_type):
        found["compile"] = None
    if "precision" in flags:
        found["precision_for"] = ""
    elif chosen_for and not chosen_for == device_type == "cpu":
        found["precision"] = "auto"
    return found
