"""The Fisher matrix of the whole vocabulary against float64, computed token by token, on tiny models."""

import pytest
from scipy.sparse.linalg import ArpackNoConvergence
import torch

import fisher
import scripts
from test_fisher import assert_all_of_it_matches, assert_close, assert_eigenpairs_of, directions, point_of
import tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_at_every_layer_of_a_prompt_it_matches_float64(name):
    ids, point = point_of(name)
    found = fisher.full_vocabulary(point)
    assert_all_of_it_matches(found, tiny.reference_layers(name, ids), found.top_gradient)
    z = point.cotangents(point.log_probs.topk(5).indices)
    gradients = fisher.pull_back(point, z)
    assert torch.allclose(z @ found.jacobian, gradients, atol=1e-5 * float(z.abs().max()))
    assert_close(found.top_gradient, gradients[:, 0].double(), 1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_for_every_prompt_of_a_batch_it_matches_float64(name):
    model, (ids, lengths) = tiny.shared(name), tiny.prompts()
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths)
    found, matrices = fisher.full_vocabulary(point), tiny.reference_prompts(name, 1, ids, lengths)
    assert_all_of_it_matches(found, matrices[None], found.top_gradient)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_directions_pushed_forward_match_the_jacobian(name):
    _, point = point_of(name)
    u = directions(tiny.DEPTH, 4)
    expected = (u @ fisher.full_vocabulary(point).jacobian.mT).double()
    for size in (3, 100):
        assert_close(fisher.PushForward(point)(u, fisher.Chunks(size)), expected, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_curvature_along_single_directions_is_that_of_the_matrix(name):
    ids, point = point_of(name)
    u = directions(tiny.DEPTH, 3)
    expected = torch.einsum("lnd,lde,lne->ln", u.double(), tiny.reference_layers(name, ids), u.double())
    assert torch.allclose(fisher.full_curvature(point, u).double(), expected, rtol=1e-3)


def test_a_certain_prediction_beside_others_has_a_matrix_of_zero():
    model, (ids, lengths) = tiny.shared("gpt2"), tiny.prompts([6, 6])
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths)
    point.log_probs[0] = -torch.inf
    point.log_probs[0, 7] = 0
    found = fisher.full_vocabulary(point)
    with pytest.raises(fisher.NumericalError, match="is zero") as caught:
        found.eigenpairs()
    assert (caught.value.layer, caught.value.prompt) == (0, 0)
    eigen = found.eigenpairs(2, allow_zero=True)
    assert not any(part[0, 0].any() for part in (eigen.values, eigen.trace, eigen.effective_rank))
    assert eigen.values[0, 1].min() > 0


# --- wide matrices, without eigh -----------------------------------------------------------------


def wide(top: tuple[float, float] = (1.0, 0.5)) -> tuple[fisher.FullVocabulary, torch.Tensor]:
    """Two layers of width 400, one with eigenvalues that decay slowly, one of rank 3."""
    generator = torch.Generator().manual_seed(5)
    spectra = torch.zeros(2, 400, dtype=torch.float64)
    spectra[0] = torch.cat([torch.tensor(top, dtype=torch.float64), 0.4 / torch.arange(1, 399)])
    spectra[1, :3] = torch.tensor([3.0, 2.0, 1.0])
    q = torch.linalg.qr(torch.randn(2, 400, 400, dtype=torch.float64, generator=generator)).Q
    matrix = (q * spectra[:, None]) @ q.mT
    return fisher.FullVocabulary(torch.empty(0), matrix.float(), torch.ones(2, 400), weights=None, head=None), matrix


@pytest.mark.parametrize("top", [(1.0, 0.5), (1.0, 0.999)], ids=["apart", "close"])
def test_wide_matrices_match_eigh(top):
    found, matrix = wide(top)
    eigen = found.eigenpairs(5)
    assert_eigenpairs_of(matrix, eigen)
    assert torch.allclose(eigen.trace.double(), matrix.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-5)
    assert ((eigen.vectors @ found.top_gradient[..., None]) > 0)[:, 0].all()


def test_a_failed_eigensolver_is_an_error():
    failed = scripts.calls_of(fisher, "eigsh", ArpackNoConvergence("No convergence", [], []))
    with failed, pytest.raises(fisher.NumericalError, match="eigensolver failed"):
        wide()[0].eigenpairs()


def test_a_wrong_answer_of_the_eigensolver_is_an_error(monkeypatch):
    eigsh = fisher.eigsh

    def wrong(*arguments, **options):
        values, vectors = eigsh(*arguments, **options)
        return 1.01 * values, vectors

    monkeypatch.setattr(fisher, "eigsh", wrong)
    with pytest.raises(fisher.NumericalError, match="residual"):
        wide()[0].eigenpairs()


def test_a_zero_matrix_names_the_layer():
    found, _ = wide()
    found.matrix[1] = 0
    with pytest.raises(fisher.NumericalError, match="the Fisher matrix is zero") as caught:
        found.eigenpairs()
    assert caught.value.layer == 1
