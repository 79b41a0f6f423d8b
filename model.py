"""The GPT: a stack of blocks, each attention then an MLP, that predicts every next token of a text.

Read it from top to bottom: the small parts first (norms, MLPs, positions, attention), then the
block, then the model. The parts that differ between architectures are chosen by name, from one
mapping per slot: NORMS, MLPS, POSITIONS.

Letters in the shape comments: B batch, T time (positions in the window), C channels (n_embd), V
vocabulary, H heads, K heads of keys and values (n_kv_head), D head size, F hidden width of the MLP
(n_inner), S positions that are looked at: T, and before them those in the cache.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import GPTConfig

# --- norms: the same job, LayerNorm also subtracts the mean (Ba et al. 2016; Zhang and Sennrich
# 2019)

NORMS: dict[str, Callable[[GPTConfig, int], nn.Module]] = {
    "layernorm": lambda config, size: nn.LayerNorm(size, config.norm_eps, bias=config.bias),
    "rmsnorm": lambda config, size: nn.RMSNorm(size, config.norm_eps),
}


# --- MLPs: widen, bend, narrow again


def residual_projection(n_in: int, n_out: int, bias: bool) -> nn.Linear:
    """A linear layer whose output is added to the residual stream; `init_weights` starts it
    smaller."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    layer.writes_residual = True
    return layer


class MLP(nn.Module):
    """proj(activation(fc(x))), the Transformer's own (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.activation = activation
        self.proj = residual_projection(config.n_inner, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.fc(x))  # (B, T, F)
        return self.proj(x)  # (B, T, C)


class SwiGLU(nn.Module):
    """proj(silu(gate(x)) * up(x)): one half opens and closes the other (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc = nn.Linear(
            config.n_embd, 2 * config.n_inner, bias=config.bias
        )  # gate and up, in one product
        self.proj = residual_projection(config.n_inner, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)  # 2 x (B, T, F)
        return self.proj(F.silu(gate) * up)  # (B, T, C)


MLPS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "gelu": lambda config: MLP(config, lambda x: F.gelu(x, approximate="tanh")),  # as in GPT-2
    "relu": lambda config: MLP(config, F.relu),
    "silu": lambda config: MLP(config, F.silu),
    "relu2": lambda config: MLP(config, lambda x: F.relu(x).square()),  # So et al. 2021
    "swiglu": SwiGLU,
}


# --- positions: each takes the token embeddings (B, T, C), the first of them at position `start`,
# and returns them with whatever it adds, and the rotation --- (cos, sin) that attention applies to
# its queries and keys, or None


class NoPositions(nn.Module):
    """Adds nothing: from the causal mask alone a model learns to count (Haviv et al. 2022)."""

    def __init__(self, config: GPTConfig):
        super().__init__()

    def forward(self, x: Tensor, start: int = 0) -> tuple[Tensor, None]:
        return x, None


class LearnedPositions(nn.Module):
    """One trained vector per position, added to the token's (GPT-2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x: Tensor, start: int = 0) -> tuple[Tensor, None]:
        return x + self.table.weight[start : start + x.size(1)], None  # (B, T, C) + (T, C)


class SinusoidalPositions(nn.Module):
    """sin(t / 10000^(2i/C)) in channel 2i, the cosine in 2i + 1, added to the token's vector times
    sqrt(C) (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        angle = rotation_angles(config.block_size, config.n_embd)  # (T, C/2)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(
            1
        )  # (T, C): sin, cos, sin, cos, ...
        self.register_buffer("table", table, persistent=False)
        self.scale = math.sqrt(config.n_embd)

    def forward(self, x: Tensor, start: int = 0) -> tuple[Tensor, None]:
        table = self.table[start : start + x.size(1)].to(x.dtype)  # (T, C)
        return x * self.scale + table, None  # (B, T, C)


class RotaryPositions(nn.Module):
    """Adds nothing: queries and keys are turned by an angle that grows with the position, so that
    their product depends on how far apart they stand, not on where (RoPE, Su et al. 2021)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        angle = rotation_angles(config.block_size, config.head_size, config.rope_theta)  # (T, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        end = start + x.size(1)
        return x, (self.cos[start:end], self.sin[start:end])


def rotation_angles(length: int, size: int, theta: float = 10000.0) -> Tensor:
    """t / theta^(2i/size) for every position t and pair of channels i: fast clocks first, slow ones
    last, (T, size/2)."""
    frequency = theta ** (-torch.arange(0, size, 2) / size)
    return torch.outer(torch.arange(length), frequency)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x (B, H, T, D) by the angles of cos and sin (T,
    D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


POSITIONS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "none": NoPositions,
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RotaryPositions,
}


# --- attention


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Whom the last T of S positions may look at, themselves and those before: true or false,
    (T, S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def document_mask(docs: Tensor) -> Tensor:
    """`causal_mask` for windows that hold several documents, whose numbers are docs (B, T): nobody
    looks into another document, (B, 1, T, T)."""
    same = docs[:, :, None] == docs[:, None, :]  # (B, T, T)
    return (same & causal_mask(docs.size(1), docs.size(1), docs.device))[:, None]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention as the formula has it, softmax(q k^T / sqrt(D)) v; q is (B, H, T, D), k and v are
    (B, H, S, D), the mask is the causal one unless another is given.

    The same result as `scaled_dot_product_attention`, slower and in more memory, for reading and
    for pictures. Returns the output (B, H, T, D) and the attention weights (B, H, T, S), whose rows
    sum to 1.
    """
    T, S = q.size(-2), k.size(-2)
    mask = causal_mask(T, S, q.device) if mask is None else mask
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, H, T, S)
    # 0 or -inf, of size (T, S): adding it is faster than filling the scores of every head.
    hidden = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
    weights = (scores + hidden).softmax(dim=-1)  # (B, H, T, S)
    return weights @ v, weights


class KVCache:
    """The keys and values of the tokens that a model has seen, of every layer, so that the next
    token need not compute them again.

    Room for `size` tokens is taken at once, (B, K, size, D) a layer; `length` of it is filled.
    `model(idx, cache=cache)` looks at what is there and adds the tokens of idx; past the end it
    raises ValueError.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_size)
        self.size, self.length = config.block_size, 0
        self.layers = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            for _ in range(config.n_layer)
        ]
        shape = (2 * config.n_layer * config.token_shift, batch_size, 1, config.n_embd // 2)
        self.passed = torch.zeros(shape, device=device, dtype=dtype)  # of the last token

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B, K, T, D) of a layer; all so far are (B, K, S, D)."""
        keys, values = self.layers[layer]
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def pass_on(self, part: int, x: Tensor) -> Tensor:
        """Keep what the last token passes on to the next in a part of the model, (B, 1, C/2); what
        the token before these passed on, zeros where there is none."""
        before = self.passed[part].to(x.dtype, copy=True) if self.length else torch.zeros_like(x)
        self.passed[part] = x
        return before

    def select(self, rows: Tensor) -> None:
        """Make the batch of these of its rows, as beam search does."""
        self.layers = [tuple(t[rows] for t in layer) for layer in self.layers]
        self.passed = self.passed[:, rows]


class Attention(nn.Module):
    """Each position looks back at itself and those before it, in H heads (Vaswani et al. 2017).
    With fewer heads of keys and values, several query heads share one (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_size, bias=config.bias)
        width = config.n_head * config.head_size
        self.proj = residual_projection(width, config.n_embd, config.bias)
        # Normed queries and keys keep the scores small at any learning rate (Henry et al. 2020).
        norm = NORMS[config.norm] if config.qk_norm else lambda config, size: nn.Identity()
        self.q_norm, self.k_norm = (norm(config, config.head_size) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D), and twice (B, K, T, D)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())  # angles deserve float32
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)  # (B, K, S, D)
        if k.size(1) < q.size(1):
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        if maps is None:
            y = fused_attention(q, k, v, mask)  # (B, H, T, D)
        else:
            y, weights = plain_attention(q, k, v, mask)
            maps.append(weights)
        y = y.transpose(1, 2).reshape(B, T, -1).to(qkv.dtype)  # heads side by side again
        return self.proj(y)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`plain_attention` in one kernel, which does not write the (T, S) weights to memory
    (FlashAttention, Dao et al. 2022)."""
    T, S = q.size(-2), k.size(-2)
    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_autocast_enabled("cpu") and 1 < T == S <= 256:
        # On a CPU the kernel is slow in bfloat16, and with short windows even in float32: a
        # training step of the laptop preset takes 0.8 of the time with the plain formula.
        return plain_attention(q, k, v, mask)[0]
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    dtype = torch.float32 if on_cpu else v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        causal = mask is None and 1 < T == S
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def shift_tokens(
    x: Tensor, mask: Tensor | None = None, pass_on: Callable[[Tensor], Tensor] = torch.zeros_like
) -> Tensor:
    """x (B, T, C) with the second half of its channels from the token before, so that each layer
    reads pairs of tokens (token shift, Peng et al. 2023). Nothing comes from where the mask says
    that a token may not look. `pass_on` takes what the last token has for the next (B, 1, C/2), and
    gives what the one before the first had: zeros, unless there is a cache."""
    own, passed = x.chunk(2, dim=-1)  # 2 x (B, T, C/2)
    first = pass_on(passed[:, -1:])
    passed = torch.cat([first, passed[:, :-1]], dim=1)
    if mask is not None:
        seen = mask[:, 0].diagonal(-1, dim1=1, dim2=2)  # (B, T - 1): may t + 1 look at t?
        passed = passed * F.pad(seen, (1, 0))[..., None]
    return torch.cat([own, passed], dim=-1)


# --- the model


class Block(nn.Module):
    """Attention mixes positions, the MLP works on each alone; both add to the residual stream x.
    They read it normed (pre-norm); with post_norm the sums are normed instead (Vaswani et al.
    2017), which is harder to train (Xiong et al. 2020). Dropout is for what they add, not for the
    attention weights: drawing so many random numbers took a third of a step on a CPU."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.norm1 = NORMS[config.norm](config, config.n_embd)
        self.attn = Attention(config, layer)
        self.norm2 = NORMS[config.norm](config, config.n_embd)
        self.mlp = MLPS[config.mlp](config)
        self.drop, self.layer = nn.Dropout(config.dropout), layer
        self.post_norm, self.token_shift = config.post_norm, config.token_shift

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        y = self.read(x, 0, mask, cache)
        x = x + self.drop(self.attn(y, rotation, mask, cache, maps))
        x = self.norm1(x) if self.post_norm else x
        x = x + self.drop(self.mlp(self.read(x, 1, mask, cache)))
        return self.norm2(x) if self.post_norm else x

    def read(self, x: Tensor, part: int, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """What attention (part 0) or the MLP (part 1) reads of the residual stream."""
        if not self.post_norm:
            x = self.norm2(x) if part else self.norm1(x)
        if not self.token_shift:
            return x
        if cache is None:
            return shift_tokens(x, mask)
        return shift_tokens(x, mask, partial(cache.pass_on, 2 * self.layer + part))


class GPT(nn.Module):
    """Token ids in, a score for every possible next token out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tok = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos = POSITIONS[config.pos](config)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.Identity() if config.post_norm else NORMS[config.norm](config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.grad_checkpoint = False  # keep no activations inside blocks (Chen et al. 2016)
        if (
            config.tie_weights
        ):  # a token is written and read with the same vector (Press and Wolf 2017)
            self.head.weight = self.tok.weight
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02) weights and zero biases, as GPT-2.

        The 2 n_layer projections that write to the residual stream start smaller by 1/sqrt(2
        n_layer), so that the stream's variance does not grow with the depth (Radford et al. 2019).
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02
            if getattr(module, "writes_residual", False):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        docs: Tensor | None = None,
        cache: KVCache | None = None,
        maps: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and, where the right answers are known, how wrong they are.

        idx (B, T) are token ids, T at most block_size. Returns the logits (B, T, V) and the mean
        cross-entropy in nats against targets (B, T), None without them; targets of -100 do not
        count. With docs, the number of each token's document (B, T), tokens attend to their own
        document only. With a cache, idx goes on after the tokens in it and is added to it, and the
        logits are those of the last position alone, (B, 1, V). Give an empty list as `maps` to have
        each layer append its attention weights (B, H, T, S) to it, by the slower `plain_attention`.
        """
        start = cache.length if cache else 0
        if start + idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{start + idx.size(1)} tokens do not fit the window of {self.config.block_size}"
            )
        x, rotation = self.pos(self.tok(idx), start)  # (B, T, C)
        x = self.drop(x)
        mask = None if docs is None else document_mask(docs)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rotation, mask, use_reentrant=False)
            else:
                x = block(x, rotation, mask, cache, maps)
        if cache:
            cache.length += idx.size(1)
            x = x[:, -1:]  # (B, 1, C)
        logits = self.head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100
        )

    def num_params(self) -> int:
        """Numbers that training changes; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())
