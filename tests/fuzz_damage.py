"""The ways in which tests damage a file."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from system.settings import UserError

# Put in place of a file of another kind.
OTHER_FILES = (
    *("photos/cat.jpg", "data/qa.json", "data/input.txt", "data/set/train_docs.npy"),
    *("checkpoints/char/best.pt", "checkpoints/lora/adapter.pt", "hf/model.safetensors"),
)
CONTENTS = (
    *(b"", b"x", b"\n\n", b"\r", b"\0" * 9, b"\xff\xfe", b"\xef\xbb\xbf", b"[]", b"{}", b"null"),
    *(b"[" * 9999, b'{"text": 1}', b"<|endoftext|>" * 3),
)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 7, 2**31, 2**70, 10**9, 1.5, 1e300, float("nan"))
VALUES += (float("inf"), "", "x", "char", "\ud800", [], {}, [1], ["x"], [[]], {"x": 1})

# The new bytes of a file, from those that it has, and a position in them. None: no file any more.
BYTES: dict[str, Callable[[bytes, int, random.Random], bytes | None]] = {
    "cut": lambda raw, at, rng: raw[:at],
    "flip": lambda raw, at, rng: patched(raw, at, [raw[at] ^ 1 << rng.randrange(8)] if raw else []),
    "zeros": lambda raw, at, rng: patched(raw, at, bytes(64)),
    "noise": lambda raw, at, rng: patched(raw, at, rng.randbytes(16)),
    "append": lambda raw, at, rng: raw + rng.randbytes(rng.choice([1, 3, 100])),
    "content": lambda raw, at, rng: rng.choice(CONTENTS),
    "other file": lambda raw, at, rng: Path(rng.choice(OTHER_FILES)).read_bytes(),
    "remove": lambda raw, at, rng: None,
    "folder": lambda raw, at, rng: None,
}
# The new values of token ids or document starts.
ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "empty": lambda ids: ids[:0],
    "one value": lambda ids: ids[:1],
    "largest values": lambda ids: np.full_like(ids, 65535),
    "reversed": lambda ids: ids[::-1],
    "two dimensions": lambda ids: ids[None],
    "no dimension": lambda ids: np.array(3),
    "fractions": lambda ids: ids / 3,
    "negative": lambda ids: -1 - ids.astype(np.int64),
    "text": lambda ids: ids.astype("U5"),
    "NaN": lambda ids: ids * np.nan,
}


def patched(raw: bytes, at: int, new: Any) -> bytes:
    """The same number of bytes, with new ones from a position on."""
    return (raw[:at] + bytes(new) + raw[at + len(new) :])[: len(raw)]


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file: its bytes or, if it contains values, one or all of them. Returns how."""
    if path.suffix in FORMATS and rng.random() < 0.7:
        load, save = FORMATS[path.suffix]
        values = load(path)
        if isinstance(values, np.ndarray):
            how = rng.choice(list(ARRAYS))
            values = ARRAYS[how](values)
        else:
            how = damage_tree(values, rng)
        save(values, path)
        return how
    raw, how = path.read_bytes(), rng.choice(list(BYTES))
    at = rng.randrange(len(raw) or 1)
    new = BYTES[how](raw, at, rng)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif new is not None:
        path.write_bytes(new)
    return f"{how}, at byte {at}: {(new or b'')[at:][:12]!r}"


def damage_tree(tree: Any, rng: random.Random) -> str:
    """Change one entry of nested dicts and lists, at a random depth. Returns where and how."""
    place = ""
    while True:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        child, place = tree[key], f"{place}[{key!r}]"
        if not (isinstance(child, dict | list) and child and rng.random() < 0.85):
            break
        tree = child
    how = rng.choice(["remove", "rename", "set", "set", "set", "set"])
    if how == "set" or isinstance(tree, list):
        tree[key] = damage_value(child, rng)
        return f"{place} = {' '.join(ascii(tree[key]).split())[:60]}"
    del tree[key]
    if how == "rename":
        tree[f"{key}x"] = child
    return f"{how} {place}"


def damage_value(value: Any, rng: random.Random) -> Any:
    """Another value, often of another type or shape."""
    if not isinstance(value, torch.Tensor) or rng.random() < 0.2:
        return rng.choice(VALUES)
    types = [value.long(), value.half(), value.double(), value.to(torch.complex64)]
    shapes = [value[1:] if value.dim() else value[None], value.flatten(), value[None]]
    return rng.choice([*types, *shapes, value * float("nan"), value * 0 + 2**31])


def split_safetensors(path: Path) -> tuple[bytes, bytes]:
    """The header, a JSON object after its length in 8 bytes, and the rest."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def save_header(header: Any, path: Path) -> None:
    text, rest = json.dumps(header).encode(), split_safetensors(path)[1]
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


# How files with values are read and written.
FORMATS: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Path], Any]]] = {
    ".pt": (partial(torch.load, weights_only=True), torch.save),
    ".json": (
        lambda path: json.loads(path.read_text("utf-8")),
        lambda tree, path: path.write_text(json.dumps(tree)),
    ),
    ".jsonl": (
        lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()],
        lambda tree, path: path.write_text("\n".join(map(json.dumps, tree)) + "\n"),
    ),
    ".safetensors": (lambda path: json.loads(split_safetensors(path)[0]), save_header),
    ".npy": (np.load, lambda ids, path: np.save(path, ids)),
    ".bin": (partial(np.fromfile, dtype=np.uint16), np.ndarray.tofile),
}


# --- one entry after the other

WRONG = (None, "x", -1, [], {}, math.nan, 1e30, "\ud800")


def changed_copies(
    content: dict, wrong: Sequence[Any], keys: tuple = ()
) -> Iterator[tuple[tuple, dict]]:
    """Copies of nested dicts with one entry removed, renamed or replaced by something wrong, each
    with the keys that lead to it and what was done. Of a list of dicts, in the first of them."""
    for key, value in content.items():
        rest = {k: v for k, v in content.items() if k != key}
        yield (*keys, key, "removed"), rest
        yield (*keys, key, "renamed"), rest | {f"{key}_": value}
        replaced = list(wrong)
        if isinstance(value, torch.Tensor):
            replaced += [value.double(), value.int(), value.flatten(), value.flatten()[1:]]
            replaced += [value * math.nan, value + math.inf, value[None], value.to_sparse()]
            replaced += [value.cfloat()]
        if isinstance(value, list):
            replaced += [value[1:], [*value, "x"], [*value, None], [{}]]
        yield from (((*keys, key, repr(v)[:20]), content | {key: v}) for v in replaced)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict):
            for path, inner in changed_copies(first, wrong, (*keys, key)):
                yield path, content | {key: inner if first is value else [inner, *value[1:]]}


def n_rejected(
    content: dict, n: int, seed: int, use: Callable[[], object], path: Path, rest: dict
) -> int:
    """How many of n changed copies of a file raise a UserError of one line; `use` may fail in no
    other way. rest: what is in the file besides, unchanged."""
    wrong = [*WRONG, *([10**9, torch.zeros(2)] if path.suffix == ".pt" else [10**30])]
    found, copies = 0, list(changed_copies(content, wrong))
    for keys, copy in random.Random(seed).sample(copies, min(n, len(copies))):
        FORMATS[path.suffix][1](rest | copy, path)
        try:
            use()
        except UserError as error:
            assert "\n" not in str(error)
            found += 1
        except Exception as error:
            raise AssertionError(keys) from error
    return found
