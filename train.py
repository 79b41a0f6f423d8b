"""Train a GPT on a text.

    python train.py                            TinyShakespeare, with settings for this machine
    python train.py --data my.txt --tag mine   your own text, into checkpoints/mine/
    python train.py --data my.txt --tokenizer bpe --vocab_size 2000    byte pairs, not characters
    python train.py --minutes 5                the best model that takes five minutes here
    python train.py --resume                   resume a stopped run
    torchrun --nproc_per_node=2 train.py       two GPUs; see training/distributed.py

The run folder, checkpoints/ or checkpoints/TAG/, contains latest.pt and best.pt, loss_curve.png,
samples.txt, loss_log.json (evaluations) and log.jsonl (everything). Next: python generate.py
"""

import contextlib
import math
import pkgutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from system.start import run

import torch
import torch.nn as nn
from torch import Tensor

from config import OPTIMIZERS, GPTConfig, TrainConfig, from_dict
from model import GPT
from system.command_line import parse_args
from system.files import copy_file, locked, save_checkpoint
from training.distributed import (
    StopSignal,
    all_reduce,
    broadcast_from_rank0,
    destroy_process_group,
    full_tensor,
    init_process_group,
    load_optimizer,
    make_replica,
    rank,
    world_size,
)
from training.run_log import RunLog, diverged
from training.setup import (
    Data,
    check_current,
    check_run,
    compile_model,
    decide_compile,
    load_data,
    on_checked_device,
    preset_table,
    print_summary,
    resolve_train,
    setup_machine,
)
from training.task import Metrics, Pretraining, Task
from utils import autocast, matching_contents, mix_seed, read_checkpoint, to_device

MIN_SCALE = 2.0**-14  # of float16 losses: from 2^16, after 30 overflows in a row

# --- schedule and optimizers


def get_lr(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear warmup from 0 to lr_max over warmup_steps, then cosine
    (Loshchilov and Hutter 2017) or linear decay to lr_min at max_steps, then constant.

    >>> config = TrainConfig(lr_max=1.0, lr_min=0.0, warmup_steps=10, max_steps=110)
    >>> [round(get_lr(step, config), 3) for step in (0, 5, 10, 60, 110, 200)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    warmup = config.warmup_steps or 0
    if step < warmup:
        return config.lr_max * step / warmup
    if step >= config.max_steps:
        return config.lr_min
    progress = (step - warmup) / (config.max_steps - warmup)  # 0 to 1
    height = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr_min + (config.lr_max - config.lr_min) * config.lr_scale * height


def configure_optimizers(model: nn.Module, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by name, as in OPTIMIZERS: the one of the settings and, if that is for the
    matrices of the blocks only, AdamW (Loshchilov and Hutter 2019) for the other parameters. Weight
    decay applies to matrices but not to biases and norm gains."""
    matrices_only = OPTIMIZERS[config.optimizer].matrices_only
    # AdamW is the first of two: checkpoints have the states in this order.
    params: dict[str, list[Tensor]] = {"adamw": [], config.optimizer: []}
    for name, p in model.named_parameters():
        is_hidden = p.dim() == 2 and "blocks." in name
        if p.requires_grad:
            params["adamw" if matrices_only and not is_hidden else config.optimizer].append(p)
    optimizers = {}
    for name, own in params.items():
        spec, matrices = OPTIMIZERS[name], [p for p in own if p.dim() >= 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}]
        if not spec.matrices_only:
            groups.append({"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0})
        if own:
            optimizer = pkgutil.resolve_name(spec.path)
            precision = {"precision": config.precision} if spec.matrices_only else {}
            optimizers[name] = optimizer(groups, config.lr_max, **spec.options, **precision)
    return optimizers


# --- the training loop


class Trainer:
    """Trains a model on a task: the loop, the step, saving and restoring."""

    def __init__(self, model: GPT, task: Task, config: TrainConfig, device: torch.device):
        self.model = model.to(device).train()
        model.grad_checkpoint = config.grad_checkpoint
        if config.compile:
            compile_model(model, config, device, same_shapes=task.tokens_per_step is not None)
        self.replica = make_replica(self.model, config.parallel, device)
        self.params = list(model.parameters())  # the walk through the modules takes 0.2 ms
        self.task, self.config, self.device = task, config, device
        self.optimizers = configure_optimizers(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.micro_steps = range(rank(), config.grad_accum, world_size())  # of this process
        self.step = 0  # optimizer steps done
        self.unchecked: list[tuple[int, dict[str, Tensor]]] = []  # steps with their metrics

    def train(self, log: RunLog) -> int:
        """Train until max_steps, until the log is out of patience, or until a signal. Returns the
        exit status: 0, or 128 plus the number of the signal."""
        config = self.config
        with StopSignal() as stop, log.begin(self):
            if log.begins_with_evaluation(self.step):
                self.evaluate_and_save(log)
            while self.step < config.max_steps and not (log.out_of_patience() or stop.requested()):
                log.adjust_schedule(self.step)
                metrics = self.train_step()
                self.unchecked.append((self.step, metrics))
                if self.step % config.log_every == 0:  # reading a number waits for a GPU
                    self.check_finite()
                log.training_step(self.step, metrics, get_lr(self.step, config))
                if log.is_evaluation_step(self.step):
                    self.evaluate_and_save(log)
                elif names := self.numbered():
                    self.save(log, names)
        if not stop.requested():
            return 0
        self.save(log, ["latest.pt"])
        log.stopped(self.step)
        return 128 + stop.number

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step. Returns the terms of the loss, averaged over the step's tokens, and
        the norm of the gradient before clipping: scalars on the device."""
        config = self.config
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()  # 1. zero gradients
        step = 0 if config.overfit_batch else self.step
        batches = [self.task.get_batch(step, m) for m in self.micro_steps]  # 2. get batch
        n_tokens = all_reduce(torch.stack([n for _, n in batches]).sum())
        metrics: dict[str, Tensor] = {}
        for m, (batch, n) in zip(self.micro_steps, batches, strict=True):
            inputs = [to_device(t, self.device) for t in batch]  # 3. move to device
            torch.manual_seed(mix_seed(config.seed, self.step, m))  # for dropout
            # The micro-batch's share of the tokens; DDP and FSDP divide by the number of processes.
            share = n * world_size() / n_tokens
            is_last = m == self.micro_steps[-1]
            with contextlib.nullcontext() if is_last else self.replica.no_sync():
                with autocast(self.device, config.precision):
                    terms = self.task.loss(self.replica.net, *inputs)  # 4. forward  5. loss
                self.scaler.scale(terms["loss"] * share).backward()  # 6. backward
            for name, term in terms.items():
                metrics[name] = metrics.get(name, 0.0) + term.detach() * share
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.params, config.grad_clip or math.inf)  # 7. clip
        if self.scaler.is_enabled() and not norm.isfinite():
            self.model.zero_grad()  # float16 overflowed somewhere: no optimizer takes this step
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = get_lr(self.step, config)  # 8. set learning rate
            self.scaler.step(optimizer)  # 9. optimizer step
        self.scaler.update()
        self.step += 1  # 10. increment step
        metrics = {name: all_reduce(term) / world_size() for name, term in metrics.items()}
        return metrics | {"grad_norm": full_tensor(norm)}

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Without dropout, gradients, or compilation, which would run again for each new shape."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
        self.model.train(was_training)

    def evaluate(self, full: bool = False) -> Metrics:
        """The metrics of the task. Raises UserError if one of the losses is not finite."""
        with self.eval_mode(), autocast(self.device, self.config.precision):
            own_metrics = self.task.evaluate(self.model, full)
        metrics = broadcast_from_rank0(lambda: own_metrics)  # all ranks must decide alike
        losses: Metrics = {n: metrics[n] for n in ("train", "val") if n in metrics}
        if not all(map(math.isfinite, losses.values())):
            raise diverged(self.step, losses)
        return metrics

    def evaluate_best(self, log: RunLog) -> Metrics:
        """The metrics of the best checkpoint over the whole validation split."""
        if log.best()["step"] == self.step:
            return self.evaluate(full=True)
        file, unpack = log.run_dir / "best.pt", self.task.format.unpack
        last = self.replica.weights()
        self.replica.set_weights(broadcast_from_rank0(lambda: unpack(read_checkpoint(file))))
        metrics = self.evaluate(full=True)
        self.replica.set_weights(last)
        return metrics

    def check_finite(self) -> None:
        """Raise UserError for a step whose loss or gradient is not finite, in float16 for many."""
        for step, metrics in self.unchecked:
            numbers = {name: metrics[name].item() for name in ("loss", "grad_norm")}
            if self.scaler.is_enabled():  # it skips steps whose float16 gradient overflows
                del numbers["grad_norm"]
            if not all(map(math.isfinite, numbers.values())):
                raise diverged(step, numbers)
        self.unchecked.clear()
        if (scale := self.scaler.get_scale()) < MIN_SCALE:
            raise diverged(self.step, {"float16 loss scale": scale})

    # --- checkpoints

    def evaluate_and_save(self, log: RunLog) -> None:
        """Evaluate, log, and save the checkpoints that are due."""
        self.check_finite()
        metrics = self.evaluate()
        sample = ""
        if self.config.sample_tokens:
            with self.eval_mode():
                sample = self.task.sample(self.model).strip("\n")
        is_best = log.evaluation(self.step, metrics, get_lr(self.step, self.config), sample)
        # latest.pt last: a run killed before that repeats these steps and rewrites these files
        self.save(log, ["best.pt"] * is_best + self.numbered() + ["latest.pt"])
        log.restart_clock(self.step)

    def numbered(self) -> list[str]:
        """The name of the checkpoint that save_every asks for after this step, if it does."""
        due = self.config.save_every and self.step and self.step % self.config.save_every == 0
        return [f"ckpt_{self.step:05d}.pt"] if due else []

    def save(self, log: RunLog, names: list[str]) -> None:
        """Write checkpoints from which any number of processes can resume exactly."""
        self.check_finite()
        weights = self.replica.weights()
        optimizers = list(map(self.replica.optimizer_state, self.optimizers.values()))
        if rank():
            return
        state = {
            "gpt_config": asdict(self.model.config),
            "train_config": asdict(replace(self.config, resume=False, overwrite=False)),
            **self.task.format.pack(weights),
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            **log.state(),
        }
        first, *others = (log.run_dir / name for name in names)
        save_checkpoint(first, state)
        for path in others:
            copy_file(first, path)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: on a CPU, all that follows is bit for bit the same."""
        self.replica.set_weights(self.task.format.unpack(state))
        for name, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(self.optimizers[name], OPTIMIZERS[name], saved)
            self.replica.shard_state(self.optimizers[name])
        if state["scaler"]:  # empty unless the run used float16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def run_training(
    trainer: Trainer, state: dict[str, Any] | None = None, started: float | None = None
) -> tuple[int, RunLog]:
    """Train, from a checkpoint if there is one, and score the best step. With --minutes, the run's
    time begins at `started`, otherwise now. Returns the exit status and the log."""
    config = trainer.config
    run_dir = Path(config.out_dir, config.tag)
    with contextlib.nullcontext() if rank() else locked(run_dir, "a training run"):
        check_current(run_dir, config, state)
        decide_compile(trainer.model, trainer.task, config)
        if state:
            with matching_contents(run_dir / "latest.pt"):
                trainer.restore(state)
            warn_if_rate_jumps(trainer.step, config, state["train_config"])
            print(f"resuming at step {trainer.step}, to step {config.max_steps} in all")
        settings = asdict(trainer.model.config) | asdict(config)
        header = {"corpus": trainer.task.format.entries["corpus"]} | settings
        log = RunLog(config, header, trainer.task.tokens_per_step, state, started)
        status = trainer.train(log)
        if status == 0:
            log.finish(trainer.evaluate_best(log))
    return status, log


def warn_if_rate_jumps(step: int, config: TrainConfig, saved: dict[str, Any]) -> None:
    """Warn if new settings raise the learning rate at the step at which a run resumes."""
    before, now = (get_lr(step, c) for c in (from_dict(TrainConfig, saved), config))
    if now > 1.5 * before:
        print(f"warning: the learning rate at step {step} is now {now:g} instead of {before:g}")


def new_trainer(
    task_type: type[Pretraining], device: Any, gpt: GPTConfig, config: TrainConfig, data: Data
) -> Trainer:
    torch.manual_seed(config.seed)
    task: Task = task_type(data.corpus, data.tokenizer, gpt.block_size, config, device)
    if data.teachers:
        task = data.teachers.task(task)
    return Trainer(GPT(gpt), task, config, device)


def run_both(
    make_trainer: Any, gpt: GPTConfig, config: TrainConfig, data: Data, state: Any, started: float
) -> int:
    """A run, and if --minutes has planned it, a second one that learns from it."""
    status, log = run_training(make_trainer(gpt, config), state, started)
    if config.student_minutes and not status:
        from training.plan import second_run  # only after a run of --minutes

        config, data, state = second_run(gpt, config, data, bool(state))
        started = started if state else log.started  # a checkpoint contains the seconds before it
        status, _ = run_training(make_trainer(gpt, config, data=data), state, started)
    return status


def main(argv: list[str] | None = None, task_type: type[Pretraining] = Pretraining) -> int:
    started = time.perf_counter() - (time.process_time() if argv is None else 0.0)  # of importing
    doc, classes = f"{__doc__}\n{preset_table()}", (GPTConfig, TrainConfig)
    results = parse_args(classes, argv, doc, resolve_train, check_run)
    gpt_config, config, state, flags = on_checked_device(*results)
    device = init_process_group(config.device)
    data = load_data(gpt_config, config, state)
    setup_machine(config, device, state)
    gpt_config = replace(gpt_config, vocab_size=data.tokenizer.vocab_size)
    make_trainer = partial(new_trainer, task_type, device, data=data)
    if config.plan or (config.minutes and not state):
        from training.plan import plan_run  # only with these flags

        gpt_config, config = plan_run(flags, gpt_config, config, make_trainer, started)
    if config.plan:
        return 0
    print_summary(gpt_config, config, data.corpus, device)
    if config.dry_run or config.overfit_batch:
        from training.checks import run_check  # only with these flags

        status = run_check(gpt_config, config, data, device, make_trainer)
    else:
        status = run_both(make_trainer, gpt_config, config, data, state, started)
    destroy_process_group()
    return status


if __name__ == "__main__":
    run(main)
