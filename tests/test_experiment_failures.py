"""The experiment when something goes wrong: bad input, no memory, NaN, Ctrl-C and kill."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from conftest import make_model_directory
import core_experiment
from experiment import sentences
import fisher
from model import loading, reading
import scripts
from scripts import EXPERIMENT_FILES, experiment_results, experiment_words

# --- bad input -----------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "--num-sentences 0": "argument --num-sentences: '0' is not a positive whole number",
    "--num-sentences -3": "argument --num-sentences: '-3' is not a positive whole number",
    "--max-vocab-subset 0": "argument --max-vocab-subset: '0' is not a positive whole number",
    "--batch-size x": "argument --batch-size: 'x' is not a positive whole number",
    "--num-controls -1": "argument --num-controls: '-1' is not a whole number, 0 or more",
    "--layers 99": "--layers 99: the model has layers 0 to 2",
    "--layers -1": "argument --layers: '-1' is not a whole number, 0 or more",
    "--scales nan": "argument --scales: 'nan' is not a number",
    "--scales 0": "argument --scales: at least one must not be 0",
    "--scale-unit miles": "argument --scale-unit: 'miles' is none of eigenvalue, nats, norm",
    "--dtype int8": "argument --dtype: 'int8' is none of auto, float64, float32, bfloat16, float16",
    "--device warp": "--device warp is not available",
    "--data-file none.json": "cannot read none.json: No such file",
    "--target-word unicorns": "no list for the target word 'unicorns'",
    "--model-name /no/such/model": "cannot load model '/no/such/model'",
    "--output-dir /dev/null/results": "cannot write to /dev/null/results",
    "--no-such-flag": "unrecognized argument --no-such-flag",
    "--num-sentence=3": "unrecognized argument --num-sentence: did you mean --num-sentences?",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_input_is_one_line_and_exit_code_2(arguments, model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", *arguments.split())
    assert scripts.as_program("core_experiment", words) == 2
    said = capsys.readouterr().err
    assert said.startswith("core_experiment.py: error: ") and said.count("\n") == 1
    assert BAD_ARGUMENTS[arguments] in said
    assert "--model-path" not in said  # the other script's
    assert not (tmp_path / "out").exists()


def test_require_predicted_with_none_left_is_an_error(model_directory, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.")
    words = ["--data-file", str(data), "--require-predicted"]
    assert scripts.core_experiment(model_directory, tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert said == (
        "core_experiment.py: error: in none of 1 sentences is 'animals' the top prediction (--require-predicted)\n"
    )


def test_a_cache_that_misleads_gives_way_to_whole_prompts(model_directory, tmp_path, capsys, monkeypatch):
    assert scripts.core_experiment(model_directory, tmp_path / "cached") == 0
    prefill = reading.prefill
    monkeypatch.setattr(reading, "prefill", lambda model, ids, shared: prefill(model, ids.flip(0), shared))
    assert "whole prompt" not in capsys.readouterr().out
    assert scripts.core_experiment(model_directory, tmp_path / "whole") == 0
    said = capsys.readouterr().out
    assert "note: LlamaForCausalLM remembers more than keys and values, so every pass runs the whole prompt" in said
    cached, whole = (experiment_results(tmp_path / name)[1] for name in ("cached", "whole"))
    assert np.allclose(cached["eigenvalues"], whole["eigenvalues"], rtol=1e-4)


def test_a_model_that_fisher_does_not_predict_is_refused(model_directory, dataset, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise fisher.UnsupportedModelError("a small perturbation changes its prediction 3 times as much")

    monkeypatch.setattr(fisher, "check_prediction", refuse)
    assert scripts.core_experiment(model_directory, tmp_path / "out") == 2
    assert scripts.compute_fisher(model_directory, dataset, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.count("a small perturbation changes its prediction") == said.count("\n") == 2
    assert not (tmp_path / "out").exists()


# --- numbers that are none -----------------------------------------------------------------------


def test_nan_names_the_sentence_and_the_layer(tmp_path, byte_level, capsys):
    directory = make_model_directory(tmp_path / "model", byte_level)
    model, _ = loading.load(str(directory), device="cpu")
    model.model.layers[2].mlp.down_proj.weight[0] = float("nan")
    model.save_pretrained(directory)
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.")
    assert scripts.core_experiment(directory, tmp_path / "out", "--data-file", str(data)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "activations hold NaN or infinity at layer 2 of sentence 'The zoo has many animals.'" in message
    assert not (tmp_path / "out").exists()


def test_nan_at_a_late_sentence_keeps_those_that_are_done(tmp_path, byte_level, capsys):
    """For real: a token that only the fourth sentence has is NaN."""
    texts = ["The zoo has many animals.", "We like wild animals.", "In the sea live animals.", "A quiz on animals."]
    order = list(sentences.diverse_order([text.removesuffix(" animals.") for text in texts]))
    ids = [set(byte_level(texts[index]).input_ids) for index in order]
    only_there = min(ids[3] - set().union(*ids[:3]))
    directory = make_model_directory(tmp_path / "model", byte_level)
    model, _ = loading.load(str(directory), device="cpu")
    model.model.embed_tokens.weight[only_there] = float("nan")
    model.save_pretrained(directory)
    data = tmp_path / "data.txt"
    data.write_text("\n".join(texts))
    assert scripts.core_experiment(directory, tmp_path / "out", "--data-file", str(data)) == 2
    *_, kept, message = capsys.readouterr().err.strip().splitlines()
    assert "keeping the 3 sentences that are finished" in kept
    assert message.startswith("core_experiment.py: error: ") and "NaN or infinity" in message
    assert f"of sentence {texts[order[3]]!r}" in message and "--dtype" not in message  # it is float32 already
    results, arrays = experiment_results(tmp_path / "out")
    assert results["complete"] is False
    assert results["sentences"] == [texts[index] for index in order[:3]]
    assert len(arrays["eigenvectors"]) == 3
    assert set(os.listdir(tmp_path / "out")) == EXPERIMENT_FILES


# --- no memory -----------------------------------------------------------------------------------


def test_out_of_memory_is_a_line_of_advice(model_directory, tmp_path, capsys, monkeypatch):
    def no_room(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fisher, "pull_back", no_room)
    assert scripts.core_experiment(model_directory, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("core_experiment.py: error: not enough memory: try fewer --layers")
    assert not (tmp_path / "out").exists()


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
    assert scripts.core_experiment(model_directory, tmp_path, "--num-sentences", "2") == 0
    assert "note: out of memory: going on with batches of 10" in capsys.readouterr().err
    assert len(experiment_results(tmp_path)[0]["sentences"]) == 2
    assert failed == [20]  # the first check of the model: all that follows knows


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "keeping the 2 sentences that are finished"),
        (torch.OutOfMemoryError(), 2, "error: not enough memory"),
        (fisher.NumericalError("the gradients hold NaN or infinity", 1), 2, "at layer 2 of sentence"),
    ],
    ids=["Ctrl-C", "no memory", "NaN"],
)
def test_whatever_stops_it_the_sentences_that_are_done_are_kept(
    error, code, message, model_directory, tmp_path, monkeypatch, capsys
):
    perturb, calls = core_experiment.perturb, []

    def stop_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return perturb(*arguments)

    monkeypatch.setattr(core_experiment, "perturb", stop_the_third)
    assert scripts.core_experiment(model_directory, tmp_path) == code
    said = capsys.readouterr().err
    assert "keeping the 2 sentences that are finished" in said and message in said
    results, arrays = experiment_results(tmp_path)
    assert results["complete"] is False
    assert len(results["sentences"]) == len(arrays["eigenvectors"]) == 2
    assert set(os.listdir(tmp_path)) == EXPERIMENT_FILES


def slow_down() -> None:
    core_experiment.SAVE_EVERY = 0.5
    perturb = core_experiment.perturb
    core_experiment.perturb = lambda *arguments: (time.sleep(0.2), perturb(*arguments))[1]


def test_control_c_and_kill_as_a_user_sends_them(model_directory, tmp_path):
    """SIGINT keeps all that is done; after SIGKILL, what was saved on the way can be read."""
    expected = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    outputs = {sent: tmp_path / sent.name for sent in expected}
    running = {
        sent: scripts.start(
            "core_experiment", experiment_words(model_directory, output, "--num-sentences", "150"), output, slow_down
        )
        for sent, output in outputs.items()
    }
    for sent, process in running.items():
        process.wait_until((outputs[sent] / "experiment_results.json").exists)
        process.send(sent)
    for sent, process in running.items():
        code, errors = process.end()
        assert code == expected[sent], errors
        assert "Traceback" not in errors
        results, arrays = experiment_results(outputs[sent])
        assert results["complete"] is False
        assert 0 < len(arrays["eigenvectors"]) == len(results["sentences"]) < 150
    assert set(os.listdir(outputs[signal.SIGINT])) == EXPERIMENT_FILES
