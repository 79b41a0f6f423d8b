"""The ways in which tests/fuzz.py damages a file."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Put in place of a file of another kind.
OTHER_FILES = (
    *("photos/cat.jpg", "data/qa.json", "data/input.txt", "data/set/train_docs.npy"),
    *("checkpoints/char/best.pt", "checkpoints/lora/adapter.pt", "hf/model.safetensors"),
)
CONTENTS = (
    b"",
    b"x",
    b"\n\n",
    b"\r",
    b"\0" * 9,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[]",
    b"{}",
    b"null",
)
CONTENTS += (b"[" * 9999, b'{"text": 1}', b"<|endoftext|>" * 3)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 7, 2**31, 2**70, 10**9, 1.5, 1e300, float("nan"))
VALUES += (float("inf"), "", "x", "char", "\ud800", [], {}, [1], ["x"], [[]], {"x": 1})


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file: its bytes or, if it contains named values, one of them. Returns how."""
    if path.suffix in STRUCTURED and rng.random() < 0.7:
        return STRUCTURED[path.suffix](path, rng)
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw) or 1)
    how = rng.choice(
        ["cut", "flip", "zeros", "noise", "append", "content", "other", "remove", "folder"]
    )
    if how == "cut":
        del raw[at:]
    elif how == "flip" and raw:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif how == "noise":
        raw[at : at + 16] = rng.randbytes(len(raw[at : at + 16]))
    elif how == "append":
        raw += rng.randbytes(rng.choice([1, 3, 100]))
    elif how == "content":
        raw = bytearray(rng.choice(CONTENTS))
        how = f"content {bytes(raw[:12])!r}"
    elif how == "other":
        name = rng.choice(OTHER_FILES)
        raw = bytearray(Path(name).read_bytes())
        how = f"the content of {name}"
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "remove":
        path.write_bytes(raw)
    return f"{how}, byte {at}" if how in ("cut", "flip", "zeros", "noise") else how


def damage_value(value: Any, rng: random.Random) -> Any:
    """Another value, often of another type or shape."""
    if not isinstance(value, torch.Tensor) or rng.random() < 0.2:
        return rng.choice(VALUES)
    types = [value.long(), value.half(), value.double(), value.to(torch.complex64)]
    shapes = [value[1:] if value.dim() else value[None], value.flatten(), value[None]]
    return rng.choice([*types, *shapes, value * float("nan"), value * 0 + 2**31])


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


def damage_checkpoint(path: Path, rng: random.Random) -> str:
    state = torch.load(path, weights_only=True)
    how = damage_tree(state, rng)
    torch.save(state, path)
    return how


def damage_json(path: Path, rng: random.Random) -> str:
    tree = json.loads(path.read_text())
    how = damage_tree(tree, rng)
    path.write_text(json.dumps(tree))
    return how


def damage_jsonl(path: Path, rng: random.Random) -> str:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    how = damage_tree(records, rng)
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return how


def damage_safetensors(path: Path, rng: random.Random) -> str:
    """Change the header: the length of a JSON object in 8 bytes, and the object."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    how = damage_tree(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return how


def damage_array(path: Path, rng: random.Random) -> str:
    """Change all values, the shape or the type of token ids or document starts."""
    is_npy = path.suffix == ".npy"
    ids = np.load(path) if is_npy else np.fromfile(path, np.uint16)
    how, new = rng.choice(
        [
            ("empty", ids[:0]),
            ("one value", ids[:1]),
            ("largest values", np.full_like(ids, 65535)),
            ("reversed", ids[::-1]),
            ("two dimensions", ids[None]),
            ("no dimension", np.array(3)),
            ("fractions", ids / 3),
            ("negative", -1 - ids.astype(np.int64)),
            ("text", ids.astype("U5")),
            ("NaN", ids * np.nan),
        ]
    )
    np.save(path, new) if is_npy else new.tofile(path)
    return how


STRUCTURED = {
    ".pt": damage_checkpoint,
    ".json": damage_json,
    ".jsonl": damage_jsonl,
    ".npy": damage_array,
    ".bin": damage_array,
    ".safetensors": damage_safetensors,
}
