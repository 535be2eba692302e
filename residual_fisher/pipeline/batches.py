"""One batch of prompts: the model linearised at their last tokens, the triplets of each F, and what may go wrong."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
import time

import numpy as np
import torch

import fisher
from residual_fisher.common.archives import Item
from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line
from residual_fisher.model import passes
from residual_fisher.model.loading import rotation_change
from residual_fisher.model.words import TokenShares, prompt_words_test, token_shares, token_writer
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs
from residual_fisher.pipeline.matrices import arrays_of
from residual_fisher.pipeline.prompts import Encoded, Prompt, check_template, encode, plan_batches
from residual_fisher.pipeline.settings import DIRECTIONS, Settings

# Rows (tokens times cotangents) of one backward pass: more of them no longer make better use of the machine.
BACKWARD_ROWS = 4096
# Above this length attention runs in a fused kernel, which keeps no tokens x tokens matrix for the backward
# pass. Below it plain attention is as fast, and many cotangents can share one backward pass.
PLAIN_ATTENTION = 256
# With the whole vocabulary attention stays plain, and keeps about this many such matrices a head and layer.
MATRICES_KEPT = 6
ATTENTION_BYTES = 4 << 30
TOKENS = 6  # recorded of each leading direction: a few hold most of the share, and records stay small
NEXT_TOKENS = 10  # recorded of a prediction


@dataclass(frozen=True)
class Subject:
    """The model under study, and the module that its residual stream is hooked at."""

    model: torch.nn.Module
    tokenizer: object
    path: str  # of the module
    module: torch.nn.Module

    @cached_property
    def show(self) -> Callable[[int], str]:
        """Writes a token: the same few, thousands of times."""
        return cache(token_writer(self.tokenizer))

    @cached_property
    def in_prompt(self) -> Callable[[str, Sequence[str]], list[bool]]:
        """Tells which tokens a prompt holds."""
        return prompt_words_test(self.tokenizer, self.show)

    def next_tokens(self, prompt: str, ids: list[int], p: list[float]) -> list[dict]:
        """The most probable next tokens as they are recorded; `in_prompt` are those that a word there begins with."""
        texts = [self.show(token) for token in ids]
        columns = zip(texts, ids, p, self.in_prompt(prompt, texts), strict=True)
        return [dict(zip(("token", "id", "probability", "in_prompt"), column, strict=True)) for column in columns]


def longest(batch: list[Encoded]) -> int:
    """Tokens of the longest prompt."""
    return max(len(encoded.ids) for encoded in batch)


def pad(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (prompts, tokens), each row filled up with its own last token, and lengths (prompts,)."""
    width = longest(batch)
    rows = [encoded.ids + encoded.ids[-1:] * (width - len(encoded.ids)) for encoded in batch]
    return torch.tensor(rows), torch.tensor([len(encoded.ids) for encoded in batch])


def into_batches(settings: Settings, subject: Subject, encoded: list[Encoded]) -> list[list[Encoded]]:
    """The prompts of a shard in batches: of like length, so that little is padded."""
    # a model that turns its positions in another way for long batches has no batch of both kinds
    change = rotation_change(subject.model)
    batches = []
    for kind in ([e for e in encoded if len(e.ids) > change], [e for e in encoded if len(e.ids) <= change]):
        batches += [[kind[j] for j in batch] for batch in plan_batches([len(e.ids) for e in kind], settings.batch_size)]
    return batches


@contextmanager
def explain_unsupported(subject: Subject) -> Iterator[None]:
    try:
        yield
    except fisher.UnsupportedModelError as error:
        raise UserError(f"no Fisher matrix at {subject.path}: {error}") from error


def attention_for(settings: Settings, batch: list[Encoded]) -> tuple[str, int]:
    """The kind of attention a batch runs with, and how many cotangents to pull back at once."""
    rows = max(1, BACKWARD_ROWS // (len(batch) * longest(batch)))
    plain = settings.top_k_tokens == "all"  # the block iteration differentiates the backward pass: no fused attention
    return ("eager", rows) if plain or (longest(batch) <= PLAIN_ATTENTION and rows > 1) else ("sdpa", 1)


def linearize_batch(settings: Settings, subject: Subject, batch: list[Encoded]) -> tuple[fisher.Point, int]:
    """The batch's prompts at their last tokens, and how many cotangents to pull back at once."""
    kind, rows = attention_for(settings, batch)
    passes.use_attention(subject.model, kind)
    last_only = settings.bias_positions == "last"
    return fisher.linearize_prompts(subject.model, subject.module, *pad(batch), last_only), rows


def prompts_at_once(settings: Settings, subject: Subject, batch: list[Encoded]) -> int:
    """The whole batch, or as many prompts as leave plain attention room for its tokens x tokens matrices."""
    if settings.top_k_tokens != "all":
        return len(batch)
    config = subject.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    each = MATRICES_KEPT * config.num_hidden_layers * heads * longest(batch) ** 2 * subject.model.dtype.itemsize
    return max(1, min(len(batch), ATTENTION_BYTES // each))


def triplets(
    settings: Settings, point: fisher.Point, chunks: fisher.Chunks
) -> tuple[fisher.Eigenpairs, TokenShares, dict]:
    """The leading eigenpairs of each prompt's F, the tokens' shares of them, and columns (prompts,) of numbers."""
    r = settings.num_singular_values
    if settings.top_k_tokens == "all":
        found = leading_eigenpairs(point, r, chunks=chunks)
        eigen, mass = found.eigen, torch.ones_like(found.trace_error[0])
        slopes = point.output_head().times(found.pushed[..., :DIRECTIONS, :])
        shares = token_shares(slopes[0], point.log_probs.exp(), num=TOKENS)
        errors = {"residual": found.residuals[0].amax(-1), "trace_error": found.trace_error[0]}
    else:
        top = fisher.top_k(point, settings.top_k_tokens, chunks)
        eigen, mass, errors = top.eigenpairs(r, allow_zero=True), top.mass, {}
        slopes = top.slopes(eigen.vectors[..., :DIRECTIONS, :])
        shares = token_shares(slopes[0], top.weights, top.tokens, TOKENS)
    eigen = fisher.Eigenpairs(*(part[0] for part in eigen))  # of the one module
    columns = {"captured_mass": mass, **errors, "trace": eigen.trace, "effective_rank": eigen.effective_rank}
    return eigen, shares, columns


def measure(settings: Settings, subject: Subject, batch: list[Encoded]) -> list[Item]:
    """The items of a batch's prompts. Out of memory, it continues with half of the batch at a time.

    A prompt that leads to NaN, infinity or no convergence is taken out of the batch and recorded as failed.

    Raises:
        UserError: the module does not lead to the predictions.
    """
    start = time.perf_counter()

    def measure_some(which: torch.Tensor) -> list[Item]:
        prompts = [batch[i] for i in which.tolist()]
        try:
            return measure_batch(settings, subject, prompts)
        except (fisher.NumericalError, torch.linalg.LinAlgError) as error:
            if len(prompts) == 1:
                return [without_matrix(settings, subject, prompts[0], first_line(error))]
            failed = getattr(error, "prompt", None)  # None: torch does not say which
        apart = which.split(1)
        if failed is not None:
            apart = apart[failed], torch.cat([which[:failed], which[failed + 1 :]])
        return list(chain.from_iterable(map(measure_some, apart)))

    with explain_unsupported(subject):
        parts = fisher.Chunks(prompts_at_once(settings, subject, batch)).map(measure_some, torch.arange(len(batch)))
    items = {item.number: item for item in chain.from_iterable(parts)}
    seconds = (time.perf_counter() - start) / len(batch)
    for item in items.values():
        item.record["seconds"] = seconds
    return [items[encoded.prompt.index] for encoded in batch]


def measure_batch(settings: Settings, subject: Subject, batch: list[Encoded]) -> list[Item]:
    """The items of prompts that go through the model together.

    Raises:
        NumericalError, torch.linalg.LinAlgError: of one of them.
    """
    point, rows = linearize_batch(settings, subject, batch)
    eigen, shares, columns = triplets(settings, point, fisher.Chunks(rows))
    _, next_ids = fisher.most_probable(point.log_probs, NEXT_TOKENS)
    next_p, next_ids = point.log_probs.exp().gather(-1, next_ids).tolist(), next_ids.tolist()
    values, vectors = (part.cpu().numpy() for part in eigen[:2])
    shares = TokenShares(*(part.cpu() for part in shares))
    columns = {name: column.tolist() for name, column in columns.items()}

    def item(i: int, encoded: Encoded) -> Item:
        record = {
            **describe_prompt(encoded),
            "top_token": subject.tokenizer.decode(next_ids[i][:1]),
            "top_probability": next_p[i][0],
            "next_tokens": subject.next_tokens(encoded.prompt.text, next_ids[i], next_p[i]),
            **{name: column[i] for name, column in columns.items()},
            "singular_values": values[i].tolist(),
            "directions": shares.records((i,), subject.show),
        }
        return Item(encoded.prompt.index, record, arrays_of(values[i], vectors[i], settings.store))

    return [item(i, encoded) for i, encoded in enumerate(batch)]


def describe_prompt(encoded: Encoded) -> dict:
    return {
        "index": encoded.prompt.index,
        "row": encoded.prompt.row,
        "prompt": encoded.prompt.text,
        "tokens": len(encoded.ids),
        "truncated": encoded.truncated,
    }


def without_matrix(settings: Settings, subject: Subject, encoded: Encoded, reason: str) -> Item:
    """The item of a prompt that failed: why, and zeros."""
    r, width = settings.num_singular_values, passes.stream_width(subject.model, subject.module)
    zeros = dict.fromkeys(("top_probability", "captured_mass", "trace", "effective_rank"), 0.0)
    lists = {"next_tokens": [], "singular_values": [0.0] * r, "directions": []}
    record = {**describe_prompt(encoded), "failed": reason, "top_token": "", **zeros, **lists}
    arrays = arrays_of(np.zeros(r, np.float32), np.zeros((r, width), np.float32), settings.store)
    return Item(encoded.prompt.index, record, arrays)


def check_once(settings: Settings, subject: Subject, batch: list[Encoded], checked: set[str]) -> bool:
    """Runs the shortest and the longest prompt of a batch, without their last tokens, with two kinds of padding.

    Args:
        checked: the kinds of attention that were checked: each is with its first batch.
    Returns:
        Whether this is one.
    Raises:
        UserError: the logits differ, so that this model's results would depend on what else is in the batch.
    """
    kind = attention_for(settings, batch)[0]
    if kind in checked:
        return False
    passes.use_attention(subject.model, kind)
    by_length = sorted(batch, key=lambda encoded: len(encoded.ids))
    ids, lengths = pad([by_length[0], by_length[-1]])
    ids = ids if ids.shape[1] > 1 else ids.expand(-1, 2)
    try:
        passes.require_causal(subject.model, ids, (lengths - 1).clamp(min=1))
    except fisher.UnsupportedModelError as error:
        raise UserError(f"{type(subject.model).__name__} is not supported: {error}") from error
    checked.add(kind)
    return True


# --- before the first one ---------------------------------------------------------------------------


def try_first(settings: Settings, subject: Subject, first: Prompt, longest: int) -> None:
    """Takes the first prompt to its last token, so that what is wrong for all prompts is found before anything else.

    Raises:
        UserError: the template leaves no room or leaves out the text, the module does not lead to the predictions, or
            F does not predict them.
    """
    check_template(subject.tokenizer)
    batch = [encode(subject.tokenizer, first, longest)]

    add = passes.add_at if settings.bias_positions == "last" else torch.add

    def moved(deltas: torch.Tensor) -> torch.Tensor:
        with passes.hooked(passes.edit_stream(subject.module, lambda h: add(h, deltas[:, None].to(h)))):
            return passes.last_logits(subject.model, *pad(batch * len(deltas)))

    # a prompt that leads to NaN, infinity or no convergence will be recorded as failed
    with explain_unsupported(subject), suppress(fisher.NumericalError, torch.linalg.LinAlgError):
        point, rows = linearize_batch(settings, subject, batch)
        fisher.check_prediction(point, moved, fisher.Chunks(rows))
