"""Low-rank adapters: the formula, gradients equal to peft's, merging, files, other bases."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, to_transformers
from exports import make_adapter
from torch import nn

import export
from config import ARCHS
from finetuning import lora
from finetuning.lora import LoRAConfig, LoRALinear
from finetuning.new_tokens import EMBEDDINGS
from model import GPT, NORMS
from system.files import save_checkpoint
from system.settings import UserError
from tokenizer import CharTokenizer
from training.resume import weights_sha256

SIZES = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
TOKENIZER = CharTokenizer([chr(ord("a") + i) for i in range(31)])


def make_adapted(arch: str = "gpt2", **settings: object) -> tuple[GPT, dict]:
    model = make_model(**SIZES, **ARCHS[arch])
    config = LoRAConfig(**{"lora_rank": 3, "lora_targets": "all", **settings})
    return model, make_adapter(model, TOKENIZER, config)


def test_an_adapter_adds_alpha_over_rank_times_b_a_x():
    layer = LoRALinear(nn.Linear(5, 4), LoRAConfig(lora_rank=2, lora_alpha=6.0, lora_dropout=0.0))
    layer.B.data.normal_()
    x = torch.randn(7, 5)
    for row, y in zip(x, layer(x), strict=True):
        expected = layer.weight @ row + layer.bias + 3.0 * (layer.B @ (layer.A @ row))
        assert torch.allclose(y, expected, atol=1e-5)


def test_a_keeps_the_size_of_its_input_and_b_starts_at_zero():
    torch.manual_seed(0)
    for n_in in (100, 1600):
        layer = LoRALinear(nn.Linear(n_in, 8), LoRAConfig(lora_rank=8))
        assert layer.A.shape == (8, n_in) and not layer.B.any()
        assert layer.A.std().item() == pytest.approx(n_in**-0.5, rel=0.1)


def test_dropout_applies_to_the_input_of_the_update_in_training_only():
    layer = LoRALinear(nn.Linear(200, 4), LoRAConfig(lora_rank=4, lora_dropout=0.25)).train()
    layer.B.data.normal_()
    x = torch.ones(1, 200)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(x, 0.25)
    torch.manual_seed(1)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), plain + 8.0 * (kept @ layer.A.T) @ layer.B.T, atol=1e-4)
    assert torch.allclose(layer.eval()(x), plain + 8.0 * (x @ layer.A.T) @ layer.B.T, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_new_adapter_changes_nothing(arch):
    base, adapted = (make_model(**SIZES, **ARCHS[arch]) for _ in range(2))
    lora.add_lora(adapted, LoRAConfig(lora_rank=4, lora_targets="all"))
    idx = torch.randint(31, (2, 9))
    assert torch.equal(base(idx)[0], adapted.eval()(idx)[0])
    assert all(n.endswith((".A", ".B")) for n in lora.trained_names(adapted))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("targets", lora.TARGETS)
def test_merged_equals_unmerged(arch, targets):
    model, adapter = make_adapted(arch, lora_targets=targets)
    weights = model.state_dict()
    merged = make_model(1, **SIZES, **ARCHS[arch])
    idx = torch.randint(31, (2, 9))
    merged.load_state_dict({n: w for n, w in weights.items() if not n.endswith((".A", ".B"))})
    assert not torch.allclose(merged(idx)[0], model(idx)[0], atol=1e-2)  # the adapter has an effect
    scale = LoRAConfig(**adapter["lora"]).scale
    merged.load_state_dict(lora.merge_adapter(weights, scale))
    scale = model(idx)[0].abs().max().item()
    assert torch.allclose(merged(idx)[0], model(idx)[0], atol=1e-5 * max(scale, 1))


def test_a_rank_above_the_smaller_side_is_rejected():
    lora.add_lora(make_model(**SIZES), LoRAConfig(lora_rank=32))
    with pytest.raises(UserError, match=r"lora_rank 33 is above the smaller side of attn\.qkv, 32"):
        lora.add_lora(make_model(**SIZES), LoRAConfig(lora_rank=33))


def test_an_adapter_file_contains_only_the_trained_matrices(tmp_path: Path, monkeypatch):
    model, adapter = make_adapted(lora_targets="qkv")
    path = tmp_path / "adapter.pt"
    save_checkpoint(path, adapter)
    read = lora.read_adapter(path)
    assert set(read["tensors"]) == {f"blocks.{i}.attn.qkv.{m}" for i in (0, 1) for m in "AB"}
    assert path.stat().st_size < 0.2 * 4 * model.num_params()
    monkeypatch.delitem(NORMS, "layernorm")  # a bug, not a damaged file
    with pytest.raises(KeyError, match="layernorm"):
        lora.read_adapter(path)


def test_an_adapter_for_another_base_is_rejected():
    _, adapter = make_adapted()

    def check(model: GPT, tokenizer: CharTokenizer = TOKENIZER, **settings: int) -> None:
        config, sha256 = replace(model.config, **settings), weights_sha256(model.state_dict())
        lora.check_adapter(adapter, config, tokenizer, sha256, Path("a.pt"))

    base = make_model(0, **SIZES, **ARCHS["gpt2"])
    check(base)
    check(base, dropout=0.1)
    with pytest.raises(UserError, match="the tokenizer is different"):
        check(base, CharTokenizer([*TOKENIZER.chars[:-1], "~"]))
    with pytest.raises(UserError, match="the settings are different"):
        check(base, n_head=2)
    for other in (make_model(9, **SIZES, **ARCHS["gpt2"]), make_model(**SIZES, **ARCHS["llama"])):
        with pytest.raises(UserError, match="for another base: the weights are different"):
            check(other)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])  # tied to the output layer, and not
def test_an_adapter_with_new_tokens_may_have_a_larger_vocabulary(arch: str):
    base = make_model(0, **SIZES, **ARCHS[arch])
    larger = make_model(0, **(SIZES | {"vocab_size": 33}), **ARCHS[arch])
    extended = CharTokenizer([*TOKENIZER.chars, "\u2581", "\u2582"])
    adapter = make_adapter(larger, extended, also=EMBEDDINGS)
    adapter["base_sha256"] = sha256 = weights_sha256(base.state_dict())
    lora.check_adapter(adapter, base.config, TOKENIZER, sha256, Path("a.pt"))
    for name in EMBEDDINGS:
        adapter["tensors"].pop(name, None)
    with pytest.raises(UserError, match="the tokenizer is different"):
        lora.check_adapter(adapter, base.config, TOKENIZER, sha256, Path("a.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "not the adapter.pt of a --lora_rank run"),
        ([1], "not the adapter.pt of a --lora_rank run"),
        ({"model": {}}, r"is not the adapter\.pt of a --lora_rank run"),
        (nn.Linear(2, 2), "code, which is never run"),
    ],
)
def test_files_that_are_not_adapters_are_rejected(tmp_path: Path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        lora.read_adapter(tmp_path / "a.pt")


def test_missing_adapters_are_rejected(tmp_path: Path):
    (tmp_path / "a.pt").write_text("text")
    with pytest.raises(UserError, match=r"a\.pt is not a checkpoint"):
        lora.read_adapter(tmp_path / "a.pt")
    for path in (tmp_path, tmp_path / "none.pt", tmp_path / "a.pt" / "b", Path("/dev/zero")):
        with pytest.raises(UserError, match=re.escape(f"there is no adapter {path}")):
            lora.read_adapter(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora", {"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ("lora", {"lora_rank": 2}, "another shape or type"),
        ("lora", {"lora_targets": "qkv"}, "not adapted"),
        ("lora", {"lora_rank": 0}, "fewer tensors"),
        ("gpt_config", {"n_layer": 10**9}, "fewer tensors than its settings say"),
        ("gpt_config", {"n_head": 5}, "not divisible"),
        ("tensors", {"blocks.0.attn.qkv.A": None}, "shape"),
        ("tensors", {"blocks.0.attn.qkv.A": torch.full((3, 32), torch.nan)}, "is not finite"),
        ("tensors", {"blocks.0.attn.qkv.A": torch.zeros(3, 32).double()}, "another shape or type"),
        ("tensors", {"blocks.0.attn.qkv.A": torch.zeros(32, 3)}, "blocks.0.attn.qkv.A is of anoth"),
        ("tensors", {"blocks.9.attn.qkv.A": torch.zeros(3, 32)}, "not adapted"),
        ("tensors", {"tok.weight": torch.zeros(31, 32), "head.weight": torch.ones(31, 32)},
         "are tied, but different"),
    ],
)  # fmt: skip
def test_an_adapter_with_invalid_contents_is_rejected(tmp_path: Path, key, value, message):
    _, adapter = make_adapted()
    torch.save(adapter | {key: adapter[key] | value}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt: its contents do not match .*({message})") as error:
        lora.read_adapter(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_gradients_equal_pefts_on_an_imported_gpt2():
    peft = pytest.importorskip("peft")
    ours = make_model(**SIZES, **ARCHS["gpt2"])
    theirs = to_transformers(ours, "gpt2")
    settings = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, settings).eval()  # in eval mode GPT-2's dropout is off
    lora.add_lora(ours, LoRAConfig(lora_rank=4, lora_targets="qkv"))
    layers = [block.attn.c_attn for block in theirs.base_model.model.transformer.h]
    torch.manual_seed(3)
    for layer, block in zip(layers, ours.blocks, strict=True):
        block.attn.qkv.B.data.normal_(std=0.1)
        layer.lora_A.default.weight.data.copy_(block.attn.qkv.A.data)
        layer.lora_B.default.weight.data.copy_(block.attn.qkv.B.data)
    idx = torch.randint(31, (3, 13))
    loss = theirs(idx, labels=idx).loss
    _, our_loss = ours(idx[:, :-1], idx[:, 1:])
    assert torch.allclose(loss, our_loss, atol=1e-5)
    loss.backward()
    our_loss.backward()
    for layer, block in zip(layers, ours.blocks, strict=True):
        for kind in "AB":
            expected = getattr(layer, f"lora_{kind}").default.weight.grad
            assert torch.allclose(getattr(block.attn.qkv, kind).grad, expected, atol=1e-5)
            assert expected.abs().max() > 0.1
    n_trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert theirs.get_nb_trainable_parameters() == (n_trained, ours.num_params())


@pytest.mark.parametrize("arch", ARCHS)
def test_an_exported_adapter_loads_in_peft_with_equal_logits(arch, tmp_path: Path):
    peft = pytest.importorskip("peft")
    theirs = to_transformers(make_model(**SIZES, **ARCHS[arch]), arch)
    ours, adapter = make_adapted(arch)
    save_checkpoint(tmp_path / "adapter.pt", adapter)
    assert export.main([str(tmp_path / "adapter.pt"), str(tmp_path / "out")]) == 0
    idx = torch.randint(31, (2, 9))
    before = theirs(idx).logits
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = {
        "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "other": [f"mlp.{n}_proj" for n in ("down", "gate", "up")]
        + [f"self_attn.{n}_proj" for n in "koqv"],
    }
    assert written["target_modules"] == names["gpt2" if arch == "gpt2" else "other"]
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "out"))
    assert not torch.allclose(loaded(idx).logits, before, atol=1e-2)
    assert torch.allclose(loaded(idx).logits, ours.eval()(idx)[0], atol=1e-4)


def test_an_adapter_with_new_tokens_is_not_exported(tmp_path: Path):
    model, adapter = make_adapted()
    adapter["tensors"] |= {name: model.tok.weight.detach() for name in EMBEDDINGS}
    save_checkpoint(tmp_path / "adapter.pt", adapter)
    with pytest.raises(UserError, match="merge"):
        export.main([str(tmp_path / "adapter.pt"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
