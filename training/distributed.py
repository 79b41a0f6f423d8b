"""The processes that train one model: one, or several that torchrun started.

    torchrun --nproc_per_node=2 train.py                    two GPUs, or two processes on a CPU
    torchrun --nproc_per_node=8 train.py --parallel fsdp    a model that does not fit on one GPU

Rank 0 writes files and prints. All processes stop together. Without torchrun there is one process,
of rank 0, and communication does nothing.
"""

import contextlib
import copy
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import OptimizerSpec
from system.device import pick_device
from system.settings import UserError

BUSY = 1.5  # from this slowdown on, the CPU is busy: 1.0 if idle, 1.9 beside one busy loop
is_torchrun = dist.is_torchelastic_launched  # whether torchrun started this process


def is_restart() -> bool:
    """Whether torchrun restarted this process after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, also before `init_process_group`."""
    return int(os.environ["WORLD_SIZE"]) if is_torchrun() else 1


def init_process_group(device_name: str) -> torch.device:
    """Connect to the other processes, if there are any. Returns the device of this process, which
    is its own GPU on a machine with several. Raises UserError if there are too few GPUs."""
    device = pick_device(device_name)
    if not is_torchrun():
        return device
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "mps":
        raise UserError("MPS supports one process: run without torchrun, or with --device cpu")
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(f"more processes than the {n_gpus} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # gloo for numbers on the CPU, so that agreeing on them does not wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (stays open)
    return device


def destroy_process_group() -> None:
    """Disconnect from the other processes at the end of a run. The caller must have deleted the
    model: a process that exits with a sharded model or before the others sometimes aborts."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


# --- communication


def broadcast_from_rank0(function: Callable[[], Any]) -> Any:
    """What function() returns on rank 0, on every rank."""
    box = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The tensor summed over all processes, or another reduction of it, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Let one process per machine run first: it downloads a corpus, which the others then find."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        all_reduce(torch.zeros(1))
    yield
    if not waits:
        all_reduce(torch.zeros(1))


class StopSignal:
    """Inside this context, the first SIGINT (Ctrl-C) or SIGTERM only sets `number`; a second one
    ends the process immediately."""

    def __init__(self) -> None:
        self.number = 0

    def requested(self) -> bool:
        """Whether any of the processes has received a signal; then all of them stop."""
        agreed = self.number
        if world_size() > 1:
            agreed = int(all_reduce(torch.tensor(agreed), dist.ReduceOp.MAX))
        self.number = agreed or self.number  # a signal may have arrived meanwhile
        return agreed > 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        text = "\nstopping after this step; press Ctrl-C again to stop now, without saving\n"
        # print raises RuntimeError if the signal has interrupted another print
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # to standard error
        for s, before in self.handlers.items():  # a notebook's kernel must not end
            signal.signal(s, before if "ipykernel" in sys.modules else signal.SIG_DFL)

    def __enter__(self) -> "StopSignal":
        signals = [signal.SIGINT, signal.SIGTERM]
        if sys.platform == "win32":
            signals.append(signal.SIGBREAK)  # Ctrl-Break
        self.handlers = {s: signal.signal(s, self.handle) for s in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)


# --- the model in these processes


class Replica:
    """The model of this process. With several processes, each has a copy, and DDP averages the
    gradients (Li et al. 2020). fsdp.Shards has the same methods."""

    def __init__(self, model: Any):
        self.model = model
        self.net = model  # to train
        if dist.is_initialized():
            # Gradients are views of the buckets that DDP communicates, not copied to them.
            self.net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Accumulate gradients locally: only a step's last backward pass needs communication."""
        return contextlib.nullcontext() if self.net is self.model else self.net.no_sync()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the full state dict. Tied weights stay one tensor."""
        return copy.deepcopy(self.model.state_dict())

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def shard_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Shard the state that an optimizer has loaded as its parameters are: they are whole."""


def make_replica(model: Any, parallel: str, device: torch.device) -> Any:
    """The model of this process: a Replica, or with "fsdp" Shards."""
    if parallel != "fsdp" or not dist.is_initialized():
        return Replica(model)
    from training.fsdp import Shards  # only with --parallel fsdp

    return Shards(model, device)


def full_tensor(tensor: Any) -> Tensor:
    """A tensor with its shards gathered, if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_optimizer(
    optimizer: torch.optim.Optimizer, spec: OptimizerSpec, state: dict[str, Any]
) -> None:
    """Load the state of an optimizer; its settings are those of the run. Raises ValueError if the
    state is not that of its parameters."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    for parameter, values in optimizer.state.items():
        if values.keys() != {*spec.averages, *spec.scalars}:
            raise ValueError(f"the optimizer's state has {sorted(values)}")
        for key, value in values.items():
            if value.layout != torch.strided:
                raise ValueError(f"the optimizer's {key} is sparse")
            small = key in spec.scalars and torch.broadcast_shapes(value.shape, parameter.shape)
            if value.shape != parameter.shape and not (small and value.numel() < parameter.numel()):
                raise ValueError(f"the optimizer's {key} has the shape {tuple(value.shape)}")


class CpuClock:
    """Measures how much other programs slow this process down on a CPU."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.time, self.cpu_time = time.perf_counter(), time.thread_time()

    def slowdown(self) -> float:
        """How many times as long as alone the work since the start has taken. Alone, the thread
        that trains computes all the time; beside other programs it also waits, for a core or for
        other threads of PyTorch. (Of many threads, some are idle without other programs too.)"""
        took, cpu_time = time.perf_counter() - self.time, time.thread_time() - self.cpu_time
        return took / max(cpu_time, 1e-9)
