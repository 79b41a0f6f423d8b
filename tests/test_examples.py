"""The example files in data/ are what the documentation says; Git ignores what commands write."""

import json
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, make_text

import explore
import export
import finetune
import generate
import plots
import prepare
import train
from corpus.load import load_corpus
from corpus.records import read_records, record_text
from finetuning.records import encode_pair
from tokenizer import CharTokenizer
from utils import load_checkpoint

DATA = Path(__file__).parent.parent / "data"
# The 65 characters of TinyShakespeare, as its author lists them.
SHAKESPEARE = CharTokenizer.train(["\n !$&',-.3:;?", string.ascii_letters])
DEFAULT_WINDOW = 192  # of train.py on a CPU


@pytest.mark.parametrize("name", ["example.txt", "pairs.jsonl", "qa.json"])
def test_git_does_not_ignore_the_examples(name):
    lines = (DATA.parent / ".gitignore").read_text().splitlines()
    assert f"!/data/{name}" in lines and (DATA / name).is_file()


def test_the_example_text_is_plain_prose():
    text = (DATA / "example.txt").read_text(encoding="ascii")
    assert 20_000 < len(text) < 60_000
    assert set(text) <= set(string.ascii_letters + ' \n!",.:?')
    assert max(map(len, text.splitlines())) <= 80
    stories = text.split("\n\n\n")
    assert len(stories) > 50 and len(set(stories)) == len(stories)


def test_a_model_is_trained_on_the_example_text(workplace, capsys):
    _, corpus = load_corpus(str(DATA / "example.txt"))
    assert len(corpus.val_ids) > 10 * DEFAULT_WINDOW
    assert train.main([*TINY_RUN, f"--data={DATA / 'example.txt'}", "--tag=mine"]) == 0
    capsys.readouterr()
    prompt = ["--prompt", "Bram the badger", "--max_new_tokens=5", "--device=cpu"]
    assert generate.main(["checkpoints/mine/best.pt", *prompt]) == 0
    assert capsys.readouterr().out.startswith("Bram the badger")


def test_the_example_pairs_prefer_short_courteous_speeches_in_characters_of_tinyshakespeare():
    pairs = read_records(DATA / "pairs.jsonl", preferences=True)
    assert SHAKESPEARE.vocab_size == 65 and 20 <= len(pairs) <= 30
    for pair in pairs:
        assert not SHAKESPEARE.unknown(record_text(pair))
        ((prompt, chosen),) = pair.turns
        assert prompt.startswith("\n") and prompt.endswith(":\n")
        assert chosen.endswith("\n\n") and pair.rejected.endswith("\n\n")
        assert 2 * len(chosen) < len(pair.rejected)
        (examples,) = encode_pair(SHAKESPEARE, pair, DEFAULT_WINDOW, ask=False)
        assert max(len(ids) for ids, _ in examples) <= DEFAULT_WINDOW + 1
    assert len({pair.turns[0][0] for pair in pairs}) == len(pairs)


def test_preferences_are_learned_from_the_example_pairs(workplace):
    text = make_text() + "".join(SHAKESPEARE.chars) + "\n"
    (workplace / "data/input.txt").write_text(text)
    assert train.main([*TINY_RUN, "--block_size=224", "--max_steps=2"]) == 0
    flags = ["--objective=dpo", f"--data={DATA / 'pairs.jsonl'}", "--max_steps=12", "--lr_max=1e-2"]
    flags += ["--eval_every=6", "--sample_tokens=0", "--device=cpu", "--no-hold_out"]
    assert finetune.main(["checkpoints/best.pt", *flags]) == 0
    state = load_checkpoint(Path("checkpoints/dpo/latest.pt"), torch.device("cpu"))[2]
    first, *_, last = state["log"]
    assert last["val"] < first["val"] and last["accuracy"] > 0.9


def test_the_example_questions_are_different_and_those_held_out_have_known_answers():
    records = read_records(DATA / "qa.json")
    assert len(records) == 223 and sum(record.held_out for record in records) == 21
    assert len({row["id"] for row in json.loads((DATA / "qa.json").read_text())}) == 223
    assert len({record.turns[0][0].strip().lower() for record in records}) == 223
    trained = dict(record.turns[0] for record in records if not record.held_out)
    assert {"Who are you?", "What is RoPE?"} <= trained.keys()  # the README and docs/ ask these
    assert {record.turns[0][1] for record in records} == {*trained.values()}


def test_git_ignores_what_the_commands_write_by_default(trained):
    pytest.importorskip("safetensors")
    shutil.copy(DATA.parent / ".gitignore", ".")
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert prepare.main(["data/input.txt", "--tokenizer=char"]) == 0
    assert plots.main(["checkpoints"]) == 0
    assert plots.main(["checkpoints/best.pt", "--picture=embeddings"]) == 0
    sweep = ["--settings=temperature=0.5,1", "--max_tokens=5", "--device=cpu"]
    assert explore.main(["sweep", *sweep]) == 0
    assert train.main([*TINY_RUN, "--arch=qwen3", "--tag=qwen3"]) == 0
    assert export.main(["checkpoints/qwen3/best.pt", "out"]) == 0
    written = {path.name for path in Path().iterdir()}
    assert {"embeddings.png", "out", "checkpoints", "data"} <= written
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], capture_output=True, text=True
    )
    assert status.stdout == "?? .gitignore\n"
