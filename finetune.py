"""Fine-tune a trained model.

    python finetune.py checkpoints/best.pt --data my.txt                         another text
    python finetune.py checkpoints/best.pt --objective qa --data data/qa.json    answering questions
    python finetune.py --objective distill --teacher checkpoints/best.pt --n_layer 2     a student
    python finetune.py checkpoints/best.pt --objective dpo --data pairs.jsonl    preferences
    python finetune.py checkpoints/best.pt --data my.txt --lora_rank 8           with LoRA
    python finetune.py checkpoints/best.pt --merge checkpoints/text/adapter.pt   merge an adapter

The run goes to checkpoints/TAG/, by default named after the objective, with the files of a
pretraining run, and --resume. Its best.pt is an ordinary checkpoint; with --lora_rank there is also
adapter.pt, the trained matrices alone. Next: python explore.py chat checkpoints/qa/best.pt
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import (
    GPTConfig,
    TrainConfig,
    UserError,
    from_dict,
    parse_args,
)
from corpus.files import iter_documents
from corpus.load import Corpus, file_info, find_corpus, load_corpus, split_documents, split_records
from corpus.records import read_pairs, read_records, record_text
from finetuning import lora
from finetuning.lora import AdapterFormat, LoRAConfig
from finetuning.new_tokens import EMBEDDINGS, extend_tokenizer, extend_weights
from finetuning.setup import Base, FinetuneConfig, check_finetune, resolve_finetune
from finetuning.tasks import DistillationTask, DPOTask, QATask, Splits, TextTask, encode_splits
from model import GPT
from system.errors import run
from tokenizer import END_OF_TEXT, QA_SPECIALS, CharTokenizer, Tokenizer
from train import Trainer, run_training
from training.distributed import (
    destroy_process_group,
    init_process_group,
    local_rank_zero_first,
    rank,
)
from training.overfit import overfit_batch
from training.setup import (
    check_corpus,
    check_unchanged,
    machine_line,
    setup_machine,
)
from training.task import CheckpointFormat, PlainFormat, Pretraining, Task
from utils import load_checkpoint, pick_device, read_checkpoint, save_checkpoint

# --- data and models


class Data(NamedTuple):
    """What a run learns from: a corpus, or the records of both splits."""

    tokenizer: Tokenizer  # with more tokens than the base's, if the data need them
    info: dict[str, Any]  # of the corpus or file
    corpus: Corpus | None
    records: list[list[Any]] | None


def load_data(objective: str, data: str, tokenizer: Tokenizer) -> Data:
    """The data of a run, and the tokenizer for them."""
    if objective in ("text", "distill"):
        if objective == "text":  # a student cannot learn tokens that its teacher does not know
            tokenizer = extend_for_text(find_corpus(data), tokenizer)
        tokenizer, corpus = load_corpus(data, tokenizer=tokenizer)
        return Data(tokenizer, corpus.info, corpus, None)
    path = find_corpus(data)
    if objective == "dpo":
        splits = split_documents(read_pairs(path))
    else:
        records = read_records(path)
        splits = split_records(records)
        tokenizer = extend_tokenizer(tokenizer, QA_SPECIALS, [record_text(r) for r in records])
    info = file_info(path)
    return Data(tokenizer, info, None, list(splits))


def extend_for_text(path: Path, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with what a text or .jsonl file needs."""
    if not path.is_file():
        return tokenizer
    specials = (END_OF_TEXT,) if path.suffix.lower() == ".jsonl" else ()
    texts = []
    if isinstance(tokenizer, CharTokenizer):  # byte pairs can encode every text
        texts = [text for text, _ in iter_documents(path)]
    return extend_tokenizer(tokenizer, specials, texts)


def new_model(settings: FinetuneConfig, gpt_config: GPTConfig, base: Base, data: Data) -> GPT:
    """The model to train: the base, with rows for new tokens, or a new student."""
    if not settings.source:
        return GPT(gpt_config)
    size = max(base.model.config.vocab_size, data.tokenizer.vocab_size)
    model = GPT(replace(gpt_config, vocab_size=size))
    weights = base.model.state_dict()
    if data.tokenizer is not base.tokenizer:
        weights = extend_weights(weights, base.tokenizer, data.tokenizer)
    model.load_state_dict(weights)
    return model


def load_teacher(
    path: Path, tokenizer: Tokenizer, student: GPTConfig, compiled: bool, device: torch.device
) -> GPT:
    """The teacher. Raises UserError if it cannot teach this student."""
    teacher, own, _ = load_checkpoint(path, device)
    if own.to_dict() != tokenizer.to_dict() or teacher.config.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher and student have different tokenizers ({own.vocab_size} and "
            f"{tokenizer.vocab_size} tokens): a student needs its teacher's"
        )
    if teacher.config.block_size < student.block_size:
        raise UserError(
            f"the teacher's window of {teacher.config.block_size} tokens is shorter than the "
            f"student's, {student.block_size}"
        )
    if compiled:
        for block in teacher.blocks:
            block.compile()
    return teacher.requires_grad_(False)


def old_corpus(base: Base, tokenizer: Tokenizer) -> Corpus | None:
    """The corpus that the base was trained on, if it still exists."""
    data = base.state["train_config"]["data"]
    if base.imported:
        return None
    try:
        _, corpus = load_corpus(data, tokenizer=tokenizer)
        if corpus.info["sha256"] != base.state["corpus"]["sha256"]:
            raise UserError(f"{data} is not what the checkpoint was trained on")
    except UserError as error:
        print(f"not logging the loss on the old corpus: {error}")
        return None
    return corpus


def make_format(
    settings: FinetuneConfig,
    adapt: LoRAConfig,
    model: GPT,
    plain: dict[str, Tensor],
    base: Base,
    data: Data,
) -> CheckpointFormat:
    """The format of the run's checkpoints; `plain` are the weights without LoRA."""
    origin = asdict(settings) | asdict(adapt) | {"base_sha256": base.sha256}
    tokenizer = data.tokenizer.to_dict()
    entries = {"tokenizer": tokenizer, "corpus": data.info, "finetune": origin}
    if not adapt.lora_rank:
        return PlainFormat(entries)
    header = {"lora": asdict(adapt), "base_sha256": base.sha256, "tokenizer": tokenizer}
    header |= {"gpt_config": asdict(model.config)}
    return AdapterFormat(entries, header, plain, lora.trained_names(model), adapt.scale)


def make_task(
    settings: FinetuneConfig,
    config: TrainConfig,
    model: GPT,
    plain: dict[str, Tensor],
    base: Base,
    data: Data,
    splits: Splits | None,
    format: CheckpointFormat,
    device: torch.device,
) -> Task:
    """The task of the objective."""
    tokenizer = data.tokenizer
    if splits and settings.objective == "qa":
        return QATask(splits, tokenizer, config, device, format)
    if splits:
        reference = GPT(model.config)
        reference.load_state_dict(plain)
        reference = reference.to(device).eval().requires_grad_(False)
        return DPOTask(splits, tokenizer, reference, settings.beta, config, device, format)
    assert data.corpus is not None
    text = Pretraining(data.corpus, tokenizer, model.config.block_size, config, device, format)
    if settings.objective == "text":
        return TextTask(text, old_corpus(base, tokenizer))
    path = Path(settings.teacher)
    teacher = load_teacher(path, tokenizer, model.config, bool(config.compile), device)
    return DistillationTask(text, teacher, settings.temperature_kd, settings.alpha)


# --- runs


def write_merged(settings: FinetuneConfig, target: Path, overwrite: bool) -> int:
    """Write the checkpoint of an adapter merged into its base."""
    if not settings.source:
        raise UserError("name the base too: python finetune.py BASE.pt --merge ADAPTER.pt")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: --overwrite it, or give another --tag")
    state, path = read_checkpoint(Path(settings.source)), Path(settings.merge)
    adapter = lora.read_adapter(path)
    lora.check_adapter(adapter, state["model"], path)
    scale = from_dict(LoRAConfig, adapter["lora"]).scale
    merged = lora.merge_adapter(state["model"], adapter["tensors"], scale)
    changed = {"model": merged, "optimizers": [], "scaler": {}, "log": []}
    changed |= {name: adapter[name] for name in ("gpt_config", "tokenizer")}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, state | changed)
    print(f"{target}: {path} merged into {settings.source}; next: python generate.py {target}")
    return 0


def print_summary(
    settings: FinetuneConfig, config: TrainConfig, model: GPT, data: Data, splits: Splits | None
) -> None:
    """Print what will be fine-tuned, on what, and how, before anything slow starts."""
    if splits:
        n_train, n_val = (len(splits[split]) for split in ("train", "val"))
        unit = {"qa": "answers", "dpo": "pairs"}[settings.objective]
    else:
        assert data.corpus is not None
        n_train, n_val, unit = len(data.corpus.train_ids), len(data.corpus.val_ids), "tokens"
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_all = model.num_params()
    print(
        f"model: {settings.source or 'a new student'}; {n_trained:,} of {n_all:,} parameters are "
        f"trained ({n_trained / n_all:.2%})\n"
        f"objective: {settings.objective}, on {config.data}; {n_train:,} training {unit}, "
        f"{n_val:,} validation {unit}\n"
        f"run: {config.max_steps} steps of {config.batch_size} x {config.grad_accum}, learning "
        f"rate {config.lr_max:g} to {config.lr_min:g}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    classes = (FinetuneConfig, LoRAConfig, TrainConfig, GPTConfig)
    settings, adapt, config, gpt_config, base, state = parse_args(
        classes, argv, __doc__, resolve_finetune, check_finetune
    )
    run_dir = Path(config.out_dir, config.tag)
    if settings.merge:
        return write_merged(settings, run_dir / "best.pt", config.overwrite)
    device = init_process_group(pick_device(config.device))
    with local_rank_zero_first():
        data = load_data(settings.objective, config.data, base.tokenizer)
    why_precision = setup_machine(config, device)
    model = new_model(settings, gpt_config, base, data)
    splits = None
    if data.records:
        sizes = (model.config.block_size, settings.long == "skip")
        check_unchanged(data.info, config, state)
        splits = encode_splits(settings.objective, data.records, data.tokenizer, *sizes)
    else:
        assert data.corpus is not None
        check_corpus(data.corpus, config, model.config.block_size, state)
    plain = model.state_dict()
    if adapt.lora_rank:  # the vectors of new tokens are trained too
        new_tokens = data.tokenizer is not base.tokenizer
        lora.add_lora(model, adapt, also=EMBEDDINGS if new_tokens else ())
    format = make_format(settings, adapt, model, plain, base, data)
    task = make_task(settings, config, model, plain, base, data, splits, format, device)
    trainer = Trainer(model, task, config, device)
    print(machine_line(config, device, why_precision))
    print_summary(settings, config, model, data, splits)
    if config.overfit_batch:
        status = overfit_batch(trainer)
    else:
        status, _ = run_training(trainer, state)
        if adapt.lora_rank and rank() == 0:
            best = read_checkpoint(run_dir / "best.pt")
            lora.save_adapter(run_dir / "adapter.pt", best["adapter"])
            print(f"adapter: {run_dir / 'adapter.pt'}, for {settings.source}")
    del trainer, task, model, plain, format
    destroy_process_group()
    return status


if __name__ == "__main__":
    run(main)
