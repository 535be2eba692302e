"""Stdout and stderr that are full, gone, closed or of few characters; Ctrl-C at any moment; the hub's network; text."""

import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from residual_fisher.common.program import (
    Console,
    UserError,
    exit_code,
    go_offline_without_hub,
    interruptible,
    undisturbed,
)
from residual_fisher.common.run import Run
from residual_fisher.common.text import excerpt, excerpt_end, table
import scripts
from scripts import EXPERIMENT_FILES, PIPELINE_FILES, ROOT, experiment_words, pipeline_words

FILES = {"core_experiment": EXPERIMENT_FILES, "compute_fisher": PIPELINE_FILES}


def shell(line: str, **environment) -> subprocess.CompletedProcess:
    """What bash makes of a line in which PYTHON stands for the interpreter."""
    command = ["bash", "-c", line.replace("PYTHON", shlex.quote(sys.executable))]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env={**os.environ, "MPLBACKEND": "no-such-backend", **environment},
    )


# --- consoles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "ending", "environment"),
    [
        ("compute_fisher", "> /dev/full 2> /dev/full", {}),
        pytest.param("core_experiment", "<&- >&- 2>&-", {}, marks=pytest.mark.long),
        pytest.param(
            "compute_fisher",
            "| head -1; exit ${PIPESTATUS[0]}",
            {"LC_ALL": "C", "PYTHONUTF8": "0"},
            marks=pytest.mark.long,
        ),
        pytest.param("core_experiment", "", {"PYTHONIOENCODING": "cp1252"}, marks=pytest.mark.long),
    ],
    ids=["full", "closed", "head", "cp1252"],
)
def test_whatever_becomes_of_its_words_a_run_finishes_and_saves(
    script, ending, environment, chat_directory, model_directory, dataset, tmp_path
):
    words = {
        "core_experiment": experiment_words(model_directory, tmp_path / "out", "--num-sentences", "2"),
        "compute_fisher": pipeline_words(chat_directory, dataset, tmp_path / "out", num_prompts=8),
    }[script]
    result = shell(f"PYTHON {script}.py {shlex.join(words)} {ending}", **environment)
    assert result.returncode == 0, result.stderr
    assert set(os.listdir(tmp_path / "out")) == FILES[script]
    assert result.stderr == b""
    assert (result.stdout.count(b"\n") == 1) == ending.startswith("|")


@pytest.mark.parametrize("script", FILES)
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help > /dev/full", 0),
        ("--help >&-", 0),
        ("--help | head -1; exit ${PIPESTATUS[0]}", 0),
        ("--no-such-flag 2> /dev/full", 2),
        ("--no-such-flag 2>&-", 2),
    ],
)
def test_help_and_errors_on_a_console_that_takes_nothing_are_no_traceback(script, line, code):
    result = shell(f"PYTHON {script}.py {line}", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (code, b"")


@pytest.mark.parametrize("words", ["core_experiment.py --model-name a/b", "compute_fisher.py --model-path a/b"])
def test_an_address_of_the_hub_that_is_none_is_one_line(words):
    result = shell(f"PYTHON {words}", HF_ENDPOINT="http://[")
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1
    assert b"HF_ENDPOINT=http://[ is not an address" in result.stderr


def test_a_console_that_is_full_costs_no_descriptor():
    with open("/dev/full", "w") as full:
        console = Console(full)
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            assert console.write("x\n") == 2
            console.flush()
        assert os.listdir("/proc/self/fd") == before


def test_cudas_libraries_are_told_before_they_are_loaded():
    """Whatever the environment says of TF32."""
    names = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
    imports = "import os, sys; from residual_fisher.common.program import before_imports; before_imports()"
    line = f"{imports}; print('torch' in sys.modules, *map(os.environ.get, {names}))"
    result = shell(f"PYTHON -c {shlex.quote(line)}", NVIDIA_TF32_OVERRIDE="1")
    assert result.stdout.split() == [b"False", b"0", b":4096:8"], result.stderr


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "moment"),
    [
        ("core_experiment", "argparse"),
        ("compute_fisher", "numpy"),
        ("core_experiment", "torch.nn"),
        ("compute_fisher", "matplotlib.axes"),
    ],
)
def test_ctrl_c_during_the_imports_ends_the_program_without_a_word(script, moment, tmp_path):
    """As soon as a module is there: Python tells on stderr."""
    words = [sys.executable, "-X", "importtime", f"{script}.py", "--redraw", str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split("|")[-1].strip() == moment:
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert all(line.startswith("import time:") for line in said.splitlines())


def press(*seconds: float) -> threading.Thread:
    """Presses Ctrl-C after each of these times, one after the other."""

    def run() -> None:
        for pause in seconds:
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_second_ctrl_c_at_once_is_the_first_one_and_a_later_one_counts():
    before, saved = signal.getsignal(signal.SIGINT), []
    with interruptible():
        presses = press(0.05, 0.05, 1.2)
        with pytest.raises(KeyboardInterrupt):
            try:
                time.sleep(5)
            except KeyboardInterrupt:
                time.sleep(0.3)  # the second one comes here
                saved.append("all")
                time.sleep(5)
        presses.join()
    assert saved == ["all"] and signal.getsignal(signal.SIGINT) is before


def test_undisturbed_a_block_ends_whatever_is_pressed_and_then_ctrl_c_counts_again():
    before = signal.getsignal(signal.SIGINT)
    with undisturbed():
        press(0.01, 0.01).join()
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_the_caller_ignores_stays_ignored():
    """As in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            press(0.01).join()
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_program_runs_in_any_thread(capsys):
    """As in a notebook's: Ctrl-C is the main thread's alone, and only that may set a handler."""
    codes = []

    def run() -> int:
        warnings.warn("small", stacklevel=1)
        with undisturbed():
            raise UserError("no such file")

    thread = threading.Thread(target=lambda: codes.append(exit_code("x.py", run, "less")))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert codes == [2] and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == "note: small\nx.py: error: no such file\n"


def slow_finish() -> None:
    finish = Run.finish

    def slow(self, *arguments, **notes):
        Path(f"{self.folder}.finishing").touch()
        time.sleep(0.5)
        return finish(self, *arguments, **notes)

    Run.finish = slow


@pytest.mark.long
def test_ctrl_c_while_a_run_is_finished_loses_nothing(chat_directory, dataset, finished_pipeline, tmp_path):
    output = tmp_path / "out"
    words = pipeline_words(chat_directory, dataset, output)
    running = scripts.start("compute_fisher", words, output, slow_finish)
    running.wait_until(Path(f"{output}.finishing").exists)
    running.send(signal.SIGINT)
    code, said = running.end()
    assert code == 130 and "the same command resumes the run" in said and "Traceback" not in said
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    scripts.assert_same_results(output, finished_pipeline)


# --- the hub, and text ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "host", "proxies", "offline"),
    [
        ("some/model", "hub.invalid", {}, True),  # a name that has no address anywhere
        ("some/model", "localhost", {}, False),
        ("some/model", "hub.invalid", {"https_proxy": "http://proxy"}, False),
        ("smollm2-135m", "hub.invalid", {}, False),
        (str(ROOT), "hub.invalid", {}, False),
    ],
)
def test_the_hubs_libraries_stay_offline_if_a_name_needs_a_hub_without_an_address(
    name, host, proxies, offline, monkeypatch
):
    for variable in [variable for variable in os.environ if variable.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    for variable, value in proxies.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HF_ENDPOINT", f"https://{host}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    go_offline_without_hub("smollm2-135m", name)
    assert ("HF_HUB_OFFLINE" in os.environ) is offline


def test_excerpts_are_short_printable_and_in_one_line():
    text = "The \x1b[31mzoo\n" + " keeps animals" * 9
    assert excerpt("The\n  zoo", 10) == excerpt_end("The zoo", 10) == "The zoo"
    assert excerpt(text, 20) == r"The \x1b[31mzoo kee…"
    assert excerpt_end(text, 20) == "…imals keeps animals"


def test_a_table_is_aligned_to_the_left_in_its_first_column_and_to_the_right_in_the_others():
    assert table(["layer", "KL"], [["0", "0.25"], ["10", "3"]]).splitlines() == [
        "layer    KL", "0      0.25", "10        3"
    ]  # fmt: skip
