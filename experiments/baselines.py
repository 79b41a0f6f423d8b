"""Other implementations, for comparison: nanoGPT, llama.cpp, Hugging Face's models and
tokenizers."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import GPTConfig, train_settings
from exporting.gguf_file import gguf_writer, write_gguf
from model import GPT
from system.device import pick_device
from system.settings import UserError
from tokenizer import CharTokenizer
from training.setup import Flags
from utils import autocast, to_device

Functions = dict[str, Callable[[], Any]]  # to be timed, by name

# The recipe in nanoGPT's README for a computer without a GPU
NANOGPT_CPU_FLAGS = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)


# --- nanoGPT


def nanogpt_model(checkout: str, gpt: GPTConfig) -> nn.Module:
    """nanoGPT's model with the sizes of ours. checkout: the path of its repository."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout, "model.py"))
    assert spec and spec.loader
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = nanogpt
    spec.loader.exec_module(nanogpt)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    return nanogpt.GPT(nanogpt.GPTConfig(**{name: getattr(gpt, name) for name in names}))


def nanogpt_sampler(checkout: str, n: int, gpt: GPTConfig, device: torch.device) -> Functions:
    """nanoGPT's sampler of n tokens; none, with a hint, if there is no checkout."""
    if not checkout:
        print("to compare with nanoGPT, give --nanogpt the path of its repository")
        return {}
    model: Any = nanogpt_model(checkout, gpt).to(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {"nanoGPT": lambda: model.generate(ids, n, temperature=0.8, top_k=40).tolist()}


def nanogpt_step(
    checkout: str, flags: Flags, precision: str, compiled: bool, device_name: str
) -> Callable[[], Tensor]:
    """A training step of nanoGPT's model and optimizer, on random tokens."""
    gpt, config = train_settings(flags, "")
    device = pick_device(device_name)
    model: Any = nanogpt_model(checkout, gpt).to(device).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    model = torch.compile(model) if compiled else model
    ids = torch.randint(gpt.vocab_size, (1_000_000,))
    T = gpt.block_size

    def step() -> Tensor:
        starts = torch.randint(len(ids) - T, (config.batch_size,))
        x = to_device(torch.stack([ids[i : i + T] for i in starts]), device)
        y = to_device(torch.stack([ids[i + 1 : i + 1 + T] for i in starts]), device)
        with autocast(device, precision):
            _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def nanogpt_command(checkout: str, text: Path, out_dir: str) -> list[str]:
    """The arguments of nanoGPT's recipe for a CPU, to be run in the checkout. Prepares its data."""
    folder = Path(checkout, "data", "shakespeare_char")
    if not (folder / "train.bin").exists():
        shutil.copy(text, folder / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, capture_output=True)
    config = "config/train_shakespeare_char.py"
    return ["train.py", config, *NANOGPT_CPU_FLAGS.split(), f"--out_dir={out_dir}"]


# --- llama.cpp


def llama_cpp_command(model: Path, threads: int, mode: str) -> list[str]:
    """The command that runs llama_cpp.mjs; empty if its npm package is not installed, in the folder
    NODE_LLAMA_CPP or by `npm install -g node-llama-cpp`."""
    folder = os.environ.get("NODE_LLAMA_CPP", "")
    node, npm = shutil.which("node"), shutil.which("npm")
    if npm and not folder:
        result = subprocess.run([npm, "root", "-g"], capture_output=True, text=True)
        folder = str(Path(result.stdout.strip(), "node-llama-cpp"))
    if not node or not Path(folder, "dist", "index.js").is_file():
        return []
    script = Path(__file__).with_name("llama_cpp.mjs")
    return [node, str(script), folder, str(model), str(threads), mode]


def llama_cpp_samplers(n: int, gpt: GPTConfig) -> Functions:
    """llama.cpp's greedy generation of n tokens on a CPU, with models of the same sizes; none, with
    a hint, if something that this needs is not installed, or llama.cpp lacks a component. Its
    processes end with this one."""
    if not llama_cpp_command(Path(), 1, "fast"):
        print("to compare with llama.cpp: npm install -g node-llama-cpp")
        return {}
    model = GPT(dataclasses.replace(gpt, block_size=max(gpt.block_size, n + 1)))
    tokenizer = CharTokenizer([chr(i) for i in range(gpt.vocab_size)])
    samplers: Functions = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for precision in ("float16", "int8"):
            path = Path(folder, f"{precision}.gguf")
            try:
                write_gguf(gguf_writer(model, tokenizer, precision), path)
            except UserError as error:
                print(f"no comparison with llama.cpp: {error}")
                return {}
            command = llama_cpp_command(path, torch.get_num_threads(), "fast")
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            ask(process, {"text": ""})  # wait until the model is loaded
            question = {"prompt": [0], "n": n}
            samplers[f"llama.cpp, {precision}"] = functools.partial(ask, process, question)
    return samplers


def ask(process: subprocess.Popen[str], question: dict[str, Any]) -> Any:
    """The answer of llama_cpp.mjs to a question."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


# --- Hugging Face


def hf_samplers(n: int, gpt: GPTConfig, device: torch.device) -> Functions:
    """Hugging Face's samplers of n tokens, with models of the same sizes; none, with a hint, if
    transformers is not installed."""
    try:
        import transformers  # optional package
    except ImportError:
        print("to compare with Hugging Face: pip install transformers")
        return {}
    transformers.logging.set_verbosity_error()
    common: dict[str, Any] = {"vocab_size": gpt.vocab_size}
    common |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    configs = {
        "GPT-2": transformers.GPT2Config(
            **common, n_layer=gpt.n_layer, n_head=gpt.n_head, n_embd=gpt.n_embd, n_positions=2048
        ),
        "Llama": transformers.LlamaConfig(
            **common, num_hidden_layers=gpt.n_layer, num_attention_heads=gpt.n_head,
            hidden_size=gpt.n_embd, intermediate_size=gpt.n_inner, max_position_embeddings=2048,
        ),
    }  # fmt: skip
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    settings: dict[str, Any] = {
        "max_new_tokens": n,
        "min_new_tokens": n,
        "temperature": 0.8,
        "top_k": 40,
    }
    samplers: Functions = {}
    for name, config in configs.items():
        model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()

        def sample(model: Any = model) -> None:
            model.generate(ids, do_sample=True, **settings)[0].tolist()

        samplers[f"Hugging Face, {name}"] = sample
    return samplers


def hf_tokenizer(texts: list[str], vocab_size: int) -> Functions:
    """Training and encoding with Hugging Face's tokenizers, in this order: encoding uses what was
    learned. None, with a hint, if they are not installed."""
    try:
        import tokenizers  # optional package
    except ImportError:
        print("to compare with Hugging Face: pip install tokenizers")
        return {}
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = "\n".join(texts)

    def train() -> None:
        tokenizer.train_from_iterator(texts, vocab_size, show_progress=False)

    return {"Hugging Face, train": train, "Hugging Face, encode": lambda: tokenizer.encode(text)}
