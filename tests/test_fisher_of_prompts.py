"""Batches of whole prompts: against float64 worked out another way, and against what else is in the batch."""

import pytest
import torch
import transformers as hf

import compute_fisher
import fisher
import head
import last_token
import tiny

K, R = 20, 5
RELATIVE = 1e-4
LENGTHS = [9, 3, 6]


def prompts(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts, each padded on the right with a token that must not matter."""
    ids = torch.randint(3, tiny.VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(lengths)
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 5
    return ids, lengths


def decompose(model, module, ids, lengths, k=K, r=R, together=256, **options):
    point = fisher.linearize_prompts(model, module, ids, lengths, **options)
    z = head.top_k_cotangents(point, k)
    gradients = fisher.pull_back(point, z.rows, fisher.Chunks(together))[0]
    return point, z, gradients, fisher.eigenpairs(gradients, z.weights, r)


def assert_same_triplets(found: fisher.Eigen, expected: fisher.Eigen):
    """One prompt's: singular values to 1e-4, subspaces to 1e-3 (sine of the largest principal angle)."""
    assert (found.values / expected.values - 1).abs().max() < 1e-4
    cosines = torch.linalg.svdvals(found.vectors.double() @ expected.vectors.double().mT)
    assert (1 - cosines.min() ** 2).clamp(min=0).sqrt() < 1e-3


def one(eigen: fisher.Eigen, index: int) -> fisher.Eigen:
    return fisher.Eigen(*(part[index] for part in eigen))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_prompt_of_a_batch_matches_its_float64_fisher_matrix(name):
    model, (ids, lengths) = tiny.build(name), prompts()
    point, z, gradients, eigen = decompose(model, tiny.layers_of(model)[1], ids, lengths)
    reference = tiny.build(name, torch.float64)
    for i, length in enumerate(LENGTHS):
        layer = tiny.layers_of(reference)[1]
        matrix = tiny.brute_force_fisher(reference, ids[i, :length], layer, K, everywhere=True)
        assert (fisher.fisher_matrix(gradients, z.weights)[i] - matrix).abs().max() <= RELATIVE * matrix.abs().max()
        u, s, v = torch.linalg.svd(matrix)
        assert (eigen.values[i] - s[:R]).abs().max() <= RELATIVE * s[0]
        best = u[:, :R] @ s[:R].diag() @ v[:R]
        found = eigen.vectors[i].mT @ eigen.values[i].diag() @ eigen.vectors[i]
        # the best approximation of rank R, by its distance from F: its subspace may turn where values are close
        assert (matrix - found).norm() <= (matrix - best).norm() + RELATIVE * matrix.norm()
        assert eigen.trace[i].item() == pytest.approx(matrix.trace().item(), rel=RELATIVE)
        log_probs = tiny.plain_log_probs(reference, ids[i, :length])
        assert (point.log_probs[i] - log_probs).abs().max() < 1e-3
        assert z.mass[i].item() == pytest.approx(log_probs.exp().topk(K).values.sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-alibi", "mistral"])
@pytest.mark.parametrize(("attention", "together"), [("eager", 8), ("sdpa", 1)])  # as the pipeline pairs them
def test_a_prompts_triplets_do_not_depend_on_its_batch(name, attention, together):
    model = tiny.build(name)
    compute_fisher.use_attention(model, attention)
    module = tiny.layers_of(model)[0]
    others, lengths = prompts([5, 50, 5])
    mine = tiny.prompt(5)
    alone = one(decompose(model, module, mine[None], torch.tensor([5]), together=together)[3], 0)
    for place in range(3):
        ids = others.clone()
        ids[1], ids[place, :5], ids[place, 5:] = others[1], mine, 7 + place
        lengths = torch.tensor([5 if i == place else 50 if i == 1 else 3 for i in range(3)])
        eigen = decompose(model, module, ids, lengths, together=together)[3]
        assert_same_triplets(one(eigen, place), alone)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "bloom", "opt"])
def test_a_bias_at_the_last_token_alone_is_the_experiments(name):
    model, (ids, lengths) = tiny.build(name), prompts()
    layers = tiny.layers_of(model)
    point, z, gradients, eigen = decompose(model, layers[1], ids, lengths, last_only=True)
    for i, length in enumerate(LENGTHS):
        mine = ids[i, :length]
        theirs = fisher.linearize(model, layers[1:2], mine[-1], last_token.prefill(model, mine[:-1]))
        cotangents = head.top_k_cotangents(theirs, K)
        expected = fisher.eigenpairs(fisher.pull_back(theirs, cotangents.rows), cotangents.weights, R)
        assert_same_triplets(one(eigen, i), one(expected, 0))
        assert torch.allclose(point.activations[0, i], theirs.activations[0], atol=1e-4)


def test_a_recurrent_model_needs_no_cache_here():
    config = hf.MambaConfig(
        hidden_size=tiny.D, num_hidden_layers=2, vocab_size=tiny.VOCABULARY, state_size=8, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    (ids, lengths), layer = prompts(), model.backbone.layers[0]
    _, z, gradients, _ = decompose(model, layer, ids, lengths)
    for i, length in enumerate(LENGTHS):
        matrix = tiny.brute_force_fisher(model, ids[i, :length], layer, K, everywhere=True)
        assert (fisher.fisher_matrix(gradients, z.weights)[i] - matrix).abs().max() <= RELATIVE * matrix.abs().max()


def test_a_one_token_prompt_makes_no_difference_between_all_and_the_last_token():
    model = tiny.build("llama")
    ids, lengths = prompts([1, 9])
    everywhere, last = (decompose(model, tiny.layers_of(model)[0], ids, lengths, last_only=b)[3] for b in (False, True))
    assert_same_triplets(one(everywhere, 0), one(last, 0))
    assert (everywhere.values[1] / last.values[1] - 1).abs().max() > 0.01  # it does for nine


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1.mlp", "model.layers.0.self_attn", "model.norm"])
def test_the_bias_may_stand_at_any_module_on_the_way(path):
    model, (ids, lengths) = tiny.build("llama"), prompts()
    _, z, gradients, _ = decompose(model, model.get_submodule(path), ids, lengths)
    reference = tiny.build("llama", torch.float64)
    for i, length in enumerate(LENGTHS):
        matrix = tiny.brute_force_fisher(reference, ids[i, :length], reference.get_submodule(path), K, everywhere=True)
        assert (fisher.fisher_matrix(gradients, z.weights)[i] - matrix).abs().max() <= RELATIVE * matrix.abs().max()


@pytest.mark.parametrize("path", ["lm_head", "model.rotary_emb", "model.layers"])
def test_a_module_off_the_way_is_refused(path):
    model, (ids, lengths) = tiny.build("llama"), prompts()
    with pytest.raises(last_token.UnsupportedModelError):
        fisher.linearize_prompts(model, model.get_submodule(path), ids, lengths)
    assert not model.get_output_embeddings()._forward_pre_hooks  # handed back as it came


def test_triplets_are_orthonormal_descending_and_never_negative_over_many_orders_of_magnitude():
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


def test_a_matrix_that_is_zero_is_an_error_unless_allowed():
    gradients = torch.stack([torch.zeros(3, 6), torch.ones(3, 6)])
    with pytest.raises(fisher.NumericalError, match="zero"):
        fisher.eigenpairs(gradients, torch.ones(3))
    eigen = fisher.eigenpairs(gradients, torch.ones(3), 2, allow_zero=True)
    assert not any(part[0].any() for part in eigen)
    assert eigen.values[1, 0] == pytest.approx(18)


def test_nan_is_traced_to_its_prompt():
    model, (ids, lengths) = tiny.build("llama"), prompts()
    ids[ids == 90] = 91
    ids[2, 1] = 90
    model.model.embed_tokens.weight[90] = float("nan")
    with pytest.raises(fisher.NumericalError, match="NaN") as caught:
        fisher.linearize_prompts(model, tiny.layers_of(model)[0], ids, lengths)
    assert caught.value.prompt == 2


def test_half_precision_is_finite_and_close():
    (ids, lengths), results = prompts(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.build("llama", dtype)
        results.append(decompose(model, tiny.layers_of(model)[0], ids, lengths)[3])
    assert results[1].values.dtype == torch.float32
    assert (results[1].values[:, 0] / results[0].values[:, 0] - 1).abs().max() < 0.3
