"""The top eigenpair of the exact Fisher matrix, by this project and by the field's own tools, on the same prompts.

    pip install -r requirements-bench.txt
    python benchmarks/compare_peers.py

this        fisher.full_vocabulary and its eigenpairs: all layers at once (prefix and forward pass included)
curvlinops  GGNLinearOperator of the softmax cross-entropy in a bias at one layer, handed to scipy's eigsh
eigenthings hessian-eigenthings: GGNOperator and lanczos
jacfwd      derivatives of all log-probabilities as torch.func.jacfwd takes them, in chunks; F = J^T diag(p) J; eigh
jacrev      the same with torch.func.jacrev (timed on a part of the rows)
loop        one backward call a token of the vocabulary (timed on a part of them)

Each tool runs in a process of its own, so that its peak memory is its own; "this" runs first and last. The GGN
of the softmax cross-entropy with respect to the bias is the Fisher matrix, whatever the label. Peers work a layer
at a time on the whole prompt, as a user of them would; forward-mode products need attention to be "eager".
"""

import argparse
import json
from pathlib import Path
import resource
import statistics
import subprocess
import sys

from measuring import ROOT, Subject, diverse_contexts, embedded, machine, plain_embedded, seconds, show, write
import torch
from torch import Tensor, nn

import fisher
from residual_fisher.experiment.sentences import Context

LANCZOS_STEPS = 10  # of hessian-eigenthings: enough to agree to |cos| 0.9999; its default is 2
CHUNK = 64  # tangents or rows in one vmapped pass
PART = {"jacrev": 4 * CHUNK, "loop": 20}  # rows timed, of the whole vocabulary's
SENTENCES = {"this": 6, "curvlinops": 2, "eigenthings": 3, "jacfwd": 1, "jacrev": 1, "loop": 1}


class Biased(nn.Module):
    """A model's next-token logits with a bias, its only parameter, added after one layer at the last token."""

    def __init__(self, lm: nn.Module, layer: nn.Module, d: int):
        super().__init__()
        self.lm = lm
        self.layer = [layer]  # in a list: not a second time among the submodules
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, ids: Tensor) -> Tensor:
        def add(module, args, h):
            return torch.cat([h[:, :-1], h[:, -1:] + self.bias], dim=1)

        handle = self.layer[0].register_forward_hook(add)
        try:
            return self.lm(ids, use_cache=False).logits[:, -1]
        finally:
            handle.remove()


def curvlinops_pair(biased: Biased, ids: Tensor) -> tuple[float, Tensor]:
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh

    data = [(ids[None], torch.zeros(1, dtype=torch.int64))]
    operator = GGNLinearOperator(
        biased, nn.CrossEntropyLoss(reduction="sum"), [biased.bias], data, check_deterministic=False
    )
    values, vectors = eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-4)
    return float(values[0]), torch.from_numpy(vectors[:, 0]).float()


def eigenthings_pair(biased: Biased, ids: Tensor) -> tuple[float, Tensor]:
    from hessian_eigenthings import lanczos
    from hessian_eigenthings.operators import GGNOperator

    def loss(logits: Tensor, batch) -> Tensor:
        return nn.functional.cross_entropy(logits, batch[1], reduction="sum")

    data = [(ids[None], torch.zeros(1, dtype=torch.int64))]
    operator = GGNOperator(
        biased, data, lambda model, batch: model(batch[0]), loss, param_filter=lambda name, *_: name == "bias"
    )
    found = lanczos(operator, k=1, max_iter=LANCZOS_STEPS, which="LA", seed=0)
    return float(found.eigenvalues[0]), found.eigenvectors[0]


def log_probs_of(biased: Biased, ids: Tensor):
    def function(bias: Tensor) -> Tensor:
        return torch.func.functional_call(biased, {"bias": bias}, (ids[None],))[0].log_softmax(-1)

    return function, biased.bias.detach()


def top_pair(jacobian: Tensor, p: Tensor) -> tuple[float, Tensor]:
    values, vectors = torch.linalg.eigh(jacobian.mT @ (p[:, None] * jacobian))
    return float(values[-1]), vectors[:, -1]


def jacfwd_pair(biased: Biased, ids: Tensor) -> tuple[float, Tensor]:
    function, bias = log_probs_of(biased, ids)
    with torch.no_grad():
        p = function(bias).exp()

    def column(tangent: Tensor) -> Tensor:  # jacfwd, which has no chunks of its own
        return torch.func.jvp(function, (bias,), (tangent,))[1]

    return top_pair(torch.func.vmap(column, out_dims=1, chunk_size=CHUNK)(torch.eye(len(bias))), p)


def jacrev_part(biased: Biased, ids: Tensor) -> None:
    """PART of the rows, the way jacrev(chunk_size=CHUNK) takes them all."""
    function, bias = log_probs_of(biased, ids)
    log_probs, pull_back = torch.func.vjp(function, bias)
    for start in range(0, PART["jacrev"], CHUNK):
        one_hot = torch.zeros(CHUNK, len(log_probs))
        one_hot[range(CHUNK), range(start, start + CHUNK)] = 1
        torch.func.vmap(pull_back)(one_hot)


def loop_part(biased: Biased, ids: Tensor) -> None:
    log_probs = biased(ids[None])[0].log_softmax(-1)
    for token in range(PART["loop"]):
        torch.autograd.grad(log_probs[token], biased.bias, retain_graph=True)


PEERS = {
    "curvlinops": curvlinops_pair,
    "eigenthings": eigenthings_pair,
    "jacfwd": jacfwd_pair,
    "jacrev": jacrev_part,
    "loop": loop_part,
}


def this(subject: Subject, context: Context) -> fisher.Eigenpairs:
    """The experiment's own way to the exact eigenpairs of one sentence, at all layers."""
    return fisher.full_vocabulary(subject.linearize(context), fisher.Chunks(1024)).eigenpairs()


def work(tool: str) -> dict:
    """Figures of one tool, in this process."""
    subject = embedded()
    contexts = diverse_contexts(subject, SENTENCES[tool])
    plain = plain_embedded(attn_implementation="sdpa" if tool == "loop" else "eager")
    vocabulary, d = plain.lm_head.weight.shape
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if tool == "this":
        this(subject, contexts[0])  # warm-up
    rows = []
    for context in contexts:
        if tool == "this":
            duration, eigen = seconds(lambda: this(subject, context))  # noqa: B023
            pairs = [
                [float(eigen.values[row, 0]), eigen.vectors[row, 0].tolist()] for row in range(len(subject.layers))
            ]
        else:
            duration, pairs, ids = 0.0, [], torch.tensor(context.ids)
            for number in subject.layers:
                biased = Biased(plain, plain.model.layers[number], d)
                one, pair = seconds(lambda: PEERS[tool](biased, ids))  # noqa: B023
                duration += one * vocabulary / PART[tool] if tool in PART else one
                pairs.append(pair and [pair[0], pair[1].tolist()])
        rows.append({"prompt_tokens": len(context.ids), "seconds": duration, "pairs": pairs})
        show(tool, {"tokens": len(context.ids), "seconds": duration})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "sentences": rows,
        "peak_mb_above_load": max(0, peak - before) / 1024,
        "layers": subject.layers,
        "machine": machine(plain),
    }


def agreement(found: dict, truth: dict) -> dict:
    """The largest differences of lambda (relative) and |cos| (from 1) over sentences and layers."""
    value = cosine = 0.0
    for ours, theirs in zip(truth["sentences"], found["sentences"], strict=False):
        for a, b in zip(ours["pairs"], theirs["pairs"], strict=True):
            if b is None:
                return {}
            value = max(value, abs(b[0] / a[0] - 1))
            cosine = max(cosine, 1 - abs(float(torch.tensor(a[1]).double() @ torch.tensor(b[1]).double())))
    return {"difference_lambda": value, "difference_cos": cosine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SENTENCES), help=argparse.SUPPRESS)  # what the processes are told
    options = parser.parse_args()
    if options.only:
        print(json.dumps(work(options.only)))
        return

    runs = {}
    for label in ("this", "curvlinops", "eigenthings", "jacfwd", "jacrev", "loop", "this, again"):
        command = [sys.executable, str(Path(__file__)), "--only", label.partition(",")[0]]
        finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT / "benchmarks")
        runs[label] = json.loads(finished.stdout)
    ours = [r["seconds"] for label in ("this", "this, again") for r in runs[label]["sentences"]]
    table = {}
    for label, run in runs.items():
        durations = [row["seconds"] for row in run["sentences"]]
        table[label] = {
            "seconds_a_sentence": statistics.median(durations),
            "sentences": len(durations),
            "extrapolated": label in PART,
            "times_this": statistics.median(durations) / statistics.median(ours),
            "peak_mb_above_load": run["peak_mb_above_load"],
            **agreement(run, runs["this"]),
        }
        show(label, table[label])
    figures = {"machine": runs["this"]["machine"], "layers": runs["this"]["layers"], "tools": table}
    write("compare_peers", __file__, figures)


if __name__ == "__main__":
    main()
