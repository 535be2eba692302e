"""Greedy answers of batches, log-probabilities of given ones: against a full pass of one prompt for every token."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import families
import fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.common.options import identity_of
from residual_fisher.common.program import UserError
from residual_fisher.model import answers
from residual_fisher.model.answers import answer_log_probs, end_tokens, greedy_answers
from residual_fisher.model.last_token import prefill_prompts
from residual_fisher.model.passes import hooked, pad
from residual_fisher.model.reading import may_pad
from residual_fisher.pipeline import settings
from residual_fisher.pipeline.prompts import Prompt, encode
import scripts
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


@pytest.mark.parametrize(("name", "lengths"), [("llama", (9, 3, 6, 3, 1)), ("gpt2", (9, 3, 6)), ("gemma3", (9, 9))])
def test_answers_over_a_prefix_that_was_run_before_are_the_same_and_leave_it_as_it_is(name, lengths):
    model, some, widths = tiny.shared(name), prompts(lengths), []
    expected, prefix = greedy_answers(model, some, TOKENS, NEVER), prefill_prompts(model, *pad(some))
    before = [layer.keys.clone() for layer in prefix.layers]
    with hooked((model.register_forward_pre_hook, lambda module, args: widths.append(args[0].shape[1]))):
        assert greedy_answers(model, some, TOKENS, NEVER, prefix) == expected
    assert widths == [1] * TOKENS
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.layers, before, strict=True))


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
def test_f_of_an_answer_is_the_float64_sum_over_its_positions_and_counted_tokens(name, last_only):
    ids, lengths, some, said = answered(name)
    point = linearized(name, ids, lengths, last_only)
    assert (point.tokens == 9) is (last_only and name not in ("gemma2", "gpt-oss"))  # in the place of 33
    counts, u = torch.tensor([3, 2, 3]), directions(1, len(some), 4)
    few, full = (fisher.top_k_of_answers(point, K, counts, rows) for rows in (None, 3 * K))
    slopes, eigen = few.slopes(u)[0], few.eigenpairs(2)
    for i, (prompt, answer) in enumerate(zip(some, said, strict=True)):
        rows, p = reference_jacobian(name, prompt, answer, last_only)
        whole = sum(map(tiny.sum_of_outer_products, rows, p, [K] * len(p)))
        assert_close(full.matrix[0, i], whole)
        assert full.share[i] == pytest.approx(1)
        at, tokens = few.positions[i, 1:], few.tokens[i, 1:]
        assert len({*zip(at.tolist(), tokens.tolist(), strict=True)}) == K
        counted = p[at, tokens].sqrt()[:, None] * rows[at, tokens]
        assert_close(few.matrix[0, i], counted.mT @ counted)
        assert_close(slopes[i, :, 1:], u[0, i].double() @ rows[at, tokens].mT)
        # not much less than the pairs that hold most, which four random directions show up to chance
        parts = torch.stack([p[j].topk(K).values * rows[j, p[j].topk(K).indices].pow(2).sum(-1) for j in range(len(p))])
        assert counted.pow(2).sum() >= 0.8 * parts.flatten().topk(K).values.sum()
        assert few.share[i] == pytest.approx((counted.pow(2).sum() / whole.trace()).item(), abs=0.2)
        gained = rows[range(len(answer)), answer].sum(0)
        assert (eigen.vectors[0, i].double() @ gained > 0).all()
    assert full.weights[1].count_nonzero() == 2 * K  # none beyond the end of the second answer


@pytest.mark.parametrize("last_only", [False, True])
def test_f_of_an_answer_of_one_token_is_that_of_the_next_token(last_only):
    (ids, lengths), model = tiny.prompts(), tiny.shared("llama")
    top = fisher.top_k_of_answers(linearized("llama", ids, lengths, last_only, 2), K, torch.ones(3, dtype=int))
    one = fisher.top_k(fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths, last_only), K)
    assert_close(top.matrix, one.matrix.double())
    assert torch.allclose(top.mass, one.mass)


@pytest.mark.parametrize("last_only", [False, True])
def test_f_of_an_answer_does_not_depend_on_its_batch(last_only):
    ids, lengths, some, said = answered("llama")
    point = linearized("llama", ids, lengths, last_only)
    together = fisher.top_k_of_answers(point, K, torch.tensor([3, 2, 3])).eigenpairs(4)
    for i, (prompt, answer) in enumerate(zip(some, said, strict=True)):
        alone = linearized("llama", torch.tensor([prompt + answer[:-1]]), lengths[i, None], last_only, len(answer))
        eigen = fisher.top_k_of_answers(alone, K, torch.tensor([len(answer)])).eigenpairs(4)
        assert torch.allclose(eigen.values[0, 0], together.values[0, i], rtol=1e-4)
        assert torch.allclose(eigen.vectors[0, 0], together.vectors[0, i], atol=1e-3)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("where", ["all", "last"])
def test_a_run_records_answers_and_their_fisher_matrices(where, chat_directory, dataset, tmp_path):
    options = {"answer_tokens": 3, "bias_positions": where, "num_prompts": 6}
    for size in (4, 1):
        out = tmp_path / str(size)
        assert scripts.compute_fisher(chat_directory, dataset, out, batch_size=size, **options) == 0
    model, tokenizer = fisher.load(str(chat_directory), "float32", "cpu")
    together, alone = (scripts.records(tmp_path / str(size)) for size in (4, 1))
    matrices, others = (load_fisher_matrices(tmp_path / str(size)) for size in (4, 1))
    assert len({tuple(record["answer"]["ids"]) for record in together}) > 1
    for i, (record, other) in enumerate(zip(together, alone, strict=True)):
        prompt = encode(tokenizer, Prompt(0, 0, record["prompt"]), 100).ids
        said, log_probs = the_long_way(model, prompt, 3)
        said = said[: said.index(2) + 1] if 2 in said else said  # the end token of tiny models
        answer = record["answer"]
        assert answer["ids"] == said and answer["text"] == tokenizer.decode(said, skip_special_tokens=True)
        assert answer["top_probabilities"] == pytest.approx(np.exp(log_probs[: len(said)]), rel=1e-4)
        assert [tokens[0]["id"] for tokens in answer["next_tokens"]] == said
        assert answer["next_tokens"][0] == record["next_tokens"]
        assert {t["position"] for direction in record["directions"] for t in direction} <= {*range(len(said))}
        assert 0.3 < record["captured_trace"] <= 1 + 1e-6
        ids, module = torch.tensor([prompt + said[:-1]]), tiny.layers_of(model)[1]
        lengths = torch.tensor([len(prompt)]), torch.tensor([len(said)])
        point = fisher.linearize_prompts(model, module, ids, lengths[0], where == "last", max(2, len(said)))
        expected = fisher.top_k_of_answers(point, 6, lengths[1])
        assert pytest.approx(expected.eigenpairs(4).values[0, 0].numpy(), rel=1e-4) == matrices[i].S
        assert pytest.approx(others[i].S, rel=1e-4) == matrices[i].S
        assert answer["ids"] == other["answer"]["ids"]


def test_an_answer_of_one_token_is_no_option_of_a_run_and_all_tokens_are_refused():
    assert identity_of(settings.parse(["--answer-tokens", "1"])) == identity_of(settings.parse([]))
    assert identity_of(settings.parse(["--answer-tokens", "2"]))["answer_tokens"] == 2
    with pytest.raises(UserError, match="--top-k-tokens takes a number"):
        settings.parse(["--answer-tokens", "2", "--top-k-tokens", "all"])
