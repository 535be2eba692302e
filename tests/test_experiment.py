"""The experiment from its command line: the files it writes, their numbers, its options."""

import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import torch

from command import FILES, read, run
from conftest import ROOT, make_model_directory
import core_experiment
import models
import plots
import reading
import sentences


@pytest.fixture(scope="module")
def finished(model_directory, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "results"
    assert run(model_directory, output, "--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1") == 0
    return output


# --- what is written ---


def test_the_four_files_are_written_and_nothing_else(finished):
    assert set(os.listdir(finished)) == FILES
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(finished / name) as image:
                assert image.width >= 1500
                assert image.info["dpi"][0] == pytest.approx(150, abs=1)


def test_the_documented_keys_and_shapes(finished):
    results, arrays = read(finished)
    assert set(results) >= {
        "experiment_config", "environment", "complete", "sentences", "contexts", "fisher", "perturbation_results",
        "similarity_matrix", "similarity_labels", "summary", "timings",
    }  # fmt: skip
    assert results["complete"] is True
    assert len(results["sentences"]) == len(results["contexts"]) == 4
    assert {k: v.shape for k, v in arrays.items()} == {
        "eigenvectors": (4, 2, 32), "eigenvalues": (4, 2), "activations": (4, 2, 32), "layers": (2,)
    }  # fmt: skip
    assert arrays["eigenvectors"].dtype == np.float32
    assert arrays["layers"].tolist() == [0, 2]
    assert set(results["timings"]) == {"load", "prefix", "gradients", "eigen", "sweep"}
    assert results["similarity_labels"] == [f"S{i}_L{layer}" for layer in (0, 2) for i in range(4)]


def test_the_numbers_are_sane(finished):
    results, arrays = read(finished)
    assert np.allclose(np.linalg.norm(arrays["eigenvectors"], axis=-1), 1, atol=1e-5)
    for i, (by_layer, pushes) in enumerate(zip(results["fisher"], results["perturbation_results"], strict=True)):
        for column, layer in enumerate(("0", "2")):
            entry = by_layer[layer]
            assert entry["eigenvalues"] == sorted(entry["eigenvalues"], reverse=True)
            assert entry["eigenvalues"][0] == pytest.approx(arrays["eigenvalues"][i, column], rel=1e-5)
            assert 0 < entry["eigenvalues"][0] <= entry["trace"] * (1 + 1e-5)
            assert 1 <= entry["effective_rank"] <= 30
            assert 0 < entry["captured_mass"] <= 1
            assert entry["activation_norm"] == pytest.approx(np.linalg.norm(arrays["activations"][i, column]), rel=1e-5)
            for scale, push in pushes[layer].items():
                assert set(push["controls"]) == {"random_0", "random_1", "difference"}
                for record in (push, *push["controls"].values()):
                    assert record["kl"] >= 0
                    assert len(record["top_tokens"]) == len(record["top_probs"]) == 5
                    assert sum(record["top_probs"]) <= 1 + 1e-6
                    assert record["step"] == pytest.approx(float(scale) / entry["eigenvalues"][0] ** 0.5, rel=1e-5)
                    assert record["top_changed"] == (record["top_ids"][0] != results["contexts"][i]["top_ids"][0])
                assert push["predicted_kl"] == pytest.approx(float(scale) ** 2 / 2, rel=1e-4)
                # no direction is predicted to matter more than the top eigenvector
                assert all(c["predicted_kl"] <= push["predicted_kl"] * (1 + 1e-5) for c in push["controls"].values())


def test_scale_zero_is_the_unperturbed_prediction(finished, model_directory):
    results, _ = read(finished)
    model, tokenizer = models.load_model(str(model_directory), device="cpu")
    for sentence, context, pushes in zip(
        results["sentences"], results["contexts"], results["perturbation_results"], strict=True
    ):
        ids = tokenizer(sentence)["input_ids"][: context["position"] + 1]
        log_probs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        top = log_probs.topk(5)
        target = tokenizer(sentence)["input_ids"][context["position"] + 1]
        assert context["target_token"] == tokenizer.decode([target])
        assert context["target_probability"] == pytest.approx(log_probs[target].exp().item(), rel=1e-4)
        assert context["target_rank"] == 1 + int((log_probs > log_probs[target]).sum())
        assert context["previous_token"] == tokenizer.decode(ids[-1:])
        for layer in pushes.values():
            for record in (layer["0"], *layer["0"]["controls"].values()):
                assert record["kl"] == record["step"] == record["predicted_kl"] == 0
                assert record["top_ids"] == top.indices.tolist()
                assert record["top_probs"] == pytest.approx(top.values.exp().tolist(), rel=1e-4)


def test_small_pushes_cost_what_was_predicted(model_directory, tmp_path):
    run(model_directory, tmp_path, "--max-vocab-subset", "all", "--scale-unit", "nats", "--scales", "0.02")
    results, _ = read(tmp_path)
    for pushes in results["perturbation_results"]:
        for layer in pushes.values():
            for record in (layer["0.02"], *layer["0.02"]["controls"].values()):
                assert record["kl"] == pytest.approx(record["predicted_kl"], rel=0.05)


def test_the_similarity_matrix_is_of_the_saved_eigenvectors(finished):
    results, arrays = read(finished)
    matrix = np.array(results["similarity_matrix"])
    vectors = {
        f"S{i}_L{layer}": arrays["eigenvectors"][i, column]
        for i in range(4)
        for column, layer in enumerate(arrays["layers"])
    }
    for row, a in enumerate(results["similarity_labels"]):
        for column, b in enumerate(results["similarity_labels"]):
            assert matrix[row, column] == pytest.approx(abs(vectors[a] @ vectors[b]), abs=1e-5)


def test_the_summary_is_of_the_records(finished):
    results, _ = read(finished)
    for layer, summary in results["summary"]["layers"].items():
        pushes = [s[layer][scale] for s in results["perturbation_results"] for scale in ("1", "-1")]
        assert summary["kl_median"]["fisher"] == pytest.approx(np.median([p["kl"] for p in pushes]), rel=1e-6)
        assert summary["flips"]["fisher"] == pytest.approx(np.mean([p["top_changed"] for p in pushes]))
        both = [p["controls"][name]["kl"] for p in pushes for name in ("random_0", "random_1")]
        assert summary["kl_median"]["random"] == pytest.approx(np.median(both), rel=1e-6)


@pytest.mark.parametrize("unit", ["eigenvalue", "nats", "norm"])
def test_step_lengths(unit):
    steps = core_experiment.step_lengths(
        unit, torch.tensor([-2.0, 1.0]), torch.tensor([0.25, 4.0]), torch.tensor([100.0, 300.0])
    )
    one = {"eigenvalue": [0.25, 4], "nats": [2, 0.5], "norm": [1, 3]}[unit]
    assert torch.allclose(steps, torch.tensor([[-2 * x, x] for x in one], dtype=torch.float32))


def test_the_same_command_twice_gives_the_same_bytes(finished, model_directory, tmp_path):
    run(model_directory, tmp_path, "--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1")
    name = "fisher_eigenvectors.npz"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()

    def text(output: Path) -> str:
        results = read(output)[0]
        assert results.pop("timings")
        results["experiment_config"].pop("output_dir")
        return json.dumps(results)

    assert text(tmp_path) == text(finished)


def test_fewer_sentences_are_the_first_of_more(finished, model_directory, tmp_path):
    run(model_directory, tmp_path, "--num-sentences", "2", "--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1")
    (few, few_arrays), (more, more_arrays) = read(tmp_path), read(finished)
    assert few["sentences"] == more["sentences"][:2]
    assert few["perturbation_results"] == more["perturbation_results"][:2]
    assert np.array_equal(few_arrays["eigenvectors"], more_arrays["eigenvectors"][:2])


def test_sentences_beyond_those_held_are_read_again(finished, model_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(core_experiment, "HELD", 1)
    run(model_directory, tmp_path, "--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1")
    assert read(tmp_path)[0]["perturbation_results"] == read(finished)[0]["perturbation_results"]


def test_pictures_can_be_drawn_again_from_the_results(finished, tmp_path):
    (tmp_path / plots.RESULTS).write_bytes((finished / plots.RESULTS).read_bytes())
    plots.draw(tmp_path)
    for name in (plots.SIMILARITY, plots.PERTURBATION):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


# --- options ---


def test_one_sentence_one_layer_one_scale(model_directory, tmp_path, capsys):
    arguments = ["--num-sentences", "1", "--layers", "1", "--scales", "3", "--num-controls", "0"]
    assert run(model_directory, tmp_path, *arguments) == 0
    results, arrays = read(tmp_path)
    assert arrays["layers"].tolist() == [1]
    assert list(results["perturbation_results"][0]["1"]) == ["3"]
    assert results["perturbation_results"][0]["1"]["3"]["controls"] == {}
    assert set(os.listdir(tmp_path)) == FILES


def test_all_layers_and_the_whole_vocabulary(model_directory, tmp_path):
    run(model_directory, tmp_path, "--layers", "all", "--max-vocab-subset", "all", "--scales", "1")
    results, arrays = read(tmp_path)
    assert arrays["layers"].tolist() == [0, 1, 2]
    assert all(entry["captured_mass"] == 1 for by_layer in results["fisher"] for entry in by_layer.values())


def test_more_eigenvectors_are_an_extra_array_and_change_no_other(finished, model_directory, tmp_path):
    assert run(model_directory, tmp_path, "--layers", "0", "2", "--num-eigenvectors", "12") == 0
    results, arrays = read(tmp_path)
    _, before = read(finished)
    assert all((arrays[name] == before[name]).all() for name in before)
    vectors, values = arrays["leading_eigenvectors"], arrays["leading_eigenvalues"]
    assert vectors.shape == (4, 2, 12, 32) and values.shape == (4, 2, 12)
    assert (vectors[:, :, 0] == arrays["eigenvectors"]).all() and (values[:, :, 0] == arrays["eigenvalues"]).all()
    assert (np.diff(values) <= 0).all() and (values >= 0).all()
    assert np.abs(vectors @ vectors.swapaxes(-1, -2) - np.eye(12)).max() < 1e-5
    assert len(results["fisher"][0]["0"]["eigenvalues"]) == 10


def test_what_truncation_misses_is_held_against_the_exact_matrix(model_directory, tmp_path, capsys):
    runs = {}
    for name, options in {"k": ["--compare-exact"], "all": ["--max-vocab-subset", "all"]}.items():
        assert run(model_directory, tmp_path / name, "--layers", "0", "2", *options) == 0
        runs[name] = read(tmp_path / name)
    assert "lambda_K/lambda" in capsys.readouterr().out
    (results, arrays), (exact, exact_arrays) = runs["k"], runs["all"]
    for sentence in range(4):
        for column, layer in enumerate(("0", "2")):
            ours, truth = results["fisher"][sentence][layer], exact["fisher"][sentence][layer]
            found = ours["exact"]
            assert found["eigenvalue"] == pytest.approx(truth["eigenvalues"][0], rel=1e-5)
            for key in ("trace", "effective_rank"):
                assert found[key] == pytest.approx(truth[key], rel=1e-5)
            assert found["eigenvalue_share"] == pytest.approx(
                ours["eigenvalues"][0] / truth["eigenvalues"][0], rel=1e-5
            )
            assert 0 < found["trace_share"] < 1
            cosine = abs(arrays["eigenvectors"][sentence, column] @ exact_arrays["eigenvectors"][sentence, column])
            assert found["cosine"] == pytest.approx(min(cosine, 1), abs=1e-4)
    shares = [sentence["0"]["exact"]["eigenvalue_share"] for sentence in results["fisher"]]
    assert results["summary"]["layers"]["0"]["exact_eigenvalue_share_median"] == pytest.approx(
        np.median(shares), rel=1e-6
    )


def test_default_layers():
    assert reading.choose_layers(None, 32) == [0, 5, 10, 15, 20, 25, 30, 31]
    assert reading.choose_layers(None, 30) == [0, 5, 10, 15, 20, 25, 29]
    assert reading.choose_layers(None, 1) == [0]
    assert reading.choose_layers([3, 1, 3], 4) == [1, 3]


def test_require_predicted_keeps_only_what_the_model_predicts(model_directory, tmp_path, animals):
    """The tiny model predicts nothing sensible, so the target word is made of what it does predict."""
    model, tokenizer = models.load_model(str(model_directory), device="cpu")
    for prompt in (" ".join(sentence.split()[:4]) for sentence in animals):
        best = int(model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax())
        word = tokenizer.decode([best])
        if word.startswith(" ") and word.strip().isalpha():
            break
    data = tmp_path / "data.txt"
    data.write_text(f"{prompt}{word}\nBut not at all here{word}\n")
    arguments = ["--data-file", str(data), "--target-word", word.strip(), "--num-sentences", "2"]
    assert run(model_directory, tmp_path / "all", *arguments) == 0
    assert run(model_directory, tmp_path / "predicted", *arguments, "--require-predicted") == 0
    everything, predicted = (read(tmp_path / name)[0] for name in ("all", "predicted"))
    ranks = dict(zip(everything["sentences"], (c["target_rank"] for c in everything["contexts"]), strict=True))
    assert ranks[f"{prompt}{word}"] == 1
    assert predicted["sentences"] == [sentence for sentence in everything["sentences"] if ranks[sentence] == 1]


def test_require_predicted_with_none_left_is_an_error(model_directory, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.")
    assert run(model_directory, tmp_path / "out", "--data-file", str(data), "--require-predicted") == 2
    assert "top prediction" in capsys.readouterr().err


def test_fewer_sentences_than_asked_for_are_said_and_used(model_directory, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.\nWe like animals.\nNo plants.")
    assert run(model_directory, tmp_path / "out", "--data-file", str(data)) == 0
    assert "4 sentences were asked for, 2 are to be had" in capsys.readouterr().out
    assert len(read(tmp_path / "out")[0]["sentences"]) == 2


def test_more_tokens_than_the_vocabulary_are_clamped_with_a_note(model_directory, tmp_path, capsys):
    assert run(model_directory, tmp_path, "--max-vocab-subset", "999999", "--num-sentences", "1") == 0
    assert "more than the vocabulary: counting all" in capsys.readouterr().out
    results, _ = read(tmp_path)
    assert results["fisher"][0]["0"]["captured_mass"] == pytest.approx(1, abs=1e-4)


def test_sentencepiece_tokenizer_end_to_end(tmp_path, sentencepiece):
    directory = make_model_directory(tmp_path / "model", sentencepiece)
    assert run(directory, tmp_path / "out") == 0
    results, _ = read(tmp_path / "out")
    assert all("nimals" in c["target_token"] or "a" in c["target_token"].lower() for c in results["contexts"])


def test_nothing_in_the_data_reaches_the_terminal_as_a_command(model_directory, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("The \x1b[31mred\x07 zoo has many animals.")
    assert run(model_directory, tmp_path / "out", "--data-file", str(data)) == 0
    out, err = capsys.readouterr()
    assert "\x1b[31m" not in out
    assert "\x07" not in out + err


def test_help_fits_a_screen_and_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        core_experiment.parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "model-name", "data-file", "target-word", "num-sentences", "layers", "scales", "scale-unit",
        "max-vocab-subset", "batch-size", "num-controls", "require-predicted", "dtype", "device", "seed", "output-dir",
    ):  # fmt: skip
        assert f"--{flag}" in text


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['core_experiment.py', '--help']\n"
        "try:\n    runpy.run_path('core_experiment.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_chosen_sentences_are_the_diverse_ones(finished, animals):
    results, _ = read(finished)
    prompts = [s[: next(sentences.find_word(s, "animals"))].rstrip() for s in animals]
    order = [i for i, _ in zip(sentences.diverse_order(prompts), range(4), strict=False)]
    assert results["sentences"] == [animals[i] for i in order]
