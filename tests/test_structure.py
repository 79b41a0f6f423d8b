"""Imports point down, a run loads only what it uses, and the code stays small."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import TINY_RUN, make_text

ROOT = Path(__file__).parent.parent
CORE = "config tokenizer model utils train generate".split()
LAYERS = """
    system | config | tokenizer model | utils | sampling corpus | generate | viz | training | train
    | finetuning | exporting | prepare evaluate finetune export explore plots demo | experiments
"""  # files and folders, lowest first
LEVEL = {name: i for i, layer in enumerate(LAYERS.split("|")) for name in layer.split()}
FOLDERS = [name for name in LEVEL if (ROOT / name).is_dir()]
SOURCES = [path for name in (".", *FOLDERS) for path in sorted((ROOT / name).glob("*.py"))]
PAGES = [path for name in ("exporting", "experiments") for path in (ROOT / name).rglob("*.*")]
PAGES = [path for path in PAGES if path.suffix in (".js", ".mjs", ".html", ".css")]
LINES = {path: path.read_text(encoding="utf-8").count("\n") for path in [*SOURCES, *PAGES]}
TEXTS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text("utf-8") for p in SOURCES}
TREES = {module: ast.parse(text) for module, text in TEXTS.items()}
NODES = [(module, node) for module, tree in TREES.items() for node in ast.walk(tree)]
FUNCTIONS = [(m, n) for m, n in NODES if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]

# The modules that a function imports because a default run does not need them.
OPTIONAL = {
    "corpus.corpus.make_tokenizer": "corpus.bpe",
    "corpus.dataset.checkpoint_tokenizer": "utils",
    "corpus.load.find_corpus": "corpus.download system.folders",
    "corpus.load.load_corpus": "corpus.documents corpus.folder corpus.records",
    "generate.generate": "sampling.compiled",
    "generate.load_for_sampling": "corpus.text sampling.quantize",
    "generate.main": "sampling.output",
    "generate.sample_text": "sampling.beam_search",
    "sampling.checks.sampling_problems": "system.files",
    "tokenizer.encode_segments": "system.segments",
    "train.main": "training.checks training.plan",
    "train.run_both": "training.plan",
    "training.distributed.make_replica": "training.fsdp",
    "training.muon.update": "training.fsdp",
    "training.plan.second_run": "training.teachers",
    "training.run_log.__init__": "training.writers",
    "training.run_log.begin": "training.deadline",
    "training.setup.decide_compile": "training.auto_compile",
    "training.setup.load_data": "training.teachers",
    "training.setup.on_checked_device": "training.device_check",
    "training.setup.resolve_train": "training.plan training.resume training.teachers",
    "viz.curve.plot_runs": "viz.fonts",
}


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The project's modules that `tree`, all of `module` or a function of it, imports."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = module.rpartition(".")[0] if node.level else ""
            source = f"{folder}.{node.module or ''}".strip(".")
            names = [source] + [f"{source}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name in TREES)


def test_every_module_has_a_layer():
    assert [module for module in TREES if module.split(".")[0] not in LEVEL] == []


def test_imports_point_down():
    wrong = []
    for module, tree in TREES.items():
        for target in imports(module, tree):
            top, target_top = module.split(".")[0], target.split(".")[0]
            same_folder = "." in module and top == target_top
            if LEVEL[target_top] >= LEVEL[top] and not same_folder:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycles():
    graph = {module: set(imports(module, tree)) for module, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(", imported by ".join(error.args[1]))


def test_only_optional_modules_are_imported_in_functions():
    found: dict[str, set[str]] = {}
    for module, function in FUNCTIONS:
        for target in imports(module, function):
            found.setdefault(f"{module}.{function.name}", set()).add(target)
    assert {name: " ".join(sorted(targets)) for name, targets in found.items()} == OPTIONAL


def test_no_module_uses_the_search_path():
    attributes = [(m, n) for m, n in NODES if isinstance(n, ast.Attribute)]
    assert [m for m, node in attributes if ast.unparse(node) == "sys.path"] == []


def test_the_core_is_small():
    lines = {name: LINES[ROOT / f"{name}.py"] for name in CORE}
    assert sum(lines.values()) <= 1800, lines
    sizes = {f"{m}.{f.name}": f.end_lineno - f.lineno + 1 for m, f in FUNCTIONS if m in CORE}
    assert {name: size for name, size in sizes.items() if size > 50} == {}
    assert sizes["train.main"] <= 25
    assert len(set(imports("train", TREES["train"]))) <= 12


def test_the_source_is_small():
    assert {path.name: n for path, n in LINES.items() if n > 400} == {}
    assert sum(n for path, n in LINES.items() if path.parent.name == "experiments") <= 3300
    assert sum(LINES.values()) <= 16000
    tests = sum(path.read_text("utf-8").count("\n") for path in (ROOT / "tests").glob("*.py"))
    assert tests <= 16000


# Run as a file: the script that is named, and at exit the files of all modules that it has loaded.
LOADED = """
import atexit, json, runpy, sys

def write():
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open("loaded.json", "w") as file:
        json.dump([sys.argv[0], *filter(None, files)], file)

atexit.register(write)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(sys.argv[0]).rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def loaded_by(tmp_path_factory: pytest.TempPathFactory):
    """Run a script with these arguments, and return the source files that it has loaded."""
    folder = tmp_path_factory.mktemp("loaded")
    (folder / "run.py").write_text(LOADED, encoding="utf-8")
    (folder / "text.txt").write_text(make_text(), encoding="utf-8")

    def run(script: str, *words: str) -> list[Path]:
        command = [sys.executable, "run.py", str(ROOT / script), *words]
        subprocess.run(command, cwd=folder, env=os.environ, check=True, capture_output=True)
        files = {Path(name) for name in json.loads((folder / "loaded.json").read_text())}
        return sorted(files & LINES.keys())

    run("train.py", "text.txt", *TINY_RUN, "--max_steps=2", "--eval_every=1")  # for generate.py
    return run


@pytest.mark.parametrize(
    ("words", "most_modules", "most_lines"),
    [
        (["train.py", "text.txt", *TINY_RUN, "--max_steps=2", "--tag=again"], 25, 4500),
        (["generate.py", "--max_new_tokens=3"], 12, 2100),
    ],
)
def test_a_default_run_loads_few_modules(loaded_by, words, most_modules, most_lines):
    files = loaded_by(*words)
    names = [str(file.relative_to(ROOT)) for file in files]
    assert words[0] in names and "model.py" in names
    assert len(files) <= most_modules, names
    assert sum(LINES[file] for file in files) <= most_lines, names
