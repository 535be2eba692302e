"""What the benchmarks share: the sentences, the machine, and where figures are written."""

import json
from pathlib import Path
import platform
import sys
import time

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import models
import reading
import sentences
import torch

import core_experiment


def seconds(function) -> tuple[float, object]:
    """How long function() takes, and what it returns."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def diverse_contexts(model: reading.Model, count: int) -> list[sentences.Context]:
    """The experiment's first `count` sentences."""
    args = core_experiment.parse_args([])
    texts = sentences.read_sentences(str(ROOT / core_experiment.BUNDLED), args.target_word)
    contexts = core_experiment.locate_all(args, model, texts)
    order = sentences.diverse_order([context.prompt for context in contexts])
    return [contexts[index] for index, _ in zip(order, range(count), strict=False)]


def machine(lm: torch.nn.Module) -> dict:
    """Device and versions."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": cpu(), "threads": torch.get_num_threads(), **gpu, **models.describe(lm)}


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(name: str, script: str, figures: dict) -> Path:
    """Writes figures to benchmarks/results/NAME.json, with the command and the date."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = {"command": f"python benchmarks/{Path(script).name}", "date": time.strftime("%Y-%m-%d"), **figures}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
