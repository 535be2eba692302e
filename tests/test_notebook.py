"""What a notebook does with one prompt: steer it, add vectors to a model that generates; against full plain passes."""

import copy
import math
import sys

import gguf
import pytest
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

import families
import fisher
import residual_fisher
from residual_fisher.common.program import UserError
from residual_fisher.model.loading import decoder_layers, fingerprint
import scripts
import tiny

TOKENS = 6


@pytest.fixture(scope="module")
def loaded(model_directory):
    return fisher.load(str(model_directory), "float32", "cpu")


@torch.no_grad()
def the_long_way(model: nn.Module, ids: Tensor, deltas: dict[int, Tensor], everywhere: bool) -> list[int]:
    """Greedy tokens, each by a full pass without a cache; deltas added at the last token of `ids`, or at all tokens."""
    last, layers, handles = len(ids) - 1, list(decoder_layers(model).values()), []
    for number, delta in deltas.items():

        def add(module, args, output, delta=delta):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[:, slice(None) if everywhere else last] += delta
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(layers[number].register_forward_hook(add))
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    for handle in handles:
        handle.remove()
    return ids[last + 1 :].tolist()


def generated(model: nn.Module, ids: Tensor, **options) -> list[list[int]]:
    """Greedy tokens of a batch (rows, tokens), which no end token cuts short."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    model.generation_config.eos_token_id = None
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


def two_deltas(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """At the first and the last layer, of a length that changes what follows."""
    norms = fisher.linearize(model, ids).activations.norm(dim=-1)
    u = torch.randn(2, tiny.D, generator=torch.Generator().manual_seed(2)) / tiny.D**0.5
    return {0: norms[0] * u[0], tiny.DEPTH - 1: norms[-1] * u[1]}


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bloom", "mamba", "jamba"])
def test_added_vectors_generate_what_full_passes_do(name, positions):
    model, ids = families.shared(name), tiny.prompt()
    deltas, changed = two_deltas(model, ids), 0
    usual = generated(model, ids[None])
    for some in (deltas, {0: deltas[0]}):
        with fisher.added(model, some, positions):
            found = generated(model, ids[None])
            assert found == [the_long_way_alone(model, ids, some, positions)]
            assert generated(model, ids[None]) == found  # a second prompt in the block is perturbed likewise
        changed += found != usual
    assert changed  # else nothing was tried
    assert generated(model, ids[None]) == usual


def the_long_way_alone(model: nn.Module, ids: Tensor, deltas: dict[int, Tensor], positions: str) -> list[int]:
    """`the_long_way` in a copy of the model, which has no hooks."""
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    fresh.config._attn_implementation = model.config._attn_implementation
    return the_long_way(fresh, ids, deltas, positions == "all")


def test_prompts_padded_on_the_left_are_each_perturbed_at_their_last_token():
    model, ids = tiny.shared("llama"), tiny.prompt(9)
    deltas = two_deltas(model, ids)
    batch = torch.stack([ids, torch.cat([torch.zeros(4, dtype=torch.int64), ids[:5]])])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    with fisher.added(model, deltas):
        rows = generated(model, batch, attention_mask=mask)
    assert rows == [the_long_way(model, row, deltas, False) for row in (ids, ids[:5])]


def test_without_a_cache_the_last_token_of_a_prompt_is_not_known_and_that_is_said():
    model, ids = tiny.shared("llama"), tiny.prompt()
    deltas = two_deltas(model, ids)
    with pytest.raises(ValueError, match="generate with use_cache=True"), fisher.added(model, deltas):
        generated(model, ids[None], use_cache=False)
    with fisher.added(model, deltas, "all"):
        found = generated(model, ids[None], use_cache=False)
    assert found == [the_long_way(model, ids, deltas, True)]


def test_a_plain_pass_with_added_vectors_is_that_of_perturb():
    model, ids = tiny.shared("llama"), tiny.prompt()
    delta = two_deltas(model, ids)[0]
    expected = fisher.perturb(fisher.linearize(model, ids), delta[None], at=0)[0]
    with fisher.added(model, {0: delta}):
        for use_cache in (False, True):
            found = model(ids[None], use_cache=use_cache).logits[0, -1]
            assert torch.allclose(found, expected, atol=1e-4)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_error_leaves_the_model_as_it_was():
    model, ids = tiny.shared("llama"), tiny.prompt()
    before, hooks = model(ids[None]).logits, hooks_of(model)  # some are transformers' own
    with pytest.raises(KeyError), fisher.added(model, two_deltas(model, ids)):
        assert hooks_of(model) > hooks
        raise KeyError
    assert hooks_of(model) == hooks and torch.equal(model(ids[None]).logits, before)


def test_vectors_that_do_not_fit_are_refused():
    model, zero = tiny.shared("llama"), torch.zeros(tiny.D)
    for deltas, positions, what in [
        ({3: zero}, "last", "layers"), ({0: zero[1:]}, "last", "of shape"), ({0: zero}, "first", "none of last, all"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=what), fisher.added(model, deltas, positions):
            pass


# --- steering ------------------------------------------------------------------------------------


def test_a_steered_prompt_is_what_a_plain_pass_says_of_its_perturbation(loaded):
    model, tokenizer = loaded
    prompt = "The zoo keeps many wild"
    ids = torch.tensor(tokenizer(prompt).input_ids)
    log_p = tiny.plain_log_probs(model, ids).double()
    token = int(log_p.argsort(descending=True)[20])
    for layer, to in ((0, 0.5), (2, 0.3)):
        found = fisher.steer(model, tokenizer, prompt, token, layer, to)
        log_q = tiny.plain_log_probs(model, ids, tiny.layers_of(model)[layer], found.delta).double()
        kl = float((log_p.exp() * (log_p - log_q)).sum())
        assert (found.layer, found.token, found.delta.shape) == (layer, token, (tiny.D,))
        assert found.before == pytest.approx(log_p[token].exp().item(), rel=1e-4) and found.before < to
        assert found.after == pytest.approx(log_q[token].exp().item(), rel=1e-4)
        assert found.after == pytest.approx(to, rel=0.02)
        assert found.kl == pytest.approx(kl, rel=1e-3)
        p, q = found.before, found.after
        assert found.least_kl == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        assert 1 - 1e-3 <= found.kl / found.least_kl < 2


def test_what_cannot_be_steered_is_said(loaded):
    model, tokenizer = loaded
    for arguments, error, what in [
        ((" a text of several tokens", 1), UserError, "has to be one token"),
        ((5, 1, 1.0), ValueError, "below 1"),
        ((5, 1, 1e-9), ValueError, "can be raised to more"),
        ((5, 7), ValueError, "layers"),
    ]:
        with pytest.raises(error, match=what):
            fisher.steer(model, tokenizer, "The zoo keeps many wild", *arguments)
    with pytest.raises(fisher.NumericalError, match="try more steps"):
        fisher.steer(model, tokenizer, "The zoo keeps many wild", 5, 0, 1 - 1e-12, steps=1)


# --- files of vectors ----------------------------------------------------------------------------


@pytest.fixture
def vectors() -> dict[int, Tensor]:
    return dict(zip((1, 2), torch.randn(2, tiny.D, generator=torch.Generator().manual_seed(4)), strict=True))


def test_a_safetensors_file_of_vectors_says_what_they_are_of_to_any_reader(loaded, vectors, tmp_path):
    path = tmp_path / "vectors.safetensors"
    fisher.save_vectors(path, vectors, *loaded)
    arrays = safetensors.numpy.load_file(path)
    modules = dict(loaded[0].named_modules())
    assert {name: modules[name] for name in arrays} == {
        f"model.layers.{number}": tiny.layers_of(loaded[0])[number] for number in (1, 2)
    }
    assert all((arrays[f"model.layers.{number}"] == vector.numpy()).all() for number, vector in vectors.items())
    with safetensors.safe_open(path, "np") as file:
        about = file.metadata()
    assert about["model"] == fingerprint(*loaded) and about["module"] == "model.layers.1 model.layers.2"
    assert [about[key] for key in ("operation", "layers", "position", "scale")] == ["add", "1 2", "last", "1"]
    found = fisher.load_vectors(path, *loaded)
    assert found.about == about and list(found.deltas) == [1, 2]
    assert all(torch.equal(found.deltas[number], vector) for number, vector in vectors.items())


def test_a_gguf_file_of_vectors_is_a_control_vector_to_any_reader(loaded, vectors, tmp_path):
    path = tmp_path / "vectors.gguf"
    fisher.save_vectors(path, vectors, *loaded, position="all")
    reader = gguf.GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "controlvector" and told["controlvector.model_hint"] == "llama"
    assert told["controlvector.layer_count"] == 2 and told["residual_fisher.model"] == fingerprint(*loaded)
    # llama.cpp adds direction.N to the output of block N, counted from 0
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor, vector in zip(reader.tensors, vectors.values(), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and (tensor.data == vector.numpy()).all()
    found = fisher.load_vectors(path, *loaded)
    assert found.about["position"] == "all" and all(torch.equal(found.deltas[n], v) for n, v in vectors.items())
    with pytest.raises(ValueError, match="none for layer 0"):
        fisher.save_vectors(path, {0: vectors[1]}, *loaded)


def test_files_that_hold_no_vectors_of_this_model_are_refused_in_a_line(loaded, vectors, tmp_path):
    path = tmp_path / "vectors.safetensors"
    with pytest.raises(UserError, match="end in"):
        fisher.save_vectors(tmp_path / "vectors.pt", vectors, *loaded)
    fisher.save_vectors(path, vectors, *loaded)
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    model.lm_head.weight[0, 0] += 1
    with pytest.raises(UserError, match="of another model or dtype"):
        fisher.load_vectors(path, model, tokenizer)
    safetensors.numpy.save_file({"a": vectors[1].numpy()}, path)
    for name, content, what in [
        ("vectors.safetensors", path.read_bytes(), "where they are added"),
        ("damaged.safetensors", b"damaged", "cannot read"), ("damaged.gguf", b"damaged", "cannot read"),
        ("missing.gguf", None, "cannot read"), ("missing.safetensors", None, "cannot read"),
    ]:  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=what):
            fisher.load_vectors(tmp_path / name)


# --- words, overlaps, tables ---------------------------------------------------------------------


def test_words_are_those_of_the_results(loaded, finished_experiment):
    model, tokenizer = loaded
    document, _ = scripts.experiment_results(finished_experiment)
    point = fisher.linearize(model, tokenizer(document["contexts"][0]["prompt"]).input_ids)
    directions = fisher.top_k(point, 30).eigenpairs().vectors
    found = fisher.words(point, directions, tokenizer, k=30)
    assert list(found) == [0, 1, 2]
    for layer, entry in document["fisher"][0].items():
        ours, theirs = found[int(layer)][0], entry["tokens"][0]
        assert [t["token"] for t in ours] == [t["token"] for t in theirs] and len(ours) == 8
        assert [t["share"] for t in ours] == pytest.approx([t["share"] for t in theirs], rel=1e-4)
    shares = [t["share"] for t in fisher.words(point, directions, tokenizer, "all")[1][0]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-6


def spectra(rows: int, width: int, count: int) -> list[fisher.Eigenpairs]:
    """Leading eigenpairs of random positive semi-definite matrices, and those matrices as they approximate them."""
    found = []
    for seed in range(count):
        r = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        found.append(fisher.eigenpairs(r, torch.ones(rows), num=4))
    return found


def test_overlaps_are_those_of_dense_projectors_and_matrices():
    a, b = spectra(6, 20, 2)
    for k in (1, 3, 4):
        (p, f, w), (q, g, u) = (
            (v.mT @ v, v.mT @ (x[:, None] * v), x / x.sum())
            for x, v in ((s.values[:k].double(), s.vectors[:k].double()) for s in (a, b))
        )
        first = sum(w[i] * (q @ a.vectors[i].double()).square().sum() for i in range(k))
        second = sum(u[i] * (p @ b.vectors[i].double()).square().sum() for i in range(k))
        assert fisher.subspace_overlap(a, b, k) == pytest.approx((first + second) / 2)
        expected = torch.trace(f @ g) / (f.norm() * g.norm())
        assert fisher.matrix_similarity(a, b, k) == pytest.approx(expected)
        assert fisher.subspace_overlap(a, a, k) == pytest.approx(1) == fisher.matrix_similarity(a, a, k)
    assert fisher.subspace_overlap(a, b) == fisher.subspace_overlap(b, a, 4)
    with pytest.raises(ValueError, match="between 1 and the 4"):
        fisher.subspace_overlap(a, b, 5)


def test_cosines_have_signs_and_none_is_nan():
    a = torch.tensor([[3.0, 0], [0, 2], [0, 0], [1, 1]])
    b = torch.tensor([[-1.0, 0], [1, 0], [1, 0], [1, 0]])
    assert fisher.cosine(a, b).tolist() == pytest.approx([-1, 0, 0, 0.5**0.5])


def test_results_are_a_table_with_a_row_for_each_perturbation(finished_experiment):
    document, arrays = scripts.experiment_results(finished_experiment)
    frame = residual_fisher.load_results(finished_experiment)
    assert len(frame) == 4 * 2 * 4 * 4  # sentences, layers, scales, directions
    assert set(frame["direction"]) == {"fisher", "random_0", "random_1", "difference"}
    assert frame.columns[:6].tolist() == ["sentence", "prompt", "target", "layer", "scale", "direction"]
    row = frame[frame.eval("sentence == 2 and layer == 2 and scale == 0.1 and direction == 'random_1'")].iloc[0]
    record = document["perturbation_results"][2]["2"]["0.1"]["controls"]["random_1"]
    for key in ("step", "kl", "predicted_kl", "top_changed", "target_prob"):
        assert row[key] == record[key]
    assert (row["top_token"], row["top_prob"]) == (record["top_tokens"][0], record["top_probs"][0])
    assert row["eigenvalue"] == pytest.approx(arrays["eigenvalues"][2, 1], rel=1e-6)
    assert row["trace"] == document["fisher"][2]["2"]["trace"]


def test_a_table_without_results_or_pandas_is_refused_in_a_line(finished_experiment, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no readable experiment_results\.json"):
        residual_fisher.load_results(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        residual_fisher.load_results(finished_experiment)
