"""The settings of a fine-tuning run, from its flags, its objective and its base."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import (
    PRESETS,
    GPTConfig,
    TrainConfig,
    UserError,
    all_problems,
    from_dict,
    raise_problems,
    setting,
)
from finetuning import lora
from finetuning.lora import LoRAConfig
from model import GPT
from tokenizer import Tokenizer
from training.distributed import world_size
from training.setup import check_run, checkpoint_to_resume, resumed_flags
from utils import load_checkpoint


@dataclass
class FinetuneConfig:
    """What is fine-tuned, and for which objective."""

    source: str = setting("", "checkpoint to fine-tune", positional=True, group="fine-tuning")
    objective: str = setting("text", "what to train for", choices=("text", "qa", "distill", "dpo"))
    long: str = setting("cut", "records longer than the window: cut the prompt, or skip them",
                        choices=("cut", "skip"))  # fmt: skip
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
LORA_LR_SCALE = 5  # on top of that: low-rank matrices start at zero
IMPORTED_LR = 3e-4  # instead of pretraining's peak rate, which is unknown for an imported model
MUON_LR_SCALE = 0.5  # for models trained with Muon, whose rates are higher than AdamW's
# Settings of the teacher that a new student does not inherit if the setting on the left is given.
DERIVED = {
    "n_embd": ("n_head", "n_kv_head", "head_size", "n_inner"),
    "n_head": ("n_kv_head", "head_size"),
    "mlp": ("n_inner",),
    "norm": ("norm_eps",),
}
ONLY_FOR = {"teacher": "distill", "temperature_kd": "distill", "alpha": "distill", "beta": "dpo"}


class Base(NamedTuple):
    """The model that fine-tuning starts from; for a new student, its teacher."""

    model: GPT
    tokenizer: Tokenizer
    state: dict[str, Any]  # its checkpoint
    sha256: str  # of its weights

    @property
    def imported(self) -> bool:
        """Whether it was imported: then the text that it was trained on is unknown."""
        return not self.state["corpus"]["sha256"]


# --- from flags to settings


def resolve_finetune(flags: dict[str, Any]) -> tuple[Any, ...]:
    """All settings of a run from its flags, the base, and the checkpoint to resume. Raises
    UserError for flags that do not fit each other or the checkpoints."""
    if not flags:  # for --help
        defaults = from_dict(TrainConfig, DEFAULTS["text"])
        return FinetuneConfig(), LoRAConfig(), defaults, GPTConfig(), None, None
    tag = flags.get("tag", "merged" if "merge" in flags else flags.get("objective", "text"))
    flags = flags | {"out_dir": flags.get("out_dir", "checkpoints"), "tag": tag}
    flags, state = checkpoint_to_resume(flags, Path(flags["out_dir"], tag))
    if state and "finetune" not in state:
        raise UserError("this is a run of train.py: resume it with train.py")
    if state:
        saved = state["gpt_config"] | state["train_config"] | state["finetune"]
        fixed = {*state["finetune"], *state["gpt_config"], "seed", "data"} - {"dropout"}
        flags = resumed_flags(flags, saved, fixed)
    settings, adapt = from_dict(FinetuneConfig, flags), from_dict(LoRAConfig, flags)
    if settings.merge:
        return settings, adapt, from_dict(TrainConfig, flags), GPTConfig(), None, None
    problems = all_problems(settings) + all_problems(adapt)
    raise_problems(problems + ([] if state else flag_problems(flags, settings, adapt)))
    source = Path(settings.source or settings.teacher)
    model, tokenizer, base_state = load_checkpoint(source, torch.device("cpu"))
    base = Base(model, tokenizer, base_state, lora.weights_sha256(base_state["model"]))
    if not state:
        flags = {"grad_accum": world_size()} | flags  # one micro-batch per process
    gpt_config = base.model.config
    if settings.source:
        gpt_config = replace(gpt_config, dropout=flags.get("dropout", gpt_config.dropout))
    else:
        gpt_config = student_config(gpt_config, flags)
    return settings, adapt, run_config(flags, settings, adapt, base), gpt_config, base, state


def flag_problems(flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig) -> list[str]:
    """What is wrong with the flags of a new run, before any file is read."""
    found, objective = [], settings.objective
    student = objective == "distill" and not settings.source
    for name, only in ONLY_FOR.items():
        if name in flags and objective != only:
            found.append(f"--{name} is for --objective {only}")
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
    if objective == "text" and str(flags.get("data")).endswith(".json"):
        found.append(f"{flags['data']} contains questions and answers: use --objective qa")
    return found


def run_config(
    flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig, base: Base
) -> TrainConfig:
    """The settings of the run: the flags, then the objective's defaults, then the checkpoint's."""
    trained = base.state["train_config"]
    lr = IMPORTED_LR if base.imported else trained["lr_max"]
    lr *= MUON_LR_SCALE if trained["optimizer"] == "muon" else 1
    if settings.source:  # a new student learns everything from the start
        lr *= LR_SCALE[settings.objective] * (LORA_LR_SCALE if adapt.lora_rank else 1)
    values = {name: trained[name] for name in ("arch", "data", "tokenizer")} | {"lr_max": lr}
    if settings.objective == "qa":
        values["data"] = "data/qa.json"
    values["preset"] = trained["preset"] if trained["preset"] in PRESETS else "laptop"
    return from_dict(TrainConfig, values | DEFAULTS[settings.objective] | flags)


def student_config(teacher: GPTConfig, flags: dict[str, Any]) -> GPTConfig:
    """The settings of a new student: the flags, then the teacher's."""
    values = asdict(teacher)
    for given, derived in DERIVED.items():
        if given in flags:
            values |= dict.fromkeys(derived, 0)
    return from_dict(GPTConfig, values | flags)


def check_finetune(
    settings: FinetuneConfig,
    adapt: LoRAConfig,
    config: TrainConfig,
    gpt_config: GPTConfig,
    base: Base | None,
    state: dict[str, Any] | None,
) -> list[str]:
    """What prevents this run on this machine or in its folder."""
    if settings.merge:
        return []
    if base is None:  # no flags at all
        return ["name the checkpoint to fine-tune: python finetune.py checkpoints/best.pt ..."]
    found = check_run(config)
    source, run_dir = Path(settings.source or settings.teacher), Path(config.out_dir, config.tag)
    if state and state["finetune"]["base_sha256"] != base.sha256:
        found.append(f"{source} has changed since this run began")
    if config.parallel == "fsdp":
        found.append("--parallel fsdp is for train.py: leave it out")
    if source.resolve().parent == run_dir.resolve():
        found.append(f"{run_dir}/ contains the checkpoint to fine-tune: give the run another --tag")
    return found
