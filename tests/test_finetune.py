"""The objectives against their formulas, and runs that fine-tune a small model."""

import ast
import json
import math
import re
import shutil
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN, make_model, make_text
from fuzz_damage import n_rejected
from test_train import assert_same_run

import evaluate
import export
import finetune
import generate
import prepare
import train
import utils
from config import ARCHS, GPTConfig, SampleConfig, TrainConfig
from corpus.bpe import count_pieces, train_bpe
from corpus.corpus import Corpus
from corpus.records import Record, encode_turn, encode_turns, join_turns, record_text
from finetuning import lora, records
from finetuning.lora import LoRAConfig
from finetuning.new_tokens import extend_tokenizer, extend_weights
from finetuning.records import Records, Split, encode_pair, encode_splits, pack_turns
from finetuning.setup import check_finetune, help_defaults, load_base, resolve_finetune
from finetuning.tasks import OBJECTIVES, DPOTask, FinetuneConfig, QATask, TextTask, dpo_loss
from model import GPT
from plots import read_run
from sampling.text import end_tokens, last_objective, last_trained_on_text
from system.command_line import parse_args
from system.files import save_checkpoint
from system.settings import UserError
from tokenizer import QA_SPECIALS, CharTokenizer
from train import Trainer
from training.run_log import RunLog
from training.task import PlainFormat, Pretraining

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
QUICK = (
    "--device=cpu --no-compile --precision=float32 --batch_size=4 --max_steps=6 --eval_every=3 "
    "--eval_windows=4 --sample_tokens=10"
).split()
RECORDS = [
    {"question": f"What is {name}?", "answer": f"{name} is {what}."}
    for name, what in [("fox", "quick"), ("dog", "lazy"), ("day", "long"), ("it", "42")]
]
RECORDS += [{"question": "Name the fox.", "answer": "fox is quick.", "held_out": True}]
TURNS = [(record["question"], record["answer"]) for record in RECORDS]
PAIRS = [
    {"prompt": f"the {a}", "chosen": f" {b}\n", "rejected": f" {b} and then\n"}
    for a in ("fox", "dog", "day")
    for b in ("sleeps", "jumps")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a checkpoint trained on it, questions and preferences."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    (folder / "data" / "input.txt").write_text(make_text())
    (folder / "data" / "qa.json").write_text(json.dumps(RECORDS))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (folder / "other.txt").write_text(make_text().upper() + make_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*TINY_RUN, "--max_steps=60", "--eval_every=60", "--block_size=48"])
    return folder


@pytest.fixture(scope="module")
def adapted(trained: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        flags = ["--lora_rank=2", "--lora_targets=all", "--tag=adapted", "--lr_max=1e-2"]
        tune("--objective=qa", *flags)
    return trained / "checkpoints" / "adapted" / "adapter.pt"


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(*words: str) -> int:
    return finetune.main(["checkpoints/best.pt", *QUICK, *words])


def read(run: str, name: str = "latest.pt") -> dict:
    return utils.read_checkpoint(Path("checkpoints", run, name))


FLAGS = {
    "text": ["--data=other.txt"],
    "qa": ["--objective=qa"],
    "distill": ["--objective=distill", "--teacher=checkpoints/best.pt"],
    "dpo": ["--objective=dpo", "--data=pairs.jsonl"],
}


def test_dpo_gradient_equals_the_papers():
    """-beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), Rafailov et al. 2023"""
    model, reference, beta = make_model(0), make_model(1), 0.3
    x, y = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))  # one pair: chosen, rejected
    found = DPOTask.rewards(SimpleNamespace(reference=reference, beta=beta), model, x, y)
    dpo_loss(*found).mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    log_p = [[], []]
    for i, m in enumerate((model, reference)):
        for b in range(2):
            nll = F.cross_entropy(m(x[b : b + 1])[0][0], y[b], reduction="sum")
            log_p[i].append(-nll)
    r_w, r_l = (beta * (log_p[0][b] - log_p[1][b]).item() for b in range(2))
    assert [r.item() for r in found] == pytest.approx([r_w, r_l], abs=1e-4)
    weight = beta / (1 + math.exp(r_w - r_l))
    difference = log_p[0][0] - log_p[0][1]
    expected = torch.autograd.grad(-weight * difference, list(model.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--lora_rank=2"]])
def test_all_rewards_of_dpo_are_0_before_the_first_step(place: Path, monkeypatch, flags):
    """Also in a base that was trained with dropout: TRL, too, turns it off in DPO."""
    state = read("", "best.pt")
    state["gpt_config"]["dropout"] = 0.2
    save_checkpoint(Path("checkpoints/best.pt"), state)
    first_rewards, rewards = [], DPOTask.rewards

    def record(task, model, x, y):
        found = rewards(task, model, x, y)
        first_rewards.extend(torch.cat(found).tolist() if model.training else [])
        monkeypatch.setattr(DPOTask, "rewards", rewards if model.training else record)
        return found

    monkeypatch.setattr(DPOTask, "rewards", record)
    assert tune(*FLAGS["dpo"], *flags) == 0
    first = read("dpo")["log"][0]
    assert first["train"] == first["val"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == first["accuracy"] == 0.0
    assert len(first_rewards) == 8 and not any(first_rewards)  # of four pairs


def test_preferences_end_with_the_token_that_ends_a_text_of_the_model():
    pair = Record([("the fox", " sleeps")], rejected=" jumps", is_text=True)
    text = make_text(20)
    qa, plain = CharTokenizer.train([text], QA_SPECIALS), CharTokenizer.train([text])
    pretrained = train_bpe(count_pieces([text]), 270)
    answering = extend_tokenizer(pretrained, QA_SPECIALS, [])
    assert answering.specials["<|endoftext|>"] < answering.specials["<EOS>"]
    for tokenizer, end in (
        (qa, "<EOS>"), (plain, ""), (pretrained, "<|endoftext|>"), (answering, "<EOS>")
    ):  # fmt: skip
        (encoded,) = encode_pair(tokenizer, pair, 9, ask=False)
        for (ids, scored), text in zip(encoded, (" sleeps", " jumps"), strict=True):
            assert tokenizer.decode(ids[~scored].tolist()) == "the fox"
            assert tokenizer.decode(ids[scored].tolist()) == text + end


def test_preferences_of_a_model_that_answers_questions_are_answers(place: Path, capsys):
    tune("--objective=qa", "--max_steps=1")
    words = [*FLAGS["dpo"], "--dry_run", "--tag=new", "--device=cpu"]
    for source, asks in (("qa", True), ("text", False)):
        if source == "text":
            Path("old.txt").write_text(make_text(300))
            base = "checkpoints/qa/best.pt"
            assert finetune.main([base, *QUICK, "--data=old.txt", "--max_steps=1"]) == 0
        capsys.readouterr()
        assert finetune.main([f"checkpoints/{source}/best.pt", *words]) == 0
        assert ("Question:" in capsys.readouterr().out) == asks
    assert finetune.main(["checkpoints/text/best.pt", *QUICK, *FLAGS["dpo"], "--max_steps=1"]) == 0
    assert [last_trained_on_text(read(name)) for name in ("qa", "text", "dpo")] == [0, 1, 1]


LENGTHS = {"train": [40, 38, 3, 2], "val": [2, 30, 5]}  # of answers, in tokens


def make_task(objective: str, config: TrainConfig) -> QATask | DPOTask:
    """A task on records with answers of these lengths, or on preference pairs."""
    records = [[Record([("q", "a" * (n - 2))]) for n in lengths] for lengths in LENGTHS.values()]
    if objective == "dpo":
        pairs = [(p["prompt"], p["chosen"], p["rejected"]) for p in PAIRS]
        pairs = [Record([(p, chosen)], rejected=r, is_text=True) for p, chosen, r in pairs]
        records = [pairs[:3], pairs[3:]]
    tokenizer = CharTokenizer.train([json.dumps([RECORDS, PAIRS]) + "\n"], QA_SPECIALS)
    splits = encode_splits(OBJECTIVES[objective].records, records, tokenizer, 64, ask=False)
    reference = make_task_model(tokenizer.vocab_size, seed=1)
    setup = SimpleNamespace(settings=FinetuneConfig(beta=0.3))
    data = Records(splits, tokenizer, config, CPU, PlainFormat({}))
    return OBJECTIVES[objective].task(data, setup, reference)


def make_task_model(vocab_size: int, seed: int = 0) -> GPT:
    return make_model(seed, vocab_size=vocab_size, block_size=64, n_layer=1)


def test_samples_of_answers_are_as_long_as_requested():
    task = make_task("qa", TrainConfig(sample_tokens=3, precision="float32"))
    text = task.sample(make_task_model(task.records.tokenizer.vocab_size, seed=3))
    prompts = [
        task.records.tokenizer.decode(ids[~scored][1:].tolist())
        for ((ids, scored),) in task.records.splits["val"].records[:2]
    ]
    assert len("\n".join(prompts)) < len(text) <= len("\n".join(prompts)) + 2 * 3 * len("<EOS>")


def records_in_order(records: Records, step: int, micro_step: int) -> tuple:
    """Instead of `random_batch`: the same records in a step, whatever the batch size."""
    size = records.config.batch_size
    return records.batch(records.splits["train"].records[micro_step * size :][:size])


def text_loss(model: GPT, ids: np.ndarray, scored: np.ndarray) -> torch.Tensor:
    """The sum of the losses of the tokens that are scored."""
    logits = model(torch.from_numpy(ids[:-1])[None])[0][0, scored[1:]]
    return F.cross_entropy(logits, torch.from_numpy(ids[scored]), reduction="sum")


def answer_losses(task: QATask, model: GPT, split: str = "train") -> list[torch.Tensor]:
    return [text_loss(model, *example) for (example,) in task.records.splits[split].records]


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_averages_over_tokens_whatever_the_micro_batches(batch_size, grad_accum):
    config = TrainConfig(
        batch_size=batch_size, grad_accum=grad_accum, grad_clip=0.0, precision="float32",
        compile=False, max_steps=10,
    )  # fmt: skip
    task = make_task("qa", config)
    model = make_task_model(task.records.tokenizer.vocab_size)
    n_tokens = [scored.sum() for ((_, scored),) in task.records.splits["train"].records]
    assert n_tokens == [40, 38, 3, 2]
    loss = sum(answer_losses(task, model)) / 83
    expected = torch.autograd.grad(loss, list(model.parameters()))
    metrics = Trainer(model, task, config, CPU).train_step()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected))
    assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_evaluation_of_answers_averages_over_tokens(batch_size):
    config = TrainConfig(batch_size=batch_size)
    task = make_task("qa", config)
    model = make_task_model(task.records.tokenizer.vocab_size)
    metrics = task.evaluate(model)
    for split, n_tokens in LENGTHS.items():
        expected = sum(answer_losses(task, model, split)).item() / sum(n_tokens)
        assert metrics[split] == pytest.approx(expected, rel=1e-6)
    config.eval_windows = 1  # the final evaluation is over the whole split
    first = answer_losses(task, model, "val")[0].item() / LENGTHS["val"][0]
    assert task.evaluate(model)["val"] == pytest.approx(first, rel=1e-6)
    final = task.evaluate(model, full=True)
    assert final["val"] == pytest.approx(metrics["val"], rel=1e-6) and "train" not in final


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_records_and_make_equally_many_forward_passes(monkeypatch, world_size):
    task, batches, totals = make_task("qa", TrainConfig(batch_size=1)), [], []

    def measure(x, y):
        batches[-1].append(len(x))
        return [(y != -100).sum(dim=1), torch.ones(len(x))]

    monkeypatch.setattr(records, "world_size", lambda: world_size)
    monkeypatch.setattr(records, "all_reduce", lambda tensor: tensor)
    for rank in range(world_size):
        monkeypatch.setattr(records, "rank", lambda rank=rank: rank)
        batches.append([])
        totals.append(task.records.totals(measure, "train", None))
    assert np.sum(totals, axis=0).tolist() == [sum(LENGTHS["train"]), 4, 4 * world_size]
    assert all(sizes == batches[0] for sizes in batches)
    assert len(batches[0]) == math.ceil(4 / world_size)


def test_an_evaluation_of_preferences_averages_over_pairs():
    task = make_task("dpo", TrainConfig(batch_size=3))  # of four pairs
    model = make_task_model(task.records.tokenizer.vocab_size)
    losses, margins = [], []
    for pair in task.records.splits["train"].records:
        models = (model, task.reference)
        log_p = [[-text_loss(m, *text).item() for text in pair] for m in models]
        chosen, rejected = (0.3 * (log_p[0][i] - log_p[1][i]) for i in (0, 1))
        margins.append(chosen - rejected)
        losses.append(math.log1p(math.exp(rejected - chosen)))
    assert max(losses) - min(losses) > 0.1
    assert task.evaluate(model)["train"] == pytest.approx(np.mean(losses), rel=1e-4)
    task.records.splits["val"] = task.records.splits["train"]
    metrics = task.evaluate(model)  # TRL's rewards/margins and rewards/accuracies
    assert metrics["margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert metrics["accuracy"] == pytest.approx(np.mean([margin > 0 for margin in margins]))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_larger_vocabulary_does_not_change_the_old_tokens(kind):
    text = make_text(20)
    old = CharTokenizer.train([text]) if kind == "char" else train_bpe(count_pieces([text]), 270)
    model = make_model(vocab_size=old.vocab_size)
    new = extend_tokenizer(old, QA_SPECIALS, ["ABC 1"])
    assert set(QA_SPECIALS) <= set(new.specials)
    assert new.vocab_size == old.vocab_size + 4 + (4 if kind == "char" else 0)
    larger = make_model(vocab_size=new.vocab_size)
    larger.load_state_dict(extend_weights(model.state_dict(), old, new))
    assert new.decode(new.encode("the fox").tolist()) == "the fox"
    ids = {t: torch.from_numpy(t.encode("the fox"))[None] for t in (old, new)}
    assert torch.equal(model.tok(ids[old]), larger.tok(ids[new]))
    logits = [m(ids[t])[0] for m, t in ((model, old), (larger, new))]
    rows = [new.encode(chr(c)).item() for c in range(97, 123) if chr(c) in text]
    old_rows = [old.encode(chr(c)).item() for c in range(97, 123) if chr(c) in text]
    assert torch.allclose(logits[0][..., old_rows], logits[1][..., rows], atol=1e-5)
    assert extend_tokenizer(new, QA_SPECIALS, ["ABC"]) is new


def test_the_vector_of_a_new_token_is_the_mean_of_the_old_ones_plus_noise():
    old = CharTokenizer.train(["abcdefgh"])
    new = extend_tokenizer(old, QA_SPECIALS, ["".join(map(chr, range(200, 250)))])
    weights = make_model(vocab_size=8, n_embd=64).state_dict()
    torch.manual_seed(0)
    extended = extend_weights(weights, old, new)["tok.weight"]
    rows = [i for i, text in enumerate(new.texts) if text not in old.texts]
    assert len(rows) == len(QA_SPECIALS) + 50
    noise = extended[rows] - weights["tok.weight"].mean(dim=0)
    assert noise.std().item() == pytest.approx(0.02, rel=0.05)
    assert noise.mean(dim=0).abs().max() < 0.02


def test_new_tokens_replace_rows_of_an_imported_model_that_have_no_token():
    old = train_bpe(count_pieces([make_text(20)]), 270)
    new = extend_tokenizer(old, QA_SPECIALS, [])
    weights = make_model(vocab_size=290).state_dict()
    weights["tok.weight"][270:] = 100.0
    before = weights["tok.weight"]
    after = extend_weights(weights, old, new)["tok.weight"]
    assert new.vocab_size == 274 and after.shape == before.shape
    assert torch.equal(after[:270], before[:270]) and torch.equal(after[274:], before[274:])
    assert (after[270:274] - before[:270].mean(dim=0)).abs().max() < 0.1  # five times the noise


@pytest.mark.parametrize(
    ("objective", "adapted"), [*((name, False) for name in FLAGS), ("qa", True), ("dpo", True)]
)
def test_every_objective_writes_a_checkpoint_and_resumes_bit_for_bit(
    place: Path, monkeypatch, objective, adapted, capsys
):
    flags = [*FLAGS[objective], *(["--lora_rank=2"] if adapted else [])]
    flags += ["--dropout=0.1"] if objective != "dpo" else []
    assert tune(*flags, "--tag=whole") == 0
    names = {file.name for file in Path("checkpoints/whole").iterdir()}
    expected = {"best.pt", "latest.pt", "log.jsonl", "loss_log.json", "loss_curve.png"}
    assert names == expected | {"samples.txt", "lock"} | ({"adapter.pt"} if adapted else set())
    path = "checkpoints/whole/best.pt"
    assert generate.main([path, "--prompt=Why?", "--max_tokens=5", "--device=cpu"]) == 0
    assert evaluate.main([path, "--data=data/input.txt", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    share = float(re.search(r"are\s+trained \((.*?)%\)", out)[1])
    assert share < 60 if adapted else share == 100
    extra = {"text": "old", "qa": "exact", "distill": "ppl", "dpo": "margin"}[objective]
    assert f"| {extra} " in out and extra in read("whole")["log"][-1]
    monkeypatch.setattr(RunLog, "out_of_patience", lambda log: log.records[-1]["step"] == 3)
    tune(*flags, "--tag=stopped")
    assert read("stopped")["step"] == 3
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert finetune.main(["--resume", "--tag=stopped", "--device=cpu"]) == 0
    assert_same_run(read("stopped"), read("whole"))


def test_text_runs_also_report_the_loss_on_the_old_corpus(place: Path, capsys):
    Path("other.txt").write_text(make_text(300)[::-1])  # no new characters
    tune("--data=other.txt", "--eval_windows=999", "--max_steps=100", "--lr_max=2e-2")
    whole = read_run(Path("checkpoints")).final["val"]
    assert read("text")["log"][0]["old"] == pytest.approx(whole, rel=1e-5)
    assert read("text")["log"][-1]["old"] > whole
    flags = ["--data=other.txt", "--max_steps=1", "--lr_max=1e-9", "--tag=few"]
    tune(*flags, "--eval_windows=1")
    assert read_run(Path("checkpoints/few")).final["old"] == pytest.approx(whole, rel=1e-5)
    Path("data/input.txt").write_text(make_text(500))
    tune("--data=other.txt", "--tag=without")
    assert "not logging the loss on the old corpus" in capsys.readouterr().out
    assert "old" not in read("without")["log"][0]


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("max_steps", [40, 250])
def test_exact_is_the_share_of_answers_that_greedy_generation_gives(place: Path, max_steps, turns):
    flags = [f"--max_steps={max_steps}", f"--eval_every={max_steps}", "--lr_max=2e-2"]
    conversations = [[turn] for turn in TURNS[:4]]
    if turns == 2:
        conversations = [[("a", "b"), ("c", "d")], [("a", "b"), ("e", "f")]]
        rows = [zip(("user", "assistant") * 2, chain(*row), strict=True) for row in conversations]
        rows = [{"messages": [{"role": r, "content": text} for r, text in row]} for row in rows]
        Path("chats.json").write_text(json.dumps(rows))
        flags += ["--data=chats.json", "--no-hold_out"]
    tune("--objective=chat", *flags, "--batch_size=8")
    model, tokenizer, state = utils.load_checkpoint(Path("checkpoints/chat/latest.pt"), CPU)
    n_right, config = 0, SampleConfig(temperature=0, max_new_tokens=40)
    for conversation in conversations:
        past = torch.zeros(0, dtype=torch.long)
        for ids, scored in encode_turns(tokenizer, conversation):
            prompt = torch.cat([past, torch.from_numpy(ids[~scored])])
            steps = generate.generate(model, prompt, config, end_tokens(tokenizer))
            n_right += [step.ids.item() for step in steps] == ids[scored].tolist()
            past = torch.cat([past, torch.from_numpy(ids)])
    assert state["log"][0]["exact_train"] == 0.0
    assert state["log"][-1]["exact_train"] == n_right / 4
    assert n_right == 4 if max_steps == 250 else n_right < 4


def test_merging_the_adapter_gives_the_same_model(place: Path, adapted: Path):
    merge = ["checkpoints/best.pt", f"--merge={adapted}"]
    assert finetune.main(merge) == 0
    merged = read("merged", "best.pt")
    for name, tensor in utils.read_checkpoint(adapted.with_name("best.pt"))["model"].items():
        assert torch.allclose(merged["model"][name], tensor, atol=1e-6), name
    assert "adapter" not in merged and merged["merged"]["adapter"] == str(adapted)
    assert last_objective(merged) == "qa"
    words = ["checkpoints/merged/best.pt", "--prompt=Who?", "--max_new_tokens=5", "--device=cpu"]
    assert generate.main(words) == 0
    for flag in ([], ["--no-overwrite"]):
        with pytest.raises(UserError, match=r"already contains a run \(best\.pt\)"):
            finetune.main([*merge, *flag])
    with pytest.raises(UserError, match="for another base"):
        finetune.main([str(adapted.with_name("best.pt")), *merge[1:], "--overwrite"])
    before = Path("checkpoints/merged/best.pt").stat().st_ino
    assert finetune.main([*merge, "--overwrite"]) == 0
    assert Path("checkpoints/merged/best.pt").stat().st_ino != before


def assert_rejected(folder: Path, words: list[str], message: str) -> None:
    """The command is an error of one line, and nothing is written."""
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(UserError, match=message) as error:
        finetune.main(words)
    assert "\n" not in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_an_adapter_with_new_tokens_is_exported_by_the_commands_of_the_error(place, adapted):
    for package in ("safetensors", "tokenizers"):
        pytest.importorskip(package)
    with pytest.raises(UserError, match="which peft cannot add") as error:
        export.main([str(adapted), "out"])
    merge, then = re.findall(r"python \w+\.py (.*?)(?:,|$)", str(error.value))
    assert finetune.main(merge.replace("BASE.pt", "checkpoints/best.pt").split()) == 0
    assert export.main(then.split()) == 0
    tokenizer = json.loads(Path("out/tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<EOS>" and "chat_template" in tokenizer


def test_a_merge_replaces_nothing_but_a_merged_checkpoint(place: Path, adapted: Path):
    """With --overwrite, too: not a run, not its base, not a checkpoint from elsewhere."""
    shutil.copy("checkpoints/best.pt", "base.pt")
    merge = ["base.pt", f"--merge={adapted}", "--overwrite"]
    Path("checkpoints/copied").mkdir()
    shutil.copy("base.pt", "checkpoints/copied/best.pt")
    Path("checkpoints/stopped").mkdir()
    shutil.copy("checkpoints/latest.pt", "checkpoints/stopped/latest.pt")
    for tag in ("", "stopped", "copied"):
        assert_rejected(place, [*merge, f"--tag={tag}"], rf"checkpoints.{tag}/? ?contains a run")
    assert finetune.main(merge) == 0
    message = r"merged/ contains checkpoints/merged/best\.pt"
    assert_rejected(place, ["checkpoints/merged/best.pt", *merge[1:]], message)
    words = ["checkpoints/best.pt", "--data=other.txt", "--tag=merged", "--device=cpu"]
    assert_rejected(place, words, r"checkpoints.merged/ already contains a run \(best\.pt\)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the checkpoint to fine-tune"),
        (["checkpoints/best.pt", "--merge="], "name the base and the adapter"),
        (["--merge=ADAPTER"], "name the base and the adapter"),
        (["ADAPTER", "--data=other.txt"], "is a LoRA adapter: first merge it"),
        (["ADAPTER", "--merge=ADAPTER"], "is a LoRA adapter"),
        (["checkpoints/best.pt", "--merge=checkpoints/best.pt"], "is not the adapter.pt"),
        (["checkpoints/best.pt", "--merge=none.pt"], r"there is no adapter none\.pt"),
        (["data", "--merge=ADAPTER"], r"there is no checkpoint data.best\.pt"),
        (["checkpoints/best.pt", "--merge=ADAPTER", "--resume"], "--resume has no effect on"),
        (["checkpoints/best.pt", "--merge=ADAPTER", "--data=x", "--lora_rank=2"],
         "--data has no effect on --merge.*--lora_rank has no effect"),
        (["checkpoints/best.pt", "--merge=ADAPTER", "--out_dir=other.txt"], "cannot write"),
        (["checkpoints/best.pt", "--merge=ADAPTER", "--tag=a/b"], "must be a plain name"),
    ],
)  # fmt: skip
def test_mistakes_in_a_merge(place: Path, adapted: Path, words, message):
    assert_rejected(place, [word.replace("ADAPTER", str(adapted)) for word in words], message)


def test_a_merge_needs_one_process(place: Path, adapted: Path, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    words = ["checkpoints/best.pt", f"--merge={adapted}"]
    assert_rejected(place, words, "--merge needs one process")


def test_an_adapter_is_not_resumed_with_a_base_of_other_settings(place: Path):
    tune("--objective=dpo", "--data=pairs.jsonl", "--lora_rank=2")
    state = read("")
    state["gpt_config"]["norm_eps"] = 0.1
    torch.save(state, "checkpoints/best.pt")
    words = ["--resume", "--tag=dpo", "--max_steps=99", "--device=cpu"]
    assert_rejected(place, words, "the settings are different")


@pytest.mark.parametrize("arch", ARCHS)
def test_an_imported_model_learns_questions_with_an_adapter(place: Path, arch):
    """Its weights are not tied, and it has more rows than tokens, as large models do."""
    pytest.importorskip("safetensors")
    tokenizer = train_bpe(count_pieces([make_text(20)]), 270)
    sizes = {"vocab_size": 272, "block_size": 48, "n_layer": 1, "n_embd": 16, "n_head": 2}
    model = make_model(**(sizes | ARCHS[arch] | {"tie_weights": False}))
    state = read("") | {"gpt_config": asdict(model.config), "tokenizer": tokenizer.to_dict()}
    save_checkpoint(Path("own.pt"), state | {"model": model.state_dict()})
    export.main(["own.pt", "out"])
    export.main(["--from", "out", "imported.pt"])
    words = ["--objective=qa", "--lora_rank=2", "--lora_targets=all", "--lr_max=1e-2"]
    assert finetune.main(["imported.pt", *QUICK, *words, "--max_steps=30", "--eval_every=15"]) == 0
    assert finetune.main(["imported.pt", "--merge=checkpoints/qa/adapter.pt"]) == 0
    tuned, merged = read("qa", "best.pt"), read("merged", "best.pt")
    assert tuned["log"][-1]["val"] < 0.9 * tuned["log"][0]["val"]
    assert merged["gpt_config"]["vocab_size"] == 274  # of four new tokens, two used free rows
    for name, tensor in tuned["model"].items():
        assert torch.allclose(merged["model"][name], tensor, atol=1e-6), name


@pytest.mark.parametrize("objective", ["text", "qa", "dpo"])
def test_overfitting_one_batch_writes_nothing(place: Path, capsys, objective):
    assert tune(*FLAGS[objective], "--overfit_batch", "--max_steps=2") == 1
    assert "could not be overfitted" in capsys.readouterr().out
    assert not Path("checkpoints", objective).exists()


def test_batches_are_a_pure_function_of_seed_step_and_micro_step(monkeypatch):
    monkeypatch.setattr(Records, "batch", lambda self, items: items)

    def batch(step, micro_step, n=20, **settings):
        config = TrainConfig(**{"batch_size": 3, "grad_accum": 2, "seed": 5, **settings})
        records = Records({"train": Split([*range(n)])}, None, config, CPU, None)
        return records.random_batch(step, micro_step)

    batches = {(s, m): batch(s, m) for s in range(3) for m in range(2)}
    assert batches[2, 1] == batch(2, 1)
    assert len({tuple(items) for items in batches.values()}) == 6
    assert all(len(set(items)) == 3 for items in batches.values())
    assert batch(2, 1, seed=6) != batches[2, 1]
    for step in range(3):  # one batch of six is the same as two micro-batches of three
        assert batch(step, 0, batch_size=6, grad_accum=1) == batches[step, 0] + batches[step, 1]
    few = [batch(0, m, n=4) for m in range(2)]
    assert sorted(set(few[0] + few[1])) == [0, 1, 2, 3] and len(few[0]) == len(few[1]) == 3


def test_long_records_are_left_out_and_count_as_not_answered(place: Path, capsys):
    tokenizer = CharTokenizer.train([json.dumps(RECORDS) + "\n"], QA_SPECIALS)
    n_ids = len(encode_turn(tokenizer, *TURNS[0]).ids)
    for block_size, n_fit in ((n_ids - 1, 1), (n_ids - 2, 0)):
        splits = [[Record([TURNS[0], ("e", "e")])]] * 2  # as two rows
        train = encode_splits(pack_turns, splits, tokenizer, block_size, ask=False)["train"]
        assert (len(train.records), train.n_long) == (1 + n_fit, 1 - n_fit)
    task = make_task("qa", TrainConfig(precision="float32"))
    model = make_task_model(task.records.tokenizer.vocab_size)
    rows = task.records.splits["train"].records
    targets = task.records.batch(rows)[1].clamp(min=0)
    model.forward = lambda x: (F.one_hot(targets, 99),)
    assert task.score(model, "train", None)[1] == 1
    task.records.splits["train"] = Split(rows, n_long=12)
    assert task.score(model, "train", None)[1] == 4 / 16
    # One wrong token, the end of the second of three answers: each answer counts by itself
    turns = encode_turns(task.records.tokenizer, [("q", "a"), ("e", "ee"), ("q", "q")])
    task.records.splits["train"] = Split([[join_turns(turns)], rows[3]], n_long=1)
    targets = task.records.batch(task.records.splits["train"].records)[1].clamp(min=0)
    targets[0, len(turns[0].ids) + len(turns[1].ids) - 2] += 1
    assert task.score(model, "train", None)[1] == pytest.approx(3 / 5)

    long = {"question": "Why " * 20, "answer": "So."}  # <BOS>, Question: , \nAnswer:, <EOS>
    Path("long.json").write_text(json.dumps([*RECORDS, long]))
    tune("--objective=qa", "--data=long.json")
    shown = capsys.readouterr().err
    assert "1 of 5 train records are longer than the window of 48 tokens" in shown
    n_tokens = len("Question: \nAnswer: So.") + 79 + 1  # and <BOS> and <EOS>, less the last target
    assert f"(questions: not answered); use a model trained with --block_size {n_tokens}" in shown
    Path("long.json").write_text(json.dumps([long] * 3))
    with pytest.raises(UserError, match="no train record fits the window of 48 tokens: use a mod"):
        tune("--objective=qa", "--data=long.json", "--tag=c")


def test_invalid_records_are_left_out_on_request(place: Path):
    Path("bad.json").write_text(json.dumps([*RECORDS, {"question": "Why?"}]))
    flags = ["--data=bad.json", "--tag=bad", "--skip_bad"]
    assert tune("--objective=chat", *flags) == 0
    assert train.main([*TINY_RUN, *flags, "--overwrite"]) == 0
    assert read("bad")["corpus"]["documents"] == 5
    assert finetune.main(["checkpoints/bad/best.pt", *QUICK, "--data=other.txt"]) == 0
    assert "old" in read("text")["log"][0]  # the corpus of bad, without the invalid record


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--objective text needs --data"),
        (["--objective=qa", "--data=none.json"], "there is no none.json"),
        (["--objective=qa", "--data=bad.json"], "bad.json is not a list .*line 1 column 3"),
        (["--objective=learn"], "argument --objective: invalid choice: 'learn'"),
        (["--objective=distill"], "needs a --teacher"),
        (["--data=other.txt", "--teacher=a", "--beta=1"], "teacher is for .*distill; --beta is"),
        (["--data=other.txt", "--lora_alpha=8"], "--lora_alpha: give --lora_rank too"),
        (["--data=other.txt", "--dropout=1"], "dropout must be below 1"),
        (["--data=other.txt", "--lora_rank=2", "--lora_dropout=1"], "lora_dropout must be below 1"),
        (["--data=other.txt", "--lora_rank=2", "--lora_alpha=1e30"], "lora_alpha must be at most"),
        (["--data=other.txt", "--teacher_share=1", "--beta=1"], "teacher_share is .*; --beta is"),
        (["--objective=qa", "--separator=x"], "--separator is for --objective text or distill"),
        (["--objective=distill", "--teacher=a", "--overfit_batch"], "--overfit_batch is for"),
        (["--objective=qa", "--data=other.txt"], r"other\.txt: line 1: invalid JSON"),
        (["--objective=qa", "--data=one.json"], "too few records, because one is held"),
        (["--objective=dpo", "--data=other.txt"], r"other\.txt: line 1: invalid JSON"),
        (["--objective=dpo", "--data=accents.jsonl"], r"accents\.jsonl has characters .*: 'é'"),
        (["--objective=dpo", "--data=pairs.jsonl", "--dropout=0.1"], "trains without dropout"),
        (["--objective=distill", "--teacher=data"], "no checkpoint data.best.pt"),
        (["--data=empty"], "there is no text in the folder empty"),
        (["--data=other.txt", "--out_dir=other.txt"], "cannot write"),
        (["--data=other.txt", "--lora_rank=17"], "lora_rank 17 is above the smaller side .* 16"),
        (["--data=other.txt", "--n_layer=3"], "unrecognized arguments: --n_layer=3"),
        (["--data=other.txt", "--arch=llama"], "unrecognized arguments: --arch=llama"),
        (["--data=other.txt", "--tag=../x"], "must be a plain name"),
        (["--data=data/qa.json"], "contains questions and answers: use --objective chat"),
        (["--objective=distill", "--teacher=checkpoints/other.pt"], "different tokenizers"),
        (["--objective=distill", "--teacher=checkpoints/short.pt"], "16 tokens, is shorter"),
        (["--resume", "--tag=a"], "no checkpoint checkpoints.a.latest.pt"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(place: Path, words, message):
    Path("bad.json").write_text("[{]")
    Path("empty").mkdir()
    Path("one.json").write_text(json.dumps(RECORDS[:1]))
    Path("accents.jsonl").write_text(json.dumps(PAIRS[0] | {"chosen": " café"}))
    state = read("")
    other = state["tokenizer"] | {"chars": ["\x00", *state["tokenizer"]["chars"][1:]]}
    save_checkpoint(Path("checkpoints/other.pt"), state | {"tokenizer": other})
    short = {"gpt_config": state["gpt_config"] | {"block_size": 16}}
    save_checkpoint(Path("checkpoints/short.pt"), state | short)
    assert_rejected(place, ["checkpoints/best.pt", *QUICK, *words], message)


@pytest.mark.parametrize(
    ("objective", "words", "message"),
    [
        ("qa", ["--objective=dpo", "--tag=qa"], "objective is 'qa' in the run"),
        ("qa", ["--no-hold_out"], "hold_out is True in the run"),
        ("qa", ["--lora_rank=2"], "lora_rank is 0 in the run"),
        ("qa", ["--data=other.json"], r"data is 'data/qa\.json' in the run"),
        ("qa", ["--seed=1"], "seed is 1337 in the run"),
        ("qa", ["--teacher=checkpoints/best.pt"], "teacher is '' in the run"),
        ("qa", ["--overwrite"], "give one of them"),
        ("qa", ["--overfit_batch"], "--resume and --overfit_batch"),
        ("qa", ["--parallel=fsdp"], "unrecognized arguments: --parallel=fsdp"),
        ("qa", ["other.pt"], r"other\.pt has changed since this run began"),
        ("distill", ["--teacher_share=0.1"], "teacher_share is 0.5 in the run"),
        ("distill", ["--teacher=other.pt"], r"other\.pt has changed since this run began"),
        ("dpo", ["--beta=1"], "beta is 0.1 in the run"),
        ("dpo", ["--dropout=0.1"], "trains without dropout"),
    ],
)
def test_a_resume_rejects_what_cannot_change(runs: Path, monkeypatch, objective, words, message):
    monkeypatch.chdir(runs)
    words = ["--resume", f"--objective={objective}", "--device=cpu", *words]
    assert_rejected(runs, words, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoints/best.pt", "--tag="], r"checkpoints/ contains checkpoints/best\.pt"),
        (["checkpoints/best.pt"], "--resume it, --overwrite it"),
        (["checkpoints/qa/best.pt", "--overwrite"], r"qa/ contains checkpoints.qa.best"),
        (["checkpoints/qa", "--overwrite"], "qa/ contains checkpoints/qa:"),
        (["checkpoints/best.pt", "--objective=distill", "--teacher=checkpoints/qa/best.pt",
          "--tag=qa", "--overwrite"],
         r"qa/ contains checkpoints.qa.best"),
        (["--resume", "--tag="], r"a run of train\.py: resume it with train\.py"),
    ],
)  # fmt: skip
def test_runs_and_bases_are_never_overwritten(runs: Path, monkeypatch, words, message):
    monkeypatch.chdir(runs)
    assert_rejected(runs, ["--objective=qa", "--device=cpu", *words], message)
    with pytest.raises(UserError, match=r"a run of finetune\.py: resume it with finetune\.py"):
        train.main(["--resume", "--tag=qa", "--device=cpu"])


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of some objectives, and other.pt, a checkpoint with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for objective in ("qa", "distill", "dpo"):
            tune(*FLAGS[objective], "--max_steps=2")
        state = read("", "best.pt")
        state["model"]["norm.weight"] += 1
        save_checkpoint(Path("other.pt"), state)
    return folder


def test_a_run_with_other_data_is_not_resumed(place: Path):
    tune(*FLAGS["qa"])
    Path("data/qa.json").write_text(json.dumps(RECORDS[1:]))
    with pytest.raises(UserError, match=r"qa\.json has changed since this run"):
        finetune.main(["--resume", "--tag=qa", "--device=cpu"])


def test_a_damaged_adapter_is_rejected_or_merges_to_the_same_weights(place: Path, adapted: Path):
    merge = ["checkpoints/best.pt", "--overwrite", "--merge"]
    assert finetune.main([*merge, str(adapted)]) == 0
    expected = read("merged", "best.pt")

    def use():
        assert finetune.main([*merge, "damaged.pt"]) == 0
        merged = read("merged", "best.pt")
        assert merged["tokenizer"] == expected["tokenizer"]
        assert merged["model"].keys() == expected["model"].keys()
        for name, tensor in expected["model"].items():
            assert torch.equal(merged["model"][name], tensor), name

    assert n_rejected(lora.read_adapter(adapted), 120, 1, use, Path("damaged.pt"), {}) > 80


def settings_of(words: list[str]) -> tuple:
    classes = (FinetuneConfig, LoRAConfig, TrainConfig, GPTConfig)
    return parse_args(classes, words, "", resolve_finetune, check_finetune, help_defaults())


def test_a_base_whose_run_had_invalid_settings_is_rejected(place: Path):
    state = read("", "best.pt")
    state["train_config"]["lr_max"] = -1.0
    save_checkpoint(Path("odd.pt"), state)
    with pytest.raises(UserError, match=r"invalid checkpoint odd\.pt: .*lr_max must be above 0"):
        load_base(Path("odd.pt"))


@pytest.mark.parametrize("objective", ["qa", "distill"])
def test_a_damaged_base_or_teacher_is_rejected_or_has_the_same_weights(place: Path, objective):
    words = ["--tag=new", "--device=cpu", f"--objective={objective}"]
    distill = ["checkpoints/best.pt", "--teacher=damaged.pt"]
    words += ["damaged.pt"] if objective == "qa" else distill
    state = read("", "best.pt") | {"optimizers": []}

    def use():
        setup = settings_of(words)
        model = setup.teachers.models[0] if setup.teachers else setup.base.model
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state["model"][name], rtol=0, atol=1)

    assert n_rejected(state, 80, 3, use, Path("damaged.pt"), {}) > 20


@pytest.mark.parametrize("objective", ["distill", "adapted"])
def test_a_damaged_run_is_not_resumed(runs: Path, adapted: Path, objective, monkeypatch):
    monkeypatch.chdir(runs)
    Path("checkpoints/damaged").mkdir(exist_ok=True)
    folder = adapted.parent if objective == "adapted" else Path("checkpoints/distill")
    state = utils.read_checkpoint(folder / "latest.pt")
    names = ("finetune", "gpt_config", "train_config", "adapter", "corpus")
    damageable = {name: state[name] for name in names if name in state}
    rest = {name: state[name] for name in state.keys() - damageable.keys()}
    words = ["--resume", "--tag=damaged", "--device=cpu"]
    path = Path("checkpoints/damaged/latest.pt")
    assert n_rejected(damageable, 80, 4, lambda: settings_of(words), path, rest) > 30


def test_a_base_of_an_older_version_without_settings_is_fine_tuned(place: Path):
    state = read("", "best.pt")
    sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    state["train_config"] = {"preset": "huge", "arch": "gpt9", "unknown": 1}
    state["gpt_config"] = {name: state["gpt_config"][name] for name in (*sizes, "norm", "mlp")}
    state["gpt_config"] |= {"token_shift": True, "qk_norm": read("")["gpt_config"]["qk_norm"]}
    torch.save(state, "old.pt")
    assert finetune.main(["old.pt", *QUICK, "--objective=qa"]) == 0


@pytest.mark.parametrize(
    ("origin", "words", "rate"),
    [
        ({}, ["SOURCE", "--data=other.txt"], 2e-3),
        ({}, ["SOURCE", "--objective=qa"], 2e-2),
        ({}, ["SOURCE", "--objective=dpo", "--data=pairs.jsonl"], 2e-4),
        ({}, ["SOURCE", "--objective=distill", "--teacher=SOURCE"], 2e-3),
        ({}, ["SOURCE", "--data=other.txt", "--lora_rank=2"], 1e-2),
        ({}, ["SOURCE", "--objective=qa", "--lr_max=0.5"], 0.5),
        ({"optimizer": "muon"}, ["SOURCE", "--objective=qa"], 1e-2),
        ({"imported": True}, ["SOURCE", "--objective=qa"], 3e-4),
        ({"optimizer": "sgd"}, ["SOURCE", "--objective=qa"], 3e-4),
        ({"optimizer": "muon"}, ["SOURCE", "--data=other.txt", "--optimizer=sgd"], 1e-2),
    ],
)
def test_the_learning_rate_follows_from_the_base_and_the_objective(place, origin, words, rate):
    state = read("", "best.pt")
    state["train_config"] |= {"lr_max": 2e-2, "optimizer": "adamw"} | origin
    if origin.get("imported"):
        state["corpus"]["sha256"] = ""
    save_checkpoint(Path("base.pt"), state)
    if origin.get("imported"):
        with pytest.raises(UserError, match="give --data: the text that an imported model"):
            settings_of(["base.pt", "--objective=distill", "--teacher=base.pt", "--tag=new"])
    words = [word.replace("SOURCE", "base.pt") for word in words]
    assert settings_of([*words, "--tag=new", "--device=cpu"])[2].lr_max == pytest.approx(rate)


def test_rates_do_not_shrink_with_each_stage(place: Path):
    rate = read("", "best.pt")["train_config"]["lr_max"]
    Path("other.txt").write_text(make_text(300))
    tune("--data=other.txt", "--max_steps=1")
    for words, scale in ((["--data=other.txt"], 0.1), (["--objective=qa"], 1)):
        flags = ["checkpoints/text/best.pt", *words, "--tag=new", "--device=cpu"]
        assert settings_of(flags)[2].lr_max == pytest.approx(scale * rate)


def test_characters_are_not_learned_as_unknown(place: Path):
    tune("--objective=qa", "--max_steps=1")
    teacher = "checkpoints/qa/best.pt"
    assert "<UNK>" in utils.load_checkpoint(Path(teacher), CPU)[1].specials
    Path("accents.txt").write_text(make_text(100) + "\u00e9", encoding="utf-8")
    words = [teacher, "--objective=distill", f"--teacher={teacher}", "--data=accents.txt", *QUICK]
    with pytest.raises(UserError, match=r"accents\.txt has characters .* not know: 'é'; remove"):
        finetune.main(words)


def test_the_characters_of_a_separator_are_not_part_of_the_vocabulary(place: Path):
    Path("docs.txt").write_text("~~".join(make_text(20) for _ in range(12)))
    tune("--data=docs.txt", "--separator=~~", "--max_steps=1")
    tokenizer = utils.load_checkpoint(Path("checkpoints/text/best.pt"), CPU)[1]
    assert "~" not in tokenizer.chars and "<|endoftext|>" in tokenizer.specials


def test_a_single_document_can_be_learned_without_validation(place: Path):
    Path("one.jsonl").write_text(json.dumps({"text": make_text(50)}))
    tune("--data=one.jsonl", "--no-hold_out", "--max_steps=1")
    assert read("text")["train_config"]["hold_out"] is False


def test_samples_of_a_text_run_are_not_answers():
    tokenizer = CharTokenizer.train([make_text(20)], QA_SPECIALS)
    model = make_task_model(tokenizer.vocab_size)
    ids = tokenizer.encode(make_text(20))
    corpus = Corpus(ids, ids, {"name": "text"}, len(ids), len(ids))
    text = Pretraining(corpus, tokenizer, 64, TrainConfig(sample_tokens=30), CPU)
    base = SimpleNamespace(state={"train_config": {}})
    task = TextTask(text, SimpleNamespace(base=base), model)
    settings = SampleConfig(prompt="\n", max_new_tokens=30, seed=1337, qa=False)
    assert task.sample(model) == generate.sample_text(model, tokenizer, settings)[0]


def test_help_shows_only_flags_that_can_be_given(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for name in ("preset", "arch", "tokenizer", "bpe_vocab_size", "parallel"):
        assert f" --{name} " not in text
    assert "optimizer steps [text 500, chat 600, distill 1500, dpo 200]" in text
    assert "number of blocks" not in text


def test_the_base_has_the_names_that_it_has_elsewhere(place: Path):
    for flag in ("--source", "--checkpoint", "--model_name_or_path"):
        words = [f"{flag}=checkpoints/best.pt", "--data=other.txt", "--tag=new", "--device=cpu"]
        assert settings_of(words)[0].source == "checkpoints/best.pt"


@pytest.mark.parametrize("objective", FLAGS)
def test_a_dry_run_shows_the_first_record_and_writes_nothing(place: Path, objective: str, capsys):
    before = sorted(place.rglob("*"))
    assert tune(*FLAGS[objective], "--dry_run") == 0
    assert sorted(place.rglob("*")) == before
    text = capsys.readouterr().out
    rows = text.splitlines()
    # 1 layer of 16 channels: qkv and proj have 4 x 16 x 16 weights, SwiGLU's matrices 3 x 16 x 64
    assert "attention 1,024, MLP 3,072" in text
    masked = objective in ("qa", "dpo")  # only answers are scored
    assert rows[-3] == f"token by token{' (-: not scored)' * masked}:"
    assert rows[-2].startswith("  input ") and rows[-1].startswith("  target ")
    assert rows[-1].count(" - ") == (2 if masked else 0) and not rows[-1].endswith("-")
    target = ast.literal_eval(rows[-4].removeprefix("  target "))
    if objective == "qa":
        assert target in {f" {record['answer']}<EOS>" for record in RECORDS}
    elif objective == "dpo":
        assert target in {pair["chosen"] for pair in PAIRS}


@pytest.mark.parametrize("n_records", [1, 40])
def test_few_records_can_be_trained_with_none_held_out(place: Path, n_records):
    records = [{"question": f"fox {i}", "answer": f"{i}"} for i in range(n_records)]
    Path("few.json").write_text(json.dumps(records))
    flags = ["--objective=qa", "--data=few.json", "--batch_size=40", "--max_steps=1"]
    assert tune(*flags, "--no-hold_out", "--eval_windows=40") == 0
    first = read("qa")["log"][0]
    assert first["train"] == first["val"]
    if n_records > 1:
        assert tune(*flags, "--overwrite") == 0
        assert read("qa")["log"][0]["train"] != read("qa")["log"][0]["val"]


@pytest.mark.parametrize(("objective", "n"), [("qa", 5), ("dpo", 6)])
def test_all_records_are_trained_on_if_none_are_held_out(place: Path, capsys, objective, n):
    assert tune(*FLAGS[objective], "--no-hold_out", "--dry_run") == 0
    assert f"{n} training records, {n} validation records" in capsys.readouterr().out


def test_an_adapter_for_a_data_set_has_no_embeddings(place: Path):
    """The data set has the base's tokenizer, so there are no new tokens to train."""
    assert prepare.main(["data/input.txt", "--name=set", "--tokenizer=char"]) == 0
    train.main([*TINY_RUN, "--data=data/set", "--tag=base"])
    flags = [*QUICK, "--data=data/set", "--lora_rank=2"]
    assert finetune.main(["checkpoints/base/best.pt", *flags]) == 0
    tensors = lora.read_adapter(Path("checkpoints/text/adapter.pt"))["tensors"]
    assert all(name.endswith((".A", ".B")) for name in tensors)


@pytest.fixture
def held_out_first(place: Path) -> dict:
    """The held-out record, moved to where a split by number never puts a validation document."""
    records = [RECORDS[4], *RECORDS[:4]]
    Path("data/qa.json").write_text(json.dumps(records))
    return records[0]


def test_pretraining_never_sees_held_out_questions_and_validates_on_them(held_out_first):
    windows, val_ids = [], []

    class Recording(Pretraining):
        def get_batch(self, step, micro_step):
            (x, y), n = super().get_batch(step, micro_step)
            windows.extend(self.tokenizer.decode(row[row >= 0].tolist()) for row in (*x, *y))
            val_ids[:] = self.corpus.val_ids.tolist()
            return (x, y), n

    flags = [*TINY_RUN, "--data=data/qa.json", "--tag=scratch"]
    assert train.main(flags, task_type=Recording) == 0
    assert any("What" in window for window in windows)
    assert not any("N" in window for window in windows)  # only the held-out question has an N
    assert read("scratch")["corpus"]["documents"] == 5
    _, tokenizer, _ = utils.load_checkpoint(Path("checkpoints/scratch/best.pt"), CPU)
    assert val_ids == encode_turn(tokenizer, *TURNS[4]).ids.tolist()


def test_fine_tuning_validates_on_held_out_questions_it_never_sees(held_out_first, monkeypatch):
    seen, get_batch = [], QATask.get_batch

    def record(*args):
        (x, y), n = get_batch(*args)
        ends = [int((targets != -100).nonzero()[-1]) for targets in y]
        seen.extend(row[1 : end + 1] for row, end in zip(x, ends, strict=True))
        return (x, y), n

    monkeypatch.setattr(QATask, "get_batch", record)
    assert tune("--objective=qa") == 0
    model, tokenizer, _ = utils.load_checkpoint(Path("checkpoints/qa/best.pt"), CPU)
    texts = {tokenizer.decode(ids.tolist()) for ids in seen}
    assert texts == {record_text(Record([turn])) for turn in TURNS[:4]}
    turn = encode_turn(tokenizer, *TURNS[4])
    expected = text_loss(model, *turn).item() / turn.scored.sum()
    final = read_run(Path("checkpoints/qa")).final["val"]
    assert final == pytest.approx(expected, rel=1e-5)


def test_a_student_reads_the_corpus_of_its_teacher_with_the_same_separator(workplace: Path):
    Path("stories.txt").write_text("|".join(make_text(20 + i) for i in range(12)))
    assert train.main([*TINY_RUN, "--data=stories.txt", "--separator=|", "--tag=base"]) == 0
    base = "checkpoints/base/best.pt"
    config = settings_of([base, "--objective=distill", f"--teacher={base}"]).config
    assert (config.data, config.separator) == ("stories.txt", "|")
