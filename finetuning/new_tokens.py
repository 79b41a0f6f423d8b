"""Add tokens to the vocabulary of a trained model, without changing the vectors of its tokens."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tokenizer import BPETokenizer, CharTokenizer, Tokenizer

EMBEDDINGS = ("tok.weight", "head.weight")  # the weights with a row per token
NOISE_STD = 0.02  # of the vectors of new tokens; the same as for initial weights


def extend_tokenizer(
    tokenizer: Tokenizer, specials: Sequence[str], texts: Iterable[str]
) -> Tokenizer:
    """The tokenizer with the special tokens that are missing in it and, if it is a character
    tokenizer, the missing characters of the texts; the same object if nothing is missing."""
    missing = [text for text in specials if text not in tokenizer.specials]
    if isinstance(tokenizer, BPETokenizer):
        if not missing:
            return tokenizer
        added = {text: tokenizer.vocab_size + i for i, text in enumerate(missing)}
        return BPETokenizer(tokenizer.ranks, tokenizer.specials | added, tokenizer.pattern)
    chars = sorted(set(tokenizer.chars).union(*map(set, texts)))
    if not missing and len(chars) == len(tokenizer.chars):
        return tokenizer
    return CharTokenizer(chars, [*tokenizer.specials, *missing])


def is_extension(new: Tokenizer, old: Tokenizer) -> bool:
    """Whether `extend_tokenizer` can make the tokenizer `new` from `old`."""
    chars = new.chars if isinstance(new, CharTokenizer) else ()
    return extend_tokenizer(old, list(new.specials), chars).to_dict() == new.to_dict()


def extend_weights(weights: dict[str, Tensor], old: Tokenizer, new: Tokenizer) -> dict[str, Tensor]:
    """The weights for the vocabulary of `new`, which extends `old`.

    A token keeps its vector even if its id is different. The vector of a new token is the mean of
    the old ones plus noise, so that it is neither likely nor unlikely at first (Hewitt 2021). An
    imported model may have rows without a token, of which new tokens take the first.
    """
    old_ids = list(range(max(new.vocab_size, len(weights["tok.weight"]))))  # by new id
    n_new = new.vocab_size - old.vocab_size
    old_ids[old.vocab_size : new.vocab_size] = [-1] * n_new  # -1: a new token
    if isinstance(old, CharTokenizer) and isinstance(new, CharTokenizer):  # sorted: ids change
        id_of = {text: i for i, text in enumerate(old.texts)}
        old_ids = [id_of.get(text, -1) for text in new.texts]
    rows = torch.tensor(old_ids)
    extended = dict(weights)
    for name in EMBEDDINGS:
        table = weights[name]  # (V, C)
        mean = table[: old.vocab_size].mean(dim=0)
        fresh = mean + NOISE_STD * torch.randn(len(rows), table.size(1))
        extended[name] = torch.where(rows[:, None] < 0, fresh, table[rows])  # (new V, C)
    if torch.equal(weights["tok.weight"], weights["head.weight"]):  # tied
        extended["head.weight"] = extended["tok.weight"]
    return extended
