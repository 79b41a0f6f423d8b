"""The model for Hugging Face's `transformers`: a wrapper around the GPT of model.py.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

TinyLLM's export.py copies this file and model.py to the folder of a model that no architecture of
`transformers` can represent.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GPT, KVCache, RotaryPositions, SinusoidalPositions

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
    accepts_loss_kwargs = False  # the loss is always the mean over the batch

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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> Any:
        """Logits (B, T, V) for token ids (B, T), and with labels the mean loss of predicting
        labels[:, t + 1] at position t; labels of -100 are ignored.

        With use_cache, the result has a cache, which the next call takes as cache or as
        past_key_values, and the logits are those of the last token, (B, 1, V). Raises ValueError
        for more tokens than the window has, for padding before or between tokens, with a cache
        for any padding, and for other arguments than None and False.
        """
        others.pop("cache_position", None)  # of transformers 5.0: the cache counts its tokens
        if names := [k for k, v in others.items() if v is not None and v is not False]:
            raise ValueError(f"this model does not support {', '.join(names)}")
        cache = past_key_values if cache is None else cache
        use_cache = cache is not None if use_cache is None else use_cache
        cache = self.own_cache(cache, input_ids) if use_cache and labels is None else None
        check_mask(attention_mask, cached=cache is not None)
        n, size = input_ids.size(1) + (cache.length if cache else 0), self.config.block_size
        if n > size:
            raise ValueError(
                f"{n} tokens do not fit the window of {size}: shorten the prompt, or generate "
                f"fewer tokens (max_length={size} ends at the window)"
            )
        targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, T)
        maps: list[Tensor] | None = [] if output_attentions else None
        logits, loss = self.gpt(input_ids, targets, cache=cache, maps=maps)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        output.attentions = None if maps is None else tuple(maps)
        return output.to_tuple() if return_dict is False else output

    def own_cache(self, cache: Any, input_ids: Tensor) -> TinyLLMCache:
        """The cache to continue; a new one instead of none, or of the empty one of generate()."""
        if isinstance(cache, TinyLLMCache):
            return cache
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("the cache must be the cache that an earlier call returned")
        dtype = torch.float32 if input_ids.device.type == "cpu" else self.dtype
        return TinyLLMCache(self.config, len(input_ids), device=input_ids.device, dtype=dtype)


def check_mask(attention_mask: Tensor | None, cached: bool) -> None:
    """Raise ValueError for padding that this model does not support. Padding after a text changes
    nothing, because attention is causal; before it, it would change the positions."""
    if attention_mask is None:
        return
    if attention_mask.dim() != 2:
        raise ValueError("attention_mask must be (B, T); cache_implementation is not supported")
    mask = attention_mask.bool()
    if cached and not mask.all():
        raise ValueError(
            "generation does not support padding: all texts of a batch need the same number of "
            "tokens, or generate one text at a time"
        )
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("only padding on the right is supported")
