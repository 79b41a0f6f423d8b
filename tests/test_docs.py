"""The commands of README.md and docs/ work as written, in their order, at a size that takes
seconds, and what the pages name exists."""

import ast
import json
import re
import runpy
import shlex
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
PAGES = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES["README.md"] = README
SETUP = ("python3 -m venv", ". .venv", "py -m", "pip install")
# Commands that other tests run: of packages that may be missing, or in processes of their own
ELSEWHERE = {
    "demo.py": "test_demo.py",
    "--tensorboard": "test_run_log.py",
    "tensorboard": "test_run_log.py",
    "torchrun": "test_distributed.py",
    "--plan": "test_plan.py",
    "--minutes": "test_plan.py",
    "pytest": "test_docs.py",
}
# In commands within the text: placeholders in capitals, and what is not for a test
SKIPPED = re.compile(r"\b[A-Z]+\b(?!:)|--help|tinystories|big\.txt|code\.txt")
DIGITS = str.maketrans("0123", "abcd")  # characters that the small text has


def commands(page: str) -> list[tuple[str, bool]]:
    """The commands of a page, in their order: the lines of its shell blocks, and commands of this
    program within the text. Whether each is within the text."""
    found = []
    pattern = r"^```bash\n(.*?)^```|`(python \w+\.py[^`]*)`"
    for block, inline in re.findall(pattern, page, re.S | re.M):
        if inline and not SKIPPED.search(inline):
            found.append((inline, True))
        lines = (line for line in block.splitlines() if line)
        found += [(part, False) for line in lines for part in line.split(" && ")]
    return found


def run_command(line: str, inline: bool) -> None:
    for file in re.findall(r"-r (\S+)|--with-requirements (\S+)", line):
        assert (ROOT / "".join(file)).exists(), line
    if line.startswith(SETUP):
        return
    if line.startswith("echo "):
        _, text, _, file = shlex.split(line, comments=True)
        Path(file).write_text(text)
        return
    inline = inline or line.startswith("uv run")  # repeats the line before with another tool
    line = re.sub(r"^uv run --no-project (--with-requirements \S+ )+(python )?", "python ", line)
    words = shlex.split(line)
    if known := ELSEWHERE.keys() & set(words):
        assert all((ROOT / "tests" / ELSEWHERE[word]).exists() for word in known)
        return
    program, *words = words[1:]
    if program == "-m":  # test_experiments.py runs the studies
        assert (ROOT / f"{words[0].replace('.', '/')}.py").exists(), line
    elif program == "train.py":
        resumed = "--resume" in words
        tiny = ["--max_steps=80"] if resumed else [*TINY_RUN, "--max_steps=60", "--eval_every=30"]
        tiny += [] if resumed else ["--block_size=32"]  # for questions with their answers
        tiny += ["--overwrite"] * (inline and not resumed)  # it may be named twice
        status = train.main([*words, *tiny])
        assert status == (1 if "--overfit_batch" in words else 0)  # 60 steps are too few for that
    elif program == "generate.py":
        assert generate.main([*words, "--max_new_tokens=5"]) == 0
    elif program == "explore.py":
        assert explore.main([*words, "--max_new_tokens=5"]) == 0
    elif program == "finetune.py":
        tiny = ["--max_steps=4", "--eval_every=2", "--sample_tokens=10", "--no-compile"]
        tiny += ["--overwrite"] * inline
        assert finetune.main([*words, *([] if "--merge" in words else tiny)]) == 0
    elif program == "plots.py":  # of a model with one layer and a small window
        assert plots.main([*words, "--text=the dog", "--layers="]) == 0
    else:
        scripts = {"prepare.py": prepare, "evaluate.py": evaluate, "export.py": export}
        overwrite = ["--overwrite"] * (inline and program == "export.py")
        assert scripts[program].main([*words, *overwrite]) == 0


@pytest.fixture
def user_files(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the sample files of the repository, shortened, and a default run."""
    monkeypatch.setattr("builtins.input", lambda prompt: "")  # the user sends nothing
    scenes = (json.dumps({"text": f"scene {i}\n{make_text(10)}"}) for i in range(30))
    (workplace / "data" / "plays.jsonl").write_text("\n".join(scenes))
    (workplace / "data" / "example.txt").write_text(make_text(), encoding="utf-8")
    records = [{"question": "Who?", "answer": f"Fox {i}."} for i in range(4)]
    (workplace / "data" / "qa.json").write_text(json.dumps(records))
    pairs = ({"prompt": "the", "chosen": f" {i}", "rejected": f" not {i}"} for i in range(4))
    lines = (json.dumps(pair).translate(DIGITS) for pair in pairs)
    (workplace / "data" / "pairs.jsonl").write_text("\n".join(lines))
    return workplace


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_commands_work_in_their_order(user_files: Path, page: str):
    pytest.importorskip("safetensors")
    if page != "README.md":  # which begins without a run
        run_command("python train.py", False)
    for line, inline in commands(PAGES[page]):
        run_command(line, inline)


def test_commands_are_found():
    assert len(commands(README)) > 20
    assert sum(len(commands(page)) for page in PAGES.values()) > 60


def test_the_test_command_is_what_ci_runs():
    assert ("python -m pytest", False) in commands(README)
    assert "\npython -m pytest\n" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 12_000


def test_every_page_is_listed_in_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"(docs/{page})" in README, page


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
    names = re.findall(r"`([\w.]+)`\s\((\S+\.py)\)", PAGES["how_it_works.md"])
    assert len(names) > 10
    for name, file in names:
        assert name in definitions(ast.parse((ROOT / file).read_text(encoding="utf-8"))), name


def test_links_lead_to_files_and_sections():
    def anchors(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)", text, re.M)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            name, _, anchor = link.partition("#")
            target = folder / name if name else folder / page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def run_snippet(page: str, *replacement: str) -> dict[str, object]:
    """Run the Python code of a page, with a text replaced. Returns its variables."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.S | re.M)
    Path("snippet.py").write_text(code.replace(*replacement) if replacement else code)
    return runpy.run_path("snippet.py")


@pytest.fixture
def tiny_training(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which train.main trains a tiny model."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    original = train.main
    monkeypatch.setattr(train, "main", lambda argv, *task: original([*argv, *TINY_RUN], *task))
    return workplace


def test_the_custom_loss_is_trained_and_logged(tiny_training: Path):
    run_snippet("how_it_works.md")
    state = utils.read_checkpoint(Path("checkpoints/smoothed/latest.pt"))
    last = state["log"][-1]
    assert last["step"] == state["step"] == 20
    assert 0 < last["plain"] < 4 and last["plain"] != last["train"]


def test_five_lines_of_python_train_sample_and_inspect(tiny_training, capsys):
    scope = run_snippet("README.md", "ROMEO:", "the dog")
    printed = capsys.readouterr().out
    assert "\nthe dog" in printed and "GPT(" in printed
    assert scope["checkpoint"]["step"] == 20


def test_the_tokenizer_page_shows_what_it_says(workplace: Path, capsys: pytest.CaptureFixture):
    run_snippet("tokenizers.md")
    first, second = capsys.readouterr().out.splitlines()
    # <|endoftext|> is 0; space d e h l o r w are 1 to 8
    assert first == "[4, 3, 5, 5, 6, 0] 'hello<|endoftext|>'"
    assert json.loads(second) == [4, 3, 5, 5, 6, 1, 8, 6, 7, 5, 2]


def test_the_core_files_that_the_readme_names_exist():
    diagram = re.search(r"## How the files fit.*?```\n(.*?)```", README, re.S)[1]
    names = re.findall(r"\w+\.py", diagram)
    assert len(names) > 10 and all((ROOT / name).exists() for name in names)


def test_the_evaluations_are_read_as_the_settings_page_says(tiny_training, capsys):
    train.main([])
    capsys.readouterr()
    run_snippet("settings.md")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "5", "10", "15", "20"]
