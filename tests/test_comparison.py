"""Two finished runs compared: a run and its copy, noise in some layers, two dtypes, what cannot be compared."""

from collections import Counter
import json
from math import log
import shutil

import numpy as np
import pytest
import torch
import transformers as hf

from residual_fisher.model.comparison import Matrix, Pair, named_kl
from residual_fisher.model.comparison import compare as compare_pairs
from residual_fisher.pipeline.comparison import expected_words, new_words
import scripts
from scripts import experiment_results

LAYERS = ["--layers", "all", "--num-eigenvectors", "3", "--scale-unit", "nats", "--scales", "-1", "0", "1"]
NOISY = 1  # the first layer whose weights differ


@pytest.fixture(scope="module")
def noisy_directory(model_directory, tmp_path_factory):
    """The tiny model with noise in the weights of its layers from NOISY on."""
    path = tmp_path_factory.mktemp("models") / "noisy"
    model = hf.AutoModelForCausalLM.from_pretrained(model_directory)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers[NOISY:]:
            for weight in layer.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(path)
    hf.AutoTokenizer.from_pretrained(model_directory).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def experiments(model_directory, noisy_directory, tmp_path_factory):
    """A run, its copy, and one of the noisy model with a sentence less."""
    folder = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("residual_fisher.experiment.figures.draw", lambda folder, document: None)
        assert scripts.core_experiment(model_directory, folder / "a", *LAYERS) == 0
        assert scripts.core_experiment(noisy_directory, folder / "noisy", *LAYERS, "--num-sentences", "3") == 0
    shutil.copytree(folder / "a", folder / "copy")
    return folder


@pytest.fixture(scope="module")
def pipelines(chat_directory, finished_pipeline, dataset, tmp_path_factory):
    """A run, its copy, and one in another dtype."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name in ("a", "copy"):
        shutil.copytree(finished_pipeline, folder / name)
    assert scripts.compute_fisher(chat_directory, dataset, folder / "half", dtype="bfloat16", num_prompts=10) == 0
    return folder


def compare(script: str, folder, a: str, b: str, output) -> int:
    return scripts.run(script, ["--compare", str(folder / a), str(folder / b), "--output-dir", str(output)])


def document(output) -> dict:
    assert (output / "comparison.png").stat().st_size > 10_000
    return json.loads((output / "comparison.json").read_text())


def test_new_words_are_those_that_other_answers_say_too():
    """Two of four answers of the second run say "hate"; another says a word that no other does."""
    plain = [Counter(yes=3.0, no=1.0) for _ in range(4)]
    second = [Counter(yes=3.0, hate=1.0), Counter(hate=4.0), Counter(yes=2.0, zebra=2.0), Counter(yes=3.0, no=1.0)]
    words, scores = new_words(list(zip(plain, second, strict=True)))
    assert [word["token"] for word in words] == ["hate", "zebra"]
    assert words[0] == {"token": "hate", "a": 0.0, "b": 5.0}
    yes = {0: log(6 / 10), 2: log(7 / 10)}  # (yes + 1) in the other answers: 3 * 3 of the first run
    expected = [(3 * yes[0] + log(5)) / 4, log(2), (2 * yes[2] + 2 * log(1)) / 4]
    assert scores[:3] == pytest.approx(expected)
    assert scores[1] == max(scores)


def test_an_answer_is_all_its_positions_and_without_one_the_next_token():
    next_tokens = [{"token": "a", "probability": 0.5}, {"token": "b", "probability": 0.25}]
    assert expected_words({"next_tokens": next_tokens}) == Counter(a=0.5, b=0.25)
    record = {"next_tokens": [], "answer": {"next_tokens": [next_tokens, next_tokens[:1]]}}
    assert expected_words(record) == Counter(a=1.0, b=0.25)
    assert new_words([(Counter(), Counter())]) == ([], [None])


@pytest.mark.parametrize("script", ["core_experiment", "compute_fisher"])
def test_a_run_and_its_copy_differ_in_nothing(script, experiments, pipelines, tmp_path, capsys):
    folder = experiments if script == "core_experiment" else pipelines
    assert compare(script, folder, "a", "copy", tmp_path) == 0
    found = document(tmp_path)
    assert found["settings"] == {} and found["kl_at_least_median"] == 0
    assert len(found["items"]) == (4 if script == "core_experiment" else 40)
    for item in found["items"]:
        assert item["kl_at_least"] == 0 and abs(item["change"]) <= 1e-6
        for numbers in item["layers"].values():
            assert numbers["lambda_ratio"] == numbers["trace_ratio"] == 1 and numbers["shift"] == 0
            assert numbers["overlap"] == pytest.approx(1, abs=1e-6) == numbers["similarity"]
        tokens = next(iter(item["tokens"].values()))
        assert tokens["a"] == tokens["b"] and tokens["a"]
    shown = capsys.readouterr().out
    assert "Changed most" in shown
    if script == "compute_fisher":
        assert found["new_words"] == [] and not any(item["new_words"] for item in found["items"])
        assert "b's answers say more often (times expected in a, in b): nothing" in shown


def test_noise_in_later_layers_is_seen_from_there_on(experiments, tmp_path, capsys):
    assert compare("core_experiment", experiments, "a", "noisy", tmp_path) == 0
    found = document(tmp_path)
    assert (found["a"]["items"], found["b"]["items"], len(found["items"])) == (4, 3, 3)
    assert found["eigenpairs"] == 3 and list(found["layers"]) == ["0", "1", "2"]
    for item in found["items"]:
        shifts = [numbers["shift"] for numbers in item["layers"].values()]
        assert max(shifts[:NOISY]) == 0 and min(shifts[NOISY:]) > 1e-3
        assert item["kl_at_least"] > 0 and 0 < item["change"] < 1
    changes = [item["change"] for item in found["items"]]
    assert changes == sorted(changes, reverse=True)
    out = capsys.readouterr().out
    assert "3 items in both; medians, of 3 eigenpairs each" in out and " ← → " in out


def test_every_number_is_that_of_dense_matrices(experiments, tmp_path):
    assert compare("core_experiment", experiments, "a", "noisy", tmp_path) == 0
    runs = [experiment_results(experiments / name) for name in ("a", "noisy")]
    rows = [results["sentences"] for results, _ in runs]
    for item in document(tmp_path)["items"]:
        places = [some.index(item["sentence"]) for some in rows]
        for row, (layer, numbers) in enumerate(item["layers"].items()):
            values, vectors, h = (
                [arrays[name][place, row].astype(float) for (_, arrays), place in zip(runs, places, strict=True)]
                for name in ("leading_eigenvalues", "leading_eigenvectors", "activations")
            )
            f, g = (v.T * x @ v for x, v in zip(values, vectors, strict=True))
            p, q = (v.T @ v for v in vectors)
            traces = [r["fisher"][i][layer]["trace"] for (r, _), i in zip(runs, places, strict=True)]
            expected = {
                "lambda_ratio": values[1][0] / values[0][0],
                "trace_ratio": traces[1] / traces[0],
                "overlap": (np.trace(f @ q) / np.trace(f) + np.trace(g @ p) / np.trace(g)) / 2,
                "similarity": np.sum(f * g) / np.linalg.norm(f) / np.linalg.norm(g),
                "change": np.linalg.norm(f - g) ** 2 / (np.linalg.norm(f) ** 2 + np.linalg.norm(g) ** 2),
                "shift": np.linalg.norm(h[1] - h[0]) / np.linalg.norm(h[0]),
            }
            assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_words_are_on_the_same_side_in_both_runs():
    token, vectors = {"token": "a", "id": 1, "share": 0.5, "slope": 2.0}, torch.eye(3)
    a, b = (Matrix(torch.ones(1), sign * vectors[:1], 1.0, [token], None) for sign in (1, -1))
    for first, second, slope in ((a, a, 2.0), (a, b, -2.0), (b, a, -2.0)):
        items = compare_pairs([Pair({"prompt": "p"}, ({"a": 0.5}, {"a": 0.5}), {"0": (first, second)})], {})["items"]
        assert items[0]["tokens"]["0"] == {"a": [token], "b": [{**token, "slope": slope}]}


def test_a_matrix_that_is_zero_has_no_ratio():
    zero, one = (Matrix(x * torch.ones(1), x * torch.eye(3)[:1], x, [], torch.ones(3)) for x in (0.0, 1.0))
    for first, second, change in ((zero, one, 1.0), (one, zero, 1.0), (zero, zero, None)):
        pair = Pair({"prompt": "p"}, ({}, {}), {"0": (first, second)})
        numbers = compare_pairs([pair], {})["items"][0]["layers"]["0"]
        assert numbers["change"] == change and numbers["similarity"] is None and numbers["shift"] == 0
        assert numbers["lambda_ratio"] == (0.0 if first is one else None)


def test_the_recorded_kl_is_at_most_the_whole_one():
    p, q = (torch.randn(2, 50, generator=torch.Generator().manual_seed(6)) * 2).softmax(-1).double()
    whole = float((p * (p / q).log()).sum())
    for count in (1, 5, 20, 50):
        some, other = ({i: float(part[i]) for i in part.topk(count).indices.tolist()} for part in (p, q))
        assert 0 <= named_kl(some, other) <= whole + 1e-9
    assert named_kl(dict(enumerate(p.tolist())), dict(enumerate(q.tolist()))) == pytest.approx(whole, rel=1e-4)


def test_two_dtypes_of_the_pipeline_have_the_same_subspaces(pipelines, tmp_path, capsys):
    assert compare("compute_fisher", pipelines, "a", "half", tmp_path) == 0
    found = document(tmp_path)
    assert len(found["items"]) == 10 and found["b"]["dtype"] == "bfloat16" and found["settings"] == {}
    (numbers,) = found["layers"].values()
    assert numbers["overlap_median"] > 0.95 and 0.8 < numbers["lambda_ratio_median"] < 1.25
    assert 0 < numbers["shift_median"] < 0.05 and found["kl_at_least_median"] < 0.02


def test_runs_with_nothing_in_common_are_refused_in_a_line(
    experiments, pipelines, finished_experiment, tmp_path, capsys
):
    def refused(script, folder, a, b, what, output=tmp_path / "out"):
        assert compare(script, folder, a, b, output) == 2
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

    refused("core_experiment", experiments, "a", "missing", "no readable experiment_results.json")
    refused("compute_fisher", pipelines, "a", "missing", "no finished run")
    refused("core_experiment", experiments, "a", "copy", "holds a run", experiments / "a")
    other = tmp_path / "other"
    for change, what in [
        ({"sentences": ["Another sentence."] * 4}, "no text in common"), ({"complete": False}, "is not finished"),
    ]:  # fmt: skip
        shutil.copytree(experiments / "a", other)
        results = json.loads((other / "experiment_results.json").read_text())
        del results["checksum"]
        (other / "experiment_results.json").write_text(json.dumps(results | change))
        refused("core_experiment", experiments, "a", str(other), what)
        shutil.rmtree(other)
    for key, value, what in [("layers", [7, 8, 9], "no layer in common"), ("run", "x", "it is of another run")]:
        shutil.copytree(experiments / "a", other)
        _, arrays = experiment_results(other)
        np.savez(other / "fisher_eigenvectors.npz", **{**arrays, key: np.array(value)})
        refused("core_experiment", experiments, "a", str(other), what)
        shutil.rmtree(other)


@pytest.mark.parametrize(
    "words", [["--compare", "a"], ["--compare", "a", "b", "c"], ["--compare", "a", "b", "--dry-run"]]
)
def test_a_comparison_takes_two_directories(words, capsys):
    with pytest.raises(SystemExit):
        scripts.run("core_experiment", words)
    assert "argument --" in capsys.readouterr().err
