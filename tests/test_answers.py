"""Greedy answers of batches, log-probabilities of given ones: against a full pass of one prompt for every token."""

import math

import pytest
import torch
from torch import nn

import families
from residual_fisher.model import answers
from residual_fisher.model.answers import answer_log_probs, end_tokens, greedy_answers
from residual_fisher.model.reading import may_pad
from scripts import calls_of
import tiny

TOKENS = 5
NEVER = {500}  # an end token that is not in the vocabulary


def prompts(lengths=(9, 3, 6, 3, 1)) -> list[list[int]]:
    ids, lengths = tiny.prompts(lengths)
    return [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]


@torch.no_grad()
def the_long_way(model: nn.Module, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    ids, log_probs = torch.tensor(prompt), []
    for _ in range(tokens):
        log_p = model(ids[None], use_cache=False).logits[0, -1].log_softmax(-1)
        log_probs.append(float(log_p.max()))
        ids = torch.cat([ids, log_p.argmax()[None]])
    return ids[len(prompt) :].tolist(), log_probs


# Those whose windows or positions go by places in the cache are not padded: groups of the same length.
@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("llama", True), ("gpt2", True), ("opt", True), ("bloom", True), ("phi", True), ("falcon-alibi", True),
        ("gemma3", False), ("gpt-oss", False), ("longrope", False), ("mamba", False), ("jamba", False),
    ],
)  # fmt: skip
def test_answers_are_those_of_full_passes_of_one_prompt(name, padded):
    model = tiny.shared(name) if name in tiny.CONFIGS | tiny.ROTATING else families.shared(name)
    assert may_pad(model, prompts()[0], TOKENS) is padded
    found = greedy_answers(model, prompts(), TOKENS, NEVER)
    assert found == [the_long_way(model, prompt, TOKENS)[0] for prompt in prompts()]
    assert len({tuple(answer) for answer in found}) > 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "longrope", "bloom", "mamba"])
def test_log_probabilities_are_those_of_full_passes_of_one_prompt(name):
    model = tiny.shared(name) if name in tiny.CONFIGS | tiny.ROTATING else families.shared(name)
    batch = prompts((8, 3, 6, 3, 1))
    said = [the_long_way(model, prompt, count) for prompt, count in zip(batch, (5, 1, 3, 5, 2), strict=True)]
    found = answer_log_probs(model, batch, [ids for ids, _ in said])
    for log_probs, (_, expected) in zip(found, said, strict=True):
        torch.testing.assert_close(log_probs, torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "longrope", "mamba"])
def test_what_prompts_begin_with_runs_once_and_changes_no_log_probability(name):
    model = tiny.shared(name) if name in tiny.CONFIGS | tiny.ROTATING else families.shared(name)
    begin, *ends = prompts((7, 3, 6, 1))
    batch, said = [begin + end for end in ends], prompts((4, 2, 5))
    alone = [answer_log_probs(model, [prompt], [answer])[0] for prompt, answer in zip(batch, said, strict=True)]
    with calls_of(answers, "prefill") as calls:
        together = answer_log_probs(model, batch, said)
    cached = name not in ("longrope", "mamba")
    assert [ids.tolist() for _, ids in calls] == [[begin]] * cached
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_an_answer_ends_with_its_end_token_and_at_the_models_last_position():
    model = tiny.shared("llama")
    whole = greedy_answers(model, prompts(), TOKENS, NEVER)
    end = whole[0][2]
    cut = [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]
    assert greedy_answers(model, prompts(), TOKENS, {end}) == cut
    long = [prompts()[0] * 7]  # 63 of 64 positions
    assert [len(answer) for answer in greedy_answers(model, long, TOKENS, NEVER)] == [2]


def test_neither_the_batch_nor_the_size_of_a_pass_matters(monkeypatch):
    model = tiny.shared("llama")
    together = greedy_answers(model, prompts(), TOKENS, NEVER)
    log_probs = answer_log_probs(model, prompts(), together)
    assert together == [greedy_answers(model, [prompt], TOKENS, NEVER)[0] for prompt in prompts()]
    monkeypatch.setattr(answers, "PASS_TOKENS", 12)
    assert together == greedy_answers(model, prompts(), TOKENS, NEVER)
    for one, other in zip(answer_log_probs(model, prompts(), together), log_probs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_numbers_that_overflow_end_an_answer():
    model = tiny.build("llama")
    row = model.get_input_embeddings().weight[the_long_way(model, prompts()[0], 2)[0][0]]
    row.fill_(math.nan)
    found = greedy_answers(model, prompts()[:1], TOKENS, NEVER)
    assert [len(answer) for answer in found] == [1]


def test_end_tokens_are_those_of_the_generation_settings():
    model = tiny.build("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model) == {7, 9}
