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

from measuring import Subject, diverse_contexts, machine, naive, seconds, show, synchronize
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import compute_fisher
import core_experiment
import fisher
from residual_fisher.experiment.perturbation import Sweep, control_directions
from residual_fisher.experiment.sentences import Context
from residual_fisher.model.passes import devices_of
from residual_fisher.pipeline.prompts import Encoded, Prompt
from residual_fisher.pipeline.settings import Settings

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


def protocol(settings: core_experiment.Settings, subject: Subject, count: int) -> dict:
    """Every sentence through core_experiment.perturb, as the script takes them; after one to warm up."""
    contexts = [Context("", "", random_ids(subject.lm, PROMPT_TOKENS, seed), 0) for seed in range(count)]
    batches = core_experiment.Batches(settings.batch_size)

    def run(contexts: list[Context], clock: core_experiment.Clock) -> None:
        other = None
        for index, context in enumerate(contexts):
            with clock("prefix"):
                point = subject.linearize(context)
            key = (settings.seed, index)
            controls = control_directions(point.activations, other, subject.layers, settings.num_controls, key)
            core_experiment.perturb(settings, context, point, controls, batches, clock)
            other = point.activations

    devices = devices_of(subject.lm)
    clock = core_experiment.Clock(devices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(contexts[:1], core_experiment.Clock(devices))
        memory = Memory()
        duration, _ = seconds(lambda: run(contexts, clock))
    return {
        "seconds": duration,
        **memory.above(),
        "stages_s": clock.seconds,
        "host_waits_in_a_sweep": waits_in_a_sweep(lambda: run(contexts[:1], core_experiment.Clock(devices))),
    }


class Memory:
    """Of the GPU: how far its use rose above what it is now."""

    def __init__(self):
        if torch.cuda.is_initialized():
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def above(self) -> dict[str, float]:
        if not torch.cuda.is_initialized():
            return {}
        return {"peak_gb_above_weights": (torch.cuda.max_memory_allocated() - self.before) / 1e9}


def waits_in_a_sweep(run: Callable[[], None]) -> int | None:
    """How often the host waits for the GPU while `run` is in the sweep; None without a GPU."""
    if not torch.cuda.is_initialized():
        return None
    sweep, waits = core_experiment.sweep, 0

    def watched(*arguments, **options) -> Sweep:
        nonlocal waits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return sweep(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits += sum("synchroniz" in str(warning.message) for warning in caught)

    core_experiment.sweep = watched
    try:
        run()
    finally:
        core_experiment.sweep = sweep
    return waits


def speed_of_light(shape: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product, in the model's dtype and in float32, and bytes/s of reading memory."""
    size = 1024 if shape == "tiny" else 8192

    def best(function) -> float:
        function()
        return min(seconds(function)[0] for _ in range(5))

    flops = {}
    for name, kind in (("model", dtype), ("float32", torch.float32)):
        a = torch.randn(size, size, device=device, dtype=kind)
        flops[name] = 2 * size**3 / best(lambda: a @ a)  # noqa: B023
    block = torch.randn(64 * size * 64, device=device)
    return {"flops": flops["model"], "flops_float32": flops["float32"], "bytes": 4 * block.numel() / best(block.sum)}


def floor(settings: core_experiment.Settings, subject: Subject, peak: dict[str, float]) -> float:
    """Seconds that one sentence's passes take at the measured speeds."""
    lm, d, vocabulary = subject.lm, subject.lm.config.hidden_size, subject.lm.config.vocab_size
    depth, n = lm.config.num_hidden_layers, weights(lm)
    size = lm.dtype.itemsize

    def stage(flops: float, bytes_: float) -> float:
        return max(flops / peak["flops"], bytes_ / peak["bytes"])

    deepest = (depth - 1 - subject.layers[0]) / depth
    rows = d if settings.max_vocab_subset == "all" else settings.max_vocab_subset
    per_layer = 3 * sum(map(bool, settings.scales))  # along v and two controls
    travelled = sum((depth - 1 - layer) / depth * per_layer for layer in subject.layers)
    head_bytes = size * vocabulary * d
    total = stage(2 * n * (PROMPT_TOKENS - 1), n * size)  # prefix
    total += stage(2 * n + 2 * vocabulary * d, n * size + head_bytes)  # linearisation
    total += stage(2 * n * deepest * rows, n * deepest * size)  # gradients
    total += stage(2 * n * travelled + 2 * vocabulary * d * per_layer * len(subject.layers), n * size + head_bytes)
    if settings.max_vocab_subset == "all":  # C and J^T C J, in float32
        total += (2 * vocabulary * d**2 + 4 * len(subject.layers) * d**3) / peak["flops_float32"]
    return total


def experiment(shape: str, device: str, dtype: torch.dtype, count: int) -> dict:
    lm = build(shape, device, dtype)
    layers = list(core_experiment.choose_layers(None, lm.config.num_hidden_layers))
    subject = Subject(lm, None, layers)
    peak = speed_of_light(shape, device, dtype)
    figures = {"machine": machine(lm), "layers": layers, "sentences": count, "speed_of_light": peak}
    k = min(200, lm.config.vocab_size // 2)
    for label, subset in (("top-k", str(k)), ("exact", "all")):
        words = ["--max-vocab-subset", subset, "--scale-unit", "nats", "--num-sentences", str(count)]
        settings = core_experiment.parse([*words, "--layers", *map(str, layers)])
        found = protocol(settings, subject, count)
        bound = count * floor(settings, subject, peak)
        figures[label] = {**found, "floor_s": bound, "share_of_floor": bound / found["seconds"]}
        show(label, figures[label])
    ids = torch.tensor(random_ids(lm, PROMPT_TOKENS, 0), device=device)
    scales = [scale for scale in settings.scales if scale]
    naive(lm, lm.model.layers[layers[-1]], ids, 2, scales[:1])  # warm-up
    one, _ = seconds(lambda: naive(lm, lm.model.layers[layers[len(layers) // 2]], ids, k, scales))
    figures["naive_one_layer_s"] = one
    figures["naive_over_top_k"] = one * len(layers) * count / figures["top-k"]["seconds"]
    return figures


# --- the pipeline, and precision -------------------------------------------------------------------


def pipeline(shape: str, device: str, dtype: torch.dtype, prompts: int, tokens: int, batch_size: int) -> dict:
    """Prompts a second at the middle layer, all of the same length, and MFU of the passes they need."""
    lm = build(shape, device, dtype)
    depth, n = lm.config.num_hidden_layers, weights(lm)
    hook = depth // 2
    settings = Settings(hook_layer_name=str(hook), batch_size=batch_size)

    class Numbers:
        """A tokenizer for random weights."""

        def decode(self, ids: list[int], **_) -> str:
            return str(ids)

        def convert_ids_to_tokens(self, token: int) -> str:
            return str(token)

    subject = compute_fisher.Subject(lm, Numbers(), f"model.layers.{hook}", lm.model.layers[hook])
    encoded = [Encoded(Prompt(i, i, ""), random_ids(lm, tokens, i), False) for i in range(prompts)]
    batches = [encoded[i : i + batch_size] for i in range(0, prompts, batch_size)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_fisher.measure(settings, subject, batches[0])
        duration, _ = seconds(lambda: [compute_fisher.measure(settings, subject, batch) for batch in batches])
    flops = prompts * tokens * 2 * n * (1 + settings.top_k_tokens * (depth - 1 - hook) / depth)
    peak = speed_of_light(shape, device, dtype)["flops"]
    return {
        "prompts": prompts, "tokens": tokens, "batch_size": batch_size, "layer": hook, "k": settings.top_k_tokens,
        "prompts_per_s": prompts / duration, "mfu": flops / duration / peak,
    }  # fmt: skip


def eigenpairs(lm: nn.Module, ids: list[int], k: int) -> fisher.Eigenpairs:
    layers = core_experiment.choose_layers(None, lm.config.num_hidden_layers)
    return fisher.top_k(fisher.linearize(lm, ids, layers), k).eigenpairs()


def agreement(models: dict[torch.dtype, nn.Module], prompts: list[list[int]], k: int) -> dict:
    """Of lambda and |cos| with float32: medians and worst over prompts and layers."""
    truth = [eigenpairs(models[torch.float32], ids, k) for ids in prompts]
    figures = {}
    for dtype, lm in models.items():
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
            dtype: embedded(dtype=str(dtype).removeprefix("torch."), device=device)
            for dtype in (torch.float32, *dtypes)
        }
        prompts = [c.ids for c in diverse_contexts(loaded[torch.float32], 8)]
        figures["smollm2-135m"] = agreement({dtype: subject.lm for dtype, subject in loaded.items()}, prompts, 200)
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
    if torch.device(options.device).type == "cuda":  # the one whose time and memory are measured
        torch.cuda.set_device(torch.device(options.device).index or 0)
    dtype = torch.bfloat16
    start = time.perf_counter()
    figures = {
        "command": f"python benchmarks/bench_gpu.py --shape {options.shape}",
        "date": time.strftime("%Y-%m-%d"),
        "experiment": experiment(options.shape, options.device, dtype, 20 if full else 3),
    }
    sizes = ("1b", 256, 200, 32) if full else ("tiny", 8, 12, 4)
    figures["pipeline"] = pipeline(sizes[0], options.device, dtype, *sizes[1:])
    show("pipeline", figures["pipeline"])
    halves = [torch.bfloat16, torch.float16]
    figures["half_precision"] = precision("small" if full else "tiny", options.device, halves, embedded=full)
    show("half precision", figures["half_precision"])
    synchronize()
    figures["seconds_in_all"] = time.perf_counter() - start
    options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
