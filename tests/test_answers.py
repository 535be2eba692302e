"""Greedy answers of batches, log-probabilities of given ones: against a full pass of one prompt for every token."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import families
import fisher
from residual_fisher.model import answers
from residual_fisher.model.answers import answer_log_probs, end_tokens, greedy_answers
from residual_fisher.model.passes import pad
from residual_fisher.model.reading import may_pad
from scripts import calls_of
from test_fisher import assert_close, directions
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
    together = greedy_answers(model, [*long, *prompts()], TOKENS, NEVER)
    assert [len(answer) for answer in together] == [2, *[TOKENS] * 5]


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


# --- F of an answer --------------------------------------------------------------------------------

K = 6


def answered(name: str, m: int = 3) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], list[list[int]]]:
    """Prompts with the first tokens of their answers (prompts, tokens), prompts' lengths, prompts, and answers.

    The second answer is shorter than the others.
    """
    some = prompts((9, 3, 6))
    said = greedy_answers(tiny.shared(name), some, m, NEVER)
    said[1] = said[1][:2]
    ids, _ = pad([prompt + answer[:-1] for prompt, answer in zip(some, said, strict=True)])
    return ids, torch.tensor([9, 3, 6]), some, said


def reference_jacobian(name: str, prompt: list[int], answer: list[int], last_only: bool) -> tuple[Tensor, Tensor]:
    """In float64: (n, V, d), of the log-probabilities at each position of an answer, and p (n, V)."""
    model = tiny.shared(name, torch.float64)
    ids, first = torch.tensor([prompt + answer[:-1]]), len(prompt) - 1 if last_only else 0

    def log_probs(delta: Tensor) -> Tensor:
        def add(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            h = torch.cat([h[:, :first], h[:, first : len(prompt)] + delta, h[:, len(prompt) :]], dim=1)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = tiny.layers_of(model)[1].register_forward_hook(add)
        try:
            return model(ids, use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
        finally:
            handle.remove()

    zero = torch.zeros(tiny.D, dtype=torch.float64)
    return torch.func.jacrev(log_probs)(zero), log_probs(zero).exp()


def linearized(name: str, ids: Tensor, lengths: Tensor, last_only: bool, n: int = 3) -> fisher.Point:
    model = tiny.shared(name)
    return fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths, last_only, n)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt-oss"])
def test_the_mean_over_all_signs_is_the_float64_sum_over_positions(name, last_only):
    """Products of different positions cancel in it, and what is left is sum_j F_j."""
    ids, lengths, some, said = answered(name)
    point = linearized(name, ids, lengths, last_only)
    assert (point.tokens == 9) is (last_only and name not in ("gemma2", "gpt-oss"))  # in the place of 33
    found = []
    for signs in itertools.product((1, -1), repeat=2):
        signs = torch.tensor([1, *signs])[None, :, None].expand(len(some), 3, K)
        top = fisher.top_k_of_answers(point, K, torch.tensor([3, 2, 3]), signs)
        found.append(fisher.fisher_matrix(top.gradients, top.weights)[0])
    u = directions(1, len(some), 4)
    slopes = top.slopes(u)[0]
    for i, (prompt, answer) in enumerate(zip(some, said, strict=True)):
        rows, p = reference_jacobian(name, prompt, answer, last_only)
        assert_close(torch.stack(found).mean(0)[i], sum(map(tiny.sum_of_outer_products, rows, p, [K] * len(p))))
        for j, tokens in enumerate(p.topk(K).indices):
            assert top.tokens[i, j].tolist() == tokens.tolist()
            assert_close(slopes[i, :, j], u[0, i].double() @ rows[j, tokens].mT)
        gained = rows[range(len(answer)), answer].sum(0)
        assert (top.eigenpairs(2).vectors[0, i].double() @ gained > 0).all()
    assert top.p[1, 2].sum() == 0  # beyond the end of the second answer


@pytest.mark.parametrize("last_only", [False, True])
def test_f_of_an_answer_of_one_token_is_that_of_the_next_token(last_only):
    (ids, lengths), model = tiny.prompts(), tiny.shared("llama")
    point = linearized("llama", ids, lengths, last_only, 2)
    top = fisher.top_k_of_answers(point, K, torch.ones(3, dtype=int), torch.ones(3, 2, K))
    one = fisher.top_k(fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths, last_only), K)
    assert_close(fisher.fisher_matrix(top.gradients, top.weights), one.matrix.double())
    assert torch.allclose(top.mass, one.mass)


@pytest.mark.parametrize("last_only", [False, True])
def test_f_of_an_answer_does_not_depend_on_its_batch(last_only):
    ids, lengths, some, said = answered("llama")
    signs = torch.randint(0, 2, (3, 3, K), generator=torch.Generator().manual_seed(3)) * 2 - 1
    point = linearized("llama", ids, lengths, last_only)
    together = fisher.top_k_of_answers(point, K, torch.tensor([3, 2, 3]), signs).eigenpairs(4)
    for i, (prompt, answer) in enumerate(zip(some, said, strict=True)):
        n = len(answer)
        alone = linearized("llama", torch.tensor([prompt + answer[:-1]]), lengths[i, None], last_only, n)
        eigen = fisher.top_k_of_answers(alone, K, torch.tensor([n]), signs[i, None, :n]).eigenpairs(4)
        assert torch.allclose(eigen.values[0, 0], together.values[0, i], rtol=1e-4)
        assert torch.allclose(eigen.vectors[0, 0], together.vectors[0, i], atol=1e-3)
