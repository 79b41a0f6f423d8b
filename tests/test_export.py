"""The architectures equal Hugging Face's: same logits, same tokens, in both directions."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY_RUN, make_model, make_text

import evaluate
import export
import generate
import train
import utils
from config import ARCHS, SampleConfig
from corpus.bpe import count_pieces, learn_merges, train_bpe
from exporting.folders import MARKER
from exporting.hf_model import matching_arch
from exporting.hf_tokenizer import merges_of
from system.files import save_checkpoint
from system.settings import UserError
from tokenizer import END_OF_TEXT, CharTokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def make_checkpoint(tokenizer: str, arch: str, *flags: str) -> Path:
    size = ["--vocab_size=300"] if tokenizer == "bpe" else []
    words = [f"--tokenizer={tokenizer}", f"--arch={arch}", f"--tag={arch}-{tokenizer}"]
    assert train.main([*TINY_RUN, *words, *size, *flags]) == 0
    return Path("checkpoints", f"{arch}-{tokenizer}", "best.pt")


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("arch", ARCHS)
def test_an_exported_folder_generates_the_same_and_is_imported_again(workplace, arch, tokenizer):
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
    model = utils.load_checkpoint(path)[0]
    logits, size = theirs(ids).logits, ours.vocab_size
    assert torch.allclose(logits[:, :, :size], model(ids)[0], atol=1e-5)
    # The end token that other programs need is never sampled, and lowers no other probability.
    end = size if tokenizer == "char" else ours.specials[END_OF_TEXT]
    assert theirs.config.vocab_size == max(size, end + 1)
    assert words.eos_token_id == words.bos_token_id == words.pad_token_id == end
    assert tokenizer == "bpe" or logits.log_softmax(-1)[:, :, end].max() < -2
    hot = theirs.generate(ids, max_new_tokens=n, do_sample=True, temperature=1e9)
    assert tokenizer == "bpe" or (hot != end).all()
    steps = generate.generate(model, ids[0], SampleConfig(temperature=0, max_new_tokens=n))
    assert text[0, ids.size(1) :].tolist() == [step.ids.item() for step in steps]
    assert export.main(["--from", "out", "back/again.pt"]) == 0
    before, after = (utils.read_checkpoint(p) for p in (path, Path("back/again.pt")))
    assert before["gpt_config"] | {"dropout": 0} == after["gpt_config"] | {"dropout": 0}
    assert before["tokenizer"] == after["tokenizer"]
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(t, after["model"][key]) for key, t in before["model"].items())


def test_the_loss_of_a_card_is_that_of_the_exported_weights(workplace):
    path = make_checkpoint("char", "llama")
    state = utils.read_checkpoint(path)
    state["log"] = [{"step": 1, "val": 1.25}, {"step": state["step"], "train": 1.5, "val": 2.75}]
    save_checkpoint(path, state)
    assert export.main([str(path), "out"]) == 0
    card = Path("out/README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert "Trained from scratch with TinyLLM on " in card
    assert "input.txt: step 20, validation loss 2.7500." in card
    assert "| data |" not in card and "| out_dir |" not in card  # names of the user's folders
    for name, value in {"n_layer": 1, "n_head": 2, "batch_size": 4, "mlp": "swiglu"}.items():
        assert f"| {name} | {value} |\n" in card
    state["log"].pop()
    save_checkpoint(path, state | {"finetune": {"objective": "text"}})
    assert export.main([str(path), "out", "--overwrite"]) == 0
    card = Path("out/README.md").read_text()
    assert "loss" not in card and "Fine-tuned with TinyLLM" in card


def test_nothing_is_claimed_about_the_training_of_an_imported_model(workplace):
    assert export.main([str(make_checkpoint("char", "llama")), "folder/of/mine"]) == 0
    assert export.main(["--from", "folder/of/mine", "imported.pt"]) == 0
    assert export.main(["imported.pt", "out"]) == 0
    card = Path("out/README.md").read_text()
    assert "Imported from mine with TinyLLM" in card and "folder" not in card
    assert not re.search("steps|learning rate|training data|from scratch", card)
    with pytest.raises(UserError, match="does not name its corpus; choose a corpus with --data"):
        evaluate.main(["imported.pt"])


def test_another_token_that_ends_a_text_is_named_at_the_import(workplace, capsys):
    path = make_checkpoint("char", "llama")
    state = utils.read_checkpoint(path)
    chars = utils.load_checkpoint(path, torch.device("cpu"))[1].chars
    state["tokenizer"] = CharTokenizer(chars[1:], ["<|im_end|>"]).to_dict()
    save_checkpoint(path, state)
    assert export.main([str(path), "out"]) == 0
    config = json.loads(Path("out/config.json").read_text())
    Path("out", MARKER).unlink()
    Path("out/config.json").write_text(json.dumps(config | {"eos_token_id": [0, len(chars)]}))
    capsys.readouterr()
    assert export.main(["--from", "out", "back.pt"]) == 0
    assert 'give --stop "<|im_end|>" to generate.py' in capsys.readouterr().out


def test_a_folder_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"no folder otu/, .* pip install huggingface_hub"):
        export.main(["--from", "otu/", "a.pt"])


def test_the_merges_of_a_tokenizer_are_those_it_learned():
    counts = count_pieces([make_text()])
    tokenizer = train_bpe(counts, 400)
    assert list(merges_of(tokenizer)) == learn_merges(counts, 400 - 257)


def test_the_gguf_error_for_a_fast_run_names_the_command_that_trains_an_exportable_one(workplace):
    pytest.importorskip("gguf")
    assert train.main([*TINY_RUN, "--preset=fast"]) == 0
    with pytest.raises(UserError, match=r"exported: python train.py --arch qwen3 --tag qwen3") as e:
        export.main(["checkpoints/best.pt", "model.gguf"])
    command = re.search(r"python train.py (.*), with", str(e.value))
    assert train.main([*command[1].split(), *TINY_RUN]) == 0
    assert export.main(["checkpoints/qwen3/best.pt", "model.gguf"]) == 0


def test_components_that_match_no_architecture_are_named():
    model = make_model(pos="sinusoidal", mlp="relu2", norm="layernorm", bias=True, qk_norm=False)
    with pytest.raises(UserError, match="gpt2 is nearest, but mlp is relu2 and not gelu, pos is"):
        matching_arch(model.config)


def test_weights_are_downloaded_after_the_settings_are_accepted(workplace, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return "hub"

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert export.main([str(make_checkpoint("char", "llama")), "hub"]) == 0
    Path("hub/README.md").unlink()  # not downloaded
    assert export.main(["--from", "someone/model", "model.pt"]) == 0
    settings_files = ["*.json"]
    assert asked == [settings_files, ["*.json", "*.safetensors"]]
    Path("hub/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type 'bert' is not supported"):
        export.main(["--from", "someone/model", "model.pt", "--overwrite"])
    assert asked[2:] == [settings_files]

    fail = Mock(side_effect=ConnectionError("no route to host"))
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"no folder gpt2, and it .*\(ConnectionError"):
        export.main(["--from", "gpt2", "gpt2.pt"])
    assert not Path("gpt2.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((w, "give a checkpoint and a folder") for w in ("", "a.pt", "--from gpt2", "a b c")),
        ("--from=gpt2 out.gguf", "--from writes a checkpoint"),
        ("a.pt out --precision=float32", "--precision is for .html and .gguf files"),
        ("a.pt page.html --precision=int2", "--precision: invalid choice"),
        ("a.pt page.html --precision=int4", "a web page has weights in float16 or int8"),
        ("a.pt page.html --precision=float32", "a web page has weights in float16 or int8"),
        ("a.pt no/folder/page.html", "there is no folder no"),
        ("a.pt no/folder/model.gguf", "there is no folder no"),
        ("a.pt folder.html", "folder.html is a folder"),
        *((f"a.pt {name}", "there is no checkpoint a.pt") for name in ("out", "a.html", "a.gguf")),
        ("text.pt page.html", "text.pt is not a checkpoint"),
        ("adapter.pt page.html", "first merge it"),
        ("adapter.pt model.gguf", "first merge it"),
    ],
)
def test_mistakes_are_errors_before_anything_is_written(tmp_path, monkeypatch, words, message):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    Path("text.pt").write_text("a text")
    torch.save({"base_sha256": "0"}, "adapter.pt")
    files = set(Path().rglob("*"))
    with pytest.raises(UserError, match=re.escape(message)):
        export.main(words.split())
    assert set(Path().rglob("*")) == files
