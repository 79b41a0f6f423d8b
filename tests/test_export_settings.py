"""Every setting of the model is represented by an export, or the export refuses the model."""

from dataclasses import Field, fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMPONENTS, make_model, to_transformers
from exports import save_model

import utils
from config import ARCHS, GPTConfig
from exporting import hf_model, web_page
from exporting.gguf_file import gguf_writer, write_gguf
from exporting.hf_model import CUSTOM, arch_or_custom, config_from_hf, config_to_hf, matching_arch
from model import GPT
from system.settings import UserError, setting
from tokenizer import CharTokenizer

pytest.importorskip("gguf")
pytest.importorskip("safetensors")
LETTERS = CharTokenizer.train(["abcdefghij\n"])  # 11 tokens, as the models of make_model have
OTHER_NUMBERS = {"vocab_size": 13, "block_size": 14, "n_layer": 3, "n_head": 4, "n_embd": 24}
OTHER_NUMBERS |= {"n_kv_head": 1, "head_size": 6, "n_inner": 40, "dropout": 0.5, "norm_eps": 0.3}
MADE_UP = ("made_up", int, setting(0, "a setting that no export knows", low=0))
NewConfig: Any = make_dataclass("NewConfig", [MADE_UP], bases=(GPTConfig,))


def other_values(f: Field, value: Any) -> list[Any]:
    if f.type is bool:
        return [not value]
    choices = f.metadata.get("choices")
    return [c for c in choices if c != value] if choices else [OTHER_NUMBERS.get(f.name, value + 1)]


def gguf_file(model: GPT) -> bytes:
    tokenizer = CharTokenizer.train(["abcdefghijklm"[: model.config.vocab_size]])
    write_gguf(gguf_writer(model, tokenizer, "float32"), Path("model.gguf"))
    return Path("model.gguf").read_bytes()


@pytest.mark.parametrize("name", [f.name for f in fields(GPTConfig)])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_setting_is_represented_or_refused(tmp_path, monkeypatch, arch, name):
    monkeypatch.chdir(tmp_path)
    plain, idx = make_model(**ARCHS[arch]), torch.arange(11)[None]
    (f,) = (f for f in fields(GPTConfig) if f.name == name)
    for value in other_values(f, getattr(plain.config, name)):
        model = make_model(**(ARCHS[arch] | {name: value}))
        logits, found = model(idx)[0], arch_or_custom(model.config)
        content = config_to_hf(model.config, found, {})
        if found == CUSTOM:  # the folder has all settings, and model.py, which reads them
            assert config_from_hf(content)[0] == model.config != plain.config
            with pytest.raises(UserError, match="no standard architecture has these components"):
                gguf_file(model)
            continue
        assert torch.allclose(to_transformers(model, found)(idx).logits, logits, atol=1e-4)
        assert gguf_file(model) != gguf_file(plain) or torch.equal(logits, plain(idx)[0])


def test_the_page_has_the_settings_that_its_tests_change():
    sizes = {"vocab_size", "block_size", "n_layer", "n_embd", "n_inner", "norm_eps", "rope_theta"}
    assert set(web_page.IMPLEMENTED.split()) == sizes.union(*COMPONENTS)


def page_data(config: GPTConfig) -> dict[str, Any]:
    state = {"corpus": {"name": "", "sha256": ""}, "step": 0, "log": [], "train_config": {}}
    return web_page.page_data(GPT(config), LETTERS, state)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_setting_that_no_export_knows_is_refused(tmp_path, monkeypatch, arch):
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 11, "block_size": 12, "n_layer": 1, "n_head": 2, "n_embd": 8}
    config = NewConfig(**ARCHS[arch], **sizes)
    assert matching_arch(config) == arch  # with its default, it changes nothing
    assert page_data(config)["config"]["made_up"] == 0
    monkeypatch.setattr(hf_model, "GPTConfig", NewConfig)  # 0 is a valid value, as of n_head
    assert config_from_hf(config_to_hf(config, CUSTOM, {})) == (config, CUSTOM)
    config.made_up = 1
    with pytest.raises(UserError, match=f"{arch} is nearest, but it has no made_up"):
        gguf_writer(GPT(config), LETTERS, "float32")
    with pytest.raises(UserError, match="a web page does not have made_up"):
        page_data(config)
    assert arch_or_custom(config) == CUSTOM
    assert config_to_hf(config, CUSTOM, {})["made_up"] == 1


def test_a_file_with_an_unknown_setting_is_refused(tmp_path):
    model = make_model(**ARCHS["llama"])
    path = tmp_path / "model.pt"
    save_model(path, model, LETTERS, gpt_config=vars(model.config) | {"made_up": 0})
    with pytest.raises(UserError, match=r"invalid checkpoint .*model\.pt: .*made_up"):
        utils.load_checkpoint(path)
