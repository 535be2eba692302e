"""Block iteration for the whole vocabulary's leading eigenpairs, against float64, on tiny models."""

import pytest
import torch

import fisher
from residual_fisher.model import eigen
from residual_fisher.pipeline import block_lanczos
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs
from test_fisher import RELATIVE, assert_eigenpairs_of, point_of
import tiny


def batch_point(name: str, layer: int, lengths: list[int] = tiny.LENGTHS, last_only: bool = False) -> fisher.Point:
    model, (ids, lengths) = tiny.shared(name), tiny.prompts(lengths)
    return fisher.linearize_prompts(model, tiny.layers_of(model)[layer], ids, lengths, last_only)


def assert_residuals_and_trace(matrix: torch.Tensor, found: block_lanczos.Leading, tolerance: float):
    """The residuals that are reported are the true ones, and the trace is as far off as its error says."""
    values, vectors = (part.double() for part in found.eigen[:2])
    residuals = (vectors @ matrix - values[..., None] * vectors).norm(dim=-1) / values[..., :1]
    assert found.residuals.max() <= tolerance
    assert (residuals - found.residuals).abs().max() <= RELATIVE
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert ((found.eigen.trace - trace).abs() <= 5 * found.trace_error + RELATIVE * trace).all()
    rank = trace**2 / matrix.pow(2).sum(dim=(-2, -1))
    assert torch.allclose(found.eigen.effective_rank.double(), rank, rtol=0.1)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_at_the_last_token_it_matches_float64(name):
    """One basis serves all layers."""
    ids, point = point_of(name)
    found, matrix = leading_eigenpairs(point, 3, tolerance=1e-4), tiny.reference_layers(name, ids)
    assert_eigenpairs_of(matrix, found.eigen)
    assert_residuals_and_trace(matrix, found, 1e-4)
    toward = fisher.full_vocabulary(point).top_gradient
    assert ((found.eigen.vectors[:, 0] * toward).sum(-1) > 0).all()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_over_a_batch_it_matches_float64(name):
    found = leading_eigenpairs(batch_point(name, 1), 3, chunks=fisher.Chunks(4))
    matrix = tiny.reference_prompts(name, 1, *tiny.prompts())[None]
    assert_eigenpairs_of(matrix, found.eigen, vector=0.99)  # where gaps are small, residuals of 1e-3 leave room
    assert_residuals_and_trace(matrix, found, 1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bloom"])
def test_over_the_prefixes_of_a_batch_it_matches_float64(name):
    found = leading_eigenpairs(batch_point(name, 1, last_only=True), 3, chunks=fisher.Chunks(4))
    several = zip(*tiny.prompts(), strict=True)
    matrix = torch.stack([tiny.reference_fisher(name, ids[:length], 1) for ids, length in several])[None]
    assert_eigenpairs_of(matrix, found.eigen, vector=0.99)
    assert_residuals_and_trace(matrix, found, 1e-3)


def test_there_are_as_many_pairs_as_tokens_at_most():
    config = tiny.hf.LlamaConfig(**{**tiny.GROUPED, "vocab_size": 6})
    torch.manual_seed(0)
    model = tiny.hf.AutoModelForCausalLM.from_config(config, **tiny.PLAIN).eval().requires_grad_(False)
    point = fisher.linearize(model, [3, 5, 4, 1, 5])
    found, expected = leading_eigenpairs(point, 10).eigen, fisher.full_vocabulary(point).eigenpairs(6)
    assert found.vectors.shape == (tiny.DEPTH, 6, tiny.D)
    assert (found.values - expected.values).abs().max() <= RELATIVE * expected.values.max()


def test_the_estimated_trace_is_right_on_average():
    """Over a hundred draws of the random rows, from a basis that leaves a good part of the trace to them."""
    _, point = point_of("llama")
    truth = fisher.full_vocabulary(point).eigenpairs()
    head, top = point.output_head(), fisher.top_k(point, 3)
    matrix, num = fisher.full_vocabulary(point).matrix, block_lanczos.HUTCHINSON_PROBES
    found = eigen.block_lanczos(lambda v: (matrix @ v.mT).mT, top.gradients, 3, 1.0, most=3)
    signs = torch.randint(0, 2, (800, tiny.VOCABULARY), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    rest = head.p.scatter(-1, top.tokens, 0)
    pulled = fisher.pull_back(point, head.combine(signs * rest.sqrt()))
    known = top.gradients * top.weights.sqrt()[:, None]
    estimates = [block_lanczos._estimates(found, known, part) for part in pulled.split(num, dim=1)]
    trace, rank, error = (torch.stack(column) for column in zip(*estimates, strict=True))
    assert (found.values.sum(-1) < 0.9 * truth.trace).all()
    assert torch.allclose(trace.mean(0), truth.trace, rtol=0.05)
    assert torch.allclose(trace.std(0), error.mean(0), rtol=0.3)
    assert torch.allclose(rank.mean(0), truth.effective_rank, rtol=0.1)


def test_a_prompts_result_does_not_depend_on_its_batch():
    model, (ids, lengths) = tiny.shared("llama"), tiny.prompts()
    together = leading_eigenpairs(batch_point("llama", 0), 4)
    for i, length in enumerate(tiny.LENGTHS):
        one = fisher.linearize_prompts(model, tiny.layers_of(model)[0], ids[i : i + 1, :length], lengths[i : i + 1])
        alone = leading_eigenpairs(one, 4)
        for here, there in zip(together.eigen, alone.eigen, strict=True):
            assert (here[0, i] - there[0, 0]).abs().max() <= 1e-4 * there[0, 0].abs().max()
        assert together.trace_error[0, i].item() == pytest.approx(alone.trace_error[0, 0].item(), rel=0.01)


def test_a_certain_prediction_has_a_fisher_matrix_of_zero():
    """Beside an ordinary prompt in the batch, which is finished as if it were alone."""
    point = batch_point("gpt2", 1, [6, 6])
    point.log_probs[0] = -torch.inf
    point.log_probs[0, 7] = 0
    found = leading_eigenpairs(point, 3)
    assert found.eigen.values[0, 0].abs().max() == found.eigen.trace[0, 0] == found.residuals[0, 0].max() == 0
    assert found.eigen.values[0, 1].min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_iterated_to_their_own_rounding(dtype):
    _, point = point_of("llama", dtype=dtype)
    expected = fisher.full_vocabulary(point_of("llama")[1]).eigenpairs(2)
    room = 0.1 if dtype == torch.bfloat16 else 0.02
    for pairs in (leading_eigenpairs(point, 2).eigen, fisher.full_vocabulary(point).eigenpairs(2)):
        assert pairs.values.dtype == torch.float32
        assert torch.allclose(pairs.values[:, 0], expected.values[:, 0], rtol=room)


def test_no_convergence_is_an_error_that_names_the_prompt(monkeypatch):
    monkeypatch.setattr(block_lanczos, "MAX_ITERATIONS", 1)
    with pytest.raises(fisher.NumericalError, match="no convergence in 1 iterations: a residual of") as caught:
        leading_eigenpairs(batch_point("llama", 0), 1, tolerance=1e-6)
    assert (caught.value.layer, caught.value.prompt) == (0, 0)
