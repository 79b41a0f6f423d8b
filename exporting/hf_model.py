"""Convert the settings and weights of models to and from Hugging Face's names and shapes.

`ours` is a name or value of this project and `theirs` the corresponding one of Hugging Face.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from config import ARCH_FIELDS, ARCHS, GPTConfig
from model import GPT
from system.settings import UserError, all_problems, raise_problems

# --- architectures

CUSTOM = "tinyllm"  # any other model: the folder contains its code, modeling_tinyllm.py
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSES[CUSTOM] = "TinyLLMForCausalLM"


def arch_or_custom(config: GPTConfig) -> str:
    """The name of the architecture that has the model's components, or CUSTOM."""
    try:
        return matching_arch(config)
    except UserError:
        return CUSTOM


def matching_arch(config: GPTConfig) -> str:
    """The name of the architecture that has the model's components; weights may be tied or not.
    Raises UserError if there is none, with the differences from the nearest one. A setting that an
    architecture is not known to represent is a difference."""
    differences: dict[str, list[str]] = {}
    for name, arch in ARCHS.items():
        sizes = {ours for _, ours, _ in SIZES[name]} | {"n_kv_head", "head_size", "rope_theta"}
        unlike = [f for f in ARCH_FIELDS if f != "tie_weights" and getattr(config, f) != arch[f]]
        differences[name] = [f"{f} is {getattr(config, f)} and not {arch[f]}" for f in unlike]
        differences[name] += [f"it has no {f}" for f in config.beyond({*ARCH_FIELDS, *sizes})]
    n_embd, n_head = config.n_embd, config.n_head
    if (config.n_kv_head, config.head_size) != (n_head, n_embd // n_head):
        differences["gpt2"].append("it has no n_kv_head and no head_size")
    if n_embd % n_head:
        differences["llama"].append(f"n_embd {n_embd} is not divisible by n_head {n_head}")
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        raise UserError(
            f"no standard architecture has these components; {nearest} is nearest, but "
            f"{', '.join(differences[nearest])} (train one that can be exported: "
            f"python train.py --arch {nearest} --tag {nearest}, with --preset or --minutes too)"
        )
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
        "model.layers.{i}.self_attn." + name for name in ("q_proj", "k_proj", "v_proj")
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
    if arch == CUSTOM:
        with torch.device("meta"):  # takes no memory
            model = GPT(replace(config, n_layer=1))
        for name, _ in model.named_parameters():  # tied weights once
            for i in range(config.n_layer if name.startswith("blocks.0.") else 1):
                ours = name.replace("blocks.0.", f"blocks.{i}.", 1)
                yield ours, [f"gpt.{ours}"]
        return
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


def split_rows(x: Tensor, config: GPTConfig, ours: str, theirs: list[str]) -> dict[str, Tensor]:
    """The tensors, by their names, that ours concatenates."""
    if len(theirs) == 1:
        return {theirs[0]: x}
    if "qkv" in ours:
        sizes = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    else:  # SwiGLU's gate and up-projection
        sizes = [config.n_inner, config.n_inner]
    return dict(zip(theirs, x.split(sizes), strict=True))


def weights_to_hf(state: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Our weights with their names and shapes."""
    converted: dict[str, Tensor] = {}
    for ours, theirs in tensor_names(config, arch):
        tensor = state[ours].T if is_transposed(ours, arch) else state[ours]
        parts = split_rows(tensor, config, ours, theirs)
        converted |= {name: part.contiguous() for name, part in parts.items()}
    return converted


# Buffers that old versions saved: GPT-2's causal masks, Llama's RoPE frequencies.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias|model\..*rotary_emb\.inv_freq")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights_from_hf(tensors: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Their weights with our names and shapes, in float32. Raises UserError if one is missing, not
    one of the model, of another shape, or contains other values than finite numbers."""
    for _, names in tensor_names(config, arch):
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"the model to import has no tensor {missing[0]}")
    with torch.device("meta"):  # takes no memory, whatever sizes the settings claim
        expected = weights_to_hf(GPT(config).state_dict(), config, arch)
    for name, tensor in tensors.items():
        if name not in expected and name != "lm_head.weight" and not BUFFERS.fullmatch(name):
            raise UserError(f"the model to import has a tensor that {arch} does not have: {name}")
        if name in expected and tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)} instead of {list(expected[name].shape)}"
            raise UserError(f"the weights do not match config.json: {name} has shape {shapes}")
        if name in expected and not (tensor.dtype in FLOATS and tensor.isfinite().all()):
            raise UserError(f"{name} contains values that are not finite numbers")
    state = {}
    for ours, theirs in tensor_names(config, arch):
        tensor = torch.cat([tensors[name].float() for name in theirs])
        state[ours] = (tensor.T if is_transposed(ours, arch) else tensor).contiguous()
    embedding = state["tok.weight"]
    head = tensors.get("lm_head.weight", embedding).float()
    if config.tie_weights and not torch.equal(head, embedding):
        raise UserError("lm_head.weight differs from the embedding, although they are tied")
    return {"head.weight": embedding} | state


# --- config.json

# Their name, our name, and the default of their config class, which a missing key stands for. Where
# the default is None, GPTConfig's holds, which is the same; null always means the same there.
SIZES: dict[str, tuple[tuple[str, str, Any], ...]] = {
    "gpt2": (
        ("vocab_size", "vocab_size", 50257),
        ("n_positions", "block_size", 1024),
        ("n_layer", "n_layer", 12),
        ("n_head", "n_head", 12),
        ("n_embd", "n_embd", 768),
        ("n_inner", "n_inner", None),
        ("layer_norm_epsilon", "norm_eps", 1e-5),
        ("tie_word_embeddings", "tie_weights", True),
    ),
    "llama": (
        ("vocab_size", "vocab_size", 32000),
        ("max_position_embeddings", "block_size", 2048),
        ("num_hidden_layers", "n_layer", 32),
        ("num_attention_heads", "n_head", 32),
        ("num_key_value_heads", "n_kv_head", None),
        ("head_dim", "head_size", None),
        ("hidden_size", "n_embd", 4096),
        ("intermediate_size", "n_inner", 11008),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ("tie_word_embeddings", "tie_weights", False),
    ),
}
QWEN3_DEFAULTS = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "intermediate_size": 22016,
}
SIZES["qwen3"] = tuple((n, ours, QWEN3_DEFAULTS.get(n, d)) for n, ours, d in SIZES["llama"])
MAX_SIZE = 1 << 22  # 4 million: the longest window of any published model

# The values that our architectures implement, of the settings that change what a model computes. A
# missing key has the first of them. (pretraining_tp and reorder_and_upcast_attn only change the
# order of the same operations, and dropout does not apply to a trained model.)
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # gpt2; two names of one function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("silu", "swish"),  # llama and qwen3
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1),
    "sliding_window": (None,),
    "use_sliding_window": (False,),  # qwen3 ignores sliding_window without it
    "is_causal": (True,),  # all architectures
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
}


def config_to_hf(config: GPTConfig, arch: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of a model's config.json; token_ids are those of `special_token_ids`."""
    common: dict[str, Any] = {"model_type": arch, "architectures": [CLASSES[arch]]}
    common |= {"torch_dtype": "float32", **token_ids}
    if arch == CUSTOM:
        classes = {"AutoConfig": "TinyLLMConfig", "AutoModelForCausalLM": CLASSES[CUSTOM]}
        auto_map = {key: f"modeling_tinyllm.{name}" for key, name in classes.items()}
        return common | {"auto_map": auto_map} | asdict(config)
    common |= {theirs: getattr(config, ours) for theirs, ours, _ in SIZES[arch]}
    common |= {"use_cache": True}
    if arch == "gpt2":
        return common | {
            "activation_function": "gelu_new",
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
    return common | {
        "hidden_act": "silu",
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
    if not isinstance(arch, str) or arch not in (*ARCHS, CUSTOM):
        raise UserError(f"model_type {arch!r} is not supported: only {', '.join(ARCHS)} are")
    unused = "sliding_window" if arch == "qwen3" else ""
    problems = [
        f"{key} is {theirs[key]!r}, and only {supported[0]!r} is supported"
        for key, supported in FIXED.items()
        if key in theirs and key != unused and theirs[key] not in supported
    ]
    settings = dict(ARCHS.get(arch, {}))
    for name, ours, default in SIZES.get(arch, ()):
        value = theirs.get(name, default)
        if value is None and (default is None or name == "num_key_value_heads"):
            continue
        settings[ours] = value
        problems += number_problems(name, value, type(default) if default is not None else int)
    if arch == CUSTOM:
        for f in fields(GPTConfig):
            if f.name not in theirs:
                problems.append(f"{f.name} is missing")
            elif f.type is int:
                problems += number_problems(f.name, theirs[f.name], int, low=0)
            settings[f.name] = theirs.get(f.name)
    elif arch == "gpt2":
        # Two names of one setting. If other sizes differ, the weights have other shapes.
        if theirs.get("num_attention_heads", settings["n_head"]) != settings["n_head"]:
            problems.append("num_attention_heads and n_head mean the same and differ")
    else:
        settings["rope_theta"] = rope_theta_from_hf(theirs)
    layer_types = theirs.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        problems.append("layer_types has others than 'full_attention', which is not supported")
    raise_problems(problems)
    if arch == "gpt2":
        settings.setdefault("n_inner", 4 * settings["n_embd"])
    if settings["n_head"] * settings.get("head_size", 1) > MAX_SIZE:
        raise UserError("the number of attention heads x their size is too large")
    config = GPTConfig(**settings)
    raise_problems(all_problems(config))
    return config, arch


def number_problems(name: str, value: Any, kind: type, low: int = 1) -> list[str]:
    """What is wrong with the value of a size, an epsilon, a base frequency or a switch."""
    if kind is bool:
        return [] if type(value) is bool else [f"{name} must be true or false, not {value!r}"]
    if kind is float:
        valid = type(value) in (int, float) and 0 < value < 1e30
        return [] if valid else [f"{name} must be a positive number, not {value!r:.50}"]
    valid = type(value) is int and low <= value <= MAX_SIZE
    return [] if valid else [f"{name} must be a number from {low} to {MAX_SIZE}, not {value!r:.50}"]


def rope_theta_from_hf(theirs: dict[str, Any]) -> float:
    """RoPE's base frequency. Raises UserError for every type but the default one. It is in
    rope_parameters since transformers 5; before, rope_theta and rope_scaling were separate."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters must be an object, not {rope!r:.50}")
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    supported = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
    supported |= {"rope_theta": theirs.get("rope_theta", theta)}
    problems = [
        f"{key} in rope_parameters is {value!r:.50}, which is not supported"
        for key, value in rope.items()
        if key not in supported or value != supported[key]
    ]
    raise_problems(problems + number_problems("rope_theta", theta, float))
    return float(theta)
