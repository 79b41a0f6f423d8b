"""A conversation has the same token ids in Hugging Face's transformers, in GGUF files and here."""

import random
from pathlib import Path
from typing import Any

import jinja2
import pytest
from conftest import WORDS, make_model, make_text
from exports import save_model

import export
from config import ARCHS, SampleConfig
from corpus.bpe import count_pieces, train_bpe
from exporting.hf_tokenizer import TIKTOKEN_GPT2
from finetuning.new_tokens import extend_tokenizer
from generate import generate
from sampling.text import encode_prompt
from tokenizer import END_OF_TEXT, QA_SPECIALS, BPETokenizer, CharTokenizer, Tokenizer, prompt_text

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = make_text(40) + " System: Question: Answer: é 中字 😀 don't 1234 . , ? !\n"
COUNTS = count_pieces([TEXT])
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.train([TEXT], QA_SPECIALS),
    "bpe": train_bpe(COUNTS, 330, QA_SPECIALS),
    "gpt2": extend_tokenizer(
        BPETokenizer(train_bpe(COUNTS, 330).ranks, {END_OF_TEXT: 400}, TIKTOKEN_GPT2),
        QA_SPECIALS,
        [],
    ),
}
PIECES = [
    *WORDS,
    "é",
    "中字",
    "😀",
    "don't",
    "12",
    "?",
    "...",
    "System:",
    "Answer:",
    "\n",
    "\n\n",
    "  ",
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def exported(request, tmp_path_factory) -> tuple[Tokenizer, Any, Any, Path]:
    """A tokenizer, a function from text to ids, what transformers loads, and the folder."""
    folder, ours = tmp_path_factory.mktemp("chat"), TOKENIZERS[request.param]
    model = make_model(**ARCHS["llama"], vocab_size=ours.vocab_size, block_size=200)
    save_model(folder / "model.pt", model, ours)
    for target in ("out", "model.gguf"):
        assert export.main([str(folder / "model.pt"), str(folder / target)]) == 0
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "out"), model, folder


def error(message: str) -> None:
    raise ValueError(message)


def gguf_template(folder: Path) -> jinja2.Template:
    field = gguf.GGUFReader(folder / "model.gguf").fields["tokenizer.chat_template"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = error
    return environment.from_string(field.contents())


def messages_of(system: str, texts: list[str]) -> list[dict[str, str]]:
    roles = ["system"] * bool(system) + ["user", "assistant"] * len(texts)
    texts = [system] * bool(system) + texts
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def test_conversations_have_the_ids_of_the_training(exported):
    ours, words, _, folder = exported
    template, rng = gguf_template(folder), random.Random(0)
    bos, eos = ours.specials["<BOS>"], ours.specials["<EOS>"]

    def text() -> str:
        return " ".join(rng.choices(PIECES, k=rng.randint(1, 8)))

    for i in range(40):
        system, texts = text() * (i % 2), [text() for _ in range(1 + i // 2 % 5)]
        expected: list[int] = []
        for j, content in enumerate(texts):
            if j % 2:
                expected += [*ours.encode(" " + content.strip()).tolist(), eos]
            else:
                prompt = prompt_text(content, "" if j else system)
                ends = len(texts) % 2 == 1 and j + 1 == len(texts)
                without = prompt.removesuffix("\nAnswer:") if ends else prompt
                plain = [*expected, bos, *ours.encode(without).tolist()]
                expected += [bos, *ours.encode(prompt).tolist()]
        asked = len(texts) % 2 == 1
        messages = messages_of(system, texts)
        for add, ids in [(True, expected), (False, plain)] if asked else [(False, expected)]:
            settings = {"add_generation_prompt": add}
            found = words.apply_chat_template(messages, return_dict=False, **settings)
            assert found == ids
            rendered = template.render(messages=messages, **settings)
            assert ours.encode(rendered, allowed_special="all").tolist() == ids
    assert encode_prompt(ours, texts[0]).tolist() == [bos, *ours.encode(prompt_text(texts[0]))]


@pytest.mark.parametrize(
    "roles", ["", "s", "a", "ss", "us", "uu", "uaa", "sua+", "ua+", "tu", "uat", "usa"]
)
def test_other_orders_of_messages_are_an_error(exported, roles):
    _, words, _, folder = exported
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": names[r], "content": "a"} for r in roles.strip("+")]
    settings = {"add_generation_prompt": roles.endswith("+")}
    with pytest.raises((jinja2.TemplateError, ValueError, IndexError)):
        words.apply_chat_template(messages, **settings)
    with pytest.raises((jinja2.TemplateError, ValueError)):
        gguf_template(folder).render(messages=messages, **settings)


def test_a_pipeline_answers_as_generate_does(exported):
    ours, words, model, folder = exported
    pipe = transformers.pipeline("text-generation", model=str(folder / "out"))
    settings = {"max_new_tokens": 9, "do_sample": False, "return_tensors": True}
    (found,) = pipe(messages_of("", ["the fox?"]), **settings)
    prompt = encode_prompt(ours, "the fox?")
    config = SampleConfig(temperature=0, max_new_tokens=9)
    steps = generate(model, prompt, config, [ours.specials["<EOS>"]])
    expected = prompt.tolist() + [step.ids.item() for step in steps]
    assert found["generated_token_ids"] == expected
    assert (words.bos_token, words.eos_token) == ("<BOS>", "<EOS>")
