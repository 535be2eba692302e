"""The benchmarks: all of them import, and the one that needs a GPU runs at a tiny shape on the CPU."""

import importlib
import json

import pytest

from scripts import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_fits_the_modules_it_measures(name):
    importlib.import_module(name)


def test_bench_gpu_at_a_tiny_shape_writes_what_it_says_it_does(tmp_path):
    output = tmp_path / "figures.json"
    importlib.import_module("bench_gpu").main(["--shape", "tiny", "--device", "cpu", "--output", str(output)])
    figures = json.loads(output.read_text())
    for label in ("top-k", "exact"):
        found = figures["experiment"][label]
        assert found["floor_s"] > 0 and found["seconds"] > 0
        assert set(found["stages_s"]) == {"prefix", "gradients", "eigen", "sweep"}
    assert figures["experiment"]["naive_over_top_k"] > 0
    assert figures["pipeline"]["mfu"] > 0
    for half in figures["half_precision"]["random weights, tiny"].values():
        assert half["lambda_off_by"]["median"] < 0.05


def test_bench_gpu_without_one_is_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("bench_gpu").main(["--device", "cpu", "--output", str(tmp_path / "figures.json")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--shape tiny tries the script out on the CPU")
