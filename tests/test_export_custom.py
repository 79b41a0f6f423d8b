"""A model of no standard architecture, exported with its code, works without this project."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, to_transformers
from exports import make_adapter, save_model
from torch import Tensor

import export
import generate
import utils
from config import ARCHS, PRESETS, SampleConfig
from exporting.folders import MARKER
from model import GPT
from sampling.quantize import lower_precision
from system.files import save_checkpoint
from system.settings import UserError
from tokenizer import END_OF_TEXT, CharTokenizer

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
from transformers import dynamic_module_utils  # noqa: E402

from exporting.modeling_tinyllm import CACHE  # noqa: E402

WINDOW = 16
CHARS = CharTokenizer.train(["hello world.\nagain"], [END_OF_TEXT])
PROMPT = CHARS.encode("hello")
FAST = {key: PRESETS["fast"][key] for key in ("norm", "mlp", "token_shift")}
COMPONENTS: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "post-norm": {"post_norm": True, "pos": "sinusoidal", "mlp": "relu", "bias": True},
    "no positions": {"pos": "none", "mlp": "silu", "n_kv_head": 1, "tie_weights": False},
    "grouped gpt2": ARCHS["gpt2"] | {"n_kv_head": 1},
    "mixed": {"pos": "learned", "token_shift": True, "head_size": 6, "qk_norm": False},
}


@pytest.fixture(autouse=True, scope="module")
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for the code that transformers copies before it runs it."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def save(path: str, **components: Any) -> GPT:
    model = make_model(vocab_size=CHARS.vocab_size, block_size=WINDOW, **components)
    head = model.head.weight.data
    head[0] = head[1:3].mean(dim=0)  # the end token is never the most likely one
    save_model(path, model, CHARS)
    return model


def load(folder: str, **settings: Any) -> Any:
    loader = transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, code_cache: None) -> Path:
    """A folder with model.pt, which has the components of the fast preset, and its export out/."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save("model.pt", **FAST)
        assert export.main(["model.pt", "out"]) == 0
    return folder


@pytest.fixture(scope="module")
def models(shared: Path) -> tuple[GPT, Any]:
    """The model, and what transformers loads. Tests must not change them."""
    return utils.load_checkpoint(shared / "model.pt")[0], load(str(shared / "out"))


@pytest.fixture
def exported(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def greedy(model: GPT, n: int) -> list[int]:
    config = SampleConfig(temperature=0, max_new_tokens=n)
    steps = generate.generate(model, torch.from_numpy(PROMPT), config)
    return [step.ids.item() for step in steps]


def batch(*texts: str) -> Tensor:
    return torch.tensor([CHARS.encode(text).tolist() for text in texts])


@pytest.mark.parametrize("name", COMPONENTS)
def test_logits_and_text_are_those_of_the_checkpoint(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    ours = save("model.pt", **COMPONENTS[name])
    assert export.main(["model.pt", "out"]) == 0
    assert "from_pretrained('out', trust_remote_code=True)" in capsys.readouterr().out
    theirs = load("out")
    assert theirs.num_parameters() == ours.num_params()
    idx = torch.randint(CHARS.vocab_size, (3, WINDOW))
    assert torch.allclose(theirs(idx).logits, ours(idx)[0], atol=1e-6, rtol=0)
    n = WINDOW - len(PROMPT) + 1  # the last token is not read
    settings = {"max_new_tokens": n, "do_sample": False}
    for use_cache in (True, False):
        text = theirs.generate(batch("hello"), use_cache=use_cache, **settings)
        assert text[0, len(PROMPT) :].tolist() == greedy(ours, n), f"{use_cache=}"


# after the example of the model card, which loads the model and the tokenizer
LOAD = """
import importlib.util, torch
for module in ("model", "config", "exporting", "generate"):
    assert importlib.util.find_spec(module) is None, module
inputs = tokenizer("hello", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=9, do_sample=False)
torch.save({"ids": inputs.input_ids, "logits": model(**inputs).logits, "text": text}, "loaded.pt")
"""


def test_a_folder_loads_without_this_project(exported, tmp_path, models):
    ours, _ = models
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    card = Path("out/README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    code = example[1].replace("FOLDER", "out") + LOAD
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=300)
    loaded = torch.load("loaded.pt")
    assert loaded["ids"].tolist() == [PROMPT.tolist()]
    assert torch.allclose(loaded["logits"], ours(loaded["ids"])[0], atol=1e-6, rtol=0)
    assert loaded["text"][0, len(PROMPT) :].tolist() == greedy(ours, 9)


def test_the_code_in_the_folder_is_that_of_this_project(exported):
    ours = inspect.getsource(sys.modules["model"]).splitlines()
    theirs = Path("out/model.py").read_text(encoding="utf-8").splitlines()
    assert "model.py of TinyLLM" in theirs[0]
    changed = [line for line, copy in zip(ours, theirs[1:], strict=True) if line != copy]
    assert changed == ["from config import GPTConfig"]
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "| mlp | relu2 |\n" in card and "| token_shift | True |\n" in card
    assert "trust_remote_code=True" in card and "all permissions that you have" in card
    assert f"at most {WINDOW} tokens" in card and "tags: [custom_code]" in card


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": False},
    ],
)
def test_sampling_and_beam_search_are_the_same_with_and_without_cache(models, settings):
    _, theirs = models
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        ids = batch("hello", "again")
        texts.append(theirs.generate(ids, max_new_tokens=8, use_cache=use_cache, **settings))
    assert torch.equal(*texts)
    assert len(texts[0]) == 2 * settings.get("num_return_sequences", 1)


def test_a_returned_cache_is_continued(models):
    _, theirs = models
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = theirs.generate(batch("hello"), max_new_tokens=4, **settings)
    assert first[CACHE].get_seq_length() == 8  # the last token was not read
    longer = torch.cat([first.sequences, batch("ll")], dim=1)
    cached = theirs.generate(longer, max_new_tokens=3, **{CACHE: first[CACHE]}, **settings)
    plain = theirs.generate(longer, max_new_tokens=3, use_cache=False, **settings)
    assert cached.sequences.tolist() == plain.sequences.tolist()


def test_attention_maps_and_tuples_are_returned(models):
    ours, theirs = models
    maps: list[Tensor] = []
    ours(batch("hello"), maps=maps)
    output = theirs(batch("hello"), output_attentions=True)
    assert torch.equal(torch.stack(output.attentions), torch.stack(maps))
    assert torch.equal(theirs(batch("hello"), return_dict=False)[0], theirs(batch("hello")).logits)


def padded(texts: list[str], side: str) -> dict[str, Tensor]:
    """The ids and the mask of texts as a batch."""
    n = max(map(len, texts))
    masks = [[0] * (n - len(text)) + [1] * len(text) for text in texts]
    masks = masks if side == "left" else [mask[::-1] for mask in masks]
    texts = [text.rjust(n, "w") if side == "left" else text.ljust(n, "w") for text in texts]
    return {"input_ids": batch(*texts), "attention_mask": torch.tensor(masks)}


@pytest.mark.parametrize("name", COMPONENTS)
def test_padding_changes_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save("model.pt", **COMPONENTS[name])
    assert export.main(["model.pt", "out"]) == 0
    theirs, texts = load("out"), ["hello wor", "again", "h"]
    alone = [theirs(batch(text)).logits[0] for text in texts]
    for side in ("left", "right"):
        found = theirs(**padded(texts, side)).logits
        for logits, expected in zip(found, alone, strict=True):
            n = len(expected)
            own = logits[-n:] if side == "left" else logits[:n]
            assert torch.allclose(own, expected, atol=1e-5), (side, n)
    found = theirs.generate(**padded(texts, "left"), max_new_tokens=7, do_sample=False)
    for text, row in zip(texts, found, strict=True):
        expected = theirs.generate(batch(text), max_new_tokens=7, do_sample=False)
        assert row[-expected.size(1) :].tolist() == expected[0].tolist()


def test_the_calls_of_a_standard_class_give_its_results(models):
    """A Llama and the custom class with its weights, called in the same ways."""
    model, window = make_model(**ARCHS["llama"]), 12
    llama = to_transformers(model, "llama")
    ours = type(models[1])(type(models[1].config)(**vars(model.config))).eval()
    ours.gpt.load_state_dict(model.state_dict())
    ids = torch.randint(11, (2, 6))
    embeds, labels = llama.get_input_embeddings()(ids), ids.masked_fill(ids > 7, -100)
    calls: list[dict[str, Any]] = [
        {"input_ids": ids, "output_hidden_states": True},
        {"inputs_embeds": embeds, "logits_to_keep": 2},
        {"input_ids": ids, "position_ids": torch.tensor([[0, 2, 3, 5, 8, window - 1]])},
        {"input_ids": ids, "use_cache": True, "labels": labels},
    ]
    for call in calls:
        found, expected = ours(**call), llama(**call)
        assert torch.allclose(found.logits, expected.logits, atol=1e-4), call
        states = found.hidden_states or (), expected.hidden_states or ()
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(*states, strict=True))
        assert found.loss is None or found.loss.item() == pytest.approx(expected.loss.item())
    settings = {"inputs_embeds": embeds, "max_new_tokens": 4, "do_sample": False}
    assert ours.generate(**settings).tolist() == llama.generate(**settings).tolist()
    with pytest.raises(ValueError, match="do not fit the window of 12"):
        ours(ids, position_ids=torch.tensor([[0, 2, 3, 5, 8, window]]))


def test_two_steps_of_training_are_those_of_pytorch(exported):
    model, theirs = utils.load_checkpoint("model.pt")[0], load("out", attn_implementation="sdpa")
    theirs.train().gradient_checkpointing_enable()
    ids = batch("hello wor", "again wor")
    for trained in (model, theirs):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            if trained is model:
                model(ids[:, :-1], ids[:, 1:])[1].backward()
            else:
                theirs(input_ids=ids, labels=ids, num_items_in_batch=16).loss.backward()
            optimizer.step()
    for name, weight in theirs.gpt.state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-5), name


HOLES = torch.tensor([[1, 1, 0, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        ("generate", {"attention_mask": RIGHT}, "padding must be before the tokens, or without a"),
        ("forward", {"attention_mask": HOLES}, "padding must be before the tokens"),
        ("forward", {"attention_mask": torch.zeros(1, 1, 5, 5)}, "cache_implementation is not"),
        ("forward", {"attention_mask": RIGHT[:, 1:]}, r"attention_mask must be \(B, 5\)"),
        ("generate", {"max_new_tokens": WINDOW}, "17 tokens do not fit the window of 16: .*=16"),
        ("forward", {"input_ids": batch("hello" * 4)}, "20 tokens do not fit the window of 16"),
        ("forward", {"head_mask": torch.ones(2)}, "does not support head_mask"),
    ],
)
def test_what_is_not_supported_is_one_clear_error(models, call, settings, message):
    _, theirs = models
    with pytest.raises(ValueError, match=message):
        getattr(theirs, call)(**({"input_ids": batch("hello")} | settings))


def test_other_caches_and_assisted_generation_are_not_supported(models):
    _, theirs = models
    cache = filled_dynamic_cache(theirs.config)
    with pytest.raises(ValueError, match="must be the cache that an earlier call returned"):
        theirs(batch("h"), use_cache=True, **{CACHE: cache})
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        theirs.generate(batch("hello"), assistant_model=theirs, max_new_tokens=5, do_sample=False)


def filled_dynamic_cache(config: Any) -> Any:
    cache = transformers.DynamicCache(config=config)
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    return cache


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_gives_the_logits_of_generate(exported, precision):
    ours, _, _ = utils.load_checkpoint("model.pt")
    lower_precision(ours, precision)
    idx, dtype = batch("hello world"), getattr(torch, precision)
    assert torch.equal(load("out", dtype=dtype)(idx).logits, ours(idx)[0])
    lowered = load("out").to(dtype)
    assert torch.equal(lowered(idx).logits, ours(idx)[0])
    assert lowered.generate(idx, max_length=WINDOW).shape == (1, WINDOW)


def test_a_saved_model_contains_its_code_again(exported, models):
    ours, theirs = models
    theirs.save_pretrained("again")
    for name in ("model.py", "modeling_tinyllm.py"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    idx = batch("hello")
    assert torch.allclose(load("again")(idx).logits, ours(idx)[0], atol=1e-6, rtol=0)
    names = safetensors_torch.load_file("again/model.safetensors").keys()
    assert "gpt.tok.weight" in names and "gpt.head.weight" not in names  # tied


def test_an_import_restores_the_model_and_never_runs_code(exported, models):
    models[1].save_pretrained("saved")
    Path("saved/tokenizer.json").write_bytes(Path("out/tokenizer.json").read_bytes())
    for folder in ("out", "saved"):
        for name in ("model.py", "modeling_tinyllm.py"):
            Path(folder, name).write_text("raise SystemExit('this code was run')")
        assert export.main(["--from", folder, f"{folder}.pt"]) == 0
        before, after = (utils.read_checkpoint(Path(p)) for p in ("model.pt", f"{folder}.pt"))
        assert before["gpt_config"] == after["gpt_config"]
        assert before["tokenizer"] == after["tokenizer"]
        assert before["model"].keys() == after["model"].keys()
        for key, tensor in before["model"].items():
            assert torch.equal(tensor, after["model"][key]), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "gated"}, "mlp must be one of .*, not 'gated'"),
        ({"n_layer": 3}, r"has no tensor gpt\.blocks\.2\."),
        ({"n_layer": 1}, r"a tensor that tinyllm does not have: gpt\.blocks\.1\."),
        ({"n_layer": 10**9}, "n_layer must be a number from 0 to"),
        ({"n_inner": 8}, r"do not match config.json: gpt\.blocks\.0\.mlp\.fc\.weight has shape"),
        ({"n_embd": "16"}, "n_embd must be a number"),
        ({"norm": None}, "norm must be of type str"),
        ({"tie_weights": False}, r"has no tensor gpt\.head\.weight"),
        ({"n_head": 1 << 20, "head_size": 1 << 20}, "heads x their size is too large"),
        ({"quantization_config": {}}, "quantization_config is {}"),
        ({"vocab_size": ..., "norm": ...}, "vocab_size is missing; norm is missing"),
    ],
)
def test_a_changed_config_is_one_error(exported, changes, message):
    Path("out", MARKER).unlink()
    content = json.loads(Path("out/config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    Path("out/config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        export.main(["--from", "out", "back.pt"])
    assert "\n" not in str(error.value) and not Path("back.pt").exists()


def test_an_adapter_of_such_a_model_is_one_of_peft(exported):
    peft = pytest.importorskip("peft")
    ours, theirs = utils.load_checkpoint("model.pt")[0], load("out")
    save_checkpoint(Path("adapter.pt"), make_adapter(ours, CHARS))
    assert export.main(["adapter.pt", "adapter"]) == 0
    idx = batch("hello world")
    expected, base = ours.eval()(idx)[0], theirs(idx).logits
    adapted = peft.PeftModel.from_pretrained(theirs, "adapter").eval()
    assert torch.allclose(adapted(idx).logits, expected, atol=1e-5)
    assert not torch.allclose(base, expected, atol=0.1)
    assert adapted.generate(input_ids=idx, max_length=WINDOW).shape == (1, WINDOW)
