"""The README's commands work as they stand, in its order, at a size that takes seconds."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, make_text

import evaluate
import export
import finetune
import generate
import plots
import prepare
import train

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
    if line.startswith("torchrun "):  # tests/test_parallel.py runs it
        assert line.split()[2] == "train.py"
        return
    program, *words = shlex.split(line)[1:]
    if program.startswith("experiments/"):  # tests/test_studies.py runs them
        assert (ROOT / program).exists(), line
        return
    if program == "demo.py" or "--tensorboard" in words:
        return  # test_demo.py and test_live.py, for those who have the packages
    if program == "train.py":
        resumed = "--resume" in words
        tiny = ["--max_steps=80"] if resumed else [*TINY_RUN, "--max_steps=60", "--eval_every=30"]
        status = train.main([*words, *tiny])
        assert status == (1 if "--overfit_batch" in words else 0)  # 60 steps are too few for that
    elif program == "generate.py":
        assert generate.main([*words, "--max_new_tokens=5"]) == 0
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


def test_the_lines_to_read_are_those_of_what_is_named():
    """`name` ([file.py 3-9](file.py#L3-L9)) is where the class or function begins and ends."""
    links = re.findall(r"`([\w.]+)`\s\(\[(\S+) (\d+)-(\d+)\]\((\S+)#L(\d+)-L(\d+)\)\)", README)
    assert len(links) == README.count("#L") > 10
    for name, file, first, last, path, *lines in links:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        defined = {n.name: n for n in ast.walk(tree) if isinstance(n, kinds)}
        found = defined[name.split(".")[-1]]
        assert (file, [first, last]) == (path, lines)
        assert (int(first), int(last)) == (found.lineno, found.end_lineno), f"{name} in {file}"


def test_the_files_named_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    tree = re.search(r"## The files.*?```\n(.*?)```", README, re.S)[1]
    for name in re.findall(r"^(\S+\.(?:py|txt))", tree, re.M):
        assert (ROOT / name).exists(), name
    assert not os.path.isabs(tree.split()[0])
