"""The Fisher matrix of the whole vocabulary against float64, computed token by token, on tiny models."""

from functools import partial

import pytest
from scipy.sparse.linalg import LinearOperator, eigsh
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fisher
from residual_fisher.model import eigen
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

APART = torch.cat([torch.tensor([1.0, 0.5]), 0.4 / torch.arange(1, 399)])
CLOSE = torch.cat([torch.tensor([1.0, 0.999]), 0.4 / torch.arange(1, 399)])
FLAT = torch.linspace(1, 0, 400)  # its basis is cut seven times
RANK_3 = torch.tensor([3.0, 2.0, 1.0] + 397 * [0.0])


def wide(*spectra: torch.Tensor) -> tuple[fisher.FullVocabulary, torch.Tensor]:
    """Layers of width 400."""
    generator = torch.Generator().manual_seed(5)
    spectra = torch.stack(spectra).double()
    q = torch.linalg.qr(torch.randn(len(spectra), 400, 400, dtype=torch.float64, generator=generator)).Q
    matrix = (q * spectra[:, None]) @ q.mT
    toward = torch.ones(len(spectra), 400)
    return fisher.FullVocabulary(torch.empty(0), matrix.float(), toward, weights=None, head=None), matrix


@pytest.mark.parametrize("spectrum", [APART, CLOSE, FLAT], ids=["apart", "close", "flat"])
def test_wide_matrices_match_eigh(spectrum):
    """Beside one of rank 3, which is finished first."""
    found, matrix = wide(spectrum, RANK_3)
    pairs = found.eigenpairs(5)
    assert_eigenpairs_of(matrix, pairs)
    values, vectors = (part.double() for part in pairs[:2])
    # the rounding of float32 products, about 1e-7 of the largest eigenvalue each
    assert ((values - torch.linalg.eigvalsh(matrix).flip(-1)[:, :5]).abs() <= 1e-6 * values[:, :1]).all()
    assert (vectors @ matrix - values[..., None] * vectors).norm(dim=-1).max() <= fisher.MAX_RESIDUAL * values.max()
    assert (vectors @ vectors.mT - torch.eye(5)).abs().max() <= 1e-5
    assert torch.allclose(pairs.trace.double(), matrix.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-5)
    assert ((pairs.vectors @ found.top_gradient[..., None]) > 0)[:, 0].all()


@pytest.mark.parametrize("num", [1, 10])
@pytest.mark.parametrize("spectrum", [APART, FLAT], ids=["apart", "flat"])
def test_wide_matrices_take_about_as_many_products_as_arpack_and_few_waits_for_a_gpu(spectrum, num):
    found, matrix = wide(spectrum, spectrum)
    products = []
    operator = LinearOperator((400, 400), lambda v: products.append(v) or matrix[0].numpy() @ v, dtype=float)
    eigsh(operator, num, which="LA", tol=1e-6)
    with HostWaits() as waits, scripts.calls_of(eigen, "eigh") as looks:
        found.eigenpairs(num)
    ours = sum(out.shape[-1] for out in waits.products if out.shape[-2:-1] == (400,))
    assert ours <= 1.3 * len(products) + num + 10, len(products)
    assert waits.count <= len(looks) + 3


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait, were the tensors on a GPU; keeps the results of batched matrix products."""

    def __init__(self):
        super().__init__()
        self.count, self.products = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero")
        if name == "bmm":
            self.products.append(out)
        return out


def test_a_failed_eigensolver_is_an_error_that_names_the_layer(monkeypatch):
    monkeypatch.setattr(fisher, "block_lanczos", partial(cut_short, fisher.block_lanczos))
    with pytest.raises(fisher.NumericalError, match="the eigensolver left a residual of") as caught:
        wide(RANK_3, FLAT)[0].eigenpairs(2)
    assert caught.value.layer == 1


def cut_short(own, *arguments, most: int, **options):
    return own(*arguments, most=20, **options)


def test_a_wrong_answer_of_the_eigensolver_is_an_error(monkeypatch):
    own = fisher.block_lanczos

    def wrong(*arguments, **options):
        found = own(*arguments, **options)
        return found._replace(values=1.01 * found.values)

    monkeypatch.setattr(fisher, "block_lanczos", wrong)
    with pytest.raises(fisher.NumericalError, match="residual"):
        wide(APART)[0].eigenpairs()


def test_a_zero_matrix_names_the_layer_or_has_zeros():
    found, matrix = wide(APART, RANK_3)
    found.matrix[1] = 0
    with pytest.raises(fisher.NumericalError, match="the Fisher matrix is zero") as caught:
        found.eigenpairs()
    assert caught.value.layer == 1
    zeros = found.eigenpairs(2, allow_zero=True)
    assert not any(part[1].any() for part in zeros)
    assert_eigenpairs_of(matrix[:1], fisher.Eigenpairs(*(part[:1] for part in zeros)))
