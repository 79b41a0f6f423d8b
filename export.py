"""To and from Hugging Face's format.

    python export.py checkpoints/best.pt out/              a folder that `transformers` loads
    python export.py checkpoints/best.pt out/ --push user/name      and uploads
    python export.py --from gpt2 checkpoints/gpt2.pt       a GPT-2, Llama or Qwen3 from the hub, or
    python export.py --from folder/ checkpoints/mine.pt    from a folder, as a checkpoint of ours
    python export.py checkpoints/qa/adapter.pt out/        an adapter, as `peft` loads it

The exported folder loads with AutoModelForCausalLM and AutoTokenizer, without code of ours. Needs
`pip install safetensors`, for the hub also `huggingface_hub`.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora
import utils
from config import (
    ARCH_FIELDS,
    ARCHS,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    from_dict,
    limit_problems,
    parse_flags,
    raise_problems,
    run,
    setting,
)
from generate import sample_text
from model import GPT
from tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    INVISIBLE,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    visible,
)

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass
class ExportConfig:
    """What goes where."""

    paths: tuple[str, ...] = setting((), "checkpoint and folder; with --from the checkpoint only")
    source: str = setting("", "a hub name or a folder in Hugging Face's format, to import")
    push: str = setting("", "user/name: upload the exported folder to the hub")
    overwrite: bool = setting(False, "replace what is there")


# --- names: ours against Hugging Face's


def arch_of(config: GPTConfig) -> str:
    """The architecture whose parts the model has; tied weights are free. Raises UserError, which
    names the parts that differ from the nearest one."""
    differing = {
        name: [p for p in ARCH_FIELDS if p != "tie_weights" and getattr(config, p) != arch[p]]
        for name, arch in ARCHS.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    if differing[nearest]:
        parts = ", ".join(
            f"{p} is {getattr(config, p)} and not {ARCHS[nearest][p]}" for p in differing[nearest]
        )
        raise UserError(
            f"no architecture of Hugging Face's has these parts; {nearest} is nearest, but {parts} "
            f"(train with --arch {nearest})"
        )
    if nearest == "gpt2" and (config.n_kv_head, config.head_size) != (
        config.n_head,
        config.n_embd // config.n_head,
    ):
        raise UserError("GPT-2 has no shared keys and values (n_kv_head) and no other head_size")
    return nearest


def tensor_names(config: GPTConfig, arch: str) -> Iterator[tuple[str, list[str]]]:
    """Our name of each tensor, and Hugging Face's of those that stand below each other in it."""
    if arch == "gpt2":
        outer = {"tok": "wte", "pos.table": "wpe", "norm": "ln_f"}
        inner = {"norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj"}
        inner |= {"norm2": "ln_2", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
        for ours, theirs in outer.items():
            for kind in ("weight", "bias") if ours == "norm" else ("weight",):
                yield f"{ours}.{kind}", [f"transformer.{theirs}.{kind}"]
        for i in range(config.n_layer):
            for ours, theirs in inner.items():
                for kind in ("weight", "bias"):
                    yield f"blocks.{i}.{ours}.{kind}", [f"transformer.h.{i}.{theirs}.{kind}"]
    else:
        yield "tok.weight", ["model.embed_tokens.weight"]
        yield "norm.weight", ["model.norm.weight"]
        inner_lists = {
            "norm1": ["input_layernorm"],
            "attn.qkv": [f"self_attn.{part}_proj" for part in "qkv"],
            "attn.proj": ["self_attn.o_proj"],
            "norm2": ["post_attention_layernorm"],
            "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.proj": ["mlp.down_proj"],
        }
        if config.qk_norm:
            inner_lists |= {f"attn.{part}_norm": [f"self_attn.{part}_norm"] for part in "qk"}
        for i in range(config.n_layer):
            for ours, parts in inner_lists.items():
                theirs_all = [f"model.layers.{i}.{part}.weight" for part in parts]
                yield f"blocks.{i}.{ours}.weight", theirs_all
    if not config.tie_weights:
        yield "head.weight", ["lm_head.weight"]


def transposed(ours: str, arch: str) -> bool:
    """Whether Hugging Face keeps a matrix the other way round: GPT-2's linear layers are (in,
    out)."""
    return arch == "gpt2" and ours.endswith(("qkv.weight", "proj.weight", "fc.weight"))


def part_sizes(config: GPTConfig, ours: str) -> list[int]:
    """The heights of the matrices that stand below each other in one of ours."""
    if "qkv" in ours:
        return [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    return [config.n_inner, config.n_inner]


def to_hf(state: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names."""
    found = {}
    for ours, theirs in tensor_names(config, arch):
        tensor = state[ours].T if transposed(ours, arch) else state[ours]
        parts = tensor.split(part_sizes(config, ours)) if len(theirs) > 1 else [tensor]
        found |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return found


def from_hf(tensors: dict[str, Tensor], config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """Hugging Face's weights under our names, in float32. Raises UserError where one is missing."""
    tensors = {  # GPT-2's own file has no prefix
        name
        if name.startswith(("transformer.", "model.", "lm_head."))
        else f"transformer.{name}": t
        for name, t in tensors.items()
    }
    state = {}
    for ours, theirs in tensor_names(config, arch):
        if missing := [name for name in theirs if name not in tensors]:
            raise UserError(f"the model to import has no {missing[0]}")
        tensor = torch.cat([tensors[name].float() for name in theirs])
        state[ours] = (tensor.T if transposed(ours, arch) else tensor).contiguous()
    state.setdefault("head.weight", state["tok.weight"])
    return state


def hf_config(config: GPTConfig, arch: str, ids: dict[str, int | None]) -> dict[str, Any]:
    """The config.json of a model."""
    common = {
        "model_type": arch,
        "architectures": [CLASSES[arch]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "torch_dtype": "float32",
        "use_cache": True,
        **ids,
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


def our_config(theirs: dict[str, Any]) -> tuple[GPTConfig, str]:
    """Our settings for a config.json, and the architecture. Raises UserError, which names what we
    do not have."""
    arch = theirs.get("model_type")
    if arch not in ARCHS:
        raise UserError(f"model_type {arch!r} is none of {', '.join(ARCHS)}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    wanted = {
        "attention_bias": (theirs.get("attention_bias", False), False),
        "mlp_bias": (theirs.get("mlp_bias", False), False),
        "hidden_act": (theirs.get("hidden_act", "silu"), "silu"),
        "activation_function": (theirs.get("activation_function", "gelu_new"), "gelu_new"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "use_sliding_window": (theirs.get("use_sliding_window", False), False),
        "scale_attn_by_inverse_layer_idx": (
            theirs.get("scale_attn_by_inverse_layer_idx", False),
            False,
        ),
    }
    raise_problems(
        [f"{key} is {value!r}, and we have {ours!r} only"
         for key, (value, ours) in wanted.items() if value != ours]
    )  # fmt: skip
    parts = ARCHS[arch] | {"vocab_size": theirs["vocab_size"]}
    if arch == "gpt2":
        sizes = {
            "n_layer": theirs.get("n_layer", 12),
            "n_head": theirs.get("n_head", 12),
            "n_embd": theirs.get("n_embd", 768),
            "n_inner": theirs.get("n_inner") or 4 * theirs.get("n_embd", 768),
            "block_size": theirs.get("n_positions", 1024),
            "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
            "tie_weights": theirs.get("tie_word_embeddings", True),
        }
    else:
        n_head = theirs["num_attention_heads"]
        sizes = {
            "n_layer": theirs["num_hidden_layers"],
            "n_head": n_head,
            "n_kv_head": theirs.get("num_key_value_heads") or n_head,
            "head_size": theirs.get("head_dim")
            or (128 if arch == "qwen3" else theirs["hidden_size"] // n_head),
            "n_embd": theirs["hidden_size"],
            "n_inner": theirs["intermediate_size"],
            "block_size": theirs["max_position_embeddings"],
            "norm_eps": theirs.get("rms_norm_eps", 1e-6),
            "rope_theta": float(rope.get("rope_theta") or theirs.get("rope_theta", 10000.0)),
            "tie_weights": theirs.get("tie_word_embeddings", False),
        }
    config = GPTConfig(**(parts | sizes))
    raise_problems(config.problems())
    return config, arch


# --- tokenizers


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer, in the format of the `tokenizers` library."""
    added = [
        {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for text, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])
    ]  # fmt: skip
    shared = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "post_processor": None,
    }

    def split(pattern: str) -> dict[str, Any]:
        rule = {"Regex": pattern}
        return {"type": "Split", "pattern": rule, "behavior": "Isolated", "invert": False}

    if isinstance(tokenizer, CharTokenizer):
        vocab = {text: i for i, text in enumerate(tokenizer.texts)}
        unknown = "<UNK>" if "<UNK>" in tokenizer.specials else tokenizer.chars[0]
        return shared | {
            "pre_tokenizer": split(r"[\s\S]"),
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unknown},
        }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    vocab = {visible(token): i for token, i in tokenizer.ranks.items()}
    merges = [[visible(part) for part in pair] for pair in merges_of(tokenizer)]
    return shared | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(tokenizer.pattern), level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
        },
    }


def merges_of(tokenizer: BPETokenizer) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in order: what the tokens before it make of it."""
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        word = [bytes([b]) for b in token]
        while len(word) > 2:
            joined = [a + b for a, b in pairwise(word)]
            ranks = [tokenizer.ranks.get(pair, rank) for pair in joined]
            i = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[i] >= rank:
                break  # a token that merges do not lead to
            word[i : i + 2] = [joined[i]]
        if len(word) == 2:
            yield word[0], word[1]


def our_tokenizer(theirs: dict[str, Any]) -> Tokenizer:
    """Our tokenizer for a tokenizer.json: byte-level BPE, or one of our characters. Raises
    UserError for another kind."""
    model = theirs["model"]
    specials = {token["content"]: token["id"] for token in theirs.get("added_tokens", ())}
    if model["type"] == "WordLevel" and all(len(t) == 1 or t in specials for t in model["vocab"]):
        chars = [text for text in model["vocab"] if text not in specials]
        return CharTokenizer(chars, sorted(specials, key=specials.get))
    pre = theirs.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if model["type"] != "BPE" or "ByteLevel" not in kinds:
        raise UserError(
            f"its tokenizer ({model['type']}, {', '.join(map(str, kinds))}) is no byte-level BPE"
        )
    patterns = [step["pattern"]["Regex"] for step in steps if step.get("type") == "Split"]
    vocab = {text: i for text, i in model["vocab"].items() if text not in specials}
    ranks = {bytes(INVISIBLE[c] for c in text): i for text, i in vocab.items()}
    return BPETokenizer(ranks, specials, patterns[0] if patterns else GPT2_PATTERN)


# --- export


def export(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint as a folder in Hugging Face's format."""
    save_file = needed("safetensors", "safetensors.torch").save_file
    model, tokenizer, state = utils.load_checkpoint(checkpoint, torch.device("cpu"))
    arch = arch_of(model.config)
    ids = {
        "bos_token_id": tokenizer.specials.get("<BOS>", tokenizer.specials.get(END_OF_TEXT)),
        "eos_token_id": tokenizer.specials.get("<EOS>", tokenizer.specials.get(END_OF_TEXT)),
        "pad_token_id": tokenizer.specials.get("<PAD>"),
    }
    names = {i: text for text, i in tokenizer.specials.items()}
    tokens = {key[:-3]: names[i] for key, i in ids.items() if i is not None}
    files = {
        "config.json": hf_config(model.config, arch, ids),
        "generation_config.json": {k: i for k, i in ids.items() if i is not None}
        | {"max_length": model.config.block_size},
        "tokenizer.json": hf_tokenizer(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
    }
    with new_folder(folder) as part:
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (part / name).write_text(text + "\n", encoding="utf-8")
        weights = to_hf(model.state_dict(), model.config, arch)
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        card = model_card(model, tokenizer, state, arch)
        (part / "README.md").write_text(card, encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of `folder` when it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def to_peft(adapter: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter_config.json and the weights of an adapter for the exported base, as `peft` names
    them. Raises UserError for one with new tokens."""
    config, tensors = from_dict(GPTConfig, adapter["gpt_config"]), adapter["tensors"]
    if any(not name.endswith((".A", ".B")) for name in tensors):
        raise UserError("the adapter has learned new tokens: --merge it into its base, export that")
    arch, found, modules = arch_of(config), {}, set()
    for ours, theirs in tensor_names(config, arch):
        layer = ours.removesuffix(".weight")
        if f"{layer}.A" not in tensors:
            continue
        # Of matrices that stand below each other, each has its rows of B, and all the same A.
        B = tensors[f"{layer}.B"]
        parts = B.split(part_sizes(config, ours)) if len(theirs) > 1 else [B]
        for name, part in zip(theirs, parts, strict=True):
            module = name.removesuffix(".weight")
            modules.add(".".join(module.split(".")[-2:]))
            found[f"base_model.model.{module}.lora_A.weight"] = tensors[f"{layer}.A"].clone()
            found[f"base_model.model.{module}.lora_B.weight"] = part.contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": adapter["lora"]["lora_rank"],
        "lora_alpha": adapter["lora"]["lora_alpha"],
        "lora_dropout": adapter["lora"]["lora_dropout"],
        "target_modules": sorted(modules),
        "fan_in_fan_out": arch == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }
    return settings, found


def export_adapter(path: Path, folder: Path) -> None:
    """Write an adapter as a folder that `peft` loads."""
    save_file = needed("safetensors", "safetensors.torch").save_file
    settings, weights = to_peft(lora.read_adapter(path))
    with new_folder(folder) as part:
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        save_file(weights, part / "adapter_model.safetensors", metadata={"format": "pt"})


def model_card(model: GPT, tokenizer: Tokenizer, state: dict[str, Any], arch: str) -> str:
    """The README.md of an exported model: data, settings, losses, a sample, how to load it."""
    best = min(state["log"], key=lambda record: record["val"]) if state["log"] else {}
    sample = sample_text(model, tokenizer, SampleConfig(max_new_tokens=200))[0].strip("\n")
    config, trained = model.config, state["train_config"]
    rows = {
        "architecture": CLASSES[arch],
        "parameters": f"{model.num_params():,}",
        "layers, heads, channels": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "window": f"{config.block_size} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "trained on": f"{state['corpus'].get('name')} ({state['corpus'].get('bytes', 0):,} bytes)",
        "steps": f"{state['step']} of {trained.get('batch_size')} x {trained.get('grad_accum')}",
        "learning rate": f"{trained.get('lr_max')} to {trained.get('lr_min')}",
        "precision": trained.get("precision"),
    }
    if best:
        rows["loss"] = f"{best['train']:.4f} training, {best['val']:.4f} validation"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A small {arch} model

Trained from scratch with TinyLLM.

| | |
|---|---|
{table}

## A sample

```
{sample}
```

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0]))
```
"""


# --- import


def import_hf(source: str, checkpoint: Path) -> None:
    """Write a model of Hugging Face's, a folder or a name on the hub, as a checkpoint of ours."""
    load_file = needed("safetensors", "safetensors.torch").load_file
    folder = Path(source) if Path(source).is_dir() else download(source)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"{source} has no {name}")
    theirs, theirs_tokenizer = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("config.json", "tokenizer.json")
    )
    config, arch = our_config(theirs)
    tokenizer = our_tokenizer(theirs_tokenizer)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise UserError(f"{source} has no weights in *.safetensors")
    model = GPT(config)
    try:
        model.load_state_dict(from_hf(tensors, config, arch))
    except RuntimeError as error:
        raise UserError(
            f"the weights of {source} do not fit: {str(error).splitlines()[1]}"
        ) from None
    state = {
        "gpt_config": asdict(config),
        "train_config": asdict(TrainConfig(arch=arch)),
        "tokenizer": tokenizer.to_dict(),
        "corpus": {"name": source, "bytes": 0, "sha256": ""},
        "model": model.state_dict(),
        "optimizers": [],
        "scaler": {},
        "step": 0,
        "log": [],
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    utils.save_checkpoint(checkpoint, state)
    print(f"{checkpoint}: {arch}, {model.num_params():,} parameters")
    print(f"next: python generate.py {checkpoint}")


def download(name: str) -> Path:
    """A model's files from the hub."""
    hub = needed("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of many kinds: no network, no such name, no access
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is no folder here, and could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from None


def needed(package: str, module: str = "") -> Any:
    """An optional package. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise UserError(f"this needs {package}: pip install {package}") from None


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    flags, problems = parse_flags(argv, __doc__, ExportConfig)
    config = ExportConfig(**flags)
    wanted = 1 if config.source else 2
    if len(config.paths) != wanted:
        problems.append("give a checkpoint and a folder, or --from NAME and a checkpoint")
    raise_problems(problems + limit_problems(config))
    target = Path(config.paths[-1])
    if target.exists() and not config.overwrite:
        raise UserError(f"{target} exists: --overwrite it, or name another")
    if config.source:
        import_hf(config.source, target)
        return 0
    if lora.is_adapter(Path(config.paths[0])):
        export_adapter(Path(config.paths[0]), target)
        print(f"{target}/: loads with peft.PeftModel.from_pretrained(model, {str(target)!r})")
    else:
        export(Path(config.paths[0]), target)
        print(
            f"{target}/: loads with "
            f"transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"
        )
    if config.push:
        hub = needed("huggingface_hub")
        try:
            hub.create_repo(config.push, exist_ok=True)
            hub.upload_folder(repo_id=config.push, folder_path=target)
        except Exception as error:  # of many kinds: no network, no token, no access
            raise UserError(
                f"could not upload to {config.push}: {str(error).splitlines()[0]}"
            ) from None
        print(f"uploaded: https://huggingface.co/{config.push}")
    return 0


if __name__ == "__main__":
    run(main)
