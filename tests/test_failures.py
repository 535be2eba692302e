"""The experiment when something goes wrong: bad input, no memory, Ctrl-C and kill."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from command import FILES, SMALL, read, run
from conftest import ROOT, make_model_directory
import core_experiment
import fisher
import last_token
import models

# --- bad input ---

BAD_ARGUMENTS = {
    "--num-sentences 0": "positive whole number",
    "--num-sentences -3": "positive whole number",
    "--max-vocab-subset 0": "positive whole number",
    "--batch-size x": "positive whole number",
    "--num-controls -1": "0 or more",
    "--layers 99": "layers 0 to 2",
    "--layers -1": "0 or more",
    "--scales nan": "not a number",
    "--scales 0": "at least one must not be 0",
    "--scale-unit miles": "invalid choice",
    "--dtype int8": "invalid choice",
    "--device warp": "not available",
    "--data-file none.json": "cannot read none.json",
    "--target-word unicorns": "no list for the target word",
    "--model-name /no/such/model": "cannot load model",
    "--output-dir /dev/null/results": "cannot write",
    "--no-such-flag": "unrecognized arguments",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_input_is_one_line_and_exit_code_2(arguments, model_directory, tmp_path, capsys):
    try:
        code = run(model_directory, tmp_path / "out", *arguments.split())
    except SystemExit as error:  # argparse's way out
        code = error.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert message.startswith("core_experiment.py: error: ")
    assert BAD_ARGUMENTS[arguments] in message
    assert not (tmp_path / "out").exists()


def test_as_a_process_bad_input_is_one_line_on_stderr(model_directory, tmp_path):
    command = [sys.executable, ROOT / "core_experiment.py", "--model-name", model_directory, "--layers", "7"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "core_experiment.py: error: --layers 7: the model has layers 0 to 2\n"
    assert os.listdir(tmp_path) == []


def test_nan_names_the_sentence_and_the_layer(tmp_path, byte_level, capsys):
    directory = make_model_directory(tmp_path / "model", byte_level)
    model, _ = models.load_model(str(directory), device="cpu")
    model.model.layers[2].mlp.down_proj.weight[0] = float("nan")
    model.save_pretrained(directory)
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.")
    assert run(directory, tmp_path / "out", "--data-file", str(data)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "activations hold NaN or infinity at layer 2 of sentence 'The zoo has many animals.'" in message
    assert not (tmp_path / "out").exists()


def test_an_architecture_whose_cache_misleads_is_refused(model_directory, tmp_path, capsys, monkeypatch):
    prefill = last_token.prefill
    monkeypatch.setattr(last_token, "prefill", lambda model, ids: prefill(model, ids.flip(0)))
    assert run(model_directory, tmp_path / "out") == 2
    assert "LlamaForCausalLM is not supported" in capsys.readouterr().err


def test_out_of_memory_is_a_line_of_advice(model_directory, tmp_path, capsys, monkeypatch):
    def no_room(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fisher, "pull_back", no_room)
    assert run(model_directory, tmp_path / "out") == 2
    assert "not enough memory: try" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_smaller_batch_after_running_out_of_memory_is_noted(model_directory, tmp_path, capsys, monkeypatch):
    vmap, failed = torch.func.vmap, []

    def room_for_ten(function):
        def mapped(rows):
            if len(rows) > 10:
                failed.append(len(rows))
                raise torch.OutOfMemoryError
            return vmap(function)(rows)

        return mapped

    monkeypatch.setattr(torch.func, "vmap", room_for_ten)
    assert run(model_directory, tmp_path, "--num-sentences", "2") == 0
    assert "note: out of memory: going on with batches of 7" in capsys.readouterr().err
    assert len(read(tmp_path)[0]["sentences"]) == 2
    assert failed == [30, 15]  # the second sentence knows


# --- interruptions ---


def test_interrupted_it_keeps_the_sentences_that_are_done(model_directory, tmp_path, monkeypatch, capsys):
    perturb, calls = core_experiment.perturb, []

    def interrupt_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perturb(*arguments)

    monkeypatch.setattr(core_experiment, "perturb", interrupt_the_third)
    assert run(model_directory, tmp_path) == 130
    assert "keeping the 2 of 4 sentences" in capsys.readouterr().err
    results, arrays = read(tmp_path)
    assert results["complete"] is False
    assert len(results["sentences"]) == len(arrays["eigenvectors"]) == 2
    assert set(os.listdir(tmp_path)) == FILES


def test_control_c_and_kill_as_a_user_sends_them(model_directory, tmp_path):
    """SIGINT keeps all that is done; after SIGKILL, what was saved on the way can be read."""
    arguments = ["--model-name", str(model_directory), "--num-sentences", "150", *SMALL[2:]]
    slowly = (
        "import sys, time, core_experiment as c\n"
        "c.SAVE_EVERY = 0.5\n"
        "perturb = c.perturb\n"
        "c.perturb = lambda *a: (time.sleep(0.2), perturb(*a))[1]\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    for sent, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        output = tmp_path / sent.name
        process = subprocess.Popen(
            [sys.executable, "-c", slowly, *arguments, "--output-dir", str(output)], cwd=ROOT, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (output / "experiment_results.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "Traceback" not in err
        results, arrays = read(output)
        assert results["complete"] is False
        assert 0 < len(arrays["eigenvectors"]) == len(results["sentences"]) < 150
        if sent == signal.SIGINT:
            assert set(os.listdir(output)) == FILES
