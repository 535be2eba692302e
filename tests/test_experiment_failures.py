"""The experiment when something goes wrong: bad input, no memory, NaN and Ctrl-C."""

from contextlib import ExitStack
import os
from pathlib import Path
import signal

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama
import yaml

from conftest import FINISHED_EXPERIMENT, make_model_directory
import core_experiment
import fisher
from residual_fisher.common.archives import archives_in
from residual_fisher.common.program import SOME_FAILED
from residual_fisher.experiment import sentences
from residual_fisher.model import loading, reading
import scripts
from scripts import EXPERIMENT_FILES, calls_of, contents, experiment_results, experiment_words

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
    "--data-file none.json": "cannot read none.json: no such file",
    "--target-word unicorns": "has 'unicorns' as a whole word after another word; did you mean 'unicorn'?",
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
    monkeypatch.setattr(reading, "prefill", lambda model, ids: prefill(model, ids.flip(-1)))
    assert "whole prompt" not in capsys.readouterr().out
    assert scripts.core_experiment(model_directory, tmp_path / "whole") == 0
    said = capsys.readouterr().out
    assert (
        said.count("note: LlamaForCausalLM is not read in the fastest way, but by whole prompts (the cached and") == 1
    )
    cached, whole = (experiment_results(tmp_path / name) for name in ("cached", "whole"))
    assert np.allclose(cached[1]["eigenvalues"], whole[1]["eigenvalues"], rtol=1e-4)
    assert cached[0]["environment"]["ways"] == {"shared prefix": "the fastest"}
    ((way, why),) = whole[0]["environment"]["ways"].items()
    assert way == "whole prompts" and why.startswith("the cached and plain predictions differ by")


class Kernel(torch.autograd.Function):
    """The identity, as a kernel of a model's own would compute it: from the memory of the tensors that it is given."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy().copy())

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.numpy().copy())


@pytest.mark.usefixtures("without_pictures")
def test_gradients_that_a_models_own_kernel_cannot_batch_are_taken_one_by_one(
    model_directory, chat_directory, dataset, finished_experiment, finished_pipeline, tmp_path, capsys, monkeypatch
):
    mlp = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: Kernel.apply(mlp(self, x)))
    assert scripts.core_experiment(model_directory, tmp_path / "experiment", *FINISHED_EXPERIMENT) == 0
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "pipeline") == 0
    assert (
        capsys.readouterr().err.count("note: LlamaForCausalLM takes its gradients one by one: Cannot access data") == 2
    )
    (document, found), (_, expected) = map(experiment_results, (tmp_path / "experiment", finished_experiment))
    for name in ("eigenvalues", "eigenvectors"):  # sums of another order
        assert np.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4), name
    metadata = yaml.safe_load((tmp_path / "pipeline" / "metadata.yaml").read_text())
    for environment in (document["environment"], metadata["environment"]):
        assert environment["ways"]["gradients"].startswith("one by one: Cannot access data pointer")
    values = [[r["singular_values"] for r in scripts.records(o)] for o in (tmp_path / "pipeline", finished_pipeline)]
    assert np.allclose(*values, rtol=1e-4, atol=1e-6)


def test_a_model_that_fisher_does_not_predict_is_refused(model_directory, dataset, tmp_path, capsys):
    refused = fisher.UnsupportedModelError("a small perturbation changes its prediction 3 times as much")
    with calls_of(fisher, "check_prediction", refused):
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
    assert "activations hold NaN or infinity at layer 2 of sentence 'The zoo has many animals.' (line 1)" in message
    assert not (tmp_path / "out").exists()


TEXTS = ["The zoo has many animals.", "We like wild animals.", "In the sea live animals.", "A quiz on animals."]


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """TEXTS as --data-file."""
    (tmp_path / "data.txt").write_text("\n".join(TEXTS))
    return ["--data-file", str(tmp_path / "data.txt")]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_sentence_that_leads_to_nan_is_left_out_and_said(number, texts, tmp_path, byte_level, capsys):
    """For real: a token that only this sentence has is NaN. The finished run is told of again as it was told of."""
    order = list(sentences.diverse_order([text.removesuffix(" animals.") for text in TEXTS]))
    ids = [set(byte_level(TEXTS[index]).input_ids) for index in order]
    only_there = min(ids[number] - set().union(*ids[:number], *ids[number + 1 :]))
    directory, output = make_model_directory(tmp_path / "model", byte_level), tmp_path / "out"
    model, _ = loading.load(str(directory), device="cpu")
    model.model.embed_tokens.weight[only_there] = float("nan")
    model.save_pretrained(directory)
    assert scripts.core_experiment(directory, output, *texts) == SOME_FAILED
    out, err = capsys.readouterr()
    reason = f"NaN or infinity at layer 0 of sentence {TEXTS[order[number]]!r}"
    assert "\nnote: left out: the activations hold " in err and reason in err
    assert "1 sentences failed: `failed` in experiment_results.json says why" in out
    results, arrays = experiment_results(output)
    assert results["complete"] is True and len(arrays["eigenvectors"]) == 3
    assert results["sentences"] == [TEXTS[index] for place, index in enumerate(order) if place != number]
    (failed,) = results["failed"]
    assert failed["sentence"] == TEXTS[order[number]] and reason in failed["reason"]
    assert "--dtype" not in failed["reason"]  # it is float32 already
    assert set(os.listdir(output)) == EXPERIMENT_FILES
    before = contents(output)
    for more in ([], ["--dry-run"]):
        assert scripts.core_experiment(directory, output, *texts, *more) == SOME_FAILED
        assert "is finished: nothing to do" in capsys.readouterr().out and contents(output) == before


def test_an_eigensolver_that_fails_costs_the_sentence_alone(model_directory, texts, tmp_path, capsys):
    """Also of a run that is extended, which does not try it again."""
    output, words = tmp_path / "out", [*texts, "--num-sentences", "2"]
    with calls_of(torch.linalg, "eigh", torch.linalg.LinAlgError("it did not converge"), at=[1]):
        assert scripts.core_experiment(model_directory, output, *words) == SOME_FAILED
    assert "note: left out: it did not converge of sentence" in capsys.readouterr().err
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert scripts.core_experiment(model_directory, output, *texts) == SOME_FAILED
    results, _ = experiment_results(output)
    assert len(calls) == 1 and len(results["sentences"]) == 3 and len(results["failed"]) == 1
    assert results["failed"][0]["reason"].startswith("it did not converge")


NO_MATRIX = fisher.NumericalError("the Fisher matrix is zero", 0)


def test_if_all_sentences_fail_the_folder_is_left_as_it_was(model_directory, texts, tmp_path, capsys):
    output = tmp_path / "out"
    with calls_of(core_experiment, "measure_sentence", NO_MATRIX):
        assert scripts.core_experiment(model_directory, output, *texts) == 2
        assert not output.exists()
        assert scripts.core_experiment(model_directory, output, *texts, "--dry-run") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("core_experiment.py: error: the Fisher matrix is zero") for line in said].count(True) == 2
    assert not output.exists() and not any("Traceback" in line for line in said)
    assert scripts.core_experiment(model_directory, output, *texts, "--num-sentences", "2") == 0
    before = contents(output)
    with calls_of(core_experiment, "measure_sentence", NO_MATRIX):
        assert scripts.core_experiment(model_directory, output, *texts, "--overwrite") == 2
    assert contents(output) == before


def test_too_many_sentences_that_fail_stop_the_run(model_directory, tmp_path, capsys):
    words = ["--num-sentences", "20"]
    with calls_of(core_experiment, "measure_sentence", NO_MATRIX, at=[n for n in range(1, 9) if n % 3]):
        assert scripts.core_experiment(model_directory, tmp_path, *words) == 2
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
    assert scripts.run("core_experiment", ["--redraw", str(tmp_path)]) == 0


# --- no memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (fisher, "pull_back", torch.OutOfMemoryError),
        (torch.linalg, "eigh", RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDn`")),
    ],
    ids=["torch", "in a library's own words"],
)
def test_out_of_memory_is_one_line_of_advice(owner, name, error, model_directory, tmp_path, capsys):
    with calls_of(owner, name, error):
        assert scripts.core_experiment(model_directory, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("core_experiment.py: error: not enough memory: try fewer --layers")
    assert not (tmp_path / "out").exists()


def test_a_run_on_the_cpu_leaves_a_gpu_alone(model_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ExitStack() as stack:
        for name in ("synchronize", "set_device", "mem_get_info", "current_device", "_lazy_init"):
            stack.enter_context(calls_of(torch.cuda, name, AssertionError("a context was made on the GPU")))
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
    document = experiment_results(tmp_path)[0]
    assert len(document["sentences"]) == 2
    assert document["environment"]["ways"]["gradients at once"] == "10: out of memory"
    assert failed == [20]  # the first check of the model: all that follows knows


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "the same command resumes the run"),
        (torch.OutOfMemoryError, 2, "error: not enough memory"),
    ],
    ids=["Ctrl-C", "no memory"],
)
def test_whatever_stops_it_finished_sentences_are_kept(error, code, message, model_directory, tmp_path, capsys):
    with calls_of(core_experiment, "measure_sentence", error, at=[3]):
        assert scripts.core_experiment(model_directory, tmp_path) == code
    said = capsys.readouterr().err
    assert "Stopped: 2 finished sentences are kept" in said and message in said
    assert finished_sentences(tmp_path) == 2 == len(archives_in(tmp_path / "items"))


def finished_sentences(output: Path) -> int:
    """Of a run that was stopped, whose files can all be read."""
    results, arrays = experiment_results(output)
    assert results["complete"] is False and set(os.listdir(output)) == EXPERIMENT_FILES
    assert len(results["sentences"]) == len(arrays["eigenvectors"])
    assert all(matplotlib.image.imread(path).size for path in output.glob("*.png"))
    return len(results["sentences"])


def test_control_c_as_a_user_sends_it(model_directory, tmp_path):
    output = tmp_path / "out"
    words = experiment_words(model_directory, output, "--num-sentences", "150")
    running = scripts.start("core_experiment", words, output, scripts.slow_sentences)
    running.wait_until(lambda: len(archives_in(output / "items")) >= 2)
    running.send(signal.SIGINT)
    code, errors = running.end()
    assert code == 130 and "Traceback" not in errors, errors
    # one may have been written, and no more, when Ctrl-C came
    kept = len(archives_in(output / "items"))
    assert 2 <= kept < 150 and finished_sentences(output) in (kept - 1, kept)
