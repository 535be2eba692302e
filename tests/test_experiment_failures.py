"""The experiment when something goes wrong: bad input, no memory, NaN, Ctrl-C and kill."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from conftest import make_model_directory
import core_experiment
import fisher
from residual_fisher.common.program import SOME_FAILED
from residual_fisher.experiment import sentences
from residual_fisher.model import loading, reading
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
    "--device warp": "device warp is not available",
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


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_sentence_that_leads_to_nan_is_left_out_and_said(number, tmp_path, byte_level, capsys):
    """For real: a token that only this sentence has is NaN."""
    texts = ["The zoo has many animals.", "We like wild animals.", "In the sea live animals.", "A quiz on animals."]
    order = list(sentences.diverse_order([text.removesuffix(" animals.") for text in texts]))
    ids = [set(byte_level(texts[index]).input_ids) for index in order]
    only_there = min(ids[number] - set().union(*ids[:number], *ids[number + 1 :]))
    directory = make_model_directory(tmp_path / "model", byte_level)
    model, _ = loading.load(str(directory), device="cpu")
    model.model.embed_tokens.weight[only_there] = float("nan")
    model.save_pretrained(directory)
    data = tmp_path / "data.txt"
    data.write_text("\n".join(texts))
    assert scripts.core_experiment(directory, tmp_path / "out", "--data-file", str(data)) == SOME_FAILED
    out, err = capsys.readouterr()
    reason = f"NaN or infinity at layer 0 of sentence {texts[order[number]]!r}"
    assert "\nnote: left out: the activations hold " in err and reason in err
    assert "1 sentences failed: `failed` in experiment_results.json says why" in out
    results, arrays = experiment_results(tmp_path / "out")
    assert results["complete"] is True and len(arrays["eigenvectors"]) == 3
    assert results["sentences"] == [texts[index] for place, index in enumerate(order) if place != number]
    (failed,) = results["failed"]
    assert failed["sentence"] == texts[order[number]] and reason in failed["reason"]
    assert "--dtype" not in failed["reason"]  # it is float32 already
    assert set(os.listdir(tmp_path / "out")) == EXPERIMENT_FILES


def test_too_many_sentences_that_fail_stop_the_run(model_directory, tmp_path, monkeypatch, capsys):
    perturb, calls = core_experiment.perturb, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) % 3:
            raise fisher.NumericalError("the Fisher matrix is zero", 0)
        return perturb(*arguments)

    monkeypatch.setattr(core_experiment, "perturb", fail)
    assert scripts.core_experiment(model_directory, tmp_path, "--num-sentences", "20") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("core_experiment.py: error: 6 of the first 8 sentences failed: the Fisher matrix is zero at")
    results, _ = experiment_results(tmp_path)
    assert len(results["sentences"]) == 2 and results["complete"] is False


def test_perturbations_that_overflow_are_null_and_said(model_directory, tmp_path, capsys):
    words = ["--scales", "-1", "1", "1e18", "1e30", "1e39", "--scale-unit", "norm"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    assert "perturbations were too long for numbers to hold: null in" in capsys.readouterr().out
    results, _ = experiment_results(tmp_path)
    for sentence in results["perturbation_results"]:
        for layer in sentence.values():
            assert list(layer) == ["-1", "1", "1e+18", "1e+30", "1e+39"]
            assert layer["1"]["kl"] > 0 and layer["1"]["predicted_kl"] > 0
            assert layer["1e+30"]["predicted_kl"] is None
            far = layer["1e+39"]
            assert (far["kl"], far["target_prob"], far["top_changed"], far["top_ids"]) == (None, None, None, [])
    assert set(os.listdir(tmp_path)) == EXPERIMENT_FILES
    assert core_experiment.main(core_experiment.parse(["--redraw", str(tmp_path)])) == 0


# --- no memory -----------------------------------------------------------------------------------


def test_out_of_memory_is_a_line_of_advice(model_directory, tmp_path, capsys, monkeypatch):
    def no_room(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fisher, "pull_back", no_room)
    assert scripts.core_experiment(model_directory, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("core_experiment.py: error: not enough memory: try fewer --layers")
    assert not (tmp_path / "out").exists()


def test_a_lack_of_memory_that_a_library_reports_in_its_own_words_is_the_same_line(
    model_directory, tmp_path, capsys, monkeypatch
):
    def no_room(*arguments, **options):
        raise RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(...)`")

    monkeypatch.setattr(torch.linalg, "eigh", no_room)
    assert scripts.core_experiment(model_directory, tmp_path / "out") == 2
    assert "core_experiment.py: error: not enough memory: try fewer --layers" in capsys.readouterr().err


def test_a_run_on_the_cpu_leaves_a_gpu_alone(model_directory, tmp_path, monkeypatch):
    def touched(*_):
        raise AssertionError("a context was made on the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "set_device", "mem_get_info", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert scripts.core_experiment(model_directory, tmp_path / "out", "--device", "cpu") == 0


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
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (torch.OutOfMemoryError(), 2, "error: not enough memory"),
    ],
    ids=["Ctrl-C", "no memory"],
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
    assert "Stopped: 2 finished sentences are kept" in said and message in said
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
