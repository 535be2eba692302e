"""Every number of fisher.py against float64 worked out another way, on tiny models."""

import pytest
import torch

import exact
import fisher
import head
import last_token
import pushes
import tiny

K = 20
# Both sides start from the same float32 weights; one is float64 throughout, so what differs is the
# rounding of a three-layer float32 network: a few 1e-6 relative, with room for unlucky sums.
RELATIVE = 1e-4


def measured(name: str, tokens: int = 9, k: int = K, dtype=torch.float32):
    model, ids = tiny.build(name, dtype), tiny.prompt(tokens)
    layers = tiny.layers_of(model)
    prefix = last_token.prefill(model, ids[:-1])
    point = fisher.linearize(model, layers, ids[-1], prefix)
    cotangents = head.top_k_cotangents(point, k)
    return model, ids, layers, prefix, point, cotangents


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE):
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() <= relative * scale


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_gradients_match_float64_jacobian(name):
    model, ids, layers, _, point, cotangents = measured(name)
    gradients = fisher.pull_back(point, cotangents.rows)
    reference = tiny.build(name, torch.float64)
    for index, layer in enumerate(tiny.layers_of(reference)):
        rows, p = tiny.jacobian(reference, ids, layer)
        tokens = p.argsort(descending=True)[:K]
        assert_close(gradients[index], rows[tokens])
        assert_close(cotangents.weights, p[tokens])
    assert cotangents.mass == pytest.approx(float(p[tokens].sum()), rel=1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_eigenpairs_match_float64_fisher_matrix(name):
    model, ids, layers, _, point, cotangents = measured(name)
    eigen = fisher.eigenpairs(fisher.pull_back(point, cotangents.rows), cotangents.weights, 3)
    reference = tiny.build(name, torch.float64)
    for index, layer in enumerate(tiny.layers_of(reference)):
        matrix = tiny.brute_force_fisher(reference, ids, layer, K)
        values, vectors = torch.linalg.eigh(matrix)
        assert_close(eigen.values[index], values.flip(0)[:3])
        assert abs(eigen.vectors[index, 0].double() @ vectors[:, -1]) >= 0.9999
        assert eigen.trace[index].item() == pytest.approx(matrix.trace().item(), rel=RELATIVE)
        rank = matrix.trace() ** 2 / (matrix @ matrix).trace()
        assert eigen.effective_rank[index].item() == pytest.approx(rank.item(), rel=RELATIVE)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_sweep_rows_equal_one_perturbed_full_forward_each(name):
    model, ids, layers, prefix, point, _ = measured(name)
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randn(7, tiny.D, generator=generator)
    at_layer = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    swept = pushes.sweep(model, layers, ids[-1], prefix, point.log_probs, deltas, at_layer, target=5)
    reference = tiny.build(name, torch.float64)
    base = tiny.plain_log_probs(reference, ids)
    for row in range(len(deltas)):
        layer = tiny.layers_of(reference)[at_layer[row]]
        log_q = tiny.plain_log_probs(reference, ids, layer, deltas[row].double())
        top = log_q.topk(5)
        assert swept.top_ids[row].tolist() == top.indices.tolist()
        assert_close(swept.top_log_probs[row], top.values)
        assert swept.target_log_prob[row].item() == pytest.approx(log_q[5].item(), rel=1e-4)
        kl = (base.exp() * (base - log_q)).sum().item()
        assert swept.kl[row].item() == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "bloom"])
def test_fisher_predicts_kl_of_small_pushes(name):
    model, ids, layers, prefix, point, _ = measured(name, dtype=torch.float64)
    eigen = exact.matrices(point).eigenpairs()
    errors = []
    for kl in (1e-3, 1e-5):  # nats predicted; float32 logits carry noise of about 1e-12
        steps = (2 * kl / eigen.values[:, 0]).sqrt()
        deltas = steps[:, None] * eigen.vectors[:, 0]
        swept = pushes.sweep(model, layers, ids[-1], prefix, point.log_probs, deltas, torch.arange(tiny.DEPTH))
        errors.append((swept.kl / kl - 1).abs().max().item())
    assert errors[1] < 0.01  # the next term is of third order in the push: a tenth for a hundredth of the KL
    assert errors[1] < errors[0] / 3


def test_gradients_match_finite_differences():
    """Of the plain forward pass in float64 (GPT-2 rounds nothing to float32): no automatic derivative."""
    model, ids, layers, _, point, cotangents = measured("gpt2", dtype=torch.float64)
    gradients = fisher.pull_back(point, cotangents.rows)
    top, step = tiny.plain_log_probs(model, ids).argmax(), 1e-5
    for index, layer in enumerate(layers):
        for axis in range(0, tiny.D, 7):
            push = torch.zeros(tiny.D, dtype=torch.float64)
            push[axis] = step
            ahead, behind = (tiny.plain_log_probs(model, ids, layer, sign * push)[top] for sign in (1, -1))
            slope = float(ahead - behind) / (2 * step)
            assert gradients[index, 0, axis].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_models_without_a_plain_cache_are_refused(kind):
    if kind == "recurrent":
        config = tiny.hf.MambaConfig(hidden_size=tiny.D, num_hidden_layers=2, vocab_size=tiny.VOCABULARY, state_size=4)
    else:
        config = tiny.hf.Lfm2Config(**tiny.GROUPED, layer_types=["conv", "full_attention", "conv"])
    model = tiny.hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(last_token.UnsupportedModelError, match="cache"):
        last_token.prefill(model, tiny.prompt())


@pytest.mark.parametrize("k", [K, tiny.VOCABULARY], ids=["k < d", "k > d"])
def test_thin_path_equals_eigh_of_the_explicit_matrix(k):
    _, _, _, _, point, cotangents = measured("llama", k=k)
    gradients = fisher.pull_back(point, cotangents.rows)
    eigen = fisher.eigenpairs(gradients, cotangents.weights, K)
    matrix = fisher.fisher_matrix(gradients, cotangents.weights)
    values = torch.linalg.eigvalsh(matrix.double()).flip(-1)[:, :K]
    assert_close(eigen.values, values)
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


def test_fisher_matrix_is_symmetric_positive_semidefinite():
    _, _, _, _, point, cotangents = measured("llama")
    gradients = fisher.pull_back(point, cotangents.rows)
    matrix = fisher.fisher_matrix(gradients, cotangents.weights).double()
    expected = torch.einsum("lki,k,lkj->lij", gradients.double(), cotangents.weights.double(), gradients.double())
    assert_close(matrix, expected, 1e-6)
    assert_close(matrix, matrix.mT, 1e-6)
    values = torch.linalg.eigvalsh(matrix)
    assert (values.min(dim=-1).values >= -1e-6 * values.max(dim=-1).values).all()


def test_curvature_is_the_quadratic_form():
    _, _, _, _, point, cotangents = measured("llama")
    gradients = fisher.pull_back(point, cotangents.rows)
    directions = torch.randn(tiny.DEPTH, 4, tiny.D, generator=torch.Generator().manual_seed(4))
    matrix = fisher.fisher_matrix(gradients, cotangents.weights)
    expected = torch.einsum("lnd,lde,lne->ln", directions, matrix, directions)
    assert_close(fisher.curvature(gradients, cotangents.weights, directions), expected.double(), 1e-5)


def test_one_forward_for_all_layers_equals_one_layer_at_a_time():
    model, ids, layers, prefix, point, cotangents = measured("llama")
    together = fisher.pull_back(point, cotangents.rows)
    for index, layer in enumerate(layers):
        alone = fisher.linearize(model, [layer], ids[-1], prefix)
        gradients = fisher.pull_back(alone, head.top_k_cotangents(alone, K).rows)
        assert_close(gradients[0], together[index].double(), 1e-6)
        assert torch.equal(alone.activations[0], point.activations[index])


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_cached_prefix_equals_full_sequence(name, tokens):
    _, ids, _, _, point, _ = measured(name, tokens)
    expected = tiny.plain_log_probs(tiny.build(name, torch.float64), ids)
    assert_close(point.log_probs, expected)


def test_activations_are_the_layers_outputs():
    model, ids, layers, _, point, _ = measured("llama")
    states = model(ids[None], output_hidden_states=True).hidden_states  # the last one is after the final norm
    for index in range(tiny.DEPTH - 1):
        assert_close(point.activations[index], states[index + 1][0, -1].double(), 1e-5)
    assert_close(model.model.norm(point.activations[-1]), states[-1][0, -1].double(), 1e-5)


def test_passes_leave_the_prefix_as_it_was():
    model, ids, layers, prefix, point, cotangents = measured("llama")
    before = [layer.keys.clone() for layer in prefix.layers]
    pushes.sweep(model, layers, ids[-1], prefix, point.log_probs, torch.ones(5, tiny.D), torch.zeros(5, dtype=int))
    again = fisher.linearize(model, layers, ids[-1], prefix)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, prefix.layers, strict=True))
    assert torch.equal(again.log_probs, point.log_probs)


def test_chunks_are_of_equal_size():
    sizes = fisher.Chunks(256).map(len, torch.zeros(577, 2))
    assert sum(sizes) == 577 and max(sizes) <= 256 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_results_do_not_depend_on_chunk_size(size):
    model, ids, layers, prefix, point, cotangents = measured("llama")
    chunks = fisher.Chunks(size)
    assert_close(
        fisher.pull_back(point, cotangents.rows, chunks), fisher.pull_back(point, cotangents.rows).double(), 1e-6
    )
    deltas = torch.randn(9, tiny.D, generator=torch.Generator().manual_seed(5))
    at_layer = torch.arange(9) // 3
    rest = (model, layers, ids[-1], prefix, point.log_probs, deltas, at_layer)
    for found, expected in zip(pushes.sweep(*rest, chunks=chunks), pushes.sweep(*rest), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4)


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


def test_out_of_memory_with_a_single_row_is_an_error():
    def function(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        fisher.Chunks(1).map(function, torch.arange(2))


def test_the_model_is_given_back_as_it_came():
    model, ids, layers, prefix, point, _ = measured("llama")
    model.requires_grad_(True)
    attention = model.config._attn_implementation
    fisher.linearize(model, layers, ids[-1], prefix)
    pushes.sweep(model, layers, ids[-1], prefix, point.log_probs, torch.ones(1, tiny.D), torch.zeros(1, dtype=int))
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == attention


def test_hooks_and_attention_are_restored_after_an_exception():
    model, ids, layers, prefix, _, _ = measured("llama")
    attention = model.config._attn_implementation

    def fail(module, args, output):
        raise RuntimeError("a layer that fails")

    handle = layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a layer that fails"):
        fisher.linearize(model, layers, ids[-1], prefix)
    handle.remove()
    assert all(not module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == attention


def test_a_head_that_is_not_linear_is_gone_through():
    model, ids, layers, prefix, point, cotangents = measured("llama")
    wrapped = torch.nn.Sequential(model.lm_head)
    wrapped.weight = model.lm_head.weight
    model.lm_head = wrapped
    through = fisher.linearize(model, layers, ids[-1], prefix)
    found = head.top_k_cotangents(through, K)
    assert_close(found.rows, cotangents.rows.double(), 1e-5)
    with pytest.raises(last_token.UnsupportedModelError, match="linear output head"):
        exact.matrices(through)


def test_signs_point_to_the_top_token():
    _, _, _, _, point, cotangents = measured("llama")
    gradients = fisher.pull_back(point, cotangents.rows)
    eigen = fisher.eigenpairs(gradients, cotangents.weights, 5)
    assert (torch.einsum("lmd,ld->lm", eigen.vectors, gradients[:, 0]) > 0).all()
    flipped = fisher.eigenpairs(torch.cat([gradients[:, :1], -gradients[:, 1:]], 1), cotangents.weights, 1)
    assert (torch.einsum("ld,ld->l", flipped.vectors[:, 0], gradients[:, 0]) > 0).all()


def test_sign_falls_back_to_the_largest_component():
    gradients = torch.tensor([[[0.0, 0.0, 0.0], [0.1, -0.9, 0.2]]])  # the top token's gradient vanishes
    vector = fisher.eigenpairs(gradients, torch.tensor([0.5, 0.5])).vectors[0, 0]
    assert vector[1] > 0


def test_kl_divergence_against_float64():
    generator = torch.Generator().manual_seed(6)
    logits = 4 * torch.randn(1000, generator=generator)
    log_p = logits.log_softmax(-1)
    exact_p = logits.double().log_softmax(-1)
    for size in (1e-4, 1e-2, 1.0, 30.0, 300.0):
        shifted = logits + size * torch.randn(1000, generator=generator) + 3
        exact_q = shifted.double().log_softmax(-1)
        expected = (exact_p.exp() * (exact_p - exact_q)).sum().item()
        # logits of about 10 are rounded to 1e-6, a hundredth of the smallest push
        assert pushes.kl_divergence(log_p, shifted[None]).item() == pytest.approx(
            expected, rel=0.02 if size < 1e-3 else 1e-3
        )
    assert pushes.kl_divergence(log_p, logits[None]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_results_near_the_truth(dtype):
    _, _, _, _, point, cotangents = measured("llama", dtype=dtype)
    gradients = fisher.pull_back(point, cotangents.rows)
    eigen = fisher.eigenpairs(gradients, cotangents.weights)
    assert gradients.dtype == eigen.values.dtype == torch.float32
    _, _, _, _, wide_point, wide = measured("llama")
    expected = fisher.eigenpairs(fisher.pull_back(wide_point, wide.rows), wide.weights)
    # bfloat16 keeps 8 bits: a few per cent after three layers; float16 keeps 11
    room = 0.1 if dtype == torch.bfloat16 else 0.02
    assert torch.allclose(eigen.values, expected.values, rtol=room)
    assert (eigen.vectors * expected.vectors).sum(-1).min() > 1 - room / 5


def test_float16_gradients_do_not_underflow():
    _, _, _, _, point, cotangents = measured("llama", dtype=torch.float16)
    small = cotangents._replace(rows=cotangents.rows * 1e-7)
    gradients, expected = fisher.pull_back(point, small.rows), 1e-7 * fisher.pull_back(point, cotangents.rows)
    assert_close(gradients, expected.double(), 1e-4)


def test_nan_activations_name_the_layer():
    model, ids, layers, prefix, _, _ = measured("llama")
    layers[1].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(fisher.NumericalError, match="activations") as caught:
        fisher.linearize(model, layers, ids[-1], prefix)
    assert caught.value.layer == 1


def test_nan_logits_after_a_push_name_the_layer():
    model, ids, layers, prefix, point, _ = measured("llama")
    deltas = torch.tensor([1.0, float("inf")])[:, None].expand(2, tiny.D)
    with pytest.raises(fisher.NumericalError, match="after a push") as caught:
        pushes.sweep(model, layers, ids[-1], prefix, point.log_probs, deltas, torch.tensor([0, 2]))
    assert caught.value.layer == 2


def test_a_zero_fisher_matrix_is_an_error_that_names_the_layer():
    gradients = torch.ones(3, 4, 5)
    gradients[1] = 0
    with pytest.raises(fisher.NumericalError, match="is zero") as caught:
        fisher.eigenpairs(gradients, torch.ones(4))
    assert caught.value.layer == 1


def test_pushes_out_of_order_are_refused():
    model, ids, layers, prefix, point, _ = measured("llama")
    with pytest.raises(ValueError, match="ascending"):
        pushes.sweep(model, layers, ids[-1], prefix, point.log_probs, torch.ones(2, tiny.D), torch.tensor([1, 0]))
