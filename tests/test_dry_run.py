"""--dry_run: parameters, computation and epochs by hand, and a batch that a reader can check."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import COMPONENTS, TINY_RUN, make_model

import train
from config import GPTConfig
from corpus.bpe import count_pieces, train_bpe
from system.settings import UserError
from tokenizer import CharTokenizer
from training.checks import flops_per_token, params_by_component, print_example

SMALL = GPTConfig(vocab_size=7, block_size=5, n_layer=3, n_embd=8, n_head=2, n_inner=12)
SMALL.n_kv_head, SMALL.pos, SMALL.tie_weights = 1, "learned", False
GPT2 = GPTConfig(50257, 1024, 12, 12, 768, 12, norm="layernorm", mlp="gelu", pos="learned")
GPT2.qk_norm, GPT2.bias, GPT2.n_inner = False, True, 3072


def test_the_parameters_of_each_component_by_hand():
    # 2 tables; 3 blocks with 2 + 1 + 1 heads of 4 channels; SwiGLU has 3 matrices; 2 norms of 8 and
    # 2 of 4 channels per block and a last one; an output layer
    assert params_by_component(SMALL) == {
        "embeddings": 7 * 8 + 5 * 8,
        "attention": 3 * (8 * 16 + 8 * 8),
        "MLP": 3 * 3 * 8 * 12,
        "norms": 3 * (2 * 8 + 2 * 4) + 8,
        "output": 7 * 8,
    }
    counts = params_by_component(GPT2)
    assert sum(counts.values()) == 124_439_808  # openai-community/gpt2
    assert counts["embeddings"] == 50257 * 768 + 1024 * 768 and counts["output"] == 0


@pytest.mark.parametrize("settings", COMPONENTS, ids=str)
def test_the_components_are_all_of_the_model(settings: dict):
    model = make_model(**settings)
    assert sum(params_by_component(model.config).values()) == model.num_params()


def test_the_computation_per_token_by_palms_formula():
    # the 1,672 parameters above, without the 12 vectors that are only looked up; 3 layers, 2 heads
    assert flops_per_token(SMALL) == 6 * (1672 - 12 * 8) + 12 * 3 * 2 * 4 * 5
    rope = replace(SMALL, pos="rope", tie_weights=True)  # without positions and output layer
    assert flops_per_token(rope) == 6 * (1672 - 12 * 8) + 12 * 3 * 2 * 4 * 5
    # nanoGPT's estimate_mfu: all parameters but the positions, as the output layer is tied
    assert flops_per_token(GPT2) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_dry_run_describes_the_run_and_writes_nothing(workplace: Path, capsys):
    text = (workplace / "data" / "input.txt").read_text()
    flags = [*TINY_RUN, "--data=data/input.txt", "--grad_accum=2", "--dry_run"]
    assert train.main(flags) == 0
    assert not Path("checkpoints").exists()
    shown = capsys.readouterr().out.splitlines()
    lines = dict(line.split(": ", 1) for line in shown if ": " in line)
    n_train = len(text) * 9 // 10
    assert lines["training"].startswith(  # 4 x 2 windows of 16 characters, 20 steps
        f"128 tokens per step, 2,560 in 20 steps, {2560 / n_train:.2f} epochs; "
    )
    assert "attention 1,024, MLP 3,072," in lines["parameters"]

    train.main(TINY_RUN)
    before = contents(workplace)
    for words in ([], ["--resume"], ["--overwrite"]):  # although a run exists
        capsys.readouterr()
        assert train.main([*TINY_RUN, "--dry_run", *words]) == 0
        assert contents(workplace) == before
    shown = capsys.readouterr().out.splitlines()[-5:-3]
    rows = [ast.literal_eval(line.split(None, 1)[1]) for line in shown]
    assert len(rows[0]) == 16 and rows[0] in text and rows[1][:-1] == rows[0][1:]


def test_a_dry_run_that_does_not_fit_in_memory_says_so_last(workplace: Path, capsys):
    with pytest.raises(UserError, match=r"this run takes about .* GB"):
        train.main([*TINY_RUN, "--batch_size=10000000000", "--dry_run"])
    assert "token by token:" in capsys.readouterr().out
    assert not Path("checkpoints").exists()


def test_an_example_is_shown_token_by_token(capsys):
    tokenizer = CharTokenizer.train(["no\n'"])
    ids = torch.tensor(tokenizer.encode("on\nno'no").tolist())
    print_example(tokenizer, ids[:-1], ids[1:])
    assert capsys.readouterr().out.splitlines()[1:] == [
        '''  input   "on\\nno'n"''',
        '''  target  "n\\nno'no"''',
        "token by token:",
        """  input   'o'  'n'   '\\n'  'n'  'o'  "'"  'n'""",
        """  target  'n'  '\\n'  'n'   'o'  "'"  'n'  'o'""",
    ]


def test_an_example_of_byte_pairs_shows_what_is_predicted(capsys):
    tokenizer = train_bpe(count_pieces(["no no no nono"]), 258)  # one merge, of n and o
    ids = torch.tensor(tokenizer.encode("no" * 100).tolist())
    y = ids[1:].clone()
    y[:40] = -100  # a prompt
    print_example(tokenizer, ids[:-1], y)
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"  input   {'no' * 30!r}" and out[2] == f"  target  {'no' * 30!r}"
    assert out[3] == "token by token (-: not scored):"
    assert out[4].startswith("  input   'no'  'no'  'no'") and max(map(len, out)) <= 90
    assert out[5].startswith("  target  -     -     'no'  'no'")
