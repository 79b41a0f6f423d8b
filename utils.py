"""What training and sampling share: a text as batches of windows, device and precision,
checkpoints, the run's log."""

import codecs
import contextlib
import ctypes
import io
import math
import mmap
import os
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

import tokenizer as tokenizers
from config import GPTConfig, TrainConfig, UserError, from_dict, raise_problems
from model import GPT

# --- files


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when it is complete and on the disk, and
    not before.

    Killed at any moment, what stands at `path` is the old file or the new one, whole. Raises
    UserError where it cannot be written (a full disk, say); the old file is then still there.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where a write fails
        reason = (
            "the disk is full"
            if shutil.disk_usage(path.parent).free < 1 << 20
            else str(error).split("\n")[0]
        )
        raise UserError(
            f"{path} could not be written ({reason}); what stood there before is whole"
        ) from error
    finally:
        part.unlink(missing_ok=True)


# --- corpus: text -> ids -> batches

BLOCK_SIZE = 1 << 20  # bytes read at once


@dataclass
class Corpus:
    """A tokenized text, split: nine tenths to train on, one tenth to validate on."""

    # Both (tokens,), in the smallest integer type that holds the vocabulary
    train_ids: "np.ndarray | Shards"
    val_ids: "np.ndarray | Shards"
    info: dict[str, Any]  # name, bytes, sha256: which text it was; documents in it
    train_bytes: int  # of the text in UTF-8
    val_bytes: int
    train_docs: np.ndarray | None = None  # (documents,), where each begins in train_ids
    separator: int | None = None  # the token that begins a document, where there are several

    @property
    def bytes_per_token(self) -> float:
        """Of the validation text."""
        return self.val_bytes / len(self.val_ids)


def read_text(path: Path) -> str:
    """A file's text, with line ends as \\n. Raises UserError unless it is UTF-8 text."""
    text = "".join(text_blocks(path))
    if not text:
        raise UserError(f"{path} is empty: there is nothing to learn from")
    return text


def text_blocks(
    path: Path, bad_bytes: str = "strict", watch: Callable[[bytes], None] = lambda raw: None
) -> Iterator[str]:
    """A file's text in blocks, with line ends as \\n. `watch` is given each block of bytes. Raises
    UserError unless it is UTF-8 text; with bad_bytes="replace" other bytes become U+FFFD."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")(bad_bytes)
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    n_read = 0
    try:
        with open(path, "rb") as file:
            while raw := file.read(BLOCK_SIZE):
                if not n_read and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path} is UTF-16 text: convert it to UTF-8")
                n_read += len(raw)
                watch(raw)
                if (at := raw.find(b"\0")) >= 0:
                    at += n_read - len(raw)
                    raise UserError(f"{path} is a binary file (byte {at} is 0): leave it out")
                yield decoder.decode(raw)
            yield decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        at = n_read - len(error.object) + error.start
        raise UserError(
            f"{path} is not UTF-8 text (byte {at} is 0x{error.object[error.start]:02x}): convert it"
        ) from None


def whole_characters(text: str) -> str:
    """The text with halves of characters, which JSON can hold, as question marks."""
    return text.encode("utf-8", "replace").decode()


def check_length(corpus: Corpus, block_size: int) -> None:
    """Raise UserError where a split is too short for one window."""
    n_train, n_val = len(corpus.train_ids), len(corpus.val_ids)
    if min(n_train, n_val) <= block_size:
        raise UserError(
            f"the corpus is too short: {n_train} tokens to train and {n_val} to validate on, and a "
            f"window takes {block_size + 1}; take a longer text or a smaller --block_size"
        )


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats a token as bits a byte of text, which compares between tokenizers.

    >>> bits_per_byte(math.log(4), bytes_per_token=4)  # two bits for each four bytes
    0.5
    """
    return loss / math.log(2) / bytes_per_token


def map_ids(paths: list[Path], dtype: str) -> "np.ndarray | Shards":
    """The ids in files of any size, one behind the other, read where they are needed."""
    parts = []
    for path in paths:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(memory, "madvise"):  # windows lie anywhere: reading ahead would cost 50 times
            memory.madvise(mmap.MADV_RANDOM)
        parts.append(np.frombuffer(memory, dtype))
    return parts[0] if len(parts) == 1 else Shards(parts)


class Shards:
    """Arrays one behind the other, to be read like one, by an array of places or a slice."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.begins = np.cumsum([0, *map(len, parts)], dtype=np.int64)  # and the end

    def __len__(self) -> int:
        return int(self.begins[-1])

    def __getitem__(self, at: np.ndarray | slice) -> np.ndarray:
        if isinstance(at, slice):
            first, last, _ = at.indices(len(self))
            pairs = zip(self.parts, self.begins, strict=False)
            return np.concatenate([p[max(first - b, 0) : max(last - b, 0)] for p, b in pairs])
        number = np.searchsorted(self.begins, at, side="right") - 1
        found = np.empty(at.shape, self.dtype)
        for i in np.unique(number):
            here = number == i
            found[here] = self.parts[i][at[here] - self.begins[i]]
        return found


def near(ids: np.ndarray | Shards, device: torch.device) -> np.ndarray | Shards | Tensor:
    """A stream of ids in the memory of a GPU, where it takes up to a gigabyte there: then no step
    waits for the host. Else the stream as it is, which may be a file larger than any memory."""
    if device.type == "cpu" or isinstance(ids, Shards) or len(ids) > 1 << 28:
        return ids
    return torch.from_numpy(ids.astype(np.int32)).to(device)


def windows(
    ids: np.ndarray | Shards | Tensor, starts: np.ndarray, block_size: int
) -> tuple[Tensor, Tensor]:
    """The windows of a stream that begin at `starts` (B,), in one indexed read.

    Returns x and y, both (B, T) int64: y[b, t] is the token after x[b, t]. Past the end of the
    stream x is 0 and y is -100, which the loss leaves out.

    >>> x, y = windows(np.array([5, 6, 7, 8]), np.array([0, 2]), block_size=2)
    >>> x.tolist(), y.tolist()
    ([[5, 6], [7, 8]], [[6, 7], [8, -100]])
    """
    at = torch.from_numpy(starts[:, None] + np.arange(block_size + 1))  # (B, T + 1)
    inside = at.clamp(max=len(ids) - 1)
    if isinstance(ids, Tensor):
        tokens, at = ids[inside.to(ids.device)].long(), at.to(ids.device)
    else:
        tokens = torch.from_numpy(ids[inside.numpy()].astype(np.int64))
    past_end = at >= len(ids)
    return tokens[:, :-1].masked_fill(past_end[:, :-1], 0), tokens[:, 1:].masked_fill(
        past_end[:, 1:], -100
    )


def get_batch(
    ids: np.ndarray | Shards | Tensor,
    block_size: int,
    batch_size: int,
    seed: int,
    number: int,
    docs: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """The windows of a run's batch of that number, x and y (B, T): a pure function of it and the
    seed, so nothing needs storing to resume.

    Each window begins 0.618 of the stream, a golden ratio, after the one before, going round at its
    end (Weyl 1916). So all of a text is read about equally often, and the windows of a batch lie
    far apart; drawn by chance, windows would miss an eighth of it in two epochs. The seed says
    where the first begins. With `docs`, the sorted beginnings of the documents, windows keep to
    them as `fit_documents` says.
    """
    n_starts = len(ids) - block_size if docs is None else len(ids)
    count = number * batch_size + np.arange(batch_size, dtype=np.uint64)  # windows before each one
    first = np.random.default_rng(seed).integers(1 << 64, dtype=np.uint64)
    place = first + count * np.uint64(0x9E3779B97F4A7C15)  # in 2^64ths, whose golden ratio that is
    starts = ((place >> np.uint64(11)) / (1 << 53) * n_starts).astype(np.int64)
    if docs is not None:
        starts = fit_documents(starts, docs, len(ids), block_size)
    return windows(ids, starts, block_size)


def mix_seed(seed: int, step: int, part: int) -> int:
    """A seed for the random numbers of one batch, such as dropout's."""
    return int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0])


def fit_documents(starts: np.ndarray, docs: np.ndarray, n_ids: int, block_size: int) -> np.ndarray:
    """Window starts (B,) so that no window runs over the end of a document longer than itself: of
    those that would, one half (the odd ones) begin at the document's beginning instead, the others
    end at its end, so that neither is rare. A window in a short document begins at its beginning,
    and goes on with the documents that follow; one that stands among long ones is seen less often.

    >>> fit_documents(np.array([1, 7, 8, 11]), docs=np.array([0, 10]), n_ids=13, block_size=4)
    array([ 1,  0,  6, 10])
    """
    document = np.searchsorted(docs, starts, side="right") - 1  # (B,)
    begins = docs[document]
    last = document + 1 == len(docs)
    ends = np.where(last, n_ids, docs[np.minimum(document + 1, len(docs) - 1)])
    # y reaches one token further than x: the separator of the next document, which ends this one.
    over = starts + block_size > ends
    at_end = np.where(starts % 2 == 0, np.maximum(ends - block_size, begins), begins)
    return np.where(over, at_end, starts)


def even_starts(n_ids: int, block_size: int, n_windows: int | None = None) -> np.ndarray:
    """Where the windows of an evaluation begin: n_windows evenly spaced ones, the same each time.

    None, or more than there are, stands for one behind the other over the whole stream, so that
    each token but the first is predicted exactly once.
    """
    every = np.arange(0, n_ids - 1, block_size)
    if n_windows is None or n_windows >= len(every):
        return every
    return np.linspace(0, n_ids - 1 - block_size, n_windows).astype(np.int64)


# --- machine: device and precision


def device_problems(name: str) -> list[str]:
    """What is wrong with a device name on this machine: a sentence, or nothing."""
    try:
        pick_device(name)
    except UserError as error:
        return [str(error)]
    return []


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU. Raises UserError for one
    that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind in there if there[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use cpu, cuda, cuda:1 or mps") from None
    if not there.get(device.type) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        have = ", ".join(kind for kind in there if there[kind])
        raise UserError(
            f"device {name!r} is not on this machine (it has {have}): use --device auto"
        )
    return device


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision of the matrix products and why: `auto` is the fastest that trains well on the
    device."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        return (
            ("bfloat16", "this GPU has it")
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else ("float16", "")
        )
    if device.type == "cpu":
        ratio = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
        if ratio > 1.5:  # less does not pay for the conversions around each product
            return (
                "bfloat16",
                f"its matrix products are {ratio:.1f} times as fast as float32's here",
            )
        return "float32", f"bfloat16's matrix products are {ratio:.1f} times as fast here"
    return "float32", ""


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones. Else Linux takes it
    back and clears it again, every step, and training on a CPU takes a quarter longer."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        m_mmap_max, m_trim_threshold = -4, -1  # from malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def matmul_seconds(dtype: torch.dtype) -> float:
    """The time of a product of two 512 x 512 matrices on the CPU, the best of several."""
    a = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which matrix products run in the given precision."""
    if precision not in ("bfloat16", "float16"):
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, getattr(torch, precision))


def pick_compile(wanted: bool | None, device: torch.device) -> bool:
    """Whether to use torch.compile: as asked, else where compiling something small works (on a CPU
    it takes a C++ compiler)."""
    if wanted is not None or device.type == "mps":
        return bool(wanted)
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of whatever kind: it only means that there is no compiling here
        print(f"not compiling: {str(error).splitlines()[0]}")
        return False
    return True


def memory_estimate(
    gpt: GPTConfig, n_params: int, config: TrainConfig, slices: int = 1
) -> dict[str, int]:
    """Bytes that training takes in a process, in parts: weights, gradients, the optimizer's
    averages (AdamW keeps two, Muon one), activations kept for the backward. The first three are cut
    in `slices` under FSDP.

    The activations are counted from the formulas of model.py: with GPT-2's parts 10 C + 3 F numbers
    a block and token, more with the newer parts, which take more operations (less where compiling
    joins these); with grad_checkpoint C alone and one block's. The logits are there twice, once as
    they are and once in float32.
    """
    width = 4 if config.precision == "float32" else 2
    C = 10 + 4 * (gpt.norm == "rmsnorm") + 4 * gpt.qk_norm + 2 * (gpt.pos == "rope")
    a_block = (C * gpt.n_embd + (5 if gpt.mlp == "swiglu" else 3) * gpt.n_inner) * width
    blocks = gpt.n_layer * a_block
    if config.grad_checkpoint:
        blocks = gpt.n_layer * gpt.n_embd * 4 + a_block
    a_token = blocks + gpt.vocab_size * (width + 8)
    weights = 4 * n_params // slices
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": weights * (1 if config.optimizer == "muon" else 2),
        "activations": config.batch_size * gpt.block_size * a_token,
    }


# --- checkpoints

CHECKPOINT_KEYS = {
    "gpt_config",
    "train_config",
    "tokenizer",
    "corpus",
    "model",
    "optimizers",
    "scaler",
    "step",
    "log",
}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all: plain dicts, lists, numbers, strings and tensors
    only."""
    assert state.keys() >= CHECKPOINT_KEYS
    with atomic_write(path) as file:
        torch.save(state, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU. Raises UserError for a file that is missing, damaged, or
    no checkpoint of this program."""
    state = read_data(path)
    if not isinstance(state, dict) or not state.keys() >= CHECKPOINT_KEYS:
        raise UserError(f"{path} was refused: it is not a checkpoint of this program")
    return state


def read_data(path: Path) -> Any:
    """What torch.save wrote, on the CPU. It is read as data only: a file from a stranger cannot run
    code. Raises UserError for a file that is missing or damaged."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with `python train.py`")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        unsafe = "GLOBAL" in str(error)  # the pickle asks for a function to call
        reason = "it holds code, which is never run" if unsafe else "it is damaged or no checkpoint"
        raise UserError(f"{path} was refused: {reason}") from None


def load_checkpoint(
    path: Path, device: torch.device
) -> tuple[GPT, tokenizers.Tokenizer, dict[str, Any]]:
    """The model, on the device and in eval mode, its tokenizer, and all else that the checkpoint
    holds."""
    state = read_checkpoint(path)
    try:
        config = from_dict(GPTConfig, state["gpt_config"])
        raise_problems(config.problems())
        model = GPT(config)
        model.load_state_dict(state["model"])
        tokenizer = tokenizers.from_dict(state["tokenizer"])
    except (UserError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} was refused: its parts do not fit together ({str(error).splitlines()[0]})"
        ) from None
    return model.to(device).eval(), tokenizer, state


def newest_checkpoint(out_dir: Path) -> Path:
    """best.pt, else latest.pt, of the run in out_dir, or a folder in it, that was written last."""
    names = ("best.pt", "latest.pt")
    files = [file for name in names for file in (*out_dir.glob(name), *out_dir.glob(f"*/{name}"))]
    if not files:
        raise UserError(f"there is no checkpoint in {out_dir}/: train one with `python train.py`")
    run_dir = max(files, key=lambda file: file.stat().st_mtime).parent
    return next(run_dir / name for name in names if (run_dir / name).exists())
