"""A damaged folder is rejected in one line, or imported as if it was not damaged."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_text
from exports import save_model
from fuzz_damage import BYTES, n_rejected

import utils
from config import ARCHS, GPTConfig
from corpus.bpe import count_pieces, train_bpe
from exporting.folders import MARKER
from exporting.huggingface import export_hf, import_hf
from model import GPT
from system.settings import UserError
from tokenizer import CharTokenizer, Tokenizer

pytest.importorskip("safetensors")
TEXT = make_text(20)
READ = ("config.json", "tokenizer.json", "model.safetensors")


def make_folder(folder: Path, arch: str, tokenizer: Tokenizer) -> Path:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_inner": 8, "block_size": 8}
    config = GPTConfig(**(ARCHS[arch] | sizes | {"vocab_size": tokenizer.vocab_size}))
    torch.manual_seed(0)
    save_model(folder.parent / "model.pt", GPT(config), tokenizer)
    export_hf(folder.parent / "model.pt", folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exported")
    return {
        "llama": make_folder(place / "llama", "llama", CharTokenizer.train([TEXT])),
        "gpt2": make_folder(place / "gpt2", "gpt2", train_bpe(count_pieces([TEXT]), 280)),
    }


def result(folder: Path) -> tuple[torch.Tensor, list[int]]:
    path = folder.parent / "imported.pt"
    path.unlink(missing_ok=True)
    import_hf(str(folder), path)
    model, tokenizer, _ = utils.load_checkpoint(path, torch.device("cpu"))
    return model(torch.arange(8)[None])[0], tokenizer.encode(TEXT).tolist()


def assert_equal(folder: Path, expected: tuple[torch.Tensor, list[int]]) -> None:
    logits, ids = result(folder)
    assert logits.shape == expected[0].shape and torch.equal(logits, expected[0])
    assert ids == expected[1]


def is_rejected(folder: Path, expected: tuple[torch.Tensor, list[int]]) -> bool:
    """Whether a folder is rejected, in one line. Otherwise the import must be as expected."""
    try:
        assert_equal(folder, expected)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return True
    return False


WAYS = ("cut", "flip", "zeros", "noise")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [*READ, MARKER])
def test_changed_bytes_of_an_export_are_found(tmp_path, exported, arch, name):
    expected, folder, rng = result(exported[arch]), tmp_path / "out", random.Random(arch + name)
    shutil.copytree(exported[arch], folder)
    data = (folder / name).read_bytes()
    for way in 6 * WAYS:
        changed = BYTES[way](data, rng.randrange(len(data)), rng)
        (folder / name).write_bytes(changed)
        # a hash of a file that is not read is not compared
        assert is_rejected(folder, expected) or name == MARKER or changed == data


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_changed_bytes_of_a_foreign_folder_are_never_a_traceback(tmp_path, exported, arch):
    folder, rng = tmp_path / "out", random.Random(arch)
    shutil.copytree(exported[arch], folder)
    (folder / MARKER).unlink()  # without hashes
    for name in READ:
        data = (folder / name).read_bytes()
        head = 600 if name == "model.safetensors" else len(data)  # other numbers are valid
        for way in 12 * WAYS:
            changed = BYTES[way](data[:head], rng.randrange(head), rng)
            (folder / name).write_bytes(changed + data[head:])
            with contextlib.suppress(UserError):
                result(folder)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_changed_values_are_rejected_or_do_not_matter(tmp_path, exported, arch, name):
    expected, folder = result(exported[arch]), tmp_path / "out"
    shutil.copytree(exported[arch], folder)
    (folder / MARKER).unlink()
    content = json.loads((folder / name).read_text())
    free = content.keys() & {"rms_norm_eps", "layer_norm_epsilon"}  # of any positive number
    rest = {key: content.pop(key) for key in free}
    use = partial(assert_equal, folder, expected)
    assert n_rejected(content, 120, 0, use, folder / name, rest) > 40


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to(path.name)),
        *map(write, ["", "{", "[]", "null", "5", "{}", "[" * 100_000, "1" * 5000, '{"a": NaN}']),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    ],
)
def test_files_of_other_kinds_are_errors(tmp_path, exported, name, damage):
    expected = result(exported["llama"])
    for marker in (True, False):
        folder = tmp_path / f"out{marker}"
        shutil.copytree(exported["llama"], folder)
        damage(folder / name)
        if not marker:
            (folder / MARKER).unlink()
        assert is_rejected(folder, expected)
        assert not (tmp_path / "imported.pt").exists()


def test_all_files_of_the_weights_are_read(tmp_path, exported):
    library = pytest.importorskip("safetensors.torch")
    expected, folder = result(exported["llama"]), tmp_path / "out"
    shutil.copytree(exported["llama"], folder)
    tensors = library.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / MARKER).unlink()
    for i in (1, 2):
        chosen = {name: tensors[name] for name in sorted(tensors)[i - 1 :: 2]}
        library.save_file(chosen, folder / f"model-0000{i}-of-00002.safetensors")
    assert not is_rejected(folder, expected)
    first = folder / "model-00001-of-00002.safetensors"
    shutil.copy(first, folder / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match="has the weights of several models"):
        result(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    first.unlink()
    with pytest.raises(UserError, match="has no tensor"):
        result(folder)
