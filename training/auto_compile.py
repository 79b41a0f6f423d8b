"""Whether to compile the model on a CPU, where compiling takes as long as hundreds of steps."""

import time

import torch

from config import TrainConfig
from model import GPT
from system.device import compiler_problem
from training.task import Task
from utils import autocast

# With an empty cache, compiling took 24 s on an AMD EPYC and 13 s on an Intel Xeon; with a filled
# one 1.5 s. A compiled step of the laptop preset took 0.76 to 0.84 of an eager one, and 0.64.
COMPILE_SECONDS = 25.0
SAVED = 0.15  # of a step, at least


def compile_if_faster(model: GPT, task: Task, config: TrainConfig) -> bool:
    """Compile the model if the whole run is then shorter, also with an empty cache. Measured, so
    that no run becomes slower. Returns whether it is compiled."""
    if task.tokens_per_step is None or config.grow_windows:  # each new shape would compile again
        return False
    eager = step_seconds(model, task, config)
    if eager * SAVED * config.max_steps < COMPILE_SECONDS:
        return False
    device = torch.device("cpu")
    if problem := compiler_problem(device):
        print(f"not compiling: {problem}")
        return False
    print("compiling: takes up to half a minute, less the next time", flush=True)
    for block in model.blocks:  # they are alike, so one compilation serves all
        block.compile()
    compiled = step_seconds(model, task, config)
    faster = compiled < (1 - SAVED / 2) * eager
    if not faster:
        for block in model.blocks:
            block._compiled_call_impl = None  # what block.compile() has set
    what = "compiled" if faster else "eager, because compiled steps are not faster"
    print(f"{what}: {1000 * compiled:.0f} ms per step compiled, {1000 * eager:.0f} ms eager")
    return faster


def step_seconds(model: GPT, task: Task, config: TrainConfig) -> float:
    """The time of the forward and backward passes of a step, from six on the first batch, the best
    of which counts. It is the CPU time of this thread, which other programs hardly change."""
    inputs, _ = task.get_batch(0, 0)
    times = []
    for _ in range(6):
        start = time.thread_time()
        with autocast(torch.device("cpu"), config.precision):
            loss = task.loss(model, *inputs)["loss"]
        loss.backward()
        times.append(time.thread_time() - start)
    model.zero_grad()
    return min(times) * config.grad_accum
