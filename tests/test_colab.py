"""The notebook runs from a clean kernel, resumes its run, and finds the code."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN

from utils import read_checkpoint

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs_and_resumes(workplace, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    processor = pytest.importorskip("nbconvert.preprocessors").ExecutePreprocessor
    pytest.importorskip("ipykernel")
    ignored = shutil.ignore_patterns(".*", "checkpoints", "data", "docs", "tests", "__pycache__")
    shutil.copytree(ROOT, workplace, ignore=ignored, dirs_exist_ok=True)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    notebook = nbformat.read(ROOT / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    flags = " ".join([*TINY_RUN, "--block_size=32", "--max_steps="])
    for cell in notebook.cells:
        cell.source = cell.source.replace('FLAGS = ""', f"FLAGS = {flags + '20'!r}")
        cell.source = cell.source.replace("!grep", "# !grep").replace("00 ", "0 ")
    (training,) = [cell for cell in notebook.cells if "RESUME =" in cell.source]
    again = nbformat.v4.new_code_cell(f"FLAGS = {flags + '30'!r}\n{training.source}")
    notebook.cells.append(again)  # as after a disconnect
    cut_off = workplace / "checkpoints" / "colab"  # an earlier run, before its first checkpoint
    cut_off.mkdir(parents=True)
    (cut_off / "log.jsonl").write_text("{}\n")
    processor(timeout=60).preprocess(notebook, {"metadata": {"path": str(workplace)}})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    assert sum("image/png" in data for data in shown) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "temperature=0.5 top_k=5 " in printed and "error:" not in printed
    assert "resuming at step 20" in "".join(output.text for output in again.outputs)
    assert read_checkpoint(workplace / "checkpoints" / "colab" / "latest.pt")["step"] == 30


def run_first_cell(folder: Path, repo: str = "") -> None:
    notebook = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))
    code = next(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    script = folder / "first_cell.py"
    script.write_text("".join(code).replace('REPO = ""', f"REPO = {repo!r}"))
    runpy.run_path(str(script))


def test_the_notebook_finds_the_code_or_clones_it_or_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="set REPO"):
        run_first_cell(tmp_path)
    with pytest.raises(SystemExit, match="could not be cloned: check REPO"):
        run_first_cell(tmp_path, str(tmp_path / "none"))
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "train.py").touch()
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    run_first_cell(tmp_path, str(origin))
    assert Path.cwd() == tmp_path / "TinyLLM" and Path("train.py").exists()
    run_first_cell(tmp_path)  # opened from a clone
    assert Path.cwd() == tmp_path / "TinyLLM"
    os.chdir(tmp_path)  # a new kernel on the same machine
    run_first_cell(tmp_path)
    assert Path.cwd() == tmp_path / "TinyLLM"
