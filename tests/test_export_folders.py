"""An export replaces only an export, and only when the new one is complete."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN

import export
import train
import utils
from exporting.folders import MARKER, new_folder
from system import folders
from system.files import locked_file
from system.folders import restore_folder
from system.settings import UserError

pytest.importorskip("safetensors")


def write_export(folder: Path, text: str = "old", overwrite: bool = False) -> Path:
    with new_folder(folder, overwrite) as tmp_path:
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "b.txt").write_text(text)
    return folder


def files_below(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_an_export_lists_its_files_with_their_hashes_and_is_replaced(tmp_path):
    folder = write_export(tmp_path / "out")
    write_export(folder, "new", overwrite=True)
    assert (folder / "a.txt").read_text() == (folder / "b.txt").read_text() == "new"
    sha256 = hashlib.sha256(b"new").hexdigest()
    assert json.loads((folder / MARKER).read_text())["files"] == {"a.txt": sha256, "b.txt": sha256}
    assert os.listdir(tmp_path) == ["out"]


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "mine.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / MARKER).unlink(), "out/ was not written by export.py"),
        (lambda out: (out / "me.jpg").touch(), "out/ contains me.jpg, which export.py did not"),
        (lambda out: (out / ".notes").touch(), r"out/ contains \.notes, which"),
        (lambda out: (out / "photos").mkdir(), "out/ contains photos, which"),
        (lambda out: (out / "b.txt").write_text("better"), "out/ contains b.txt, .* changed since"),
        (lambda out: replace_by_link(out / "b.txt"), "out/ contains b.txt, which"),
        (
            lambda out: (out / MARKER).write_text('{"files": {"../mine.txt": "0"}}'),
            f"{MARKER} is damaged",
        ),
        (lambda out: (out / MARKER).write_text('{"files": '), f"{MARKER} is not valid JSON"),
    ],
)
def test_other_folders_are_not_replaced(tmp_path, change, message):
    (tmp_path / "mine.txt").write_text("old")
    change(write_export(tmp_path / "out"))
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=message):
        write_export(tmp_path / "out", "new", overwrite=True)
    assert files_below(tmp_path) == before


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    assert (write_export(tmp_path / "out") / "a.txt").exists()


def test_a_file_added_during_the_export_is_kept(tmp_path):
    folder = write_export(tmp_path / "out")
    with (
        pytest.raises(UserError, match=r"contains photo\.jpg"),
        new_folder(folder, overwrite=True) as tmp,
    ):
        (tmp / "a.txt").write_text("new")
        (folder / "photo.jpg").write_text("a photo")
    assert (folder / "photo.jpg").exists() and (folder / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_the_working_and_home_folders_and_those_around_them_are_not_replaced(tmp_path, monkeypatch):
    inner, home = tmp_path / "export/a/b", tmp_path / "elsewhere"
    write_export(tmp_path / "export")  # even if it was an export
    inner.mkdir(parents=True)
    (home / "me").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "export")
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(home / "me"))
    targets = (".", "..", "../..", "../../../export", "/", "../b", tmp_path / "link", home)
    for target in (*targets, home / "me"):
        with pytest.raises(UserError, match="contains your working or home folder"):
            export.main(["a.pt", str(target), "--overwrite"])
    assert inner.is_dir() and (tmp_path / "export/a.txt").exists()


@pytest.mark.parametrize("target", ["file.txt", "loop", "dangling"])
def test_a_target_that_is_no_folder_is_not_replaced(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("mine")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{target} is not a folder"):
        write_export(Path(target), overwrite=True)
    assert Path("file.txt").read_text() == "mine" and os.path.islink("loop")


def test_a_link_to_an_export_stays_a_link(tmp_path):
    write_export(tmp_path / "real/out")
    (tmp_path / "link").symlink_to(tmp_path / "real/out")
    write_export(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/out/a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    folder = write_export(tmp_path / "out")
    for target in (folder, tmp_path / "new/deep/out"):
        with pytest.raises(error), new_folder(target, overwrite=True) as tmp:
            (tmp / "a.txt").write_text("new")
            raise error
    assert (folder / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_while_the_folders_are_exchanged_is_undone(tmp_path, monkeypatch):
    folder, replace = write_export(tmp_path / "out"), os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="out could not be written: Input/output error"):
        write_export(folder, "new", overwrite=True)
    assert (folder / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from exporting.folders import new_folder

left = 0  # changes of files or folders before the process is killed
def stop(event, args):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
        left -= 1
        if left < 0:
            os._exit(9)

def write(text, overwrite):
    with new_folder(Path("out"), overwrite) as tmp_path:
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text(text)

for n in range(100):
    Path(str(n)).mkdir()
    os.chdir(str(n))
    write("old", False)
    if os.fork() == 0:
        left = n
        sys.addaudithook(stop)
        write("new", True)
        os._exit(0)
    if os.wait()[1] == 0:
        break
    os.chdir("..")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_old_or_the_new_folder_complete(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(folders.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=env, check=True)
    outcomes = []
    for n in range(len(os.listdir(tmp_path))):
        folder = tmp_path / str(n) / "out"
        restore_folder(folder)
        texts = {p.name: p.read_text() for p in folder.iterdir()}
        assert len(texts) == 3 and texts["a.txt"] == texts["b.txt"]
        outcomes.append(texts["a.txt"])
        write_export(folder, "newer", overwrite=True)
        assert os.listdir(folder.parent) == ["out"]
    assert outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"old", "new"}


def test_nothing_is_loaded_for_a_target_that_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/me.jpg").write_text("a photo")
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *args, **settings: loaded.append(args))
    Path("a.pt").write_text("not read")
    with pytest.raises(UserError, match=r"photos/ was not written by export\.py"):
        export.main(["a.pt", "photos"])
    with pytest.raises(UserError, match="photos is a folder: give the name of a checkpoint"):
        export.main(["--from", "nowhere", "photos", "--overwrite"])
    with pytest.raises(UserError, match=r"a\.pt exists"):
        export.main(["--from", "nowhere", "a.pt"])
    assert loaded == []


def test_an_import_replaces_only_a_checkpoint(workplace: Path):
    assert train.main([*TINY_RUN, "--arch=llama"]) == 0
    path = Path("checkpoints/best.pt")
    assert export.main([str(path), "out"]) == 0
    Path("notes.pt").write_text("my notes")
    torch.save({"mine": 1}, "other.pt")
    for name in ("notes.pt", "other.pt"):
        before = Path(name).read_bytes()
        with pytest.raises(UserError, match=f"{name}.* is not a checkpoint"):
            export.main(["--from", "out", name, "--overwrite"])
        assert Path(name).read_bytes() == before
    with pytest.raises(UserError, match=r"best\.pt exists: add --overwrite"):
        export.main(["--from", "out", str(path)])
    with locked_file(path, "an import"), pytest.raises(UserError, match="in use by an import"):
        export.main(["--from", "out", str(path), "--overwrite"])
    assert export.main(["--from", "out", str(path), "--overwrite"]) == 0
    assert utils.read_checkpoint(path)["step"] == 0
    with pytest.raises(UserError, match=r"cannot write to the folder notes\.pt: Not a directory"):
        export.main(["--from", "out", "notes.pt/a.pt"])
