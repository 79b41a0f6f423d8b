"""A larger vocabulary for a trained model: tokens are known by name, and old ones stay the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer import BPETokenizer, CharTokenizer, Tokenizer

EMBEDDINGS = ("tok.weight", "head.weight")  # the weights with a row for each token


def extend_tokenizer(
    tokenizer: Tokenizer, specials: Sequence[str], texts: Sequence[str]
) -> Tokenizer:
    """The tokenizer with the special tokens that it lacks, and the characters of the texts that it
    lacks if it is one of characters; itself if it lacks nothing."""
    missing = [text for text in specials if text not in tokenizer.specials]
    if isinstance(tokenizer, BPETokenizer):
        first = tokenizer.vocab_size
        added = {text: first + i for i, text in enumerate(missing)}
        ranks, pattern = tokenizer.ranks, tokenizer.pattern
        return BPETokenizer(ranks, tokenizer.specials | added, pattern) if missing else tokenizer
    chars = sorted(set(tokenizer.chars).union(*map(set, texts)))
    if not missing and len(chars) == len(tokenizer.chars):
        return tokenizer
    return CharTokenizer(chars, [*tokenizer.specials, *missing])


def extend_weights(weights: dict[str, Tensor], old: Tokenizer, new: Tokenizer) -> dict[str, Tensor]:
    """The weights for the larger vocabulary of `new`. The vector of an old token stays what it was,
    whatever its id is now; that of a new one is the mean of the old ones with some noise, so that
    at first it is neither likely nor unlikely (Hewitt 2021)."""
    n_old = len(weights["tok.weight"])  # an imported model may have rows that no token uses
    rows = list(range(n_old)) + [-1] * (new.vocab_size - n_old)
    if isinstance(new, CharTokenizer):
        ids = {text: i for i, text in enumerate(old.texts)}
        rows = [ids.get(text, -1) for text in new.texts]
    rows = torch.tensor(rows)
    extended = dict(weights)
    for name in EMBEDDINGS:
        table = weights[name]  # (V, C)
        fresh = table.mean(dim=0) + 0.02 * torch.randn(len(rows), table.size(1))
        extended[name] = torch.where(rows[:, None] < 0, fresh, table[rows])
    if torch.equal(weights["tok.weight"], weights["head.weight"]):  # tied
        extended["head.weight"] = extended["tok.weight"]
    return extended
