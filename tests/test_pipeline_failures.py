"""The pipeline when something goes wrong: killed, interrupted, a full disk, several processes, bad input."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

import compute_fisher
import fisher
from pipeline import load_fisher_matrices, run_directory, store
import scripts
from scripts import PIPELINE_FILES, ROOT, assert_same_results, pipeline_words, records

pytestmark = pytest.mark.usefixtures("without_pictures")

# --- nothing is lost -----------------------------------------------------------------------------


def slow_writes() -> None:
    """Of the shards' and batches' files, so that a signal can meet the run anywhere."""
    write = store.write_archive
    store.write_archive = lambda *arguments: (time.sleep(0.05), write(*arguments))


def start(model, dataset, output) -> scripts.Running:
    return scripts.start("compute_fisher", pipeline_words(model, dataset, output), output, slow_writes)


def written(output: Path) -> list[Path]:
    return list((output / "shards").glob("*.npz"))


def test_killed_again_and_again_it_ends_as_if_never_stopped(chat_directory, dataset, finished_pipeline, tmp_path):
    output = tmp_path / "out"
    for files in (1, 6, 12):
        process = start(chat_directory, dataset, output)
        process.wait_until(lambda files=files: len(written(output)) >= files)
        process.send(signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL
        assert yaml.safe_load((output / "metadata.yaml").read_text())["complete"] is False
    kept = written(output)
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
            write = run_directory.RunDirectory._write_metadata
            patch.setattr(
                run_directory.RunDirectory, "_write_metadata", lambda d, m: stop() if m["complete"] else write(d, m)
            )
        else:
            patch.setattr(store.Store, moment, stop)
        with pytest.raises(Stopped):
            scripts.compute_fisher(chat_directory, dataset, tmp_path / "out")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


def test_ctrl_c_keeps_finished_batches_and_says_how_to_go_on(chat_directory, dataset, finished_pipeline, tmp_path):
    process = start(chat_directory, dataset, tmp_path / "out")
    process.wait_until(lambda: len(written(tmp_path / "out")) >= 3)
    process.send(signal.SIGINT)
    code, errors = process.end()
    assert code == 130
    assert "finished batches are saved" in errors and "Traceback" not in errors
    assert len(written(tmp_path / "out")) >= 3
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    chat_directory, dataset, finished_pipeline, small_disk, capsys
):
    output = small_disk.path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    said = capsys.readouterr().err
    assert said.startswith("compute_fisher.py: error: cannot write ") and said.count("\n") == 1
    assert "No space left on device" in said
    assert written(output)
    small_disk.grow()
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert_same_results(output, finished_pipeline)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_shard_is_named_and_computed_again(
    damage, chat_directory, dataset, finished_pipeline, tmp_path, capsys
):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "close", lambda *_: sys.exit(9))
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


def test_a_finished_run_is_left_alone_and_overwritten_when_asked(chat_directory, dataset, tmp_path, capsys):
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
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    (output / "notes.txt").write_text("mine")
    (output / ".prompts.jsonl-abandoned").write_text("half of it")
    write = run_directory.RunDirectory._write_metadata
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_directory.RunDirectory, "_write_metadata",
            lambda d, m: sys.exit(9) if m["config"]["num_prompts"] == 5 else write(d, m),
        )  # fmt: skip
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5, overwrite=True)
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=5) == 0
    assert len(records(output)) == 5
    assert {path.name for path in output.iterdir()} == {*PIPELINE_FILES, "notes.txt"}


def test_a_run_with_other_settings_model_or_data_is_refused(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "close", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output)
    assert scripts.compute_fisher(chat_directory, dataset, output, top_k_tokens=5) == 2
    assert "top_k_tokens was 6 and is 5" in capsys.readouterr().err

    original = dataset.read_text()
    try:
        dataset.write_text(original.replace('"zebra animals', '"zebra animal', 1))
        assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    finally:
        dataset.write_text(original)
    assert "the dataset has changed" in capsys.readouterr().err

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_fisher, "fingerprint", lambda model: "another")
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
    assert "note: out of memory: going on with batches of" in capsys.readouterr().err
    for a, b in zip(load_fisher_matrices(tmp_path / "out"), load_fisher_matrices(finished_pipeline), strict=True):
        assert np.abs(a.S / b.S - 1).max() < 1e-4


def test_out_of_memory_with_a_single_prompt_is_a_line_of_advice(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    def no_room(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fisher, "pull_back", no_room)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("compute_fisher.py: error: not enough memory: try a smaller --max-length")


# --- several processes ---------------------------------------------------------------------------


def torchrun(script: Path, words: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *words]
    # torchrun gives each process one thread, and another number of threads rounds otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_two_processes_make_what_one_makes(chat_directory, dataset, finished_pipeline, tmp_path):
    words = pipeline_words(chat_directory, dataset, tmp_path / "out")
    result = torchrun(ROOT / "compute_fisher.py", words)
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
        "sys.exit(compute_fisher.main(compute_fisher.parse(sys.argv[1:])))\n"
    )
    result = torchrun(failing, pipeline_words(chat_directory, dataset, tmp_path / "out"))
    assert result.returncode != 0
    assert "compute_fisher.py: error: the second process has failed" in result.stderr
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0
    assert_same_results(tmp_path / "out", finished_pipeline)


# --- bad input -----------------------------------------------------------------------------------

BAD = {
    "hook-layer-name model.layer.1": "has no module 'model.layer.1': its layers are model.layers.0 ... model.layers.2",
    "hook-layer-name 7": "has no module '7': its layers are model.layers.0 ... model.layers.2",
    "hook-layer-name lm_head": "no Fisher matrix at lm_head: its output is not of shape",
    "config none.yaml": "cannot read the config none.yaml",
    "dataset-name none.jsonl": "no such file",
    "dataset-name no/such": "as a dataset of the hub",
    "prompt-column question": "no column 'question'",
    "output-dir /dev/null/out": "cannot write to",
    "device warp": "--device warp is not available",
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


def test_what_went_wrong_before_the_first_result_needs_no_overwrite(chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", max_length=3) == 2
    assert "--max-length 3 leaves no room" in capsys.readouterr().err
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


def test_a_model_whose_predictions_depend_on_the_padding_is_refused(
    chat_directory, dataset, tmp_path, monkeypatch, capsys
):
    linearize = fisher.linearize_prompts

    def wrong_token(model, module, ids, lengths, *rest):  # the last token of the padded row
        return linearize(model, module, ids, torch.full_like(lengths, ids.shape[1]), *rest)

    monkeypatch.setattr(fisher, "linearize_prompts", wrong_token)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "LlamaForCausalLM is not supported: its predictions change by" in said and said.count("\n") == 1
