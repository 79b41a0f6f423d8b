"""The GPT: a stack of blocks, each attention followed by an MLP, that predicts every next token.

Read it from top to bottom: components (norms, MLPs, positions, attention), the block, the model.
Components that differ between architectures are selected by name, from one mapping per slot.

Letters in the shape comments: B batch, T time (positions in the input), C channels (n_embd), V
vocabulary, H heads, K key/value heads (n_kv_head), D head size, F hidden width of the MLP
(n_inner), S positions attended to: those in the cache, then the T of the input.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import GPTConfig

# --- norms (Ba et al. 2016; RMSNorm does not subtract the mean, Zhang and Sennrich 2019)

NORMS: dict[str, Callable[[GPTConfig, int], nn.Module]] = {
    "layernorm": lambda config, size: nn.LayerNorm(size, config.norm_eps, bias=config.bias),
    "rmsnorm": lambda config, size: nn.RMSNorm(size, config.norm_eps),
}


# --- MLPs: up-project, activate, down-project
class ResidualProjection(nn.Linear):
    """A linear layer that writes to the residual stream: its initial weights are smaller."""


class MLP(nn.Module):
    """proj(activation(fc(x))), as in the original Transformer (Vaswani et al. 2017). Gated, fc(x)
    has two halves, gate and up, and it is proj(activation(gate) * up) (Shazeer 2020)."""

    def __init__(
        self, config: GPTConfig, activation: Callable[[Tensor], Tensor], gated: bool = False
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        # gate and up as one matrix: one large product is faster than two
        self.fc = nn.Linear(config.n_embd, (1 + gated) * config.n_inner, bias=config.bias)
        self.proj = ResidualProjection(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)  # (B, T, F); gated: (B, T, 2 F)
        if not self.gated:
            return self.proj(self.activation(x))  # (B, T, C)
        gate, up = x.chunk(2, dim=-1)  # 2 x (B, T, F)
        return self.proj(self.activation(gate) * up)  # (B, T, C)


MLPS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "gelu": lambda config: MLP(config, lambda x: F.gelu(x, approximate="tanh")),  # as in GPT-2
    "relu": lambda config: MLP(config, F.relu),
    "silu": lambda config: MLP(config, F.silu),
    "relu2": lambda config: MLP(config, lambda x: F.relu(x).square()),  # So et al. 2021
    "swiglu": lambda config: MLP(config, F.silu, gated=True),
}


# --- positions: each module takes token embeddings (B, T, C) and their positions `at` (T,), and
# returns the embeddings, with position vectors added if it has any, and the cosines and sines by
# which all layers rotate queries and keys, (T, D/2) each, if it has any
Rotation = tuple[Tensor, Tensor] | None


class NoPositions(nn.Module):
    """No vectors: the causal mask alone lets a model infer positions (Haviv et al. 2022)."""

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Rotation]:
        return x, None


class LearnedPositions(nn.Module):
    """One trained vector per position, added to the token embedding (GPT-2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Rotation]:
        x = x + self.table(at)  # (B, T, C) + (T, C)
        return x, None


class SinusoidalPositions(nn.Module):
    """sin(t / 10000^(2i/C)) in channel 2i and the cosine in 2i + 1, added to the token embedding
    times sqrt(C) (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        angle = rotation_angles(config.block_size, config.n_embd)  # (T, C/2)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (T, C/2, 2)
        self.table = nn.Buffer(table.flatten(1), persistent=False)  # (T, C)
        self.scale = math.sqrt(config.n_embd)

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Rotation]:
        table = self.table[at].to(x.dtype)  # (T, C)
        return x * self.scale + table, None  # (B, T, C)


class RotaryPositions(nn.Module):
    """Rotates queries and keys by an angle proportional to the position, so that their product
    depends on positions only through their distance (RoPE, Su et al. 2021)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        angle = rotation_angles(config.block_size, config.head_size, config.rope_theta)  # (T, D/2)
        self.cos = nn.Buffer(angle.cos(), persistent=False)
        self.sin = nn.Buffer(angle.sin(), persistent=False)

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Rotation]:
        return x, (self.cos[at], self.sin[at])


def rotation_angles(length: int, size: int, theta: float = 10000.0) -> Tensor:
    """t / theta^(2i/size) for each position t and pair of channels i, (T, size/2): the first pairs
    rotate fast, the last ones slowly."""
    frequency = theta ** (-torch.arange(0, size, 2) / size)
    return torch.outer(torch.arange(length), frequency)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of x (B, H, T, D) by angles: cos and sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


POSITIONS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "none": lambda config: NoPositions(),
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RotaryPositions,
}


# --- attention
def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Where the last T of S positions may attend: to themselves and earlier ones, (T, S) bool."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def document_mask(docs: Tensor) -> Tensor:
    """The causal mask of windows with several documents, restricted to the same document,
    (B, 1, T, T). docs (B, T) has the number of each token's document."""
    same = docs[:, :, None] == docs[:, None, :]  # (B, T, T)
    return (same & causal_mask(docs.size(1), docs.size(1), docs.device))[:, None]


Mask = Tensor | None  # bool, where attention is allowed, broadcasts to (B, H, T, S); None: causal


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Mask = None) -> tuple[Tensor, Tensor]:
    """Attention as in the formula, softmax(q k^T / sqrt(D)) v, for q (B, H, T, D) and k and v
    (B, H, S, D). Returns the output (B, H, T, D) and the weights (B, H, T, S); a row without
    visible keys is 0."""
    mask = causal_mask(q.size(-2), k.size(-2), q.device) if visible is None else visible
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, H, T, S)
    # Adding 0 or a huge negative number, (T, S), is faster than masking the scores of every head.
    penalty = torch.zeros_like(mask, dtype=scores.dtype)
    penalty = penalty.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    weights = (scores + penalty).softmax(dim=-1)  # (B, H, T, S)
    weights = weights if visible is None else weights * visible.any(dim=-1, keepdim=True)
    return weights @ v, weights


def fused_attention(q: Tensor, k: Tensor, v: Tensor, visible: Mask = None) -> Tensor:
    """The output of `plain_attention` from one kernel (FlashAttention, Dao et al. 2022)."""
    T, S = q.size(-2), k.size(-2)
    on_cpu = q.device.type == "cpu"
    short = torch.is_autocast_enabled("cpu") and 1 < T == S <= 256
    if on_cpu and (short or (T == 1 and torch.compiler.is_compiling())):
        # The CPU kernel is slow in bfloat16 and for short windows: with the plain formula, a
        # training step of the laptop preset takes 0.8 of the time, a compiled sampling step 0.9.
        return plain_attention(q, k, v, visible)[0]
    if visible is None and 1 < T < S:
        visible = causal_mask(T, S, q.device)
    causal = T > 1 and visible is None  # in this order a bool, not a SymBool, if T is dynamic
    dtype = torch.float32 if on_cpu else v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if q.device.type == "mps":  # its kernel is wrong in some versions (pytorch 195910, 181133)
            return plain_attention(q, k, v, visible)[0]
        return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal)


class KVCache:
    """The keys and values of earlier tokens, so that generation computes each token only once.

    There is memory for block_size tokens, (B, K, block_size, D) per layer; `length` are filled.
    `model(idx, cache=cache)` attends to them, and appends the tokens of idx.
    """

    length: int | Tensor = 0

    def __init__(self, config: GPTConfig, batch_size: int, **factory: Any):  # device, dtype
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_size)
        self.layers = [[torch.zeros(shape, **factory) for _ in "kv"] for _ in range(config.n_layer)]
        # with token shift: what the last token passes to the next one, in each sublayer
        n_states = 2 * config.n_layer * config.token_shift
        self.shift_state = torch.zeros(n_states, batch_size, 1, config.n_embd // 2, **factory)

    def clear(self) -> None:
        """Start a new text."""
        self.length = 0 * self.length  # a number or a tensor
        self.shift_state.zero_()

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Mask]:
        """Store the keys and values (B, K, T, D) of a layer. Returns all of them, (B, K, S, D), and
        the mask of the new tokens."""
        keys, values = self.layers[layer]
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end], None

    def swap_shift_state(self, sublayer: int, x: Tensor) -> Tensor:
        """Store what the last token passes on in a sublayer, (B, 1, C/2), and return what was
        stored there: zeros at the start of a text."""
        before = self.shift_state[sublayer].to(x.dtype, copy=True)
        self.shift_state[sublayer] = x
        return before


class AttentionContext(NamedTuple):
    """What all layers share in one forward pass."""

    rotation: Rotation = None
    visible: Mask = None  # (B, 1, T, S)
    cache: KVCache | None = None
    maps: list[Tensor] | None = None  # collects the attention weights


class Attention(nn.Module):
    """Causal self-attention in H heads (Vaswani et al. 2017). With fewer key/value heads, several
    query heads share one (grouped-query attention, Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # of queries, keys, values
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_size, bias=config.bias)
        width = config.n_head * config.head_size
        self.proj = ResidualProjection(width, config.n_embd, bias=config.bias)
        # Normalized queries and keys bound the scores at any learning rate (Henry et al. 2020).
        norm = NORMS[config.norm] if config.qk_norm else lambda config, size: nn.Identity()
        self.q_norm, self.k_norm = (norm(config, config.head_size) for _ in range(2))

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D) and 2 x (B, K, T, D)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())  # rotations need float32
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        visible = context.visible
        if context.cache is not None:
            k, v, visible = context.cache.append(self.layer, k, v)  # (B, K, S, D)
        if k.size(1) < q.size(1):
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        if context.maps is None:
            y = fused_attention(q, k, v, visible)  # (B, H, T, D)
        else:
            y, weights = plain_attention(q, k, v, visible)
            context.maps.append(weights)
        y = y.transpose(1, 2).reshape(B, T, -1).to(qkv.dtype)  # concatenate the heads: (B, T, H D)
        return self.proj(y)  # (B, T, C)


def shift_tokens(x: Tensor, first: Tensor, visible: Tensor | None = None) -> Tensor:
    """x (B, T, C) with the second half of its channels taken from the previous token, so that every
    layer sees pairs of tokens (token shift, Peng et al. 2023); zeros if that token is not visible.
    The first token receives `first` (B, 1, C/2)."""
    own, shifted = x.chunk(2, dim=-1)  # 2 x (B, T, C/2)
    shifted = torch.cat([first, shifted[:, :-1]], dim=1)
    if visible is not None:
        previous = visible[:, 0].diagonal(-1, dim1=1, dim2=2)  # (B, T - 1): may t + 1 attend to t?
        shifted = shifted * F.pad(previous, (1, 0))[..., None]
    return torch.cat([own, shifted], dim=-1)


# --- the model
class Block(nn.Module):
    """Attention mixes positions, the MLP transforms each one; both add to the residual stream x.

    Their inputs are normalized (pre-norm); with post_norm the sums are instead (Vaswani et al.
    2017), which is harder to train (Xiong et al. 2020). Dropout applies to what they add, not to
    attention weights: there, generating the random numbers took a third of a step on a CPU.
    """

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.norm1 = NORMS[config.norm](config, config.n_embd)
        self.attn = Attention(config, layer)
        self.norm2 = NORMS[config.norm](config, config.n_embd)
        self.mlp = MLPS[config.mlp](config)
        self.drop, self.layer = nn.Dropout(config.dropout), layer
        self.post_norm, self.token_shift = config.post_norm, config.token_shift

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        x = x + self.drop(self.attn(self.sublayer_input(x, 0, context), context))
        x = self.norm1(x) if self.post_norm else x
        x = x + self.drop(self.mlp(self.sublayer_input(x, 1, context)))
        return self.norm2(x) if self.post_norm else x

    def sublayer_input(self, x: Tensor, sublayer: int, context: AttentionContext) -> Tensor:
        """What attention (sublayer 0) or the MLP (sublayer 1) reads from the residual stream."""
        if not self.post_norm:
            x = self.norm2(x) if sublayer else self.norm1(x)
        if not self.token_shift:
            return x
        last = x[:, -1:, x.size(-1) // 2 :]  # (B, 1, C/2), for the token after these
        if context.cache is None:
            first = torch.zeros_like(last)
        else:
            first = context.cache.swap_shift_state(2 * self.layer + sublayer, last)
        return shift_tokens(x, first, context.visible)


class GPT(nn.Module):
    """Token ids in, a logit for every possible next token out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tok = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos = POSITIONS[config.pos](config)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.Identity() if config.post_norm else NORMS[config.norm](config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.grad_checkpoint = False  # recompute the blocks' activations (Chen et al. 2016)
        if config.tie_weights:  # one vector per token, for input and output (Press and Wolf 2017)
            self.head.weight = self.tok.weight
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Normal weights with standard deviation 0.02 and zero biases, as in GPT-2. Those of the 2
        n_layer projections to the residual stream are scaled by 1/sqrt(2 n_layer), so that the
        variance of the stream does not grow with depth (Radford et al. 2019)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = isinstance(module, ResidualProjection)
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
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
        loss_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) for token ids idx (B, T), and their loss if there are targets.

        The loss is the mean cross-entropy in nats against targets (B, T); targets of -100 are
        ignored. With docs (B, T), the number of each token's document, tokens attend within their
        document only. With a cache, idx continues the cached tokens and is appended to them, and
        the logits are those of the last position, (B, 1, V). If `maps` is an empty list, each layer
        appends its attention weights (B, H, T, S) to it (slower). With loss_only, the logits are
        empty: if compiled code returns them, it also computes a gradient of their size.
        """
        start, size = cache.length if cache else 0, self.config.block_size
        end = start + idx.size(1)
        if isinstance(end, int) and end > size:  # StaticCache's tensor would have to be read
            raise ValueError(f"{end} tokens do not fit the window of {size}")
        at = start + torch.arange(idx.size(1), device=idx.device)  # (T,)
        x, rotation = self.pos(self.tok(idx), at)  # (B, T, C)
        x = self.drop(x)
        visible = None if docs is None else document_mask(docs)
        context = AttentionContext(rotation, visible, cache, maps)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        if cache:
            cache.length += idx.size(1)
            x = x[:, -1:]  # (B, 1, C)
        logits = self.head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        return (logits.new_empty(0) if loss_only else logits), loss

    def num_params(self) -> int:
        """The number of parameters; tied weights count once."""
        return sum(p.numel() for p in self.parameters())
