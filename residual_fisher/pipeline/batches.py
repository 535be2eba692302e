"""One batch of prompts: the model linearised at their last tokens, the triplets of each F, and what may go wrong."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain
import math
import time

import numpy as np
import torch

import fisher
from residual_fisher.common.archives import Item
from residual_fisher.common.program import UserError
from residual_fisher.common.text import first_line
from residual_fisher.model import passes
from residual_fisher.model.answers import end_tokens, greedy_answers
from residual_fisher.model.last_token import prefill_prompts
from residual_fisher.model.loading import rotation_change
from residual_fisher.model.reading import share_prefixes
from residual_fisher.model.template import check_template
from residual_fisher.model.words import TokenShares, prompt_words_test, token_shares, token_writer
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs
from residual_fisher.pipeline.matrices import arrays_of
from residual_fisher.pipeline.prompts import Encoded, Prompt, encode, plan_batches
from residual_fisher.pipeline.settings import DIRECTIONS, Settings

# Rows (tokens times cotangents) of one backward pass: more of them no longer make better use of the machine.
BACKWARD_ROWS = 4096
# Above this length attention runs in a fused kernel, which keeps no tokens x tokens matrix for the backward
# pass. Below it plain attention is as fast, and many cotangents can share one backward pass.
PLAIN_ATTENTION = 256
# Where directions are pushed forward attention stays plain, and keeps about this many such matrices a head and layer.
MATRICES_KEPT = 6
ATTENTION_BYTES = 4 << 30
TOKENS = 6  # recorded of each leading direction: a few hold most of the share, and records stay small
NEXT_TOKENS = 10  # recorded of a prediction
UNWRITTEN = ""  # in place of a token until `write_tokens` has written it


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

    @cached_property
    def room(self) -> "Room":
        """How many tokens fit into memory at once."""
        return Room(passes.devices_of(self.model))


FREE_SHARE = 0.9  # of a GPU's free memory that a pass may be expected to take: the rest is lost between blocks


class Room:
    """How many padded tokens fit into one pass: what passes have taken so far, and what did not fit.

    Sizes are halves, quarters, ... of a batch, so that a little more or less free memory changes nothing.
    """

    def __init__(self, devices: Iterable[torch.device]):
        self.gpus = [device for device in devices if device.type == "cuda"]
        self.limit, self.backward_rows = math.inf, BACKWARD_ROWS  # what has not run out of memory yet
        self.fitted, self.taken = 0, {}  # tokens of the largest pass so far, and bytes that it took of each GPU
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)  # loading has its own

    def prompts(self, count: int, tokens: int) -> int:
        """How many of `count` prompts of so many tokens each to take at once."""
        while count > 1 and not self._fits(count * tokens):
            count = -(-count // 2)
        return count

    def _fits(self, tokens: int) -> bool:
        if tokens > self.limit or tokens <= self.fitted:
            return tokens <= self.limit
        more = tokens / max(1, self.fitted)
        return all(more * taken <= FREE_SHARE * free_memory(gpu) for gpu, taken in self.taken.items())

    @contextmanager
    def taking(self, tokens: int) -> Iterator[None]:
        """Around a pass of so many tokens."""
        idle = {gpu: torch.cuda.memory_allocated(gpu) for gpu in self.gpus}
        yield
        if tokens > self.fitted:  # the peak may be that of an earlier pass: then it is an upper bound
            self.fitted = tokens
            self.taken = {gpu: torch.cuda.max_memory_allocated(gpu) - idle[gpu] for gpu in self.gpus}

    def learn_from(self, backward: fisher.Chunks, tokens: int) -> None:
        """After the backward passes, of so many tokens a cotangent."""
        if backward.halved:
            self.backward_rows = backward.size * tokens


def free_memory(gpu: torch.device) -> int:
    """Bytes, what torch keeps for tensors to come among them."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def longest(batch: list[Encoded]) -> int:
    """Tokens of the longest prompt."""
    return max(len(encoded.ids) for encoded in batch)


def padded(batch: list[Encoded], answer_tokens: int = 1) -> int:
    """Tokens that the model is given, the padding among them: of the prompts, and of answers but for their last."""
    return len(batch) * (longest(batch) + answer_tokens - 1)


def ids_and_lengths(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (prompts, tokens), each row filled up with its own last token, and lengths (prompts,)."""
    return passes.pad([encoded.ids for encoded in batch])


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


def over_prefix(settings: Settings, subject: Subject, batch: list[Encoded]) -> bool:
    """Whether `linearize_prompts` reads the batch's last tokens from prefixes in a cache."""
    last = settings.bias_positions == "last"
    return last and share_prefixes(subject.model, *ids_and_lengths(batch), settings.answer_tokens - 1)


def is_pushed(settings: Settings) -> bool:
    """Whether directions are pushed forward, which differentiates the backward pass: not that of fused attention."""
    return settings.top_k_tokens == "all" or settings.answer_tokens > 1


def attention_for(settings: Settings, subject: Subject, batch: list[Encoded]) -> str:
    """The kind of attention that a batch's prompts, or their prefixes, run with."""
    tokens = padded(batch, settings.answer_tokens)
    if tokens <= len(batch) * PLAIN_ATTENTION and 2 * tokens <= BACKWARD_ROWS:
        return "eager"
    return "eager" if is_pushed(settings) and not over_prefix(settings, subject, batch) else "sdpa"


def linearize_batch(
    settings: Settings, subject: Subject, batch: list[Encoded], attention: str
) -> tuple[fisher.Point, fisher.Chunks, list[list[int]]]:
    """The batch's prompts at their last tokens and their answers', how many cotangents to pull back at once, answers.

    Answers are the model's own; empty ones if F is of the first token's distribution alone.
    """
    passes.use_attention(subject.model, attention)
    answers, prefix, shared = [[] for _ in batch], None, over_prefix(settings, subject, batch)
    if settings.answer_tokens > 1:
        if shared:  # both passes read it
            prefix = prefill_prompts(passes.unwrapped(subject.model), *ids_and_lengths(batch))
        prompts, ends = [encoded.ids for encoded in batch], end_tokens(subject.model)
        answers = greedy_answers(subject.model, prompts, settings.answer_tokens, ends, prefix)
    ids, _ = passes.pad([encoded.ids + answer[:-1] for encoded, answer in zip(batch, answers, strict=True)])
    lengths = torch.tensor([len(encoded.ids) for encoded in batch])
    predicted = 1 if settings.answer_tokens == 1 else max(2, *map(len, answers))
    last_only = settings.bias_positions == "last"
    point = fisher.linearize_prompts(subject.model, subject.module, ids, lengths, last_only, predicted, prefix)
    at_once = max(1, subject.room.backward_rows // point.tokens) if attention == "eager" or shared else 1
    return point, fisher.Chunks(at_once), answers


def prompts_at_once(settings: Settings, subject: Subject, batch: list[Encoded]) -> int:
    """The whole batch, or as many prompts as leave plain attention room for its tokens x tokens matrices."""
    if not is_pushed(settings) or over_prefix(settings, subject, batch):
        return len(batch)
    config = subject.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    each = MATRICES_KEPT * config.num_hidden_layers * heads * longest(batch) ** 2 * subject.model.dtype.itemsize
    return max(1, min(len(batch), ATTENTION_BYTES // each))


def triplets(
    settings: Settings, point: fisher.Point, answers: list[list[int]], chunks: fisher.Chunks
) -> tuple[fisher.Eigenpairs, TokenShares, dict]:
    """The leading eigenpairs of each prompt's F, the tokens' shares of them, and columns (prompts,) of numbers."""
    r, k, quality = settings.num_singular_values, settings.top_k_tokens, {}
    if k == "all":
        found = leading_eigenpairs(point, r, chunks=chunks)
        eigen, mass = found.eigen, torch.ones_like(found.trace_error[0])
        slopes = point.output_head().times(found.pushed[..., :DIRECTIONS, :])
        shares = token_shares(slopes[0], point.log_probs.exp(), num=TOKENS)
        quality = {"residual": found.residuals[0].amax(-1), "trace_error": found.trace_error[0]}
    else:
        positions = None
        if settings.answer_tokens > 1:
            lengths = torch.tensor([max(1, len(answer)) for answer in answers])
            top = fisher.top_k_of_answers(point, k, lengths, chunks=chunks)
            quality, positions = {"captured_trace": top.share}, top.positions
        else:
            top = fisher.top_k(point, k, chunks)
        eigen, mass = top.eigenpairs(r, allow_zero=True), top.mass
        slopes = top.slopes(eigen.vectors[..., :DIRECTIONS, :])
        shares = token_shares(slopes[0], top.weights, top.tokens, TOKENS, positions)
    eigen = fisher.Eigenpairs(*(part[0] for part in eigen))  # of the one module
    columns = {"captured_mass": mass, **quality, "trace": eigen.trace, "effective_rank": eigen.effective_rank}
    return eigen, shares, columns


def measure(settings: Settings, subject: Subject, batch: list[Encoded]) -> list[Item]:
    """The items of a batch's prompts, whose tokens `write_tokens` has yet to write.

    A batch for which memory does not suffice is run in parts. A prompt that leads to NaN, infinity or no convergence
    is taken out of the batch and recorded as failed.

    Raises:
        UserError: the module does not lead to the predictions.
    """
    start, room = time.perf_counter(), subject.room
    attention = attention_for(settings, subject, batch)  # the same for parts of it

    def measure_some(which: torch.Tensor) -> list[Item]:
        prompts = [batch[i] for i in which.tolist()]
        try:
            return measure_batch(settings, subject, prompts, attention)
        except (fisher.NumericalError, torch.linalg.LinAlgError) as error:
            if len(prompts) == 1:
                return [without_matrix(settings, subject, prompts[0], first_line(error))]
            failed = getattr(error, "prompt", None)  # None: torch does not say which
        apart = which.split(1)
        if failed is not None:
            apart = apart[failed], torch.cat([which[:failed], which[failed + 1 :]])
        return list(chain.from_iterable(map(measure_some, apart)))

    most, tokens = prompts_at_once(settings, subject, batch), longest(batch)
    chunks = fisher.Chunks(room.prompts(most, tokens))
    readable = torch.tensor([i for i, encoded in enumerate(batch) if not encoded.failed], dtype=torch.int64)
    with explain_unsupported(subject):
        parts = chunks.map(measure_some, readable) if len(readable) else []
    if chunks.halved:
        room.limit = chunks.size * tokens
    failed = [without_matrix(settings, subject, encoded, encoded.failed) for encoded in batch if encoded.failed]
    items = {item.number: item for item in chain(failed, *parts)}
    seconds = (time.perf_counter() - start) / len(batch)
    for item in items.values():
        item.record["seconds"] = seconds
        if chunks.size < most:
            item.record["tokens_at_once"] = chunks.size * tokens
    return [items[encoded.prompt.index] for encoded in batch]


def measure_batch(settings: Settings, subject: Subject, batch: list[Encoded], attention: str) -> list[Item]:
    """The items of prompts that go through the model together.

    Raises:
        NumericalError, torch.linalg.LinAlgError: of one of them.
    """
    with subject.room.taking(padded(batch, settings.answer_tokens)):
        point, chunks, answers = linearize_batch(settings, subject, batch, attention)
        eigen, shares, columns = triplets(settings, point, answers, chunks)
    subject.room.learn_from(chunks, point.tokens)
    log_probs = point.log_probs.reshape(len(batch), -1, point.log_probs.shape[-1])  # (prompts, n, V)
    next_log_p, next_ids = fisher.most_probable(log_probs, NEXT_TOKENS)  # (prompts, n, 10)
    next_p, next_ids = next_log_p.exp().tolist(), next_ids.tolist()
    values, vectors, activations = (part.cpu().numpy() for part in (*eigen[:2], point.activations[0]))
    shares = TokenShares(*(part if part is None else part.cpu() for part in shares))
    columns = {name: column.tolist() for name, column in columns.items()}

    def next_tokens(i: int, position: int) -> list[dict]:
        found = zip(next_ids[i][position], next_p[i][position], strict=True)
        return [{"token": UNWRITTEN, "id": id_, "probability": p, "in_prompt": False} for id_, p in found]

    def item(i: int, encoded: Encoded) -> Item:
        record = {
            **describe_prompt(encoded),
            "top_token": UNWRITTEN,
            "top_probability": next_p[i][0][0],
            "next_tokens": next_tokens(i, 0),
            **{name: column[i] for name, column in columns.items()},
            "singular_values": values[i].tolist(),
            "directions": shares.records((i,), lambda id_: UNWRITTEN),
        }
        if settings.answer_tokens > 1:
            places = range(len(answers[i]))
            record["answer"] = {
                "text": UNWRITTEN,
                "ids": answers[i],
                "top_probabilities": [next_p[i][j][0] for j in places],
                "next_tokens": [next_tokens(i, j) for j in places],
            }
        return Item(encoded.prompt.index, record, arrays_of(values[i], vectors[i], activations[i], settings.store))

    return [item(i, encoded) for i, encoded in enumerate(batch)]


def write_tokens(subject: Subject, items: list[Item]) -> list[Item]:
    """Writes the tokens of `measure`'s items. This takes no model, and time: another thread can do it."""
    for record in (item.record for item in items):
        answer = record.get("answer", {"next_tokens": []})
        next_tokens = [*record["next_tokens"], *chain.from_iterable(answer["next_tokens"])]
        for token in chain(next_tokens, *record["directions"]):
            token["token"] = subject.show(token["id"])
        in_prompt = subject.in_prompt(record["prompt"], [token["token"] for token in next_tokens])
        for token, found in zip(next_tokens, in_prompt, strict=True):
            token["in_prompt"] = found
        record["top_token"] = subject.tokenizer.decode([token["id"] for token in record["next_tokens"][:1]])
        if "text" in answer:
            answer["text"] = subject.tokenizer.decode(answer["ids"], skip_special_tokens=True)
    return items


def describe_prompt(encoded: Encoded) -> dict:
    return {
        "index": encoded.prompt.index,
        "row": encoded.prompt.row,
        "prompt": encoded.prompt.text,
        **({"before": [turn.message for turn in encoded.prompt.before]} if encoded.prompt.before else {}),
        "tokens": len(encoded.ids),
        "truncated": encoded.truncated,
    }


def without_matrix(settings: Settings, subject: Subject, encoded: Encoded, reason: str) -> Item:
    """The item of a prompt that failed: why, and zeros."""
    r, width = settings.num_singular_values, passes.stream_width(subject.model, subject.module)
    zeros = dict.fromkeys(("top_probability", "captured_mass", "trace", "effective_rank"), 0.0)
    lists = {"next_tokens": [], "singular_values": [0.0] * r, "directions": []}
    record = {**describe_prompt(encoded), "failed": reason, "top_token": "", **zeros, **lists}
    if settings.answer_tokens > 1:
        record["answer"] = {"text": "", "ids": [], "top_probabilities": [], "next_tokens": []}
    values, vectors, activation = (np.zeros(shape, np.float32) for shape in (r, (r, width), width))
    arrays = arrays_of(values, vectors, activation, settings.store)
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
    kind = attention_for(settings, subject, batch)
    if kind in checked:
        return False
    passes.use_attention(subject.model, kind)
    by_length = sorted(batch, key=lambda encoded: len(encoded.ids))
    ids, lengths = ids_and_lengths([by_length[0], by_length[-1]])
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
    batch, settings = [encode(subject.tokenizer, first, longest)], replace(settings, answer_tokens=1)
    if batch[0].failed:
        raise UserError(f"row {first.row}: {batch[0].failed}: give more")
    # in half precision each token rounds away another part of a perturbation: what is left is known at one token
    last_only = settings.bias_positions == "last" or subject.model.dtype.itemsize < 4
    add = passes.add_at if last_only else torch.add

    def perturbed(h: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        return add(h, deltas[:, None].to(h.device)).to(h.dtype)

    def moved(deltas: torch.Tensor) -> torch.Tensor:
        with passes.hooked(passes.edit_stream(subject.module, partial(perturbed, deltas=deltas))):
            return passes.last_logits(subject.model, *ids_and_lengths(batch * len(deltas)))

    # a prompt that leads to NaN, infinity or no convergence will be recorded as failed
    failures = suppress(fisher.NumericalError, torch.linalg.LinAlgError)
    with explain_unsupported(subject), failures, subject.room.taking(padded(batch)):
        point, chunks, _ = linearize_batch(settings, subject, batch, attention_for(settings, subject, batch))
        tokens = point.tokens
        if last_only and settings.bias_positions != "last":
            point = fisher.linearize_prompts(subject.model, subject.module, *ids_and_lengths(batch), last_only)
        fisher.check_prediction(point, moved, chunks)
        subject.room.learn_from(chunks, tokens)
