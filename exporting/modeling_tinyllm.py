"""The model for Hugging Face's `transformers`: a wrapper around the GPT of model.py.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

TinyLLM's export.py copies this file and model.py to the folder of a model that no architecture of
`transformers` can represent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GPT, AttentionContext, KVCache, RotaryPositions, SinusoidalPositions, causal_mask

# transformers 5.24 renamed past_key_values to cache. generate() passes and expects its own name.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


class TinyLLMConfig(PreTrainedConfig):
    """The settings of the model: config.json has one entry for each, with the names of model.py."""

    model_type = "tinyllm"
    attribute_map = {  # noqa: RUF012 (the base class expects a dict)
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "num_key_value_heads": "n_kv_head",
        "tie_word_embeddings": "tie_weights",
    }


class TinyLLMCache(KVCache):
    """The KV cache, with what generate() needs. It only grows: it cannot be cropped."""

    is_compileable = is_croppable = False
    is_linear = (False,)  # no linear attention
    visible: Tensor | None = None  # (B, 1, T, S), of the tokens that are read: without padding

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend to the tokens of the mask."""
        return *super().append(layer, k, v)[:2], self.visible

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of cached tokens."""
        return int(self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search continues these rows of the batch."""
        self.layers = [[x[beam_idx] for x in layer] for layer in self.layers]
        self.shift_state = self.shift_state[:, beam_idx]


class TinyLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The GPT with the interface of transformers."""

    config_class = TinyLLMConfig
    _tied_weights_keys = {"gpt.head.weight": "gpt.tok.weight"}  # noqa: RUF012 (if tie_weights)
    _keep_in_fp32_modules_strict = ["q_norm", "k_norm"]  # noqa: RUF012 (their inputs are float32)
    _no_split_modules = ["GPT"]  # noqa: RUF012 (the cache is on one device)
    _is_stateful = True  # no assisted generation, which would crop the cache
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, config: TinyLLMConfig):
        super().__init__(config)
        self.gpt = GPT(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.tok

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.gpt.tok = value

    def get_output_embeddings(self) -> nn.Module:
        return self.gpt.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.gpt.head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Called for each module with values that the folder does not have."""
        self.gpt.init_weights(module)
        if module is self.gpt.pos:
            self.compute_tables()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TinyLLMForCausalLM":
        """Called by .to(), .half(), .bfloat16(): what computes in float32 remains float32."""
        names = self._keep_in_fp32_modules_strict
        before = {n: p.data for n, p in self.named_parameters() if any(name in n for name in names)}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters():
            if name in before and p.dtype != before[name].dtype:
                p.data = before[name].to(p.device)
        self.compute_tables()
        return self

    def compute_tables(self) -> None:
        """Compute the sines and cosines of positions, which are not saved."""
        pos = self.gpt.pos
        if isinstance(pos, RotaryPositions | SinusoidalPositions):
            for name, table in type(pos)(self.config).named_buffers():
                setattr(pos, name, table.to(self.gpt.tok.weight.device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> Any:
        """Logits (B, T, V) for token ids (B, T) or embeddings (B, T, C), and with labels the mean
        loss of predicting labels[:, t + 1] at position t; labels of -100 are ignored.

        With use_cache, the result has a cache, which the next call takes as cache or as
        past_key_values. Positions count the tokens that are not padding, unless position_ids (B, T)
        are given. Raises ValueError for more tokens than the window has, padding between tokens,
        with a cache also after them, and for other arguments than None and False.
        """
        others.pop("cache_position", None)  # of transformers 5.0: the cache counts its tokens
        sizes = {"num_items_in_batch": others.pop("num_items_in_batch", None)}
        if names := [k for k, v in others.items() if v is not None and v is not False]:
            raise ValueError(f"this model does not support {', '.join(names)}")
        gpt, size = self.gpt, self.config.block_size
        x = gpt.tok(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        checkpointing = self.gradient_checkpointing and self.training
        cache = past_key_values if cache is None else cache
        use_cache = cache is not None if use_cache is None else use_cache
        cache = self.own_cache(cache, x) if use_cache and not checkpointing else None
        start = cache.get_seq_length() if cache else 0
        n = start + x.size(1)
        if n > size or (position_ids is not None and position_ids.max() >= size):
            raise ValueError(
                f"{n} tokens do not fit the window of {size}: shorten the prompt, or generate "
                f"fewer tokens (max_length={size} ends at the window)"
            )
        visible, at = None, torch.arange(start, n, device=x.device)[None]  # (1, T)
        if attention_mask is not None and not attention_mask.all():
            visible, at = read_mask(attention_mask, start, n, cached=cache is not None)
        at = at if position_ids is None else position_ids  # (B, T)
        x, rotation = gpt.pos(x, at[:, None] if isinstance(gpt.pos, RotaryPositions) else at)
        x = gpt.drop(x)
        maps: list[Tensor] | None = [] if output_attentions else None
        # Padding passes nothing on to the next token, but what was cached does.
        context = AttentionContext(rotation, None if start else visible, cache, maps)
        if cache:
            cache.visible = visible
        states = self.hidden_states(x, context, checkpointing)
        x = gpt.norm(states.pop())
        if cache:
            cache.length = n
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = gpt.head(x[:, kept])  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **sizes)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        output.attentions = None if maps is None else tuple(maps)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states:
            output.hidden_states = (*states, x)
        return output.to_tuple() if return_dict is False else output

    def hidden_states(
        self, x: Tensor, context: AttentionContext, checkpointing: bool
    ) -> list[Tensor]:
        """The input of each block, and the output of the last one, (B, T, C) each."""
        states = [x]
        for block in self.gpt.blocks:
            if checkpointing:
                x = self._gradient_checkpointing_func(block.__call__, x, context)
            else:
                x = block(x, context)
            states.append(x)
        return states

    def own_cache(self, cache: Any, x: Tensor) -> TinyLLMCache:
        """The cache to continue; a new one instead of none, or of the empty one of generate()."""
        if isinstance(cache, TinyLLMCache):
            return cache
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("the cache must be the cache that an earlier call returned")
        dtype = torch.float32 if x.device.type == "cpu" else self.dtype
        return TinyLLMCache(self.config, len(x), device=x.device, dtype=dtype)


def read_mask(mask: Tensor, start: int, n: int, cached: bool) -> tuple[Tensor, Tensor]:
    """Where the tokens from `start` on may attend, (B, 1, T, n), and their positions (B, T), for an
    attention_mask (B, n) that is 0 for padding."""
    if mask.dim() != 2 or mask.size(1) != n:
        raise ValueError(
            f"attention_mask must be (B, {n}): all tokens; cache_implementation is not supported"
        )
    keys = mask.bool()
    begins = torch.cat([keys[:, :1], keys[:, 1:] & ~keys[:, :-1]], dim=1).sum(dim=1)  # (B,)
    if begins.max() > 1 or (cached and not keys[:, -1].all()):
        raise ValueError("padding must be before the tokens, or without a cache after them")
    visible = causal_mask(n - start, n, mask.device) & keys[:, None, None]  # (B, 1, T, n)
    # A row must not be empty, so padding attends to itself.
    visible |= torch.eye(n, dtype=torch.bool, device=mask.device)[start:]
    return visible, (keys.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
