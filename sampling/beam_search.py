"""Beam search: find the most likely continuations of a prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from config import SampleConfig
from model import GPT, KVCache
from sampling.checks import check_finite
from sampling.text import TextWriter, end_tokens
from tokenizer import Tokenizer


@torch.no_grad()
def beam_search(
    model: GPT, prompt: Tensor, beams: int, n_new: int, ends: Sequence[int] = ()
) -> list[tuple[float, list[int]]]:
    """The best continuations of a prompt (T,) by at most n_new tokens that a search with this
    number of beams finds, best first: (score, ids).

    The score is the mean log-probability of the new tokens, including the end of text (one of
    `ends`), so that short texts have no advantage (Wu et al. 2016, with a length penalty of 1).
    The search ends when that many texts have ended. If the text is longer than the window, it
    continues from the last half window, as `generate` does.
    """
    size = model.config.block_size
    text = prompt[None]  # (B, T): B grows from 1 to the number of beams, if there are as many texts
    scores = torch.zeros(1, device=prompt.device)
    cache = KVCache(model.config, 1, device=prompt.device)
    finished: list[tuple[float, list[int]]] = []
    begin = 0  # the window begins at this token
    for step in range(1, n_new + 1):
        if text.size(1) - begin > size:
            begin = text.size(1) - max(size // 2, 1)
            cache.clear()
        new = text[:, begin + cache.length :]
        logits = model(new, cache=cache)[0][:, -1].float()  # (B, V)
        check_finite(logits)
        totals = scores[:, None] + logits.log_softmax(dim=-1)  # (B, V)
        # With E end tokens, at most E B of the best (1 + E) B candidates end: B can continue.
        n_candidates = (1 + len(ends)) * beams
        best, places = totals.flatten().topk(min(n_candidates, totals.numel()))
        rows, tokens = places // totals.size(1), places % totals.size(1)
        kept: list[int] = []  # the candidates that become the beams of the next step
        for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            if token in ends and i < beams:  # as in transformers
                ids = [*text[row, len(prompt) :].tolist(), token]
                finished.append((best[i].item() / step, ids))
            elif token not in ends and len(kept) < beams:
                kept.append(i)
        if not kept or (len(finished) >= beams and step < n_new):
            break
        rows, scores = rows[kept], best[kept]
        text = torch.cat([text[rows], tokens[kept, None]], dim=1)
        cache.layers = [[t[rows] for t in pair] for pair in cache.layers]
        cache.shift_state = cache.shift_state[:, rows]
    else:
        unfinished = text[:, len(prompt) :].tolist()
        finished += [(s / n_new, ids) for s, ids in zip(scores.tolist(), unfinished, strict=True)]
    return sorted(finished, reverse=True)[:beams]


def beam_texts(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: Tensor) -> list[str]:
    """The continuations that beam search finds, best first, each with its score."""
    ends = end_tokens(tokenizer)
    texts = []
    for score, ids in beam_search(model, prompt, config.beams, config.max_new_tokens, ends):
        writer = TextWriter(tokenizer, config.stop.split("|"))
        text = "".join(map(writer.add, ids)) + writer.finish()
        texts.append(f"{text}\n[{score:.4f} per token]")
    return texts
