"""Steps in nats beside the protocol's: where those are too short, in runs for which no unit was asked for."""

import numpy as np
import pytest

import core_experiment
from residual_fisher import load_results
from residual_fisher.common.program import UserError
from residual_fisher.experiment import figures
from residual_fisher.experiment.records import NATS, told_scale
import scripts
from scripts import calls_of, contents, experiment_results, experiment_words, run

SHORT = ["--scales", "-0.02", "0", "0.01", "1"]  # of the tiny model's lambda
LONG = ["--scales", "-100000", "0", "100000"]


@pytest.fixture(scope="module")
def both(model_directory, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "both"
    assert scripts.core_experiment(model_directory, output, *SHORT) == 0
    return output


@pytest.mark.usefixtures("without_pictures")
def test_both_sweeps_are_what_runs_of_one_unit_find(both, model_directory, tmp_path):
    found, arrays = experiment_results(both)
    for unit, key in (("eigenvalue", "perturbation_results"), ("nats", "perturbation_results_nats")):
        assert scripts.core_experiment(model_directory, tmp_path / unit, *SHORT, "--scale-unit", unit) == 0
        alone, others = experiment_results(tmp_path / unit)
        assert found[key] == alone["perturbation_results"]
        assert all((arrays[name] == others[name]).all() for name in others if name != "run")
        assert "perturbation_results_nats" not in alone and "at_scale_nats" not in alone["summary"]
        if unit == "eigenvalue":  # the same run, as an earlier version would have made it
            assert found["run"] == alone["run"] and found["experiment_config"]["scale_unit"] == unit
            for layer, entry in alone["summary"]["layers"].items():
                assert entry.items() <= found["summary"]["layers"][layer].items()


def test_the_arrays_are_the_records(both):
    found, arrays = experiment_results(both)
    scales, names = ("-0.02", "0.01", "1"), ("fisher", "random_0", "random_1", "difference")
    assert arrays["nats_steps"].shape == (4, 2, 3) and arrays["nats_kl"].shape == (4, 2, 4, 3)
    for i, sentence in enumerate(found["perturbation_results_nats"]):
        for row, layer in enumerate(("0", "2")):
            for column, scale in enumerate(scales):
                record = sentence[layer][scale]
                assert record["step"] == pytest.approx(float(arrays["nats_steps"][i, row, column]), rel=1e-6)
                assert record["predicted_kl"] == pytest.approx(float(scale) ** 2 / 2, rel=1e-4)
                for place, name in enumerate(names):
                    known = {"fisher": record, **record["controls"]}[name]
                    for key in ("kl", "predicted_kl"):
                        assert known[key] == pytest.approx(
                            float(arrays[f"nats_{key}"][i, row, place, column]), rel=1e-6
                        )


def test_the_table_for_a_notebook_has_either_steps(both, model_directory, tmp_path):
    found, _ = experiment_results(both)
    for in_nats, key in ((False, "perturbation_results"), (True, "perturbation_results_nats")):
        frame = load_results(both, in_nats=in_nats)
        rows = frame[frame.eval("sentence == 1 and layer == 2 and direction == 'fisher'")]
        assert dict(zip(rows["scale"], rows["kl"], strict=True)) == {
            float(scale): record["kl"] for scale, record in found[key][1]["2"].items()
        }
    assert scripts.core_experiment(model_directory, tmp_path, *LONG) == 0
    with pytest.raises(UserError, match="no steps in nats beside its own, of --scale-unit eigenvalue"):
        load_results(tmp_path, in_nats=True)


@pytest.mark.usefixtures("without_pictures")
def test_the_text_is_continued_after_the_steps_in_nats(model_directory, tmp_path):
    assert scripts.core_experiment(model_directory, tmp_path, *SHORT, "--continue", "2") == 0
    found, _ = experiment_results(tmp_path)
    for said, records in zip(found["continuations"], found["perturbation_results_nats"], strict=True):
        for layer in ("0", "2"):
            assert list(said[layer]) == ["-0.02", "1"]
            for scale, entries in said[layer].items():
                record = records[layer][scale]
                for name, entry in entries.items():
                    known = {"fisher": record, **record["controls"]}[name]
                    assert (entry["step"], entry["predicted_kl"]) == (known["step"], known["predicted_kl"])
                    assert entry["ids"][:1] in (known["top_ids"][:1], [])


def test_the_summary_and_the_picture_are_of_the_steps_in_nats(both):
    found, _ = experiment_results(both)
    for layer, entry in found["summary"]["layers"].items():
        records = [s[layer]["1"] for s in found["perturbation_results_nats"]]
        assert entry["kl_median_nats"]["fisher"] == pytest.approx(np.median([r["kl"] for r in records]), rel=1e-6)
        assert entry["flips_nats"]["fisher"] == pytest.approx(np.mean([r["top_changed"] for r in records]))
    figure = figures.perturbation_figure(found)
    (panel,) = [axes for axes in figure.axes if axes.get_title() == "layer 2"]
    (line,) = [line for line in panel.lines if line.get_label() == "Fisher eigenvector"]
    expected = [np.median([s["2"][scale]["kl"] for s in found["perturbation_results_nats"]]) for scale in ("0.01", "1")]
    assert line.get_ydata() == pytest.approx(expected)
    assert any("in nats (steps of 1/√λ; the protocol" in text.get_text() for f in figure.subfigs for text in f.texts)


def test_tables_tell_of_steps_that_cost_two_nats_at_most():
    assert told_scale(NATS, [-10, -2, -1, 0, 1, 2, 5, 10]) == -2
    assert told_scale(NATS, [0, 5, 10]) == 5 and told_scale("perturbations", [-1, 0, 1, 5]) == 5


@pytest.mark.usefixtures("without_pictures")
def test_steps_that_are_long_enough_are_the_only_ones_and_so_is_a_unit_that_was_asked_for(
    model_directory, tmp_path, capsys
):
    for number, words in enumerate((LONG, [*SHORT, "--scale-unit", "eigenvalue"])):
        assert scripts.core_experiment(model_directory, tmp_path / str(number), *words) == 0
        assert "too short: the longest" not in capsys.readouterr().out
        assert "perturbation_results_nats" not in experiment_results(tmp_path / str(number))[0]


@pytest.mark.usefixtures("without_pictures")
def test_what_is_told_begins_with_it(model_directory, tmp_path, capsys):
    assert scripts.core_experiment(model_directory, tmp_path, *SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("note: at ") and "of 2 layers the protocol's steps, of lambda, are too short" in lines[1]
    assert any("the perturbation at scale 1 in nats;" in line for line in lines)
    assert "In nats, by steps of 1/sqrt(lambda), at ±1:" in lines


@pytest.mark.usefixtures("without_pictures")
def test_all_sentences_are_measured_as_the_first_one_is(both, model_directory, tmp_path):
    """Stopped, resumed and extended it is the same run; one that was begun with one unit stays with it."""
    output = tmp_path / "out"
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[3]):
        assert scripts.core_experiment(model_directory, output, *SHORT) == 130
    assert scripts.core_experiment(model_directory, output, *SHORT, "--scale-unit", "eigenvalue") == 0
    assert experiment_results(output)[0]["checksum"] == experiment_results(both)[0]["checksum"]
    older = tmp_path / "older"
    few = ["--num-sentences", "2"]
    assert scripts.core_experiment(model_directory, older, *SHORT, *few, "--scale-unit", "eigenvalue") == 0
    before = contents(older)
    assert scripts.core_experiment(model_directory, older, *SHORT, *few) == 0 and contents(older) == before
    assert scripts.core_experiment(model_directory, older, *SHORT) == 0
    found, _ = experiment_results(older)
    assert len(found["sentences"]) == 4 and "perturbation_results_nats" not in found
    expected = experiment_results(both)[0]["perturbation_results"]
    assert found["perturbation_results"] == expected


@pytest.mark.usefixtures("without_pictures")
def test_a_dry_run_counts_both(model_directory, tmp_path, capsys):
    for words, each in ((SHORT, 2 * 3 * 4), (LONG, 2 * 4)):
        assert run("core_experiment", experiment_words(model_directory, tmp_path / "out", *words, "--dry-run")) == 0
        assert f"each: {each} perturbations at each of 2 layers" in capsys.readouterr().out
