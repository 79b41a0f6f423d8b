"""One-line errors, locks, memory."""

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock
from system.start import accept_any_text, run

import pytest
import torch

from system import device as system_device
from system.device import check_memory
from system.files import atomic_write, file_problems, folder_problems, locked
from system.folders import replacing, restore_folder
from system.settings import UserError

ROOT = Path(__file__).resolve().parent.parent


def start(code: str, stdout: object = subprocess.PIPE, **options: object) -> subprocess.Popen:
    """Python code in a process of its own that can import this project."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=stdout, stderr=subprocess.PIPE, **options
    )


def status_of(error: BaseException) -> int | None:
    """The exit status of a script in which this error is raised."""
    with pytest.raises(SystemExit) as exit:
        run(Mock(side_effect=error))
    return exit.value.code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such preset\nx"), "no such preset x"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file"),
        (OSError(28, "No space left on device"), "input or output: No space left on device"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2"), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[3]"), "not enough memory"),
    ],
)
def test_errors_that_a_user_can_correct_are_one_line(capsys, error: Exception, line: str):
    assert status_of(error) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_a_defect_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        status_of(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(("rank", "place"), [("0", ""), ("3", " in process 3")])
def test_an_error_names_the_process_of_torchrun(monkeypatch, capsys, rank: str, place: str):
    monkeypatch.setenv("RANK", rank)
    assert status_of(UserError("wrong")) == 2
    assert capsys.readouterr().err == f"error{place}: wrong\n"


def test_a_reader_that_ends_early_is_no_error():
    code = "from system.start import run\nrun(lambda: print('text\\n' * 100000))"
    process = start(code)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("fails", [False, True])
def test_output_that_cannot_be_written_is_one_line(fails: bool):
    code = f"""
from system.settings import UserError
from system.start import run
def main():
    print("text")
    if {fails}:
        raise UserError("a mistake")
run(main)
"""
    with open("/dev/full", "w") as full:
        process = start(code, stdout=full)
    expected = "a mistake" if fails else "input or output: No space left on device"
    assert process.stderr.read() == f"error: {expected}\n" and process.wait() == 2


def test_ctrl_c_and_an_exit_end_a_script_without_an_error(capsys):
    for code in (0, 3, None):
        assert status_of(SystemExit(code)) == code
    assert status_of(KeyboardInterrupt()) == 130 and capsys.readouterr().err == ""


def test_invalid_input_is_read_with_replacement_characters(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8"))
    accept_any_text()
    assert input() == "a\ufffdb"


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path):
    (tmp_path / "my.txt").write_text("a file")
    assert folder_problems(tmp_path) == folder_problems(tmp_path / "new" / "run") == []
    assert not (tmp_path / "new").exists()
    for name in ("my.txt", "my.txt/run", "x" * 300):
        (problem,) = folder_problems(tmp_path / name)
        assert problem.startswith(f"cannot write to the folder {tmp_path / name}: ")


HOLD = """
import sys, time
from pathlib import Path
from system.folders import locked
with locked(Path("run"), "a test"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_holder_whose_lock_ends_with_its_process(tmp_path: Path):
    holder = start(HOLD, cwd=tmp_path)
    assert holder.stdout.readline() == "locked\n"
    folder = tmp_path / "run"
    message = rf"in use by a test, process {holder.pid} on .+ since 20"
    with pytest.raises(UserError, match=message), locked(folder, "another"):
        pass
    holder.kill()
    holder.communicate()
    assert (folder / "lock.txt").exists()  # it was killed
    with locked(folder, "another"):
        assert f"another, process {os.getpid()}" in (folder / "lock.txt").read_text()
    assert not (folder / "lock.txt").exists()


def test_the_check_of_a_file_keeps_what_another_process_writes(tmp_path: Path):
    path = tmp_path / "model.gguf"
    with atomic_write(path) as file:
        assert file_problems(path) == []
        file.write(b"complete")
    assert path.read_bytes() == b"complete"
    assert file_problems(path) == [] and list(tmp_path.iterdir()) == [path]


def test_on_windows_a_file_that_is_being_read_is_replaced_later(tmp_path, monkeypatch):
    replace, waits = os.replace, []
    refused = Mock(side_effect=[PermissionError(13, "in use"), PermissionError(13, "in use"), None])
    monkeypatch.setattr(os, "replace", lambda *paths: refused() or replace(*paths))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(time, "sleep", waits.append)
    with atomic_write(tmp_path / "new") as file:
        file.write(b"text")
    assert (tmp_path / "new").read_bytes() == b"text" and sum(waits) == 0.2


def test_a_folder_is_replaced_only_at_the_end_and_by_one_process(tmp_path):
    folder, checks = tmp_path / "set", []
    for text in ("old", "new"):
        with replacing(folder, "a test", lambda: checks.append(folder.exists())) as new:
            (new / "a.txt").write_text(text)
            assert text == "old" or (folder / "a.txt").read_text() == "old"
            message = f"set is in use by a test, process {os.getpid()}"
            with pytest.raises(UserError, match=message), replacing(folder, "b", lambda: None):
                pass
        assert (folder / "a.txt").read_text() == text and os.listdir(tmp_path) == ["set"]
    assert checks == [False, False, True, True]


def test_what_a_killed_replacement_moved_away_returns_before_the_next_one(tmp_path: Path):
    old = tmp_path / ".set.part" / "old"
    old.mkdir(parents=True)
    (old / "a.txt").write_text("old")

    def check() -> None:  # it must see the old folder, to decide whether it may be replaced
        assert (tmp_path / "set" / "a.txt").read_text() == "old"
        raise UserError("not to be replaced")

    with pytest.raises(UserError, match="not to be"), replacing(tmp_path / "set", "a test", check):
        pass
    assert (tmp_path / "set" / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["set"]


def test_a_replaced_folder_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    with replacing(tmp_path / "set", "a test", lambda: None) as new:
        (new / "a.txt").write_text("text")
    assert calls == ["fsync", "fsync", "rename", "fsync"]  # the file, its folder; the parent


def test_the_root_folder_was_not_moved_away():
    restore_folder(Path("/"))


def test_a_folder_without_locks_can_be_used_also_when_an_old_lock_file_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("fcntl", reason="flock is POSIX")
    (tmp_path / "lock").touch()
    error = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
    with locked(tmp_path, "a test"):
        assert "cannot be locked" in capsys.readouterr().out


def test_only_a_new_folder_to_which_nothing_was_written_is_removed(tmp_path: Path):
    (tmp_path / "old").mkdir()
    for name in ("old", "a/b/c", "d/e"):
        with pytest.raises(UserError, match="diverged"), locked(tmp_path / name, "a test"):
            if name == "d/e":
                (tmp_path / name / "log").touch()
            raise UserError("diverged")
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(left) == ["d", "d/e", "d/e/lock", "d/e/log", "old", "old/lock"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_folder_on_a_full_disk_is_locked_without_the_name_of_the_holder(tmp_path: Path):
    (tmp_path / "lock.txt").symlink_to("/dev/full")
    with locked(tmp_path, "a test"):
        pass


def test_what_does_not_fit_in_memory_is_rejected(monkeypatch):
    device = torch.device("cpu")
    size = system_device.memory_size(device)
    assert size is not None and 1e9 < size < 1e14
    check_memory(size, device, "the model")
    with pytest.raises(UserError, match=r"the model takes about 99,000.0 GB, and cpu has"):
        check_memory(99 * 10**12, device, "the model")
    monkeypatch.setattr(system_device, "memory_size", lambda device: None)  # unknown
    check_memory(99 * 10**12, device, "the model")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_checkpoint_that_is_a_pipe_is_rejected_without_waiting_for_a_writer(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    code = "from pathlib import Path; from utils import read_data; read_data(Path('pipe'))"
    process = start(code, cwd=tmp_path)
    try:
        assert "pipe is not a checkpoint" in process.communicate(timeout=60)[1]
    finally:
        process.kill()


def test_a_script_prints_characters_that_the_terminal_lacks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    with pytest.raises(SystemExit):
        run(lambda: print("\u0434\u0430"))
    assert raw.getvalue().decode().strip() == r"\u0434\u0430"
