"""The pipeline against the plain loop and against its floor, in one process on the same prompts.

    python benchmarks/bench_pipeline.py

plain   a prompt at a time: a forward pass with a hook, one backward call a token, the d x d Fisher matrix and
        its full SVD. Once on the model as `from_pretrained` returns it, whose weights take gradients too, and
        once with the weights frozen
shared  the plain loop over padded batches: one bias for all prompts of a batch, so that every prompt's every token
        takes a backward pass through the whole batch (weights frozen; on the two last, shortest batches)
this    compute_fisher.measure on the batches of compute_fisher's plan, and its files written
floor   1 + k * (share of layers above the hook) plain forward passes over the same batches, without gradients and
        with the logits of one token

--only last times the last token and whole answers instead, in plain forward passes of the same batches.

Fails unless both find the same singular values (1e-3 of the largest) and matrices. Also measures the peak memory of
compute_fisher.py at 200 and at 2,000 short prompts. Writes benchmarks/results/bench_pipeline.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from measuring import ROOT, cpu, embedded, in_turns, naive_gradients, seconds, show
import torch
from tqdm import tqdm
import transformers

import compute_fisher
from residual_fisher.common.archives import Item, write_items
from residual_fisher.common.files import write_json
from residual_fisher.model.loading import decoder_layers
from residual_fisher.model.passes import use_attention
from residual_fisher.pipeline.batches import ids_and_lengths
from residual_fisher.pipeline.prompts import Encoded, Prompts, encode, plan_batches
from residual_fisher.pipeline.settings import Settings

WIDE = {  # a random model of the width of a 1B one
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


def plain(lm, module, ids: list[int], k: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline as it reads: singular values (r,) and F's rank-r approximation's factors."""
    g, p, _ = naive_gradients(lm, module, torch.tensor(ids), k, everywhere=True)
    u, s, _ = torch.linalg.svd(g.T @ (p[:, None] * g))
    return s[:r], u[:, :r]


def shared(lm, module, batch: list[Encoded], k: int) -> None:
    """The same over a padded batch, with one bias for all of its prompts."""
    ids, lengths = ids_and_lengths(batch)
    bias = torch.zeros(lm.config.hidden_size, requires_grad=True)
    handle = module.register_forward_hook(lambda module, args, h: h + bias)
    hidden = lm.model(ids, use_cache=False).last_hidden_state[torch.arange(len(ids)), lengths - 1]
    handle.remove()
    for log_probs in lm.lm_head(hidden).log_softmax(-1):
        top = log_probs.topk(k).values
        g = torch.stack([torch.autograd.grad(log_prob, bias, retain_graph=True)[0] for log_prob in top])
        torch.linalg.svd(g.T @ (top.detach().exp()[:, None] * g))


def compare(slow, fast: Item) -> float:
    """Largest difference of the two rank-r matrices, relative to the largest singular value."""
    s, u = slow
    own_u, own_s, own_v = (torch.from_numpy(fast.arrays[name]) for name in "USV")
    difference = u @ s.diag() @ u.T - own_u @ own_s.diag() @ own_v
    return float(torch.linalg.matrix_norm(difference, 2) / s[0])


def forward_passes(lm, batches: list[list[Encoded]]) -> None:
    use_attention(lm, "sdpa")
    with torch.no_grad():
        for batch in batches:
            lm(ids_and_lengths(batch)[0], use_cache=False, logits_to_keep=1)


def bench(name: str, lm, tokenizer, layer: int, encoded: list[Encoded], settings: Settings) -> dict:
    path, module = list(decoder_layers(lm).items())[layer]
    subject = compute_fisher.Subject(lm, tokenizer, path, module)
    plan = plan_batches([len(e.ids) for e in encoded], settings.batch_size)
    batches = [[encoded[i] for i in batch] for batch in plan]
    depth = lm.config.num_hidden_layers
    passes = 1 + settings.top_k_tokens * (depth - 1 - layer) / depth

    total = dict.fromkeys(("this", "forward", "plain, weights frozen", "plain, as loaded"), 0.0)

    def timed(label: str, function):
        taken, result = seconds(function)
        total[label] += taken
        return result

    def this(batch: list[Encoded], folder: str) -> list[Item]:
        found = compute_fisher.measure(settings, subject, batch)
        write_items(Path(folder) / "batch.npz", found)
        return found

    def loop(batch: list[Encoded]) -> list:
        use_attention(lm, "sdpa")  # transformers' default
        return [plain(lm, module, e.ids, settings.top_k_tokens, settings.num_singular_values) for e in batch]

    forward_passes(lm, batches[-1:])  # the first pass pays for what later ones do not
    compute_fisher.measure(settings, subject, batches[-1])
    fast, slow = [], []
    with tempfile.TemporaryDirectory() as folder:
        for batch in tqdm(batches, desc=name):  # batch by batch, in turns: the machine's speed drifts
            timed("forward", lambda batch=batch: forward_passes(lm, [batch]))
            fast += timed("this", lambda batch=batch: this(batch, folder))
            timed("forward", lambda batch=batch: forward_passes(lm, [batch]))
            slow += timed("plain, weights frozen", lambda batch=batch: loop(batch))
            lm.requires_grad_(True)
            timed("plain, as loaded", lambda batch=batch: loop(batch))
            lm.requires_grad_(False)
            lm.zero_grad()
        last = batches[-2:]
        theirs = seconds(lambda: [shared(lm, module, batch, settings.top_k_tokens) for batch in last])[0]
        ours_on_last = seconds(lambda: [this(batch, folder) for batch in last])[0]
    ours, frozen, unfrozen = (total[label] for label in ("this", "plain, weights frozen", "plain, as loaded"))
    floor = passes * total.pop("forward") / 2
    error = max(compare(a, b) for a, b in zip(slow, fast, strict=True))
    if error > 1e-3:
        sys.exit(f"{name}: the two differ by {error:.1e} of the largest singular value")
    row = {
        "prompts": len(encoded), "tokens": sum(len(e.ids) for e in encoded), "batches": len(batches),
        "layer": layer, "depth": depth, "hidden_size": lm.config.hidden_size,
        "seconds": {**total, "floor": floor},
        "times_floor": ours / floor, "times_faster_than_plain_as_loaded": unfrozen / ours,
        "times_faster_than_plain_frozen": frozen / ours, "times_faster_than_shared": theirs / ours_on_last,
        "largest_difference": error,
    }  # fmt: skip
    show(name, row)
    return row


# What is timed by `bench_last`: settings, for prompts of 70 to 130 tokens at two thirds of the depth.
LAST = {
    "last, 30 tokens": {"bias_positions": "last"},
    "last, 200 tokens": {"bias_positions": "last", "top_k_tokens": 200},
    "last, all tokens, r = 10": {"bias_positions": "last", "top_k_tokens": "all", "num_singular_values": 10},
    "last, all tokens, r = 30": {"bias_positions": "last", "top_k_tokens": "all"},
    "last, 30 tokens, answers of 16": {"bias_positions": "last", "answer_tokens": 16},
    "all positions, 30 tokens": {},
    "all positions, 30 tokens, answers of 16": {"answer_tokens": 16},
}


def bench_last(lm, tokenizer, encoded: list[Encoded], layer: int, repeats: int = 3) -> dict:
    """Medians, in plain forward passes over the same batches."""
    base = Settings(top_k_tokens=30, num_singular_values=30)
    subject = compute_fisher.Subject(lm, tokenizer, *list(decoder_layers(lm).items())[layer])
    encoded = [e for e in encoded if 70 <= len(e.ids) <= 130]
    batches = [[encoded[i] for i in batch] for batch in plan_batches([len(e.ids) for e in encoded], base.batch_size)]

    def measuring(settings: Settings) -> Callable:
        return lambda: [compute_fisher.measure(settings, subject, batch) for batch in batches]

    timed = {label: measuring(replace(base, **options)) for label, options in LAST.items()}
    taken = in_turns({"forward": lambda: forward_passes(lm, batches), **timed}, repeats)
    forward = taken.pop("forward")
    row = {
        "prompts": len(encoded), "tokens": sum(len(e.ids) for e in encoded), "layer": layer, "forward_seconds": forward,
        "forward_passes": {label: duration / forward for label, duration in taken.items()},
    }  # fmt: skip
    show("plain forward passes", row)
    return row


def peak_memory(prompts: int) -> float:
    """Peak resident memory in MB of compute_fisher.py over short prompts, at the last layer, where a pass is cheap."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "short.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"What is {i} plus {i % 7}?"}) + "\n" for i in range(prompts)))
        command = [sys.executable, str(ROOT / "compute_fisher.py"), "--dataset-name", str(data), "--num-prompts"]
        command += [str(prompts), "--hook-layer-name", "29", "--output-dir", f"{folder}/out"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:  # what `wait4` returns counts this process's own memory in
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) for line in status if line.startswith("VmHWM"))])
            time.sleep(0.1)
        if process.returncode:
            sys.exit("compute_fisher.py failed")
        return peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--wide-prompts", type=int, default=8)
    parser.add_argument(
        "--only", choices=["embedded", "wide", "memory", "last"], nargs="+", default=["embedded", "wide", "memory"]
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    settings = Settings(batch_size=8, top_k_tokens=10, num_singular_values=10)
    path = ROOT / "benchmarks" / "results" / "bench_pipeline.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "transformers": transformers.__version__,
        "threads": torch.get_num_threads(), "processor": cpu(), "settings": "batch 8, k = 10, r = 10, float32",
    }  # fmt: skip

    def keep(name: str, measured: dict) -> None:
        results[name] = {**about, **measured}
        write_json(path, results)

    lm, tokenizer, _ = embedded()
    bundled = list(Prompts(str(ROOT / "data" / "prompts.jsonl")))[: args.num_prompts]
    encoded = [encode(tokenizer, prompt, 2048) for prompt in bundled]
    if "embedded" in args.only:
        keep("embedded", bench("SmolLM2-135M, layer 15 of 30", lm, tokenizer, 15, encoded, settings))
    if "last" in args.only:
        keep("last", {**bench_last(lm, tokenizer, encoded, 20), "settings": "batch 8, k = 30, r = 30, float32"})
    del lm
    if "wide" in args.only:
        config = transformers.LlamaConfig(**WIDE)
        wide = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        few = [Encoded(e.prompt, [t % WIDE["vocab_size"] for t in e.ids[:128]], True) for e in encoded]
        few = few[: args.wide_prompts]
        keep("wide", bench("random weights, d = 2048, layer 1 of 4", wide, tokenizer, 1, few, settings))
        del wide
    if "memory" in args.only:
        peak = {str(n): peak_memory(n) for n in (200, 2000)}
        show("peak memory, MB", peak)
        keep("memory", {"peak_mb": peak})


if __name__ == "__main__":
    main()
