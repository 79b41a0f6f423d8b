"""Train a GPT on a text.

    python train.py                            TinyShakespeare, with what this machine has
    python train.py --data my.txt --tag mine   a text of your own, into checkpoints/mine/
    python train.py --data my.txt --tokenizer bpe --vocab_size 2000    in words, not characters
    python train.py --resume                   go on where a stopped run stood
    torchrun --nproc_per_node=2 train.py       on two GPUs; parallel.py has more

A run's folder, checkpoints/ or checkpoints/TAG/, holds latest.pt and best.pt, log.jsonl (a line an
evaluation), loss_log.json (at the end), loss_curve.png and samples.txt. Next: python generate.py
"""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import parallel
import tokenizer as tokenizers
import utils
from config import (
    GPTConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    parse_flags,
    preset_table,
    raise_problems,
    run,
    train_settings,
)
from corpora import is_dataset, load_corpus
from generate import sample_text
from live import open_live
from model import GPT
from plots import draw_runs, read_run, save_figure, verdict

# --- the pieces of a training step


def get_lr(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear from 0 to lr_max over warmup_steps, then half a cosine
    (Loshchilov and Hutter 2017), or a line, down to lr_min at max_steps, flat after.

    >>> config = TrainConfig(lr_max=1.0, lr_min=0.0, warmup_steps=10, max_steps=110)
    >>> [round(get_lr(step, config), 3) for step in (0, 5, 10, 60, 110, 200)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    if step < config.warmup_steps:
        return config.lr_max * step / config.warmup_steps
    if step >= config.max_steps:
        return config.lr_min
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)  # 0 to 1
    height = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr_min + (config.lr_max - config.lr_min) * height


def configure_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) whose decay shrinks matrices only, no biases or gains.

    With "muon", the blocks' matrices have Muon instead (Jordan et al. 2024), which makes every
    direction of an update equally large; scaled so that AdamW's learning rate suits it (Liu et al.
    2025). The embedding and the output stay with AdamW.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {n: p for n, p in params.items() if p.dim() == 2 and "blocks." in n}
    hidden = hidden if config.optimizer == "muon" else {}
    rest = [p for name, p in params.items() if name not in hidden]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    lr, decay = config.lr_max, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if any(group["params"] for group in groups):
        optimizers += [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if hidden:
        settings = {"momentum": 0.9, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers += [torch.optim.Muon(hidden.values(), lr=lr, **settings)]
    return optimizers


@dataclass
class Objective:
    """What a stage trains for, where it is not to predict the corpus, as plain functions. Each is
    handed the model, as it may be wrapped; what is left out stays as pretraining has it."""

    # (step, part) -> the tensors of a batch: a pure function of these and the run's seed
    get_batch: Callable[[int, int], tuple[Tensor, ...]] | None = None
    # (model, *batch) -> the loss to make smaller, ()
    loss: Callable[..., Tensor] | None = None
    # (model, "train" or "val", about how many windows or None for all) -> the split's mean loss
    evaluate: Callable[[nn.Module, str, int | None], float] | None = None
    # (model) -> further numbers for the log and the status line
    measure: Callable[[nn.Module], dict[str, float]] = lambda model: {}
    # (model) -> the sample of an evaluation
    sample: Callable[[nn.Module], str] | None = None
    # weights by name -> the checkpoint's "model" and what it keeps besides; and the way back
    pack: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda weights: {"model": weights}
    unpack: Callable[[dict[str, Any]], dict[str, Tensor]] = lambda state: state["model"]


class Trainer:
    """Trains a model on a corpus, or for another objective, and keeps the files of its run."""

    def __init__(
        self,
        model: GPT,
        tokenizer: tokenizers.Tokenizer,
        corpus: utils.Corpus,
        config: TrainConfig,
        device: torch.device,
        objective: Objective | None = None,
    ):
        self.objective = objective or Objective()
        self.model = model.to(device).train()
        model.grad_checkpoint = config.grad_checkpoint
        if config.compile:  # the blocks are alike: compiled once for all, in a third less time
            for block in model.blocks:
                block.compile()
        self.net = parallel.wrap(model, config.parallel, device, config.precision)  # or the model
        self.tokenizer, self.corpus, self.config, self.device = tokenizer, corpus, config, device
        self.optimizers = configure_optimizers(model, config)
        self.train_ids = utils.near(corpus.train_ids, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.run_dir = Path(config.out_dir, config.tag)
        self.n_params = model.num_params()
        self.step = 0  # optimizer steps done
        self.log: list[dict[str, Any]] = []  # a record an evaluation
        self.live: list[Callable[[dict[str, Any]], None]] | None = None  # what else is told
        self.unchecked: list[tuple[int, Tensor, Tensor]] = []  # step, loss, gradient norm
        self.grad_norm: float | None = None
        self.seconds_before = 0.0  # of the same run, in earlier processes
        self.started = self.drawn = time.perf_counter()
        self.restart_clock()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns the mean loss of its batches and the norm of the gradient
        before clipping, both () and on the device."""
        config = self.config
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # 1
        mean_loss = torch.zeros((), device=self.device)
        parts = range(parallel.rank(), config.grad_accum, parallel.world_size())
        for part in parts:
            batch = self.get_batch(part)  # 2: x and y, both (B, T), or the objective's
            batch = [t.to(self.device, non_blocking=True) for t in batch]  # 3
            torch.manual_seed(utils.mix_seed(config.seed, self.step, part))  # dropout's
            with parallel.gradients_stay(self.net, part != parts[-1]):
                with utils.autocast(self.device, config.precision):
                    loss = (self.objective.loss or self.loss)(self.net, *batch)  # 4 and 5
                loss = loss / len(parts)
                self.scaler.scale(loss).backward()  # 6
            mean_loss += loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)  # 7
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = get_lr(self.step, config)  # 8
            self.scaler.step(optimizer)  # 9
        self.scaler.update()
        self.step += 1  # 10
        return parallel.mean(mean_loss), parallel.whole(norm)

    def get_batch(self, part: int) -> tuple[Tensor, ...]:
        """The part-th batch of this step, x and y (B, T); under overfit_batch always the first. A
        resumed run with other batch sizes counts as if all had been of today's."""
        step = 0 if self.config.overfit_batch else self.step
        if self.objective.get_batch:
            return self.objective.get_batch(step, part)
        T, B, seed = self.model.config.block_size, self.config.batch_size, self.config.seed
        number = step * self.config.grad_accum + part  # of the run's batches
        return utils.get_batch(self.train_ids, T, B, seed, number, self.corpus.train_docs)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Pretraining's loss: the mean cross-entropy of the next tokens, ()."""
        return model(x, y, self.document_numbers(x))[1]

    def document_numbers(self, x: Tensor) -> Tensor | None:
        """Under doc_mask, the number of each token's document in its window, (B, T)."""
        return (x == self.corpus.separator).cumsum(dim=1) if self.config.doc_mask else None

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Without dropout, gradients, or compilation, which would compile for every new shape."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
        self.model.train(was_training)

    def evaluate(self, ids: np.ndarray | utils.Shards, n_windows: int | None) -> float:
        """The mean loss, in nats a token, over so many evenly spaced windows of a split, or over
        all of it (None), which the processes share. The mode that the model was in is put back."""
        size, n_ranks, B = (
            self.model.config.block_size,
            parallel.world_size(),
            self.config.batch_size,
        )
        starts = utils.even_starts(len(ids), size, n_windows)
        # FSDP wants all processes to call the model equally often: windows past the end fill up
        starts = np.pad(starts, (0, -len(starts) % n_ranks), constant_values=len(ids))
        starts = starts[parallel.rank() :: n_ranks]
        total, count = 0.0, 0
        for first in range(0, len(starts), B):
            x, y = utils.windows(ids, starts[first : first + B], size)
            x, y = x.to(self.device), y.to(self.device)
            with self.eval_mode(), utils.autocast(self.device, self.config.precision):
                loss = self.loss(self.model, x, y)
            if scored := int((y != -100).sum()):
                total, count = total + loss.item() * scored, count + scored
        total, count = parallel.total(total, count)
        return total / count

    def split_loss(self, split: str, n_windows: int | None) -> float:
        """The objective's mean loss over so much of "train" or "val", None for all of it."""
        if self.objective.evaluate:
            with self.eval_mode(), utils.autocast(self.device, self.config.precision):
                return self.objective.evaluate(self.model, split, n_windows)
        ids = self.corpus.train_ids if split == "train" else self.corpus.val_ids
        return self.evaluate(ids, n_windows)

    def further_numbers(self, val: float) -> dict[str, float]:
        """What an evaluation tells besides the losses: of a text, perplexity and bits per byte."""
        with self.eval_mode(), utils.autocast(self.device, self.config.precision):
            numbers = self.objective.measure(self.model)
        if self.objective.evaluate:
            return numbers
        bpb = utils.bits_per_byte(val, self.corpus.bytes_per_token)
        return {"ppl": math.exp(val), "bpb": bpb} | numbers

    def train(self) -> int:
        """Train until max_steps, or out of patience, or a signal. Returns the exit status: 0, or
        130 or 143 for SIGINT and SIGTERM, after which `--resume` goes on."""
        config = self.config
        bar = tqdm(total=config.max_steps, unit="step", leave=False, disable=None)
        with bar, StopSignal() as stop:
            if self.step == 0:
                self.report()
            bar.update(self.step)
            first = self.step + 1
            while self.step < config.max_steps and not self.out_of_patience() and not stop.asked():
                self.unchecked.append((self.step + 1, *self.train_step()))
                if self.step == first:  # it may have compiled: not for the clock
                    self.check_finite()
                    self.restart_clock()
                if self.step % 10 == 0:  # reading a loss makes a GPU wait
                    bar.set_postfix_str(f"loss {self.check_finite():.4f}", refresh=False)
                if self.step % config.eval_every == 0 or self.step == config.max_steps:
                    self.report()
                if config.save_every and self.step % config.save_every == 0:
                    self.save(f"ckpt_{self.step:05d}.pt")
                bar.update()
        if not stop.number:
            return 0
        self.save("latest.pt")
        self.draw()
        print(f"stopped and saved at step {self.step}; --resume goes on from here")
        return 128 + stop.number

    def best(self) -> dict[str, Any]:
        """The record with the lowest validation loss."""
        return min(self.log, key=lambda record: record["val"])

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations all brought nothing better."""
        since_best = len(self.log) - 1 - self.log.index(self.best())
        return 0 < self.config.patience <= since_best

    def check_finite(self) -> float:
        """The last loss. Raises UserError for the first step, of those not yet checked, whose loss
        or gradient was infinite or no number; no checkpoint is written without this check."""
        loss = math.nan
        for step, loss_, norm in self.unchecked:
            loss, self.grad_norm = loss_.item(), norm.item()
            # An overflowing float16 gradient is the scaler's business: it skips the step.
            if not math.isfinite(loss + (0.0 if self.scaler.is_enabled() else self.grad_norm)):
                self.diverged(step, f"loss {loss}, gradient norm {self.grad_norm}")
        self.unchecked.clear()
        return loss

    def diverged(self, step: int, what: str) -> None:
        """Stop a run whose numbers have become useless."""
        kept = [name for name in ("best.pt", "latest.pt") if (self.run_dir / name).exists()]
        where = f"; {' and '.join(kept)} in {self.run_dir} are from before" if kept else ""
        raise UserError(f"diverged at step {step} ({what}){where}: try a lower --lr_max")

    # --- the files of the run

    def restart_clock(self) -> None:
        """Time the steps from here on, leaving out what came before."""
        self.clock, self.clock_step = time.perf_counter(), self.step

    def report(self) -> None:
        """Evaluate, print the status line, and write the log, a sample, the curve, checkpoints."""
        self.check_finite()
        self.log.append(self.measure())
        tqdm.write(status_line(self.log[-1]))
        self.write_sample()
        if parallel.rank() == 0:
            self.write_log()
            self.write_live()
            # A picture takes a part of a second, and `finish` draws the last one.
            if time.perf_counter() > self.drawn + 5 and self.step < self.config.max_steps:
                self.draw()
        if self.log[-1] is self.best():
            self.save("best.pt")
        self.save("latest.pt")  # last: who resumes from it finds all else at least as new
        self.restart_clock()

    def measure(self) -> dict[str, Any]:
        """The record of an evaluation now: losses on both splits, and how the last steps went."""
        config, steps = self.config, self.step - self.clock_step
        seconds_per_step = (time.perf_counter() - self.clock) / steps if steps else None
        tokens = config.batch_size * config.grad_accum * self.model.config.block_size
        train, val = (self.split_loss(split, config.eval_windows) for split in ("train", "val"))
        if not math.isfinite(train + val):
            self.diverged(self.step, f"train loss {train}, validation loss {val}")
        return {
            "step": self.step,
            "train": train,
            "val": val,
            **self.further_numbers(val),
            "lr": get_lr(self.step, config),
            "grad_norm": self.grad_norm,
            "tokens_per_second": None
            if self.objective.get_batch or not steps
            else tokens / seconds_per_step,
            "ms_per_step": 1000 * seconds_per_step if steps else None,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
        }

    def write_sample(self) -> None:
        """Add a sample of the model's text to samples.txt, and show its first lines."""
        if not self.config.sample_tokens:
            return
        with self.eval_mode():
            text = (self.objective.sample or self.sample)(self.model).strip("\n")
        if parallel.rank():
            return
        with open(self.run_dir / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"--- step {self.step}\n{text}\n\n")
        for line in [line for line in text.splitlines() if line][:4]:
            tqdm.write(f"    {line}")

    def sample(self, model: GPT) -> str:
        """A text of the model's."""
        prompt = "" if self.tokenizer.unknown("\n") else "\n"
        settings = SampleConfig(prompt=prompt, max_new_tokens=self.config.sample_tokens)
        return sample_text(model, self.tokenizer, settings)[0]

    def write_log(self) -> None:
        """Write log.jsonl: a line that says what is trained, then a line an evaluation."""
        start = {"corpus": self.corpus.info} | asdict(self.model.config) | asdict(self.config)
        with utils.atomic_write(self.run_dir / "log.jsonl") as file:
            for record in (start, *self.log):
                file.write((json.dumps(record) + "\n").encode())

    def draw(self) -> None:
        """Draw the curve so far."""
        if parallel.rank() == 0:
            save_figure(draw_runs([read_run(self.run_dir)]), self.run_dir / "loss_curve.png")
            self.drawn = time.perf_counter()

    def write_live(self) -> None:
        """Tell the tools that are asked for of this evaluation; at first, of all before it too."""
        new = self.log[-1:]
        if self.live is None:
            settings = asdict(self.model.config) | asdict(self.config)
            self.live, new = open_live(self.config, self.run_dir, settings), self.log
        for record in new:
            for write in self.live:
                write(record)

    def save(self, name: str) -> None:
        """Write a checkpoint with all that an exact continuation needs, by however many processes
        (batches and dropout are functions of the step)."""
        self.check_finite()
        weights = parallel.whole(self.model.state_dict())
        optimizers = parallel.whole([optimizer.state_dict() for optimizer in self.optimizers])
        if parallel.rank():
            return
        config = replace(self.config, resume=False, overwrite=False)
        state = {
            "gpt_config": asdict(self.model.config),
            "train_config": asdict(config),
            "tokenizer": self.tokenizer.to_dict(),
            "corpus": self.corpus.info,
            **self.objective.pack(weights),
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "log": self.log,
        }
        utils.save_checkpoint(self.run_dir / name, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint stands, so that what follows is what would have followed."""
        parallel.load_weights(self.model, self.objective.unpack(state))
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            parallel.load_optimizer(optimizer, optimizer_state)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.log = state["step"], state["log"]
        self.seconds_before = self.log[-1]["seconds"]
        self.restart_clock()

    def finish(self) -> None:
        """Score the best checkpoint over the whole validation split, judge the run, and say so."""
        best = self.best()
        if best["step"] != self.step:
            state = parallel.from_first(lambda: utils.read_checkpoint(self.run_dir / "best.pt"))
            parallel.load_weights(self.model, self.objective.unpack(state))
        loss = self.split_loss("val", None)
        words = verdict(self.log, self.model.config.vocab_size)
        numbers = self.further_numbers(loss)
        final = {"step": best["step"], "val": loss, **numbers, "verdict": words}
        seconds = self.log[-1]["seconds"]
        if parallel.rank():
            return
        summary = {"corpus": self.corpus.info, "log": self.log, "seconds": seconds, "final": final}
        with utils.atomic_write(self.run_dir / "loss_log.json") as file:
            file.write(json.dumps(summary, indent=1).encode())
        with open(self.run_dir / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"final": final}) + "\n")
        print(
            f"done in {seconds:.0f} s: best at step {best['step']}, validation loss {loss:.4f}"
            f"{in_words(numbers)} over the whole split\n"
            f"verdict: {words}\n"
            f"files: {self.run_dir}/; next: python generate.py {self.run_dir / 'best.pt'}",
            flush=True,
        )
        self.draw()


# --- around the training


class StopSignal:
    """While it stands, a first SIGINT (Ctrl-C) or SIGTERM is only noted, in `number`; a second one
    stops the program at once."""

    def asked(self) -> bool:
        """Whether any process was told to stop; then all are."""
        if parallel.world_size() > 1:
            self.number = parallel.highest(self.number)
        return self.number > 0

    def __enter__(self) -> "StopSignal":
        self.number = 0
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.number = number
        tqdm.write("stopping after this step; again to stop at once, without saving")
        for s in self.handlers:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)


def status_line(record: dict[str, Any]) -> str:
    """The record of an evaluation, for people."""
    names = list(record)
    further = names[names.index("val") + 1 : names.index("lr")]  # perplexity, or the objective's
    words = [
        f"step {record['step']}",
        f"train {record['train']:.4f}",
        f"val {record['val']:.4f}",
        *(f"{name} {record[name]:{'.2f' if name == 'ppl' else '.3f'}}" for name in further),
        f"lr {record['lr']:.2e}",
    ]
    if record["ms_per_step"]:
        words.append(f"grad {record['grad_norm']:.2f}")
        if record["tokens_per_second"]:
            words.append(f"{record['tokens_per_second'] / 1000:.1f}k tok/s")
        words.append(f"{record['ms_per_step']:.1f} ms/step")
    return " | ".join(words)


def in_words(numbers: dict[str, float]) -> str:
    """The further numbers of the final evaluation, in brackets.

    >>> in_words({"ppl": 4.5, "bpb": 2.1847, "margin": 0.5})
    ' (perplexity 4.50, 2.1847 bits per byte, margin 0.5000)'
    """
    names = {"ppl": "perplexity {:.2f}", "bpb": "{:.4f} bits per byte"}
    words = [names.get(name, name + " {:.4f}").format(number) for name, number in numbers.items()]
    return f" ({', '.join(words)})" if words else ""


def overfit_batch(trainer: Trainer) -> int:
    """Train on one batch until its loss is under 0.01, the sanity check that the pieces fit.
    Writes no files. Returns the exit status: 0 if it got there within max_steps, else 1."""
    with tqdm(total=trainer.config.max_steps, unit="step", leave=False, disable=None) as bar:
        while trainer.step < trainer.config.max_steps:
            loss = trainer.train_step()[0].item()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if loss < 0.01:
                print(f"one batch overfitted: loss {loss:.4f} at step {trainer.step}; it all fits")
                return 0
    print(f"one batch could not be overfitted: loss {loss:.4f} after {trainer.step} steps")
    return 1


def run_problems(config: TrainConfig) -> list[str]:
    """What stands in the way of a run in its folder, or in several processes."""
    found = []
    if config.parallel == "fsdp" and not parallel.launched():
        found.append("--parallel fsdp is for several processes: start them with torchrun")
    if config.parallel == "fsdp" and config.precision == "float16":
        found.append("--parallel fsdp has no loss scaling for float16: take bfloat16")
    run_dir = Path(config.out_dir, config.tag)
    exists = (run_dir / "latest.pt").exists()
    if exists and not (config.resume or config.overwrite or config.overfit_batch):
        where = "--resume it, --overwrite it, or give this one a --tag"
        found.append(f"{run_dir}/ holds a run: {where}")
    return found


def tokenizer_problems(flags: dict[str, Any], config: TrainConfig) -> list[str]:
    """What speaks against the flags of the tokenizer."""
    if is_dataset(config.data) and flags.keys() & {"tokenizer", "vocab_size"}:
        return [f"{config.data} has its tokenizer already: leave out --tokenizer and --vocab_size"]
    if flags.get("vocab_size") and config.tokenizer != "bpe":
        return ["--vocab_size is for --tokenizer bpe; other vocabularies have the size they have"]
    return []


def resumed_flags(flags: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint with the flags that were given over them. Raises UserError for
    a flag that would make it another model."""
    if "finetune" in state:
        raise UserError("the run to resume is one of finetune.py: resume it with that")
    saved = state["gpt_config"] | state["train_config"] | {"parallel": "ddp"}  # as is given now
    if flags.get("vocab_size", 0) > saved["vocab_size"]:  # the text had fewer to learn
        flags = flags | {"vocab_size": saved["vocab_size"]}
    fixed = {"preset", "arch", "tokenizer", "seed", *state["gpt_config"]} - {"dropout"}
    raise_problems(
        [
            f"--{name} is {saved[name]!r} in the run to resume: leave it out, or start another run"
            for name in flags
            if name in fixed and flags[name] != saved[name]
        ]
    )
    return saved | flags


def clear_run(run_dir: Path) -> None:
    """Remove the files of an earlier run."""
    logs = ("log.jsonl", "loss_log.json", "loss_curve.png", "samples.txt")
    for name in ("best.pt", "latest.pt", "ckpt_*.pt", *logs):
        for file in run_dir.glob(name):
            file.unlink()
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)


def describe(trainer: Trainer, why_precision: str) -> None:
    """Say what will be trained, on what, with what; before anything slow begins."""
    config, corpus = trainer.config, trainer.corpus
    gpt, n_params = trainer.model.config, trainer.n_params
    slices = parallel.world_size() if config.parallel == "fsdp" else 1
    memory = utils.memory_estimate(gpt, n_params, config, slices)
    parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items())
    compiled = "compiled, which takes its time at the first step" if config.compile else "eager"
    threads = f" ({torch.get_num_threads()} threads)" if trainer.device.type == "cpu" else ""
    if parallel.world_size() > 1:
        threads += f" in {parallel.world_size()} processes, {config.parallel}"
    print(
        f"machine: {trainer.device}{threads}, {config.precision} ({why_precision}), {compiled}\n"
        f"corpus: {corpus.info['name']}, {corpus.info['bytes']:,} bytes; {len(corpus.train_ids):,} "
        f"tokens to train on, {len(corpus.val_ids):,} to validate on, {gpt.vocab_size} kinds, "
        f"{corpus.bytes_per_token:.2f} bytes each\n"
        f"model: {gpt.n_layer} layers, {gpt.n_head} heads, {gpt.n_embd} channels, window "
        f"{gpt.block_size}; {gpt.norm}, {gpt.mlp}, {gpt.pos}; {n_params:,} parameters\n"
        f"memory: about {sum(memory.values()) / 1e6:,.0f} MB ({parts})\n"
        f"run: preset {config.preset}, {config.max_steps} steps of {config.batch_size} x "
        f"{config.grad_accum} windows, learning rate {config.lr_max:g} to {config.lr_min:g}\n"
        f"guessing at random would give a loss of ln({gpt.vocab_size}) = "
        f"{math.log(gpt.vocab_size):.4f}",
        flush=True,
    )


def join_processes(config: TrainConfig, device: torch.device, whole_step: bool) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this one's device. From here
    on config.grad_accum counts the batches of a step over all of them (a saved run's does already:
    `whole_step`), so that the run does not depend on how many share it."""
    device = parallel.start(device)
    n_processes = parallel.world_size()
    if not whole_step:
        config.grad_accum *= n_processes
    if config.grad_accum % n_processes:
        raise UserError(
            f"{n_processes} processes cannot share the run's {config.grad_accum} batches a step: "
            "start a number that divides it, or give another --grad_accum"
        )
    return device


def prepare_machine(config: TrainConfig, device: torch.device) -> str:
    """Settle the precision and whether to compile, in config, and seed the random numbers. Returns
    why this precision."""
    config.precision, why = parallel.from_first(
        lambda: utils.pick_precision(config.precision, device)
    )
    if device.type == "cpu":
        utils.keep_freed_memory()
        # Spares torch.compile nine seconds of trying what code the C++ compiler can make.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    config.compile = utils.pick_compile(config.compile, device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    return why


def train_to_the_end(trainer: Trainer, state: dict[str, Any] | None) -> int:
    """Begin a run in its folder, or take it up where its checkpoint stands, and train. Returns the
    exit status."""
    if state:
        trainer.restore(state)
        print(f"resuming at step {trainer.step}")
    elif parallel.rank() == 0:
        trainer.run_dir.mkdir(parents=True, exist_ok=True)
        clear_run(trainer.run_dir)
    status = trainer.train()
    if status == 0:
        trainer.finish()
    return status


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    doc = f"{__doc__}\n{preset_table()}"
    flags, problems = parse_flags(argv, doc, TrainConfig, GPTConfig)
    given = flags
    run_dir = Path(flags.get("out_dir", "checkpoints"), flags.get("tag", ""))
    if parallel.restarted() and (run_dir / "latest.pt").exists():
        flags = flags | {"resume": True, "overwrite": False}
    state = utils.read_checkpoint(run_dir / "latest.pt") if flags.get("resume") else None
    if state:
        flags = resumed_flags(flags, state) | {"out_dir": str(run_dir), "tag": ""}
    problems += utils.device_problems(flags.get("device", "auto"))
    device = utils.pick_device("cpu" if problems else flags.get("device", "auto"))
    gpt_config, config = train_settings(flags, device.type)
    problems += gpt_config.problems() + config.problems() + run_problems(config)
    raise_problems(problems + (tokenizer_problems(flags, config) if not state else []))

    tokenizer = tokenizers.from_dict(state["tokenizer"]) if state else None
    device = join_processes(config, device, whole_step=state and "grad_accum" not in given)
    with parallel.first_of_machine():
        tokenizer, corpus = load_corpus(
            config.data, config.tokenizer, gpt_config.vocab_size, tokenizer
        )
    if is_dataset(config.data):
        config.tokenizer = tokenizer.to_dict()["kind"]
    utils.check_length(corpus, gpt_config.block_size)
    if state and state["corpus"]["sha256"] != corpus.info["sha256"]:
        raise UserError(f"{config.data} is not what the run was trained on: it has changed")
    if config.doc_mask and corpus.separator is None:
        raise UserError(f"{config.data} is one document: --doc_mask is for corpora of several")

    why_precision = prepare_machine(config, device)
    model = GPT(replace(gpt_config, vocab_size=tokenizer.vocab_size))
    trainer = Trainer(model, tokenizer, corpus, config, device)
    describe(trainer, why_precision)
    if config.overfit_batch:
        return overfit_batch(trainer)
    status = train_to_the_end(trainer, state)
    parallel.end()
    return status


if __name__ == "__main__":
    run(main)
