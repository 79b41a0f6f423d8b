"""No script ends in a traceback: a few hundred cases of tests/fuzz.py, and what it reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits processes, and forks them, as POSIX can")
from tests import fuzz

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_random_commands_and_damaged_files_never_end_in_a_traceback():
    scripts = "train,generate,prepare,evaluate,finetune,export,explore,plots"
    command = [sys.executable, "-m", "tests.fuzz", "--n=50", "--minutes=0.5", f"--only={scripts}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "neighbor.txt").write_text("a")
    (tmp_path / "work" / "photo.jpg").write_text("b")
    (tmp_path / "before").write_text(json.dumps(fuzz.checksums(tmp_path)))
    return tmp_path


def judged(folder: Path, status: int = 2, stderr: str = "error: no such file\n") -> str | None:
    """What the fuzzer says about a case with this result."""
    (folder / "stderr").write_text(stderr)
    problem = fuzz.judge(fuzz.Case(0, "generate", ["best.pt"]), folder, status)
    return problem[0] if problem else None


PLACE = f'  File "{ROOT}/utils.py", line 7, in read_data\n    x = y\n'
TRACEBACK = f"Traceback (most recent call last):\n{PLACE}KeyError: 'model'\n"


@pytest.mark.parametrize(
    ("status", "stderr", "problem"),
    [
        (2, "error: no such file\n", None),
        (0, "", None),
        (2, "warning: unknown characters\nerror: no such file\n", None),
        (1, TRACEBACK, "KeyError at utils.py:7 (read_data)"),
        (2, "error: two\nlines\n", "more than one line"),
        (2, "", "more than one line"),
        (-11, "", "SIGSEGV "),
        (120, "", "status 120"),
    ],
)
def test_the_fuzzer_reports_wrong_ends(folder: Path, status: int, stderr: str, problem: str):
    assert judged(folder, status, stderr) == problem


def test_the_fuzzer_reports_changed_files(folder: Path):
    (folder / "work" / "best.pt.part").write_text("half")
    assert judged(folder) == "temporary file"
    (folder / "work" / "photo.jpg").write_text("c")
    assert judged(folder) == "file changed"
    (folder / "neighbor.txt").unlink()
    assert judged(folder) == "file deleted"


def test_a_case_is_the_same_every_time(tmp_path: Path):
    flags = {script: fuzz.settings_of(script) for script in ("train", "generate")}
    assert {"n_layer", "data", "lr_max"} <= {f.name for f in flags["train"]}

    def cases(seed: int) -> list[fuzz.Case]:
        return [fuzz.make_case(seed, i, list(flags), 0.5, flags, tmp_path) for i in range(50)]

    assert cases(seed=3) == cases(seed=3)
    assert len({str(case) for case in cases(seed=3) + cases(seed=4)}) > 80
