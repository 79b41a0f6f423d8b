"""The README's commands work as they stand, in its order, at a size that takes seconds."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, make_text

import evaluate
import explore
import export
import finetune
import generate
import plots
import prepare
import train
import utils

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


DIGITS = str.maketrans("0123", "abcd")  # characters that the small text has


def commands() -> list[str]:
    """The lines of the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def run_command(line: str) -> None:
    """Run a python command of the README, at a tiny size; a shell loop in a shell."""
    if line.startswith("for "):
        script = line.replace("python ", f"{sys.executable} {ROOT}/").replace(
            "--num_samples", "--max_new_tokens 5 --num_samples"
        )
        subprocess.run(["bash", "-c", script], check=True)
        return
    if line.startswith("torchrun "):  # tests/test_distributed.py runs it
        assert line.split()[2] == "train.py"
        return
    program, *words = shlex.split(line)[1:]
    if program == "-m" and words[0].startswith("experiments."):  # test_experiments.py runs them
        assert (ROOT / f"{words[0].replace('.', '/')}.py").exists(), line
        return
    if program == "demo.py" or "--tensorboard" in words:
        return  # test_demo.py and test_run_log.py, for those who have the packages
    if program == "train.py":
        resumed = "--resume" in words
        tiny = ["--max_steps=80"] if resumed else [*TINY_RUN, "--max_steps=60", "--eval_every=30"]
        status = train.main([*words, *tiny])
        assert status == (1 if "--overfit_batch" in words else 0)  # 60 steps are too few for that
    elif program == "generate.py":
        assert generate.main([*words, "--max_new_tokens=5"]) == 0
    elif program == "explore.py":
        assert explore.main([*words, "--max_new_tokens=5"]) == 0
    elif program == "finetune.py":
        tiny = ["--max_steps=4", "--eval_every=2", "--sample_tokens=10", "--no-compile"]
        assert finetune.main([*words, *([] if "--merge" in words else tiny)]) == 0
    elif program in ("prepare.py", "evaluate.py", "export.py"):
        scripts = {"prepare.py": prepare, "evaluate.py": evaluate, "export.py": export}
        assert scripts[program].main(words) == 0
    elif program == "plots.py":  # of a model with one layer and a small window
        assert plots.main([*words, "--text=the dog", "--layers="]) == 0
    else:
        assert program == "-m", f"no test for {line}"


def test_the_commands_work_in_their_order(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "")  # nobody talks with the model
    (workplace / "my.txt").write_text(make_text(), encoding="utf-8")
    pytest.importorskip("safetensors")
    scenes = (json.dumps({"text": f"scene {i}\n{make_text(10)}"}) for i in range(30))
    (workplace / "data" / "plays.jsonl").write_text("\n".join(scenes))
    records = [{"question": "Who?", "answer": f"Fox {i}."} for i in range(4)]
    (workplace / "data" / "qa.json").write_text(json.dumps(records))
    pairs = ({"prompt": "the", "chosen": f" {i}", "rejected": f" not {i}"} for i in range(4))
    pairs = (json.dumps(pair).translate(DIGITS) for pair in pairs)
    (workplace / "pairs.jsonl").write_text("\n".join(pairs))
    lines = [line for line in commands() if line.startswith(("python ", "for "))]
    assert len(lines) > 10
    for line in lines:
        run_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --lr-max 1e-4 --warmup 50 --tag lr_conservative",
        "python train.py --batch_size 32 --max_iters 5000 --d_model 512 --n_layers 8",
    ],
)
def test_settings_from_other_code_bases_work(workplace: Path, line: str):
    words = shlex.split(line)[2:]
    tiny = [w for w in TINY_RUN if not w.startswith("--max_steps")]
    wanted = ["--max_steps=60"] if "--warmup" in words else ["--max_steps=20"]
    assert train.main([*words, *tiny, *wanted]) == 0


def test_the_test_command_is_what_ci_runs():
    assert "python -m pytest" in commands()
    assert "\npython -m pytest\n" in (ROOT / ".ci" / "run").read_text()


def definitions(tree: ast.AST) -> dict[str, ast.AST]:
    """The functions and classes of a file, methods as Class.method."""
    found = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {node.name: node}
            found |= {f"{node.name}.{name}": n for name, n in definitions(node).items()}
    return found


def test_the_code_to_read_is_in_the_file_that_is_named():
    """`name` (file.py) is a class or function of that file."""
    names = re.findall(r"`([\w.]+)`\s\((\S+\.py)\)", README)
    assert len(names) > 10 and "#L" not in README
    for name, file in names:
        assert name in definitions(ast.parse((ROOT / file).read_text(encoding="utf-8"))), name


def test_the_custom_loss_is_trained_and_logged(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    (snippet,) = re.findall(r"```python\n(import torch.*?)```", README, re.S)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    original = train.main
    monkeypatch.setattr(train, "main", lambda argv, task: original([*argv, *TINY_RUN], task))
    Path("custom_loss.py").write_text(snippet)
    runpy.run_path("custom_loss.py")
    lines = Path("checkpoints/smoothed/log.jsonl").read_text().splitlines()
    last = json.loads(lines[-2])
    state = utils.read_checkpoint(Path("checkpoints/smoothed/latest.pt"))
    assert last["step"] == 20 and state["log"][-1]["plain"] == last["plain"]
    assert 0 < last["plain"] < 4 and last["plain"] != last["train"]


def test_the_files_named_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    tree = re.search(r"## The files.*?```\n(.*?)```", README, re.S)[1]
    for name in re.findall(r"^(\S+\.(?:py|txt))", tree, re.M):
        assert (ROOT / name).exists(), name
    for folder in re.findall(r"^(\w+)/", tree, re.M):
        assert (ROOT / folder).is_dir(), folder
