"""The experiment from its command line: the files it writes, their numbers, its options."""

import os

import numpy as np
import pytest
import torch

from conftest import FINISHED_EXPERIMENT, make_model_directory
import core_experiment
import fisher
from residual_fisher.experiment import sentences
from residual_fisher.experiment.records import rank
from residual_fisher.model import loading
import scripts
from scripts import EXPERIMENT_FILES, calls_of, experiment_results

# --- the files -----------------------------------------------------------------------------------


def test_the_four_files_are_written_and_nothing_else(finished_experiment):
    assert set(os.listdir(finished_experiment)) == EXPERIMENT_FILES


def test_the_documented_keys_and_shapes(finished_experiment):
    results, arrays = experiment_results(finished_experiment)
    assert set(results) >= {
        "experiment_config", "environment", "complete", "sentences", "contexts", "fisher", "perturbation_results",
        "similarity_matrix", "similarity_labels", "summary", "timings", "run", "failed", "checksum",
    }  # fmt: skip
    assert results["complete"] is True and results["failed"] == []
    assert results["run"]["id"] == arrays["run"]
    assert len(results["sentences"]) == len(results["contexts"]) == 4
    assert {k: v.shape for k, v in arrays.items()} == {
        "eigenvectors": (4, 2, 32), "eigenvalues": (4, 2), "activations": (4, 2, 32), "layers": (2,), "run": (),
    }  # fmt: skip
    assert arrays["eigenvectors"].dtype == np.float32
    assert arrays["layers"].tolist() == [0, 2]
    assert set(results["timings"]) == {"load", "prefix", "gradients", "eigen", "sweep"}
    assert results["similarity_labels"] == [f"S{i}_L{layer}" for layer in (0, 2) for i in range(4)]


def test_every_option_is_recorded(finished_experiment, model_directory):
    config = experiment_results(finished_experiment)[0]["experiment_config"]
    options = set(core_experiment.Settings.__dataclass_fields__)
    commands = {"config", "redraw", "overwrite", "dry_run", "compare", "format", "panel", "sentence"}
    assert options - commands == set(config)
    assert config["model_name"] == str(model_directory)
    assert config["data_file"] == "data/animals.json"
    assert (config["layers"], config["scales"], config["scale_unit"]) == ([0, 2], [-1, 0, 0.1, 1], "nats")
    assert (config["num_sentences"], config["max_vocab_subset"], config["num_controls"]) == (4, 30, 2)


# --- the numbers ---------------------------------------------------------------------------------


def test_the_numbers_are_consistent(finished_experiment):
    results, arrays = experiment_results(finished_experiment)
    assert np.allclose(np.linalg.norm(arrays["eigenvectors"], axis=-1), 1, atol=1e-5)
    for i, (by_layer, perturbed) in enumerate(zip(results["fisher"], results["perturbation_results"], strict=True)):
        for column, layer in enumerate(("0", "2")):
            entry = by_layer[layer]
            assert entry["eigenvalues"] == sorted(entry["eigenvalues"], reverse=True)
            assert entry["eigenvalues"][0] == pytest.approx(arrays["eigenvalues"][i, column], rel=1e-5)
            assert 0 < entry["eigenvalues"][0] <= entry["trace"] * (1 + 1e-5)
            assert 1 <= entry["effective_rank"] <= 30
            assert 0 < entry["captured_mass"] <= 1
            assert entry["activation_norm"] == pytest.approx(np.linalg.norm(arrays["activations"][i, column]), rel=1e-5)
            for scale, along_v in perturbed[layer].items():
                assert set(along_v["controls"]) == {"random_0", "random_1", "difference"}
                for record in (along_v, *along_v["controls"].values()):
                    assert record["kl"] >= 0
                    assert len(record["top_tokens"]) == len(record["top_probs"]) == 5
                    assert sum(record["top_probs"]) <= 1 + 1e-6
                    assert record["step"] == pytest.approx(float(scale) / entry["eigenvalues"][0] ** 0.5, rel=1e-5)
                    assert record["top_changed"] == (record["top_ids"][0] != results["contexts"][i]["top_ids"][0])
                assert along_v["predicted_kl"] == pytest.approx(float(scale) ** 2 / 2, rel=1e-4)
                # no direction is predicted to matter more than the top eigenvector
                most = along_v["predicted_kl"] * (1 + 1e-5)
                assert all(control["predicted_kl"] <= most for control in along_v["controls"].values())


def test_scale_zero_is_the_unperturbed_prediction(finished_experiment, model_directory):
    results, _ = experiment_results(finished_experiment)
    model, tokenizer = loading.load(str(model_directory), device="cpu")
    for sentence, context, perturbed in zip(
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
        for layer in perturbed.values():
            for record in (layer["0"], *layer["0"]["controls"].values()):
                assert record["kl"] == record["step"] == record["predicted_kl"] == 0
                assert record["top_ids"] == top.indices.tolist()
                assert record["top_probs"] == pytest.approx(top.values.exp().tolist(), rel=1e-4)


@pytest.mark.usefixtures("without_pictures")
def test_small_perturbations_cost_what_was_predicted(model_directory, tmp_path):
    words = ["--max-vocab-subset", "all", "--scale-unit", "nats", "--scales", "0.02"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    for sentence in experiment_results(tmp_path)[0]["perturbation_results"]:
        for layer in sentence.values():
            for record in (layer["0.02"], *layer["0.02"]["controls"].values()):
                assert record["kl"] == pytest.approx(record["predicted_kl"], rel=0.05)


@pytest.mark.usefixtures("without_pictures")
def test_the_difference_control_goes_towards_the_sentence_before_or_for_the_first_the_second(model_directory, tmp_path):
    with calls_of(core_experiment, "measure_sentence") as calls, calls_of(fisher, "linearize") as read:
        assert scripts.core_experiment(model_directory, tmp_path, "--scales", "1") == 0
    assert len(read) == 4 + 1  # every sentence is read once, the second also for the first
    seen = [(point.activations, controls["difference"]) for _, _, point, controls, *_ in calls]
    for index, other in enumerate((1, 0, 1, 2)):
        towards = torch.nn.functional.normalize(seen[other][0] - seen[index][0], dim=-1)
        assert torch.equal(seen[index][1], towards)


def test_the_similarity_matrix_is_of_the_saved_eigenvectors(finished_experiment):
    results, arrays = experiment_results(finished_experiment)
    matrix = np.array(results["similarity_matrix"])
    vectors = {
        f"S{i}_L{layer}": arrays["eigenvectors"][i, column]
        for i in range(4)
        for column, layer in enumerate(arrays["layers"])
    }
    for row, a in enumerate(results["similarity_labels"]):
        for column, b in enumerate(results["similarity_labels"]):
            assert matrix[row, column] == pytest.approx(abs(vectors[a] @ vectors[b]), abs=1e-5)


def test_the_summary_is_of_the_records(finished_experiment):
    results, _ = experiment_results(finished_experiment)
    for layer, summary in results["summary"]["layers"].items():
        farthest = [s[layer][scale] for s in results["perturbation_results"] for scale in ("1", "-1")]
        assert summary["kl_median"]["fisher"] == pytest.approx(np.median([p["kl"] for p in farthest]), rel=1e-6)
        assert summary["flips"]["fisher"] == pytest.approx(np.mean([p["top_changed"] for p in farthest]))
        lengths = [(s[layer]["eigenvalues"][0], s[layer]["activation_norm"] / 100) for s in results["fisher"]]
        nats = [value * step**2 / 2 for value, step in lengths]
        assert summary["norm_step_nats_median"] == pytest.approx(np.median(nats), rel=1e-5)
        both = [p["controls"][name]["kl"] for p in farthest for name in ("random_0", "random_1")]
        assert summary["kl_median"]["random"] == pytest.approx(np.median(both), rel=1e-6)


def test_the_same_command_twice_gives_the_same_bytes(finished_experiment, model_directory, tmp_path):
    assert scripts.core_experiment(model_directory, tmp_path, *FINISHED_EXPERIMENT) == 0
    scripts.assert_same_experiment(tmp_path, finished_experiment)


@pytest.mark.usefixtures("without_pictures")
def test_fewer_sentences_are_the_first_of_more(finished_experiment, model_directory, tmp_path):
    assert scripts.core_experiment(model_directory, tmp_path, *FINISHED_EXPERIMENT, "--num-sentences", "2") == 0
    (few, few_arrays), (more, more_arrays) = experiment_results(tmp_path), experiment_results(finished_experiment)
    assert few["sentences"] == more["sentences"][:2]
    assert few["perturbation_results"] == more["perturbation_results"][:2]
    assert np.array_equal(few_arrays["eigenvectors"], more_arrays["eigenvectors"][:2])


def test_the_chosen_sentences_are_the_diverse_ones(finished_experiment, animals):
    results, _ = experiment_results(finished_experiment)
    prompts = [s[: next(sentences.find_word(s, "animals"))].rstrip() for s in animals]
    order = [i for i, _ in zip(sentences.diverse_order(prompts), range(4), strict=False)]
    assert results["sentences"] == [animals[i] for i in order]


# --- options -------------------------------------------------------------------------------------


def test_one_sentence_one_layer_one_scale(model_directory, tmp_path):
    words = ["--num-sentences", "1", "--layers", "1", "--scales", "3", "--num-controls", "0"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    results, arrays = experiment_results(tmp_path)
    assert arrays["layers"].tolist() == [1]
    assert list(results["perturbation_results"][0]["1"]) == ["3"]
    assert results["perturbation_results"][0]["1"]["3"]["controls"] == {}
    assert set(os.listdir(tmp_path)) == EXPERIMENT_FILES


def test_all_layers_and_the_whole_vocabulary(model_directory, tmp_path):
    words = ["--layers", "all", "--max-vocab-subset", "all", "--scales", "1"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    results, arrays = experiment_results(tmp_path)
    assert arrays["layers"].tolist() == [0, 1, 2]
    assert all(entry["captured_mass"] == 1 for by_layer in results["fisher"] for entry in by_layer.values())


@pytest.mark.usefixtures("without_pictures")
def test_more_eigenvectors_are_an_extra_array_and_change_no_other(finished_experiment, model_directory, tmp_path):
    words = ["--layers", "0", "2", "--num-eigenvectors", "12"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    results, arrays = experiment_results(tmp_path)
    _, before = experiment_results(finished_experiment)
    assert all((arrays[name] == before[name]).all() for name in before if name != "run")
    vectors, values = arrays["leading_eigenvectors"], arrays["leading_eigenvalues"]
    assert vectors.shape == (4, 2, 12, 32) and values.shape == (4, 2, 12)
    assert (vectors[:, :, 0] == arrays["eigenvectors"]).all() and (values[:, :, 0] == arrays["eigenvalues"]).all()
    assert (np.diff(values) <= 0).all() and (values >= 0).all()
    assert np.abs(vectors @ vectors.swapaxes(-1, -2) - np.eye(12)).max() < 1e-5
    assert len(results["fisher"][0]["0"]["eigenvalues"]) == 10


@pytest.mark.usefixtures("without_pictures")
def test_what_truncation_misses_is_compared_with_the_exact_matrix(model_directory, tmp_path, capsys):
    runs = {}
    for name, options in {"k": ["--compare-exact"], "all": ["--max-vocab-subset", "all"]}.items():
        assert scripts.core_experiment(model_directory, tmp_path / name, "--layers", "0", "2", *options) == 0
        runs[name] = experiment_results(tmp_path / name)
    assert "lambda_K/lambda" in capsys.readouterr().out
    (results, arrays), (exact, exact_arrays) = runs["k"], runs["all"]
    for sentence in range(4):
        for column, layer in enumerate(("0", "2")):
            ours, truth = results["fisher"][sentence][layer], exact["fisher"][sentence][layer]
            found = ours["exact"]
            assert found["eigenvalue"] == pytest.approx(truth["eigenvalues"][0], rel=1e-5)
            for key in ("trace", "effective_rank"):
                assert found[key] == pytest.approx(truth[key], rel=1e-5)
            share = ours["eigenvalues"][0] / truth["eigenvalues"][0]
            assert found["eigenvalue_share"] == pytest.approx(share, rel=1e-5)
            assert found["trace_share"] == pytest.approx(ours["trace"] / truth["trace"], rel=1e-5)
            assert 0 < found["trace_share"] < 1
            cosine = abs(arrays["eigenvectors"][sentence, column] @ exact_arrays["eigenvectors"][sentence, column])
            assert found["cosine"] == pytest.approx(min(cosine, 1), abs=1e-4)
    shares = [sentence["0"]["exact"]["eigenvalue_share"] for sentence in results["fisher"]]
    median = results["summary"]["layers"]["0"]["exact_eigenvalue_share_median"]
    assert median == pytest.approx(np.median(shares), rel=1e-6)


def test_the_default_layers_are_every_fifth_and_the_last():
    assert core_experiment.choose_layers(None, 32) == (0, 5, 10, 15, 20, 25, 30, 31)
    assert core_experiment.choose_layers(None, 30) == (0, 5, 10, 15, 20, 25, 29)
    assert core_experiment.choose_layers(None, 1) == (0,)
    assert core_experiment.choose_layers((3, 1, 3), 4) == (1, 3)


@pytest.mark.usefixtures("without_pictures")
def test_require_predicted_keeps_only_what_the_model_predicts(model_directory, tmp_path, animals):
    """The tiny model predicts nothing sensible, so the target word is made of what it does predict."""
    model, tokenizer = loading.load(str(model_directory), device="cpu")
    for prompt in (" ".join(sentence.split()[:4]) for sentence in animals):
        best = int(model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax())
        word = tokenizer.decode([best])
        if word.startswith(" ") and word.strip().isalpha():
            break
    data = tmp_path / "data.txt"
    data.write_text(f"{prompt}{word}\nBut not at all here{word}\n")
    words = ["--data-file", str(data), "--target-word", word.strip(), "--num-sentences", "2"]
    assert scripts.core_experiment(model_directory, tmp_path / "all", *words) == 0
    assert scripts.core_experiment(model_directory, tmp_path / "predicted", *words, "--require-predicted") == 0
    everything, predicted = (experiment_results(tmp_path / name)[0] for name in ("all", "predicted"))
    ranks = dict(zip(everything["sentences"], (c["target_rank"] for c in everything["contexts"]), strict=True))
    assert ranks[f"{prompt}{word}"] == 1
    assert predicted["sentences"] == [sentence for sentence in everything["sentences"] if ranks[sentence] == 1]


@pytest.mark.usefixtures("without_pictures")
def test_of_equally_probable_tokens_the_first_is_the_top_one_and_predicted(byte_level, tmp_path, capsys):
    """In bfloat16 ties are common. Here every token ties with "!", the first of the vocabulary."""
    directory = make_model_directory(tmp_path / "model", byte_level)
    model, _ = loading.load(str(directory), device="cpu")
    model.lm_head.weight[:] = model.lm_head.weight[0].clone()
    model.save_pretrained(directory)
    words = ["--num-sentences", "2", "--require-predicted", "--dtype", "bfloat16"]
    assert scripts.core_experiment(directory, tmp_path / "out", *words) == 2
    assert "sentences is 'animals' the top prediction (--require-predicted)" in capsys.readouterr().err
    ties = torch.tensor([0.1, 0.3, 0.3, 0.3], dtype=torch.bfloat16).log()
    order = ties.sort(stable=True, descending=True).indices.tolist()
    assert [rank(ties, token) for token in order] == [1, 2, 3, 4] and order[0] == int(ties.argmax()) == 1


@pytest.mark.usefixtures("without_pictures")
def test_fewer_sentences_than_asked_for_are_used_and_noted(model_directory, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.\nWe like animals.\nNo plants.")
    assert scripts.core_experiment(model_directory, tmp_path / "out", "--data-file", str(data)) == 0
    assert "note: 4 sentences were asked for, only 2 are available" in capsys.readouterr().out
    assert len(experiment_results(tmp_path / "out")[0]["sentences"]) == 2


@pytest.mark.usefixtures("without_pictures")
def test_more_tokens_than_the_vocabulary_are_clamped_with_a_note(model_directory, tmp_path, capsys):
    words = ["--max-vocab-subset", "999999", "--num-sentences", "1"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    assert "note: --max-vocab-subset 999999 is more than the vocabulary: counting all" in capsys.readouterr().out
    results, _ = experiment_results(tmp_path)
    assert results["fisher"][0]["0"]["captured_mass"] == pytest.approx(1, abs=1e-4)


@pytest.mark.usefixtures("without_pictures")
def test_sentencepiece_tokenizer_end_to_end(tmp_path, sentencepiece):
    directory = make_model_directory(tmp_path / "model", sentencepiece)
    assert scripts.core_experiment(directory, tmp_path / "out") == 0
    results, _ = experiment_results(tmp_path / "out")
    for sentence, context in zip(results["sentences"], results["contexts"], strict=True):
        assert sentence[len(context["prompt"]) :].lstrip().lower().startswith("animals")
        ids = sentencepiece(sentence)["input_ids"]
        before, target = ids[: context["position"] + 1], ids[context["position"] + 1]
        assert sentencepiece.decode(before, skip_special_tokens=True) == context["prompt"]
        assert context["target_token"] == sentencepiece.decode([target])
        assert sentencepiece.decode(ids[context["position"] + 1 :]).lower().startswith("animals")


def test_nothing_in_the_data_reaches_the_terminal_as_a_command(model_directory, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("The \x1b[31mred\x07 zoo has many animals.")
    assert scripts.core_experiment(model_directory, tmp_path / "out", "--data-file", str(data)) == 0
    out, err = capsys.readouterr()
    assert "zoo has many" in out
    assert "\x1b" not in out and "\x07" not in out + err


def test_pictures_can_be_drawn_again_from_the_results_alone(finished_experiment, tmp_path, capsys):
    (tmp_path / "experiment_results.json").write_bytes((finished_experiment / "experiment_results.json").read_bytes())
    assert scripts.run("core_experiment", ["--redraw", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert set(os.listdir(tmp_path)) == EXPERIMENT_FILES - {"fisher_eigenvectors.npz", "items"}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (finished_experiment / path.name).read_bytes()


@pytest.mark.parametrize("content", [None, "", "{"])
def test_drawing_again_without_results_is_one_line_and_exit_code_2(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "experiment_results.json").write_text(content)
    before = os.listdir(tmp_path)
    assert scripts.run("core_experiment", ["--redraw", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"core_experiment.py: error: no readable experiment_results.json in {tmp_path}: ")
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == before
