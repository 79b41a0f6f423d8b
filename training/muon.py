"""The Muon optimizer, which updates all matrices of one shape together."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.distributed import full_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial of Jordan et al. 2024
NS_STEPS = 5
ROW_SQUARES_DECAY = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, so that it is equally large in all directions of a
    matrix (Jordan et al. 2024), and then equally large in all rows over time (NorMuon, Li et al.
    2025: 0.007 lower loss on TinyShakespeare). The update is scaled so that AdamW's learning rates
    and weight decay fit (Liu et al. 2025).

    torch.optim.Muon treats the matrices one after the other: for 16 of 128 x 128 to 512 x 128 that
    takes 12 ms on two cores, and 6 ms stacked by shape.

    precision: of its matrix products, as of the model's. On a CPU that only emulates bfloat16 they
    take 20 to 50 times as long as in float32.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.9,
        precision: str = "float32",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = torch.float32 if precision == "auto" else getattr(torch, precision)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self.update(params, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, params: list[Tensor], lr: float, decay: float, momentum: float) -> None:
        """Update n matrices of one shape, (R, C)."""
        R, C = params[0].shape
        for p in params:
            if not self.state[p]:
                row_squares = torch.zeros(R, 1, device=p.device)
                self.state[p] = {"momentum_buffer": torch.zeros_like(p), "row_squares": row_squares}
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, momentum)
        stacked = torch.stack([full_tensor(u) for u in nesterov])  # (n, R, C)
        update = orthogonalize(stacked, self.dtype).float()
        squares = [self.state[p]["row_squares"] for p in params]
        torch._foreach_lerp_(squares, list(update.square().mean(-1, True)), 1 - ROW_SQUARES_DECAY)
        norm = update.norm(dim=(1, 2), keepdim=True)  # (n, 1, 1)
        update /= torch.stack(squares).sqrt() + 1e-8
        scaled_norm = update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-8)  # 0 without a gradient
        update *= 0.2 * math.sqrt(max(R, C)) * norm / scaled_norm
        updates = list(update)
        if hasattr(params[0], "full_tensor"):
            from training.fsdp import shard_like  # only with --parallel fsdp

            updates = [shard_like(p, u) for p, u in zip(params, updates, strict=True)]
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, updates, alpha=-lr)


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices with the singular vectors of x (n, R, C) and singular values near 1: x is divided by
    its Frobenius norm, then replaced five times by a x + b (x x^T) x + c (x x^T)^2 x, in dtype."""
    a, b, c = COEFFICIENTS
    wide = x if x.size(1) <= x.size(2) else x.mT  # so that wide @ wide.mT is the smaller product
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)
    for _ in range(NS_STEPS):
        square = torch.bmm(wide, wide.mT)  # (n, R, R)
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        wide = torch.baddbmm(wide, square, wide, beta=a)
    return wide if x.size(1) <= x.size(2) else wide.mT
