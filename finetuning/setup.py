"""The settings of a fine-tuning run, from its flags, its objective and its base."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from config import OPTIMIZERS, TrainConfig
from finetuning import lora
from finetuning.lora import LoRAConfig
from finetuning.tasks import OBJECTIVES, Base, FinetuneConfig, Setup
from system.settings import UserError, all_problems, from_dict, raise_problems
from training.distributed import is_torchrun, world_size
from training.resume import checkpoint_to_resume, resumed_flags, saved_settings, weights_sha256
from training.run_log import run_files
from training.setup import check_run
from training.teachers import OWN_CORPUS, load_teachers
from utils import load_checkpoint, matching_contents, read_checkpoint

LORA_LR_SCALE = 5  # B is zero at first, so the updates of A are too
# Instead of pretraining's rate if that is unknown (imported models) or does not fit AdamW (SGD's).
IMPORTED_LR = 3e-4
FOR_MERGE = {"source", "merge", "out_dir", "tag", "overwrite", "device"}


def load_base(path: Path) -> Base:
    """Read a base or a teacher. Raises UserError if it is invalid. Settings that an older version
    did not save become defaults. A base that was fine-tuned before has the learning rate of its
    pretraining, so that rates do not shrink with each stage."""
    model, tokenizer, state = load_checkpoint(path, torch.device("cpu"))
    state["optimizers"] = []  # twice as large as the weights, and not needed
    saved = state["train_config"]
    names = (*OWN_CORPUS, "lr_max", "optimizer")
    values = {name: saved[name] for name in names if name in saved}
    with matching_contents(path):
        if "lr" in state.get("finetune", {}):
            values |= {"lr_max": state["finetune"]["lr"], "optimizer": "adamw"}
        trained = from_dict(TrainConfig, values)
        raise_problems(all_problems(trained))
    scale, imported = OPTIMIZERS[trained.optimizer].adamw_lr, not state["corpus"]["sha256"]
    lr = IMPORTED_LR if imported or scale is None else trained.lr_max * scale
    sha256 = weights_sha256(state["model"])
    return Base(model, tokenizer, state, sha256, trained, lr)


# --- from flags to settings


def help_defaults() -> dict[str, Any]:
    """The flags, with the defaults that --help shows."""
    shown = asdict(FinetuneConfig()) | asdict(LoRAConfig()) | asdict(TrainConfig())
    shown |= {"dropout": "the checkpoint's", "lr_max": "the checkpoint's, scaled for the objective"}
    shown |= {"data": "distill the checkpoint's", "tag": "the objective's name", "warmup_steps": ""}
    objectives = {key: o for key, o in OBJECTIVES.items() if key != "qa"}  # which is chat
    for name in {name for objective in objectives.values() for name in objective.defaults}:
        own = {key: o.defaults[name] for key, o in objectives.items() if name in o.defaults}
        others = [str(shown[name])] if len(own) < len(objectives) and shown[name] else []
        shown[name] = ", ".join([*others, *(f"{key} {value}" for key, value in own.items())])
    hidden = {f.name for f in fields(TrainConfig) if f.metadata.get("pretrain")}
    return {name: value for name, value in shown.items() if name not in hidden}


def resolve_finetune(flags: dict[str, Any]) -> Setup:
    """All settings of a run from its flags, the base, the teacher, and the checkpoint to resume.
    Raises UserError for flags that do not fit each other or the checkpoints."""
    tag = flags.get("tag", "merged" if "merge" in flags else flags.get("objective", "text"))
    flags = {"out_dir": "checkpoints"} | flags | {"tag": tag}
    run_dir = Path(flags["out_dir"], tag)
    given, state = (flags, None) if "merge" in flags else checkpoint_to_resume(flags, run_dir)
    if state:
        given = finetune_flags(given, state, run_dir / "latest.pt")
    defaults = OBJECTIVES[given.get("objective", "text")].defaults
    flags = {"grad_accum": world_size()} | defaults | given  # one micro-batch per process
    settings, adapt = from_dict(FinetuneConfig, flags), from_dict(LoRAConfig, flags)
    problems = all_problems(settings) + all_problems(adapt)
    raise_problems(problems + ([] if state else flag_problems(given, settings, adapt)))
    base = load_base(Path(settings.source))
    if not base.state["corpus"]["sha256"] and "data" not in flags and not settings.merge:
        raise UserError("give --data: the text that an imported model was trained on is unknown")
    gpt_config = base.model.config
    gpt_config = replace(gpt_config, dropout=flags.get("dropout", gpt_config.dropout))
    config = run_config(flags, settings, adapt, base)
    teachers = load_teachers(gpt_config, config, state) if config.teacher else None
    return Setup(settings, adapt, config, gpt_config, base, teachers, state)


def finetune_flags(flags: dict[str, Any], state: dict[str, Any], latest: Path) -> dict[str, Any]:
    """The settings of a run to resume, overridden by the flags. Settings that an older version did
    not save become defaults. Raises UserError for an invalid checkpoint, and for flags that cannot
    change during a run; the base and the teacher may be moved, because their weights are compared.
    """
    if "finetune" not in state:
        raise UserError("this is a run of train.py: resume it with train.py")
    with matching_contents(latest):
        settings = from_dict(FinetuneConfig, state["finetune"])
        adapt = from_dict(LoRAConfig, state["finetune"])
        own, others = asdict(settings) | asdict(adapt), saved_settings(state)
        known = {name: others[name] for name in ("data", "teacher") if others[name]}
        raise_problems(flag_problems(known, settings, adapt))
    if adapt.lora_rank:
        lora.check_contents(state.get("adapter", {}), latest)
    return resumed_flags(flags, own | others, {*own, "data"} - {"source"})


def flag_problems(flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig) -> list[str]:
    """What is wrong with the flags of a new run, before any file is read."""
    objective = OBJECTIVES[settings.objective]
    if "merge" in flags:
        unused = [name for name in flags if name not in FOR_MERGE]
        found = [f"--{name} has no effect on --merge: leave it out" for name in unused]
        if not (settings.source and settings.merge):
            found.append("name the base and the adapter: finetune.py BASE.pt --merge ADAPTER.pt")
        return found
    found = []
    for name in flags:
        owners = [key for key, other in OBJECTIVES.items() if name in other.flags]
        if owners and settings.objective not in owners:
            found.append(f"--{name} is for --objective {' or '.join(owners)}")
        if name.startswith("lora_") and not adapt.lora_rank and name != "lora_rank":
            found.append(f"--{name}: give --lora_rank too")
    if not settings.source:
        new = "; train.py --teacher trains a new student" * objective.teacher
        found.append(f"name the checkpoint to fine-tune: finetune.py checkpoints/best.pt ...{new}")
    if objective.teacher and not flags.get("teacher"):
        found.append(f"--objective {settings.objective} needs a --teacher")
    data = flags.get("data", objective.defaults.get("data"))
    if not (objective.teacher or data):
        found.append(f"--objective {settings.objective} needs --data")
    return found


def run_config(
    flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig, base: Base
) -> TrainConfig:
    """The settings of the run: the flags with the objective's defaults, then the optimizer's
    defaults, then the checkpoint's."""
    own = OPTIMIZERS[flags["optimizer"]].defaults if flags.get("optimizer") in OPTIMIZERS else {}
    lr = own.get("lr_max", base.lr)
    lr *= OBJECTIVES[settings.objective].lr_scale * (LORA_LR_SCALE if adapt.lora_rank else 1)
    values = own | {"lr_max": lr, "tokenizer": base.tokenizer.to_dict()["kind"]}
    if "data" not in flags:
        values |= {name: getattr(base.trained, name) for name in OWN_CORPUS}
    return from_dict(TrainConfig, values | flags)


def check_finetune(*results: Any) -> list[str]:
    """What prevents this run on this machine, in its folder, or with these checkpoints."""
    settings, adapt, config, gpt_config, base, teachers, state = setup = Setup(*results)
    found = check_run(gpt_config, config)
    source = Path(settings.source).resolve()
    if setup.run_dir.resolve() in (source, source.parent):
        found.append(f"{setup.run_dir}/ contains {settings.source}: give the run another --tag")
    if settings.merge and is_torchrun():
        found.append("--merge needs one process: run it without torchrun")
    if settings.merge and not found:
        best = setup.run_dir / "best.pt"  # --overwrite replaces the result of another merge only
        files = run_files(setup.run_dir)
        if files and (files != [best] or "merged" not in read_checkpoint(best)):
            found.append(f"{setup.run_dir}/ contains a run: give another --tag")
    if teachers and base.tokenizer.to_dict() != teachers.tokenizer.to_dict():
        found.append("teacher and student have different tokenizers: a student needs its teacher's")
    if not OBJECTIVES[settings.objective].dropout and (gpt_config.dropout or adapt.lora_dropout):
        found.append(f"--objective {settings.objective} trains without dropout: leave it out")
    if state and state["finetune"].get("base_sha256", base.sha256) != base.sha256:
        found.append(f"{settings.source} has changed since this run began: name the original")
    if state and adapt.lora_rank and not found:
        weights = (base.model.config, base.tokenizer, base.sha256)
        lora.check_adapter(state["adapter"], *weights, setup.run_dir / "latest.pt")
    return found
