"""Every number of fisher.py at a prompt's last token, against float64 computed another way, on tiny models."""

import pytest
import torch

import fisher
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs
import tiny

K = 20
# Both sides start from the same float32 weights; one is float64 throughout, so what differs is the
# rounding of a three-layer float32 network: a few 1e-6 relative, with room for unlucky sums.
RELATIVE = 1e-4


def point_of(name: str, tokens: int = 9, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, fisher.Point]:
    ids = tiny.prompt(tokens)
    return ids, fisher.linearize(tiny.shared(name, dtype), ids)


def directions(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, tiny.D, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE):
    assert (found.double() - expected).abs().max() <= relative * expected.abs().max()


def assert_eigenpairs_of(matrix: torch.Tensor, eigen: fisher.Eigenpairs, vector: float = 0.9999):
    """All eigenvalues and the leading eigenvector of matrices (..., d, d)."""
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(matrix))
    assert ((eigen.values - values[..., : eigen.values.shape[-1]]).abs() <= RELATIVE * values[..., :1]).all()
    assert ((eigen.vectors[..., 0, :].double() * vectors[..., 0]).sum(-1).abs() >= vector).all()


def assert_all_of_it_matches(found, matrix: torch.Tensor, toward: torch.Tensor):
    """The matrix (..., d, d), its eigenpairs that point toward (..., d), trace, effective rank and quadratic form."""
    assert_close(found.matrix, matrix)
    eigen, trace = found.eigenpairs(3), matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_eigenpairs_of(matrix, eigen)
    assert torch.allclose(eigen.trace.double(), trace, rtol=RELATIVE)
    assert torch.allclose(eigen.effective_rank.double(), trace**2 / matrix.pow(2).sum(dim=(-2, -1)), rtol=RELATIVE)
    assert ((eigen.vectors[..., 0, :] * toward).sum(-1) > 0).all()
    u = directions(*matrix.shape[:-2], 4)
    curvature = torch.einsum("...nd,...de,...ne->...n", u.double(), matrix, u.double())
    assert_close(found.curvature(u), curvature)
    assert torch.allclose(found.curvature(u).double(), curvature, rtol=1e-3)


# --- against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_gradients_match_the_float64_jacobian(name):
    ids, point = point_of(name)
    top = fisher.top_k(point, K)
    for index in range(tiny.DEPTH):
        rows, p = tiny.reference_jacobian(name, ids, index)
        tokens = p.argsort(descending=True)[:K]
        assert_close(top.gradients[index], rows[tokens])
        assert_close(top.weights, p[tokens])
    assert top.mass == pytest.approx(float(p[tokens].sum()), rel=1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_top_k_matrix_its_eigenpairs_and_its_curvature_match_float64(name):
    ids, point = point_of(name)
    top = fisher.top_k(point, K)
    assert_all_of_it_matches(top, tiny.reference_layers(name, ids, K), top.gradients[:, 0])


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_cached_prefix_gives_the_predictions_of_the_full_sequence(name, tokens):
    ids, point = point_of(name, tokens)
    assert_close(point.log_probs, tiny.reference_log_probs(name, ids))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_perturbed_rows_and_their_kl_are_those_of_a_plain_forward_pass_each(name):
    ids, point = point_of(name)
    deltas, at = directions(7, seed=2), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    logits = fisher.perturb(point, deltas, at)
    kl = fisher.kl_divergence(point.log_probs, logits)
    reference = tiny.shared(name, torch.float64)
    log_p = tiny.plain_log_probs(reference, ids)
    for row, layer in enumerate(at):
        log_q = tiny.plain_log_probs(reference, ids, tiny.layers_of(reference)[layer], deltas[row].double())
        assert_close(logits[row].log_softmax(-1), log_q)
        assert kl[row].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-3)


def test_one_layer_may_serve_all_perturbations():
    ids, point = point_of("llama")
    deltas = directions(3)
    at_each = fisher.perturb(point, deltas, torch.tensor([1, 1, 1]))
    assert torch.equal(fisher.perturb(point, deltas, 1), at_each)
    # a layer goes by its number, not by its place among those of the point
    only_that = fisher.linearize(tiny.shared("llama"), ids, layers=1)
    assert only_that.layers == [1] and torch.equal(fisher.perturb(only_that, deltas, 1), at_each)
    for function in (fisher.perturb, fisher.linearize_perturbed):
        for elsewhere in (0, -1, 15):
            with pytest.raises(ValueError, match=rf"no layer {elsewhere}: its layers are \[1\]"):
                function(only_that, deltas, elsewhere)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "bloom"])
def test_the_full_matrix_predicts_the_kl_of_small_perturbations(name):
    _, point = point_of(name, dtype=torch.float64)
    eigen = fisher.full_vocabulary(point).eigenpairs()
    errors = []
    for kl in (1e-3, 1e-5):  # nats predicted; float32 logits carry noise of about 1e-12
        deltas = (2 * kl / eigen.values).sqrt() * eigen.vectors[:, 0]
        found = fisher.kl_divergence(point.log_probs, fisher.perturb(point, deltas, torch.arange(tiny.DEPTH)))
        errors.append((found / kl - 1).abs().max().item())
    assert errors[1] < 0.01  # the next term is of third order in delta: a tenth for a hundredth of the KL
    assert errors[1] < errors[0] / 3


def test_gradients_match_finite_differences():
    """Of the plain forward pass in float64 (GPT-2 rounds nothing to float32): no automatic derivative."""
    ids, point = point_of("gpt2", dtype=torch.float64)
    model, gradients = tiny.shared("gpt2", torch.float64), fisher.top_k(point, K).gradients
    top, step = tiny.plain_log_probs(model, ids).argmax(), 1e-5
    for index, layer in enumerate(tiny.layers_of(model)):
        for axis in range(0, tiny.D, 7):
            delta = torch.zeros(tiny.D, dtype=torch.float64)
            delta[axis] = step
            ahead, behind = (tiny.plain_log_probs(model, ids, layer, sign * delta)[top] for sign in (1, -1))
            slope = float(ahead - behind) / (2 * step)
            assert gradients[index, 0, axis].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_kl_divergence_matches_float64_from_1e_8_to_hundreds_of_nats():
    generator = torch.Generator().manual_seed(6)
    logits = 4 * torch.randn(1000, generator=generator)
    log_p = logits.log_softmax(-1)
    exact_p = logits.double().log_softmax(-1)
    for size in (1e-4, 1e-2, 1.0, 30.0, 300.0):
        shifted = logits + size * torch.randn(1000, generator=generator) + 3
        exact_q = shifted.double().log_softmax(-1)
        expected = (exact_p.exp() * (exact_p - exact_q)).sum().item()
        # logits of about 10 are rounded to 1e-6, a hundredth of the smallest change
        found = fisher.kl_divergence(log_p, shifted[None]).item()
        assert found == pytest.approx(expected, rel=0.02 if size < 1e-3 else 1e-3)
    assert fisher.kl_divergence(log_p, logits[None]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows", [1, 4])  # other kernels, which round otherwise
def test_kl_of_a_large_vocabulary_does_not_depend_on_what_all_logits_share(rows):
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(50_000, generator=generator) + 16
    for size in (0.3, 0.6, 2.0):
        perturbed = logits + size * torch.randn(50_000, generator=generator)
        exact_p, exact_q = (x.double().log_softmax(-1) for x in (logits, perturbed))
        expected = (exact_p.exp() * (exact_p - exact_q)).sum().item()
        found = fisher.kl_divergence(logits.log_softmax(-1), perturbed.expand(rows, -1))
        # one rounding of a logit of 30, 2e-6, is all that is left of 16 shared nats
        assert found.tolist() == pytest.approx([expected] * rows, abs=5e-6)


# --- what a point is of --------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, torch.Tensor.clone, lambda ids: ids[None]], ids=["list", "(T,)", "(1, T)"])
def test_linearize_takes_one_prompts_ids_in_any_form(form):
    ids, point = point_of("llama")
    ids = ids.tolist() if form is list else form(ids)
    assert torch.equal(fisher.linearize(tiny.shared("llama"), ids).log_probs, point.log_probs)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (2, 9), (1, 1, 9), ()], ids=str)
def test_linearize_refuses_a_batch_and_an_empty_prompt(shape):
    with pytest.raises(ValueError, match="the token ids of one prompt are wanted, not a tensor of shape"):
        fisher.linearize(tiny.shared("llama"), torch.zeros(shape, dtype=torch.int64))


def test_all_layers_are_linearized_unless_some_are_chosen():
    ids, point = point_of("llama")
    model = tiny.shared("llama")
    assert point.layers == [0, 1, 2] and point.modules == tiny.layers_of(model)
    some = fisher.linearize(model, ids, layers=[0, 2])
    assert some.layers == [0, 2] and some.modules == [point.modules[0], point.modules[2]]
    assert torch.equal(some.activations, point.activations[[0, 2]])


@pytest.mark.parametrize("layers", [[3], [-1], [], [1, 0], [1, 1]], ids=str)
def test_layers_that_the_model_lacks_or_out_of_order_are_refused(layers):
    with pytest.raises(ValueError, match="are not ascending numbers from 0 to 2"):
        fisher.linearize(tiny.shared("llama"), tiny.prompt(), layers)


def test_one_forward_for_all_layers_equals_one_layer_at_a_time():
    ids, point = point_of("llama")
    together = fisher.top_k(point, K).gradients
    for index in range(tiny.DEPTH):
        alone = fisher.linearize(tiny.shared("llama"), ids, [index])
        assert_close(fisher.top_k(alone, K).gradients[0], together[index].double(), 1e-6)
        assert torch.equal(alone.activations[0], point.activations[index])


def test_activations_are_the_layers_outputs():
    ids, point = point_of("llama")
    model = tiny.shared("llama")
    states = model(ids[None], output_hidden_states=True).hidden_states  # the last one is after the final norm
    for index in range(tiny.DEPTH - 1):
        assert_close(point.activations[index], states[index + 1][0, -1].double(), 1e-5)
    assert_close(model.model.norm(point.activations[-1]), states[-1][0, -1].double(), 1e-5)


def test_passes_leave_the_prefix_as_it_was():
    _, point = point_of("llama")
    before = [(layer.keys.clone(), layer.values.clone()) for layer in point.reading.prefix.layers]
    deltas, at = torch.ones(5, tiny.D), torch.zeros(5, dtype=int)
    first = fisher.perturb(point, deltas, at)
    fisher.top_k(point, K)
    assert torch.equal(fisher.perturb(point, deltas, at), first)
    for (keys, values), layer in zip(before, point.reading.prefix.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)


def test_the_model_is_handed_back_as_it_came():
    model = tiny.build("llama").requires_grad_(True)
    attention = model.config._attn_implementation
    point = fisher.linearize(model, tiny.prompt())
    fisher.top_k(point, K)
    fisher.full_vocabulary(point)
    fisher.perturb(point, torch.ones(1, tiny.D), 0)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == attention


def test_hooks_and_attention_are_restored_after_an_exception():
    model = tiny.build("llama")
    attention, layer = model.config._attn_implementation, tiny.layers_of(model)[1]

    def fail(module, args, output):
        if torch.is_grad_enabled():  # not before the pass that is linearized
            raise RuntimeError("a layer that fails")

    handle = layer.mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a layer that fails"):
        fisher.linearize(model, tiny.prompt())
    handle.remove()
    assert all(not module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == attention


# --- eigenpairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [K, tiny.VOCABULARY], ids=["k < d", "k > d"])
def test_eigenpairs_equal_eigh_of_the_explicit_matrix(k):
    top = fisher.top_k(point_of("llama")[1], k)
    eigen, matrix = top.eigenpairs(K), top.matrix
    assert_close(eigen.values, torch.linalg.eigvalsh(matrix.double()).flip(-1)[:, :K])
    # every pair, small ones too: F v = lambda v. The residual is F's own float32 rounding.
    residual = eigen.vectors @ matrix - eigen.values[..., None] * eigen.vectors
    assert residual.norm(dim=-1).max() <= 1e-5 * eigen.values.max()


def test_small_eigenpairs_survive_the_gram_matrix():
    """Singular values from 1 to 1e-5, eigenvalues to 1e-10: float32 Gram matrices would lose them."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (10, 50))
    singular = torch.logspace(0, -5, 6)
    eigen = fisher.eigenpairs((left * singular @ right.T)[None], torch.ones(10), 6)
    assert torch.allclose(eigen.values[0], singular**2, rtol=0.02)  # G itself is float32: 1e-7 of 1
    assert torch.allclose((eigen.vectors[0] @ right).abs().diagonal(), torch.ones(6), atol=1e-3)


def test_eigenpairs_are_orthonormal_descending_and_never_negative_over_many_orders_of_magnitude():
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(4, 8, 40, generator=generator) * torch.logspace(0, -6, 8)[:, None]
    eigen = fisher.eigenpairs(gradients, torch.full((4, 8), 0.1), 8)
    assert (eigen.values.diff(dim=-1) <= 0).all() and (eigen.values >= 0).all()
    gram = eigen.vectors.double() @ eigen.vectors.double().mT
    assert (gram - torch.eye(8)).abs().max() < 1e-5
    exact = torch.linalg.svdvals(gradients.double() * 0.1**0.5) ** 2
    assert (eigen.values / exact - 1).abs().max() < 1e-3


def test_what_is_below_rounding_is_zero_and_has_no_direction():
    gradients = torch.randint(-8, 9, (1, 3, 6), generator=torch.Generator().manual_seed(4)).float()
    gradients[:, 2] = gradients[:, 0] + gradients[:, 1]  # exactly: rank 2
    eigen = fisher.eigenpairs(gradients, torch.ones(3), 3)
    assert eigen.values[0, 1] > 0
    assert eigen.values[0, 2] == 0 and not eigen.vectors[0, 2].any()


def test_the_fisher_matrix_is_symmetric_and_positive_semidefinite():
    top = fisher.top_k(point_of("llama")[1], K)
    matrix = fisher.fisher_matrix(top.gradients, top.weights).double()
    assert torch.equal(matrix, top.matrix.double())
    expected = torch.einsum("lki,k,lkj->lij", top.gradients.double(), top.weights.double(), top.gradients.double())
    assert_close(matrix, expected, 1e-6)
    assert_close(matrix, matrix.mT, 1e-6)
    values = torch.linalg.eigvalsh(matrix)
    assert (values.min(dim=-1).values >= -1e-6 * values.max(dim=-1).values).all()


def test_eigenvectors_point_to_the_top_token():
    top = fisher.top_k(point_of("llama")[1], K)
    toward = top.gradients[:, 0]
    assert (torch.einsum("lmd,ld->lm", top.eigenpairs(5).vectors, toward) > 0).all()
    flipped = fisher.eigenpairs(torch.cat([top.gradients[:, :1], -top.gradients[:, 1:]], 1), top.weights, 1)
    assert (torch.einsum("ld,ld->l", flipped.vectors[:, 0], toward) > 0).all()


def test_the_sign_falls_back_to_the_largest_component():
    gradients = torch.tensor([[[0.0, 0.0, 0.0], [0.1, -0.9, 0.2]]])  # the top token's gradient vanishes
    vector = fisher.eigenpairs(gradients, torch.tensor([0.5, 0.5])).vectors[0, 0]
    assert vector[1] > 0


@pytest.mark.parametrize("shape", [(97,), (40, 97), (2, 20, 97), (3, 4)], ids=str)
@pytest.mark.parametrize("k", [1, 5, 96])
def test_of_equally_probable_tokens_the_lower_one_comes_first(shape, k):
    """In bfloat16 many are: also across the last place that counts."""
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    values, tokens = fisher.most_probable(logits, k)
    in_order, order = logits.sort(descending=True, stable=True)
    assert torch.equal(values, in_order[..., :k]) and torch.equal(tokens, order[..., :k])


def test_equally_probable_top_tokens_are_the_same_one_wherever_the_top_token_counts():
    """It fixes the signs of eigenvectors, and comes first in what is recorded."""
    _, point = point_of("llama")
    tied = [80, 41, 60, 11, 93]
    point.log_probs[tied] = point.log_probs.max() + 1
    for k in (1, 3, 20):
        assert fisher.top_k(point, k).tokens[0] == 11
    toward = fisher.top_k(point, 1).gradients[:, 0]
    assert torch.allclose(fisher.full_vocabulary(point).top_gradient, toward, rtol=1e-4, atol=1e-5)
    for eigen in (fisher.top_k(point, K).eigenpairs(), fisher.full_vocabulary(point).eigenpairs()):
        assert ((eigen.vectors[:, 0] * toward).sum(-1) > 0).all()
    assert ((leading_eigenpairs(point, 2).eigen.vectors[:, 0] * toward).sum(-1) > 0).all()


def test_a_zero_matrix_is_an_error_that_names_the_layer_unless_it_is_allowed():
    gradients = torch.ones(3, 4, 5)
    gradients[1] = 0
    with pytest.raises(fisher.NumericalError, match="the Fisher matrix is zero") as caught:
        fisher.eigenpairs(gradients, torch.ones(4))
    assert caught.value.layer == 1
    eigen = fisher.eigenpairs(gradients, torch.ones(4), 2, allow_zero=True)
    assert not any(part[1].any() for part in eigen)
    assert eigen.values[[0, 2], 0].tolist() == pytest.approx([20, 20])


# --- chunks, memory, precision, numbers that are none ---------------------------------------------


def test_chunks_are_of_equal_size():
    sizes = fisher.Chunks(256).map(len, torch.zeros(577, 2))
    assert sum(sizes) == 577 and max(sizes) <= 256 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_gradients_do_not_depend_on_the_chunk_size(size):
    _, point = point_of("llama")
    assert_close(fisher.top_k(point, K, fisher.Chunks(size)).gradients, fisher.top_k(point, K).gradients.double(), 1e-6)


def test_a_known_jacobian_gives_the_gradients_without_a_backward_pass(monkeypatch):
    _, point = point_of("llama")
    expected, jacobian = fisher.top_k(point, K), fisher.full_vocabulary(point).jacobian
    monkeypatch.setattr(fisher, "pull_back", None)
    assert_close(fisher.top_k(point, K, jacobian=jacobian).gradients, expected.gradients.double(), 1e-5)


def test_out_of_memory_halves_the_chunks_for_good():
    sizes = []

    def function(rows):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return rows

    chunks = fisher.Chunks(8)
    with pytest.warns(UserWarning, match="out of memory: going on with batches of 2"):
        assert torch.cat(chunks.map(function, torch.arange(5))).tolist() == [0, 1, 2, 3, 4]
    assert sizes == [5, 2, 2, 1]
    assert chunks.size == 2


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(...)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_way_of_running_out_of_memory_halves_the_chunks(error):
    def function(rows):
        if len(rows) > 1:
            raise error
        return rows

    with pytest.warns(UserWarning, match="batches of 1"):
        assert fisher.Chunks(2).join(function, torch.arange(2)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (1, torch.OutOfMemoryError("with a single row")),
        (2, RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")),
        (2, RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnXsyevd(...)`")),
        (2, torch.linalg.LinAlgError("the algorithm failed to converge")),
        (2, ValueError("out of memory")),
    ],
    ids=str,
)
def test_other_errors_and_a_lack_of_memory_for_a_single_row_are_raised(size, error):
    def fail(rows):
        raise error

    with pytest.raises(type(error)) as caught:
        fisher.Chunks(size).map(fail, torch.arange(2))
    assert caught.value is error


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_are_joined_in_order_along_any_axis(size, dim):
    rows = torch.randn(5, 4)
    joined = fisher.Chunks(size).join(lambda part: part.movedim(0, dim) + 1, rows, dim=dim)
    assert torch.equal(joined, rows.movedim(0, dim) + 1) and joined.is_contiguous()


def test_no_room_for_the_joined_chunks_is_met_with_smaller_ones(monkeypatch):
    new_empty, sizes = torch.Tensor.new_empty, []

    def room_beside_small_chunks(part, shape):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return new_empty(part, shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", room_beside_small_chunks)
    with pytest.warns(UserWarning, match="batches of 2"):
        assert fisher.Chunks(4).join(lambda part: part, torch.arange(8)).tolist() == list(range(8))
    assert sizes == [4, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_results_near_the_truth(dtype):
    top = fisher.top_k(point_of("llama", dtype=dtype)[1], K)
    eigen, expected = top.eigenpairs(), fisher.top_k(point_of("llama")[1], K).eigenpairs()
    assert top.gradients.dtype == eigen.values.dtype == torch.float32
    # bfloat16 keeps 8 bits: a few per cent after three layers; float16 keeps 11
    room = 0.1 if dtype == torch.bfloat16 else 0.02
    assert torch.allclose(eigen.values, expected.values, rtol=room)
    assert (eigen.vectors * expected.vectors).sum(-1).min() > 1 - room / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_smallest_eigenvalue_of_a_nearly_certain_prediction(dtype):
    k, (ids, point) = 6, point_of("llama", dtype=dtype)
    p = (12 * point.log_probs.double()).softmax(-1)  # 0.998 for the first token; the same on both sides
    weight, (top, tokens) = point.head.weight.double(), p.topk(k)
    cotangents = (weight[tokens] - p @ weight).float()
    found = fisher.eigenpairs(fisher.pull_back(point, cotangents), top.float(), k).values
    for index, values in enumerate(found):
        rows, _ = tiny.reference_jacobian("llama", ids, index)
        matrix = tiny.sum_of_outer_products(rows - p @ rows, p, k)  # rows are gradients of logits, but for a constant
        expected = torch.linalg.eigvalsh(matrix).flip(-1)[:k]
        assert expected[-1] < 1e-8 * expected[0]
        # as in the test above, for eigenvalues: they were off by factors of 17 and 1.3
        assert torch.allclose(values.double(), expected, rtol=0.1 if dtype == torch.bfloat16 else 0.01, atol=0)


def test_float16_gradients_do_not_underflow():
    _, point = point_of("llama", dtype=torch.float16)
    z = point.cotangents(point.log_probs.topk(K).indices)
    assert_close(fisher.pull_back(point, z * 1e-7), (1e-7 * fisher.pull_back(point, z)).double(), 1e-4)


class Head(torch.nn.Module):
    """A linear head in a module of another kind, as an adapter or a quantised one is; or one that is not linear."""

    def __init__(self, head: torch.nn.Linear, power: int):
        super().__init__()
        self.head, self.weight, self.power = head, head.weight, power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) ** self.power


def with_head(name: str, power: int) -> fisher.PromptPoint:
    model = tiny.build(name)
    model.lm_head = Head(model.lm_head, power)
    return fisher.linearize(model, tiny.prompt())


def test_a_head_that_is_linear_in_effect_gives_the_whole_vocabulary():
    (_, expected), through = point_of("phi"), with_head("phi", 1)  # it has a bias
    tokens = expected.log_probs.topk(K).indices
    assert_close(through.cotangents(tokens), expected.cotangents(tokens).double(), 1e-5)
    assert_close(fisher.full_vocabulary(through).matrix, fisher.full_vocabulary(expected).matrix.double(), 1e-5)


def test_a_head_that_is_not_linear_is_differentiated_itself():
    point = with_head("llama", 2)
    tokens = point.log_probs.topk(K).indices
    x = point.x.detach().requires_grad_()
    log_probs = point.model.lm_head(x)[0, 0].log_softmax(-1)
    expected = torch.stack([torch.autograd.grad(log_probs[t], x, retain_graph=True)[0][0, 0] for t in tokens])
    assert_close(point.cotangents(tokens), expected.double(), 1e-5)
    with pytest.raises(fisher.UnsupportedModelError, match="linear output head"):
        fisher.full_vocabulary(point)


def test_nan_activations_name_the_layer():
    model = tiny.build("llama")
    tiny.layers_of(model)[1].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(fisher.NumericalError, match="the activations hold NaN or infinity") as caught:
        fisher.linearize(model, tiny.prompt())
    assert caught.value.layer == 1


def test_what_a_tokenizer_returns_is_taken_and_other_things_are_told_apart(byte_level):
    model, text = tiny.build("llama"), "many"
    model.resize_token_embeddings(len(byte_level))
    ids = byte_level(text)["input_ids"]
    expected = fisher.linearize(model, ids).log_probs
    for given in (byte_level(text), byte_level(text, return_tensors="pt"), torch.tensor([ids])):
        assert torch.equal(fisher.linearize(model, given).log_probs, expected)
    with torch.inference_mode():
        point = fisher.linearize(model, torch.tensor(ids))
    assert fisher.top_k(point, K).eigenpairs().values.min() > 0
    with pytest.raises(ValueError, match="not a text"):
        fisher.linearize(model, text)
    with pytest.raises(ValueError, match="one prompt"):
        fisher.linearize(model, byte_level([text, text]))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        fisher.linearize(model, ids)


def test_a_model_that_was_trained_with_gradient_checkpointing_is_read():
    model = tiny.build("llama")
    expected = fisher.top_k(fisher.linearize(model, tiny.prompt()), K).gradients
    model.gradient_checkpointing_enable()
    model.train().eval()
    assert torch.equal(fisher.top_k(fisher.linearize(model, tiny.prompt()), K).gradients, expected)


def test_perturbations_out_of_order_are_refused():
    _, point = point_of("llama")
    with pytest.raises(ValueError, match="ascending"):
        fisher.perturb(point, torch.ones(2, tiny.D), torch.tensor([1, 0]))


@pytest.mark.parametrize("shape", [(tiny.D,), (1, 1, tiny.D), (2, tiny.D + 1)])
@pytest.mark.parametrize("perturb", [fisher.perturb, fisher.linearize_perturbed])
def test_perturbations_that_are_not_rows_of_the_streams_width_are_refused(perturb, shape):
    _, point = point_of("llama")
    with pytest.raises(ValueError, match=rf"not \(rows, {tiny.D}\)"):
        perturb(point, torch.ones(shape), 0)


def test_only_the_point_of_one_prompt_can_be_perturbed():
    _, point = point_of("llama")
    deltas = torch.ones(2, tiny.D)
    others = [
        fisher.linearize_prompts(tiny.shared("llama"), point.modules[0], *tiny.prompts()),
        fisher.linearize_perturbed(point, deltas, 0),
    ]
    assert isinstance(point, fisher.PromptPoint)
    for other in others:
        assert isinstance(other, fisher.Point) and not isinstance(other, fisher.PromptPoint)
        for function in (fisher.perturb, fisher.linearize_perturbed):
            with pytest.raises(ValueError, match="one prompt"):
                function(other, deltas, 0)


def test_perturb_may_be_wrapped_by_a_user(monkeypatch):
    """What takes gradients must not depend on how the function without gradients is decorated."""
    _, point = point_of("llama")
    deltas, perturb = directions(2), fisher.perturb
    expected = fisher.linearize_perturbed(point, deltas, 0).logits
    monkeypatch.setattr(fisher, "perturb", lambda *arguments: perturb(*arguments))
    assert torch.equal(fisher.linearize_perturbed(point, deltas, 0).logits, expected)
