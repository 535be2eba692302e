"""The whole protocol at the size of Llama-3.1-8B, and the pipeline at 1B, with random weights: nothing is downloaded.

    python benchmarks/bench_gpu.py                  on a GPU with 24 GB or more
    python benchmarks/bench_gpu.py --shape tiny     anywhere, in seconds: does the script work?

protocol   20 sentences x 8 layers x 11 scales with two controls, k = 200 and the whole vocabulary: seconds,
           peak memory above the weights, and how often the sweep made the host wait
naive      one sentence at one layer: a backward call a token, d x d F, eigh, a forward pass a scale; times
           sentences and layers (extrapolated)
floor      by stage, the larger of FLOPs at the measured speed of a matrix product and bytes of weights at the
           measured bandwidth
pipeline   prompts a second at layer 8 of 16, k = 10, and the share of the matrix product's speed (MFU)
agreement  lambda and |cos| of half precision against float32 on a small random model and on the embedded one

Every warning is an error: a Python loop in place of a batched backward pass would announce itself as one.
Results go to benchmarks/results/bench_gpu.json (--output).
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import time
import warnings

import head
from prompts import Encoded, Prompt
import pushes
import reading
import sentences
from settings import Settings
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from common import diverse_contexts, machine, seconds, synchronize
import compute_fisher
import core_experiment
import fisher

GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, **GROUPED},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, **GROUPED},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, **GROUPED, "vocab_size": 32000},
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    },
}  # fmt: skip
PROMPT_TOKENS = 20


def build(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape], dtype=dtype), dtype=dtype)
    return lm.eval().requires_grad_(False)


def weights(lm: nn.Module) -> int:
    """Of the layers, which every token goes through."""
    return sum(p.numel() for p in lm.model.layers.parameters())


def random_ids(lm: nn.Module, tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lm.config.vocab_size, (tokens,), generator=generator).tolist()


# --- the experiment --------------------------------------------------------------------------------


def protocol(args: argparse.Namespace, model: reading.Model, count: int) -> dict:
    """Every sentence through core_experiment.perturb, as the script takes them; after one to warm up."""
    ids = [random_ids(model.lm, PROMPT_TOKENS, seed) for seed in range(count)]
    contexts = [sentences.Context("", "", prompt, 0) for prompt in ids]
    batches = core_experiment.Batches.of(args.batch_size)

    def run(contexts: list[sentences.Context], clock: core_experiment.Clock) -> None:
        chosen, readings = [], []
        for context in contexts:
            with clock("prefix"):
                readings.append(reading.read(model, context))
            chosen.append(core_experiment.Chosen(context, readings[-1].point.activations, 0.0, 0))
        for index, context in enumerate(contexts):
            controls = core_experiment.control_directions(args, model.layers, index, chosen)
            core_experiment.perturb(args, model, context, readings[index], controls, batches, clock)
            readings[index] = None

    clock = core_experiment.Clock()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(contexts[:1], core_experiment.Clock())
        memory = Memory()
        duration, _ = seconds(lambda: run(contexts, clock))
    return {
        "seconds": duration,
        **memory.above(),
        "stages_s": clock.seconds,
        "host_waits_in_a_sweep": waits_in_a_sweep(lambda: run(contexts[:1], core_experiment.Clock())),
    }


class Memory:
    """Of the GPU: how far its use rose above what it is now."""

    def __init__(self):
        if torch.cuda.is_available():
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def above(self) -> dict[str, float]:
        if not torch.cuda.is_available():
            return {}
        return {"peak_gb_above_weights": (torch.cuda.max_memory_allocated() - self.before) / 1e9}


def waits_in_a_sweep(run: Callable[[], None]) -> int | None:
    """How often the host waits for the GPU while `run` is in pushes.sweep; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    sweep, waits = pushes.sweep, 0

    def watched(*arguments, **options) -> pushes.Sweep:
        nonlocal waits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return sweep(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits += sum("synchroniz" in str(warning.message) for warning in caught)

    pushes.sweep = watched
    try:
        run()
    finally:
        pushes.sweep = sweep
    return waits


def naive(lm: nn.Module, layer: nn.Module, ids: Tensor, k: int, scales: int) -> None:
    """The protocol as it reads, at one layer of one sentence."""
    bias = torch.zeros(lm.config.hidden_size, dtype=lm.dtype, device=lm.device, requires_grad=True)
    shift = {"by": bias}
    handle = layer.register_forward_hook(lambda module, args, h: torch.cat([h[:, :-1], h[:, -1:] + shift["by"]], 1))
    try:
        log_probs = lm(ids[None]).logits[0, -1].float().log_softmax(-1)
        top = log_probs.topk(k)
        gradients = torch.stack([torch.autograd.grad(lp, bias, retain_graph=True)[0] for lp in top.values]).float()
        values, vectors = torch.linalg.eigh(gradients.T @ (top.values.detach().exp()[:, None] * gradients))
        with torch.no_grad():
            for scale in range(1, scales + 1):
                shift["by"] = (scale * values[-1].rsqrt() * vectors[:, -1]).to(lm.dtype)
                log_q = lm(ids[None]).logits[0, -1].float().log_softmax(-1)
                float((log_probs.exp() * (log_probs - log_q)).sum())
    finally:
        handle.remove()


def speed_of_light(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product, in the model's dtype and in float32, and bytes/s of reading memory."""
    size = 8192 if device.startswith("cuda") else 1024

    def best(function) -> float:
        function()
        return min(seconds(function)[0] for _ in range(5))

    flops = {}
    for name, kind in (("model", dtype), ("float32", torch.float32)):
        a = torch.randn(size, size, device=device, dtype=kind)
        flops[name] = 2 * size**3 / best(lambda: a @ a)  # noqa: B023
    block = torch.randn(64 * size * 64, device=device)
    return {"flops": flops["model"], "flops_float32": flops["float32"], "bytes": 4 * block.numel() / best(block.sum)}


def floor(args: argparse.Namespace, model: reading.Model, peak: dict[str, float]) -> float:
    """Seconds that one sentence's passes take at the measured speeds."""
    lm, d, vocabulary = model.lm, model.lm.config.hidden_size, model.lm.config.vocab_size
    depth, n = lm.config.num_hidden_layers, weights(lm)
    size = lm.dtype.itemsize

    def stage(flops: float, bytes_: float) -> float:
        return max(flops / peak["flops"], bytes_ / peak["bytes"])

    deepest = (depth - 1 - model.layers[0]) / depth
    rows = d if args.max_vocab_subset == "all" else args.max_vocab_subset
    per_layer = 3 * sum(map(bool, args.scales))  # pushes along v and two controls
    travelled = sum((depth - 1 - layer) / depth * per_layer for layer in model.layers)
    head_bytes = size * vocabulary * d
    total = stage(2 * n * (PROMPT_TOKENS - 1), n * size)  # prefix
    total += stage(2 * n + 2 * vocabulary * d, n * size + head_bytes)  # linearisation
    total += stage(2 * n * deepest * rows, n * deepest * size)  # gradients
    total += stage(2 * n * travelled + 2 * vocabulary * d * per_layer * len(model.layers), n * size + head_bytes)
    if args.max_vocab_subset == "all":  # C and J^T C J, in float32
        total += (2 * vocabulary * d**2 + 4 * len(model.layers) * d**3) / peak["flops_float32"]
    return total


def experiment(shape: str, device: str, dtype: torch.dtype, count: int) -> dict:
    lm = build(shape, device, dtype)
    numbers = reading.choose_layers(None, lm.config.num_hidden_layers)
    model = reading.Model(lm, None, numbers, [lm.model.layers[number] for number in numbers])
    peak = speed_of_light(device, dtype)
    figures = {"machine": machine(lm), "layers": numbers, "sentences": count, "speed_of_light": peak}
    k = min(200, lm.config.vocab_size // 2)
    for label, subset in (("top-k", str(k)), ("exact", "all")):
        args = core_experiment.parse_args(["--max-vocab-subset", subset, "--scale-unit", "nats"])
        found = protocol(args, model, count)
        bound = count * floor(args, model, peak)
        figures[label] = {**found, "floor_s": bound, "share_of_floor": bound / found["seconds"]}
        print(label, {key: value for key, value in figures[label].items() if key != "stages_s"}, flush=True)
    ids = torch.tensor(random_ids(lm, PROMPT_TOKENS, 0), device=device)
    pushes_ = sum(map(bool, args.scales))
    naive(lm, model.modules[-1], ids, 2, 1)  # warm-up
    one, _ = seconds(lambda: naive(lm, model.modules[len(numbers) // 2], ids, k, pushes_))
    figures["naive_one_layer_s"] = one
    figures["naive_over_top_k"] = one * len(numbers) * count / figures["top-k"]["seconds"]
    return figures


# --- the pipeline, and precision -------------------------------------------------------------------


def pipeline(shape: str, device: str, dtype: torch.dtype, prompts: int, tokens: int, batch_size: int) -> dict:
    """Prompts a second at the middle layer, all of the same length, and MFU of the passes they need."""
    lm = build(shape, device, dtype)
    depth, n = lm.config.num_hidden_layers, weights(lm)
    hook = depth // 2
    settings = Settings(hook_layer_name=str(hook), batch_size=batch_size)

    class Decoder:
        def decode(self, ids: list[int]) -> str:
            return str(ids)

    subject = compute_fisher.Subject(lm, Decoder(), f"model.layers.{hook}", lm.model.layers[hook])
    encoded = [Encoded(Prompt(i, i, ""), random_ids(lm, tokens, i), False) for i in range(prompts)]
    batches = [encoded[i : i + batch_size] for i in range(0, prompts, batch_size)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_fisher.measure(settings, subject, batches[0])
        duration, _ = seconds(lambda: [compute_fisher.measure(settings, subject, batch) for batch in batches])
    flops = prompts * tokens * 2 * n * (1 + settings.top_k_tokens * (depth - 1 - hook) / depth)
    peak = speed_of_light(device, dtype)["flops"]
    return {
        "prompts": prompts, "tokens": tokens, "batch_size": batch_size, "layer": hook, "k": settings.top_k_tokens,
        "prompts_per_s": prompts / duration, "mfu": flops / duration / peak,
    }  # fmt: skip


def eigenpairs(lm: nn.Module, ids: list[int], k: int) -> fisher.Eigen:
    numbers = reading.choose_layers(None, lm.config.num_hidden_layers)
    model = reading.Model(lm, None, numbers, [lm.model.layers[number] for number in numbers])
    point = reading.read(model, sentences.Context("", "", ids, 0)).point
    z = head.top_k_cotangents(point, k)
    return fisher.eigenpairs(fisher.pull_back(point, z.rows), z.weights)


def agreement(models_: dict[torch.dtype, nn.Module], prompts: list[list[int]], k: int) -> dict:
    """Of lambda and |cos| with float32: medians and worst over prompts and layers."""
    truth = [eigenpairs(models_[torch.float32], ids, k) for ids in prompts]
    figures = {}
    for dtype, lm in models_.items():
        if dtype != torch.float32:
            found = [eigenpairs(lm, ids, k) for ids in prompts]
            pairs = list(zip(found, truth, strict=True))
            off = torch.cat([(a.values[:, 0] / b.values[:, 0] - 1).abs() for a, b in pairs])
            cos = torch.cat([(a.vectors[:, 0] * b.vectors[:, 0]).sum(-1).abs() for a, b in pairs])
            figures[str(dtype).removeprefix("torch.")] = {
                "lambda_off_by": {"median": float(off.median()), "worst": float(off.max())},
                "cos": {"median": float(cos.median()), "worst": float(cos.min())},
            }
    return figures


def precision(shape: str, device: str, dtypes: list[torch.dtype], embedded: bool) -> dict:
    random = {torch.float32: build(shape, device, torch.float32)}
    for dtype in dtypes:
        random[dtype] = build(shape, device, torch.float32).to(dtype)
    prompts = [random_ids(random[torch.float32], PROMPT_TOKENS, seed) for seed in range(8)]
    figures = {f"random weights, {shape}": agreement(random, prompts, min(200, SHAPES[shape]["vocab_size"] // 2))}
    if embedded:
        loaded = {
            dtype: reading.load("smollm2-135m", None, str(dtype).removeprefix("torch."), device)
            for dtype in (torch.float32, *dtypes)
        }
        prompts = [list(c.ids) for c in diverse_contexts(loaded[torch.float32], 8)]
        figures["smollm2-135m"] = agreement({dtype: model.lm for dtype, model in loaded.items()}, prompts, 200)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bench_gpu.json")
    options = parser.parse_args(argv)
    full = options.shape == "8b"
    if full and not options.device.startswith("cuda"):
        parser.error("no GPU here: --shape tiny tries the script out on the CPU")
    dtype = torch.bfloat16
    start = time.perf_counter()
    figures = {
        "command": f"python benchmarks/bench_gpu.py --shape {options.shape}",
        "date": time.strftime("%Y-%m-%d"),
        "experiment": experiment(options.shape, options.device, dtype, 20 if full else 3),
    }
    sizes = ("1b", 256, 200, 32) if full else ("tiny", 8, 12, 4)
    figures["pipeline"] = pipeline(sizes[0], options.device, dtype, *sizes[1:])
    print("pipeline", figures["pipeline"], flush=True)
    halves = [torch.bfloat16, torch.float16]
    figures["half_precision"] = precision("small" if full else "tiny", options.device, halves, embedded=full)
    print("half precision", json.dumps(figures["half_precision"]), flush=True)
    synchronize()
    figures["seconds_in_all"] = time.perf_counter() - start
    options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
