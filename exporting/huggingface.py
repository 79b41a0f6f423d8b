"""Convert models to and from Hugging Face's format.

A model is a folder with config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
model.safetensors and README.md; a model that no standard architecture can represent is exported
with its code. The conversions are in hf_model.py and hf_tokenizer.py.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from config import ARCHS, GPTConfig
from corpus.bpe import from_tiktoken
from exporting import hf_model
from exporting.chat_template import asks, jinja_template
from exporting.folders import check_files, import_optional, new_folder, read_json, write_json
from exporting.hf_tokenizer import tokenizer_from_hf, tokenizer_to_hf
from finetuning.new_tokens import EMBEDDINGS
from model import GPT
from sampling.text import checkpoint_line, end_tokens, last_trained_on_text
from system.files import folder_problems, locked_file, save_checkpoint
from system.settings import VERSION, UserError, first_line, quote_path, raise_problems
from tokenizer import END_OF_TEXT, CharTokenizer, Tokenizer
from training.task import sample_from_newline

GPT2_VOCAB_SIZE = 50257

# --- files and the hub


def download(name: str, patterns: list[str]) -> Path:
    """The local folder of a model on the hub, with the files that match these patterns."""
    try:
        hub = import_optional("huggingface_hub")
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of many types: no package, no network, no such name, no access
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"there is no folder {name}, and it could not be downloaded from the hub ({reason})"
        ) from None


# --- the model card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{tags}---

# A small {kind} model

{origin}

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

model = AutoModelForCausalLM.from_pretrained("FOLDER"{options})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{options})
inputs = {encode}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_length={length}, do_sample=True)[0]))
```
{notes}"""
ENCODE = 'tokenizer("Once"'
ASK = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_dict=True"""
TRUST = ", trust_remote_code=True"
CODE_NOTES = """
## The code of this model

No architecture of `transformers` has these components, so this folder contains the code, `model.py`
and `modeling_tinyllm.py`. With `trust_remote_code=True`, `transformers` runs these two files with
all permissions that you have. If you do not know who wrote this folder, read them first.

A text has at most {window} tokens, with its prompt and padding. Padding is before the text, as
with `padding_side="left"`; in a call without a cache, such as training, it may also follow. Texts
that are packed in one row are not separated. Assisted generation and other kinds of caches are not
supported.
"""
# The settings of a run that are shown; no names of files and folders, which may be private.
RUN_SETTINGS = "preset arch tokenizer seed max_steps batch_size grad_accum optimizer lr_max lr_min"
RUN_SETTINGS += " schedule warmup_steps weight_decay grad_clip precision"


def shown_settings(model: GPT, state: dict[str, Any]) -> dict[str, str]:
    run = {name: state["train_config"].get(name) for name in RUN_SETTINGS.split()}
    settings = asdict(model.config) | {k: v for k, v in run.items() if v is not None}
    return {name: str(value)[:100] for name, value in settings.items()}


def source_name(state: dict[str, Any]) -> str:
    """The name of a corpus, or of an imported model without its folder, which may be private."""
    name = state["corpus"]["name"]
    return name if state["corpus"]["sha256"] else Path(name).name


def origin(state: dict[str, Any]) -> str:
    """Where a model comes from, and its loss."""
    if not state["corpus"]["sha256"]:
        return f"Imported from {source_name(state)} with TinyLLM."
    how = "Fine-tuned" if "finetune" in state else "Trained from scratch"
    adapter = ", with a LoRA adapter" * ("merged" in state)
    return f"{how} with TinyLLM on {checkpoint_line(source_name(state), state)}{adapter}."


def model_card(model: GPT, tokenizer: Tokenizer, state: dict[str, Any], arch: str) -> str:
    """The README.md of an exported model: data, settings, losses, a sample, how to load it."""
    sample = sample_from_newline(model, tokenizer, 200, not last_trained_on_text(state)).strip("\n")
    config = model.config
    rows = {"architecture": hf_model.CLASSES[arch], "parameters": f"{model.num_params():,}"}
    rows |= shown_settings(model, state)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    texts = {"kind": arch, "tags": "", "options": "", "notes": ""}
    texts["encode"] = ASK if asks(tokenizer, state) else ENCODE
    if arch == hf_model.CUSTOM:
        notes = CODE_NOTES.format(window=config.block_size)
        texts |= {"kind": "GPT", "tags": "tags: [custom_code]\n", "options": TRUST, "notes": notes}
    length = min(config.block_size, 200)
    return CARD.format(origin=origin(state), table=table, sample=sample, length=length, **texts)


# --- export


def export_hf(checkpoint: Path, folder: Path, overwrite: bool = False) -> str:
    """Write the model of a checkpoint as a folder in Hugging Face's format, with its code if no
    Hugging Face architecture has its components. Returns the arguments of from_pretrained. Raises
    UserError if the folder exists, unless it is an export and `overwrite` is set."""
    with new_folder(folder, overwrite) as tmp_path:
        model, tokenizer, state = utils.load_checkpoint(checkpoint, torch.device("cpu"))
        arch = hf_model.arch_or_custom(model.config)
        complete, specials = with_end_token(model, tokenizer)
        files = json_files(complete.config, tokenizer, arch, specials)
        if asks(tokenizer, state):
            files["tokenizer_config.json"]["chat_template"] = jinja_template()
        for name, content in files.items():
            write_json(tmp_path / name, content)
        weights = hf_model.weights_to_hf(complete.state_dict(), complete.config, arch)
        save_tensors(weights, tmp_path / "model.safetensors")
        card = model_card(model, tokenizer, state, arch)
        texts = {"README.md": card} | (code_files() if arch == hf_model.CUSTOM else {})
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8", errors="replace")
    return repr(str(folder)) + (TRUST if arch == hf_model.CUSTOM else "")


@torch.no_grad()
def with_end_token(model: GPT, tokenizer: Tokenizer) -> tuple[GPT, dict[str, int]]:
    """A model and its special tokens, with one that ends a text, which other programs need: if the
    tokenizer has none, <|endoftext|> after all others.

    Its row is the mean of the rows of the two tokens that are least likely after other tokens. So
    its logit is the mean of theirs, and never the largest. Sampled at temperature 0.8, it has a
    probability of 1e-6 to 1e-5 with models of TinyShakespeare; recent versions of llama.cpp, and
    transformers, never sample a token in suppress_tokens.
    """
    if end_tokens(tokenizer):
        return model, tokenizer.specials
    size, weights = model.config.vocab_size, model.state_dict()
    logits, _ = model(torch.arange(size)[None, : model.config.block_size])  # (1, T, V)
    rarest = logits[0].mean(dim=0).argsort()[:2]
    for name in EMBEDDINGS:
        row = weights[name][rarest].mean(dim=0, keepdim=True)  # (1, C)
        weights[name] = torch.cat([weights[name], row])  # (V + 1, C)
    complete = GPT(replace(model.config, vocab_size=size + 1)).eval()
    complete.load_state_dict(weights)
    return complete, tokenizer.specials | {END_OF_TEXT: size}


# The files with the code of a model: an import in them, and what replaces it in an exported folder.
CODE_FILES = {
    "exporting/modeling_tinyllm.py": ("from model", "from .model"),
    "model.py": ("from config import", "from transformers import PreTrainedConfig as"),
}


def code_files() -> dict[str, str]:
    """The texts of the code files, by file name. They need nothing else of this project."""
    texts = {}
    for source, (ours, theirs) in CODE_FILES.items():
        path = Path(__file__).parent.parent / source
        header = f"# {source} of TinyLLM {VERSION} (MIT License); only an import differs.\n"
        text = path.read_text(encoding="utf-8")
        texts[path.name] = header + text.replace(f"\n{ours}", f"\n{theirs}")
    return texts


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    content = import_optional("safetensors.torch").save(tensors, metadata={"format": "pt"})
    path.write_bytes(content)  # save_file has errors of its own for a full disk


def json_files(
    config: GPTConfig, tokenizer: Tokenizer, arch: str, specials: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """The content of the JSON files of an exported model, by file name; `specials` are those of
    the tokenizer and an end token."""
    token_ids = special_token_ids(specials)
    # Without <PAD>, batches are padded with the end token. Not in config.json: there it would be a
    # token that transformers does not train.
    known_ids = {key: token_ids["eos_token_id"] if i is None else i for key, i in token_ids.items()}
    texts = {i: text for text, i in specials.items()}
    end = known_ids["eos_token_id"]
    generation = known_ids | {"eos_token_id": end_tokens(tokenizer) or end}  # all that end a text
    generation |= {"max_length": config.block_size}
    if not end_tokens(tokenizer):
        generation["suppress_tokens"] = [end]
    return {
        "config.json": hf_model.config_to_hf(config, arch, token_ids),
        "generation_config.json": generation,
        "tokenizer.json": tokenizer_to_hf(tokenizer, specials),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
            **{key.removesuffix("_id"): texts[i] for key, i in known_ids.items()},
        },
    }


def special_token_ids(specials: dict[str, int]) -> dict[str, Any]:
    """The ids of the special tokens that config.json names, None if there is none."""
    end_of_text = specials.get(END_OF_TEXT)
    return {
        "bos_token_id": specials.get("<BOS>", end_of_text),
        "eos_token_id": specials.get("<EOS>", end_of_text),
        "pad_token_id": specials.get("<PAD>"),
    }


# --- import


def import_hf(source: str, checkpoint: Path, overwrite: bool = False) -> None:
    """Write a Hugging Face model, a folder or a name on the hub, as a checkpoint. Code in a folder
    is never run. Raises UserError if the model is incomplete, damaged or not supported."""
    check_checkpoint_target(checkpoint, overwrite)
    import_optional("safetensors")
    local = Path(source).is_dir()
    folder = Path(source) if local else download(source, ["*.json"])
    theirs = read_json(folder / "config.json")
    config, arch = hf_model.config_from_hf(theirs)
    tokenizer = read_tokenizer(folder, config, arch)
    n_ids, exact = tokenizer.vocab_size, isinstance(tokenizer, CharTokenizer)
    ends = theirs.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    n_added = exact and n_ids in ends  # an end token, by an export
    if n_ids > config.vocab_size or (exact and n_ids + n_added < config.vocab_size):
        raise UserError(f"config.json has a vocab_size of {config.vocab_size}, instead of {n_ids}")
    folder = folder if local else download(source, ["*.json", "*.safetensors"])
    weights = read_weights(folder, config, arch)
    if n_added:
        config = replace(config, vocab_size=n_ids)
        weights |= {name: weights[name][:n_ids] for name in EMBEDDINGS}
    state = {
        "gpt_config": asdict(config),
        "train_config": {"arch": arch} if arch in ARCHS else {},
        "tokenizer": tokenizer.to_dict(),
        "corpus": {"name": source, "bytes": 0, "sha256": ""},
        "model": weights,
        "optimizers": [],
        "scaler": {},
        "step": 0,
        "log": [],
    }
    with locked_file(checkpoint, "an import"):
        check_checkpoint_target(checkpoint, overwrite)  # another process may have written it
        save_checkpoint(checkpoint, state)
    print(f"{checkpoint}: {arch}, {utils.count_params(config)[0]:,} parameters")
    for text, i in tokenizer.specials.items():
        if i in ends and i not in end_tokens(tokenizer):
            print(f'note: {text} ends a text: give --stop "{text}" to generate.py')
    print(f"next: python generate.py {quote_path(checkpoint)}")


def read_tokenizer(folder: Path, config: GPTConfig, arch: str) -> Tokenizer:
    """The tokenizer of a model. A GPT-2 saved without one has OpenAI's if the sizes are equal."""
    if (folder / "tokenizer.json").exists():
        return tokenizer_from_hf(read_json(folder / "tokenizer.json"))
    if arch != "gpt2" or config.vocab_size != GPT2_VOCAB_SIZE or (folder / "vocab.json").exists():
        raise UserError(
            f"{folder} has no tokenizer.json: save the model's tokenizer there too, with "
            "tokenizer.save_pretrained"
        )
    print(f"{folder} has no tokenizer: using GPT-2's, which has {GPT2_VOCAB_SIZE:,} tokens as well")
    return from_tiktoken("gpt2")


def check_checkpoint_target(path: Path, overwrite: bool) -> None:
    """Raise UserError unless a checkpoint can be written: there is none, or it may be replaced."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a checkpoint in it, such as best.pt")
    if os.path.lexists(path):
        if not overwrite:
            raise UserError(f"{path} exists: add --overwrite or choose another path")
        utils.read_checkpoint(path)  # only a checkpoint is replaced
    raise_problems(folder_problems(path.parent))


def read_weights(folder: Path, config: GPTConfig, arch: str) -> dict[str, Tensor]:
    """The weights of a folder, in model.safetensors or in several files, model-NUMBER-of-N."""
    names = [path.name for path in sorted(folder.glob("model-*-of-*.safetensors"))]
    if not names or (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        raise UserError(f"{folder} has no model.safetensors (other formats are not supported)")
    check_files(folder, ["config.json", "tokenizer.json", *names])
    library = import_optional("safetensors.torch")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            part = library.load_file(folder / name)
        except Exception as error:  # damage raises errors of many types
            raise UserError(f"{folder / name} is damaged: {first_line(error)}") from None
        if tensors.keys() & part.keys():
            raise UserError(f"{folder} has the weights of several models")
        tensors |= part
    # OpenAI's GPT-2 was saved without its language-model head
    if arch == "gpt2" and not any(name.startswith("transformer.") for name in tensors):
        prefixes = {name: "transformer." * (name != "lm_head.weight") for name in tensors}
        tensors = {prefixes[name] + name: x for name, x in tensors.items()}
    return hf_model.weights_from_hf(tensors, config, arch)
