# ruff: noqa: RUF001 (unusual characters on purpose)
"""The web page is a second implementation: in a browser it gives the numbers, the tokens and the
text of the Python code. Without Chromium, its tests are skipped."""

import json
import random
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, Chromium, start_chromium
from conftest import COMPONENTS, TINY_RUN, WORDS, make_model, make_text
from exports import save_model

import export
import train
import utils
from config import SampleConfig, TrainConfig
from corpus.bpe import count_pieces, train_bpe
from exporting import web_page
from exporting.hf_tokenizer import KNOWN_PATTERNS, PROBES
from generate import generate, sample_logits, sample_text, stream_texts
from model import GPT
from sampling.text import TextWriter, encode_prompt
from system.files import locked_file
from system.settings import UserError
from tokenizer import GPT2_PATTERN, QA_SPECIALS, BPETokenizer, CharTokenizer, Tokenizer, prompt_text
from viz import internals

LETTERS = CharTokenizer.train(["abcdefghij\n"])  # 11 tokens, as the models of make_model have
# " fox" is a token that no merge of two tokens makes: it is only found as a whole piece.
BYTES = BPETokenizer({bytes([b]): b for b in range(256)} | {b" fox": 256}, {}, GPT2_PATTERN)


def write_page(path: Path, model: GPT, tokenizer: Tokenizer, precision: str, **state: Any) -> Path:
    save_model(path.with_suffix(".pt"), model, tokenizer, **state)
    target = str(path.with_suffix(".html"))
    words = [str(path.with_suffix(".pt")), target, f"--precision={precision}", "--overwrite"]
    assert export.main(words) == 0
    return Path(target)


def tags(path: Path) -> list[str]:
    return re.findall(r"<[\w/!]+", path.read_text("ascii"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a trained model, and its corpus."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "input.txt").write_text(make_text())
    words = [*TINY_RUN, f"--data={folder / 'input.txt'}", f"--out_dir={folder}"]
    words += ["--tokenizer=bpe", "--vocab_size=300", "--block_size=64", "--overwrite"]
    assert train.main([*words, "--lr_max=1e-2", "--max_steps=150", "--eval_every=50"]) == 0
    return folder


@pytest.fixture
def trained(workplace: Path, run_folder: Path) -> Path:
    """A folder with a copy of the trained run in it."""
    shutil.copytree(run_folder, "run")
    state = torch.load("run/best.pt", weights_only=True)
    state["train_config"]["data"] = "run/input.txt"
    torch.save(state, "run/best.pt")
    return workplace


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with start_chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def open_page(chromium: Chromium, path: Path) -> None:
    chromium.open(path)
    chromium.wait_for("$('status').textContent != 'Loading the model ...'")
    assert chromium.evaluate("$('status').textContent") == "Ready"


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder / "page", make_model(), LETTERS, "float16")


@pytest.fixture
def engine(chromium: Chromium, small_page: Path) -> Callable[[str], Any]:
    """Evaluates JavaScript in the worker of a small page, for tests of single functions."""
    open_page(chromium, small_page)
    return lambda expression: chromium.evaluate(expression, "worker")


# --- the model


def rounded(model: GPT, precision: str) -> GPT:
    """The model with float16 weights, or with a scale of max / 127 per row of each matrix."""
    for p in model.parameters():
        if precision == "float16":
            p.data = p.data.half().float()
        elif p.dim() == 2:
            scale = (p.data.abs().max(dim=1).values / 127)[:, None]
            p.data = (p.data / scale).round() * scale
    return model


RUN_MODEL = """
((ids, settings) => {
  const cache = new KVCache(model.config);
  const logits = ids.map((id) => Array.from(model.forward(id, cache)));
  const text = (settings) => [...generate(model, ids.slice(0, 3), settings, [])];
  const tokens = (settings) => text(settings).filter((step) => step.logits);
  const sampled = (settings) => tokens(settings).map(({ id }) => id);
  return { logits, ...Object.fromEntries(settings.map((one, i) => [i, sampled(one)])) };
})(%s, %s)
"""
CONFIGS = [
    *COMPONENTS,
    {"n_head": 4, "n_kv_head": 2, "qk_norm": True, "norm": "layernorm", "bias": True},
    {"post_norm": True, "token_shift": True, "pos": "sinusoidal", "norm": "layernorm"},
    {"n_embd": 18, "n_head": 3, "n_inner": 7, "norm_eps": 0.3, "rope_theta": 50.0},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_logits_and_tokens_equal_pytorchs(chromium, tmp_path, config: dict, precision: str):
    model = make_model(**config)
    open_page(chromium, write_page(tmp_path / "page", model, LETTERS, precision))
    model = rounded(model, precision)
    ids = torch.randint(11, (12,), generator=torch.Generator().manual_seed(0))  # a full window
    settings = {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "seed": 3}  # > 12, the window
    runs = [{"temperature": 0.0}, {"temperature": 1.2}, {"top_k": 5, "top_p": 0.8, "seed": 4}]
    runs = [{"temperature": 1.0} | settings | run for run in runs]
    found = chromium.evaluate(RUN_MODEL % (ids.tolist(), json.dumps(runs)), "worker")
    expected = model(ids[None])[0][0]
    assert torch.allclose(torch.tensor(found["logits"]), expected, atol=2e-4, rtol=1e-4)
    for i, run in enumerate(runs):
        steps = generate(model, ids[:3], SampleConfig(**run))
        assert found[str(i)] == [int(step.ids) for step in steps], run


LOOK = """
((texts, places) => texts.map((text, i) => {
  const inside = new Inside(model, tokenizer, text);
  const numbers = [...inside.surprise()].slice(1).map((t) => [t.probability, t.entropy]);
  const looks = places[i].map((at) => inside.look(at));
  return { numbers, looks };
}))(%s)
"""


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_insides_equal_pythons(chromium, tmp_path, config: dict):
    """In texts of up to 30 tokens, of which a window has 12, looked at in any order."""
    precision = ["float16", "int8"][CONFIGS.index(config) % 2]
    model, rng = make_model(**config), random.Random(0)
    open_page(chromium, write_page(tmp_path / "page", model, LETTERS, precision))
    model = rounded(model, precision)
    texts = [rng.choices(range(11), k=rng.choice([2, 7, 12, 30])) for _ in range(50)]
    places = [rng.choices(range(1, len(text) + 1), k=3) for text in texts]
    begins = [0]  # of the windows in which generate() predicts each token
    for end in range(1, 31):
        begins.append(end - 6 if end - begins[-1] > 12 else begins[-1])
    results = chromium.evaluate(LOOK % json.dumps([texts, places])[1:-1], "worker")
    for text, ats, insides in zip(texts, places, results, strict=True):
        if len(text) <= 12:
            numbers = torch.stack(internals.surprise(model, torch.tensor(text)), dim=1)
            assert torch.allclose(torch.Tensor(insides["numbers"]), numbers, atol=1e-4)
        for at, look in zip(ats, insides["looks"], strict=True):
            ids = torch.tensor(text[begins[at] : at])
            probs = internals.logit_lens(model, ids)[:, -1]  # (n_layer, V)
            for token, expected in zip(look["lens"], probs, strict=True):
                shown = {t["id"]: t["probability"] for t in token["alternatives"]}
                values = torch.Tensor(list(shown.values()))  # (8,)
                assert torch.allclose(values, expected.topk(8).values, atol=1e-4)
                assert torch.allclose(values, expected[list(shown)], atol=1e-4)
            weights = internals.attention_weights(model, ids)[:, :, -1]  # (n_layer, H, S)
            found = [[[*head.values()] for head in layer] for layer in look["attention"]]
            assert torch.allclose(torch.Tensor(found), weights, atol=1e-4)


def test_every_float16_number_is_read(engine):
    expected = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)  # others are not in a page
    found = np.array(engine("Array.from(FLOAT16)"), dtype=np.float32)
    assert (found[finite] == expected[finite]).all()


# --- sampling


def test_random_numbers_are_numpys(engine):
    seeds = [0, 1, 42, 1337, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 10**18 - 1]
    draws = "((seeds) => seeds.map((seed) => { const random = new PCG64(seed, 0); "
    draws += "return Array.from({ length: 9 }, () => random.random()); }))(%s)"
    found = engine(draws % json.dumps([str(seed) for seed in seeds]))
    for seed, numbers in zip(seeds, found, strict=True):
        expected = np.random.default_rng((seed, 0)).random(9, dtype=np.float32)
        assert numbers == expected.tolist()


def test_the_next_token_is_the_one_that_python_samples(engine):
    torch.manual_seed(0)
    cases = []
    for i in range(300):
        logits = 3 * torch.randn(20)
        logits = logits.round() if i % 2 else logits  # with ties
        settings = {
            "temperature": [0.0, 0.3, 1.0, 2.0][i % 4],
            "top_k": [0, 1, 4, 50][i // 4 % 4],
            "top_p": [1.0, 0.9, 0.5, 1e-3][i // 16 % 4],
        }
        cases.append((logits.tolist(), torch.rand(()).item(), settings))
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 0.5}
    cases.append(([1.0] * 4, 0.99, settings))  # half of the probability: the first two, exactly
    call = "(%s).map(([logits, uniform, settings]) => sampleLogits(Float32Array.from(logits), "
    call += "Float32Array.from(logits).sort().reverse(), uniform, settings))"
    found = engine(call % json.dumps(cases))
    expected = [
        int(sample_logits(torch.tensor([logits]), torch.tensor([uniform]), **settings))
        for logits, uniform, settings in cases
    ]
    assert found == expected
    assert len(set(found)) > 10


# --- text


OTHER = ("Cn", "Cs", "Co")  # unassigned, surrogates, private use


def random_texts(n: int) -> list[str]:
    """Texts of characters of all scripts, and of those that the split patterns name."""
    rng = random.Random(0)
    chars = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in OTHER]
    kinds = [chars, list(" \n\r\t'stremdlvSTREMDLVſ019.,/!-\xa0\u2028\x85\ufeff"), list("ab 1\n")]
    return ["".join(rng.choices(rng.choice(kinds), k=rng.randrange(1, 30))) for _ in range(n)]


TEXTS = [*PROBES, *random_texts(300), " ".join(WORDS)]


@cache
def learned_bpe(pattern: str, specials: tuple[str, ...] = ()) -> BPETokenizer:
    """Byte pairs learned from the probes, so that tokens of many scripts and of spaces exist."""
    learned = train_bpe(count_pieces([*PROBES, make_text(50)], pattern), 500, list(specials))
    return BPETokenizer(learned.ranks, learned.specials, pattern)


TOKENIZERS: dict[str, Any] = {
    "char": lambda: CharTokenizer.train(TEXTS),
    "char of questions": lambda: CharTokenizer.train(TEXTS[:60], QA_SPECIALS),
    "bpe of questions": lambda: learned_bpe(GPT2_PATTERN, QA_SPECIALS),
    "bytes": lambda: BYTES,
    "letters": lambda: LETTERS,
    **{f"pattern {i}": lambda p=p: learned_bpe(p) for i, p in enumerate(sorted(KNOWN_PATTERNS))},
}


def in_page(tokenizer: Tokenizer) -> str:
    """JavaScript that makes a tokenizer from what a page would contain."""
    state = {"corpus": {"name": "", "sha256": ""}, "step": 0, "log": [], "train_config": {}}
    content = web_page.page_data(make_model(), tokenizer, state)["tokenizer"]
    return f"new Tokenizer({json.dumps(content)})"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_equal_pythons(engine, kind: str):
    tokenizer = TOKENIZERS[kind]()
    texts = [text for text in TEXTS if not tokenizer.unknown(text)]
    if "<UNK>" in tokenizer.specials and kind.startswith("char"):
        texts = [t for t in texts if tokenizer.specials["<UNK>"] not in tokenizer.encode(t)]
    random.seed(0)
    streams = [random.choices(range(tokenizer.vocab_size), k=20) for _ in range(100)]
    call = "((tokenizer, texts, streams) => ({ ids: texts.map((text) => tokenizer.encode(text)), "
    call += "texts: streams.map((ids) => decode(tokenizer, ids)) }))"
    found = engine(f"{call}({in_page(tokenizer)}, {json.dumps([texts, streams])[1:-1]})")
    for text, ids in zip(texts, found["ids"], strict=True):
        assert ids == tokenizer.encode(text).tolist(), repr(text)
    assert found["texts"] == [tokenizer.decode(ids) for ids in streams]


PROMPTS = ["", " ", "\n", "the fox", " the\x85\u3000\n", "\ufeffa\x1c", "☃ xa"]
PROMPTS.append("<|endoftext|><BOS>")


@pytest.mark.parametrize("qa", [False, True])
@pytest.mark.parametrize("kind", list(TOKENIZERS)[:5])
def test_prompts_equal_pythons(engine, kind: str, qa: bool):
    tokenizer = TOKENIZERS[kind]()
    ask = qa and "questions" in kind  # page_data and encode_prompt find that out themselves
    call = "((tokenizer, texts) => texts.map((text) => encodePrompt(tokenizer, text, %s).ids))"
    found = engine(f"({call % json.dumps(ask)})({in_page(tokenizer)}, {json.dumps(PROMPTS)})")
    assert found == [encode_prompt(tokenizer, text, qa).tolist() for text in PROMPTS]


@pytest.mark.parametrize("kind", ["char of questions", "bpe of questions"])
def test_conversations_equal_those_of_the_training(engine, kind: str):
    tokenizer = TOKENIZERS[kind]()
    bos, eos = tokenizer.specials["<BOS>"], tokenizer.specials["<EOS>"]
    turns = [("a b?", " so "), ("\n c", "the fox."), ("d", "")]
    parts = [
        [bos, *tokenizer.encode(prompt_text(q)), *tokenizer.encode(f" {a.strip()}"), eos]
        for q, a in turns
    ]
    last = [bos, *tokenizer.encode(prompt_text("the?"))]
    call = "((tokenizer, turns, sizes) => sizes.map((size) => "
    call += "encodeChat(tokenizer, turns, 'the? ', size).ids))"
    sizes = range(0, 200, 7)
    found = engine(f"{call}({in_page(tokenizer)}, {json.dumps([turns, [*sizes]])[1:-1]})")
    for size, ids in zip(sizes, found, strict=True):
        kept = next(n for n in range(4) if n == 3 or sum(map(len, [*parts[n:], last])) <= size)
        assert ids == [i for part in [*parts[kept:], last] for i in part], size


def test_text_appears_in_the_pieces_that_python_writes(engine):
    tokenizer = learned_bpe(GPT2_PATTERN, QA_SPECIALS)
    emoji = tokenizer.encode("a 😀 the\n\nfox €").tolist()
    random.seed(0)
    streams = [random.choices(range(256), k=30) for _ in range(50)]
    streams += [emoji, [*emoji, tokenizer.specials["<EOS>"], *emoji], [*emoji[:3], 0, *emoji[3:]]]
    streams += [random.choices(emoji, k=30) for _ in range(30)]
    stops = ["", "the", "\n\n|€", " 😀|fox|o", "�"]
    call = """((tokenizer, streams, stops) => stops.map((stop) => streams.map((ids) => {
      const writer = new TextWriter(tokenizer, stop.split("|"));
      return [...ids.map((id) => writer.add(id)), writer.finish()];
    })))"""
    found = engine(f"{call}({in_page(tokenizer)}, {json.dumps([streams, stops])[1:-1]})")
    for stop, texts in zip(stops, found, strict=True):
        for ids, written in zip(streams, texts, strict=True):
            writer = TextWriter(tokenizer, stop.split("|"))
            pieces = [*map(writer.add, ids), writer.finish()]
            if set(ids) <= {*emoji, tokenizer.specials["<EOS>"]}:
                assert written == pieces, (stop, ids)
            # Of invalid UTF-8, a browser may show the replacement characters a byte earlier.
            assert "".join(written) == "".join(pieces), (stop, ids)


# --- split patterns


def test_an_unknown_split_pattern_is_rejected():
    for pattern in (r"\w+|\W", GPT2_PATTERN + "|a"):
        with pytest.raises(UserError, match="cannot split text as this tokenizer does"):
            in_page(learned_bpe(pattern))


# --- files and errors


def test_the_size_of_a_page_is_that_of_its_weights(trained):
    n_params, overhead = utils.load_checkpoint("run/best.pt")[0].num_params(), 80_000
    # 1 or 2 bytes per weight, in base64 four thirds of that, and what is not weights
    for flags, size in (([], 4 / 3), (["--precision=float16", "--overwrite"], 8 / 3)):
        assert export.main(["run/best.pt", "a.html", *flags]) == 0
        assert 0 < Path("a.html").stat().st_size - size * n_params < overhead


def test_a_page_is_replaced_only_if_it_is_one(trained):
    page, words = Path("page.html"), ["run/best.pt", "page.html", "--precision=int8"]
    assert export.main(words) == 0
    with pytest.raises(UserError, match=r"page\.html exists: add --overwrite"):
        export.main(words)
    assert export.main([*words, "--overwrite"]) == 0
    with locked_file(page, "an export"), pytest.raises(UserError, match="in use by an export"):
        export.main([*words, "--overwrite"])
    page.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(UserError, match=r"page\.html is not an earlier output"):
        export.main([*words, "--overwrite"])
    assert "mine" in page.read_text()


def test_weights_that_float16_cannot_represent_are_an_error(tmp_path):
    model = make_model()
    model.norm.weight.data[0] = 1e5
    with pytest.raises(UserError, match="too large for float16: use --precision int8"):
        write_page(tmp_path / "page", model, LETTERS, "float16")
    assert not (tmp_path / "page.html").exists()


# --- the page in a browser

EVIL = '</script><script>document.title = "evil"</script><!-- <script> <img src=x onerror=alert(1)>'


def test_text_of_a_stranger_is_text(chromium, tmp_path):
    tokenizer = CharTokenizer(sorted(set("<!-/script>abc\ud800é😀")), [EVIL, "]]>", "{{SCRIPT}}"])
    model = make_model(vocab_size=tokenizer.vocab_size)
    state = {
        "corpus": {"name": EVIL, "bytes": 0, "sha256": "0"},
        "train_config": asdict(TrainConfig()) | {"arch": EVIL, "schedule": "{{WEIGHTS}}"},
    }
    page = write_page(tmp_path / "page", model, tokenizer, "int8", **state)
    plain = write_page(tmp_path / "plain", make_model(), LETTERS, "int8")
    assert tags(page) == tags(plain)
    open_page(chromium, page)
    assert chromium.evaluate("document.title") == f"{EVIL}: a language model"
    assert EVIL in chromium.evaluate("document.querySelector('h1').textContent")
    assert EVIL[:100] in chromium.evaluate("$('settings').textContent")
    # The model's text and the prompt are text, too.
    prompt = "<b>script</b><!--"
    chromium.evaluate(f"$('prompt').value = {prompt!r}; $('generate').click()")
    chromium.wait_for("!run.active")
    assert chromium.evaluate("$('output').firstChild.textContent") == prompt
    assert chromium.evaluate("$('output').querySelectorAll(':not(span)').length") == 0
    chromium.evaluate("showAlternatives(document.querySelector('.token'))")
    assert chromium.evaluate("$('alternatives').querySelectorAll('script, img, b').length") == 0
    assert not [e for e in chromium.events if e["method"] == "Runtime.exceptionThrown"]


def test_nothing_can_be_fetched(chromium, small_page):
    open_page(chromium, small_page)
    chromium.evaluate("$('generate').click()")
    chromium.wait_for("!run.active")
    requests = [e["params"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"]
    urls = [params["request"]["url"].partition(":")[0] for params in requests]
    assert sorted(urls) == ["blob", "file"]  # the worker and the page
    methods = {event["method"] for event in chromium.events}
    assert methods.isdisjoint(("Log.entryAdded", "Runtime.consoleAPICalled"))
    attempt = """(async () => {
      const blocked = new Promise((resolve) => {
        addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
      });
      %s;
      return await blocked;
    })()"""
    fetch = attempt % 'await fetch("http://127.0.0.1:9/").catch(() => null)'
    for where in ("page", "worker"):
        assert chromium.evaluate(fetch, where) == "connect-src"
    assert chromium.evaluate(attempt % 'new Image().src = "http://127.0.0.1:9/"') == "img-src"
    inline = "const s = document.createElement('script'); s.textContent = '1'; "
    inline += "document.body.append(s)"
    assert chromium.evaluate(attempt % inline) == "script-src-elem"


@pytest.fixture
def trained_page(chromium, trained) -> tuple[GPT, Tokenizer]:
    """The page of a trained model, open in the browser; the model with the page's weights."""
    assert export.main(["run/best.pt", "page.html", "--precision=float16"]) == 0
    open_page(chromium, Path("page.html"))
    model, tokenizer, _ = utils.load_checkpoint("run/best.pt")
    return rounded(model, "float16"), tokenizer


def fill(chromium: Chromium, **values: object) -> None:
    for name, value in values.items():
        chromium.evaluate(f"$('{name}').value = {json.dumps(str(value))}")
        chromium.evaluate(f"$('{name}').dispatchEvent(new Event('input'))")


def press(chromium: Chromium, button: str) -> None:
    chromium.evaluate(f"$('{button}').click()")


def generated(chromium: Chromium) -> str:
    """Press Generate, wait for the end, and return the text."""
    press(chromium, "generate")
    chromium.wait_for("!run.active && run.n_tokens > 0")
    return str(chromium.evaluate("$('output').textContent"))


def test_the_page_samples_the_text_of_generate(chromium, trained_page):
    model, tokenizer = trained_page
    prompt = "the <i>quick"
    settings = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 42, "max_new_tokens": 200}
    (expected,) = sample_text(model, tokenizer, SampleConfig(prompt=prompt, **settings))
    fill(chromium, prompt=prompt, **settings)
    # The worker sends what it has computed in 30 ms: by this clock, three tokens.
    chromium.evaluate("{ let now = 0; performance.now = () => (now += 10); }", "worker")
    chromium.evaluate(
        "window.lengths = []; window.observer = new MutationObserver(() => "
        "lengths.push($('output').textContent.length)); "
        "observer.observe($('output'), { childList: true })"
    )
    assert generated(chromium) == expected and len(expected) > 100
    status = chromium.evaluate("$('status').textContent")
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s · seed 42", status)
    assert len(chromium.evaluate("lengths")) > 10  # the text appeared in parts
    # The same seed gives the same text, and another one another.
    assert generated(chromium) == expected
    fill(chromium, seed=43)
    assert generated(chromium) != expected
    # Generation ends before the stop text.
    fill(chromium, seed=42, stop=expected[60:63].replace("\n", "\\n"))
    config = SampleConfig(prompt=prompt, stop=expected[60:63], **settings)
    assert [generated(chromium)] == sample_text(model, tokenizer, config)


def test_the_page_shows_the_alternatives_of_a_token(chromium, trained_page):
    model, tokenizer = trained_page
    settings = {"temperature": 0.5, "seed": 1, "max_new_tokens": 10}
    fill(chromium, prompt="the quick", **settings)
    generated(chromium)
    ids = torch.from_numpy(tokenizer.encode("the quick"))
    first = next(generate(model, ids, SampleConfig(**settings)))
    probs = first.model_logits[0].softmax(dim=-1)  # at temperature 1
    tint = chromium.evaluate("document.querySelector('.token').style.getPropertyValue('--p')")
    assert float(tint) == pytest.approx(probs[int(first.ids)].item(), abs=1e-4)

    def shown() -> list[list[str]]:
        """The rows of the alternatives: token, probability, whether it was chosen."""
        rows = chromium.evaluate(
            "[...$('alternatives').querySelectorAll('div')].map((row) => "
            "[row.firstChild.textContent, row.lastChild.textContent, row.className])"
        )
        return [] if chromium.evaluate("$('alternatives').hidden") else rows

    chromium.evaluate("$('output').scrollIntoView()")
    token = "document.querySelector('.token').getClientRects()[0]"
    place = chromium.evaluate(f"{token}.toJSON()")
    x, y = place["x"] + 2, place["y"] + place["height"] / 2
    chromium.mouse("mouseMoved", x, y)
    top = probs.topk(8)
    rows = shown()
    expected = [tokenizer.decode([i]).translate(VISIBLE) for i in top.indices.tolist()]
    assert [label for label, *_ in rows[:8]] == expected
    percentages = [float(percentage[:-1]) for _, percentage, _ in rows[:8]]
    assert percentages == pytest.approx((100 * top.values).tolist(), abs=0.06)
    chosen = [label for label, _, kind in rows if kind == "chosen"]
    assert chosen == [tokenizer.decode([int(first.ids)]).translate(VISIBLE)]
    chromium.mouse("mouseMoved", 1, 1)
    assert shown() == []
    chromium.touch(x, y)
    chromium.wait_for("!$('alternatives').hidden")
    assert shown() == rows
    chromium.evaluate("$('output').focus(); document.body.click()")
    assert shown() == []
    for key, at in {"ArrowRight": 0, "ArrowDown": 0, "ArrowLeft": 9}.items():
        chromium.send("page", "Input.dispatchKeyEvent", type="keyDown", key=key)
        chromium.evaluate("new Promise(requestAnimationFrame)")
        assert (
            shown()
            and chromium.evaluate(
                "[...document.querySelectorAll('.token')].findIndex((t) => t.matches('.shown'))"
            )
            == at
        )


def test_generation_can_be_stopped(chromium, trained_page):
    fill(chromium, prompt="the", max_new_tokens=100_000, seed="", temperature=0)
    press(chromium, "generate")
    chromium.wait_for("run.n_tokens > 100")
    press(chromium, "halt")
    status = chromium.evaluate("$('status').textContent")
    assert re.fullmatch(r"Stopped: \d+ tokens · [\d.]+ tokens/s · seed \d+", status)
    # The steps of a stopped text that are still on their way are dropped.
    press(chromium, "generate")
    chromium.wait_for("run.n_tokens > 100")
    fill(chromium, max_new_tokens=5)
    chromium.evaluate("$('halt').click(); $('generate').click()")
    chromium.wait_for("!run.active")
    assert chromium.evaluate("run.n_tokens") == 5
    fill(chromium, max_new_tokens=1)
    generated(chromium)
    assert chromium.evaluate("$('status').textContent").startswith("1 token · ")


VISIBLE = str.maketrans({" ": "␣", "\n": "↵"})


def percent_of(probability: torch.Tensor) -> str:
    return f"{100 * probability.item():.1f}%"


def overflow(chromium: Chromium, width: int) -> int:
    """How much wider than a window of this width the page is, in pixels."""
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.send("page", "Emulation.setDeviceMetricsOverride", **size)
    found = chromium.evaluate("document.documentElement.scrollWidth")
    chromium.send("page", "Emulation.clearDeviceMetricsOverride")
    return max(found - width, 0)


def test_the_page_shows_the_run(chromium, trained_page):
    state = torch.load("run/best.pt", weights_only=True)
    lines = "[...document.querySelectorAll('polyline.%s')]"
    points = f"{lines}.map((line) => line.points.numberOfItems)"
    for name in ("train", "val"):
        assert chromium.evaluate(points % name) == [len(state["log"])]
    rows = "[...$('settings').rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
    settings = dict(chromium.evaluate(rows))
    assert settings["n_layer"] == "1" and settings["max_steps"] == "150"
    assert "data" not in settings and "out_dir" not in settings  # names of the user's folders
    assert "loss (nats per token)" in chromium.evaluate("$('curve').textContent")
    assert overflow(chromium, 320) == overflow(chromium, 1200) == 0


def test_the_page_shows_the_inside_of_the_text(chromium, trained_page):
    model, tokenizer = trained_page
    fill(chromium, prompt="the quick", seed=1, max_new_tokens=30)
    text = generated(chromium)
    press(chromium, "inside")
    ready = "!$('view').hidden && view.tokens.length === run.ids.length + 1"
    chromium.wait_for(ready)
    assert chromium.evaluate("$('tokens').textContent") == f"{text}…"
    ids = torch.tensor(chromium.evaluate("run.ids"))
    probability, entropy = internals.surprise(model, ids)
    surprise = -probability.log()
    details, tint = (
        "$('details').textContent",
        "+view.tokens[%d].span.style.getPropertyValue('--p')",
    )
    means = f"surprise {surprise.mean():.2f} nats (the loss on this text), entropy "
    assert f"{means}{entropy.mean():.2f} nats" in chromium.evaluate(details)
    shade = min(surprise[4].item() / np.log(model.config.vocab_size), 1)
    assert chromium.evaluate(tint % 5) == pytest.approx(shade, abs=1e-4)

    def look(at: int) -> None:
        chromium.wait_for(f"view.look?.at === {at} && {details}.includes('attend')")
        shown = chromium.evaluate(details)
        assert at == len(ids) or f"probability {percent_of(probability[at - 1])} " in shown
        probs, best = internals.logit_lens(model, ids[:at])[-1, -1].topk(5)
        labels = [tokenizer.decode([i]).translate(VISIBLE) for i in best.tolist()]
        numbers = [label + percent_of(p) for label, p in zip(labels, probs, strict=True)]
        last = "document.querySelector('.lens tr:last-child').textContent"
        assert chromium.evaluate(last) == "".join(["0", *numbers])

    chromium.evaluate("$('tokens').scrollIntoView()")
    place = chromium.evaluate("view.tokens[5].span.getClientRects()[0].toJSON()")
    x, y = place["x"] + 2, place["y"] + place["height"] / 2
    chromium.mouse("mouseMoved", x, y)
    look(5)
    chromium.evaluate("$('head').value = '1'; $('head').dispatchEvent(new Event('change'))")
    weights = internals.attention_weights(model, ids[:5])[0, 1, -1]  # (5,)
    for i, weight in enumerate(weights / weights.max()):
        assert chromium.evaluate(tint % i) == pytest.approx(weight.item(), abs=1e-4)
    head = chromium.evaluate("$('head').options[2].text")
    assert head == f"1 ({percent_of(weights.max())})"
    nearest = " (itself)" if weights.argmax() == 4 else f" ({4 - weights.argmax()} before)"
    assert f"{percent_of(weights.max())}{nearest}" in chromium.evaluate(details)
    chromium.mouse("mouseMoved", 1, 1)
    assert "Most surprising" in chromium.evaluate(details)
    place = 1 + int(probability.argmin())
    before, own = tokenizer.decode(ids[:place].tolist()), tokenizer.decode([int(ids[place])])
    button = chromium.evaluate("$('details').querySelector('button').textContent")
    label = (before[-9:] + own).translate(VISIBLE)
    assert button == f"{label} {percent_of(probability.min())}"
    assert chromium.evaluate("$('head').options[2].text") == "1"
    chromium.touch(x, y)
    look(5)
    for key, at in {"ArrowRight": 6, "ArrowLeft": 5}.items():
        chromium.send("page", "Input.dispatchKeyEvent", type="keyDown", key=key)
        look(at)
    chromium.evaluate("pointAt(view.tokens.at(-1).span)")
    look(len(ids))  # the next token
    assert overflow(chromium, 320) == 0
    chromium.send("page", "Input.dispatchKeyEvent", type="keyDown", key="Escape")
    chromium.evaluate("$('details').querySelector('button').click()")
    look(1 + int(probability.argmin()))
    press(chromium, "generate")
    assert chromium.evaluate("[$('text').hidden, $('view').hidden]") == [False, True]
    chromium.wait_for(ready)
    assert not [e for e in chromium.events if e["method"] == "Runtime.exceptionThrown"]


def test_questions_are_asked(chromium, tmp_path):
    tokenizer = CharTokenizer.train(["Question: abc?\nAnswer:"], QA_SPECIALS)
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=80)
    page = write_page(tmp_path / "page", model, tokenizer, "float16")
    open_page(chromium, page)
    assert chromium.evaluate("$('prompt-label').textContent") == "Question"
    press(chromium, "generate")
    assert chromium.evaluate("$('status').textContent") == "Ask a question"
    config = SampleConfig(prompt=" ab? ", seed=7, max_new_tokens=12)
    model, text, ids = rounded(model, "float16"), "", []
    ask = [tokenizer.specials["<BOS>"], *tokenizer.encode("Question: ab?\nAnswer:")]
    for _ in range(3):  # the third question has no room for all turns
        fill(chromium, prompt=" ab? ", seed=7, max_new_tokens=12)
        prompt = torch.tensor([*ids, *ask])
        answer = "".join(piece for (piece,) in stream_texts(model, tokenizer, config, prompt))
        text += f"Question: ab?\nAnswer:{answer}"
        assert generated(chromium) == text
        known = "".join(c for c in answer.strip() if c in tokenizer.chars)
        ids = [*ask, *tokenizer.encode(f" {known.strip()}"), tokenizer.specials["<EOS>"]]
    press(chromium, "new-chat")
    assert chromium.evaluate("[turns.length, $('output').textContent]") == [0, ""]


def test_a_page_with_damaged_weights_says_so_and_stays_unusable(chromium, tmp_path):
    page = write_page(tmp_path / "page", make_model(), LETTERS, "float16")
    start = page.read_text().index('">', page.read_text().index('class="weight"')) + 2
    page.write_text(page.read_text()[:start] + "!!!" + page.read_text()[start:])
    chromium.open(page)
    chromium.wait_for("$('status').textContent != 'Loading the model ...'")
    assert chromium.evaluate("onmessage", "worker") is None  # it ignores what follows
    assert chromium.evaluate("$('status').textContent").startswith("Error: ")
    assert chromium.evaluate("$('generate').disabled") is True


def test_the_end_of_a_long_prompt_is_used(chromium, trained_page):
    fill(chromium, max_new_tokens=5)
    # 60,001 units of UTF-16: the last 60,000 begin with half of the first character
    chromium.evaluate("$('prompt').value = '\\u{1f600}' + 'x'.repeat(59989) + ' the quick'")
    text = generated(chromium)
    assert text.startswith("x") and "the quick" in text
    notes = chromium.evaluate("$('status').textContent")
    assert "only the last 60000 characters of the prompt" in notes
    assert "\ufffd" not in notes and "unknown" not in notes


def test_sources_can_be_embedded():
    for path in web_page.PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path
        if path.suffix == ".js":
            words = r"</script|<!--|innerHTML|\beval\b|import\("
            assert not re.search(rf"{words}|https?://(?!www.w3.org/2000/svg)", text)
            assert all(len(line) <= 120 for line in text.splitlines())
