"""Other implementations, for comparison: nanoGPT, llama.cpp, Hugging Face's."""

import dataclasses
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import ARCHS, GPTConfig, train_settings
from exporting.gguf_file import gguf_writer, write_gguf
from exporting.hf_model import config_to_hf
from model import GPT
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


def nanogpt_problems(checkout: str) -> list[str]:
    """Why this is not the path of nanoGPT's repository; empty if it is, or if there is none."""
    if not checkout or Path(checkout, "train.py").exists():
        return []
    return [f"{checkout} is not a checkout of nanoGPT: it has no train.py"]


def nanogpt_model(checkout: str, gpt: GPTConfig) -> Any:
    """nanoGPT's model with the sizes of ours. checkout: the path of its repository."""
    nanogpt = runpy.run_path(str(Path(checkout, "model.py")))
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    sizes = {name: getattr(gpt, name) for name in names}
    return nanogpt["GPT"](nanogpt["GPTConfig"](**sizes))


def nanogpt_step(checkout: str, flags: Flags, device: torch.device) -> Callable[[], Tensor]:
    """A training step of nanoGPT's model and optimizer, on random tokens."""
    gpt, config = train_settings(flags, device.type)
    model: Any = nanogpt_model(checkout, gpt).to(device).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    model = torch.compile(model) if config.compile else model

    def step() -> Tensor:
        ids = torch.randint(gpt.vocab_size, (2, config.batch_size, gpt.block_size))
        x, y = to_device(ids[0], device), to_device(ids[1], device)
        with autocast(device, config.precision):
            loss: Tensor = model(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def nanogpt_samplers(checkout: str, n: int, gpt: GPTConfig, device: torch.device) -> Functions:
    if not checkout:
        raise UserError("nanoGPT: give --nanogpt the path of its repository")
    model = nanogpt_model(checkout, gpt).to(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {"nanoGPT": lambda: model.generate(ids, n, temperature=0.8, top_k=40).tolist()}


def nanogpt_command(checkout: str, text: Path, out_dir: str) -> list[str]:
    """The arguments of nanoGPT's recipe for a CPU, to be run in the checkout. Prepares its data."""
    folder = Path(checkout, "data", "shakespeare_char")
    if not (folder / "train.bin").exists():
        shutil.copy(text, folder / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, capture_output=True)
    config = "config/train_shakespeare_char.py"
    return ["train.py", config, *NANOGPT_CPU_FLAGS.split(), f"--out_dir={out_dir}"]


def llama_cpp_command(model: Path, threads: int, mode: str) -> list[str]:
    """The command that runs llama_cpp.mjs; empty if its npm package is not installed."""
    folder = os.environ.get("NODE_LLAMA_CPP", "")  # otherwise npm's, of `npm install -g`
    node, npm = shutil.which("node"), shutil.which("npm")
    if npm and not folder:
        result = subprocess.run([npm, "root", "-g"], capture_output=True, text=True)
        folder = str(Path(result.stdout.strip(), "node-llama-cpp"))
    if not node or not Path(folder, "dist", "index.js").is_file():
        return []
    script = Path(__file__).with_name("llama_cpp.mjs")
    return [node, str(script), folder, str(model), str(threads), mode]


def llama_cpp_samplers(n: int, gpt: GPTConfig) -> Functions:
    """llama.cpp's greedy generation of n tokens on a CPU. Its processes end with this one."""
    if not llama_cpp_command(Path(), 1, "fast"):
        raise UserError("llama.cpp: npm install -g node-llama-cpp")
    model = GPT(dataclasses.replace(gpt, block_size=max(gpt.block_size, n + 1)))
    tokenizer = CharTokenizer([chr(i) for i in range(gpt.vocab_size)])
    samplers: Functions = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for precision in ("float16", "int8"):
            path = Path(folder, f"{precision}.gguf")
            write_gguf(gguf_writer(model, tokenizer, precision), path)
            command = llama_cpp_command(path, torch.get_num_threads(), "fast")
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            ask(process, {"text": ""})  # wait until the model is loaded
            question = {"prompt": [0], "n": n}
            samplers[f"llama.cpp, {precision}"] = functools.partial(ask, process, question)
    return samplers


def ask(process: subprocess.Popen[str], question: dict[str, Any]) -> Any:
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def hf_samplers(n: int, gpt: GPTConfig, device: torch.device) -> Functions:
    import transformers  # optional package

    transformers.logging.set_verbosity_error()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    settings: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "do_sample": True}
    settings |= {"max_new_tokens": n, "min_new_tokens": n}
    window = max(gpt.block_size, n + 1)
    samplers: Functions = {}
    for name, arch in (("GPT-2", "gpt2"), ("Llama", "llama")):
        own = dataclasses.replace(gpt, **ARCHS[arch], n_inner=0, block_size=window)
        no_ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config = transformers.AutoConfig.for_model(**config_to_hf(own, arch, no_ends))
        model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
        samplers[f"Hugging Face, {name}"] = functools.partial(model.generate, ids, **settings)
    return samplers


def hf_tokenizer(texts: list[str], vocab_size: int) -> Functions:
    import tokenizers  # optional package

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = "\n".join(texts)

    def train() -> None:
        tokenizer.train_from_iterator(texts, vocab_size, show_progress=False)

    return {"Hugging Face, train": train, "Hugging Face, encode": lambda: tokenizer.encode(text)}
