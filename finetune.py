"""Fine-tune a trained model.

    python finetune.py checkpoints/best.pt --data my.txt                         another text
    python finetune.py checkpoints/best.pt --objective chat --data data/qa.json  answering questions
    python finetune.py checkpoints/small/best.pt --objective distill --teacher checkpoints/best.pt
    python finetune.py checkpoints/best.pt --objective dpo --data data/pairs.jsonl     preferences
    python finetune.py checkpoints/best.pt --data my.txt --lora_rank 8           with LoRA
    python finetune.py checkpoints/best.pt --merge checkpoints/text/adapter.pt   merge an adapter

The run goes to checkpoints/TAG/, by default named after the objective, with the files of a
pretraining run, and --resume. Its best.pt is an ordinary checkpoint; with --lora_rank there is also
adapter.pt, the trained matrices only. Next: python explore.py chat checkpoints/chat/best.pt
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from system.start import run

from config import GPTConfig, TrainConfig
from corpus.corpus import MAX_IN_MEMORY, Corpus
from corpus.documents import check_known, has_records, iter_documents, read_folder
from corpus.load import find_corpus, is_dataset
from corpus.records import read_records, record_text, split_records
from corpus.text import file_info
from finetuning import lora
from finetuning.lora import AdapterFormat, LoRAConfig
from finetuning.new_tokens import EMBEDDINGS, extend_tokenizer, extend_weights
from finetuning.records import Records, Splits, encode_pair, encode_splits
from finetuning.setup import check_finetune, help_defaults, resolve_finetune
from finetuning.tasks import OBJECTIVES, FinetuneConfig, Setup
from model import GPT
from sampling.text import answers_questions, last_trained_on_text
from system.command_line import parse_args
from system.files import locked, save_checkpoint
from system.settings import UserError, quote_path, raise_problems
from tokenizer import END_OF_TEXT, Tokenizer
from train import Trainer, run_training
from training import distributed
from training.checks import overfit_batch, print_example, print_parameters
from training.setup import check_unchanged, load_data, on_checked_device, setup_machine
from training.task import CheckpointFormat, PlainFormat, Pretraining
from utils import read_checkpoint

# --- data


def prepare_data(setup: Setup) -> tuple[Tokenizer, dict[str, Any], Corpus | Splits]:
    """The tokenizer of a run (perhaps with new tokens), a description of its data, the data."""
    settings, config, base = setup.settings, setup.config, setup.base
    objective, tokenizer = OBJECTIVES[settings.objective], base.tokenizer
    with distributed.local_rank_zero_first():  # it may be downloaded
        path = find_corpus(config.data)
    encode, specials, records = objective.records, objective.specials, []
    if encode or has_records(path, config.encoding):
        records = read_records(path, encode is encode_pair, config.skip_bad, config.encoding)
        if settings.objective == "text":
            raise UserError(f"{path} contains questions and answers: use --objective chat")
    texts = map(record_text, records) if records else texts_of(path, config, tokenizer)
    if specials is None:
        check_known(tokenizer, texts, str(path))
    else:
        several = config.separator or path.is_dir() or path.suffix.lower() == ".jsonl"
        documents = not encode and several
        tokenizer = extend_tokenizer(tokenizer, (END_OF_TEXT,) if documents else specials, texts)
    if not encode:
        corpus = load_data(setup.gpt_config, config, setup.state, tokenizer).corpus
        return tokenizer, corpus.info, corpus
    if len(records) < 1 + config.hold_out:
        one_out = ", because one is held out: add some, or --no-hold_out" * config.hold_out
        raise UserError(f"{path} has too few records{one_out}")
    info = file_info(path)
    check_unchanged(info, config, setup.state)
    splits = split_records(records) if config.hold_out else (records, records)
    asked = answers_questions(base.tokenizer) and not last_trained_on_text(base.state)
    if ask := asked or encode is not encode_pair:
        info["questions"] = len(records)
    block_size = setup.gpt_config.block_size
    return tokenizer, info, encode_splits(encode, splits, tokenizer, block_size, ask)


def texts_of(path: Path, config: TrainConfig, tokenizer: Tokenizer) -> Iterable[str]:
    """The texts in a corpus; none if it is a data set or too large, which load_corpus rejects."""
    if is_dataset(config.data) or path.stat().st_size > MAX_IN_MEMORY:
        return []
    if path.is_dir():
        return read_folder(path, config.encoding, tokenizer)
    found = iter_documents(path, separator=config.separator, encoding=config.encoding)
    return (text for text, _ in found)


# --- runs


def make_model(
    setup: Setup, tokenizer: Tokenizer, info: dict[str, Any]
) -> tuple[GPT, CheckpointFormat]:
    """The base, with rows for new tokens, and the format of its checkpoints. info: of the data."""
    settings, adapt, base = setup.settings, setup.adapt, setup.base
    new_tokens = tokenizer is not base.tokenizer
    size = max(base.model.config.vocab_size, tokenizer.vocab_size)
    model = GPT(replace(setup.gpt_config, vocab_size=size))
    weights = base.model.state_dict()
    if new_tokens:
        weights = extend_weights(weights, base.tokenizer, tokenizer)
    model.load_state_dict(weights)
    origin = asdict(settings) | asdict(adapt) | {"base_sha256": base.sha256, "lr": base.lr}
    entries = {"tokenizer": tokenizer.to_dict(), "corpus": info, "finetune": origin}
    if not adapt.lora_rank:
        return model, PlainFormat(entries)
    plain = model.state_dict()
    lora.add_lora(model, adapt, also=EMBEDDINGS if new_tokens else ())  # these are trained too
    header = {"lora": asdict(adapt), "base_sha256": base.sha256, "objective": settings.objective}
    header |= {"tokenizer": entries["tokenizer"], "gpt_config": asdict(model.config)}
    return model, AdapterFormat(entries, header, plain, lora.trained_names(model), adapt.scale)


def write_merged(setup: Setup) -> int:
    """Write the checkpoint of an adapter merged into its base, best.pt in the run's folder."""
    base, path = setup.base, Path(setup.settings.merge)
    adapter, target = lora.read_adapter(path), setup.run_dir / "best.pt"
    lora.check_adapter(adapter, base.model.config, base.tokenizer, base.sha256, path)
    weights = base.model.state_dict() | adapter["tensors"]
    merged = lora.merge_adapter(weights, LoRAConfig(**adapter["lora"]).scale)
    if not all(weight.isfinite().all() for weight in merged.values()):
        raise UserError(f"{path} is invalid: merged weights are infinite")
    state = {name: value for name, value in base.state.items() if name not in ("adapter", "files")}
    state |= {"model": merged, "optimizers": [], "scaler": {}, "log": []}
    state |= {name: adapter[name] for name in ("gpt_config", "tokenizer")}
    state["merged"] = {"adapter": str(path), "lora": adapter["lora"], "base_sha256": base.sha256}
    state["merged"] |= {"objective": str(adapter.get("objective"))}  # unknown in older versions
    with locked(setup.run_dir, "a merge"):
        raise_problems(check_finetune(*setup))  # the folder may have changed
        save_checkpoint(target, state)
    command = f"python generate.py {quote_path(target)}"
    print(f"{target}: {path} merged into {setup.settings.source}; next: {command}")
    return 0


def print_summary(setup: Setup, model: GPT, data: Corpus | Splits) -> None:
    """Print what will be fine-tuned, on what, and how, before anything slow starts."""
    settings, config = setup.settings, setup.config
    if isinstance(data, Corpus):
        unit, n_train, n_val = "tokens", len(data.train_ids), len(data.val_ids)
    else:
        unit, (n_train, n_val) = "records", (len(split.records) for split in data.values())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_all = model.num_params()
    print(
        f"model: {settings.source}; {n_trained:,} of {n_all:,} parameters are "
        f"trained ({n_trained / n_all:.2%})\n"
        f"objective: {settings.objective}, on {config.data}; {n_train:,} training {unit}, "
        f"{n_val:,} validation {unit}\n"
        f"run: {config.max_steps} steps of {config.batch_size} x {config.grad_accum}, learning "
        f"rate {config.lr_max:g} to {config.lr_min:g}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    classes = (FinetuneConfig, LoRAConfig, TrainConfig, GPTConfig)
    setup: Setup = parse_args(
        classes, argv, __doc__, resolve_finetune, check_finetune, help_defaults()
    )
    settings, adapt, config = setup[:3]
    if settings.merge:
        return write_merged(setup)
    on_checked_device(setup.gpt_config, config)
    device = distributed.init_process_group(config.device)
    tokenizer, info, data = prepare_data(setup)
    setup_machine(config, device, setup.state)
    model, format = make_model(setup, tokenizer, info)
    if isinstance(data, Corpus):
        block_size = model.config.block_size
        source: Any = Pretraining(data, tokenizer, block_size, config, device, format)
    else:
        source = Records(data, tokenizer, config, device, format)
    task = OBJECTIVES[settings.objective].task(source, setup, model)
    print_summary(setup, model, data)
    status, make_trainer = 0, partial(Trainer, model, task, config, device)
    if config.dry_run:
        print_parameters(model.config)
        (x, y), _ = task.get_batch(0, 0)
        print_example(tokenizer, x[0], y[0])
    elif config.overfit_batch:
        status = overfit_batch(make_trainer())
    else:
        status, _ = run_training(make_trainer(), setup.state)
        if adapt.lora_rank and distributed.rank() == 0:
            path = setup.run_dir / "adapter.pt"
            with locked(setup.run_dir, "a training run"):
                save_checkpoint(path, read_checkpoint(path.with_name("best.pt"))["adapter"])
            print(f"adapter: {path}, for {settings.source}")
    distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    run(main)
