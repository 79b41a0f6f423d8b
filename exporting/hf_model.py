"""Convert the settings and weights of models to and from Hugging Face's names and shapes.

`ours` is a name or value of this project and `theirs` the corresponding one of Hugging Face.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from config import ARCH_FIELDS, ARCHS, GPTConfig, UserError, all_problems, raise_problems

# --- architectures

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def matching_arch(config: GPTConfig) -> str:
    """The name of the architecture that has the model's components; weights may be tied or not.
    Raises UserError if there is none, with the differences from the nearest one."""
    differences = {
        name: [f for f in ARCH_FIELDS if f != "tie_weights" and getattr(config, f) != arch[f]]
        for name, arch in ARCHS.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        found = ", ".join(
            f"{f} is {getattr(config, f)} and not {ARCHS[nearest][f]}" for f in differences[nearest]
        )
        raise UserError(
            f"no Hugging Face architecture has these components; {nearest} is nearest, but {found} "
            f"(train with --arch {nearest})"
        )
    usual_heads = (config.n_head, config.n_embd // config.n_head)
    if nearest == "gpt2" and (config.n_kv_head, config.head_size) != usual_heads:
        raise UserError("GPT-2 has no grouped-query attention (n_kv_head) and no other head_size")
    return nearest


# --- names of tensors

# Our module -> theirs. Several of theirs are concatenated along the first dimension in ours.
GPT2_MODULES = {
    "tok": ["transformer.wte"],
    "pos.table": ["transformer.wpe"],
    "norm": ["transformer.ln_f"],
    "blocks.{i}.norm1": ["transformer.h.{i}.ln_1"],
    "blocks.{i}.attn.qkv": ["transformer.h.{i}.attn.c_attn"],
    "blocks.{i}.attn.proj": ["transformer.h.{i}.attn.c_proj"],
    "blocks.{i}.norm2": ["transformer.h.{i}.ln_2"],
    "blocks.{i}.mlp.fc": ["transformer.h.{i}.mlp.c_fc"],
    "blocks.{i}.mlp.proj": ["transformer.h.{i}.mlp.c_proj"],
}
LLAMA_MODULES = {
    "tok": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "blocks.{i}.norm1": ["model.layers.{i}.input_layernorm"],
    "blocks.{i}.attn.qkv": [
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ],
    "blocks.{i}.attn.proj": ["model.layers.{i}.self_attn.o_proj"],
    "blocks.{i}.norm2": ["model.layers.{i}.post_attention_layernorm"],
    "blocks.{i}.mlp.fc": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
    "blocks.{i}.mlp.proj": ["model.layers.{i}.mlp.down_proj"],
}
QWEN3_MODULES = LLAMA_MODULES | {
    "blocks.{i}.attn.q_norm": ["model.layers.{i}.self_attn.q_norm"],
    "blocks.{i}.attn.k_norm": ["model.layers.{i}.self_attn.k_norm"],
}
MODULES = {"gpt2": GPT2_MODULES, "llama": LLAMA_MODULES, "qwen3": QWEN3_MODULES}
EMBEDDINGS = ("tok", "pos.table")  # the modules without biases


def tensor_names(config: GPTConfig, arch: str) -> Iterator[tuple[str, list[str]]]:
    """Our name of each tensor, and their names of the tensors that it concatenates."""
    for our_module, their_modules in MODULES[arch].items():
        kinds = ("weight", "bias") if config.bias and our_module not in EMBEDDINGS else ("weight",)
        for i in range(config.n_layer if "{i}" in our_module else 1):
            for kind in kinds:
                ours = f"{our_module}.{kind}".format(i=i)
                yield ours, [f"{module}.{kind}".format(i=i) for module in their_modules]
    if not config.tie_weights:
        yield "head.weight", ["lm_head.weight"]


def is_transposed(ours: str, arch: str) -> bool:
    """Whether their matrix is the transpose of ours: GPT-2's linear layers store (in, out)."""
    return arch == "gpt2" and ours.endswith(("qkv.weight", "proj.weight", "fc.weight"))


def split_sizes(config: GPTConfig, ours: str) -> list[int]:
    """The numbers of rows of the matrices that ours concatenates: of queries, keys and values, or
    of SwiGLU's gate and up-projection."""
    if "qkv" in ours:
        return [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    return [config.n_inner, config.n_inner]


def weights_to_hf(state: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Our weights with their names and shapes."""
    converted: dict[str, Tensor] = {}
    for ours, theirs in tensor_names(config, arch):
        tensor = state[ours].T if is_transposed(ours, arch) else state[ours]
        tensors = tensor.split(split_sizes(config, ours)) if len(theirs) > 1 else (tensor,)
        converted |= {name: t.contiguous() for name, t in zip(theirs, tensors, strict=True)}
    return converted


def weights_from_hf(tensors: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Their weights with our names and shapes, in float32. Raises UserError if one is missing."""
    prefixes = ("transformer.", "model.", "lm_head.")  # the file of OpenAI's GPT-2 has none
    tensors = {
        name if name.startswith(prefixes) else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
    }
    state = {}
    for ours, theirs in tensor_names(config, arch):
        if missing := [name for name in theirs if name not in tensors]:
            raise UserError(f"the model to import has no tensor {missing[0]}")
        tensor = torch.cat([tensors[name].float() for name in theirs])
        state[ours] = (tensor.T if is_transposed(ours, arch) else tensor).contiguous()
    state.setdefault("head.weight", state["tok.weight"])
    return state


# --- config.json

# The values that our architectures implement; a config.json without the key has the same value.
SUPPORTED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "activation_function": "gelu_new",
    "rope_type": "default",
    "use_sliding_window": False,
    "scale_attn_by_inverse_layer_idx": False,
}
QWEN3_HEAD_SIZE = 128  # the default of Qwen3Config; Llama's is hidden_size / num_attention_heads


def config_to_hf(config: GPTConfig, arch: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of a model's config.json; token_ids are those of `special_token_ids`."""
    common = {
        "model_type": arch,
        "architectures": [CLASSES[arch]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "torch_dtype": "float32",
        "use_cache": True,
        **token_ids,
    }
    if arch == "gpt2":
        return common | {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.n_inner,
            "n_positions": config.block_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
    return common | {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def config_from_hf(theirs: dict[str, Any]) -> tuple[GPTConfig, str]:
    """Our settings for the content of a config.json, and the architecture's name. Raises UserError
    if it asks for something that our architectures do not have."""
    arch = theirs.get("model_type")
    if arch not in ARCHS:
        raise UserError(f"model_type {arch!r} is not supported: only {', '.join(ARCHS)} are")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    values = theirs | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    raise_problems(
        [
            f"{key} is {values[key]!r}, and only {supported!r} is supported"
            for key, supported in SUPPORTED.items()
            if values.get(key, supported) != supported
        ]
    )
    sizes = gpt2_sizes(theirs) if arch == "gpt2" else llama_sizes(theirs, arch, rope)
    config = GPTConfig(**(ARCHS[arch] | {"vocab_size": theirs["vocab_size"]} | sizes))
    raise_problems(all_problems(config))
    return config, arch


def gpt2_sizes(theirs: dict[str, Any]) -> dict[str, Any]:
    """Our settings for GPT-2's config.json, in which any may be missing; its defaults are those of
    the smallest model."""
    return {
        "n_layer": theirs.get("n_layer", 12),
        "n_head": theirs.get("n_head", 12),
        "n_embd": theirs.get("n_embd", 768),
        "n_inner": theirs.get("n_inner") or 4 * theirs.get("n_embd", 768),
        "block_size": theirs.get("n_positions", 1024),
        "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
        "tie_weights": theirs.get("tie_word_embeddings", True),
    }


def llama_sizes(theirs: dict[str, Any], arch: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Our settings for the config.json of Llama or Qwen3, whose RoPE settings are `rope`."""
    n_head = theirs["num_attention_heads"]
    usual_size = QWEN3_HEAD_SIZE if arch == "qwen3" else theirs["hidden_size"] // n_head
    return {
        "n_layer": theirs["num_hidden_layers"],
        "n_head": n_head,
        "n_kv_head": theirs.get("num_key_value_heads") or n_head,
        "head_size": theirs.get("head_dim") or usual_size,
        "n_embd": theirs["hidden_size"],
        "n_inner": theirs["intermediate_size"],
        "block_size": theirs["max_position_embeddings"],
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta") or theirs.get("rope_theta", 10000.0)),
        "tie_weights": theirs.get("tie_word_embeddings", False),
    }
