"""Random faults, several in a row, and then the same command: it ends as if nothing had happened.

Each seed is a story of one to three faults. `pytest -m long` tells one of each script; `python tests/faults.py` tells
hundreds.
"""

from collections.abc import Callable
from functools import partial
import json
import os
from pathlib import Path
import random
import resource
import signal
import sys
import time

import pytest

from residual_fisher.common.lock import LOCK
from residual_fisher.common.run import ITEMS, MANIFEST, read_manifest
import scripts

SEEDS = range(int(os.environ.get("FAULT_SEEDS", "1")))
LOG = os.environ.get("FAULT_LOG")  # a file that takes a line of JSON for each fault
LONGEST = {"compute_fisher": 3.0, "core_experiment": 2.5}  # seconds that a run takes


class Story:
    """One script, its command, and what happens to its output directory."""

    def __init__(self, script: str, words: list[str], output: Path, seed: int):
        self.script, self.words, self.output = script, words, output
        self.random = random.Random(seed)

    def start(self, meanwhile: Callable[[], None], name: str = "out") -> scripts.Running:
        return scripts.start(self.script, self.words, self.output.with_name(name), meanwhile)

    def wait_for_work(self, running: scripts.Running) -> None:
        while running.process.is_alive() and not (self.output / LOCK).exists():
            time.sleep(0.01)

    def wait(self, running: scripts.Running) -> None:
        """Until some moment of the run's work."""
        self.wait_for_work(running)
        time.sleep(self.random.uniform(0, LONGEST[self.script]))

    def a_file(self) -> Path | None:
        files = sorted(path for path in self.output.rglob("*") if path.is_file()) if self.output.exists() else []
        return self.random.choice(files) if files else None


# --- the faults: each returns what was seen ------------------------------------------------------


def outcome(running: scripts.Running, *codes: int) -> str:
    """Success, or one line of the script's own; anything else is an error."""
    code, said = running.end()
    lines = [line for line in said.splitlines() if ": error: " in line]
    assert "Traceback" not in said, said
    assert code in (0, *codes), (code, said)
    assert len(lines) == (code == 2), said
    return lines[0].partition(": error: ")[2] if lines else f"exit code {code}"


def killed(story: Story) -> str:
    running = story.start(slow_writes)
    story.wait(running)
    running.send(signal.SIGKILL)
    return "killed" if running.end()[0] == -signal.SIGKILL else "finished before"


def interrupted(story: Story) -> str:
    running = story.start(slow_writes)
    story.wait(running)
    running.send(signal.SIGINT)
    return outcome(running, 130)


def started_twice(story: Story) -> str:
    first = story.start(slow_writes)
    story.wait_for_work(first)
    second = story.start(slow_writes, "second")
    said = outcome(second, 2)
    outcome(first, 2)
    return said


def full_disk(story: Story) -> str:
    """Of all that can be written, the file that outgrows the limit cannot."""
    return outcome(story.start(partial(limit_file_size, story.random.choice([1_000, 3_000, 10_000, 40_000]))), 2)


def broken_console(story: Story) -> str:
    kind = story.random.choice([full_console, closed_pipe, closed_console, ascii_console])
    return f"{kind.__name__}: {outcome(story.start(kind))}"


def damaged(story: Story) -> str:
    path, manifest = story.a_file(), read_manifest(story.output)
    if path is None:
        return "nothing to damage"
    content, kind = bytearray(path.read_bytes()), story.random.choice(["removed", "cut", "changed"])
    if kind == "removed":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif content:
        content[story.random.randrange(len(content))] ^= 1 << story.random.randrange(8)
        path.write_bytes(content)
    name = str(path.relative_to(story.output))
    return f"{kind} {name}: {mended(story, name, manifest)}"


def mended(story: Story, name: str, manifest: dict | None) -> str:
    """What is done at once about a damaged file of a finished run, or about any run's manifest."""
    is_manifest = name == f"{ITEMS}/{MANIFEST}"
    if not manifest or not (is_manifest or manifest["complete"]):
        return "to be seen"
    code, said = story.start(os.getpid).end()
    if is_manifest and code == 2:  # what cannot be told from somebody's own work is not removed unasked
        assert f"results without a readable {name}: --overwrite replaces them" in said, said
        story.words = [*story.words, "--overwrite"]
        return "refused"
    assert code == 0, said
    computed = f"{story.output / name} is missing or damaged: computing it again" in said
    assert computed == (name in manifest["primary"]) or is_manifest, said  # a derived file is only made again
    return "computed again" if computed else "made again"


def damaged_while_it_runs(story: Story) -> str:
    running = story.start(slow_writes)
    story.wait(running)
    path = story.a_file()
    if path is not None and path.suffix == ".npz":
        path.unlink(missing_ok=True)
    return outcome(running, 2)


FAULTS = [killed, interrupted, started_twice, full_disk, broken_console, damaged, damaged_while_it_runs]

# --- in the process that is hurt -----------------------------------------------------------------


def slow_writes() -> None:
    """So that a signal can meet the run between any two files."""
    import residual_fisher.common.files

    replace = os.replace
    residual_fisher.common.files.os.replace = lambda *paths: (time.sleep(0.03), replace(*paths))


def limit_file_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_console() -> None:
    with open("/dev/full", "w") as full:
        reopen(full.fileno(), "stdout", "stderr")


def closed_pipe() -> None:
    """As after `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    reopen(write, "stdout")


def reopen(descriptor: int, *streams: str) -> None:
    for name in streams:
        number = getattr(sys, name).fileno()
        os.dup2(descriptor, number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))  # as Python opens it at its start


def closed_console() -> None:
    sys.stdout = sys.stderr = None  # what Python makes of `>&- 2>&-`


def ascii_console() -> None:
    sys.stdout.reconfigure(encoding="ascii")
    sys.stderr.reconfigure(encoding="ascii")


# --- the stories ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("script", LONGEST)
def test_after_any_faults_the_same_command_ends_as_if_nothing_had_happened(script, seed, tmp_path, request):
    expected, words, assert_same = _undisturbed(script, tmp_path / "out", request)
    story = Story(script, words, tmp_path / "out", seed)
    for fault in story.random.choices(FAULTS, k=story.random.randint(1, 3)):
        seen = fault(story).replace(str(tmp_path), "…")
        if LOG:
            with open(LOG, "a") as log:
                log.write(json.dumps({"script": script, "seed": seed, "fault": fault.__name__, "seen": seen}) + "\n")
    code, said = story.start(os.getpid).end()
    assert code == 0, said
    assert_same(story.output, expected)


def _undisturbed(script: str, output: Path, request) -> tuple[Path, list[str], Callable]:
    if script == "compute_fisher":
        given = (request.getfixturevalue("chat_directory"), request.getfixturevalue("dataset"))
        expected = request.getfixturevalue("finished_pipeline")
        return expected, scripts.pipeline_words(*given, output), scripts.assert_same_results
    words = scripts.experiment_words(request.getfixturevalue("model_directory"), output)
    return request.getfixturevalue("undisturbed_experiment"), words, scripts.assert_same_experiment


@pytest.fixture(scope="session")
def undisturbed_experiment(model_directory, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert scripts.core_experiment(model_directory, output) == 0
    return output


def test_a_manifest_of_which_any_bit_has_changed_is_damaged(finished_pipeline, tmp_path):
    content = (finished_pipeline / ITEMS / MANIFEST).read_bytes()
    (tmp_path / ITEMS).mkdir()
    for bit in range(0, 8 * len(content), 101):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / ITEMS / MANIFEST).write_bytes(changed)
        assert read_manifest(tmp_path) in (None, read_manifest(finished_pipeline))  # a space that is a tab now
