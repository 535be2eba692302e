"""Greedy answers to many prompts at once, over a key-value cache, and the log-probabilities of given answers."""

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
import math

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from residual_fisher.model.last_token import after_padding, copy_of, prefill
from residual_fisher.model.loading import longest_prompt, rotation_change, text_config
from residual_fisher.model.passes import (
    Chunks,
    attention,
    capture_head,
    hooked,
    logits_at,
    pad,
    require_known_tokens,
    unwrapped,
)
from residual_fisher.model.reading import PrefixMode, choose_mode, may_pad

OVERFLOWED = -1  # stands for a token where the logits hold NaN or infinity
PASS_TOKENS = 4096  # padded tokens of one pass: more of them no longer make better use of the machine
LONGEST_PLAIN = 256  # tokens; above it fused attention saves the tokens x tokens matrices


def end_tokens(model: nn.Module) -> set[int]:
    """The model's end-of-sequence tokens, by its generation settings, else by its configuration."""
    settings = (getattr(model, "generation_config", None), model.config, text_config(model))
    ends = next((e for s in settings if (e := getattr(s, "eos_token_id", None)) is not None), [])
    return {ends} if isinstance(ends, int) else set(ends)


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    m: int,
    ends: Collection[int],
    prefix: DynamicCache | None = None,
) -> list[list[int]]:
    """The most probable token after each prompt (its token ids), the most probable one after that, and so on.

    An answer has 1 to m tokens. It ends with the first token of `ends`, or at the model's last position. Where the
    logits hold NaN or infinity it ends before that token, and may be empty. It does not depend on the other prompts,
    but for ties within rounding.

    Args:
        prefix: what `prefill_prompts` gives of all these prompts, if that has been run: then they run together.
    Raises:
        UnsupportedModelError: the model cannot be read rightly.
    """
    wrapped, model = model, unwrapped(model)
    answers: list[list[int]] = [[]] * len(prompts)
    stops = {*ends, OVERFLOWED}

    def answer(which: Tensor) -> None:
        ids, lengths = pad([prompts[i] for i in which.tolist()])
        require_known_tokens(model, ids)
        width = ids.shape[1]
        tokens = min(m, max(1, (longest_prompt(model) or width + m) - width + 1))
        whole = prefix is None and choose_mode(wrapped, ids[lengths.argmax()]) is PrefixMode.WHOLE
        cache = prefix and copy_of(prefix, len(ids))
        said = greedy(model, ids, tokens, stops, whole, lengths, cache, _kind_for(ids)).tolist()
        for i, found in zip(which.tolist(), said, strict=True):
            end = next((place for place, token in enumerate(found) if token in stops), tokens)
            answers[i] = [token for token in found[: end + 1] if token != OVERFLOWED]

    if prefix is not None:
        answer(torch.arange(len(prompts)))
        return answers
    lengths = [len(prompt) for prompt in prompts]
    padding = len(set(lengths)) > 1 and may_pad(wrapped, max(prompts, key=len), m)
    # those that the model's last position cuts short are not to cut others
    for group in in_passes(lengths, (longest_prompt(model) or math.inf) - m + 1 if padding else 0):
        Chunks(len(group)).map(answer, torch.tensor(group))
    return answers


@torch.no_grad()
def answer_log_probs(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The log-probability of each token of an answer, given the prompt and all tokens before it, in nats.

    Prompt and answer run in one pass, whose rotation of positions is that of its length (`rotation_change`). What all
    prompts begin with runs once, if the model keeps it in keys and values.

    Args:
        prompts, answers: token ids. None is empty.
    Returns:
        (tokens,) float32 on the CPU for each answer
    """
    wrapped, model = model, unwrapped(model)
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    found: list[Tensor] = [torch.empty(0)] * len(texts)

    begin = common_beginning(prompts)
    padding = rotation_change(model) == math.inf
    if len(texts) == 1 or not padding or choose_mode(wrapped, torch.tensor(max(texts, key=len))) is PrefixMode.WHOLE:
        begin = 0

    def measure(which: Tensor) -> None:
        ids, lengths = pad([texts[i][begin:] for i in which.tolist()])
        counts = [len(answers[i]) for i in which.tolist()]
        places = lengths[:, None] - torch.arange(max(counts), 0, -1)  # (rows, tokens): each row's last ones
        with attention(model, _kind_for(ids)):
            memory = {}
            if begin:
                memory["past_key_values"] = copy_of(prefill(model, torch.tensor([prompts[0][:begin]])), len(ids))
            log_probs = logits_at(model, ids, places.clamp(min=0), **memory).float().log_softmax(-1)
        for row, (i, count) in enumerate(zip(which.tolist(), counts, strict=True)):
            tokens = torch.tensor(answers[i], device=log_probs.device)
            found[i] = log_probs[row, -count:].gather(-1, tokens[:, None])[:, 0].cpu()

    for group in in_passes([len(text) - begin for text in texts], math.inf if padding else 0):
        Chunks(len(group)).map(measure, torch.tensor(group))
    return found


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; each has one more at least."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _kind_for(ids: Tensor) -> str:
    return "eager" if ids.shape[1] <= LONGEST_PLAIN else "sdpa"


def in_passes(lengths: Sequence[int], most: float) -> list[list[int]]:
    """Indices of prompts that run together: of like length, and where one has more than `most`, of the same length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        room = (len(groups[-1]) + 1) * longest <= PASS_TOKENS if groups else False
        if room and (longest <= most or lengths[i] == longest):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def greedy(
    model: nn.Module,
    ids: Tensor,
    tokens: int,
    ends: Collection[int],
    whole: bool = False,
    lengths: Tensor | None = None,
    cache: DynamicCache | None = None,
    kind: str = "eager",
    hooks: Callable[[int], Sequence] = lambda cached: (),
) -> Tensor:
    """The most probable next tokens (rows, at most `tokens`) int64; after a row's end they mean nothing.

    The cache grows by one token a pass. It is made anew by the pass that is the first above the model's
    `rotation_change`.

    Args:
        ids: (rows, tokens) int64, on any device.
        whole: every pass runs all tokens, without a cache.
        lengths: (rows,) int64 on the CPU, of prompts padded by `pad`, which `may_pad` has to allow.
        cache: of all tokens but the last of each row, to begin with.
        kind: of attention.
        hooks: gives the hooks of a pass over the tokens after the first `cached`.
    """
    ids, width, change = ids.to(model.device), ids.shape[1], rotation_change(model)
    rows, cached = torch.arange(len(ids)), 0 if cache is None else width - 1  # tokens in the cache
    lengths = torch.full((len(ids),), width) if lengths is None else lengths
    padded = bool((lengths < width).any())
    first = (lengths, width) if cache is None else (lengths - 1, width - 1)  # tokens that the first cache is of
    written, ended = [], torch.zeros(len(ids), dtype=torch.bool, device=model.device)

    def last(x: Tensor) -> Tensor:  # only the first pass sees the padding
        return x[rows, lengths - 1][:, None] if padded and cached == 0 else x[:, -1:]

    with attention(model, kind), capture_head(model, last):
        while len(written) < tokens and not ended.all():
            if not whole and (cached == 0 or cached <= change < ids.shape[1]):
                cached, cache = 0, DynamicCache(config=model.config)
            memory = {} if whole else {"past_key_values": cache}
            if padded and cached:
                memory |= after_padding(model, *first, cached, ids.shape[1] - cached)
            with hooked(*hooks(cached)):
                logits = model(ids[:, cached:], use_cache=not whole, **memory).logits[:, -1].float()
            cached = 0 if whole else ids.shape[1]
            token = torch.where(logits.logsumexp(-1).isfinite(), logits.argmax(-1), OVERFLOWED).to(model.device)
            ended |= torch.isin(token, torch.tensor(list(ends), device=token.device))
            written.append(token)
            ids = torch.cat([ids, token.clamp(min=0)[:, None]], dim=1)
    return torch.stack(written, dim=1)
