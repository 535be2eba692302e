"""The pipeline when something goes wrong: killed, interrupted, a full disk, several processes, bad input."""

import errno
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from residual_fisher.pipeline.run_directory import INCIDENTAL
import torch
import transformers as hf
import yaml

import compute_fisher
import fisher
from residual_fisher.common import lock
from residual_fisher.common.lock import lock_directory
from residual_fisher.common.program import UserError
from residual_fisher.model import loading
from residual_fisher.pipeline import load_fisher_matrices, run_directory, store
from residual_fisher.pipeline.processes import Processes
import scripts
from scripts import PIPELINE_FILES, ROOT, arrays, assert_same_results, pipeline_words, records

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


@pytest.mark.usefixtures("without_pictures")
def test_a_run_of_an_earlier_version_without_directions_goes_on(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    output, measure = tmp_path / "out", compute_fisher.measure

    def earlier(settings, subject, batch):
        if any((tmp_path / "out" / "shards").glob("shard_*")):
            sys.exit(9)
        results = measure(settings, subject, batch)
        for result in results:
            del result.record["directions"]
        return results

    with monkeypatch.context() as patch:
        patch.setattr(compute_fisher, "measure", earlier)
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output)
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0
    assert "40 prompts stand out from most of them" in capsys.readouterr().out
    found, expected = records(output), records(finished_pipeline)
    assert {"directions" in record for record in found} == {True, False}
    for ours, whole in zip(found, expected, strict=True):
        assert ours == {key: whole[key] for key in whole if key in ours or key != "directions"}
    assert all(arrays(output)[name].tobytes() == array.tobytes() for name, array in arrays(finished_pipeline).items())


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
        patch.setattr(compute_fisher, "fingerprint", lambda *_: "another")
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


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    theirs = [compute_fisher.own_device(device, Processes(rank, 4, rank % 2)) for rank in range(4)]  # on two machines
    assert theirs == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert compute_fisher.own_device(device, Processes()) == device
    for named in ("cpu", "cuda:1"):
        assert compute_fisher.own_device(named, Processes(1, 2, 1)) == named


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_a_line_that_says_how_many(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        compute_fisher.own_device(device, Processes(2, 4, 2))
    assert str(caught.value).startswith("process 3 of 4 has no GPU of its own: this machine has 2, so start torchrun")
    assert "--device" not in str(caught.value)


def test_processes_that_want_a_gpu_where_there_is_none_are_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert compute_fisher.own_device("auto", Processes(1, 2, 1)) == "auto"
    assert compute_fisher.own_device("cuda", Processes(1, 2, 1)) == "cuda"  # refused by `load`, as for one process


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


def poison(monkeypatch, is_bad) -> None:
    """Makes prompts fail whose length `is_bad`."""
    linearize = fisher.linearize_prompts

    def poisoned(model, module, ids, lengths, *rest):
        for number, length in enumerate(lengths.tolist()):
            if is_bad(length):
                raise fisher.NumericalError("the logits hold NaN or infinity", None, number)
        return linearize(model, module, ids, lengths, *rest)

    monkeypatch.setattr(fisher, "linearize_prompts", poisoned)


def test_a_prompt_that_fails_is_recorded_and_the_run_goes_on(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    lengths = sorted(record["tokens"] for record in records(finished_pipeline))
    poison(monkeypatch, lambda length: length == lengths[0])
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == compute_fisher.SOME_FAILED
    failed = [record["index"] for record in records(tmp_path / "out") if "failed" in record]
    assert failed and f"{len(failed)} prompts failed (" in capsys.readouterr().out
    matrices, whole = load_fisher_matrices(tmp_path / "out"), load_fisher_matrices(finished_pipeline)
    for index, record in enumerate(records(tmp_path / "out")):
        if index in failed:
            assert record["failed"] == "the logits hold NaN or infinity" and record["outlier_score"] == 0
            assert record["directions"] == []
            assert not matrices[index].S.any() and matrices[index].U.shape == whole[index].U.shape
        else:
            assert np.allclose(matrices[index].S, whole[index].S, rtol=1e-4)
    metadata = yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())
    assert metadata["statistics"]["failed_prompts"] == failed
    assert metadata["statistics"]["trace"]["min"] > 0  # they count for no statistic
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 0  # finished: nothing to do


def test_a_run_most_of_whose_prompts_fail_stops(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda length: True)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "8 of the first 8 prompts failed: the logits hold NaN or infinity" in said and said.count("\n") == 1


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


# --- two at once, and files that change -----------------------------------------------------------


def test_a_second_run_in_the_directory_is_told_who_holds_it(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    with lock_directory(output):
        words = scripts.pipeline_words(chat_directory, dataset, output)
        code, said = scripts.start("compute_fisher", words, output, os.getpid).end()
        assert code == 2
        assert f"{output} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in said
    assert not output.exists()
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0


def test_where_files_cannot_be_locked_a_fresh_file_is_a_lock_and_an_old_one_is_not(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock_directory(tmp_path), pytest.raises(UserError, match="is in use by process"), lock_directory(tmp_path):
        pass
    (tmp_path / lock.LOCK).write_text("{}")  # of a node that crashed
    os.utime(tmp_path / lock.LOCK, (time.time() - 2 * lock.STALE,) * 2)
    with lock_directory(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_batch_that_vanishes_while_the_run_goes_on_closes_no_shard(chat_directory, dataset, tmp_path, capsys):
    output, write = tmp_path / "out", store.Store.write_batch
    with pytest.MonkeyPatch.context() as patch:

        def write_and_lose(self, number, batch, results):
            write(self, number, batch, results)
            if batch == 3:
                self.batch(number, 1).unlink()

        patch.setattr(store.Store, "write_batch", write_and_lose)
        assert scripts.compute_fisher(chat_directory, dataset, output) == 2
    assert "have vanished from" in capsys.readouterr().err
    assert not list((output / "shards").glob("shard_*.npz"))
    assert scripts.compute_fisher(chat_directory, dataset, output) == 0


def test_a_dataset_that_lost_whole_shards_is_refused(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "close", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            scripts.compute_fisher(chat_directory, dataset, output)
    few = tmp_path / dataset.name
    few.write_text("".join(dataset.read_text().splitlines(keepends=True)[:34]))  # 32 prompts: the first shard's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("residual_fisher.pipeline.run_directory.INCIDENTAL", (*INCIDENTAL, "dataset_name"))
        assert scripts.compute_fisher(chat_directory, few, output) == 2
    assert "the dataset has changed" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "flipped"])
@pytest.mark.parametrize("name", ["fisher_matrices_compressed.npz", "prompts.jsonl", "fisher_spectra.png"])
def test_a_finished_run_with_a_damaged_file_is_computed_again(name, damage, chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    before = arrays(output)
    content = bytearray((output / name).read_bytes())
    if damage == "gone":
        (output / name).unlink()
    else:
        content[-1:] = b"?"  # without pictures, theirs is empty
        (output / name).write_bytes(content)
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    said = capsys.readouterr()
    assert f"{name} is missing or damaged: computing it again" in said.err
    assert all(before[key].tobytes() == array.tobytes() for key, array in arrays(output).items())
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_a_finished_run_of_another_dataset_is_not_called_finished(chat_directory, dataset, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(dataset.read_text())
    assert scripts.compute_fisher(chat_directory, data, tmp_path / "out", num_prompts=3) == 0
    data.write_text(dataset.read_text().replace("zebra", "horse"))
    assert scripts.compute_fisher(chat_directory, data, tmp_path / "out", num_prompts=3) == 2
    assert "the dataset has changed since the run in" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["template", "weight", "head", "rms_norm_eps", "nothing"])
def test_a_finished_run_of_another_model_is_not_called_finished(
    change, chat_directory, dataset, tmp_path, capsys, monkeypatch
):
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


@pytest.mark.parametrize("mistake", [{"hook_layer_name": "9"}, {"max_length": "3"}, {"dataset_name": "none.jsonl"}])
def test_overwriting_checks_everything_before_it_removes_anything(mistake, chat_directory, dataset, tmp_path):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    data = mistake.pop("dataset_name", dataset)
    assert scripts.compute_fisher(chat_directory, data, output, num_prompts=3, overwrite=True, **mistake) == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_results_without_metadata_are_this_scripts_own(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 0
    (output / "metadata.yaml").unlink()
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3) == 2
    assert "holds results without a readable metadata.yaml: --overwrite removes them" in capsys.readouterr().err
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3, overwrite=True) == 0
    assert {path.name for path in output.iterdir()} == PIPELINE_FILES


def test_shards_may_be_a_link_to_another_disk(chat_directory, dataset, tmp_path):
    output, elsewhere = tmp_path / "out", tmp_path / "disk"
    output.mkdir()
    elsewhere.mkdir()
    (output / "shards").symlink_to(elsewhere)
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=3, overwrite=True) == 0
    assert (output / "shards").is_symlink() and not list(elsewhere.iterdir())


def test_processes_without_their_numbers_are_a_line(chat_directory, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out") == 2
    assert "start several processes with torchrun" in capsys.readouterr().err
