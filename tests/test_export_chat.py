"""A conversation has the same token ids in Hugging Face's transformers, in GGUF files and here."""

import random
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
from model import GPT
from sampling.text import encode_prompt
from tokenizer import END_OF_TEXT, QA_SPECIALS, BPETokenizer, CharTokenizer, Tokenizer, prompt_text

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = make_text(40) + " System: Question: Answer: é 中字 😀 don't 1234 . , ? !\n"
COUNTS = count_pieces([TEXT])
GPT2 = BPETokenizer(train_bpe(COUNTS, 330).ranks, {END_OF_TEXT: 400}, TIKTOKEN_GPT2)
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.train([TEXT], QA_SPECIALS),
    "bpe": train_bpe(COUNTS, 330, QA_SPECIALS),
    "gpt2": extend_tokenizer(GPT2, QA_SPECIALS, []),
}
PIECES = [*WORDS, *"é 中字 😀 don't 12 ? ... System: Answer:".split(), "\n", "\n\n", "  "]


@pytest.fixture(scope="module", params=TOKENIZERS)
def exported(request, tmp_path_factory) -> tuple[Tokenizer, Any, jinja2.Template, GPT, str]:
    """A tokenizer, its export, the template of a GGUF file, the model, its Hugging Face folder."""
    folder, ours = tmp_path_factory.mktemp("chat"), TOKENIZERS[request.param]
    model = make_model(**ARCHS["llama"], vocab_size=ours.vocab_size, block_size=200)
    save_model(folder / "model.pt", model, ours)
    for target in ("out", "model.gguf"):
        assert export.main([str(folder / "model.pt"), str(folder / target)]) == 0
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda message: 1 / 0
    template = environment.from_string(fields["tokenizer.chat_template"].contents())
    words = transformers.AutoTokenizer.from_pretrained(folder / "out")
    return ours, words, template, model, str(folder / "out")


def messages_of(roles: str, texts: list[str]) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[r], "content": text} for r, text in zip(roles, texts, strict=True)]


def test_conversations_have_the_ids_of_the_training(exported):
    ours, words, template, _, _ = exported
    rng, specials = random.Random(0), ours.specials
    for i in range(40):
        n = 1 + i // 2 % 5  # messages without the system's
        system, *texts = (" ".join(rng.choices(PIECES, k=rng.randint(1, 8))) for _ in range(n + 1))
        messages = messages_of("s" * (i % 2) + "uauau"[:n], [system] * (i % 2) + texts)
        ids: list[int] = []
        for j, text in enumerate(texts):
            prompt = prompt_text(text, "" if j or not i % 2 else system)
            asked = [specials["<BOS>"], *ours.encode(prompt)]
            answer = [*ours.encode(f" {text.strip()}"), specials["<EOS>"]]
            ids += answer if j % 2 else asked
        n_unasked = len(ours.encode("\nAnswer:")) if n % 2 else 0  # without a prompt for an answer
        for add, expected in ((False, ids[: len(ids) - n_unasked]), (True, ids)):
            if add and not n % 2:
                continue  # a prompt ends with the user
            settings = {"add_generation_prompt": add}
            found = words.apply_chat_template(messages, return_dict=False, **settings)
            assert found == expected
            rendered = template.render(messages=messages, **settings)
            assert ours.encode(rendered, allowed_special="all").tolist() == expected


@pytest.mark.parametrize("roles", ["s", "a", "ss", "us", "uu", "uaa", "ua+", "tu", "uat"])
def test_other_orders_of_messages_are_an_error(exported, roles):
    _, words, template, _, _ = exported
    messages, add = messages_of(roles.strip("+"), [*roles.strip("+")]), roles.endswith("+")
    with pytest.raises(jinja2.TemplateError):
        words.apply_chat_template(messages, add_generation_prompt=add)
    with pytest.raises(ZeroDivisionError):
        template.render(messages=messages, add_generation_prompt=add)


def test_a_pipeline_answers_as_generate_does(exported):
    ours, _, _, model, folder = exported
    pipe = transformers.pipeline("text-generation", model=folder)
    settings = {"max_new_tokens": 9, "do_sample": False, "return_tensors": True}
    (found,) = pipe(messages_of("u", ["the fox?"]), **settings)
    prompt = encode_prompt(ours, "the fox?")
    config = SampleConfig(temperature=0, max_new_tokens=9)
    steps = generate(model, prompt, config, [ours.specials["<EOS>"]])
    assert found["generated_token_ids"] == prompt.tolist() + [step.ids.item() for step in steps]
