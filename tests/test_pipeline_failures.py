"""The pipeline when something goes wrong: killed, interrupted, a full disk, several processes, bad input."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import shards
from shards import load_fisher_matrices
import torch
import yaml

import compute_fisher
from conftest import ROOT
import fisher
from pipeline import assert_same_results, records

# --- nothing is lost ---


def start(model, dataset, output, **options) -> subprocess.Popen:
    """The pipeline as a process; the file it writes in is slowed down, so that it can be killed anywhere."""
    slow = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import compute_fisher, storage; "
        "write = storage.write_archive; "
        "storage.write_archive = lambda *a: (time.sleep(0.05), write(*a)); "
        "sys.exit(compute_fisher.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, str(ROOT), *pipeline_words(model, dataset, output, **options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, output, files: int):
    deadline = time.time() + 60
    while len(list((output / "shards").glob("*.npz"))) < files and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_killed_again_and_again_it_ends_as_if_never_stopped(chat_directory, dataset, finished_pipeline, tmp_path):
    output = tmp_path / "out"
    for files in (1, 6, 12):
        process = start(chat_directory, dataset, output)
        wait_for(process, output, files)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert yaml.safe_load((output / "metadata.yaml").read_text())["complete"] is False
    kept = {path: path.stat().st_mtime_ns for path in (output / "shards").glob("*.npz")}
    assert kept
    calls = []
    measure = compute_fisher.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_fisher, "measure", lambda *a: calls.append(len(a[2])) or measure(*a))
        assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    done = sum(2 if path.name.startswith("batch") else 32 for path in kept)
    assert sum(calls) >= 40 - done and sum(calls) < 40  # what was there was not computed again
    assert_same_results(output, finished_pipeline)


@pytest.mark.parametrize("moment", ["close", "write_metadata", "remove"])
def test_stopped_while_it_finishes_it_can_finish_again(
    moment, chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch
):
    class Stopped(BaseException):
        pass

    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch:
        if moment == "write_metadata":
            write = compute_fisher.runs._write_metadata
            patch.setattr(compute_fisher.runs, "_write_metadata", lambda d, m: stop() if m["complete"] else write(d, m))
        else:
            patch.setattr(shards.Store, moment, stop)
        with pytest.raises(Stopped):
            scripts.compute_fisher(chat_directory, dataset, tmp_path / "out")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


def test_ctrl_c_keeps_finished_batches_and_says_how_to_go_on(chat_directory, dataset, finished_pipeline, tmp_path):
    process = start(chat_directory, dataset, tmp_path / "out")
    wait_for(process, tmp_path / "out", 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished batches are saved" in errors and "Traceback" not in errors
    assert len(list((tmp_path / "out" / "shards").glob("*.npz"))) >= 3
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(chat_directory, dataset, finished_pipeline, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        process = start(chat_directory, dataset, disk / "out")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert errors.count("\n") == 1 and "No space left on device" in errors
        assert list((disk / "out" / "shards").glob("*.npz"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert scripts.compute_fisher(chat_directory, dataset, disk / "out") == 0
        assert_same_results(disk / "out", finished_pipeline)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_shard_is_named_and_computed_again(
    damage, chat_directory, dataset, finished_pipeline, tmp_path, capsys
):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Store, "close", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output)
    shard = output / "shards" / "shard_00000.npz"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    shard.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert "shard_00000.npz is damaged: computing it again" in capsys.readouterr().err
    assert_same_results(output, finished_pipeline)


def test_a_finished_pipeline_run_is_left_alone_and_overwritten_when_asked(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / "notes.txt").write_text("mine")
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5, overwrite=True) == 0
    assert len(records(output)) == 5
    assert (output / "notes.txt").read_text() == "mine"


def test_stopped_while_it_overwrites_it_leaves_a_folder_it_can_go_on_with(chat_directory, dataset, tmp_path):
    output, runs = tmp_path / "out", compute_fisher.runs
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    (output / "notes.txt").write_text("mine")
    (output / ".prompts.jsonl-abandoned").write_text("half of it")
    write = runs._write_metadata
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runs, "_write_metadata", lambda d, m: sys.exit(9) if m["config"]["num_prompts"] == 5 else write(d, m)
        )
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5, overwrite=True)
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5) == 0
    assert len(records(output)) == 5
    assert {path.name for path in output.iterdir()} == {*PIPELINE_FILES, "notes.txt"}


def test_a_run_with_other_settings_model_or_data_is_refused(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Store, "close", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output)
    assert scripts.compute_fisher(chat_directory, dataset, output, top_k_tokens=5) == 2
    assert "top_k_tokens was 6 and is 5" in capsys.readouterr().err

    changed = dataset.read_text().replace('"zebra animals', '"zebra animal', 1)
    original = dataset.read_text()
    try:
        dataset.write_text(changed)
        assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    finally:
        dataset.write_text(original)
    assert "the dataset has changed" in capsys.readouterr().err

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_fisher.models, "fingerprint", lambda model: "another")
        assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    assert "a run of another model" in capsys.readouterr().err


def test_out_of_memory_halves_the_batch_and_says_so(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    linearize, sizes = fisher.linearize_prompts, []

    def small(model, module, ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return linearize(model, module, ids, *rest)

    monkeypatch.setattr(fisher, "linearize_prompts", small)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", batch_size=7) == 0
    assert max(sizes) > 2
    assert "out of memory: going on with batches of" in capsys.readouterr().err
    for a, b in zip(load_fisher_matrices(tmp_path / "out"), load_fisher_matrices(finished_pipeline), strict=True):
        assert np.abs(a.S / b.S - 1).max() < 1e-4


# --- several processes ---


def same_threads() -> dict[str, str]:
    """torchrun gives each process one thread, and another number of threads rounds otherwise."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.parametrize("processes", [2])
def test_two_processes_make_what_one_makes(processes, chat_directory, dataset, finished_pipeline, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "compute_fisher.py"), *pipeline_words(chat_directory, dataset, tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=same_threads(), timeout=240)
    assert result.returncode == 0, result.stderr
    assert_same_results(tmp_path / "out", finished_pipeline)


def test_a_process_that_fails_stops_the_others_and_another_number_of_them_finishes(
    chat_directory, dataset, finished_pipeline, tmp_path
):
    failing = tmp_path / "failing.py"
    failing.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import compute_fisher\n"
        "measure = compute_fisher.measure\n"
        "def fail(*a):\n"
        "    if os.environ['RANK'] == '1': raise compute_fisher.UserError('the second process has failed')\n"
        "    return measure(*a)\n"
        "compute_fisher.measure = fail\n"
        "sys.exit(compute_fisher.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(failing)]
    command += pipeline_words(chat_directory, dataset, tmp_path / "out")
    result = subprocess.run(command, capture_output=True, text=True, env=same_threads(), timeout=240)
    assert result.returncode != 0
    assert "compute_fisher.py: error: the second process has failed" in result.stderr
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


# --- bad input ---

BAD = {
    "hook-layer-name model.layer.1": "model.layers.0 ... model.layers.2",
    "hook-layer-name 7": "model.layers.0 ... model.layers.2",
    "hook-layer-name lm_head": "no Fisher matrix at lm_head: its output is not of shape",
    "config none.yaml": "cannot read the config none.yaml",
    "dataset-name none.jsonl": "no such file",
    "dataset-name no/such": "as a dataset of the hub",
    "prompt-column question": "no column 'question'",
    "output-dir /dev/null/out": "cannot write to",
    "device warp": "not available",
    "model-path /no/such": "cannot load model",
    "max-length 3": "leaves no room",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_one_line_and_exit_code_2(flag, chat_directory, dataset, tmp_path, capsys):
    name, value = flag.split()
    words = [*pipeline_words(chat_directory, dataset, tmp_path / "out"), f"--{name}", value]
    assert compute_fisher.main(words) == 2 if name != "config" else True
    if name == "config":
        with pytest.raises(SystemExit) as caught:
            compute_fisher.main(words)
        assert caught.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and BAD[flag] in message[0]
    assert message[0].startswith("compute_fisher.py: error: ")


def test_what_went_wrong_before_the_first_result_needs_no_overwrite(chat_directory, dataset, tmp_path):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", max_length=3) == 2
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", max_length=30, num_prompts=3) == 0


def test_a_dataset_of_empty_prompts_is_said(chat_directory, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n{"prompt": "  "}\n')
    assert scripts.compute_fisher(chat_directory, tmp_path / "empty.jsonl", tmp_path / "out") == 2
    assert "has no usable prompt: 2 rows, all empty" in capsys.readouterr().err


def test_a_folder_of_other_files_is_never_touched(chat_directory, dataset, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in ("", "yes"):
        assert scripts.compute_fisher(chat_directory, dataset, tmp_path, overwrite=overwrite) == 2
        assert "did not write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nan_names_the_prompt_and_keeps_the_rest(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    linearize = fisher.linearize_prompts

    def poisoned(model, module, ids, lengths, *rest):
        if lengths.min() < 16:  # the short prompts come last
            raise fisher.NumericalError("the logits hold NaN or infinity", None, int(lengths.argmin()))
        return linearize(model, module, ids, lengths, *rest)

    monkeypatch.setattr(fisher, "linearize_prompts", poisoned)
    monkeypatch.setattr(compute_fisher, "check_padding", lambda *_: None)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "the logits hold NaN or infinity at prompt" in message and "try --dtype float32" in message
    assert list((tmp_path / "out" / "shards").glob("batch_*.npz"))


def test_a_model_whose_predictions_depend_on_the_padding_is_refused(chat_directory, dataset, tmp_path, monkeypatch):
    linearize = fisher.linearize_prompts

    def wrong_token(model, module, ids, lengths, *rest):  # the last token of the padded row
        return linearize(model, module, ids, torch.full_like(lengths, ids.shape[1]), *rest)

    monkeypatch.setattr(fisher, "linearize_prompts", wrong_token)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
