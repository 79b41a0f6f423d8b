"""Convert models to and from Hugging Face's format.

A model is a folder with config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
model.safetensors and README.md. The conversions are in hf_model.py and hf_tokenizer.py.
"""

import contextlib
import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from config import GPTConfig, SampleConfig, TrainConfig, UserError
from exporting.hf_model import (
    CLASSES,
    config_from_hf,
    config_to_hf,
    matching_arch,
    weights_from_hf,
    weights_to_hf,
)
from exporting.hf_tokenizer import tokenizer_from_hf, tokenizer_to_hf
from generate import sample_text
from model import GPT
from tokenizer import END_OF_TEXT, Tokenizer

# --- files and the hub


def import_optional(module: str) -> Any:
    """A module of an optional package. Raises UserError if the package is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {package}: pip install {package}") from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to. It replaces `folder` at the end, or is deleted after an
    error."""
    tmp_path = folder.with_name(folder.name + ".part")
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir(parents=True)
    try:
        yield tmp_path
        shutil.rmtree(folder, ignore_errors=True)
        tmp_path.rename(folder)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def download(name: str) -> Path:
    """The local folder of a model on the hub. Raises UserError if it cannot be downloaded."""
    hub = import_optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of many types: no network, no such name, no access
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is not a folder, and could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from None


def upload(folder: Path, name: str) -> None:
    """Upload a folder to the hub as user/name. Raises UserError if that fails."""
    hub = import_optional("huggingface_hub")
    try:
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of many types: no network, no token, no access
        raise UserError(f"could not upload to {name}: {str(error).splitlines()[0]}") from None


# --- the model card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# A small {arch} model

Trained from scratch with TinyLLM.

| | |
|---|---|
{table}

## Sample

```
{sample}
```

## Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0]))
```
"""


def model_card(model: GPT, tokenizer: Tokenizer, state: dict[str, Any], arch: str) -> str:
    """The README.md of an exported model: data, settings, losses, a sample, how to load it."""
    best = min(state["log"], key=lambda record: record["val"]) if state["log"] else {}
    sample = sample_text(model, tokenizer, SampleConfig(max_new_tokens=200))[0].strip("\n")
    config, trained, corpus = model.config, state["train_config"], state["corpus"]
    rows = {
        "architecture": CLASSES[arch],
        "parameters": f"{model.num_params():,}",
        "layers, heads, channels": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "context length": f"{config.block_size} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "training data": f"{corpus.get('name')} ({corpus.get('bytes', 0):,} bytes)",
        "steps": f"{state['step']} of {trained.get('batch_size')} x {trained.get('grad_accum')}",
        "learning rate": f"{trained.get('lr_max')} to {trained.get('lr_min')}",
        "precision": trained.get("precision"),
    }
    if best:
        rows["loss"] = f"{best['train']:.4f} training, {best['val']:.4f} validation"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return CARD.format(arch=arch, table=table, sample=sample)


# --- export


def export_hf(checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint as a folder in Hugging Face's format. Raises UserError if no
    Hugging Face architecture has its components."""
    save_file = import_optional("safetensors.torch").save_file
    model, tokenizer, state = utils.load_checkpoint(checkpoint, torch.device("cpu"))
    arch = matching_arch(model.config)
    weights = weights_to_hf(model.state_dict(), model.config, arch)
    with new_folder(folder) as tmp_path:
        for name, content in json_files(model.config, tokenizer, arch).items():
            write_json(tmp_path / name, content)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        card = model_card(model, tokenizer, state, arch)
        (tmp_path / "README.md").write_text(card, encoding="utf-8")


def json_files(config: GPTConfig, tokenizer: Tokenizer, arch: str) -> dict[str, dict[str, Any]]:
    """The content of the JSON files of an exported model, by file name."""
    token_ids = special_token_ids(tokenizer)
    known_ids = {key: i for key, i in token_ids.items() if i is not None}
    texts = {i: text for text, i in tokenizer.specials.items()}
    return {
        "config.json": config_to_hf(config, arch, token_ids),
        "generation_config.json": known_ids | {"max_length": config.block_size},
        "tokenizer.json": tokenizer_to_hf(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
            **{key.removesuffix("_id"): texts[i] for key, i in known_ids.items()},
        },
    }


def special_token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of the special tokens that config.json names, None if the tokenizer has none."""
    end_of_text = tokenizer.specials.get(END_OF_TEXT)
    return {
        "bos_token_id": tokenizer.specials.get("<BOS>", end_of_text),
        "eos_token_id": tokenizer.specials.get("<EOS>", end_of_text),
        "pad_token_id": tokenizer.specials.get("<PAD>"),
    }


# --- import


def import_hf(source: str, checkpoint: Path) -> None:
    """Write a Hugging Face model, a folder or a name on the hub, as a checkpoint. Raises UserError
    if it is incomplete or not supported."""
    load_file = import_optional("safetensors.torch").load_file
    folder = Path(source) if Path(source).is_dir() else download(source)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"{source} has no {name}")
    config, arch = config_from_hf(read_json(folder / "config.json"))
    tokenizer = tokenizer_from_hf(read_json(folder / "tokenizer.json"))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise UserError(f"{source} has no weights in *.safetensors")

    model = GPT(config)
    try:
        model.load_state_dict(weights_from_hf(tensors, config, arch))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"the weights of {source} do not match its config.json: {reason}") from None
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
