"""Several processes that train one model, as torchrun starts them: what they share and agree on.

    torchrun --nproc_per_node=2 train.py                    two GPUs, or two processes on a CPU
    torchrun --nproc_per_node=8 train.py --parallel fsdp    a model that does not fit one GPU

Each process has a rank; rank 0 writes and prints. A process that was started alone is rank 0 of a
world of one, and nothing here has anything to do.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import UserError

CPU = torch.device("cpu")


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarted() -> bool:
    """Whether torchrun started it again, after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> torch.device:
    """Join the other processes, if there are any. Returns this one's device: of several GPUs, its
    own. Raises UserError where there are fewer GPUs than processes."""
    if not launched():
        return device
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "mps":
        raise UserError("an Apple GPU serves one process: leave torchrun out, or --device cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPUs for more processes: lower "
                "--nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # What is agreed on goes by gloo, even between GPUs: so that none has to wait for it.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stands for the terminal)
    return device


def end() -> None:
    """Leave the other processes, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --- what the processes agree on


def from_first(function: Callable[[], Any]) -> Any:
    """What function() returns on rank 0, on every rank."""
    box = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=CPU)
    return box[0]


def total(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    tensor = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def highest(number: int) -> int:
    """The largest of the processes' numbers."""
    tensor = torch.tensor(number)
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def mean(tensor: Tensor) -> Tensor:
    """A tensor's mean over the processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """Let one process of each machine go first: to fetch a corpus, which the others then find."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        total(0)
    yield
    if not waits:
        total(0)


# --- one model in several processes


def wrap(model: nn.Module, how: str, device: torch.device, precision: str) -> nn.Module:
    """The model whose gradients are the mean over the processes: with "ddp" each has a whole copy
    (Li et al. 2020), with "fsdp" each a slice of every weight, its gradient and its optimizer
    state; a block's weights are put together when it is their turn (Zhao et al. 2023)."""
    if not dist.is_initialized():
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, so only here
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    dtype = torch.float32 if precision == "float32" else getattr(torch, precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


@contextlib.contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """Keep the gradients of a backward pass in this process, those of all but a step's last."""
    if is_sliced(model):
        model.set_requires_gradient_sync(not stay)
    alone = stay and isinstance(model, DistributedDataParallel)
    with model.no_sync() if alone else contextlib.nullcontext():
        yield


def is_sliced(model: nn.Module) -> bool:
    """Whether FSDP holds the model."""
    return hasattr(model, "set_requires_gradient_sync")


def whole(value: Any) -> Any:
    """A state dict with its slices put together, on the CPU; every process must ask for it."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights into a model, or each process its slices of them."""
    if is_sliced(model):
        own = model.state_dict()
        weights = {name: slice_like(own[name], tensor) for name, tensor in weights.items()}
    model.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's whole state, or each process its slices of it."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        if hasattr(parameter, "full_tensor"):
            for name, value in values.items():
                if value.shape == parameter.shape:
                    values[name] = slice_like(parameter, value)


def slice_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor in slices, as FSDP's parameter is."""
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
