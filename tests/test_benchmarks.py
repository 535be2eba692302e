"""The benchmarks: all of them import, and the one that needs a GPU runs at a tiny shape on the CPU."""

import importlib
import json
import warnings

import pytest
import torch

from scripts import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_fits_the_modules_it_measures(name):
    importlib.import_module(name)


# --- bench_gpu.py --------------------------------------------------------------------------------


@pytest.fixture
def bench_gpu(on_path):
    return importlib.import_module("bench_gpu")


@pytest.fixture
def run(bench_gpu, tmp_path):
    """Runs stages at the tiny shape; their lines."""

    def run(*words: str) -> list[dict]:
        output = tmp_path / "figures.jsonl"
        bench_gpu.main(["--shape", "tiny", "--device", "cpu", "--output", str(output), *words])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


@pytest.mark.long
def test_every_stage_succeeds_at_a_tiny_shape(bench_gpu, run):
    lines = run()
    assert [line["stage"] for line in lines] == [name for name, *_ in bench_gpu.STAGES]
    assert [line for line in lines if "errors" in line or "skipped" in line] == []
    assert not any("not begun" in str(line["result"]) for line in lines)
    found = {line["stage"]: line["result"] for line in lines}
    assert found["cuda tests"]["tests"]["exit_code"] == 0
    for label in ("top-k", "exact"):
        assert set(found["experiment"][label]["stages_s"]) == {"prefix", "gradients", "eigen", "sweep"}
        assert len(found["experiment"][label]["each_s"]) == 2
    assert len(found["experiment"]["profile, exact"]["kernels"]) == 12
    for label, figures in found["pipeline"].items():
        if label.startswith("prompts of"):
            assert figures["mfu"] > 0 and figures["prompts"] in (6, 8)
    assert all(figures["bit_equal"] for figures in found["determinism"].values())
    off = {
        name: max(figures["eigenvalues_off_by_median"])
        for name, figures in found["precision"]["random weights"].items()
    }
    assert off["float32"] < 1e-5 < off["float16"] < off["bfloat16"] < 0.1
    assert found["out of memory"]["a batch"]["halvings"] == ["out of memory: going on with batches of 2"]
    assert found["out of memory"]["a batch"]["bit_equal_to_batches_of_half_the_size"]


def test_a_part_that_fails_is_recorded_and_the_next_ones_run(bench_gpu, run, monkeypatch):
    def fails(*_):
        raise ValueError("first line\nsecond line")

    def fails_outside_of_its_parts(bench):
        bench.part("first", fails)
        bench.part("second", dict)
        fails()

    stages = [("a", 10, fails_outside_of_its_parts), ("b", 10, lambda bench: bench.part("third", dict, {"x": 1}))]
    monkeypatch.setattr(bench_gpu, "STAGES", stages)
    first, second = run()
    assert first["errors"] == dict.fromkeys(("first", "stage"), "ValueError: first line")
    assert first["result"] == {"second": {}} and second["result"] == {"third": {"x": 1}}


def test_a_stage_that_takes_too_long_is_interrupted_and_one_without_time_is_skipped(bench_gpu, run, monkeypatch):
    def hangs():
        while True:
            pass

    def slow(bench):
        bench.part("endless", hangs)
        bench.part("next", dict)

    monkeypatch.setattr(bench_gpu, "STAGES", [("a", 0.2, slow), ("b", 30, slow)])
    first, second = run("--minutes", "0.01")
    assert first["errors"]["endless"].startswith("OutOfTime: interrupted")
    assert first["result"] == {"next": "not begun: the stage's time was used up"}
    assert second["skipped"].endswith("s were left of 0.01 minutes, and it may take 30")


def test_warnings_are_counted_by_the_line_of_the_project_that_is_running(bench_gpu, run, monkeypatch):
    from residual_fisher.model.passes import Chunks

    def waits(_):
        warnings.warn(bench_gpu.SYNCHRONIZED, stacklevel=1)
        warnings.warn("another", stacklevel=1)

    def counted():
        with bench_gpu.host_waits(bench_gpu.CPU, lambda: "sweep") as found:
            Chunks(2).map(waits, torch.arange(5))
        return dict(found)

    monkeypatch.setattr(bench_gpu, "STAGES", [("a", 10, lambda bench: bench.part("waits", counted))])
    (line,) = run()
    ((place, count),) = line["result"]["waits"].items()
    assert place.startswith("sweep: tests/test_benchmarks.py:") and place.endswith(" waits") and count == 3
    ((place, count),) = line["warnings"].items()
    assert place.startswith("another @ tests/test_benchmarks.py:") and count == 3


def test_bench_gpu_without_one_is_a_line(bench_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_gpu.main(["--device", "cpu", "--output", str(tmp_path / "figures.jsonl")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--shape tiny tries the script out on the CPU")
