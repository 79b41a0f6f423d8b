"""Beam search: find the most likely continuations of a prompt."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model import GPT, KVCache


@torch.no_grad()
def beam_search(
    model: GPT, prompt: Tensor, beams: int, n_new: int, ends: Sequence[int] = ()
) -> list[tuple[float, list[int]]]:
    """The best continuations of a prompt (T,) by at most n_new tokens that a search with this
    number of beams finds, best first: (score, ids).

    The score is the mean log-probability of the new tokens, including the end of text (one of
    `ends`), so that short texts have no advantage (Wu et al. 2016, with a length penalty of 1).
    If the text is longer than the window, the search continues from the last half window, as
    `generate` does.
    """
    size = model.config.block_size
    text = prompt.repeat(beams, 1)  # (B, T)
    scores = torch.full((beams,), -math.inf, device=prompt.device)
    scores[0] = 0.0  # all beams contain the same text at first: continue only one of them
    cache = KVCache(model.config, beams, device=prompt.device)
    finished: list[tuple[float, list[int]]] = []
    begin, refill = 0, True  # the window begins at this token; whether to fill the cache again
    for step in range(1, n_new + 1):
        if text.size(1) - begin > size:
            begin, refill = text.size(1) - max(size // 2, 1), True
        if refill:
            cache.length = 0
        new = text[:, begin:] if refill else text[:, -1:]
        logits = model(new, cache=cache)[0][:, -1]  # (B, V)
        refill = False
        totals = scores[:, None] + logits.float().log_softmax(dim=-1)  # (B, V)
        # With one end token, at most B of the best 2 B candidates end a text: B can continue.
        best, places = totals.flatten().topk(min(2 * beams, totals.numel()))
        rows, tokens = places // totals.size(1), places % totals.size(1)
        kept: list[int] = []  # the candidates that become the beams of the next step
        for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            if token in ends and len(kept) < beams:
                ids = [*text[row, len(prompt) :].tolist(), token]
                finished.append((best[i].item() / step, ids))
            elif token not in ends and len(kept) < beams:
                kept.append(i)
        rows, scores = rows[kept], best[kept]
        text = torch.cat([text[rows], tokens[kept, None]], dim=1)
        cache.layers = [[t[rows] for t in pair] for pair in cache.layers]
        cache.shift_state = cache.shift_state[:, rows]
        if len(finished) >= beams:
            break
    else:
        unfinished = text[:, len(prompt) :].tolist()
        finished += [(s / n_new, ids) for s, ids in zip(scores.tolist(), unfinished, strict=True)]
    return sorted(finished, reverse=True)[:beams]
