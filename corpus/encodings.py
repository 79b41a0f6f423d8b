"""tiktoken's encodings, which it downloads once."""

import threading

import tiktoken

from config import UserError
from tokenizer import BPETokenizer


def from_tiktoken(name: str, seconds: float = 20) -> BPETokenizer:
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
    thread.join(seconds)
    encoding = result[0] if result else None
    if not isinstance(encoding, tiktoken.Encoding):
        reason = type(encoding).__name__ if result else f"no answer within {seconds:g} s"
        raise UserError(
            f"the encoding {name} could not be downloaded ({reason}): try again with a network, or "
            "set TIKTOKEN_CACHE_DIR to a cache folder of tiktoken from another machine, or train a "
            "tokenizer on your text with --tokenizer bpe"
        )
    return BPETokenizer(encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str)
