"""Our architectures are Hugging Face's: equal logits, equal tokens, there and back."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, make_model, make_text

import export
import generate
import train
import utils
from config import ARCHS, GPTConfig, SampleConfig, UserError
from model import GPT, KVCache
from tokenizer import QA_SPECIALS, BPETokenizer, CharTokenizer, count_pieces

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SIZES = [
    {"n_layer": 2, "n_head": 2, "n_embd": 24, "n_inner": 40, "vocab_size": 31, "block_size": 19},
    {"n_layer": 3, "n_head": 6, "n_embd": 36, "n_inner": 64, "vocab_size": 53, "block_size": 33},
    {"n_layer": 1, "n_head": 1, "n_embd": 10, "n_inner": 7, "vocab_size": 5, "block_size": 8},
]
GROUPED = SIZES[1] | {"n_kv_head": 2}
WIDE = SIZES[1] | {"n_kv_head": 3, "head_size": 10}
CASES = [
    (arch, sizes, tied)
    for arch in ARCHS
    for sizes in [*SIZES, *([] if arch == "gpt2" else [GROUPED, WIDE])]
    for tied in (True, False)
]


def config_of(arch: str, sizes: dict, tied: bool) -> GPTConfig:
    return GPTConfig(**(ARCHS[arch] | sizes | {"tie_weights": tied}))


def theirs_of(config: GPTConfig, arch: str) -> torch.nn.Module:
    """Hugging Face's model of our settings, with random weights of some size."""
    theirs_config = export.hf_config(config, arch, {})
    theirs_config.pop("architectures")
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(**theirs_config)
    theirs = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    assert type(theirs).__name__ == export.CLASSES[arch]
    return theirs


@pytest.mark.parametrize(("arch", "sizes", "tied"), CASES)
def test_their_weights_give_the_same_logits_in_our_model(arch, sizes, tied):
    config = config_of(arch, sizes, tied)
    theirs, ours = theirs_of(config, arch), GPT(config).eval()
    ours.load_state_dict(export.from_hf(dict(theirs.state_dict()), config, arch))
    assert ours.num_params() == theirs.num_parameters()
    idx = torch.randint(config.vocab_size, (3, config.block_size))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)
    cache = KVCache(config, 3)
    ours(idx[:, :3], cache=cache)
    for t in range(3, config.block_size):
        cached = ours(idx[:, t : t + 1], cache=cache)[0]
    assert torch.allclose(cached[:, -1], theirs(idx).logits[:, -1], atol=1e-4)


@pytest.mark.parametrize(("arch", "sizes", "tied"), CASES)
def test_our_weights_give_the_same_logits_in_their_model(arch, sizes, tied):
    config = config_of(arch, sizes, tied)
    theirs, ours = theirs_of(config, arch), GPT(config).eval()
    for p in ours.parameters():
        p.data += 0.2 * torch.randn_like(p)
    result = theirs.load_state_dict(export.to_hf(ours.state_dict(), config, arch), strict=False)
    assert not result.unexpected_keys
    assert all(key == "lm_head.weight" and tied for key in result.missing_keys)
    theirs.tie_weights()
    idx = torch.randint(config.vocab_size, (2, config.block_size))
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


# --- whole folders


def make_checkpoint(tokenizer: str, arch: str, *flags: str) -> Path:
    size = ["--vocab_size=300"] if tokenizer == "bpe" else []
    words = [f"--tokenizer={tokenizer}", f"--arch={arch}", f"--tag={arch}-{tokenizer}"]
    assert train.main([*TINY_RUN, *words, *size, *flags]) == 0
    return Path("checkpoints", f"{arch}-{tokenizer}", "best.pt")


def greedy(path: Path, prompt: str, n: int) -> list[int]:
    model, tokenizer, _ = utils.load_checkpoint(path, torch.device("cpu"))
    ids = generate.encode_prompt(tokenizer, prompt)
    config = SampleConfig(temperature=0, max_new_tokens=n)
    return [step.ids.item() for step in generate.generate(model, ids, config)]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("arch", ARCHS)
def test_an_exported_folder_loads_and_writes_the_same_text(workplace, arch, tokenizer):
    path = make_checkpoint(tokenizer, arch)
    assert export.main([str(path), "out"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    words = transformers.AutoTokenizer.from_pretrained("out")
    prompt = "the quick\nfox "
    ours = utils.load_checkpoint(path, torch.device("cpu"))[1]
    ids = words(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.encode(prompt).tolist()
    assert words.decode(ids[0]) == prompt
    n = 16 - ids.size(1)
    text = theirs.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    assert text[0, ids.size(1) :].tolist() == greedy(path, prompt, n)
    card = Path("out/README.md").read_text()
    assert "validation" in card and "AutoModelForCausalLM" in card and "input.txt" in card


def test_an_exported_model_comes_back_as_it_was(workplace):
    path = make_checkpoint("bpe", "qwen3")
    assert export.main([str(path), "out"]) == 0
    assert export.main(["--from", "out", "back/again.pt"]) == 0
    before, after = (utils.read_checkpoint(p) for p in (path, Path("back/again.pt")))
    assert before["gpt_config"] | {"dropout": 0} == after["gpt_config"] | {"dropout": 0}
    assert before["tokenizer"] == after["tokenizer"]
    for key, tensor in before["model"].items():
        assert torch.equal(tensor, after["model"][key]), key
    assert generate.main(["back/again.pt", "--max_tokens=5"]) == 0


def test_characters_with_special_tokens_are_exported(workplace):
    tokenizer = CharTokenizer.train(["abc ,\n"], QA_SPECIALS)
    Path("tokenizer.json").write_text(json.dumps(export.hf_tokenizer(tokenizer)))
    words = transformers.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json")
    assert words("a cb?").input_ids == tokenizer.encode("a cb?").tolist()
    back = export.our_tokenizer(json.loads(Path("tokenizer.json").read_text()))
    assert back.to_dict() == tokenizer.to_dict()


def test_the_merges_of_a_tokenizer_are_those_it_learned():
    counts = count_pieces([make_text()])
    tokenizer = BPETokenizer.train(counts, 400)
    from tokenizer import learn_merges

    assert list(export.merges_of(tokenizer)) == learn_merges(counts, 400 - 257)


# --- mistakes


def test_parts_that_match_no_architecture_are_named():
    model = make_model(pos="sinusoidal", mlp="relu2", norm="layernorm", bias=True, qk_norm=False)
    with pytest.raises(UserError, match="gpt2 is nearest, but mlp is relu2 and not gelu, pos is"):
        export.arch_of(model.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is none of gpt2, llama, qwen3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "attention_bias is True.*hidden_act"),
    ],
)
def test_what_we_do_not_have_is_refused(change, message):
    theirs = export.hf_config(config_of("llama", SIZES[0], True), "llama", {})
    theirs.pop("rope_parameters")
    with pytest.raises(UserError, match=message):
        export.our_config(theirs | change)


def test_no_network_is_said(workplace, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args: object, **settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"could not be had from the .*hub \(ConnectionError"):
        export.main(["--from", "gpt2", "gpt2.pt"])
    assert not Path("gpt2.pt").exists()


def test_a_folder_is_uploaded_where_asked_for(workplace, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    path, sent = make_checkpoint("char", "llama"), []
    monkeypatch.setattr(hub, "create_repo", lambda name, exist_ok: None)
    monkeypatch.setattr(hub, "upload_folder", lambda **settings: sent.append(settings))
    assert export.main([str(path), "out", "--push=me/model"]) == 0
    assert sent == [{"repo_id": "me/model", "folder_path": Path("out")}]

    def refuse(**settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(UserError, match="could not upload to me/model: no route to host"):
        export.main([str(path), "out", "--push=me/model", "--overwrite"])
    assert Path("out/model.safetensors").exists()


@pytest.mark.parametrize("words", [[], ["a.pt"], ["--from", "gpt2"], ["a.pt", "b", "c"]])
def test_too_few_or_many_names_are_an_error(words):
    with pytest.raises(UserError, match="give a checkpoint and a folder"):
        export.main(words)


def test_a_folder_that_exists_is_kept(workplace):
    (workplace / "out").mkdir()
    with pytest.raises(UserError, match="out exists"):
        export.main(["a.pt", "out"])
