"""Adapters are exported complete, or rejected with the reason."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import export
from config import ARCHS, GPTConfig
from exporting.folders import MARKER
from finetuning.lora import LoRAConfig, add_lora, save_adapter, trained_names
from model import GPT
from system.settings import UserError
from tokenizer import CharTokenizer

pytest.importorskip("safetensors")


def make_adapter() -> dict[str, Any]:
    """An adapter of a small Llama with random weights."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 5}
    model, settings = GPT(GPTConfig(**(ARCHS["llama"] | sizes))), LoRAConfig(lora_rank=2)
    gpt_config = vars(model.config).copy()
    add_lora(model, settings)
    weights, trained = model.state_dict(), trained_names(model)
    return {
        "lora": vars(settings),
        "base_sha256": "",
        "gpt_config": gpt_config,
        "tokenizer": CharTokenizer.train(["abcde"]).to_dict(),
        "tensors": {name: torch.randn_like(weights[name]) for name in trained},
    }


def test_an_exported_adapter_is_replaced_and_other_folders_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(Path("adapter.pt"), make_adapter())
    assert export.main(["adapter.pt", "out"]) == 0
    before = Path("out/adapter_model.safetensors").read_bytes()
    save_adapter(Path("adapter.pt"), make_adapter())
    with pytest.raises(UserError, match="out exists"):
        export.main(["adapter.pt", "out"])
    assert export.main(["adapter.pt", "out", "--overwrite"]) == 0
    assert Path("out/adapter_model.safetensors").read_bytes() != before
    Path(f"out/{MARKER}").unlink()  # as of any other program
    with pytest.raises(UserError, match=r"out/ was not written by export\.py"):
        export.main(["adapter.pt", "out", "--overwrite"])
    assert sorted(os.listdir()) == ["adapter.pt", "out"]


NAME = "blocks.0.attn.qkv.B"


@pytest.mark.parametrize(
    "damage",
    [
        lambda adapter: adapter["gpt_config"].update(n_layer="1"),
        lambda adapter: adapter["gpt_config"].update(n_head=3),
        lambda adapter: adapter["gpt_config"].update(n_head=8),
        lambda adapter: adapter["gpt_config"].update(n_layer=10**9),
        lambda adapter: adapter["gpt_config"].update(n_embd=10**9),
        lambda adapter: adapter["lora"].pop("lora_rank"),
        lambda adapter: adapter["lora"].pop("lora_alpha"),
        lambda adapter: adapter["lora"].update(lora_rank=3),
        lambda adapter: adapter.update(lora=None),
        lambda adapter: adapter.update(tensors=None),
        lambda adapter: adapter["tensors"].pop(NAME),
        lambda adapter: adapter["tensors"].update({NAME: None}),
        lambda adapter: adapter["tensors"].update({NAME: torch.ones(3, 2)}),
        lambda adapter: adapter["tensors"][NAME].fill_(float("nan")),
        lambda adapter: adapter["tensors"].update({"blocks.7.attn.qkv.A": torch.ones(2, 8)}),
        lambda adapter: adapter["tensors"].update({"blocks.0.attn.qkv.A": torch.ones(2, 9)}),
    ],
)
def test_a_damaged_adapter_is_an_error(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter()
    damage(adapter)
    save_adapter(Path("adapter.pt"), adapter)
    with pytest.raises(UserError) as error:
        export.main(["adapter.pt", "out"])
    assert "\n" not in str(error.value)
    assert os.listdir() == ["adapter.pt"]
