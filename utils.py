"""Shared by training and sampling: batches of windows, device and precision, checkpoint files."""

import contextlib
import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokenizer as tokenizers
from config import GPTConfig
from model import GPT
from system.settings import UserError, all_problems, first_line, raise_problems

# --- batches: windows of a stream of token ids


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait for a copy from pinned memory to a CUDA GPU;
    on MPS such copies can have wrong values (pytorch issue 189690)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def windows(ids: np.ndarray | Tensor, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """The windows of a stream that begin at `starts` (B,), in one indexed read.

    Returns x and y, both (B, T) int64: y[b, t] is the token after x[b, t]. Past the end of the
    stream x is 0 and y is -100, which the loss ignores.

    >>> x, y = windows(np.array([5, 6, 7, 8]), np.array([0, 2]), block_size=2)
    >>> x.tolist(), y.tolist()
    ([[5, 6], [7, 8]], [[6, 7], [8, -100]])
    """
    device = ids.device if isinstance(ids, Tensor) else torch.device("cpu")
    first = to_device(torch.from_numpy(starts), device)  # (B,)
    index = first[:, None] + torch.arange(block_size + 1, device=device)  # (B, T + 1)
    inside = index.clamp(max=len(ids) - 1)
    if isinstance(ids, Tensor):
        tokens = ids[inside].long()
    else:
        tokens = torch.from_numpy(ids[inside.numpy()].astype(np.int64))
    past_end = index >= len(ids)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return x.masked_fill(past_end[:, :-1], 0), y.masked_fill(past_end[:, 1:], -100)


def get_batch(
    ids: np.ndarray | Tensor,
    block_size: int,
    batch_size: int,
    seed: int,
    number: int,
    docs: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """The windows of batch `number` of a run, x and y (B, T): a pure function of (seed, number), so
    a resumed run needs no stored generator state.

    Each window begins 0.618 of the stream (the golden ratio) after the previous one, wrapping
    around at the end (Weyl 1916). All parts of a text are read about equally often, and the windows
    of a batch are far apart; with random windows, an eighth of the text would not be read in two
    epochs. The seed sets the first position. With `docs`, the sorted document starts, a window that
    begins inside a document no longer than a window is moved to the start of that document; if the
    last document is one of these, windows extend past the end of the stream.
    """
    short_end = docs is not None and len(ids) - docs[-1] <= block_size
    n_starts = len(ids) if short_end else len(ids) - block_size
    count = number * batch_size + np.arange(batch_size, dtype=np.uint64)  # earlier windows
    offset = np.random.default_rng(seed).integers(1 << 64, dtype=np.uint64)
    fraction = offset + count * np.uint64(0x9E3779B97F4A7C15)  # in units of 2^-64: 2^64 / 1.618
    starts = ((fraction >> np.uint64(11)) / (1 << 53) * n_starts).astype(np.int64)
    if docs is not None:
        document = np.searchsorted(docs, starts, side="right") - 1  # (B,)
        lengths = np.diff(docs, append=len(ids))
        starts = np.where(lengths[document] <= block_size, docs[document], starts)
    return windows(ids, starts, block_size)


def even_starts(n_ids: int, block_size: int, n_windows: int | None = None) -> np.ndarray:
    """The starts of n_windows evenly spaced windows, the same every time. If n_windows is None, or
    more than there are: consecutive windows over the whole stream, in which every token but the
    first is predicted exactly once."""
    every = np.arange(0, n_ids - 1, block_size)
    if n_windows is None or n_windows >= len(every):
        return every
    return np.linspace(0, n_ids - 1 - block_size, n_windows).astype(np.int64)


def mix_seed(seed: int, *numbers: int) -> int:
    """A seed that is different for each combination of numbers, such as step and micro-step."""
    return int(np.random.SeedSequence((seed, *numbers)).generate_state(1, np.uint64)[0])


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of text, which is comparable between tokenizers.

    >>> bits_per_byte(math.log(4), bytes_per_token=4)  # two bits per four bytes
    0.5
    """
    return loss / math.log(2) / bytes_per_token


# --- checkpoints

CHECKPOINT_TYPES = {
    **dict.fromkeys(("gpt_config", "train_config", "tokenizer", "corpus", "model", "scaler"), dict),
    **{"optimizers": list, "step": int, "log": list},
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Raises UserError if the file is missing, damaged,
    or not a checkpoint of this program."""
    state = read_data(path)
    state = state if isinstance(state, dict) else {}
    if "base_sha256" in state:
        raise UserError(f"{path} is a LoRA adapter: first merge it with finetune.py --merge")
    if missing := CHECKPOINT_TYPES.keys() - state.keys():
        raise UserError(f"{path} is not a checkpoint of this program: no {sorted(missing)[0]!r}")
    with matching_contents(path):
        check_types(state, CHECKPOINT_TYPES)
        for record in state["log"]:  # adding raises TypeError unless all are numbers
            sum((record["step"], record["val"], *filter(None, record.values())))
        sizes = state.get("files", {}).values()
        if min([state["step"], state.get("seconds", 0.0), *sizes]) < 0:
            raise ValueError("a negative step, time or size")
        check_types(state["corpus"], {"name": str, "sha256": str})
    return state


def read_data(path: Path) -> Any:
    """What torch.save wrote, on the CPU, loaded with weights_only=True, so that a file from a
    stranger cannot run code. Of a run's folder, that is best.pt. The checksums in the file are
    verified, which torch.load does not do: 5 GB/s. Raises UserError if it is missing or damaged."""
    if path.is_dir():
        path = path / "best.pt"
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}: train one with `python train.py`")
    if not (path.is_file() and zipfile.is_zipfile(path)):  # a pipe would wait forever
        raise UserError(f"{path} is not a checkpoint, or it is incomplete")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are rejected below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage raises errors of many types
        unsafe = "GLOBAL" in str(error)  # the pickle names a function to call
        reason = "it contains code, which is never run" if unsafe else "it is damaged"
        raise UserError(f"invalid checkpoint {path}: {reason}") from None


@contextlib.contextmanager
def matching_contents(path: Path) -> Iterator[None]:
    """Errors from using the contents of a checkpoint become a UserError."""
    try:
        yield
    except (NameError, ImportError):  # a bug, whatever the contents
        raise
    except Exception as error:  # values of any kind raise errors of any type
        raise UserError(
            f"invalid checkpoint {path}: its contents do not match ({first_line(error)})"
        ) from None


def check_types(data: dict[str, Any], types: dict[str, type]) -> None:
    """Raise ValueError unless each value is of the type that its name has in `types`."""
    for name, kind in types.items():
        if not isinstance(data[name], kind):
            raise ValueError(f"{name} is not a {kind.__name__}")


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[GPT, tokenizers.Tokenizer, dict[str, Any]]:
    """The model, on the device and in eval mode, its tokenizer, and the checkpoint's contents."""
    path = Path(path)
    state = read_checkpoint(path)
    with matching_contents(path):
        config = GPTConfig(**state["gpt_config"])  # raises TypeError for an unknown setting
        raise_problems(all_problems(config))
        n_weights = sum(weight.numel() for weight in state["model"].values())
    rows = config.vocab_size + config.block_size * (config.pos == "learned")
    rows += 2 * config.n_layer * (config.n_head * config.head_size + config.n_inner)
    # At least rows * n_embd weights. count_params would import torch._dynamo, which takes seconds.
    # Not within matching_contents: an error of GPT for valid settings is a bug, not damage.
    model = GPT(config) if rows * config.n_embd <= n_weights else None
    with matching_contents(path):
        if model is None:
            raise ValueError("fewer weights than its settings say")
        model.load_state_dict(state["model"])
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("weights that are not finite numbers")
        tokenizer = tokenizers.from_dict(state["tokenizer"])
        n_tokens, padded = tokenizer.vocab_size, isinstance(tokenizer, tokenizers.BPETokenizer)
        if n_tokens > config.vocab_size or (n_tokens < config.vocab_size and not padded):
            raise ValueError(f"{n_tokens} tokens, {config.vocab_size} embeddings")
    return model.to(device).eval(), tokenizer, state


def count_params(config: GPTConfig) -> tuple[int, int]:
    """The number of parameters of a model and of each of its blocks, without allocating memory."""
    with torch.device("meta"):
        one, two = (GPT(replace(config, n_layer=n)).num_params() for n in (1, 2))
    return one + (config.n_layer - 1) * (two - one), two - one


def newest_checkpoint(out_dir: Path) -> Path:
    """best.pt, else latest.pt, of the most recently written run in out_dir or a folder in it."""
    names = ("best.pt", "latest.pt")
    files = [file for name in names for file in (*out_dir.glob(name), *out_dir.glob(f"*/{name}"))]
    if not files:
        raise UserError(f"there is no checkpoint in {out_dir}/: train one with `python train.py`")
    run_dir = max(files, key=lambda file: file.stat().st_mtime).parent
    return next(run_dir / name for name in names if (run_dir / name).exists())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which matrix products run in the given precision."""
    if precision not in ("bfloat16", "float16"):
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, getattr(torch, precision))
