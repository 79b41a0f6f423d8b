"""Several processes that train one model, started by torchrun, and the weights they hold.

    torchrun --nproc_per_node=2 train.py                    two GPUs, or two processes on a CPU
    torchrun --nproc_per_node=8 train.py --parallel fsdp    a model that does not fit on one GPU

Rank 0 writes files and prints. Without torchrun there is one process, of rank 0, and the functions
here do nothing.
"""

import contextlib
import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from system.settings import UserError


def is_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_restart() -> bool:
    """Whether torchrun restarted this process after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, also before `init_process_group`."""
    return int(os.environ["WORLD_SIZE"]) if is_torchrun() else 1


def init_process_group(device: torch.device) -> torch.device:
    """Connect to the other processes, if there are any. Returns the device of this process, which
    is its own GPU on a machine with several. Raises UserError if there are too few GPUs."""
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
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open)
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


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The tensor summed over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The tensor averaged over all processes, in place."""
    return all_reduce_sum(tensor).div_(world_size()) if world_size() > 1 else tensor


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Let one process per machine run first: it downloads a corpus, which the others then find."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        all_reduce_max(0)
    yield
    if not waits:
        all_reduce_max(0)


# --- the model in several processes


def wrap(model: Any, parallel: str, device: torch.device) -> nn.Module:
    """The model with gradients averaged over the processes.

    "ddp" replicates it (Li et al. 2020); "fsdp" shards every weight, its gradient and its optimizer
    state, and gathers the weights of a block when it runs (Zhao et al. 2023). The weights are
    gathered in float32, and autocast selects the precision of each operation as it does under DDP;
    MixedPrecisionPolicy(param_dtype=bfloat16) would also round norms, RoPE and the residual stream.
    """
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    # slow to import, and only needed here
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is under FSDP."""
    return hasattr(model, "set_requires_gradient_sync")


@contextlib.contextmanager
def no_sync(net: Any, skip: bool) -> Iterator[None]:
    """If skip, accumulate the gradients of a backward pass locally: all but the last one of a step
    need no communication."""
    if is_sharded(net):
        net.set_requires_gradient_sync(not skip)
    local = skip and isinstance(net, DistributedDataParallel)
    with net.no_sync() if local else contextlib.nullcontext():
        yield


# --- full state: the weights and optimizer states that a checkpoint holds
#
# torch.distributed.checkpoint.state_dict does this too, but importing it takes 0.6 s, more than
# half as long as all of train.py, and its first call steps every optimizer without state.


class Weights:
    """Reads and writes the weights of a model as a full state dict, whether they are tied,
    replicated or sharded. Under FSDP every process must make the same calls."""

    def __init__(self, model: nn.Module):
        self.model = model

    def get(self) -> dict[str, Tensor]:
        """A copy of the weights by name. Tied weights stay one tensor, except under FSDP."""
        weights = self.model.state_dict()
        return gather(weights) if is_sharded(self.model) else copy.deepcopy(weights)

    def set(self, weights: dict[str, Tensor]) -> None:
        """Overwrite the weights in place."""
        if is_sharded(self.model):
            shards = self.model.state_dict()
            weights = {name: shard_like(shards[name], t) for name, t in weights.items()}
        self.model.load_state_dict(weights)

    @contextlib.contextmanager
    def swapped(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Use other weights inside this context."""
        own = self.get()
        self.set(weights)
        try:
            yield
        finally:
            self.set(own)


OPTIMIZER_STATE = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer", "row_squares"},
    "SGD": {"momentum_buffer"},
}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the full state of an optimizer; under FSDP, this process's shards of it. Its settings
    are those of the run. Raises ValueError if the state is not that of its parameters."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    names = OPTIMIZER_STATE[type(optimizer).__name__]
    for parameter, values in optimizer.state.items():
        if values.keys() != names:
            raise ValueError(f"the optimizer's state has {sorted(values)}")
        for name, value in values.items():
            shapes = {"step": (), "row_squares": (len(parameter), 1)}
            if value.shape != shapes.get(name, parameter.shape):
                raise ValueError(f"the optimizer's {name} has the shape {tuple(value.shape)}")
        if hasattr(parameter, "full_tensor"):
            for name, value in values.items():
                if value.shape == parameter.shape and name != "row_squares":
                    values[name] = shard_like(parameter, value)


def full_tensor(tensor: Any) -> Tensor:
    """A tensor with its shards gathered, if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(value: Any) -> Any:
    """A state dict or list with all sharded tensors gathered, as copies on the CPU."""
    if hasattr(value, "full_tensor"):
        return full_tensor(value).to("cpu", copy=True)  # one process's shard is the parameter
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    return [gather(item) for item in value] if isinstance(value, list) else value


def shard_like(parameter: Any, tensor: Tensor) -> Tensor:
    """A full tensor, sharded in the same way as a parameter."""
    from torch.distributed.tensor import distribute_tensor  # slow to import, and only needed here

    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
