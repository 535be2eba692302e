"""Both command lines on tiny models, and what they wrote."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
import importlib
import json
import multiprocessing
import os
from pathlib import Path
import runpy
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from residual_fisher.common import drawing

ROOT = Path(__file__).parent.parent
drawing.DPI = 50  # of the hundreds of pictures that runs draw, also in processes of their own; see test_figures.py


@contextmanager
def calls_of(
    owner: object, name: str, error: type[BaseException] | BaseException | None = None, at: Container[int] | None = None
) -> Iterator[list[tuple]]:
    """Gives a list that takes the arguments of each call of `owner.name` until the block ends.

    Args:
        error: raised instead of the call itself, where it is given.
        at: in these calls alone, counted from 1.
    """
    calls, function = [], getattr(owner, name)

    def call(*arguments, **options):
        calls.append(arguments)
        if error is not None and (at is None or len(calls) in at):
            raise error
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


class Stopped(BaseException):
    """For `calls_of`: what no program handles, like a kill."""


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files of a folder, and None for each folder in it."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run(script: str, words: list[str]) -> int:
    """The exit code of a script's `main`."""
    module = importlib.import_module(script)
    return module.main(module.parse(words))


# --- core_experiment.py --------------------------------------------------------------------------

EXPERIMENT_FILES = {
    "items",
    "experiment_results.json",
    "fisher_eigenvectors.npz",
    "fisher_similarity_matrix.png",
    "perturbation_analysis.png",
    "report.html",
}
EXPERIMENT_OPTIONS = ["--num-sentences", "4", "--max-vocab-subset", "30", "--num-controls", "2", "--device", "cpu"]


def experiment_words(model: Path, output: Path, *words: str) -> list[str]:
    return ["--model-name", str(model), "--output-dir", str(output), *EXPERIMENT_OPTIONS, *words]


def core_experiment(model: Path, output: Path, *words: str) -> int:
    return run("core_experiment", experiment_words(model, output, *words))


def experiment_results(output: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(output / "fisher_eigenvectors.npz", allow_pickle=False) as arrays:
        return json.loads((output / "experiment_results.json").read_text()), dict(arrays)


def assert_same_experiment(output: Path, expected: Path) -> None:
    """All files, byte for byte, but for what the options and the clock say."""
    for name in EXPERIMENT_FILES - {"experiment_results.json", "items"}:
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    documents = []
    for path in (output, expected):
        document, _ = experiment_results(path)
        assert document.pop("timings") and document["experiment_config"].pop("output_dir")
        documents.append(json.dumps(document))
    assert documents[0] == documents[1]
    assert set(os.listdir(output)) == EXPERIMENT_FILES and os.listdir(output / "items") == ["run.json"]


def slow_sentences() -> None:
    """For `start`: the experiment takes 0.1 s more for each sentence."""
    import core_experiment

    perturb = core_experiment.measure_sentence
    core_experiment.measure_sentence = lambda *arguments: (time.sleep(0.1), perturb(*arguments))[1]


# --- compute_fisher.py ---------------------------------------------------------------------------

PIPELINE_FILES = {
    "items", "fisher_matrices_compressed.npz", "fisher_spectra.png", "metadata.yaml", "prompts.jsonl", "report.html",
}  # fmt: skip
PIPELINE_OPTIONS = {
    "hook-layer-name": "1", "top-k-tokens": "6", "num-singular-values": "4", "batch-size": "2",
    "num-prompts": "40", "device": "cpu",
}  # fmt: skip


def pipeline_words(model: Path, dataset: Path, output: Path, **options) -> list[str]:
    """Options are flags, those that are True without a value."""
    given = {**PIPELINE_OPTIONS, **{key.replace("_", "-"): value for key, value in options.items()}}
    given = {"model-path": model, "dataset-name": dataset, "output-dir": output, **given}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))[: 1 if value is True else 2]]


def compute_fisher(model: Path, dataset: Path, output: Path, **options) -> int:
    return run("compute_fisher", pipeline_words(model, dataset, output, **options))


def arrays(output: Path) -> dict[str, np.ndarray]:
    with np.load(output / "fisher_matrices_compressed.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def records(output: Path, timings: bool = False) -> list[dict]:
    found = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    return found if timings else [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def assert_same_results(output: Path, expected: Path):
    ours, theirs = arrays(output), arrays(expected)
    assert list(ours) == list(theirs)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert records(output) == records(expected)
    assert {path.name for path in output.iterdir()} == PIPELINE_FILES
    assert {path.name for path in (output / "items").iterdir()} == {"run.json", "records.jsonl"}


# --- as a program --------------------------------------------------------------------------------


def as_program(script: str, words: list[str]) -> int:
    """What `python SCRIPT WORDS` does, without starting an interpreter; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    return end.value.code


# --- as a process --------------------------------------------------------------------------------

# A server that has imported the slow libraries, from which every process of a script is forked.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "transformers", "datasets", "matplotlib.pyplot", "scipy.sparse.linalg"])


class Running(NamedTuple):
    """A script that runs as a process of its own."""

    process: multiprocessing.Process
    stderr: Path

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns while the process runs, as soon as the condition holds."""
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            assert self.process.is_alive(), self.stderr.read_text()
            time.sleep(0.01)
        assert condition() and self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """To the process, if it has not ended."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Its exit code (minus a signal's number), and what it wrote to stderr."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode, self.stderr.read_text()


def start(script: str, words: list[str], output: Path, slow_down: Callable[[], None]) -> Running:
    """Starts a script after `slow_down` (a function of a module), so that a signal can meet it anywhere."""
    stderr = output.with_name(f"{output.name}.stderr")
    process = _processes.Process(target=_child, args=(script, words, stderr, slow_down))
    process.start()
    return Running(process, stderr)


def _child(script: str, words: list[str], stderr: Path, slow_down: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(stderr, "w") as file, open(os.devnull, "w") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    module = importlib.import_module(script)
    slow_down()
    settings = module.parse(words)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(module.main(settings))
