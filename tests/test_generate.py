"""Sampling, on distributions worked by hand and on small models."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, make_model

import generate
import train
from config import ARCHS, SampleConfig, UserError
from generate import sample_logits
from tokenizer import CharTokenizer


def shares(probs: list[float], **settings: float) -> list[float]:
    """How often each token is drawn from these probabilities, by 1000 evenly spread numbers."""
    n = 1000
    logits = torch.tensor(probs).log().expand(n, -1)
    drawn = sample_logits(logits, (torch.arange(n) + 0.5) / n, **settings)
    return [(drawn == i).float().mean().item() for i in range(len(probs))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),  # squares, normed
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),  # one token reaches it
        ({"top_p": 0.41}, [0, 4 / 7, 3 / 7, 0]),  # the one that crosses is in
        ({"top_p": 0.71}, [0, 4 / 9, 3 / 9, 2 / 9]),
        # top-k first: of 4/7 and 3/7 the first alone reaches 0.5, which of 0.4 it would not
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        # temperature first: 16/30 reaches 0.5 alone
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(settings: dict, expected: list[float]):
    assert shares([0.1, 0.4, 0.3, 0.2], **settings) == pytest.approx(expected, abs=2e-3)


def test_ties_go_to_the_lower_id():
    assert shares([0.25] * 4, top_k=2) == pytest.approx([0.5, 0.5, 0, 0], abs=2e-3)
    assert shares([0.25] * 4, top_p=0.3) == pytest.approx([0.5, 0.5, 0, 0], abs=2e-3)
    assert shares([0.2, 0.4, 0.4], temperature=0) == [0, 1, 0]
    assert shares([0.2, 0.4, 0.4], top_k=1) == [0, 1, 0]


def test_impossible_tokens_are_never_drawn():
    assert shares([0.0, 0.5, 0.0, 0.5]) == pytest.approx([0, 0.5, 0, 0.5], abs=2e-3)
    logits = torch.tensor([[0.0, float("-inf")]])
    assert sample_logits(logits, torch.tensor([1 - 2**-24])).item() == 0


def test_each_row_of_a_batch_is_drawn_alone():
    logits = torch.randn(5, 9)
    uniform = torch.rand(5)
    together = sample_logits(logits, uniform, top_k=5, top_p=0.9)
    alone = [sample_logits(logits[i : i + 1], uniform[i : i + 1], 1.0, 5, 0.9) for i in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("arch", ARCHS)
def test_generation_is_the_model_fed_its_own_text(arch: str):
    model = make_model(**ARCHS[arch])
    config = SampleConfig(max_new_tokens=30, temperature=0)  # runs past the window of 12
    ids = [1, 2, 3]
    for _ in range(30):
        ids.append(model(torch.tensor([ids[-12:]]))[0][0, -1].argmax().item())
    generated = generate.generate(model, torch.tensor([1, 2, 3]), config)
    assert [step.item() for step in generated] == ids[3:]


def test_sample_i_of_a_seed_is_the_same_however_many_are_asked_for():
    model, prompt = make_model(), torch.tensor([1])

    def sample(**settings: int) -> list[list[int]]:
        config = SampleConfig(max_new_tokens=40, temperature=1.0, **settings)
        return torch.stack(list(generate.generate(model, prompt, config)), 1).tolist()

    ten = sample(num_samples=10)
    assert sample(num_samples=1) == ten[:1] and sample(num_samples=3) == ten[:3]
    assert len({tuple(row) for row in ten}) == 10
    assert sample(num_samples=1, seed=7) != ten[:1]


def test_a_longer_text_begins_with_the_shorter():
    model, prompt = make_model(), torch.tensor([1])
    short, long = (
        [x.item() for x in generate.generate(model, prompt, SampleConfig(max_new_tokens=n))]
        for n in (5, 50)
    )
    assert long[:5] == short


def test_unknown_characters_are_dropped_with_a_warning(capsys):
    tokenizer = CharTokenizer.train(["ab\n"])
    assert generate.encode_prompt(tokenizer, "aéb").tolist() == [1, 2]
    assert "'é'" in capsys.readouterr().err
    assert generate.encode_prompt(tokenizer, "é").tolist() == [0]  # a newline
    assert generate.encode_prompt(CharTokenizer.train(["ab"]), "").tolist() == [0]


# --- the command line


@pytest.fixture
def trained(workplace: Path, capsys: pytest.CaptureFixture) -> Path:
    """A folder with a trained run in it."""
    assert train.main(TINY_RUN) == 0
    capsys.readouterr()
    return workplace


def test_the_newest_checkpoint_is_sampled_by_default(trained, capsys):
    assert generate.main(["--max_new_tokens=20", "--prompt=the "]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the ") and len(text) == 4 + 20 + 1
    generate.main(["checkpoints/best.pt", "--max_tokens", "20", "--prompt", "the "])
    assert capsys.readouterr().out == text
    generate.main(["--checkpoint", "checkpoints/best.pt", "--max_tokens=20", "--prompt=the "])
    assert capsys.readouterr().out == text
    generate.main(["--stream", "--max_tokens=20", "--prompt=the "])
    assert capsys.readouterr().out == text


def test_an_output_file_says_how_to_make_it_again(trained):
    Path("prompt.txt").write_text("a fox\nand ")
    sets = (["--prompt=it's\nfun"], ["--prompt_file=prompt.txt", "--top_k=3", "--top_p=0.5"])
    for flags in sets:
        generate.main([*flags, "--num_samples=2", "--max_tokens=20", "--output_file=one.txt"])
        first = Path("one.txt").read_text()
        command = re.search(r"^# python generate\.py (.*)$", first, re.M)[1]
        words = shlex.split(command.replace("'$'\\n''", "\n"))
        Path("one.txt").unlink()
        generate.main(words)
        assert Path("one.txt").read_text() == first
    assert "a fox\nand " in first


def test_all_problems_of_a_command_line_are_reported_together(trained):
    flags = (
        "--temperature=-1 --top_p=1.5 --top_k=-3 --num_samples=x --promt=hi --output_file=no/x "
        "--device=tpu"
    )
    with pytest.raises(UserError) as error:
        generate.main(flags.split())
    for words in (
        "temperature must be at least 0, not -1.0",
        "top_p must be at most 1, not 1.5",
        "top_k must be at least 0, not -3",
        "--num_samples must be a whole number, not 'x'",
        "unknown flag --promt: did you mean --prompt?",
        "there is no folder no",
        "unknown device 'tpu'",
    ):
        assert words in str(error.value)


def test_top_k_above_the_vocabulary_means_all(trained, capsys):
    generate.main(["--top_k=1000", "--max_tokens=30"])
    text = capsys.readouterr().out
    generate.main(["--max_tokens=30"])
    assert capsys.readouterr().out == text


def test_without_a_checkpoint_the_error_says_what_to_do(workplace):
    with pytest.raises(UserError, match=r"python train\.py"):
        generate.main([])
