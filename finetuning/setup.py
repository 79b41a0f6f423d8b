"""The settings of a fine-tuning run, from its flags, its objective and its base."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import ARCHS, OPTIMIZERS, PRESETS, TOKENIZERS, GPTConfig, TrainConfig
from finetuning import lora
from finetuning.lora import LoRAConfig
from model import GPT
from system.files import folder_problems
from system.settings import UserError, all_problems, from_dict, raise_problems, setting
from tokenizer import Tokenizer
from training.distributed import is_torchrun, world_size
from training.resume import checkpoint_to_resume, resumed_flags, saved_settings
from training.run_log import run_files
from training.setup import check_run
from utils import load_checkpoint, matching_contents, read_checkpoint


@dataclass
class FinetuneConfig:
    """What is fine-tuned, and for which objective."""

    source: str = setting("", "checkpoint to fine-tune", positional=True, group="fine-tuning",
                          alias="checkpoint base model model_name_or_path")  # fmt: skip
    objective: str = setting("text", "what to train for", choices=("text", "qa", "distill", "dpo"))
    long: str = setting("cut", "qa, dpo: cut the prompt of records longer than the window, or skip "
                        "these records", choices=("cut", "skip"))  # fmt: skip
    teacher: str = setting("", "distill: checkpoint of the teacher")
    temperature_kd: float = setting(4.0, "distill: temperature of both distributions", above=0)
    alpha: float = setting(0.5, "distill: weight of the teacher's loss", low=0, high=1)
    beta: float = setting(0.1, "dpo: KL penalty strength", above=0)
    merge: str = setting("", "adapter.pt to merge into its base, without training")


# Defaults that differ from pretraining's: runs are short, data sets small, and batches of records
# vary in length, for each of which torch.compile would compile again.
DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"max_steps": 500, "batch_size": 12, "eval_every": 100},
    "qa": {"max_steps": 600, "batch_size": 16, "eval_every": 100, "compile": False},
    "distill": {"max_steps": 1500, "batch_size": 12, "eval_every": 250},
    "dpo": {"max_steps": 200, "batch_size": 8, "eval_every": 50, "compile": False},
}
# Peak learning rate relative to pretraining's. Answers are memorized; the others must not make the
# model forget.
LR_SCALE = {"text": 0.1, "qa": 1.0, "distill": 0.1, "dpo": 0.01}
LORA_LR_SCALE = 5  # on top of that: B is zero at first, so the updates of A are too
# Instead of pretraining's rate if that is unknown (imported models) or does not fit AdamW (SGD's).
IMPORTED_LR = 3e-4
# Settings of the teacher that a new student does not inherit if the setting on the left is given.
DERIVED = {
    "n_embd": ("n_head", "n_kv_head", "head_size", "n_inner"),
    "n_head": ("n_kv_head", "head_size"),
    "mlp": ("n_inner",),
    "norm": ("norm_eps",),
}
# Flags that have no effect on other objectives than these.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("teacher", "temperature_kd", "alpha"), ("distill",)),
    "long": ("qa", "dpo"),
    "beta": ("dpo",),
    **dict.fromkeys(("doc_mask", "grow_windows", "separator"), ("text", "distill")),
    "overfit_batch": ("text", "qa", "dpo"),  # a student's loss has no limit of 0
}
# What --help shows instead of a default. None: it does not show this flag, which cannot be given.
HELP_DEFAULTS: dict[str, str | None] = {
    **dict.fromkeys(("preset", "arch", "tokenizer", "bpe_vocab_size", "parallel")),
    **dict.fromkeys(("minutes", "plan")),
    **dict.fromkeys(asdict(GPTConfig()), "the teacher's"),
    "dropout": "the checkpoint's; dpo: 0",
    "lora_dropout": "0.05; dpo: 0",
    "data": "qa: data/qa.json; distill: the teacher's",
    "tag": "the objective's name",
    "lr_max": "the checkpoint's, scaled for the objective",
    "warmup_steps": "",
    **{name: ", ".join(f"{objective} {values[name]}" for objective, values in DEFAULTS.items())
       for name in ("max_steps", "batch_size", "eval_every")},
    "compile": "qa, dpo: off",
}  # fmt: skip
CHANGED = "has changed since this run began: name the original, or give a new run another --tag"
FOR_MERGE = {"source", "merge", "out_dir", "tag", "overwrite", "device"}


class Base(NamedTuple):
    """The model that fine-tuning starts from; for a new student, its teacher."""

    model: GPT
    tokenizer: Tokenizer
    state: dict[str, Any]  # its checkpoint
    sha256: str  # of its weights
    trained: TrainConfig  # how it was trained, as far as that matters here

    @property
    def imported(self) -> bool:
        """Whether it was imported: then the text that it was trained on is unknown."""
        return not self.state["corpus"]["sha256"]

    @property
    def lr(self) -> float:
        """The peak learning rate of pretraining, for AdamW."""
        scale = OPTIMIZERS[self.trained.optimizer].adamw_lr
        if self.imported or scale is None:
            return IMPORTED_LR
        return self.trained.lr_max * scale


def load_base(path: Path) -> Base:
    """Read a base or a teacher. Raises UserError if it is invalid. Settings that an older version
    did not save, and names that this version does not know, become defaults. A base that was
    fine-tuned before has the learning rate of its pretraining, so that rates do not shrink with
    each stage."""
    model, tokenizer, state = load_checkpoint(path, torch.device("cpu"))
    state["optimizers"] = []  # twice as large as the weights, and not needed
    saved = state["train_config"]
    names = {"preset": PRESETS, "arch": ARCHS, "tokenizer": TOKENIZERS}
    known = {name for name, choices in names.items() if saved.get(name) in [*choices]}
    known |= {"data", "separator", "hold_out", "lr_max", "optimizer"}
    values = {"preset": "laptop"} | {name: saved[name] for name in known & saved.keys()}
    with matching_contents(path):
        if "lr" in state.get("finetune", {}):
            values |= {"lr_max": state["finetune"]["lr"], "optimizer": "adamw"}
        trained = from_dict(TrainConfig, values)
        raise_problems(all_problems(trained))
    return Base(model, tokenizer, state, lora.weights_sha256(state["model"]), trained)


# --- from flags to settings


def resolve_finetune(flags: dict[str, Any]) -> tuple[Any, ...]:
    """All settings of a run from its flags, the base, the teacher, and the checkpoint to resume.
    Raises UserError for flags that do not fit each other or the checkpoints."""
    if not flags:  # for --help
        defaults = from_dict(TrainConfig, DEFAULTS["text"])
        return FinetuneConfig(), LoRAConfig(), defaults, GPTConfig(), None, None, None
    tag = flags.get("tag", "merged" if "merge" in flags else flags.get("objective", "text"))
    flags = flags | {"out_dir": flags.get("out_dir", "checkpoints"), "tag": tag}
    if "merge" in flags:
        unused = [name for name in flags if name not in FOR_MERGE]
        found = [f"--{name} has no effect on --merge: leave it out" for name in unused]
        if not (flags.get("source") and flags["merge"]):
            example = "python finetune.py BASE.pt --merge ADAPTER.pt"
            found.append(f"name the base and the adapter: {example}")
        raise_problems(found)
        settings, config = from_dict(FinetuneConfig, flags), from_dict(TrainConfig, flags)
        return settings, LoRAConfig(), config, GPTConfig(), None, None, None
    flags, state = checkpoint_to_resume(flags, Path(flags["out_dir"], tag))
    if state:
        flags = finetune_flags(flags, state, Path(flags["out_dir"], tag, "latest.pt"))
    settings, adapt = from_dict(FinetuneConfig, flags), from_dict(LoRAConfig, flags)
    problems = all_problems(settings) + all_problems(adapt)
    raise_problems(problems + ([] if state else flag_problems(flags, settings, adapt)))
    if settings.objective == "dpo":
        flags = {"dropout": 0.0, "lora_dropout": 0.0} | flags
        adapt = from_dict(LoRAConfig, flags)
    teacher = load_base(Path(settings.teacher)) if settings.objective == "distill" else None
    base = load_base(Path(settings.source)) if settings.source or not teacher else teacher
    if teacher and teacher.imported and "data" not in flags:
        raise UserError("give --data: the text that an imported teacher was trained on is unknown")
    if not state:
        flags = {"grad_accum": world_size()} | flags  # one micro-batch per process
    gpt_config = base.model.config
    if settings.source:
        gpt_config = replace(gpt_config, dropout=flags.get("dropout", gpt_config.dropout))
    else:
        gpt_config = student_config(gpt_config, flags)
    config = run_config(flags, settings, adapt, base)
    return settings, adapt, config, gpt_config, base, teacher, state


def finetune_flags(flags: dict[str, Any], state: dict[str, Any], latest: Path) -> dict[str, Any]:
    """The settings of a run to resume, overridden by the flags. Settings that an older version did
    not save become defaults. Raises UserError for an invalid checkpoint, and for flags that cannot
    change during a run; the base and the teacher may be moved, because their weights are compared.
    """
    if "finetune" not in state:
        raise UserError("this is a run of train.py: resume it with train.py")
    with matching_contents(latest):
        origin = state["finetune"]
        settings, adapt = (from_dict(cls, origin) for cls in (FinetuneConfig, LoRAConfig))
        raise_problems(all_problems(settings) + all_problems(adapt))
        own, others = asdict(settings) | asdict(adapt), saved_settings(state)
        if not isinstance(origin["base_sha256"], str):
            raise ValueError("base_sha256 is not text")
        raise_problems(flag_problems({"data": others["data"]}, settings, adapt))
    if adapt.lora_rank:
        lora.check_contents(state.get("adapter", {}), latest)
    fixed = {*own, *asdict(GPTConfig()), "seed", "data", "preset", "arch", "tokenizer"}
    fixed -= {"dropout", *(name for name in ("source", "teacher") if own[name])}
    return resumed_flags(flags, own | others, fixed)


def flag_problems(flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig) -> list[str]:
    """What is wrong with the flags of a new run, before any file is read."""
    found, objective = [], settings.objective
    found += [f"--{name} is for train.py" for name in ("minutes", "plan") if name in flags]
    student = objective == "distill" and not settings.source
    for name, objectives in ONLY_FOR.items():
        if name in flags and objective not in objectives:
            found.append(f"--{name} is for --objective {' or '.join(objectives)}")
    if not adapt.lora_rank:
        names = [f"--{name}" for name in flags if name.startswith("lora_") and name != "lora_rank"]
        found += [f"{', '.join(names)}: give --lora_rank too"] if names else []
    elif student:
        found.append("--lora_rank adapts a trained model: name its checkpoint")
    fixed = {"preset", "arch", "tokenizer", "bpe_vocab_size"}
    fixed |= set() if student else asdict(GPTConfig()).keys() - {"dropout"}
    found += [
        f"--{name} is determined by the checkpoint: leave it out" for name in flags if name in fixed
    ]
    if objective == "distill" and not settings.teacher:
        found.append("--objective distill needs a --teacher")
    if objective != "distill" and not settings.source:
        found.append("name the checkpoint to fine-tune: python finetune.py checkpoints/best.pt ...")
    if objective in ("text", "dpo") and not flags.get("data"):
        found.append(f"--objective {objective} needs --data")
    if objective == "text" and str(flags.get("data")).lower().endswith(".json"):
        found.append(f"{flags['data']} contains questions and answers: use --objective qa")
    return found


def run_config(
    flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig, base: Base
) -> TrainConfig:
    """The settings of the run: the flags, then the objective's defaults, then the checkpoint's."""
    trained = base.trained
    own = OPTIMIZERS[flags["optimizer"]].defaults if flags.get("optimizer") in OPTIMIZERS else {}
    lr = own.get("lr_max", base.lr)
    if settings.source:  # a new student learns everything from the start
        lr *= LR_SCALE[settings.objective] * (LORA_LR_SCALE if adapt.lora_rank else 1)
    names = ("preset", "arch", "data", "tokenizer")
    values = {name: getattr(trained, name) for name in names} | own | {"lr_max": lr}
    if settings.objective == "distill" and "data" not in flags:
        values |= {"separator": trained.separator, "hold_out": trained.hold_out}
    if settings.objective == "qa":
        values["data"] = "data/qa.json"
    return from_dict(TrainConfig, values | DEFAULTS[settings.objective] | flags)


def student_config(teacher: GPTConfig, flags: dict[str, Any]) -> GPTConfig:
    """The settings of a new student: the flags, then the teacher's."""
    values = asdict(teacher)
    for given, derived in DERIVED.items():
        if given in flags:
            values |= dict.fromkeys(derived, 0)
    return from_dict(GPTConfig, values | flags)


# --- what prevents a run


def check_finetune(
    settings: FinetuneConfig,
    adapt: LoRAConfig,
    config: TrainConfig,
    gpt_config: GPTConfig,
    base: Base | None,
    teacher: Base | None,
    state: dict[str, Any] | None,
) -> list[str]:
    """What prevents this run on this machine, in its folder, or with these checkpoints."""
    run_dir = Path(config.out_dir, config.tag)
    if settings.merge:
        return merge_problems(settings, run_dir, config.overwrite)
    if base is None:  # no flags at all
        return ["name the checkpoint to fine-tune: python finetune.py checkpoints/best.pt ..."]
    found = check_run(gpt_config, config)
    for path in filter(None, (settings.source, settings.teacher)):
        if Path(path).resolve().parent == run_dir.resolve():
            found.append(f"{run_dir}/ contains {path}: give the run another --tag")
    if teacher:
        found += teacher_problems(teacher, base, gpt_config)
    if config.parallel == "fsdp":
        found.append("--parallel fsdp is for train.py: leave it out")
    if settings.objective == "dpo" and (gpt_config.dropout or adapt.lora_dropout):
        found.append("--objective dpo trains without dropout: leave out --dropout, --lora_dropout")
    if not state:
        return found
    origin = state["finetune"]
    if origin["base_sha256"] != base.sha256:
        found.append(f"{settings.source or settings.teacher} {CHANGED}")
    elif teacher and origin.get("teacher_sha256", teacher.sha256) != teacher.sha256:
        found.append(f"{settings.teacher} {CHANGED}")
    elif adapt.lora_rank:
        latest = run_dir / "latest.pt"
        weights = (base.model.config, base.tokenizer, base.sha256)
        lora.check_adapter(state["adapter"], *weights, latest)
    return found


def teacher_problems(teacher: Base, base: Base, student: GPTConfig) -> list[str]:
    """Why a teacher cannot teach this student."""
    own, other = teacher.tokenizer, base.tokenizer
    if own.to_dict() != other.to_dict() or teacher.model.config.vocab_size != student.vocab_size:
        return [
            f"teacher and student have different tokenizers ({own.vocab_size} and "
            f"{other.vocab_size} tokens): a student needs its teacher's"
        ]
    if (size := teacher.model.config.block_size) < student.block_size:
        return [
            f"the teacher's window of {size} tokens is shorter than the student's, "
            f"{student.block_size}: a new student can have --block_size {size}"
        ]
    return []


def merge_problems(settings: FinetuneConfig, folder: Path, overwrite: bool) -> list[str]:
    """What prevents a merge, which writes folder/best.pt. Of what is there, it replaces only the
    result of another merge."""
    target = folder / "best.pt"
    if is_torchrun():
        return ["--merge needs one process: run it without torchrun"]
    if found := folder_problems(folder):
        return found
    if run_files(folder) not in ([], [target]):
        return [f"{folder}/ contains a run: give another --tag"]
    if target.exists() and "merged" not in read_checkpoint(target):
        return [f"{target} is not the result of a merge: give another --tag"]
    if target.exists() and target.resolve() == Path(settings.source).resolve():
        return [f"{target} is the base: give another --tag"]
    if target.exists() and not overwrite:
        return [f"{target} exists: --overwrite it, or give another --tag"]
    return []
