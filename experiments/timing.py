"""Measure times side by side, in turns, because the speed of a machine varies over time."""

import math
import multiprocessing
import re
import resource
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from system.settings import UserError
from training.setup import keep_freed_memory

WARMUP_STEPS = 3


# --- functions


def time_once(function: Callable[[], Any]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The shortest of several calls, after one to warm up."""
    function()
    return min(time_once(function) for _ in range(repeats))


def median_seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each function. They are called in turns, so that a machine that becomes
    slower does so for all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(time_once(function))
    return {name: median(seconds) for name, seconds in times.items()}


def median(values: list[float]) -> float:
    """The median; of an even number of values the higher one of the middle two."""
    return sorted(values)[len(values) // 2]


# --- the machine


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that the sum of a large tensor reads, at best."""
    x = torch.ones(1 << 26, device=device)  # 256 MB, more than any cache
    return x.numel() * 4 / best_seconds(lambda: x.sum().item(), 10)


def matmul_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations per second in the product of two large matrices, at best."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=getattr(torch, precision))
    return 2 * n**3 / best_seconds(lambda: (a @ a)[0, 0].item(), 8)  # item() waits for the GPU


# --- training steps


class StepCost(NamedTuple):
    seconds: float  # per step, the median
    memory: float  # peak, in bytes


# A function that returns a training step, which returns its loss, and the function's arguments.
StepMaker = tuple[Callable[..., Callable[[], Tensor]], tuple[Any, ...]]


def step_costs(makers: dict[str, StepMaker], n_steps: int, repeats: int) -> dict[str, StepCost]:
    """The cost of a training step for each maker. Each has its own process, and they take turns of
    n_steps steps."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, (make_step, args) in makers.items():
        pipes[name], child_pipe = context.Pipe()
        process_args = (child_pipe, make_step, args)
        context.Process(target=serve_steps, args=process_args, daemon=True).start()
        pipes[name].recv()  # it has warmed up
    times: dict[str, list[float]] = {name: [] for name in makers}
    memory: dict[str, float] = {}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(n_steps)
            seconds, memory[name] = pipe.recv()
            times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(0)  # stop
    return {name: StepCost(median(times[name]), memory[name]) for name in makers}


def serve_steps(pipe: Any, make_step: Callable[..., Callable[[], Tensor]], args: Any) -> None:
    """The process of a maker: warm up, then run as many steps as the pipe asks for, and answer with
    the seconds per step and the peak memory, until it asks for 0."""
    keep_freed_memory()
    step = make_step(*args)
    for _ in range(WARMUP_STEPS):
        step().item()
    pipe.send(None)
    while n := pipe.recv():
        start = time.perf_counter()
        for _ in range(n):
            loss = step()
        loss.item()  # wait for the GPU
        seconds = (time.perf_counter() - start) / n
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        pipe.send((seconds, torch.cuda.max_memory_allocated() if loss.is_cuda else peak))


# --- whole runs


class Timed(NamedTuple):
    seconds: float  # since the start of the command
    loss: float


def time_losses(
    command: list[str], cwd: str, environment: dict[str, str], limit: float = math.inf
) -> list[Timed]:
    """Run a training command, and terminate it after `limit` seconds. Returns each validation loss
    that it prints with the seconds since its start. Raises UserError if it fails or prints none."""
    environment = environment | {"PYTHONUNBUFFERED": "1"}
    losses = []
    stopped = False
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout and process.stderr  # pipes, as requested
        for line in process.stdout:
            seconds = time.perf_counter() - start
            if found := re.search(r"\bval(?:idation)?(?: loss)? ([\d.]+)", line):
                losses.append(Timed(round(seconds, 1), float(found[1])))
            if seconds > limit and not stopped:  # a second signal would end train.py at once
                process.terminate()
                stopped = True
        errors = process.stderr.read()
    if not losses or (process.returncode and not stopped):
        raise UserError(f"{' '.join(command[1:3])} failed: {errors.strip().splitlines()[-1:]}")
    return losses
