"""Change a trained model.

    python finetune.py checkpoints/best.pt --data my.txt                   go on with another text
    python finetune.py checkpoints/best.pt --objective qa --data data/qa.json      answer questions
    python finetune.py --objective distill --teacher checkpoints/best.pt --n_layer 2       a student
    python finetune.py checkpoints/best.pt --objective dpo --data pairs.jsonl      prefer some texts
    python finetune.py checkpoints/best.pt --data my.txt --lora_rank 8     with low-rank matrices
    python finetune.py checkpoints/best.pt --merge checkpoints/text/adapter.pt     and without again

The run goes to checkpoints/TAG/, where TAG is the objective if none is given, with the files that
pretraining leaves, and --resume. Its best.pt is a checkpoint like any other; with --lora_rank there
is also adapter.pt, what was learned alone. Next: python generate.py checkpoints/qa/best.pt --chat
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import parallel
import utils
from config import (
    PRESETS,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    from_dict,
    limit_problems,
    parse_flags,
    raise_problems,
    run,
    setting,
)
from corpora import (
    documents,
    file_sha256,
    find_corpus,
    load_corpus,
    split_documents,
    split_records,
)
from generate import stream_texts
from lora import LoRAConfig
from model import GPT
from preferences import encode_pair, read_pairs
from qa import encode_record, qa_batch, read_records, record_text
from tokenizer import END_OF_TEXT, QA_SPECIALS, CharTokenizer, Tokenizer
from train import (
    Objective,
    Trainer,
    join_processes,
    overfit_batch,
    prepare_machine,
    run_problems,
    train_to_the_end,
)
from vocabulary import EMBEDDINGS, extend_tokenizer, extend_weights

Example = tuple[np.ndarray, int]  # the ids of a text (T,), and how many of them are its prompt
Splits = dict[str, list[list[Example]]]  # train and val: of a question one example, of a pair two
Weights = dict[str, Tensor]  # by name


@dataclass
class FinetuneConfig:
    """What is changed, and for what."""

    source: str = setting("", "the checkpoint to change", positional=True, group="fine-tuning")
    objective: str = setting("text", "what for", choices=("text", "qa", "distill", "dpo"))
    long: str = setting(
        "cut", "records longer than the window lose the start of their prompt, or are skipped",
        choices=("cut", "skip"),
    )  # fmt: skip
    teacher: str = setting("", "distill: the checkpoint to learn from")
    temperature_kd: float = setting(4.0, "distill: softens both distributions", above=0)
    alpha: float = setting(0.5, "distill: weight of the soft loss, against the hard", low=0, high=1)
    beta: float = setting(0.1, "dpo: how dear it is to leave the model it was", above=0)
    merge: str = setting("", "an adapter.pt to write into its base, as a checkpoint; no training")


# Settings where pretraining's would not do: runs are short, their data small, and each batch of
# records has another length, for which it would be compiled anew.
DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"max_steps": 500, "batch_size": 12, "eval_every": 100},
    "qa": {"max_steps": 600, "batch_size": 16, "eval_every": 100, "compile": False},
    "distill": {"max_steps": 1500, "batch_size": 12, "eval_every": 250},
    "dpo": {"max_steps": 200, "batch_size": 8, "eval_every": 50, "compile": False},
}
# The peak learning rate as a share of pretraining's. Questions are learned by heart, the rest must
# not be forgotten.
RATES = {"text": 0.1, "qa": 1.0, "distill": 0.1, "dpo": 0.01}
LORA_RATE = 5  # times that for low-rank matrices, which begin at nothing
# What a new student does not take from its teacher if it is given the setting on the left.
DERIVED = {
    "n_embd": ("n_head", "n_kv_head", "head_size", "n_inner"),
    "n_head": ("n_kv_head", "head_size"),
    "mlp": ("n_inner",),
    "norm": ("norm_eps",),
}
ONLY_FOR = {"teacher": "distill", "temperature_kd": "distill", "alpha": "distill", "beta": "dpo"}


# --- the objectives, each beside its formula


def distillation_loss(
    student: Tensor, teacher: Tensor, hard: Tensor, temperature: float, alpha: float
) -> Tensor:
    """alpha T^2 KL(p || q) + (1 - alpha) hard, where p and q are the teacher's and the student's
    softmax(logits / T), logits (B, T, V) both, and hard is the usual loss (Hinton et al. 2015,
    section 2). T^2 because the gradient of the soft loss shrinks with 1/T^2."""
    log_p, log_q = (
        F.log_softmax(logits.float().flatten(0, 1) / temperature, dim=-1)  # (B T, V)
        for logits in (teacher, student)
    )
    soft = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected)), the mean over the pairs, from the `rewards` (B,) of
    both (DPO, Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(chosen - rejected).mean()


def rewards(model: nn.Module, reference: GPT, x: Tensor, y: Tensor, beta: float) -> Tensor:
    """beta log(pi(y|x) / pi_ref(y|x)), the reward that a model has learned to give (equation 5),
    of a batch of texts, (B,)."""
    with torch.no_grad():
        before = log_probability(reference(x)[0], y)
    return beta * (log_probability(model(x)[0], y) - before)


def log_probability(logits: Tensor, y: Tensor) -> Tensor:
    """The log-probability of the tokens y (B, T) that are not -100, summed over each text, (B,)."""
    log_p = logits.float().log_softmax(dim=-1)  # (B, T, V)
    return log_p.gather(2, y.clamp(min=0)[:, :, None]).squeeze(2).masked_fill(y == -100, 0).sum(1)


def distill_objective(teacher: GPT, settings: FinetuneConfig, trainer: Trainer) -> Objective:
    """Predict the corpus, and what a teacher thinks may come."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        docs = trainer.document_numbers(x)
        with torch.no_grad():
            taught = teacher(x, docs=docs)[0]
        logits, hard = model(x, y, docs)
        return distillation_loss(logits, taught, hard, settings.temperature_kd, settings.alpha)

    return Objective(loss=loss)


def text_objective(old: utils.Corpus | None, trainer: Trainer) -> Objective:
    """Predict another corpus; the loss on the old one is measured beside it."""
    n = trainer.config.eval_windows
    return Objective(measure=lambda model: {"old": trainer.evaluate(old.val_ids, n)} if old else {})


def qa_objective(splits: Splits, trainer: Trainer) -> Objective:
    """Answer questions: the loss is on the answers and their <EOS> alone."""
    tokenizer, config = trainer.tokenizer, trainer.config

    def batch(records: Sequence[list[Example]]) -> tuple[Tensor, ...]:
        x, y = qa_batch([example for (example,) in records], tokenizer.specials["<PAD>"])
        return x.to(trainer.device), y.to(trainer.device)

    def evaluate(model: nn.Module, split: str, n: int | None) -> float:
        total = count = 0
        for records in in_batches(evenly(splits[split], n), config.batch_size):
            x, y = batch(records)
            scored = int((y != -100).sum())
            total, count = total + model(x, y)[1].item() * scored, count + scored
        return total / count

    def exact(model: nn.Module, split: str) -> float:
        """The share of the answers that the model, always taking the likeliest token, gives word
        for word: those in which every token is the likeliest after the right ones before it."""
        found = []
        for records in in_batches(evenly(splits[split], config.eval_windows), config.batch_size):
            x, y = batch(records)
            right = (model(x)[0].argmax(dim=-1) == y) | (y == -100)  # (B, T)
            found += right.all(dim=1).tolist()
        return sum(found) / len(found)

    def sample(model: GPT) -> str:
        greedy = SampleConfig(temperature=0, max_new_tokens=config.sample_tokens)
        texts = []
        for ((ids, n_prompt),) in splits["val"][:2]:
            prompt = torch.from_numpy(ids[:n_prompt]).to(trainer.device)
            steps = stream_texts(model, tokenizer, greedy, prompt)
            answer = "".join(piece for (piece,) in steps)
            texts.append(tokenizer.decode(ids[1:n_prompt].tolist()) + answer)
        return "\n".join(texts)

    return Objective(
        get_batch=lambda step, part: batch(draw(splits["train"], config, step, part)),
        loss=lambda model, x, y: model(x, y)[1],
        evaluate=evaluate,
        measure=lambda model: {"exact": exact(model, "val"), "exact_train": exact(model, "train")},
        sample=sample,
    )


def dpo_objective(splits: Splits, reference: GPT, beta: float, trainer: Trainer) -> Objective:
    """Prefer the chosen text of each pair to the rejected one, by as little change as does it."""
    pad, config = trainer.tokenizer.specials.get("<PAD>", 0), trainer.config

    def batch(pairs: Sequence[list[Example]]) -> tuple[Tensor, ...]:
        x, y = qa_batch([text for side in zip(*pairs, strict=True) for text in side], pad)
        return x.to(trainer.device), y.to(trainer.device)  # both (2B, T), the chosen ones first

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return dpo_loss(*rewards(model, reference, x, y, beta).chunk(2))

    def evaluate(model: nn.Module, split: str, n: int | None) -> float:
        pairs = evenly(splits[split], n)
        batches = in_batches(pairs, config.batch_size)
        return sum(loss(model, *batch(part)).item() * len(part) for part in batches) / len(pairs)

    def measure(model: nn.Module) -> dict[str, float]:
        """Over the held-out pairs: the mean of r(chosen) - r(rejected), and how often it is above
        zero."""
        margins = torch.cat(
            [
                torch.sub(*rewards(model, reference, *batch(part), beta).chunk(2))
                for part in in_batches(splits["val"], config.batch_size)
            ]
        )
        return {"margin": margins.mean().item(), "accuracy": (margins > 0).float().mean().item()}

    return Objective(
        get_batch=lambda step, part: batch(draw(splits["train"], config, step, part)),
        loss=loss,
        evaluate=evaluate,
        measure=measure,
    )


# --- records to batches


def draw(items: Sequence[Any], config: TrainConfig, step: int, part: int) -> list[Any]:
    """The random items of a batch, none twice: a pure function of (seed, step, part)."""
    rng = np.random.default_rng((config.seed, step, part))
    chosen = rng.choice(len(items), min(config.batch_size, len(items)), replace=False)
    return [items[i] for i in chosen]


def evenly(items: Sequence[Any], n: int | None) -> Sequence[Any]:
    """So many of them at most, evenly spaced; None: all."""
    if n is None or n >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)]


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items, `size` at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


def fit(examples: Sequence[Example], block_size: int, long: str) -> list[Example] | None:
    """Examples with one prompt, cut at its start so that the longest fits the window; None where
    they are to be skipped, or the text after the prompt is itself too long."""
    over = max(len(ids) for ids, _ in examples) - block_size - 1
    if over <= 0:
        return list(examples)
    if long == "skip" or over >= min(n_prompt for _, n_prompt in examples):
        return None
    return [(ids[over:], n_prompt - over) for ids, n_prompt in examples]


def encode_splits(
    settings: FinetuneConfig, splits: list[list[Any]], tokenizer: Tokenizer, block_size: int
) -> Splits:
    """The records of both splits as examples that fit the window; says how many were too long.
    Raises UserError where a split has none left."""
    encoded = {}
    for name, records in zip(("train", "val"), splits, strict=True):
        if settings.objective == "qa":
            examples = [[encode_record(tokenizer, record)] for record in records]
        else:
            examples = [encode_pair(tokenizer, record) for record in records]
        encoded[name] = list(filter(None, (fit(e, block_size, settings.long) for e in examples)))
        n_long = sum(max(len(ids) for ids, _ in e) > block_size + 1 for e in examples)
        n_out = len(examples) - len(encoded[name])
        if not encoded[name]:
            raise UserError(f"no {name} record fits the window of {block_size} tokens")
        if n_long:
            print(
                f"{n_long} of {len(examples)} {name} records are longer than the window of "
                f"{block_size} tokens: {n_out} left out, {n_long - n_out} cut at the start"
            )
    return encoded


# --- models and data


def new_model(
    settings: FinetuneConfig,
    flags: dict[str, Any],
    base: tuple[GPT, Tokenizer, dict[str, Any]],
    tokenizer: Tokenizer,
) -> GPT:
    """The model to train: the base, for a tokenizer that may know more, or a new student. Raises
    UserError for a student of impossible sizes."""
    model, old_tokenizer, _ = base
    if not settings.source:
        config = student_config(model.config, flags)
        raise_problems(config.problems())
        return GPT(config)
    size = max(model.config.vocab_size, tokenizer.vocab_size)
    dropout = flags.get("dropout", model.config.dropout)
    extended = GPT(replace(model.config, vocab_size=size, dropout=dropout))
    weights = model.state_dict()
    if tokenizer is not old_tokenizer:
        weights = extend_weights(weights, old_tokenizer, tokenizer)
    extended.load_state_dict(weights)
    return extended


def student_config(teacher: GPTConfig, flags: dict[str, Any]) -> GPTConfig:
    """The settings of a new student: the flags over the teacher's."""
    values = asdict(teacher)
    for given, derived in DERIVED.items():
        if given in flags:
            values |= dict.fromkeys(derived, 0)
    return from_dict(GPTConfig, values | flags)


def load_teacher(settings: FinetuneConfig, trainer: Trainer) -> GPT:
    """The teacher. Raises UserError where it cannot teach this student."""
    teacher, tokenizer, _ = utils.load_checkpoint(Path(settings.teacher), trainer.device)
    ours, student = trainer.tokenizer, trainer.model.config
    if tokenizer.to_dict() != ours.to_dict() or teacher.config.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher and student have different tokenizers ({tokenizer.vocab_size} and "
            f"{ours.vocab_size} tokens): a student needs its teacher's"
        )
    if teacher.config.block_size < student.block_size:
        raise UserError(
            f"the teacher's window of {teacher.config.block_size} tokens is shorter than the "
            f"student's, {student.block_size}"
        )
    if trainer.config.compile:
        for block in teacher.blocks:
            block.compile()
    return teacher.requires_grad_(False)


def load_data(
    objective: str, data: str, tokenizer: Tokenizer
) -> tuple[Tokenizer, utils.Corpus, list[list[Any]] | None]:
    """The corpus, and for qa and dpo the records to train and to validate on, of which the corpus
    then only tells the name; and the tokenizer, larger where it lacks what the data needs."""
    if objective == "distill":  # what the teacher does not know, it cannot teach
        return *load_corpus(data, "", 0, tokenizer), None
    path = find_corpus(data)
    if objective == "text":
        if path.is_file():
            specials = (END_OF_TEXT,) if path.suffix.lower() == ".jsonl" else ()
            chars = isinstance(tokenizer, CharTokenizer)
            texts = [text for text, _ in documents(path)] if chars else []
            tokenizer = extend_tokenizer(tokenizer, specials, texts)
        return *load_corpus(data, "", 0, tokenizer), None
    if objective == "dpo":
        splits = split_documents(read_pairs(path))
    else:
        records = read_records(path)
        splits = split_records(records)
        tokenizer = extend_tokenizer(tokenizer, QA_SPECIALS, [record_text(r) for r in records])
    info = {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    nothing = np.zeros(0, dtype=np.uint8)
    return tokenizer, utils.Corpus(nothing, nothing, info, 0, 0), list(splits)


def imported(state: dict[str, Any]) -> bool:
    """Whether a checkpoint came from elsewhere: it does not know the text it was trained on."""
    return not state["corpus"]["sha256"]


def load_old(state: dict[str, Any], tokenizer: Tokenizer) -> utils.Corpus | None:
    """The corpus that a checkpoint was trained on, if it is still there."""
    data = state["train_config"]["data"]
    if imported(state):
        return None
    try:
        _, corpus = load_corpus(data, "", 0, tokenizer)
        if corpus.info["sha256"] != state["corpus"]["sha256"]:
            raise UserError(f"{data} is not what the checkpoint was trained on")
    except UserError as error:
        print(f"without the loss on the old corpus: {error}")
        return None
    return corpus


# --- the run


def flag_problems(flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig) -> list[str]:
    """What is wrong with the flags of a new run, before anything is read."""
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
    fixed = {"preset", "arch", "tokenizer", "vocab_size"}
    fixed |= set() if student else asdict(GPTConfig()).keys() - {"dropout"}
    found += [f"--{name} is settled by the checkpoint" for name in flags if name in fixed]
    if objective == "distill" and not settings.teacher:
        found.append("--objective distill needs a --teacher")
    if objective != "distill" and not settings.source:
        found.append("name the checkpoint to change: python finetune.py checkpoints/best.pt ...")
    if objective in ("text", "dpo") and not flags.get("data"):
        found.append(f"--objective {objective} needs --data")
    if objective == "text" and str(flags.get("data")).endswith(".json"):
        found.append(f"{flags['data']} holds questions and answers: --objective qa")
    return found


def run_config(
    flags: dict[str, Any], settings: FinetuneConfig, adapt: LoRAConfig, base: dict[str, Any]
) -> TrainConfig:
    """The run's settings: the flags over the objective's defaults over those of the checkpoint."""
    trained = base["train_config"]
    rate = 3e-4 if imported(base) else trained["lr_max"]
    rate /= 2 if trained["optimizer"] == "muon" else 1  # Muon takes larger steps than AdamW
    if settings.source:  # a new student learns all from the start
        rate *= RATES[settings.objective] * (LORA_RATE if adapt.lora_rank else 1)
    values = {name: trained[name] for name in ("arch", "data", "tokenizer")} | {"lr_max": rate}
    if settings.objective == "qa":
        values["data"] = "data/qa.json"
    values["preset"] = trained["preset"] if trained["preset"] in PRESETS else "laptop"
    return from_dict(TrainConfig, values | DEFAULTS[settings.objective] | flags)


def resumed_flags(flags: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint with the flags that were given over them. Raises UserError for a
    flag that would make it another run."""
    if "finetune" not in state:
        raise UserError("the run to resume is one of train.py: resume it with that")
    saved = state["gpt_config"] | state["train_config"] | state["finetune"]
    saved |= {"parallel": "ddp"}  # as is given now
    fixed = {*state["finetune"], *state["gpt_config"], "seed", "data"} - {"dropout"}
    raise_problems(
        [
            f"--{name} is {saved[name]!r} in the run to resume: leave it out, or start another run"
            for name in flags
            if name in fixed and flags[name] != saved[name]
        ]
    )
    return saved | flags


def make_objective(
    settings: FinetuneConfig,
    trainer: Trainer,
    state: dict[str, Any],
    plain: Weights,
    splits: Splits | None,
) -> Objective:
    """The objective of the run; `state` is the base's checkpoint, `plain` the weights to begin
    with."""
    if settings.objective == "text":
        return text_objective(load_old(state, trainer.tokenizer), trainer)
    if settings.objective == "qa":
        return qa_objective(splits, trainer)
    if settings.objective == "distill":
        return distill_objective(load_teacher(settings, trainer), settings, trainer)
    reference = GPT(trainer.model.config)
    reference.load_state_dict(plain)
    reference = reference.to(trainer.device).eval().requires_grad_(False)
    return dpo_objective(splits, reference, settings.beta, trainer)


def keep(
    objective: Objective, info: dict[str, Any], adapt: LoRAConfig, trainer: Trainer, plain: Weights
) -> Objective:
    """The objective with what its checkpoints keep: how they came about and, of an adapted model
    with the `plain` weights beneath, the adapter, beside all weights with it merged in."""
    if not adapt.lora_rank:
        return replace(objective, pack=lambda weights: {"model": weights, "finetune": info})
    trained = lora.trained_names(trainer.model)
    rest = {
        "lora": asdict(adapt),
        "base_sha256": info["base_sha256"],
        "gpt_config": asdict(trainer.model.config),
        "tokenizer": trainer.tokenizer.to_dict(),
    }

    def pack(weights: Weights) -> dict[str, Any]:
        below, tensors = lora.split(weights, trained)
        merged = lora.merge(below, tensors, adapt.scale)
        return {"model": merged, "adapter": rest | {"tensors": tensors}, "finetune": info}

    def unpack(state: dict[str, Any]) -> Weights:
        return lora.join(plain, state["adapter"]["tensors"])

    return replace(objective, pack=pack, unpack=unpack)


def merge_adapter(settings: FinetuneConfig, target: Path, overwrite: bool) -> int:
    """Write the checkpoint of an adapter merged into its base."""
    if not settings.source:
        raise UserError("name the base too: python finetune.py BASE.pt --merge ADAPTER.pt")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: --overwrite it, or give another --tag")
    state, path = utils.read_checkpoint(Path(settings.source)), Path(settings.merge)
    adapter = lora.read_adapter(path)
    lora.check_adapter(adapter, state["model"], path)
    scale = from_dict(LoRAConfig, adapter["lora"]).scale
    merged = lora.merge(state["model"], adapter["tensors"], scale)
    changed = {"model": merged, "optimizers": [], "scaler": {}, "log": []}
    changed |= {name: adapter[name] for name in ("gpt_config", "tokenizer")}
    target.parent.mkdir(parents=True, exist_ok=True)
    utils.save_checkpoint(target, state | changed)
    print(f"{target}: {path} merged into {settings.source}; next: python generate.py {target}")
    return 0


def describe(trainer: Trainer, settings: FinetuneConfig, splits: Splits | None, why: str) -> None:
    """Say what will be changed, on what, with what; before anything slow begins."""
    config, model, corpus = trainer.config, trainer.model, trainer.corpus
    train, val = splits.values() if splits else (corpus.train_ids, corpus.val_ids)
    unit = {"qa": "answers", "dpo": "pairs"}.get(settings.objective, "tokens")
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_all = model.num_params()
    print(
        f"machine: {trainer.device}, {config.precision} ({why}), "
        f"{'compiled' if config.compile else 'eager'}\n"
        f"model: {settings.source or 'a new student'}; {n_trained:,} of {n_all:,} parameters are "
        f"trained ({n_trained / n_all:.2%})\n"
        f"objective: {settings.objective}, with {config.data}; {len(train):,} {unit} to train on, "
        f"{len(val):,} to validate on\n"
        f"run: {config.max_steps} steps of {config.batch_size} x {config.grad_accum}, learning "
        f"rate {config.lr_max:g} to {config.lr_min:g}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, FinetuneConfig, LoRAConfig, TrainConfig, GPTConfig)
    given = flags
    tag = flags.get("tag", "merged" if "merge" in flags else flags.get("objective", "text"))
    out_dir = flags.get("out_dir", "checkpoints")
    run_dir = Path(out_dir, tag)
    if parallel.restarted() and (run_dir / "latest.pt").exists():
        flags = flags | {"resume": True, "overwrite": False}
    state = utils.read_checkpoint(run_dir / "latest.pt") if flags.get("resume") else None
    if state:
        flags = resumed_flags(flags, state)
    flags |= {"out_dir": out_dir, "tag": tag}
    settings, adapt = from_dict(FinetuneConfig, flags), from_dict(LoRAConfig, flags)
    if settings.merge:
        raise_problems(problems)
        return merge_adapter(settings, run_dir / "best.pt", "overwrite" in flags)
    problems += limit_problems(settings) + limit_problems(adapt)
    if not state:
        problems += flag_problems(flags, settings, adapt)
    raise_problems(problems + utils.device_problems(flags.get("device", "auto")))

    device = utils.pick_device(flags.get("device", "auto"))
    source = Path(settings.source or settings.teacher)
    base = utils.load_checkpoint(source, torch.device("cpu"))
    config = run_config(flags, settings, adapt, base[2])
    info = asdict(settings) | asdict(adapt) | {"base_sha256": lora.weights_sha256(base[2]["model"])}
    problems = config.problems() + run_problems(config)
    if state and info["base_sha256"] != state["finetune"]["base_sha256"]:
        problems.append(f"{source} is not what the run began with: it has changed")
    if config.parallel == "fsdp":
        problems.append("--parallel fsdp is for train.py: leave it out")
    if source.resolve().parent == run_dir.resolve():
        problems.append(f"{run_dir}/ holds the checkpoint to change: give the run another --tag")
    raise_problems(problems)

    device = join_processes(config, device, whole_step=state and "grad_accum" not in given)
    with parallel.first_of_machine():
        tokenizer, corpus, splits = load_data(settings.objective, config.data, base[1])
    if state and state["corpus"]["sha256"] != corpus.info["sha256"]:
        raise UserError(f"{config.data} is not what the run was trained on: it has changed")
    if config.doc_mask and corpus.separator is None:
        raise UserError(f"{config.data} is one document: --doc_mask is for corpora of several")
    why_precision = prepare_machine(config, device)
    model = new_model(settings, flags, base, tokenizer)
    if splits:
        splits = encode_splits(settings, splits, tokenizer, model.config.block_size)
    else:
        utils.check_length(corpus, model.config.block_size)
    plain = model.state_dict()
    if adapt.lora_rank:  # a new token has its vector to learn
        lora.add_lora(model, adapt, also=() if tokenizer is base[1] else EMBEDDINGS)
    trainer = Trainer(model, tokenizer, corpus, config, device)
    objective = make_objective(settings, trainer, base[2], plain, splits)
    trainer.objective = keep(objective, info, adapt, trainer, plain)
    describe(trainer, settings, splits, why_precision)
    if config.overfit_batch:
        return overfit_batch(trainer)
    status = train_to_the_end(trainer, state)
    if adapt.lora_rank and parallel.rank() == 0:
        best = utils.read_checkpoint(run_dir / "best.pt")
        lora.save_adapter(run_dir / "adapter.pt", best["adapter"])
        print(f"adapter: {run_dir / 'adapter.pt'}, for {settings.source}")
    parallel.end()
    return status


if __name__ == "__main__":
    run(main)
