"""Fine-tune a trained model.

    python finetune.py checkpoints/best.pt --data my.txt                         another text
    python finetune.py checkpoints/best.pt --objective qa --data data/qa.json    answering questions
    python finetune.py --objective distill --teacher checkpoints/best.pt --n_layer 2     a student
    python finetune.py checkpoints/best.pt --objective dpo --data data/pairs.jsonl     preferences
    python finetune.py checkpoints/best.pt --data my.txt --lora_rank 8           with LoRA
    python finetune.py checkpoints/best.pt --merge checkpoints/text/adapter.pt   merge an adapter

The run goes to checkpoints/TAG/, by default named after the objective, with the files of a
pretraining run, and --resume. Its best.pt is an ordinary checkpoint; with --lora_rank there is also
adapter.pt, the trained matrices only. The flags of "sizes" and "model components" are for a new
student; other models keep their own. Next: python explore.py chat checkpoints/qa/best.pt
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import GPTConfig, TrainConfig
from corpus.corpus import Corpus
from corpus.documents import iter_documents, split_documents
from corpus.load import MAX_IN_MEMORY, find_corpus, load_corpus, training_corpus
from corpus.records import read_pairs, read_records, record_text, split_records
from corpus.text import file_info
from finetuning import lora
from finetuning.lora import AdapterFormat, LoRAConfig
from finetuning.new_tokens import EMBEDDINGS, extend_tokenizer, extend_weights
from finetuning.setup import (
    HELP_DEFAULTS,
    Base,
    FinetuneConfig,
    check_finetune,
    load_base,
    merge_problems,
    resolve_finetune,
)
from finetuning.tasks import DistillationTask, DPOTask, QATask, Splits, TextTask, encode_splits
from model import GPT
from sampling.text import answers_questions, last_objective, last_trained_on_text
from system.command_line import parse_args
from system.errors import quote_path, run
from system.files import locked, save_checkpoint
from system.settings import UserError, raise_problems
from tokenizer import END_OF_TEXT, QA_SPECIALS, CharTokenizer, Tokenizer
from train import Trainer, run_training
from training.checks import overfit_batch, print_example, print_parameters
from training.distributed import (
    destroy_process_group,
    init_process_group,
    local_rank_zero_first,
    rank,
)
from training.setup import check_corpus, check_unchanged, setup_machine
from training.task import CheckpointFormat, PlainFormat, Pretraining, Task
from utils import read_checkpoint

# --- data and models


class Data(NamedTuple):
    """What a run learns from: a corpus, or the records of both splits."""

    tokenizer: Tokenizer  # with more tokens than the base's, if the data need them
    info: dict[str, Any]  # of the corpus or file
    corpus: Corpus | None
    records: list[list[Any]] | None


def load_data(
    settings: FinetuneConfig,
    data: str,
    tokenizer: Tokenizer,
    separator: str = "",
    hold_out: bool = True,
) -> Data:
    """The data of a run, and the tokenizer for them."""
    if settings.objective in ("text", "distill"):
        if settings.objective == "text":  # a student cannot learn tokens unknown to its teacher
            tokenizer = extend_for_text(find_corpus(data), tokenizer, separator)
        else:
            path = find_corpus(data)
            check_known(tokenizer, texts_of(path, tokenizer, separator), path)
        _, corpus = load_corpus(data, tokenizer=tokenizer, separator=separator, hold_out=hold_out)
        return Data(tokenizer, corpus.info, corpus, None)
    path = find_corpus(data)
    split: Callable[[list[Any]], tuple[list[Any], list[Any]]]
    if settings.objective == "dpo":
        records, split = read_pairs(path), split_documents
        check_known(tokenizer, [text for pair in records for text in pair.values()], path)
    else:
        records, split = read_records(path), split_records
        tokenizer = extend_tokenizer(tokenizer, QA_SPECIALS, [record_text(r) for r in records])
    if len(records) < 1 + hold_out:
        one_out = ", because one is held out: add some, or --no-hold_out" * hold_out
        raise UserError(f"{path} has too few records{one_out}")
    splits = split(records) if hold_out else (records, records)
    return Data(tokenizer, file_info(path), None, list(splits))


def extend_for_text(path: Path, tokenizer: Tokenizer, separator: str) -> Tokenizer:
    """The tokenizer with what a text or .jsonl file needs."""
    if not path.is_file() or path.stat().st_size > MAX_IN_MEMORY:  # load_corpus rejects that
        return tokenizer
    specials = (END_OF_TEXT,) if separator or path.suffix.lower() == ".jsonl" else ()
    return extend_tokenizer(tokenizer, specials, texts_of(path, tokenizer, separator))


def texts_of(path: Path, tokenizer: Tokenizer, separator: str) -> list[str]:
    """The texts whose characters a character tokenizer must have; byte pairs encode every text."""
    too_large = not path.is_file() or path.stat().st_size > MAX_IN_MEMORY
    if too_large or not isinstance(tokenizer, CharTokenizer):
        return []
    if path.suffix.lower() == ".json":
        return [record_text(record) for record in read_records(path)]
    return [text for text, _ in iter_documents(path, separator=separator)]


def check_known(tokenizer: Tokenizer, texts: Iterable[str], path: Path) -> None:
    """Raise UserError if texts have characters that a character tokenizer does not have. Those that
    it reads as <UNK> would be learned as <UNK>."""
    if not isinstance(tokenizer, CharTokenizer):
        return
    if unknown := sorted(set().union(*map(set, texts)) - set(tokenizer.chars)):
        names = " ".join(map(repr, unknown[:10])) + " ..." * (len(unknown) > 10)
        raise UserError(
            f"{path} has characters that the model does not know: {names}; remove them, or "
            "fine-tune the model on a text with them first"
        )


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


def old_corpus(base: Base, tokenizer: Tokenizer) -> Corpus | None:
    """The corpus that the base was trained on, if it is a text that can be read."""
    if base.imported or last_objective(base.state) == "dpo":
        return None
    try:
        return training_corpus(tokenizer, base.state)
    except UserError as error:
        print(f"not logging the loss on the old corpus: {error}")
        return None


def make_format(
    settings: FinetuneConfig,
    adapt: LoRAConfig,
    model: GPT,
    plain: dict[str, Tensor],
    base: Base,
    teacher: Base | None,
    data: Data,
) -> CheckpointFormat:
    """The format of the run's checkpoints; `plain` are the weights without LoRA."""
    origin = asdict(settings) | asdict(adapt) | {"base_sha256": base.sha256}
    origin |= {"lr": base.lr} | ({"teacher_sha256": teacher.sha256} if teacher else {})
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
    teacher: Base | None,
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
    if not teacher:
        with local_rank_zero_first():  # it may be downloaded
            return TextTask(text, old_corpus(base, tokenizer))
    for block in teacher.model.blocks if config.compile else ():
        block.compile()
    frozen = teacher.model.to(device).requires_grad_(False)
    return DistillationTask(text, frozen, settings.temperature_kd, settings.alpha)


# --- runs


def write_merged(settings: FinetuneConfig, run_dir: Path, overwrite: bool) -> int:
    """Write the checkpoint of an adapter merged into its base, run_dir/best.pt."""
    path, target = Path(settings.merge), run_dir / "best.pt"
    adapter, base = lora.read_adapter(path), load_base(Path(settings.source))
    lora.check_adapter(adapter, base.model.config, base.tokenizer, base.sha256, path)
    scale = LoRAConfig(**adapter["lora"]).scale
    merged = lora.merge_adapter(base.model.state_dict(), adapter["tensors"], scale)
    if not all(weight.isfinite().all() for weight in merged.values()):
        raise UserError(f"{path} is invalid: merged weights are infinite")
    state = {name: value for name, value in base.state.items() if name not in ("adapter", "files")}
    state |= {"model": merged, "optimizers": [], "scaler": {}, "log": []}
    state |= {name: adapter[name] for name in ("gpt_config", "tokenizer")}
    state["merged"] = {"adapter": str(path), "lora": adapter["lora"], "base_sha256": base.sha256}
    with locked(run_dir, "a merge"):
        raise_problems(merge_problems(settings, run_dir, overwrite))  # it may have changed
        save_checkpoint(target, state)
    command = f"python generate.py {quote_path(target)}"
    print(f"{target}: {path} merged into {settings.source}; next: {command}")
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
    settings, adapt, config, gpt_config, base, teacher, state = parse_args(
        classes, argv, __doc__, resolve_finetune, check_finetune, HELP_DEFAULTS
    )
    run_dir = Path(config.out_dir, config.tag)
    if settings.merge:
        return write_merged(settings, run_dir, config.overwrite)
    device = init_process_group(config.device)
    with local_rank_zero_first():
        data = load_data(settings, config.data, base.tokenizer, config.separator, config.hold_out)
    setup_machine(config, device, state)
    model = new_model(settings, gpt_config, base, data)
    splits = None
    if data.records:
        sizes = (model.config.block_size, settings.long == "skip")
        check_unchanged(data.info, config, state)
        ask = answers_questions(base.tokenizer) and not last_trained_on_text(base.state)
        splits = encode_splits(settings.objective, data.records, data.tokenizer, *sizes, ask)
    else:
        assert data.corpus is not None
        check_corpus(data.corpus, config, model.config.block_size, state)
    plain = model.state_dict()
    if adapt.lora_rank:  # the vectors of new tokens are trained too
        new_tokens = data.tokenizer is not base.tokenizer
        lora.add_lora(model, adapt, also=EMBEDDINGS if new_tokens else ())
    format = make_format(settings, adapt, model, plain, base, teacher, data)
    task = make_task(settings, config, model, plain, base, teacher, data, splits, format, device)
    print_summary(settings, config, model, data, splits)
    if config.dry_run:
        print_parameters(model.config)
        (x, y), _ = task.get_batch(0, 0)
        print_example(data.tokenizer, x[0], y[0])
        destroy_process_group()
        return 0
    trainer = Trainer(model, task, config, device)
    if config.overfit_batch:
        status = overfit_batch(trainer)
    else:
        status, _ = run_training(trainer, state)
        if adapt.lora_rank and rank() == 0:
            with locked(run_dir, "a training run"):
                best = read_checkpoint(run_dir / "best.pt")
                lora.save_adapter(run_dir / "adapter.pt", best["adapter"])
            print(f"adapter: {run_dir / 'adapter.pt'}, for {settings.source}")
    del trainer, task, model, plain, format
    destroy_process_group()
    return status


if __name__ == "__main__":
    run(main)
