"""The web demo shows the model's own numbers, tested in Python and in a browser."""

import html
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from chromium import CHROMIUM
from conftest import TINY_RUN, make_model

import demo
import train
from config import SampleConfig
from generate import generate, sample_text
from system.settings import UserError
from tokenizer import CharTokenizer
from utils import load_checkpoint

TOKENIZER = CharTokenizer.train(["\n&<>abcdefg"])
CPU = torch.device("cpu")
SPAN = r'<span style="background:rgba\(86, 180, 233, (\d\.\d+)\)" title="\d\.\d+">(.*?)</span>'


def test_the_text_equals_generate_and_is_tinted_by_probability(monkeypatch):
    monkeypatch.setattr(demo, "REFRESH_SECONDS", -1)  # an update per token
    model = make_model(block_size=64)
    config = SampleConfig(prompt="<a>", max_new_tokens=40, temperature=1.3, seed=3)
    *before, (page, bars, logits) = demo.stream_html(model, TOKENIZER, config)
    assert [len(re.findall(SPAN, text, re.S)) for text, *_ in before] == list(range(41))
    assert "<b>&lt;a&gt;</b><span" in page
    tints, pieces = zip(*re.findall(SPAN, page, re.S), strict=True)
    assert not any("<" in piece for piece in pieces)
    text = "<a>" + html.unescape("".join(pieces))
    assert text == sample_text(model, TOKENIZER, config)[0] and "<" in text[3:]
    ids = torch.from_numpy(TOKENIZER.encode(text))
    follows = model(ids[None])[0][0]  # (T, V), from one plain forward pass
    expected = follows.softmax(dim=-1)[range(2, 42), ids[3:]]
    assert [float(tint) for tint in tints] == pytest.approx(expected.tolist(), abs=1e-3)
    assert torch.allclose(logits[0], follows[-1], atol=1e-4)
    assert bars == demo.probability_bars(TOKENIZER, logits, config)


def test_the_page_names_the_characters_that_it_drops():
    config = SampleConfig(prompt="a<x>z", max_new_tokens=1)
    page, *_ = next(demo.stream_html(make_model(), TOKENIZER, config))
    assert page.startswith("<i>without characters that the model does not know: x z</i><div")
    assert "<b>a&lt;&gt;</b>" in page


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, [25 / 38, 9 / 38, 4 / 38]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0]),
        ({"temperature": 1.0, "top_p": 0.4}, [1, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0]),
    ],
)
def test_bars_show_the_distribution_that_is_sampled_from(settings, expected):
    tokenizer = CharTokenizer.train(["a<c"])  # < a c
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log()
    page = demo.probability_bars(tokenizer, logits, SampleConfig(**settings))
    assert re.findall(r"overflow:hidden\">(.*?)</span>", page) == ["a", "&lt;", "c"]
    widths = re.findall(r"width:([\d.]+)%\"", page)
    assert [float(w) / 100 for w in widths] == pytest.approx(expected, abs=1e-3)
    assert re.findall(r"left:([\d.]+)%", page) == ["50.0", "30.0", "20.0"]


def test_invalid_inputs_are_user_errors():
    values = dict(zip(demo.SETTINGS, ("a", 1, 0, 1, 3, 5), strict=True))
    config = demo.sample_config(tuple(values.values()), qa=False)
    assert config == SampleConfig(**values, qa=False)
    for bad in ({"prompt": None}, {"temperature": math.nan}, {"top_k": 2.5}, {"seed": -3}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} must be "):
            demo.sample_config(tuple((values | bad).values()), qa=False)


def test_the_name_of_a_corpus_is_not_html(trained):
    gradio = pytest.importorskip("gradio")
    path = Path("checkpoints/best.pt")
    state = torch.load(path, weights_only=True)
    state["corpus"]["name"] = "<img src=x onerror=alert(1)> ![](https://example.com/x.png)"
    torch.save(state, path)
    page = demo.build_page(path, CPU)
    texts = [b.value for b in page.blocks.values() if isinstance(b, gradio.HTML) and b.value]
    assert any("trained on &lt;img" in text for text in texts)
    assert not any("<img" in text for text in texts)
    assert not any(isinstance(block, gradio.Markdown) for block in page.blocks.values())


def test_an_empty_question_is_not_answered_but_shown(workplace):
    gradio = pytest.importorskip("gradio")
    Path("qa.json").write_text(json.dumps([{"question": "the", "answer": "fox"}] * 20))
    train.main([*TINY_RUN, "--data=qa.json", "--max_steps=1"])
    page = demo.build_page(Path("checkpoints/best.pt"), CPU)
    functions = {f.fn.__name__: f.fn for f in page.fns.values() if f.fn}
    blank = (" ", 0.8, 0, 1, 1337, 5)
    with pytest.raises(gradio.Error, match="Ask a question"):
        next(functions["generate_text"](*blank))
    _, bars, logits = functions["show_prompt"](*blank)
    assert functions["update_bars"](logits, *blank) == bars
    sliders = {b.label: b for b in page.blocks.values() if isinstance(b, gradio.Slider)}
    with pytest.raises(gradio.Error, match="greater than maximum value 1000"):
        sliders["Tokens"].preprocess(10**9)


def test_without_gradio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio"):
        demo.main(["best.pt"])


def test_the_page_is_served_to_this_machine_only(trained, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched: list[dict] = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **settings: launched.append(settings))
    assert demo.main(["--port=7999"]) == demo.main(["--share"]) == 0
    names = ("server_name", "server_port", "share")
    addresses = [tuple(settings[name] for name in names) for settings in launched]
    assert addresses == [("127.0.0.1", 7999, False), ("127.0.0.1", 7860, True)]


@pytest.fixture
def page(workplace, monkeypatch):
    """The page of a small model, open in a browser, with the model and its tokenizer."""
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    flags = "--tokenizer=bpe --vocab_size=300 --lr_max=1e-2 --max_steps=200 --eval_every=100"
    train.main([*TINY_RUN, *flags.split(), "--block_size=64"])
    path = Path("checkpoints/best.pt")

    def slow_generate(*args):  # or so small a model would finish before the browser sees its text
        for step in generate(*args):
            time.sleep(0.005)
            yield step

    monkeypatch.setattr(demo, "generate", slow_generate)
    blocks = demo.build_page(path, CPU)
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(10_000)
        tab.hosts = set()
        tab.on("request", lambda request: tab.hosts.add(request.url.split("/")[2]))
        tab.goto(url)
        tab.wait_for_selector(".bar")
        yield tab, *load_checkpoint(path, CPU)[:2]
        browser.close()
    blocks.close()


def test_the_page_works_in_a_browser(page):
    tab, model, tokenizer = page
    box = tab.locator("div[style*='pre-wrap']")

    # The bars show the softmax and change with a slider.
    tab.get_by_label("Prompt").fill("the quick")
    logits = model(torch.from_numpy(tokenizer.encode("the quick"))[None])[0][0, -1]
    at_most = {t: 100 * (logits / t).softmax(dim=-1).max().item() for t in (0.8, 1.0)}
    assert at_most[0.8] > at_most[1.0] + 1
    width = "parseFloat(document.querySelector('.bar').style.width)"
    tab.wait_for_function(f"Math.abs({width} - {at_most[0.8]}) < 0.06")
    for _ in range(4):  # of 0.05 each
        tab.get_by_label("range slider for Temperature").press("ArrowRight")
    tab.wait_for_function(f"Math.abs({width} - {at_most[1.0]}) < 0.06")

    # The prompt is shown literally, even if it looks like HTML.
    prompt = "<i>the ${1+1} {{value}}"
    tab.get_by_label("Prompt").fill(prompt)
    tab.wait_for_function(f"document.body.innerText.includes({prompt!r})")
    assert box.inner_text() == prompt

    # The text is streamed, and equals that of generate.py.
    tab.evaluate(
        """() => {
            window.lengths = new Set();
            new MutationObserver(() => {
                const box = document.querySelector("div[style*='pre-wrap']");
                if (box) window.lengths.add(box.innerText.length);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    tab.get_by_role("button", name="Generate").click()
    config = SampleConfig(prompt=prompt, temperature=1.0, max_new_tokens=300, seed=1337)
    # other bytes may not be characters
    expected = re.sub("[^a-z]", "", sample_text(model, tokenizer, config)[0])
    letters = "document.querySelector(\"div[style*='pre-wrap']\").innerText.replace(/[^a-z]/g, '')"
    tab.wait_for_function(f"{letters} == {expected!r}")
    assert len(tab.evaluate("[...window.lengths]")) > 3

    # The second tab shows the loss curve.
    tab.get_by_role("tab", name="Training").click()
    picture = tab.locator("img[src^='data:image/webp']")
    picture.wait_for()
    assert picture.bounding_box()["width"] > 300
    assert len(tab.hosts) == 1 and "127.0.0.1" in tab.hosts.pop()
