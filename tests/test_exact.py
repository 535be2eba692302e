"""The Fisher matrix of the whole vocabulary against float64, worked out token by token, on tiny models."""

import pytest
from scipy.sparse.linalg import ArpackNoConvergence
import torch

import exact
import fisher
import head
import last_token
from test_fisher_of_prompts import LENGTHS, prompts
import tiny

RELATIVE = 1e-4


def at_last_token(name: str, dtype=torch.float32):
    model, ids = tiny.build(name, dtype), tiny.prompt()
    point = fisher.linearize(model, tiny.layers_of(model), ids[-1], last_token.prefill(model, ids[:-1]))
    return ids, point


def truth(name: str, ids: torch.Tensor, everywhere: bool = False) -> torch.Tensor:
    reference = tiny.build(name, torch.float64)
    layers = tiny.layers_of(reference)
    return torch.stack([tiny.brute_force_fisher(reference, ids, layer, everywhere=everywhere) for layer in layers])


def assert_eigenpairs_of(matrix: torch.Tensor, eigen: fisher.Eigen, vector: float = 0.9999):
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(matrix))
    num = eigen.values.shape[-1]
    assert (eigen.values - values[..., :num]).abs().max() <= RELATIVE * values.max()
    assert ((eigen.vectors[..., 0, :].double() * vectors[..., 0]).sum(-1).abs() >= vector).all()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_matrix_and_its_eigenpairs_match_float64(name):
    ids, point = at_last_token(name)
    found, matrix = exact.matrices(point), truth(name, ids)
    assert (found.matrix - matrix).abs().max() <= RELATIVE * matrix.abs().max()
    eigen = found.eigenpairs(3)
    assert_eigenpairs_of(matrix, eigen)
    assert torch.allclose(eigen.trace.double(), matrix.diagonal(dim1=1, dim2=2).sum(-1), rtol=RELATIVE)
    rank = matrix.diagonal(dim1=1, dim2=2).sum(-1) ** 2 / matrix.pow(2).sum(dim=(1, 2))
    assert torch.allclose(eigen.effective_rank.double(), rank, rtol=RELATIVE)
    z = head.top_k_cotangents(point, 5)
    assert torch.allclose(
        z.rows @ found.jacobian, fisher.pull_back(point, z.rows), atol=1e-5 * float(z.rows.abs().max())
    )
    assert ((eigen.vectors[:, 0] * fisher.pull_back(point, z.rows)[:, 0]).sum(-1) > 0).all()
    u = torch.randn(tiny.DEPTH, 4, tiny.D, generator=torch.Generator().manual_seed(0))
    curvature = torch.einsum("lnd,lde,lne->ln", u.double(), matrix, u.double())
    assert torch.allclose(found.curvature(u).double(), curvature, rtol=1e-3)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_pushed_forward_directions_match_the_jacobian(name):
    _, point = at_last_token(name)
    jacobian = exact.matrices(point).jacobian
    u = torch.randn(tiny.DEPTH, 4, tiny.D, generator=torch.Generator().manual_seed(0))
    expected = u @ jacobian.mT
    for size in (3, 100):
        found = fisher.PushForward(point)(u, fisher.Chunks(size))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_block_iteration_at_the_last_token_matches_float64(name):
    """One basis serves all layers."""
    ids, point = at_last_token(name)
    found = exact.leading_eigenpairs(point, 3, tolerance=1e-4)
    matrix = truth(name, ids)
    assert_eigenpairs_of(matrix, found.eigen)
    check_residuals_and_trace(matrix, found, 1e-4)
    toward = exact.matrices(point).top_gradient
    assert ((found.eigen.vectors[:, 0] * toward).sum(-1) > 0).all()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_block_iteration_over_a_batch_matches_float64(name):
    model, (ids, lengths) = tiny.build(name), prompts()
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths)
    found = exact.leading_eigenpairs(point, 3, chunks=fisher.Chunks(4))
    matrix = torch.stack([truth(name, ids[i, :n], everywhere=True)[1] for i, n in enumerate(LENGTHS)])[None]
    assert_eigenpairs_of(matrix, found.eigen, vector=0.99)  # where gaps are small, residuals of 1e-3 leave room
    check_residuals_and_trace(matrix, found, 1e-3)


def check_residuals_and_trace(matrix: torch.Tensor, found: exact.Leading, tolerance: float):
    """The residuals that are reported are the true ones, and the trace is as far off as its error says."""
    values, vectors = (part.double() for part in found.eigen[:2])
    residuals = (vectors @ matrix - values[..., None] * vectors).norm(dim=-1) / values[..., :1]
    assert found.residuals.max() <= tolerance
    assert (residuals - found.residuals).abs().max() <= RELATIVE
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert ((found.eigen.trace - trace).abs() <= 5 * found.trace_error + RELATIVE * trace).all()
    rank = trace**2 / matrix.pow(2).sum(dim=(-2, -1))
    assert torch.allclose(found.eigen.effective_rank.double(), rank, rtol=0.1)


def test_the_estimated_trace_is_right_on_average():
    """Over a hundred draws of the random rows, from a basis that leaves a good part of the trace to them."""
    _, point = at_last_token("llama")
    truth = exact.matrices(point).eigenpairs()
    linear, chunks = head.LinearHead(point), fisher.Chunks()
    basis = exact._Basis(point, linear, chunks)
    signs = torch.randint(0, 2, (800, tiny.VOCABULARY), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    probes = linear.combine(signs * linear.p.sqrt())
    pulled = basis.add(linear.rows(point.log_probs.topk(3).indices), probes)
    parts = zip(probes.split(exact.PROBES), pulled.split(exact.PROBES, dim=1), strict=True)
    estimates = [exact._estimates(basis, *part) for part in parts]
    trace, rank, error = (torch.stack(column) for column in zip(*estimates, strict=True))
    assert (basis.g.pow(2).sum(dim=(1, 2)) < 0.9 * truth.trace).all()
    assert torch.allclose(trace.mean(0), truth.trace, rtol=0.05)
    assert torch.allclose(trace.std(0), error.mean(0), rtol=0.3)
    assert torch.allclose(rank.mean(0), truth.effective_rank, rtol=0.1)


def test_a_prompts_result_does_not_depend_on_its_batch():
    model, (ids, lengths) = tiny.build("llama"), prompts()
    layer = tiny.layers_of(model)[0]
    together = exact.leading_eigenpairs(fisher.linearize_prompts(model, layer, ids, lengths), 4)
    for i, length in enumerate(LENGTHS):
        alone = exact.leading_eigenpairs(
            fisher.linearize_prompts(model, layer, ids[i : i + 1, :length], lengths[i : i + 1]), 4
        )
        pairs = [(a[0, i], b[0, 0]) for a, b in zip(together.eigen, alone.eigen, strict=True)]
        for here, there in pairs:
            assert (here - there).abs().max() <= 1e-4 * there.abs().max()
        assert together.trace_error[0, i].item() == pytest.approx(alone.trace_error[0, 0].item(), rel=0.01)


def test_a_certain_prediction_has_a_fisher_matrix_of_zero():
    """Beside an ordinary prompt in the batch, which is finished as if it were alone."""
    model, (ids, lengths) = tiny.build("gpt2"), prompts([6, 6])
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids, lengths)
    certain = torch.full_like(point.log_probs[0], -torch.inf)
    certain[7] = 0
    point.log_probs[0] = certain
    found = exact.leading_eigenpairs(point, 3)
    assert found.eigen.values[0, 0].abs().max() == found.eigen.trace[0, 0] == found.residuals[0, 0].max() == 0
    assert found.eigen.values[0, 1].min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_iterated_to_their_own_rounding(dtype):
    _, point = at_last_token("llama", dtype)
    expected = exact.matrices(at_last_token("llama")[1]).eigenpairs(2)
    room = 0.1 if dtype == torch.bfloat16 else 0.02
    for eigen in (exact.leading_eigenpairs(point, 2).eigen, exact.matrices(point).eigenpairs(2)):
        assert eigen.values.dtype == torch.float32
        assert torch.allclose(eigen.values[:, 0], expected.values[:, 0], rtol=room)


def test_no_convergence_is_an_error_that_names_the_prompt(monkeypatch):
    monkeypatch.setattr(exact, "ROUNDS", 1)
    model, (ids, lengths) = tiny.build("llama"), prompts()
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[0], ids, lengths)
    with pytest.raises(fisher.NumericalError, match="no convergence in 1 rounds") as caught:
        exact.leading_eigenpairs(point, 1, tolerance=1e-6)
    assert caught.value.prompt == 0


# --- wide matrices, without eigh -----------------------------------------------------------------


def wide(top: tuple[float, float] = (1.0, 0.5)) -> tuple[exact.Matrices, torch.Tensor]:
    """Two layers of width 400, one with eigenvalues that decay slowly, one of rank 3."""
    generator = torch.Generator().manual_seed(5)
    spectra = torch.zeros(2, 400, dtype=torch.float64)
    spectra[0] = torch.cat([torch.tensor(top, dtype=torch.float64), 0.4 / torch.arange(1, 399)])
    spectra[1, :3] = torch.tensor([3.0, 2.0, 1.0])
    q = torch.linalg.qr(torch.randn(2, 400, 400, dtype=torch.float64, generator=generator)).Q
    matrix = (q * spectra[:, None]) @ q.mT
    return exact.Matrices(torch.empty(0), matrix.float(), torch.ones(2, 400)), matrix


@pytest.mark.parametrize("top", [(1.0, 0.5), (1.0, 0.999)], ids=["apart", "close"])
def test_wide_matrices_match_eigh(top):
    found, matrix = wide(top)
    eigen = found.eigenpairs(5)
    assert_eigenpairs_of(matrix, eigen)
    assert torch.allclose(eigen.trace.double(), matrix.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-5)
    assert ((eigen.vectors @ found.top_gradient[..., None]) > 0)[:, 0].all()


def test_a_failed_eigensolver_is_an_error(monkeypatch):
    def fail(*arguments, **options):
        raise ArpackNoConvergence("No convergence", [], [])

    monkeypatch.setattr(exact, "eigsh", fail)
    with pytest.raises(fisher.NumericalError, match="eigensolver failed"):
        wide()[0].eigenpairs()


def test_a_wrong_answer_of_the_eigensolver_is_an_error(monkeypatch):
    eigsh = exact.eigsh

    def wrong(*arguments, **options):
        values, vectors = eigsh(*arguments, **options)
        return 1.01 * values, vectors

    monkeypatch.setattr(exact, "eigsh", wrong)
    with pytest.raises(fisher.NumericalError, match="residual"):
        wide()[0].eigenpairs()


def test_a_zero_matrix_names_the_layer():
    found, _ = wide()
    found.matrix[1] = 0
    with pytest.raises(fisher.NumericalError, match="zero") as caught:
        found.eigenpairs()
    assert caught.value.layer == 1
