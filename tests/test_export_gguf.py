"""GGUF files: their content, read by the gguf package, and what llama.cpp makes of them.

The tests of llama.cpp need Node.js and `npm install -g node-llama-cpp`, or the folder of that
package in the environment variable NODE_LLAMA_CPP. Without it they are skipped.
"""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from conftest import make_model, make_text
from exports import save_model

import export
from config import ARCHS, SampleConfig
from corpus.bpe import count_pieces, train_bpe
from experiments.baselines import llama_cpp_command
from exporting.hf_tokenizer import DIGITS_PATTERN, LLAMA3_PATTERN, PROBES
from generate import generate
from model import GPT, rotate
from system.files import locked_file
from system.settings import UserError
from tokenizer import (
    GPT2_PATTERN,
    PRINTABLE_TO_BYTE,
    QA_SPECIALS,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
)

gguf = pytest.importorskip("gguf")

TEXT = make_text(40) + "é ß 中字 € 😀 don't 1234\n"
CHARS = CharTokenizer.train([TEXT])
SIZES = {"n_head": 4, "n_embd": 32, "block_size": 24}
GROUPED = SIZES | {"n_kv_head": 2}  # heads of 8 channels
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)


def exported(
    model: GPT, tokenizer: Tokenizer, *flags: str, **more: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata and tensors of the file that model.pt is exported to."""
    save_model("model.pt", model, tokenizer, **more)
    assert export.main(["model.pt", "model.gguf", "--overwrite", *flags]) == 0
    reader = gguf.GGUFReader("model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return fields, tensors


COUNTS = count_pieces([TEXT])
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CHARS,
    "char_qa": CharTokenizer.train([TEXT], QA_SPECIALS),
    "bpe": train_bpe(COUNTS, 330),
    "bpe_qa": train_bpe(COUNTS, 330, QA_SPECIALS),
}


def model_of(arch: str, tokenizer: Tokenizer, **settings: Any) -> GPT:
    sizes = SIZES if arch == "gpt2" else GROUPED
    return make_model(**(ARCHS[arch] | sizes | {"vocab_size": tokenizer.vocab_size} | settings))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_tensors_are_those_of_the_model(arch, tied):
    model = model_of(arch, TOKENIZERS["bpe"], tie_weights=tied, n_inner=48)
    _, found = exported(model, TOKENIZERS["bpe"], "--precision=float32")
    ours = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = {"token_embd.weight": ours["tok.weight"], "output_norm.weight": ours["norm.weight"]}
    if not tied:
        expected["output.weight"] = ours["head.weight"]
    if arch == "gpt2":
        expected["output_norm.bias"] = ours["norm.bias"]
        rows = [*range(24), *(12 + (i - 12) % 12 for i in range(24, 256))]
        expected["position_embd.weight"] = ours["pos.table.weight"][rows]
    for i in range(2):
        block = {k.split(".", 2)[2]: v for k, v in ours.items() if k.startswith(f"blocks.{i}.")}
        if arch == "gpt2":
            names = {"norm1": "attn_norm", "norm2": "ffn_norm", "attn.qkv": "attn_qkv"}
            names |= {"attn.proj": "attn_output", "mlp.fc": "ffn_up", "mlp.proj": "ffn_down"}
            for module, name in names.items():
                expected[f"blk.{i}.{name}.weight"] = block[f"{module}.weight"]
                expected[f"blk.{i}.{name}.bias"] = block[f"{module}.bias"]
            continue
        qkv, fc = block["attn.qkv.weight"], block["mlp.fc.weight"]
        parts = {"attn_q": qkv[:32], "attn_k": qkv[32:48], "attn_v": qkv[48:]}
        parts |= {"ffn_gate": fc[:48], "ffn_up": fc[48:]}
        names = {"attn_norm": "norm1", "ffn_norm": "norm2"}
        names |= {"attn_output": "attn.proj", "ffn_down": "mlp.proj"}
        if arch == "qwen3":
            names |= {"attn_q_norm": "attn.q_norm", "attn_k_norm": "attn.k_norm"}
        parts |= {name: block[f"{module}.weight"] for name, module in names.items()}
        expected |= {f"blk.{i}.{name}.weight": part for name, part in parts.items()}
        if arch == "llama":
            for name in (f"blk.{i}.attn_q.weight", f"blk.{i}.attn_k.weight"):
                rows = [h + j for h in range(0, len(expected[name]), 8) for j in INTERLEAVED]
                expected[name] = expected[name][rows]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name


def test_neighboring_channels_of_llama_rotate_together(monkeypatch):
    """llama.cpp's rotation of the pairs (2i, 2i + 1) gives the same attention scores as ours."""
    model = model_of("llama", CHARS, n_layer=1)
    _, found = exported(model, CHARS, "--precision=float32")
    x = torch.randn(5, 32)
    angle = torch.outer(torch.arange(5), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    ours = model.blocks[0].attn.qkv(x).detach().view(5, 8, 8).transpose(0, 1)
    ours = rotate(ours, angle.cos(), angle.sin())
    turn = torch.polar(torch.ones_like(angle), angle)  # pairs as complex numbers

    def theirs(name: str) -> torch.Tensor:
        heads = (x @ torch.tensor(found[f"blk.0.{name}.weight"]).T).view(5, -1, 4, 2)
        turned = torch.view_as_complex(heads) * turn[:, None]
        return torch.view_as_real(turned).flatten(2).transpose(0, 1)

    q, k = theirs("attn_q"), theirs("attn_k")
    for head in range(4):
        scores = q[head] @ k[head // 2].T
        assert torch.allclose(scores, ours[head] @ ours[4 + head // 2].T, atol=1e-4)


def test_types_round_as_they_should():
    model = model_of("gpt2", CHARS, n_inner=40)  # rows of 40 are not made of blocks of 32
    _, f32 = exported(model, CHARS, "--precision=float32")
    _, f16 = exported(model, CHARS)
    q4_fields, q4 = exported(model, CHARS, "--precision=int4")
    assert q4_fields["general.file_type"] == 2  # llama.cpp's MOSTLY_Q4_0
    fields, q8 = exported(model, CHARS, "--precision=int8")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader("model.gguf").tensors}
    bound = 0.5 + 127 / 2048  # to the nearest of 127 steps, which float16 stores to 11 bits
    assert fields["general.file_type"] == 7  # llama.cpp's MOSTLY_Q8_0
    assert fields["general.quantization_version"] == 2  # required with quantized tensors
    for name, tensor in f32.items():
        if tensor.ndim == 1 or name == "position_embd.weight":
            assert kinds[name] == "F32"
            assert np.array_equal(f16[name], tensor) and np.array_equal(q8[name], tensor)
            continue
        assert np.array_equal(f16[name], tensor.astype(np.float16))
        if name.endswith("ffn_down.weight"):
            assert kinds[name] == "F16" and np.array_equal(q8[name], f16[name])
        else:
            blocks, rounded = (t.reshape(-1, 32) for t in (tensor, q8[name]))
            step = abs(blocks).max(axis=1, keepdims=True) / 127
            assert kinds[name] == "Q8_0" and (abs(blocks - rounded) <= bound * step).all()
            assert not np.array_equal(blocks, rounded)
            four = q4[name].reshape(-1, 32)  # 16 steps of an eighth of the largest weight
            assert (abs(blocks - four) <= 127 * step * (1 / 8 + 1e-3)).all()
            assert np.array_equal(four, rounded) == name.startswith("token_embd")


def test_settings_of_a_llama():
    model = model_of("llama", CHARS, n_inner=48, head_size=8, rope_theta=5e5, norm_eps=2e-6)
    fields, _ = exported(model, CHARS)
    settings = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    assert settings.pop("attention.layer_norm_rms_epsilon") == pytest.approx(2e-6)
    assert settings == {
        "context_length": 24,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 5e5,
    }
    assert (fields["general.architecture"], fields["general.file_type"]) == ("llama", 1)
    assert (fields["general.name"], fields["general.size_label"]) == ("text (llama)", "18K")
    assert fields["general.author"].startswith("TinyLLM ")


def test_settings_of_a_gpt2():
    fields, _ = exported(model_of("gpt2", CHARS), CHARS, "--precision=float32")
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["gpt2.feed_forward_length"] == 128
    assert fields["gpt2.context_length"] == 256  # llama.cpp rounds 24 up to this
    assert not any("rope" in name for name in fields)
    assert (fields["general.architecture"], fields["general.file_type"]) == ("gpt2", 0)


def their_ids(fields: dict[str, Any], text: str) -> list[int]:
    """The ids of a text by llama.cpp's algorithm, without a pre-tokenizer: merge the pair of the
    lowest rank until there is none; what is not a token is left out."""
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {merge: i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
    printable = {b: c for c, b in PRINTABLE_TO_BYTE.items()}
    word = [printable[b] for b in text.encode()]
    while pairs := [f"{a} {b}" for a, b in pairwise(word)]:
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        i = pairs.index(best)
        word[i : i + 2] = [best.replace(" ", "")]
    return [ids[token] for token in word if token in ids]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_keep_their_ids_and_prompts_get_no_others(name):
    tokenizer, qa = TOKENIZERS[name], "qa" in name
    fields, _ = exported(model_of("qwen3", tokenizer), tokenizer)
    for piece in (" quick", "lazy", " 中字", "😀", "1234", "\n"):
        assert their_ids(fields, piece) == tokenizer.encode(piece).tolist()
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    tokens, types, end = values["tokens"], values["token_type"], values["eos_token_id"]
    if isinstance(tokenizer, BPETokenizer):
        assert {tokens[i]: i for i, kind in enumerate(types) if kind == 3} == tokenizer.specials
        assert set(types) == {1, 3} and len(tokens) == tokenizer.vocab_size
        assert values["pre"] == "gpt-2"
    else:  # unknown characters that begin with the bytes of known ones: é, 中, 😀
        assert their_ids(fields, "aê丮😁é") == tokenizer.encode("aé").tolist()
    assert not any(values[f"add_{x}"] for x in ("bos_token", "eos_token", "space_prefix"))
    assert tokens[end] == ("<EOS>" if qa else "<|endoftext|>")
    assert values["fim_pad_token_id"] == end  # not <PAD>, which llama.cpp takes by itself
    assert tokens[values["bos_token_id"]] == ("<BOS>" if qa else tokens[end])


def test_characters_of_ascii_text_are_exported():
    """llama.cpp needs a list of merges, and GGUF has no empty lists."""
    tokenizer = CharTokenizer.train(["abc "])
    fields, _ = exported(model_of("llama", tokenizer), tokenizer)
    assert len(fields["tokenizer.ggml.merges"]) > 0
    assert their_ids(fields, "a ébc") == tokenizer.encode("a bc").tolist()


def test_ids_without_a_token_are_unused():
    model = model_of("llama", TOKENIZERS["bpe"], vocab_size=340)
    fields, _ = exported(model, TOKENIZERS["bpe"])
    assert fields["tokenizer.ggml.token_type"][330:] == [5] * 10
    assert len(set(fields["tokenizer.ggml.tokens"])) == 340


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_without_an_end_token_gets_one_that_is_never_the_most_likely(arch):
    model = model_of(arch, CHARS)
    fields, found = exported(model, CHARS, "--precision=float32")
    end = CHARS.vocab_size
    assert fields["tokenizer.ggml.suppress_tokens"] == [end]
    assert len(fields["tokenizer.ggml.tokens"]) == end + 1
    head = torch.tensor(found.get("output.weight", found["token_embd.weight"]))  # (V + 1, C)
    assert torch.equal(head[:end], model.head.weight)
    x = torch.randn(10_000, 32)
    assert ((x @ head.T).argmax(dim=1) != end).all()
    logits = model(torch.arange(end)[None, :24])[0][0].mean(dim=0)
    a, b = sorted(range(end), key=logits.tolist().__getitem__)[:2]  # the least likely
    assert torch.allclose(head[end], (model.head.weight[a] + model.head.weight[b]) / 2)
    fields, _ = exported(model_of(arch, TOKENIZERS["bpe"]), TOKENIZERS["bpe"])
    assert "tokenizer.ggml.suppress_tokens" not in fields


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (DIGITS_PATTERN, "smollm"),
        (LLAMA3_PATTERN, "llama-bpe"),
        (LLAMA3_PATTERN.replace("{1,3}", ""), "qwen2"),
    ],
)
def test_patterns_of_imported_models(pattern, name):
    bpe = TOKENIZERS["bpe"]
    tokenizer = BPETokenizer(bpe.ranks, bpe.specials, pattern)
    fields, _ = exported(model_of("llama", tokenizer), tokenizer)
    assert fields["tokenizer.ggml.pre"] == name


def rendered(fields: dict[str, Any]) -> str:
    template = jinja2.Template(fields["tokenizer.chat_template"], keep_trailing_newline=True)
    messages = [("user", "Who?"), ("assistant", " me"), ("user", "Why?\n")]
    return template.render(messages=[{"role": role, "content": text} for role, text in messages])


MODELFILE = """\
# For Ollama: ollama create NAME -f model.Modelfile, then ollama run NAME
FROM ./model.gguf
TEMPLATE \"\"\"{{ .Prompt }}{{ .Response }}\"\"\"
PARAMETER temperature 0.8
PARAMETER top_k 0
PARAMETER top_p 1.0
PARAMETER min_p 0.0
PARAMETER repeat_penalty 1.0
PARAMETER num_ctx 24
"""


def test_a_model_of_text_continues_the_conversation():
    fields, _ = exported(model_of("llama", CHARS), CHARS)
    assert rendered(fields) == "Who? meWhy?\n"
    assert Path("model.Modelfile").read_text() == MODELFILE


def test_a_model_that_answers_questions_is_asked_each_message():
    tokenizer = TOKENIZERS["char_qa"]
    model = model_of("llama", tokenizer)
    fields, _ = exported(model, tokenizer)
    assert rendered(fields) == "<BOS>Question: Who?\nAnswer: me<EOS><BOS>Question: Why?"
    template = "<BOS>{{ if .System }}System: {{ .System }}\n{{ end }}Question: {{ .Prompt }}\n"
    template += 'Answer:{{ if .Response }}{{ if ne (printf "%.1s" .Response) " " }} {{ end }}'
    template += "{{ end }}{{ .Response }}<EOS>"
    assert f'TEMPLATE """{template}"""\n' in Path("model.Modelfile").read_text()
    fields, _ = exported(model, tokenizer, finetune={"objective": "text"})
    assert rendered(fields) == "Who? meWhy?\n"


def error_of(*words: str) -> str:
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError) as caught:
        export.main(list(words))
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "token"),
    [
        (r"\w+|\W", {}),
        (r"[\s\S]", {}),
        (GPT2_PATTERN, {b"qzx": 330}),  # a whole piece; neither qz nor zx is a token
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_rejected(pattern, token):
    bpe = TOKENIZERS["bpe"]
    tokenizer = BPETokenizer(bpe.ranks | token, bpe.specials, pattern)
    save_model("model.pt", model_of("llama", tokenizer), tokenizer)
    assert "--tokenizer bpe, char or gpt2" in error_of("model.pt", "model.gguf")


def test_numbers_too_large_for_the_type():
    model = model_of("llama", CHARS)
    model.blocks[1].mlp.proj.weight.data[0, 0] = 1e5
    save_model("model.pt", model, CHARS)
    message = error_of("model.pt", "model.gguf")
    assert "blk.1.ffn_down.weight" in message and "--precision float32" in message
    assert export.main(["model.pt", "model.gguf", "--precision=float32"]) == 0


def test_existing_files_are_replaced_only_with_overwrite_and_only_exports():
    save_model("model.pt", model_of("llama", CHARS), CHARS)
    words = ["model.pt", "model.gguf"]
    for name in ("model.gguf", "model.Modelfile"):
        Path(name).write_text("my text")
        for flags in ([], ["--overwrite"]):
            assert f"{name} is not an earlier output" in error_of(*words, *flags)
        Path(name).unlink()
    assert export.main(words) == 0
    size = Path("model.gguf").stat().st_size
    assert "add --overwrite" in error_of(*words, "--precision=float32")
    with locked_file(Path(words[1]), "an export"), pytest.raises(UserError, match="in use by an"):
        export.main([*words, "--overwrite"])
    assert export.main([*words, "--precision=float32", "--overwrite"]) == 0
    assert Path("model.gguf").stat().st_size > size


def test_a_missing_package_is_named(monkeypatch):
    save_model("model.pt", model_of("llama", CHARS), CHARS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert error_of("model.pt", "model.gguf") == "this needs gguf: pip install gguf"


# --- llama.cpp itself

STRINGS = ["\n", " ", "  ", "the ", "quick", " fox", "é", "中", "字", "€", "😀", "👍🏽", "12", "34"]
STRINGS += ["don't", "'LL", "!", "...", "<PAD>", "<EOS>", "<|endoftext|>", "ê", "Ω", "\t", "\r\n"]


@pytest.fixture(scope="module")
def llama_cpp() -> None:
    if not llama_cpp_command(Path(), 1, "exact"):
        pytest.skip("needs Node.js and npm install -g node-llama-cpp")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_llama_cpp_gives_the_same_tokens_and_text(llama_cpp, arch, name):
    tokenizer = TOKENIZERS[name]
    model = model_of(arch, tokenizer)
    exported(model, tokenizer, "--precision=float32")
    rng = random.Random(0)
    texts = PROBES + ["".join(rng.choices(STRINGS, k=rng.randint(1, 12))) for _ in range(1000)]
    prompts = [tokenizer.encode(text) for text in ("the quick", "fox ", "\n", "a 中")]
    questions: list[dict[str, Any]] = [{"text": text} for text in texts]
    questions += [{"prompt": prompt.tolist(), "n": 12} for prompt in prompts]
    process = subprocess.run(
        llama_cpp_command(Path("model.gguf"), 1, "exact"),
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(answers) == len(questions), process.stderr
    for text, ids in zip(texts, answers, strict=False):
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(char for char in text if char in tokenizer.chars)
        assert ids == tokenizer.encode(text).tolist(), text
    ends = [tokenizer.specials[t] for t in ("<EOS>", "<|endoftext|>") if t in tokenizer.specials]
    for prompt, ids in zip(prompts, answers[len(texts) :], strict=True):
        config = SampleConfig(temperature=0, max_new_tokens=12)
        steps = generate(model, torch.from_numpy(prompt), config, ends)
        for step, token in zip(steps, ids, strict=True):
            best, second = step.logits[0].topk(2).values
            if best - second < 0.01:
                break  # llama.cpp rounds GELU to float16
            assert step.ids.item() == token
