"""The folder of a data set: its files, their hashes, and whether they have them when it is opened.

The manifest has the hashes of the other files and its own. SHA-256 takes 0.7 s per GB here.
"""

import hashlib
import itertools
import json
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from corpus.corpus import Corpus
from corpus.documents import note_shared
from corpus.text import file_sha256, read_blocks
from system.settings import UserError, first_line
from tokenizer import END_OF_TEXT, Tokenizer

TOKENS = ("train.bin", "val.bin")
HASHED = ("tokenizer.json", "train_docs.npy")  # besides the token files
# Also those of older versions: parts of the token files, and .verified.json
FILES = r"(train|val)(_\d{5,})?\.bin|train_docs\.npy|(tokenizer|manifest|\.verified)\.json(\.part)?"


def read_tokens(folder: Path, dtype: str) -> tuple[str, int]:
    """The SHA-256 of the concatenated token files, and the highest id."""
    digest, highest = hashlib.sha256(), 0
    total = sum((folder / name).stat().st_size for name in TOKENS)
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
    with tqdm(total=total, desc="verifying", delay=1, **options) as bar:
        for raw in itertools.chain(*(read_blocks(folder / name) for name in TOKENS)):
            digest.update(raw)
            highest = max(highest, int(np.frombuffer(raw, dtype).max()))
            bar.update(len(raw))
    return digest.hexdigest(), highest


def checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["sha256"], _ = read_tokens(folder, manifest["dtype"])
    manifest["files"] = {name: file_sha256(folder / name) for name in HASHED}  # they are complete
    manifest["checksum"] = checksum(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set. Raises ValueError if a hash differs or an id is not a token."""
    if devices := [path for path in folder.iterdir() if not (path.is_file() or path.is_dir())]:
        raise ValueError(f"{devices[0].name} is not a file")  # reading one may never end
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["checksum"] != checksum(manifest):
        raise ValueError("manifest.json does not have its checksum")
    for name, sha256 in manifest["files"].items():
        if file_sha256(folder / name) != sha256:
            raise ValueError(f"{name} does not have its hash")
    sha256, highest = read_tokens(folder, manifest["dtype"])
    if sha256 != manifest["sha256"]:
        raise ValueError("the token ids do not have their hash")
    if highest >= manifest["vocab_size"]:
        raise ValueError(f"id {highest} in a vocabulary of {manifest['vocab_size']}")
    return manifest


def is_dataset_file(path: Path) -> bool:
    """Whether a file has a name that prepare.py gives."""
    return re.fullmatch(FILES, path.name) is not None


def map_ids(path: Path, dtype: str) -> np.ndarray:
    """The token ids in a file, through a memory map: data is read when it is indexed."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(memory, "madvise"):
        # Reading ahead makes windows at random positions 50 times slower.
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype)


def open_dataset(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, Corpus]:
    """Open a data set made by prepare.py, through memory maps. Raises UserError if it is damaged,
    see `read_manifest`, or if its tokenizer differs from `tokenizer`."""
    try:
        manifest = read_manifest(folder)
        tokenizer_dict = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        own_tokenizer = tokenizers.from_dict(tokenizer_dict)
        splits = [manifest["splits"][split] for split in ("train", "val")]
        train_ids, val_ids = (map_ids(folder / name, manifest["dtype"]) for name in TOKENS)
        info = {
            "name": manifest["name"],
            "sha256": manifest["sha256"],
            "bytes": sum(source["bytes"] for source in manifest["sources"]),
            "documents": sum(split["documents"] for split in splits),
        }
        train_bytes, val_bytes = (split["bytes"] for split in splits)
        train_docs = np.load(folder / "train_docs.npy", mmap_mode="r")
        separator = own_tokenizer.specials[END_OF_TEXT] if info["documents"] > 1 else None
        note_shared(manifest["shared_documents"], splits[1]["documents"])
    except MemoryError:
        raise
    except Exception as error:  # damage raises errors of many types
        raise UserError(
            f"{folder}/ is not a data set made by prepare.py, or is damaged "
            f"({first_line(error)[:200]}): run "
            "`python prepare.py FILE ... --name NAME`, then give --data data/NAME"
        ) from None
    if tokenizer is not None and tokenizer.to_dict() != tokenizer_dict:
        raise UserError(
            f"{folder}/ was made with another tokenizer than the checkpoint's: make it with "
            "`python prepare.py FILE ... --name NAME --tokenizer CHECKPOINT`"
        )
    corpus = Corpus(train_ids, val_ids, info, train_bytes, val_bytes, train_docs, separator)
    return own_tokenizer, corpus
