"""tiktoken's encodings, which it downloads once."""

import threading

import tiktoken

from corpus.text import note
from system.settings import UserError
from tokenizer import GPT2_PATTERN, BPETokenizer

NOTE_AFTER = 3  # seconds; most machines read a cached encoding in less


def from_tiktoken(name: str, seconds: float = 300) -> BPETokenizer:
    """One of the encodings of OpenAI's models, which tiktoken downloads once and caches.

    Raises UserError if it cannot be downloaded within this time.
    """
    result: list[tiktoken.Encoding | Exception] = []

    def download() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:
            result.append(error)

    # tiktoken waits for a silent network without a timeout, so it runs in a separate thread.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(min(seconds, NOTE_AFTER))
    if thread.is_alive():
        note(f"loading the encoding {name}; its first use downloads up to 4 MB")
        thread.join(seconds)
    encoding = result[0] if result else None
    if not isinstance(encoding, tiktoken.Encoding):
        slow = f"not complete after {seconds:g} s: the network is slow or silent"
        reason = type(encoding).__name__ if result else slow
        raise UserError(
            f"the encoding {name} could not be downloaded ({reason}): try again with a network, or "
            "set TIKTOKEN_CACHE_DIR to a cache folder of tiktoken from another machine, or train a "
            "tokenizer on your text with --tokenizer bpe"
        )
    # tiktoken's own pattern for GPT-2 gives the same ids. With the original one, the tokenizer is
    # equal to that of a GPT-2 imported from Hugging Face.
    pattern = GPT2_PATTERN if name in ("gpt2", "r50k_base") else encoding._pat_str
    return BPETokenizer(encoding._mergeable_ranks, encoding._special_tokens, pattern)
