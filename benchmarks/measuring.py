"""What the benchmarks share: the naive protocol, the timer, the sentences, the machine, and how figures are kept."""

from collections.abc import Callable, Sequence
import json
from pathlib import Path
import platform
import statistics
import sys
import time
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import core_experiment
import fisher
from residual_fisher.experiment.sentences import Context, find_contexts, find_sentences
from residual_fisher.model.embedded import embedded_model
from residual_fisher.model.loading import describe, load
from residual_fisher.model.passes import edit_stream, hooked

# --- models and sentences ------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model, and the numbers of the layers that are measured."""

    lm: nn.Module
    tokenizer: object
    layers: list[int]

    def linearize(self, context: Context) -> fisher.Point:
        return fisher.linearize(self.lm, context.ids, self.layers)


def embedded(layers: Sequence[int] | None = None, dtype: str = "float32", device: str = "cpu") -> Subject:
    """The embedded model, as this project loads it; with the experiment's layers by default."""
    lm, tokenizer = load(dtype=dtype, device=device)
    return Subject(lm, tokenizer, list(layers or core_experiment.choose_layers(None, lm.config.num_hidden_layers)))


def plain_embedded(**options) -> nn.Module:
    """The same weights as transformers hands them out, fused attention and all."""
    return AutoModelForCausalLM.from_pretrained(embedded_model(), **options).eval().requires_grad_(False)


def diverse_contexts(subject: Subject, count: int) -> list[Context]:
    """The experiment's first `count` sentences."""
    settings = core_experiment.parse([])
    found = find_sentences(settings.data, settings.target_word)
    return find_contexts(subject.tokenizer, found, settings.target_word)[:count]


# --- the naive protocol --------------------------------------------------------------------------


def naive_gradients(
    lm: nn.Module, module: nn.Module, ids: Tensor, k: int, everywhere: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """G (k, d) float32 by one backward call a token, p (k,), and all log-probabilities (V,).

    The bias is added at the last token of ids (tokens,), or at every one.
    """
    bias = torch.zeros(lm.config.hidden_size, dtype=lm.dtype, device=lm.device, requires_grad=True)

    def add(h: Tensor) -> Tensor:
        return h + bias if everywhere else torch.cat([h[:, :-1], h[:, -1:] + bias], dim=1)

    with hooked(edit_stream(module, add)):
        log_probs = lm(ids[None]).logits[0, -1].float().log_softmax(-1)
    top = log_probs.topk(k).values
    gradients = []
    for log_prob in top:
        lm.zero_grad()
        bias.grad = None
        log_prob.backward(retain_graph=True)
        gradients.append(bias.grad.clone())
    return torch.stack(gradients).float(), top.detach().exp(), log_probs.detach()


class Naive(NamedTuple):
    value: float  # the largest eigenvalue
    vector: Tensor  # (d,)
    kl: list[float]  # nats, by scale


def naive(lm: nn.Module, layer: nn.Module, ids: Tensor, k: int, scales: Sequence[float]) -> Naive:
    """The experiment as it reads, at one layer: d x d Fisher matrix, `eigh`, a forward pass a scale (unit: nats)."""
    gradients, p, log_probs = naive_gradients(lm, layer, ids, k)
    values, vectors = torch.linalg.eigh(gradients.T @ (p[:, None] * gradients))
    value, vector = values[-1], vectors[:, -1] * torch.sign(vectors[:, -1] @ gradients[0])
    kl = []
    for scale in scales:
        delta = (scale * value.rsqrt() * vector).to(lm.dtype)

        def add(h: Tensor, delta=delta) -> Tensor:
            return torch.cat([h[:, :-1], h[:, -1:] + delta], dim=1)

        with torch.no_grad(), hooked(edit_stream(layer, add)):
            log_q = lm(ids[None]).logits[0, -1].float().log_softmax(-1)
        kl.append(float((log_probs.exp() * (log_probs - log_q)).sum()))
    return Naive(float(value), vector, kl)


# --- time ----------------------------------------------------------------------------------------


def synchronize() -> None:
    if torch.cuda.is_initialized():  # else nothing runs on a GPU, and asking would make a context there
        torch.cuda.synchronize()


def seconds(function: Callable) -> tuple[float, object]:
    """How long function() takes, and what it returns."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def in_turns(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, since the machine's speed drifts; after one turn that is not counted."""
    taken = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            duration, _ = seconds(function)
            if turn:
                taken[name].append(duration)
    return {name: statistics.median(values) for name, values in taken.items()}


# --- figures -------------------------------------------------------------------------------------


def machine(lm: nn.Module) -> dict:
    """Device and versions."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}
    return {"cpu": cpu(), "threads": torch.get_num_threads(), **gpu, **describe(lm)}


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(label: object, figures: dict) -> None:
    """Prints a row of figures, three digits each."""

    def short(value):
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        return float(f"{value:.3g}") if isinstance(value, float) else value

    cells = [f"{key} {short(value)}" for key, value in figures.items()]
    print(f"{label}: " + ", ".join(cells), file=sys.stderr, flush=True)


def write(name: str, script: str, figures: dict) -> Path:
    """Writes figures to benchmarks/results/NAME.json, with the command and the date."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = {"command": f"python benchmarks/{Path(script).name}", "date": time.strftime("%Y-%m-%d"), **figures}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
