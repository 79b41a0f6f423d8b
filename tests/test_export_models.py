"""Models of Hugging Face are imported with equal logits, or rejected with the reason."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

import export
import utils
from config import ARCHS, GPTConfig
from exporting.hf_model import MAX_SIZE, config_from_hf, config_to_hf, matching_arch, weights_to_hf
from exporting.hf_tokenizer import tokenizer_to_hf
from exporting.huggingface import json_files
from model import GPT
from system.settings import UserError
from tokenizer import END_OF_TEXT, GPT2_PATTERN, QA_SPECIALS, CharTokenizer

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 12, "n_positions": 16},
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 20,
        "max_position_embeddings": 16,
    },
}
SMALL["qwen3"] = SMALL["llama"] | {"head_dim": 6}
CHARS = CharTokenizer.train(["abcdefg\n"])


def write_model(folder: Path, arch: str, **settings: Any) -> torch.nn.Module:
    """A folder that transformers wrote, with random weights of a visible size."""
    values = SMALL[arch] | {"vocab_size": CHARS.vocab_size, "pad_token_id": None} | settings
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(arch, **values)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in theirs.parameters():
        p.data += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_to_hf(CHARS)))
    return theirs


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def imported(folder: Path) -> GPT:
    path = folder.parent / "imported.pt"
    assert export.main(["--from", str(folder), str(path), "--overwrite"]) == 0
    return utils.load_checkpoint(path, torch.device("cpu"))[0]


def assert_equal_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    torch.manual_seed(1)
    idx = torch.randint(CHARS.vocab_size, (3, 16))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.1
        assert torch.allclose(ours(idx)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"n_layer": 1, "n_head": 1}),
        ("gpt2", {"layer_norm_epsilon": 0.3}),
        ("gpt2", {"n_inner": 30, "tie_word_embeddings": False}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
        ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
        ("gpt2", {"resid_pdrop": 0.4, "summary_type": "last", "initializer_range": 0.5}),
        ("llama", {}),
        ("llama", {"rms_norm_eps": 0.3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
        ("llama", {"tie_word_embeddings": True, "hidden_act": "swish"}),
        ("llama", {"pretraining_tp": 2, "num_key_value_heads": 4}),
        ("llama", {"head_dim": 10}),
        ("qwen3", {}),
        ("qwen3", {"rms_norm_eps": 0.3, "tie_word_embeddings": True}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
        ("qwen3", {"sliding_window": 4, "max_window_layers": 1}),  # off by default
        ("qwen3", {"hidden_size": 14, "num_attention_heads": 4}),  # not divisible
    ],
)
def test_an_imported_model_has_the_same_logits(tmp_path, arch, settings):
    theirs = write_model(tmp_path / "theirs", arch, **settings)
    ours = imported(tmp_path / "theirs")
    assert ours.num_params() == theirs.num_parameters()
    assert_equal_logits(ours, theirs)
    back, state = weights_to_hf(ours.state_dict(), ours.config, arch), theirs.state_dict()
    assert state.keys() - back.keys() <= ({"lm_head.weight"} if ours.config.tie_weights else set())
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_rope_theta_of_earlier_versions_is_read(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 7.0}
    theirs = write_model(tmp_path / "theirs", "llama", rope_parameters=rope)
    path = tmp_path / "theirs/config.json"
    old = json.loads(path.read_text())
    del old["rope_parameters"]
    path.write_text(json.dumps(old | {"rope_theta": 7.0, "rope_scaling": None}))
    assert_equal_logits(imported(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize(
    ("arch", "settings"), [*((arch, {}) for arch in SMALL), ("qwen3", {"num_attention_heads": 64})]
)
def test_missing_settings_have_the_defaults_of_transformers(arch, settings):
    theirs = transformers.AutoConfig.for_model(arch, **settings).to_dict()
    assert config_from_hf({"model_type": arch} | settings) == config_from_hf(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_converted_to_float32(tmp_path, dtype):
    theirs = write_model(tmp_path / "float32", "llama")  # RoPE's frequencies stay in float32
    rounded = write_model(tmp_path / "theirs", "llama").to(dtype)
    rounded.save_pretrained(tmp_path / "theirs")
    theirs.load_state_dict(rounded.state_dict())
    assert_equal_logits(imported(tmp_path / "theirs"), theirs)


def test_a_model_in_several_files_is_imported(tmp_path):
    theirs = write_model(tmp_path / "theirs", "llama")
    (tmp_path / "theirs/model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert_equal_logits(imported(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_buffers_of_old_gpt2_files_are_understood(tmp_path, tied):
    theirs = write_model(tmp_path / "theirs", "gpt2", tie_word_embeddings=tied)
    path = tmp_path / "theirs/model.safetensors"
    old = {k.removeprefix("transformer."): v for k, v in safetensors_torch.load_file(path).items()}
    for i in range(2):
        old[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        old[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors_torch.save_file(old, path, metadata={"format": "pt"})
    assert_equal_logits(imported(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize(
    ("arch", "values", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"activation_function": "gelu"}, "is 'gelu'.*only 'gelu_new' is supported"),
        ("gpt2", {"num_attention_heads": 1}, "num_attention_heads and n_head mean the same"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"sliding_window": 8}, "sliding_window is 8"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type in .* is 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type in .* is 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type in .* is 'llama3'"),
        ("llama", {"rope_parameters": {"factor": 2.0}}, "factor in rope_parameters"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention in rope_param"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_theta": 5, "rope_parameters": {"rope_theta": 6}}, "rope_theta .* is 6"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"is_causal": False}, "is_causal is False"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    ],
)
def test_settings_that_change_the_computation_are_rejected(arch, values, message):
    with pytest.raises(UserError, match=message):
        config_from_hf({"model_type": arch} | SMALL[arch] | values)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", [2], {}, 10**9, 10**400, math.nan])
@pytest.mark.parametrize("arch", SMALL)
def test_sizes_must_be_numbers_in_range(arch, value):
    names = [*SMALL[arch], "vocab_size", *(["n_inner"] if arch == "gpt2" else ["head_dim"])]
    for name in names:
        with pytest.raises(UserError, match=f"{name} must be a number from 1 to {MAX_SIZE}, not "):
            config_from_hf({"model_type": arch} | SMALL[arch] | {name: value})


@pytest.mark.parametrize("value", [0, -1e-5, True, "1e-5", None, [], math.nan, math.inf, 10**400])
def test_epsilons_and_base_frequencies_must_be_positive_numbers(value):
    for arch, name in (("gpt2", "layer_norm_epsilon"), ("llama", "rms_norm_eps")):
        with pytest.raises(UserError, match=f"{name} must be a positive number"):
            config_from_hf({"model_type": arch} | SMALL[arch] | {name: value})
    with pytest.raises(UserError, match="rope_theta must be a positive number"):
        config_from_hf({"model_type": "llama"} | SMALL["llama"] | {"rope_theta": value})


def test_switches_must_be_true_or_false():
    with pytest.raises(UserError, match="tie_word_embeddings must be true or false, not 1"):
        config_from_hf({"model_type": "llama"} | SMALL["llama"] | {"tie_word_embeddings": 1})


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "intermediate_size"])
def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path, name):
    write_model(tmp_path / "theirs", "llama")
    change(tmp_path / "theirs/config.json", **{name: MAX_SIZE})
    with pytest.raises(UserError, match=r"has no tensor|do not match config"):
        imported(tmp_path / "theirs")


DOWN = "model.layers.1.mlp.down_proj.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), rf"has no tensor {DOWN}"),
        (lambda t: t.update({BIAS: torch.ones(2)}), rf"that llama does not have: {BIAS}"),
        (lambda t: t.update({DOWN: t[DOWN][:, 1:].clone()}), r"\[16, 19\] instead of \[16, 20\]"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), r"\[20, 16\] instead of \[16, 20\]"),
        (lambda t: t[DOWN][3].fill_(math.nan), f"{DOWN} contains values that are not finite"),
        (lambda t: t[DOWN][3].fill_(math.inf), f"{DOWN} contains values that are not finite"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), f"{DOWN} contains values that are"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), f"{DOWN} contains values"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    write_model(tmp_path / "theirs", "llama")
    path = tmp_path / "theirs/model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "theirs")
    assert not (tmp_path / "imported.pt").exists()


def test_an_output_layer_that_is_not_the_embedding_is_rejected_if_they_are_tied(tmp_path):
    theirs = write_model(tmp_path / "theirs", "llama", tie_word_embeddings=False)
    change(tmp_path / "theirs/config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        imported(tmp_path / "theirs")
    theirs.lm_head.weight.data = theirs.model.embed_tokens.weight.data.clone()
    tensors = {name: t.clone() for name, t in theirs.state_dict().items()}
    safetensors_torch.save_file(tensors, tmp_path / "theirs/model.safetensors")
    assert_equal_logits(imported(tmp_path / "theirs"), theirs)


def test_a_llama_whose_heads_do_not_divide_its_channels_is_not_one_of_transformers():
    sizes = {"n_embd": 28, "n_head": 3, "head_size": 10}
    assert matching_arch(GPTConfig(**(ARCHS["qwen3"] | sizes))) == "qwen3"
    with pytest.raises(UserError, match="n_embd 28 is not divisible by n_head 3"):
        matching_arch(GPTConfig(**(ARCHS["llama"] | sizes)))


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_base_of_rope_is_where_transformers_4_and_5_read_it(arch: str):
    config = GPTConfig(**ARCHS[arch], vocab_size=5, n_embd=16, n_head=2, rope_theta=500.0)
    content = config_to_hf(config, arch, {})
    assert content["rope_theta"] == 500.0
    assert content["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}


def fake_gpt2(name: str) -> tiktoken.Encoding:
    """An encoding of the size of GPT-2's, which tiktoken would download."""
    assert name == "gpt2"
    tokens = (bytes(token) for n in (1, 2) for token in itertools.product(range(256), repeat=n))
    ranks = {token: i for i, token in zip(range(50256), tokens, strict=False)}
    return tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def test_a_gpt2_without_a_tokenizer_has_that_of_gpt2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiktoken, "get_encoding", fake_gpt2)
    folder, path = tmp_path / "model", tmp_path / "imported.pt"
    theirs = write_model(folder, "gpt2", vocab_size=50257, n_layer=1, n_embd=4)
    (folder / "tokenizer.json").unlink()  # save_pretrained of the model does not write it
    assert export.main(["--from", str(folder), str(path)]) == 0
    line = "model has no tokenizer: using GPT-2's, which has 50,257 tokens as well\n"
    assert line in capsys.readouterr().out
    ours, tokenizer, _ = utils.load_checkpoint(path, torch.device("cpu"))
    expected = fake_gpt2("gpt2").encode_ordinary("ab cd")
    assert tokenizer.encode("ab cd").tolist() == expected
    assert tokenizer.specials == {"<|endoftext|>": 50256}
    assert_equal_logits(ours, theirs)


@pytest.mark.parametrize(
    ("arch", "vocab_size", "vocab_json"),
    [("gpt2", 50258, False), ("gpt2", 50257, True), ("llama", 50257, False)],
)
def test_other_models_need_their_tokenizer(tmp_path, monkeypatch, arch, vocab_size, vocab_json):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("not GPT-2's"))
    folder = tmp_path / "model"
    write_model(folder, arch, vocab_size=vocab_size)
    (folder / "tokenizer.json").unlink()
    if vocab_json:
        (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"model has no tokenizer\.json"):
        export.main(["--from", str(folder), str(tmp_path / "imported.pt")])


@pytest.mark.parametrize(
    ("specials", "ids"),
    [
        ([END_OF_TEXT], {"bos": 0, "eos": 0}),
        ([*QA_SPECIALS, END_OF_TEXT], {"bos": 2, "eos": 3, "pad": 0}),
    ],
)
def test_the_settings_name_the_special_tokens(specials: list[str], ids: dict[str, int]):
    config = GPTConfig(vocab_size=12, block_size=32, n_layer=1, n_embd=8, **ARCHS["llama"])
    tokenizer = CharTokenizer.train(["abc"], specials)
    files = json_files(config, tokenizer, "llama", tokenizer.specials)
    for key in ("bos", "eos", "pad"):
        assert files["config.json"][f"{key}_token_id"] == ids.get(key)
    ids = {"pad": 0} | ids  # the end token, if there is no <PAD>
    expected = {f"{key}_token_id": i for key, i in ids.items()} | {"max_length": 32}
    expected |= {"eos_token_id": [3, 4] if len(specials) > 1 else [0]}
    assert files["generation_config.json"] == expected
    assert files["tokenizer_config.json"] == {
        **{f"{key}_token": specials[i] for key, i in ids.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32,
        "clean_up_tokenization_spaces": False,
    }
