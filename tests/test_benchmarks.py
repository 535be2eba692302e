"""The benchmark that needs a GPU, at a tiny shape on the CPU: it runs, and writes what it says it does."""

import json
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parent.parent


def test_bench_gpu_at_a_tiny_shape(tmp_path):
    output = tmp_path / "figures.json"
    script = ROOT / "benchmarks" / "bench_gpu.py"
    command = [sys.executable, str(script), "--shape", "tiny", "--device", "cpu", "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads(output.read_text())
    for label in ("top-k", "exact"):
        found = figures["experiment"][label]
        assert 0 < found["floor_s"] < found["seconds"]
        assert set(found["stages_s"]) == {"prefix", "gradients", "eigen", "sweep"}
    assert figures["experiment"]["naive_over_top_k"] > 0
    assert 0 < figures["pipeline"]["mfu"] < 1
    for half in figures["half_precision"]["random weights, tiny"].values():
        assert half["lambda_off_by"]["median"] < 0.05


def test_bench_gpu_without_one_is_a_line(tmp_path):
    script = ROOT / "benchmarks" / "bench_gpu.py"
    command = [sys.executable, str(script), "--device", "cpu", "--output", str(tmp_path / "figures.json")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].endswith("--shape tiny tries the script out on the CPU")
