"""Batches of whole prompts: against float64 computed another way, and against what else is in the batch."""

import pytest
import torch
import transformers as hf

import fisher
from residual_fisher.model.passes import use_attention
from test_fisher import RELATIVE, K, assert_close, directions
import tiny

R = 5


def decompose(model, module, ids, lengths, chunk=256, **options):
    """The point, the top-k Fisher matrices, and the leading R eigenpairs of each prompt."""
    point = fisher.linearize_prompts(model, module, ids, lengths, **options)
    top = fisher.top_k(point, K, fisher.Chunks(chunk))
    return point, top, one(top.eigenpairs(R), 0)


def one(eigen: fisher.Eigenpairs, index: int) -> fisher.Eigenpairs:
    return fisher.Eigenpairs(*(part[index] for part in eigen))


def assert_same_triplets(found: fisher.Eigenpairs, expected: fisher.Eigenpairs):
    """One prompt's: singular values to 1e-4, subspaces to 1e-3 (sine of the largest principal angle)."""
    assert (found.values / expected.values - 1).abs().max() < 1e-4
    cosines = torch.linalg.svdvals(found.vectors.double() @ expected.vectors.double().mT)
    assert (1 - cosines.min() ** 2).clamp(min=0).sqrt() < 1e-3


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_prompt_of_a_batch_matches_its_float64_fisher_matrix(name):
    model, (ids, lengths) = tiny.shared(name), tiny.prompts()
    point, top, eigen = decompose(model, tiny.layers_of(model)[1], ids, lengths)
    matrices, u = tiny.reference_prompts(name, 1, ids, lengths, K), directions(len(ids), 4)
    curvature = torch.einsum("ind,ide,ine->in", u.double(), matrices, u.double())
    assert torch.allclose(top.curvature(u[None])[0].double(), curvature, rtol=1e-3)
    for i, matrix in enumerate(matrices):
        assert_close(top.matrix[0, i], matrix)
        u, s, v = torch.linalg.svd(matrix)
        assert (eigen.values[i] - s[:R]).abs().max() <= RELATIVE * s[0]
        best = u[:, :R] @ s[:R].diag() @ v[:R]
        found = eigen.vectors[i].mT @ eigen.values[i].diag() @ eigen.vectors[i]
        # the best approximation of rank R, by its distance from F: its subspace may turn where values are close
        assert (matrix - found).norm() <= (matrix - best).norm() + RELATIVE * matrix.norm()
        assert eigen.trace[i].item() == pytest.approx(matrix.trace().item(), rel=RELATIVE)
        log_probs = tiny.reference_log_probs(name, ids[i, : lengths[i]])
        assert (point.log_probs[i] - log_probs).abs().max() < 1e-3
        assert top.mass[i].item() == pytest.approx(log_probs.exp().topk(K).values.sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-alibi", "mistral"])
@pytest.mark.parametrize(
    ("attention", "chunk", "last_only"),
    [("eager", 8, False), ("sdpa", 1, False), ("eager", 8, True), ("sdpa", 8, True)],  # as the pipeline has them
)
def test_a_prompts_triplets_do_not_depend_on_its_batch(name, attention, chunk, last_only):
    model = tiny.build(name)
    use_attention(model, attention)
    module = tiny.layers_of(model)[0]
    others, lengths = tiny.prompts([5, 50, 5])
    mine = tiny.prompt(5)
    alone = one(decompose(model, module, mine[None], torch.tensor([5]), chunk, last_only=last_only)[2], 0)
    for place in range(3):
        ids = others.clone()
        ids[1], ids[place, :5], ids[place, 5:] = others[1], mine, 7 + place
        lengths = torch.tensor([5 if i == place else 50 if i == 1 else 3 for i in range(3)])
        eigen = decompose(model, module, ids, lengths, chunk, last_only=last_only)[2]
        assert_same_triplets(one(eigen, place), alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
def test_two_different_paddings_give_identical_logits(name, dtype):
    """No tolerance, in any dtype: a model that sees the padding would differ."""
    model, (ids, lengths) = tiny.shared(name, dtype), tiny.prompts()
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    first, second = (
        fisher.linearize_prompts(model, tiny.layers_of(model)[0], torch.where(padding, token, ids), lengths)
        for token in (5, 60)
    )
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(fisher.top_k(first, K).gradients, fisher.top_k(second, K).gradients)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "bloom", "opt"])
def test_a_bias_at_the_last_token_only_is_the_experiments(name):
    model, (ids, lengths) = tiny.shared(name), tiny.prompts()
    point, _, eigen = decompose(model, tiny.layers_of(model)[1], ids, lengths, last_only=True)
    for i, length in enumerate(tiny.LENGTHS):
        theirs = fisher.linearize(model, ids[i, :length], layers=[1])
        assert_same_triplets(one(eigen, i), one(fisher.top_k(theirs, K).eigenpairs(R), 0))
        assert torch.allclose(point.activations[0, i], theirs.activations[0], atol=1e-4)


# Attention of their own, or windows shorter than these prompts: they do not share a cache.
WHOLE = {"bloom", "falcon", "falcon-alibi", "gemma2", "gemma3", "gpt-oss", "mistral"}


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_over_the_cached_prefix_f_of_the_last_token_is_its_float64_fisher_matrix(name):
    model, (ids, lengths) = tiny.shared(name), tiny.prompts([9, 3, 6, 1])
    point, top, _ = decompose(model, tiny.layers_of(model)[1], ids, lengths, last_only=True)
    assert point.tokens == (4 * 9 if name in WHOLE else 4)
    for i, length in enumerate(lengths.tolist()):
        assert_close(top.matrix[0, i], tiny.reference_fisher(name, ids[i, :length], 1, K))


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_prompts_of_equal_length_share_a_cache_whatever_its_windows(name):
    model, (ids, lengths) = tiny.shared(name), tiny.prompts([9, 9])
    point, top, _ = decompose(model, tiny.layers_of(model)[1], ids, lengths, last_only=True)
    assert point.tokens == 2
    for i in range(2):
        assert_close(top.matrix[0, i], tiny.reference_fisher(name, ids[i], 1, K))


def test_a_recurrent_model_needs_no_cache_here():
    config = hf.MambaConfig(
        hidden_size=tiny.D, num_hidden_layers=2, vocab_size=tiny.VOCABULARY, state_size=8, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    (ids, lengths), layer = tiny.prompts(), model.backbone.layers[0]
    _, top, _ = decompose(model, layer, ids, lengths)
    for i, length in enumerate(tiny.LENGTHS):
        matrix = tiny.brute_force_fisher(model, ids[i, :length], layer, K, everywhere=True)
        assert_close(top.matrix[0, i], matrix)


def test_a_one_token_prompt_makes_no_difference_between_all_and_the_last_token():
    model, (ids, lengths) = tiny.shared("llama"), tiny.prompts([1, 9])
    everywhere, last = (decompose(model, tiny.layers_of(model)[0], ids, lengths, last_only=b)[2] for b in (False, True))
    assert_same_triplets(one(everywhere, 0), one(last, 0))
    assert (everywhere.values[1] / last.values[1] - 1).abs().max() > 0.01  # it does for nine


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1.mlp", "model.layers.0.self_attn", "model.norm"])
def test_the_bias_may_be_at_any_module_on_the_way(path):
    model, (ids, lengths) = tiny.shared("llama"), tiny.prompts()
    _, top, _ = decompose(model, model.get_submodule(path), ids, lengths)
    reference = tiny.shared("llama", torch.float64)
    for i, length in enumerate(tiny.LENGTHS):
        matrix = tiny.brute_force_fisher(reference, ids[i, :length], reference.get_submodule(path), K, everywhere=True)
        assert_close(top.matrix[0, i], matrix)


@pytest.mark.parametrize("path", ["model", "lm_head", "model.rotary_emb", "model.layers"])
def test_a_module_off_the_way_is_refused(path):
    model, (ids, lengths) = tiny.build("llama"), tiny.prompts()
    with pytest.raises(fisher.UnsupportedModelError, match=r"output is not of shape|does not stand, once, between"):
        fisher.linearize_prompts(model, model.get_submodule(path), ids, lengths)
    assert not model.get_output_embeddings()._forward_pre_hooks  # handed back as it came


def test_nan_is_traced_to_its_prompt():
    model, (ids, lengths) = tiny.build("llama"), tiny.prompts()
    ids[ids == 90] = 91
    ids[2, 1] = 90
    model.model.embed_tokens.weight[90] = float("nan")
    with pytest.raises(fisher.NumericalError, match="NaN") as caught:
        fisher.linearize_prompts(model, tiny.layers_of(model)[0], ids, lengths)
    assert caught.value.prompt == 2


def test_half_precision_is_finite_and_close():
    (ids, lengths), results = tiny.prompts(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.shared("llama", dtype)
        results.append(decompose(model, tiny.layers_of(model)[0], ids, lengths)[2])
    assert results[1].values.dtype == torch.float32
    assert (results[1].values[:, 0] / results[0].values[:, 0] - 1).abs().max() < 0.3
