"""FSDP: a model that is sharded over the processes, for one that does not fit on one GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor


class Shards:
    """The same as distributed.Replica for a model whose weights, gradients and optimizer states are
    sharded. The weights of a block are gathered when it runs (Zhao et al. 2023), in float32, and
    autocast selects the precision of each operation as it does under DDP;
    MixedPrecisionPolicy(param_dtype=bfloat16) would also round norms, RoPE and the residual stream.
    All processes must make the same calls.

    torch.distributed.checkpoint.state_dict gathers states too, but names those of optimizers by
    parameter, and its first call steps every optimizer without state.
    """

    def __init__(self, model: Any, device: torch.device):
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        self.model = self.net = model

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.net.set_requires_gradient_sync(False)
        yield
        self.net.set_requires_gradient_sync(True)

    def weights(self) -> dict[str, Tensor]:
        return gather(self.model.state_dict())

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        shards = self.model.state_dict()
        weights = {name: shard_like(shards[name], t) for name, t in weights.items()}
        self.model.load_state_dict(weights)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return gather(optimizer.state_dict())

    def shard_state(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape:
                    values[name] = shard_like(parameter, value)


def gather(value: Any) -> Any:
    """A state dict or list with all sharded tensors gathered, as copies on the CPU."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor().to("cpu", copy=True)  # one process's shard is the parameter
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    return [gather(item) for item in value] if isinstance(value, list) else value


def shard_like(parameter: Any, tensor: Tensor) -> Tensor:
    """A full tensor, sharded in the same way as a parameter."""
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
