"""Sample text from a checkpoint.

    python generate.py                          500 tokens from best.pt of the newest run
    python generate.py checkpoints/best.pt --prompt "ROMEO:" --temperature 0.9 --top_k 50 --seed 42
    python generate.py checkpoints/chat/best.pt --prompt "Who are you?"      asks a question
    python generate.py --num_samples 3 --output_file samples.txt

A model that was trained on questions and answers takes the prompt as a question. For a chat, token
probabilities and comparisons of settings see explore.py.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from system.start import run

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import SampleConfig
from model import GPT, KVCache
from sampling.checks import check_finite, check_sampling_memory, sampling_problems
from sampling.text import (
    TextWriter,
    check_question,
    checkpoint_line,
    decode_prompt,
    end_tokens,
    last_trained_on_text,
    model_prompt,
)
from system.command_line import parse_args
from system.device import compiler_problem, pick_device
from system.settings import UserError
from tokenizer import Tokenizer
from utils import load_checkpoint, newest_checkpoint

SEPARATOR = "\n" + "-" * 40 + "\n"  # between several samples

# --- from logits to the next token


def adjust_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The distribution that the next tokens are sampled from: logits (B, V) -> probabilities and
    the token ids that they belong to, most likely first, both (B, V), or (B, k) with top-k.

    Applied in this order: temperature divides the logits (0: all probability to the most likely
    token); top-k keeps the k most likely tokens (0: all; Fan et al. 2018); top-p keeps of these the
    nucleus, the smallest set of most likely tokens with a total probability of at least top_p
    (Holtzman et al. 2020); min-p drops tokens below min_p times the highest probability (Nguyen et
    al. 2024). Ties go to the lower token id.
    """
    logits, ids = logits.float().sort(dim=-1, descending=True, stable=True)  # (B, V) both
    if top_k or temperature == 0:
        k = top_k if temperature else 1
        logits, ids = logits[:, :k], ids[:, :k]
    # In float32, 1e-46 is 0. With the largest logit at 0, 1e-30 is not too small to divide by.
    probs = ((logits - logits[:, :1]) / max(temperature, 1e-30)).softmax(dim=-1)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # total probability of the more likely tokens
        probs = probs.masked_fill(before >= max(top_p, 1e-30), 0.0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
    return probs / probs.sum(dim=-1, keepdim=True), ids


def sample_logits(logits: Tensor, uniform: Tensor, **settings: Any) -> Tensor:
    """Sample the next token of each row: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    The settings are those of `adjust_logits`; with temperature 0 the most likely token is returned.
    The cumulative distribution is inverted at `uniform`.

    >>> probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    >>> sample_logits(probabilities.log(), torch.tensor([0.6]), top_p=0.6)  # 1 (p = 4/7) or 2
    tensor([2])
    """
    if settings.get("temperature") == 0:
        return logits.argmax(dim=-1)
    probs, ids = adjust_logits(logits, **settings)
    cumulative = probs.cumsum(dim=-1)
    rank = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)
    last = (probs > 0).sum(dim=-1) - 1  # rounding must not leave the nucleus
    rank = rank.minimum(last).clamp(min=0)  # -1 if the logits are not finite
    return ids.gather(1, rank[:, None]).squeeze(1)


def sampling_settings(config: SampleConfig) -> dict[str, Any]:
    """The settings of `adjust_logits`."""
    return {k: getattr(config, k) for k in ("temperature", "top_k", "top_p", "min_p")}


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens that the text contains, seen (B, V) bool, less likely: divide their logits
    (B, V) by the penalty if positive, multiply them by it if negative (Keskar et al. 2019)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


# --- the generation loop


class Step(NamedTuple):
    """One step of generation."""

    ids: Tensor  # (B,), the next token of each sample; -1 for a sample that has ended
    logits: Tensor  # (B, V), which they were sampled from
    model_logits: Tensor  # (B, V), before the repetition penalty


def next_tokens(
    model: GPT,
    idx: Tensor,
    cache: KVCache | None,
    uniform: Tensor,
    seen: Tensor,
    config: SampleConfig,
) -> Step:
    """Read more tokens idx (B, T) and sample the next one of each text with uniform (B,). `seen`
    (B, V) says which tokens were read, for the repetition penalty."""
    logits = model_logits = model(idx, cache=cache)[0][:, -1].float()  # (B, V)
    if config.repetition_penalty != 1:
        seen.scatter_(1, idx, True)
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    ids = sample_logits(logits, uniform, **sampling_settings(config))
    return Step(ids, logits, model_logits)


def draw_seed() -> int:
    """A new seed, short enough to type."""
    return int(np.random.default_rng().integers(1_000_000))


def cache_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type of the KV cache: float32 on a CPU, where the attention kernel is fastest with it."""
    lower = precision in ("bfloat16", "float16") and device.type != "cpu"
    return getattr(torch, precision) if lower else torch.float32


@torch.no_grad()
def generate(
    model: GPT, prompt: Tensor, config: SampleConfig, ends: Sequence[int] = ()
) -> Iterator[Step]:
    """Continue a prompt, ids (T,), num_samples times, by max_new_tokens tokens or until every
    sample has ended with a token of `ends`. Yields a Step per token.

    The random numbers of sample i depend on (seed, i) only, so its text is the same for every
    num_samples, except that matrix products of other batch sizes may round differently. The model
    sees at most block_size tokens: if there are more, generation continues from the last
    block_size / 2 tokens, which are read into the emptied cache. The repetition penalty applies to
    the tokens that the model sees. With config.compile, steps of one token are compiled.
    """
    device, size, n_new = prompt.device, model.config.block_size, config.max_new_tokens
    B, T = config.num_samples, len(prompt)
    seed = draw_seed() if config.seed is None else config.seed
    generators = [np.random.default_rng((seed, i)) for i in range(B)]
    draws = np.stack([g.random(n_new, dtype=np.float32) for g in generators], axis=1)
    uniform = torch.from_numpy(draws).to(device)  # (max_new_tokens, B)
    text = torch.cat([prompt.repeat(B, 1), prompt.new_zeros(B, n_new)], dim=1)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
    make_cache: type[KVCache] = KVCache
    next_token: Callable[..., Step] = next_tokens  # reads one token per text
    if config.compile:
        from sampling.compiled import StaticCache, compile_step  # only with --compile

        make_cache, next_token = StaticCache, compile_step(next_tokens, device)
    dtype = cache_dtype(device, config.precision)
    cache = make_cache(model.config, B, device=device, dtype=dtype) if config.cache else None
    ids = prompt  # the newest token of each sample, after the first step
    begin, n_cached = 0, 0  # the window begins at this token; how many of its tokens are cached
    for step in range(n_new):
        end = T + step
        if end - begin > size:
            begin, n_cached = end - max(size // 2, 1), 0
        if not n_cached:
            seen.zero_()
            if cache:
                cache.clear()
        new = ids[:, None] if n_cached else text[:, begin:end]
        read = next_token if n_cached else next_tokens
        result = read(model, new, cache, uniform[step], seen, config)
        check_finite(result.model_logits)
        n_cached = end - begin if cache else 0
        text[:, end] = ids = result.ids
        yield result._replace(ids=result.ids.masked_fill(ended, -1)) if ends else result
        for token in ends:
            ended = ended | (result.ids == token)
        if ends and bool(ended.all()):
            return


# --- text


def stream_texts(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: Tensor
) -> Iterator[list[str]]:
    """Continue a prompt (T,); yields the new text of each sample, per step."""
    writers = [TextWriter(tokenizer, config.stop.split("|")) for _ in range(config.num_samples)]
    for step in generate(model, prompt, config, end_tokens(tokenizer)):
        yield [w.add(i) for w, i in zip(writers, step.ids.tolist(), strict=True)]
        if all(writer.done for writer in writers):
            return
    yield [writer.finish() for writer in writers]


def sample_text(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> list[str]:
    """The samples as texts, each with its prompt; with beams, the texts that beam search finds,
    best first, each with its score."""
    prompt = model_prompt(model, tokenizer, config)
    start = decode_prompt(tokenizer, prompt)
    if config.beams:
        from sampling.beam_search import beam_texts  # only with --beams

        return [start + text for text in beam_texts(model, tokenizer, config, prompt)]
    steps = stream_texts(model, tokenizer, config, prompt)
    bar = tqdm(steps, total=config.max_new_tokens, unit="token", leave=False, disable=None)
    return [start + "".join(pieces) for pieces in zip(*bar, strict=True)]


# --- command line


def load_for_sampling(
    config: SampleConfig, chat: bool = False
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, tokenizer and checkpoint that the settings name, in their precision and compiled
    if asked for. Fills in config.checkpoint, config.prompt from the prompt file, and config.seed;
    config.qa is off for a model that was last trained on text. Prints one line to stderr. Raises
    UserError for a blank question, except for a chat, which has no prompt."""
    if config.prompt_file:
        from corpus.text import read_text  # only with --prompt_file

        config.prompt = read_text(Path(config.prompt_file))
    config.checkpoint = config.checkpoint or str(newest_checkpoint(Path("checkpoints")))
    device = pick_device(config.device)
    model, tokenizer, state = load_checkpoint(config.checkpoint, device)
    config.qa = config.qa and not last_trained_on_text(state)
    if not chat:
        check_question(config, tokenizer)
    check_sampling_memory(model.config, config, len(config.prompt), device)
    if config.precision != "float32":
        from sampling.quantize import lower_precision  # only with --precision

        lower_precision(model, config.precision)
    if config.compile and (problem := compiler_problem(device)):
        raise UserError(f"--compile does not work here ({problem}): leave it out")
    line = checkpoint_line(config.checkpoint, state)
    if config.seed is None and config.temperature and not config.beams:
        config.seed = draw_seed()
        line += f"; seed {config.seed}"
    print(line, file=sys.stderr)
    return model, tokenizer, state


def main(argv: list[str] | None = None) -> int:
    config = parse_args(SampleConfig, argv, __doc__, check=sampling_problems)
    model, tokenizer, state = load_for_sampling(config)
    one_sample = config.num_samples == 1 and not config.beams and not config.output_file
    stream = one_sample and sys.stdout.isatty() if config.stream is None else config.stream
    if stream:
        prompt = model_prompt(model, tokenizer, config)
        print(decode_prompt(tokenizer, prompt), end="", flush=True)
        for (piece,) in stream_texts(model, tokenizer, config, prompt):
            print(piece, end="", flush=True)
        print()
        return 0
    texts = sample_text(model, tokenizer, config)
    if config.output_file:
        from sampling.output import header, write_text  # only with --output_file

        write_text(Path(config.output_file), header(config, state) + SEPARATOR.join(texts) + "\n")
        print(f"{len(texts)} sample{'s' * (len(texts) > 1)}: {config.output_file}")
    else:
        print(SEPARATOR.join(texts))
    return 0


if __name__ == "__main__":
    run(main)
