"""Store weights in lower precision: int8, bfloat16 or float16.

Generating one token at a time is limited by the time to read the weights from memory, so fewer bits
per weight make it faster.
"""

import torch
from torch import Tensor, nn

# The largest weight of a row becomes this integer. It is below 127, the largest int8, as a margin:
# rounding the scale to bfloat16, which has 8 significant bits, can enlarge quotients by 2^-8.
MAX_INT = 126
# With at least this many tokens per text, the weights are converted to floats before the product:
# the tokens share the cost. With fewer, a kernel reads the int8 weights directly: for one token, it
# takes a tenth of the time. The number of texts must not decide, because the two ways round
# differently, and a sample would depend on how many are generated.
MIN_TOKENS_TO_CONVERT = 8
# That kernel reads the inputs 16 at a time, past the end of a row if its width is not a multiple.
KERNEL_WIDTH = 16


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale per output row (as the weights of Dettmers et
    al. 2022). Its inputs are bfloat16."""

    scale: Tensor
    weight: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1).clamp(min=1e-12) / MAX_INT
        self.register_buffer("scale", scale.bfloat16())  # (n_out,)
        weight = (linear.weight.detach() / self.scale.float()[:, None]).round()
        weight = nn.functional.pad(weight, (0, -linear.in_features % KERNEL_WIDTH))
        self.register_buffer("weight", weight.to(torch.int8))  # (n_out, n_in and zeros)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (rows, n_in), bfloat16
        if missing := self.weight.size(1) - flat.size(1):
            flat = nn.functional.pad(flat, (0, missing))
        if x.size(-2) < MIN_TOKENS_TO_CONVERT and x.device.type == "cpu":
            # torch has no public name for this kernel.
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        else:
            # Many CPUs only emulate bfloat16: there 200 tokens took six times as long.
            dtype = torch.float32 if x.device.type == "cpu" else x.dtype
            y = nn.functional.linear(flat.to(dtype), self.weight.to(dtype)).to(x.dtype) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def lower_precision(model: nn.Module, precision: str) -> None:
    """Convert the model's parameters in place. With int8, the weights of linear layers become
    int8 and the other parameters bfloat16. RoPE's angles stay in float32."""
    if precision == "int8":
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                if isinstance(module, nn.Linear):
                    setattr(parent, name, Int8Linear(module))
    dtype = torch.bfloat16 if precision == "int8" else getattr(torch, precision)
    for name, parameter in model.named_parameters():
        if "q_norm" not in name and "k_norm" not in name:  # their inputs are float32
            parameter.data = parameter.data.to(dtype)
