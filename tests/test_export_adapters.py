"""Adapters are exported complete, or rejected with the reason."""

import os
from pathlib import Path

import pytest
from conftest import make_model
from exports import make_adapter

import export
from config import ARCHS
from finetuning.lora import save_adapter
from system.settings import UserError
from tokenizer import CharTokenizer

pytest.importorskip("safetensors")
LETTERS = CharTokenizer.train(["abcdefghij\n"])  # 11 tokens, as the models of make_model have


def test_an_adapter_replaces_only_an_export_and_only_with_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = []
    for seed, flags in enumerate(([], ["--overwrite"])):
        save_adapter(Path("adapter.pt"), make_adapter(make_model(seed, **ARCHS["llama"]), LETTERS))
        assert export.main(["adapter.pt", "out", *flags]) == 0
        weights.append(Path("out/adapter_model.safetensors").read_bytes())
        with pytest.raises(UserError, match="out exists"):
            export.main(["adapter.pt", "out"])
    assert weights[0] != weights[1]
    assert sorted(os.listdir()) == ["adapter.pt", "out"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda adapter: adapter["gpt_config"].update(n_layer="1"),
        lambda adapter: adapter["gpt_config"].update(n_embd=10**9),
        lambda adapter: adapter["gpt_config"].update(made_up=0),
        lambda adapter: adapter["lora"].pop("lora_rank"),
        lambda adapter: adapter["tensors"].pop("blocks.0.attn.qkv.B"),
        lambda adapter: adapter.update(lora=None),
        lambda adapter: adapter.update(tensors=None),
    ],
)
def test_a_damaged_adapter_is_an_error(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(make_model(**ARCHS["llama"]), LETTERS)
    damage(adapter)
    save_adapter(Path("adapter.pt"), adapter)
    with pytest.raises(UserError, match=r"invalid checkpoint adapter\.pt: ") as error:
        export.main(["adapter.pt", "out"])
    assert "\n" not in str(error.value)
    assert os.listdir() == ["adapter.pt"]
