"""The pipeline when something goes wrong: killed, interrupted, a full disk, several processes, bad input."""

from collections.abc import Callable
from contextlib import nullcontext
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import transformers as hf
import yaml

import compute_fisher
import fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.common.archives import archives_in, read_records
from residual_fisher.common.lock import lock_directory
from residual_fisher.common.program import SOME_FAILED, UserError
from residual_fisher.common.run import Run, read_manifest
from residual_fisher.model import loading, points
from residual_fisher.pipeline import batches, derived, figures, matrices
from residual_fisher.pipeline.processes import Processes
import scripts
from scripts import (
    PIPELINE_FILES,
    ROOT,
    Stopped,
    arrays,
    assert_same_results,
    calls_of,
    contents,
    flip,
    pipeline_words,
    records,
)

pytestmark = pytest.mark.usefixtures("without_pictures")


def archives(output: Path) -> list[Path]:
    return [path for *_, path in archives_in(output / "items")]


def assert_same_to_rounding(output: Path, expected: Path) -> None:
    for a, b in zip(load_fisher_matrices(output), load_fisher_matrices(expected), strict=True):
        assert np.abs(a.S / b.S - 1).max() < 1e-4


@pytest.fixture(scope="module")
def unfinished(chat_directory, dataset, tmp_path_factory) -> Path:
    """The fixture `finished_pipeline`, but stopped when all items were computed and none was merged."""
    output = tmp_path_factory.mktemp("runs") / "unfinished"
    with calls_of(matrices, "merge", Stopped), pytest.raises(Stopped):
        scripts.compute_fisher(chat_directory, dataset, output)
    return output


# --- nothing is lost -----------------------------------------------------------------------------


def slow_writes() -> None:
    """Of the batches' files, so that a signal can meet the run anywhere."""
    append = Run.append
    Run.append = lambda *arguments: (time.sleep(0.05), append(*arguments))


def start(model, dataset, output) -> scripts.Running:
    return scripts.start("compute_fisher", pipeline_words(model, dataset, output), output, slow_writes)


@pytest.mark.long
def test_killed_again_and_again_it_ends_as_if_never_stopped(chat_directory, dataset, finished_pipeline, tmp_path):
    output = tmp_path / "out"
    for files in (1, 6, 12):
        process = start(chat_directory, dataset, output)
        process.wait_until(lambda files=files: len(archives(output)) >= files)
        process.send(signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL
        assert read_manifest(output)["complete"] is False
    done = sum(len(read_records(path)) for path in archives(output))
    with calls_of(compute_fisher, "measure") as calls:
        assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert 0 < sum(len(batch) for *_, batch in calls) == 40 - done  # what was there was not computed again
    assert_same_results(output, finished_pipeline)


# what computes, merges and derives, in the order of a run; and which call of it
STEPS = [
    ("write_archive", matrices, 1),
    ("atomic_open", matrices, 1),
    ("finish", Run, 1),
    ("_write_manifest", Run, 2),
    ("_remove_archives", Run, 2),
    ("outlier_scores", derived, 1),
    ("draw", figures, 1),
    ("write_metadata", derived, 1),
]


@pytest.mark.parametrize(("step", "owner", "call"), STEPS, ids=[step for step, *_ in STEPS])
def test_stopped_while_it_finishes_it_can_finish_again(
    step, owner, call, chat_directory, dataset, finished_pipeline, tmp_path
):
    with calls_of(owner, step, Stopped, [call]), pytest.raises(Stopped):
        scripts.compute_fisher(chat_directory, dataset, tmp_path / "out")
    with calls_of(compute_fisher, "measure") as calls:
        assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert not calls  # all had been computed
    assert_same_results(tmp_path / "out", finished_pipeline)


def test_ctrl_c_keeps_finished_batches_and_says_how_to_resume(chat_directory, dataset, finished_pipeline, tmp_path):
    output = tmp_path / "out"
    process = start(chat_directory, dataset, output)
    process.wait_until(lambda: len(archives(output)) >= 3)
    process.send(signal.SIGINT)
    code, errors = process.end()
    assert code == 130
    assert "finished batches are saved" in errors and "Traceback" not in errors
    assert len(archives(output)) >= 3
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert_same_results(output, finished_pipeline)


def test_a_full_disk_is_one_line_and_the_run_resumes_later(
    chat_directory, dataset, finished_pipeline, small_disk, capsys
):
    output = small_disk.path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    said = capsys.readouterr().err
    assert said.startswith("compute_fisher.py: error: cannot write ") and said.count("\n") == 1
    assert "No space left on device" in said
    assert archives(output)
    small_disk.grow()
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert_same_results(output, finished_pipeline)


def test_a_damaged_archive_is_named_and_computed_again(
    chat_directory, dataset, unfinished, finished_pipeline, tmp_path, capsys
):
    output = Path(shutil.copytree(unfinished, tmp_path / "out"))
    damaged = archives(output)[0]
    flip(damaged)
    with calls_of(compute_fisher, "measure") as calls:
        assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert f"{damaged.name} is damaged: computing it again" in capsys.readouterr().err
    assert sum(len(batch) for *_, batch in calls) == 32  # one window of two
    assert_same_results(output, finished_pipeline)


def test_an_archive_that_vanishes_meanwhile_is_said_and_nothing_is_merged(chat_directory, dataset, tmp_path, capsys):
    output, pack = tmp_path / "out", Run.pack

    def lose_one(self, numbers):
        archives(output)[0].unlink()
        pack(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "pack", lose_one)
        assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    assert "have vanished from" in capsys.readouterr().err
    assert not (output / "fisher_matrices_compressed.npz").exists()
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0


def test_a_stopped_run_is_resumed_with_another_batch_size(chat_directory, dataset, finished_pipeline, tmp_path):
    output = tmp_path / "out"
    with calls_of(compute_fisher, "measure", Stopped, range(6, 99)), pytest.raises(Stopped):
        scripts.compute_fisher(chat_directory, dataset, output)
    kept = {number for path in archives(output) for number in read_records(path)}
    with calls_of(compute_fisher, "measure") as calls:
        assert scripts.compute_fisher(chat_directory, dataset, output, batch_size=7) == 0
    computed = [encoded.prompt.index for *_, batch in calls for encoded in batch]
    assert kept and sorted([*kept, *computed]) == list(range(40)) and max(len(batch) for *_, batch in calls) > 2
    assert_same_to_rounding(output, finished_pipeline)
    assert scripts.compute_fisher(chat_directory, dataset, output, batch_size=3) == 0  # finished, whatever the size


def test_a_finished_run_is_extended_and_fewer_prompts_are_there_already(
    chat_directory, dataset, finished_pipeline, tmp_path, capsys
):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=32) == 0
    before = arrays(output)
    with calls_of(compute_fisher, "measure") as calls:
        assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert sorted(encoded.prompt.index for *_, batch in calls for encoded in batch) == list(range(32, 40))
    assert all(arrays(output)[name].tobytes() == array.tobytes() for name, array in before.items())
    assert_same_results(output, finished_pipeline)  # 32 prompts are a window: the batches are those of a single run
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=32) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out and len(records(output)) == 40


def test_a_run_that_outgrows_one_archive_is_extended_too(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=32) == 0
    monkeypatch.setattr(matrices, "ONE_FILE", 33)
    for count in (36, 40):
        with calls_of(compute_fisher, "measure") as calls:
            assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=count) == 0
        assert sum(len(batch) for *_, batch in calls) == 4
        assert not (output / "fisher_matrices_compressed.npz").exists() and len(records(output)) == count
    assert_same_to_rounding(output, finished_pipeline)


def test_an_unfinished_run_is_not_finished_with_fewer_prompts_than_it_has(
    chat_directory, dataset, unfinished, tmp_path, capsys
):
    output = Path(shutil.copytree(unfinished, tmp_path / "out"))
    before = contents(output)
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=10) == 2
    assert "holds an unfinished run of more prompts, 40 at least: ask for as many" in capsys.readouterr().err
    assert contents(output) == before


def test_a_finished_run_is_left_alone_and_overwritten_when_asked(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    (output / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.*")} == before
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5, top_k_tokens=5, overwrite=True) == 0
    assert len(records(output)) == 5
    assert (output / "notes.txt").read_text() == "mine"


def test_stopped_while_it_overwrites_it_leaves_a_folder_that_it_can_resume(chat_directory, dataset, tmp_path):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    (output / "notes.txt").write_text("mine")
    (output / ".prompts.jsonl-abandoned").write_text("half of it")
    (output / "items" / ".00000000-00000001.npz-abandoned").write_text("half of it")
    for call in (1, 2):  # the earlier run is marked as removed, and then replaced
        with calls_of(Run, "_write_manifest", Stopped, [call]), pytest.raises(Stopped):
            scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5, top_k_tokens=5, overwrite=True)
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5, top_k_tokens=5) == 0
    assert len(records(output)) == 5
    assert {path.name for path in output.iterdir()} == {*PIPELINE_FILES, "notes.txt"}
    assert {path.name for path in (output / "items").iterdir()} == {"run.json", "records.jsonl"}


def test_overwriting_checks_everything_before_it_removes_anything(chat_directory, dataset, unfinished):
    before = contents(unfinished)
    for mistake in ({"hook_layer_name": "9"}, {"max_length": "3"}, {"prompt_column": "none"}):
        assert scripts.compute_fisher(chat_directory, dataset, unfinished, overwrite=True, **mistake) == 2
    assert scripts.compute_fisher(chat_directory, "none.jsonl", unfinished, overwrite=True) == 2
    assert contents(unfinished) == before


# --- another run ---------------------------------------------------------------------------------


def test_an_unfinished_run_with_other_settings_or_of_another_model_is_refused(
    chat_directory, dataset, unfinished, capsys
):
    before = contents(unfinished)
    assert scripts.compute_fisher(chat_directory, dataset, unfinished, top_k_tokens=5) == 2
    assert "top_k_tokens was 6 and is 5" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        for other, what in (("0" * 32, "another model"), ("0" * 16, "a model whose fingerprint another version")):
            patch.setattr(compute_fisher, "fingerprint", lambda *_, other=other: other)
            assert scripts.compute_fisher(chat_directory, dataset, unfinished) == 2
            assert f"a run of {what}" in capsys.readouterr().err
    assert contents(unfinished) == before


@pytest.mark.parametrize("stop", [None, Stopped], ids=["finished", "unfinished"])
@pytest.mark.parametrize("change", ["first prompt", "last prompt", "fewer prompts"])
def test_a_run_of_another_dataset_is_refused(change, stop, chat_directory, dataset, tmp_path, capsys):
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    rows = dataset.read_text().splitlines(keepends=True)
    data.write_text("".join(rows))
    with calls_of(matrices, "merge", stop), pytest.raises(Stopped) if stop else nullcontext():
        scripts.compute_fisher(chat_directory, data, output)
    before = contents(output)
    if change == "fewer prompts":
        rows = rows[:34]  # 32 prompts: those of the first window
    else:
        place = 1 if change == "first prompt" else 41  # among the rows; the first is empty
        rows[place] = rows[place].replace('": "', '": "other ')
    data.write_text("".join(rows))
    capsys.readouterr()
    assert scripts.compute_fisher(chat_directory, data, output) == 2
    said = capsys.readouterr().err
    assert ("the dataset has changed since" if stop else "the data have changed since") in said
    changed = [path for path, content in contents(output).items() if before[path] != content]
    assert changed in ([], [str(output / "items" / "run.json")])  # what was computed stays


@pytest.mark.parametrize("change", ["template", "weight", "head", "rms_norm_eps", "nothing"])
def test_a_finished_run_of_another_model_is_not_called_finished(change, chat_directory, dataset, tmp_path, capsys):
    model = shutil.copytree(chat_directory, tmp_path / "model")
    assert scripts.compute_fisher(model, dataset, tmp_path / "out", num_prompts=3) == 0
    lm, tokenizer = loading.load(str(model), "float32", "cpu")
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "Assistant")
    if change == "weight":
        lm.model.layers[0].mlp.up_proj.weight[4:8, 4:8] += 0.01
    if change == "head":
        lm.lm_head.weight[:3] = lm.lm_head.weight[[1, 2, 0]]
    if change == "rms_norm_eps":
        lm.config.rms_norm_eps *= 2
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    capsys.readouterr()
    code = scripts.compute_fisher(model, dataset, tmp_path / "out", num_prompts=3)
    said = capsys.readouterr()
    if change == "nothing":
        assert code == 0 and "is finished: nothing to do" in said.out
    else:
        assert code == 2 and "a run of another model" in said.err


# --- no memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a pass", "a backward pass"])
def test_out_of_memory_halves_a_batch_and_later_ones_fit_from_the_start(
    what, chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    """Memory for 130 padded tokens, or for 200 times the cotangents of a backward pass; batches have up to 280."""
    linearize, gradients, failed, tokens = fisher.linearize_prompts, points.batched_gradients, [], 0

    def need(size: int, room: int) -> None:
        if size > room:
            failed.append(size)
            raise torch.OutOfMemoryError

    def small_pass(model, module, ids, *rest):
        nonlocal tokens
        tokens = ids.numel()
        if what == "a pass":
            need(tokens, 130)
        return linearize(model, module, ids, *rest)

    def small_backward_pass(model, outputs, inputs, cotangents):
        if what == "a backward pass" and len(cotangents[0]) > 1:
            need(tokens * len(cotangents[0]), 200)
        return gradients(model, outputs, inputs, cotangents)

    monkeypatch.setattr(fisher, "linearize_prompts", small_pass)
    monkeypatch.setattr(points, "batched_gradients", small_backward_pass)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", batch_size=7) == 0
    assert len(failed) == 1
    said = capsys.readouterr()
    assert "note: out of memory: " in said.err
    assert_same_to_rounding(tmp_path / "out", finished_pipeline)
    if what == "a pass":
        parts = [r["tokens_at_once"] for r in records(tmp_path / "out") if "tokens_at_once" in r]
        assert len(parts) > 20 and max(parts) <= 130
        statistics = yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())["statistics"]
        assert (statistics["in_parts_of_batches"], statistics["most_tokens_at_once"]) == (len(parts), max(parts))
        assert f"for lack of memory: at most {max(parts)} tokens at once" in said.out


def test_a_batch_is_no_larger_than_free_memory_lets_expect(monkeypatch):
    """An 8B model in half precision, 2.2 MB a token and 0.3 GB more, on a GPU of 80 GB; batches of 32 prompts."""
    gpu, weights, peak = torch.device("cuda", 0), 16e9, 0.0

    def reset(gpu) -> None:
        nonlocal peak
        peak = weights

    for name, function in {
        "reset_peak_memory_stats": reset,
        "memory_allocated": lambda gpu: weights,
        "memory_reserved": lambda gpu: weights + 1e9,
        "max_memory_allocated": lambda gpu: peak,
        "mem_get_info": lambda gpu: (80e9 - weights - 1e9, 80e9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    room, sizes = batches.Room([gpu, torch.device("cpu")]), []
    for prompts, tokens in [(1, 50), (32, 1024), (32, 1024), (32, 1024), (32, 700), (32, 1024), (32, 20)]:
        sizes.append(room.prompts(prompts, tokens))
        with room.taking(sizes[-1] * tokens):
            peak = max(peak, weights + 0.3e9 + 2.2e6 * sizes[-1] * tokens)
            assert peak <= 80e9
    assert sizes == [1, 4, 16, 16, 32, 16, 32]
    room.limit = 10_000  # as if memory had run out nevertheless
    assert [room.prompts(32, tokens) for tokens in (1024, 300, 20_000)] == [8, 32, 1]


def test_out_of_memory_with_a_single_prompt_is_a_line_of_advice(chat_directory, dataset, tmp_path, capsys):
    with calls_of(fisher, "pull_back", torch.OutOfMemoryError):
        assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("compute_fisher.py: error: not enough memory: try a smaller --max-length")


# --- the thread that writes ----------------------------------------------------------------------


def test_tokens_are_written_in_another_thread_whose_faults_end_the_run(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    """The next batch need not wait for the tokenizer. What is finished is kept, and the run resumed."""
    test, threads = batches.prompt_words_test, []

    def in_thread(*arguments):
        found = test(*arguments)

        def contained(*arguments):
            threads.append(threading.current_thread())
            if len(threads) == 20:
                raise UserError("the tokenizer fails")
            return found(*arguments)

        return contained

    monkeypatch.setattr(batches, "prompt_words_test", in_thread)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    assert "error: the tokenizer fails" in capsys.readouterr().err
    assert archives(tmp_path / "out")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert len(threads) < 60 and threading.main_thread() not in threads  # 40 prompts
    assert_same_results(tmp_path / "out", finished_pipeline)


# --- several processes ---------------------------------------------------------------------------


def torchrun(processes: int, output: Path, model: Path, dataset: Path, fault: str = "", *words: str):
    """The script in several processes, in which `fault` is run, a statement that knows `measure`, before each batch."""
    script = output.with_name("script.py")
    script.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import compute_fisher\n"
        "measure, batches = compute_fisher.measure, []\n"
        "def with_fault(*arguments):\n"
        f"    batches.append(1); {fault or 'pass'}\n"
        "    return measure(*arguments)\n"
        "compute_fisher.measure = with_fault\n"
        "if __name__ == '__main__': sys.exit(compute_fisher.main(compute_fisher.parse(sys.argv[1:])))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    # torchrun gives each process one thread, and another number of threads rounds otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command += [str(script), *pipeline_words(model, dataset, output)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_two_processes_make_what_one_makes(chat_directory, dataset, finished_pipeline, tmp_path):
    result = torchrun(2, tmp_path / "out", chat_directory, dataset)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Written to") == 1
    assert_same_results(tmp_path / "out", finished_pipeline)


@pytest.mark.long
def test_a_killed_process_is_started_again_and_all_end_by_themselves(
    chat_directory, dataset, finished_pipeline, tmp_path
):
    marker = tmp_path / "killed"
    fault = f"len(batches) == 4 and not os.path.exists({str(marker)!r}) and (open({str(marker)!r}, 'x').close(), "
    fault += "os.kill(os.getpid(), signal.SIGKILL))"
    # there are two windows, so that one of the three has nothing to do
    result = torchrun(3, tmp_path / "out", chat_directory, dataset, fault, "--max-restarts", "1")
    assert result.returncode == 0, result.stderr
    assert marker.exists()
    assert_same_results(tmp_path / "out", finished_pipeline)


@pytest.mark.long
def test_a_process_that_fails_stops_the_others_and_another_number_of_them_finishes(
    chat_directory, dataset, finished_pipeline, tmp_path
):
    marker = tmp_path / "failed"
    fault = f"len(batches) == 4 and (open({str(marker)!r}, 'a').write(os.environ['RANK']), "
    fault += "(_ for _ in ()).throw(compute_fisher.UserError('this process has failed')))"
    result = torchrun(2, tmp_path / "out", chat_directory, dataset, fault)
    assert result.returncode != 0 and marker.read_text()
    assert "compute_fisher.py: error: this process has failed" in result.stderr
    assert read_manifest(tmp_path / "out")["complete"] is False
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    theirs = [compute_fisher.own_device(device, Processes(rank, 4, rank % 2)) for rank in range(4)]  # on two machines
    assert theirs == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert compute_fisher.own_device(device, Processes()) == device
    for named in ("cpu", "cuda:1"):
        assert compute_fisher.own_device(named, Processes(1, 2, 1)) == named
    with pytest.raises(UserError) as caught:
        compute_fisher.own_device(device, Processes(2, 4, 2))
    assert str(caught.value).startswith("process 3 of 4 has no GPU of its own: this machine has 2, so start torchrun")
    assert "--device" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert compute_fisher.own_device(device, Processes(1, 2, 1)) == device  # cuda is refused by `load`, as alone


def test_processes_without_their_numbers_are_a_line(chat_directory, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    assert "start several processes with torchrun" in capsys.readouterr().err


# --- bad input -----------------------------------------------------------------------------------

BAD = {
    "hook-layer-name model.layer.1": "has no module 'model.layer.1': its layers are model.layers.0 ... model.layers.2",
    "hook-layer-name 7": "has no module '7': its layers are model.layers.0 ... model.layers.2",
    "hook-layer-name lm_head": "no Fisher matrix at lm_head: its output is not of shape",
    "dataset-name none.jsonl": "no such file",
    "dataset-name no/such": "as a dataset of the hub",
    "prompt-column question": "no column 'question'",
    "output-dir /dev/null/out": "cannot write to",
    "device warp": "device warp is not available",
    "model-path /no/such": "cannot load model '/no/such'",
    "max-length 3": "leaves no room",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_one_line_and_exit_code_2(flag, chat_directory, dataset, tmp_path, capsys):
    name, value = flag.split()
    words = [*pipeline_words(chat_directory, dataset, tmp_path / "out"), f"--{name}", value]
    assert scripts.as_program("compute_fisher", words) == 2
    said = capsys.readouterr().err
    assert said.startswith("compute_fisher.py: error: ") and said.count("\n") == 1
    assert BAD[flag] in said
    assert "--model-name" not in said  # the other script's
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_a_model_that_sees_the_padding_is_refused(dtype, lengths, chat_tokenizer, tmp_path, capsys):
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=len(chat_tokenizer)
    )
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")  # every token sees every other
    chat_tokenizer.save_pretrained(tmp_path / "bert")
    texts = ["ab", "cd", "ef"] if lengths == "equal" else ["ab", "the many wild animals"]
    (tmp_path / "few.txt").write_text("\n".join(texts))
    assert scripts.compute_fisher(tmp_path / "bert", tmp_path / "few.txt", tmp_path / "out", dtype=dtype) == 2
    said = capsys.readouterr().err.splitlines()
    assert "BertLMHeadModel is not supported: its predictions change with the padding of a batch" in said[-1]


# --- prompts that fail ---------------------------------------------------------------------------


def test_earlier_turns_that_leave_no_room_fail_one_prompt_alone(chat_directory, tmp_path, capsys, without_pictures):
    def chat(system: str, text: str) -> str:
        return json.dumps({"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]})

    data, turns = tmp_path / "chats.jsonl", {3: 100, 5: 40}  # behind 40 words there is room, but for no answer
    data.write_text("\n".join(chat("the " * turns.get(i, 1), f"many wild animals {i}") for i in range(12)))
    options = {"num_prompts": "all", "max_length": 60, "explain": 8, "batch_size": 4}
    assert scripts.compute_fisher(chat_directory, data, tmp_path / "out", **options) == SOME_FAILED
    found, alone = records(tmp_path / "out"), "--max-length 60 leaves no room for its text"
    assert [record.get("failed") for record in found] == [alone if i == 3 else None for i in range(12)]
    assert found[3]["tokens"] == 60 and found[3]["outlier_score"] == 0
    assert "1 prompts failed (3): " in capsys.readouterr().out
    explained = json.loads((tmp_path / "out" / "findings.json").read_text())["explained"]
    assert {told["index"]: told["answer"] == "" for told in explained}[5] and len(explained) == 8


NAN = "the logits hold NaN or infinity"


def poison(monkeypatch, is_bad: Callable[[int], bool]) -> None:
    """Prompts whose length `is_bad` lead to NaN."""
    linearize = fisher.linearize_prompts

    def poisoned(model, module, ids, lengths, *rest):
        for number, length in enumerate(lengths.tolist()):
            if is_bad(length):
                raise fisher.NumericalError(NAN, None, number)
        return linearize(model, module, ids, lengths, *rest)

    monkeypatch.setattr(fisher, "linearize_prompts", poisoned)


def diverge(monkeypatch, trace: float) -> None:
    """The eigensolver fails on the matrix of this trace, wherever it is in a batch."""
    eigh = torch.linalg.eigh

    def failing(matrix):
        traces = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        if ((traces / trace - 1).abs() < 1e-4).any():
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)


@pytest.mark.parametrize("fault", ["NaN", "no convergence"])
def test_a_prompt_that_fails_is_recorded_and_the_run_goes_on(
    fault, chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    output, whole = tmp_path / "out", records(finished_pipeline)
    if fault == "NaN":
        shortest = min(record["tokens"] for record in whole)
        wanted, reason = [r["index"] for r in whole if r["tokens"] == shortest], NAN
        poison(monkeypatch, lambda length: length == shortest)
    else:
        wanted, reason = [17], "linalg.eigh: the algorithm failed to converge"
        diverge(monkeypatch, whole[17]["trace"])
    assert scripts.compute_fisher(chat_directory, dataset, output) == SOME_FAILED
    failed = [record["index"] for record in records(output) if "failed" in record]
    assert failed == wanted and f"{len(failed)} prompts failed (" in capsys.readouterr().out
    found, expected = load_fisher_matrices(output), load_fisher_matrices(finished_pipeline)
    for index, record in enumerate(records(output)):
        if index in failed:
            assert record["failed"] == reason and record["outlier_score"] == 0 and record["directions"] == []
            assert not found[index].S.any() and found[index].U.shape == expected[index].U.shape
        else:
            assert np.allclose(found[index].S, expected[index].S, rtol=1e-4)
    metadata = yaml.safe_load((output / "metadata.yaml").read_text())
    assert metadata["statistics"]["failed_prompts"] == failed
    assert metadata["statistics"]["trace"]["min"] > 0  # they count for no statistic
    assert scripts.compute_fisher(chat_directory, dataset, output) == SOME_FAILED  # again, though nothing is to do
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_a_trial_of_the_first_prompt_that_does_not_converge_stops_nothing(chat_directory, dataset, tmp_path):
    with calls_of(torch.linalg, "eigh", torch.linalg.LinAlgError("failed to converge"), [1]):
        assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=3) == 0


def test_a_run_most_of_whose_prompts_fail_stops(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda length: True)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"8 of the first 8 prompts failed: {NAN}" in said and said.count("\n") == 1


@pytest.mark.filterwarnings("error:All-NaN")
def test_of_so_few_that_nothing_is_judged_all_may_fail(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda length: True)
    for count in (1, 1, 7):
        code = scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=count)
        assert code == SOME_FAILED and "Traceback" not in capsys.readouterr().err
        assert [record["failed"] for record in records(tmp_path / "out")] == [NAN] * count
        assert len(load_fisher_matrices(tmp_path / "out")) == count
    assert figures.spectra_figure(records(tmp_path / "out"), 0.01)


# --- two at once ---------------------------------------------------------------------------------


def test_a_second_run_in_the_directory_is_told_who_holds_it(chat_directory, dataset, tmp_path):
    output = tmp_path / "out"
    with lock_directory(output):
        words = pipeline_words(chat_directory, dataset, output)
        code, said = scripts.start("compute_fisher", words, output, os.getpid).end()
        assert code == 2
        assert f"{output} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in said
    assert not output.exists()
