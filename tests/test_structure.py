"""Imports point down, and the core stays small."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = "config tokenizer model utils train generate".split()
LAYERS = """
    system | config | tokenizer model | utils | sampling corpus | generate | viz | training | train
    | finetuning | exporting | prepare evaluate finetune export explore plots demo | experiments
"""  # files and folders, lowest first
LEVEL = {name: i for i, layer in enumerate(LAYERS.split("|")) for name in layer.split()}
TEXTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    if path.parent != ROOT / "mutants"  # what mutmut writes
    if path.parent.name != "tests"
}
TREES = {module: ast.parse(text) for module, text in TEXTS.items()}
NODES = [(module, node) for module, tree in TREES.items() for node in ast.walk(tree)]
FUNCTIONS = [(m, n) for m, n in NODES if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


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


def test_functions_import_no_module_of_the_project():
    assert [(m, f.name, name) for m, f in FUNCTIONS for name in imports(m, f)] == []


def test_no_module_uses_the_search_path():
    attributes = [(m, n) for m, n in NODES if isinstance(n, ast.Attribute)]
    assert [m for m, node in attributes if ast.unparse(node) == "sys.path"] == []


def test_the_core_is_small():
    lines = {module: len(TEXTS[module].splitlines()) for module in CORE}
    assert {module: n for module, n in lines.items() if n > 400} == {}
    assert sum(lines.values()) < 2000
    sizes = [(m, f.name, f.end_lineno - f.lineno + 1) for m, f in FUNCTIONS if m in CORE]
    assert [(m, name, n) for m, name, n in sizes if n > 50] == []
