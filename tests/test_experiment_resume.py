"""An experiment in a directory that has one already: it is resumed, extended, left alone, or refused."""

import json
from pathlib import Path
import shutil
import signal

import pytest

import core_experiment
from residual_fisher.common.archives import archives_in
from residual_fisher.common.run import Run
from residual_fisher.common.text import duration
from residual_fisher.experiment import figures, records
from residual_fisher.model import loading
import scripts
from scripts import EXPERIMENT_FILES, assert_same_experiment, calls_of, contents, experiment_results, experiment_words

WORDS = ["--num-sentences", "6", "--layers", "0", "2", "--scales", "-1", "1", "--scale-unit", "nats"]


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def undisturbed(model_directory, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "six"
    assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    return output


@pytest.mark.long
@pytest.mark.parametrize("before", [None, ["--layers", "2", "--num-sentences", "4"]])
def test_killed_again_and_again_it_ends_as_if_never_stopped(before, model_directory, undisturbed, tmp_path):
    """Also where layers and sentences are added to those of a finished run."""
    output, kept = tmp_path / "out", []
    if before:
        assert scripts.core_experiment(model_directory, output, *WORDS, *before) == 0

    def sentences() -> int:
        return len(archives_in(output / "items" / "anew" if before else output / "items"))

    for wanted in (1, 3):
        running = scripts.start(
            "core_experiment", experiment_words(model_directory, output, *WORDS), output, scripts.slow_sentences
        )
        running.wait_until(lambda wanted=wanted: sentences() >= wanted)
        running.send(signal.SIGKILL)
        assert running.end()[0] == -signal.SIGKILL
        kept.append(sentences())
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    assert kept[0] < kept[1] < 6 and len(calls) == 6 - kept[1]  # what was there was not computed again
    assert_same_experiment(output, undisturbed)


@pytest.mark.parametrize("moment", ["arrays", "results", "pictures"])
def test_stopped_while_it_finishes_it_can_finish_again(moment, model_directory, undisturbed, tmp_path, monkeypatch):
    places = {"arrays": (records, "write_npz"), "results": (records, "write_json"), "pictures": (figures, "draw")}
    with calls_of(*places[moment], Stopped), pytest.raises(Stopped):
        scripts.core_experiment(model_directory, tmp_path / "out", *WORDS)
    monkeypatch.setattr(core_experiment, "measure_sentence", None)  # all sentences are finished
    assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS) == 0
    assert_same_experiment(tmp_path / "out", undisturbed)


def test_a_sentence_lost_among_finished_ones_is_computed_as_in_its_place(model_directory, undisturbed, tmp_path):
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[5]):
        assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS) == 130
    archives_in(tmp_path / "out" / "items")[1][2].unlink()
    assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS) == 0
    assert_same_experiment(tmp_path / "out", undisturbed)


@pytest.mark.parametrize("first", [["--num-sentences", "2"], ["--num-sentences", "4", "--batch-size", "3"]])
def test_a_finished_run_is_extended(first, model_directory, undisturbed, tmp_path):
    """The rest has the same bytes; a batch size is no other run (after running out of memory, say)."""
    assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS, *first) == 0
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS) == 0
        assert len(calls) == 6 - int(first[1])
        if len(first) == 2:
            assert_same_experiment(tmp_path / "out", undisturbed)
        assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS, *first) == 0 and len(calls) < 6


def test_a_single_sentence_had_no_other_to_be_compared_with_and_is_measured_again(
    model_directory, undisturbed, tmp_path, capsys
):
    output, one = tmp_path / "out", ["--num-sentences", "1"]
    assert scripts.core_experiment(model_directory, output, *WORDS, *one) == 0
    before = contents(output)
    assert scripts.core_experiment(model_directory, output, *WORDS, *one) == 0 and contents(output) == before
    assert scripts.core_experiment(model_directory, output, *WORDS, "--seed", "1") == 2
    assert "num_sentences was 1 and is 'several'" in capsys.readouterr().err and contents(output) == before
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[1]):
        assert scripts.core_experiment(model_directory, output, *WORDS) == 130
    assert contents(output) == before
    assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    assert "it is measured again" in capsys.readouterr().out
    assert_same_experiment(output, undisturbed)


def shown(capsys) -> list[str]:
    """The tables at the end of what is printed."""
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["layer", "lambda"])
    end = next(number for number, line in enumerate(lines) if line.startswith("seconds: "))
    return lines[start:end]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("fewer", "more"),
    [
        (["--num-sentences", "2"], ["--trust-radius", "--compare-exact", "--continue", "2"]),
        (["--num-sentences", "1"], []),
        (["--layers", "2"], ["--steer", "--steer-steps", "2"]),
        (["--layers", "0", "--num-sentences=3"], []),
    ],
)
def test_of_a_finished_run_what_is_asked_for_is_shown(fewer, more, model_directory, tmp_path, capsys, monkeypatch):
    """The table of a run of that alone, but for controls that a single sentence lacks."""
    output, words = tmp_path / "out", [*WORDS, "--num-sentences", "4", *more]
    assert scripts.core_experiment(model_directory, output, *words) == 0
    whole = shown(capsys)
    before = contents(output)
    with monkeypatch.context() as patch:
        patch.setattr(core_experiment, "load", None)  # no model is needed
        assert scripts.core_experiment(model_directory, output, *words) == 0
        assert shown(capsys) == whole
        assert scripts.core_experiment(model_directory, output, *words, *fewer) == 0
        found = shown(capsys)
    assert contents(output) == before and found != whole
    if fewer[-1] != "1":
        assert scripts.core_experiment(model_directory, tmp_path / "alone", *words, *fewer) == 0
        assert found == shown(capsys)


def test_a_run_at_more_layers_is_extended_at_all_of_them(model_directory, undisturbed, tmp_path):
    output, few = tmp_path / "out", ["--num-sentences", "4"]
    assert scripts.core_experiment(model_directory, output, *WORDS, *few) == 0
    assert scripts.core_experiment(model_directory, output, *WORDS, "--layers", "2") == 0
    assert_same_experiment(output, undisturbed)


# --- more layers ---------------------------------------------------------------------------------

ALL = ["--layers", "0", "1", "2"]


@pytest.fixture(scope="module")
def all_layers(model_directory, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "all"
    assert scripts.core_experiment(model_directory, output, *WORDS, *ALL) == 0
    return output


def results_in(output: Path) -> dict[str, bytes]:
    """All that a run shows, without its items."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


@pytest.mark.parametrize("more", [ALL, ["--layers", "1"]])
def test_with_more_layers_all_is_measured_again_and_until_then_stays(
    more, model_directory, undisturbed, all_layers, tmp_path, capsys
):
    """Stopped and resumed, with the bytes of a run of all layers; the layers before are still there to be shown."""
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    before = results_in(output)
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[3]):
        assert scripts.core_experiment(model_directory, output, *WORDS, *more) == 130
    said, errors = capsys.readouterr()
    assert "All 6 sentences are measured again with layers 0 1 2, which share a batch: roughly " in said
    assert "Until that ends, the 6 sentences at layers 0 2 stay." in said
    assert "Stopped: 2 sentences that were measured again are kept" in errors
    assert results_in(output) == before and json.loads(before["experiment_results.json"])["complete"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_experiment, "load", None)  # no model is needed for what is finished
        assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    said = capsys.readouterr().out
    assert "is finished: nothing to do" in said and "(--layers 0 1 2 resumes it)" in said

    with calls_of(core_experiment, "measure_sentence") as calls:
        assert scripts.core_experiment(model_directory, output, *WORDS, *more) == 0
    assert len(calls) == 4
    assert_same_experiment(output, all_layers)
    asked = ["1"] if more[1] == "1" else ["0", "1", "2"]
    table = [line.split()[0] for line in shown(capsys)[1:]]
    assert table[: len(asked) + 1] == [*asked, "Medians"]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("stopped", [False, True])
def test_layers_and_sentences_are_added_at_once(stopped, model_directory, tmp_path):
    """To a finished run, and to one that was stopped; with steps that may be too short, and steering."""
    words = [*WORDS, "--scale-unit", "auto", "--scales", "1", "--steer", "--steer-steps", "1", "--num-sentences"]
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[2] if stopped else []):
        code = scripts.core_experiment(model_directory, tmp_path / "out", *words, "2", "--layers", "2")
    assert code == (130 if stopped else 0)
    for output, layers in ((tmp_path / "out", ["--layers", "all"]), (tmp_path / "fresh", ALL)):
        assert scripts.core_experiment(model_directory, output, *words, "3", *layers) == 0
    (first, arrays), (second, expected) = map(experiment_results, (tmp_path / "out", tmp_path / "fresh"))
    assert arrays.keys() == expected.keys() >= {"steering_deltas", "nats_kl"}
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in arrays)
    assert first["checksum"] == second["checksum"] and first["run"] == second["run"]


@pytest.mark.parametrize("moment", ["results", "manifest", "tidied"])
def test_killed_while_more_layers_take_the_place_of_fewer_it_can_finish(
    moment, model_directory, undisturbed, all_layers, tmp_path, monkeypatch
):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    places = {
        "results": (records, "write_json"),
        "manifest": (Run, "finish"),
        "tidied": (Run, "_remove_anew"),
    }
    with calls_of(*places[moment], Stopped), pytest.raises(Stopped):
        scripts.core_experiment(model_directory, output, *WORDS, *ALL)
    monkeypatch.setattr(core_experiment, "measure_sentence", None)  # all sentences are finished
    assert scripts.core_experiment(model_directory, output, *WORDS, *ALL) == 0
    assert_same_experiment(output, all_layers)


def test_killed_between_its_results_and_their_checksums_fewer_layers_are_made_again(
    model_directory, undisturbed, all_layers, tmp_path, capsys, monkeypatch
):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    with calls_of(Run, "finish", Stopped), pytest.raises(Stopped):
        scripts.core_experiment(model_directory, output, *WORDS, *ALL)
    assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    assert "is missing or damaged: computing it again" in capsys.readouterr().err
    found, expected = results_in(output), results_in(undisturbed)
    assert found["fisher_eigenvectors.npz"] == expected["fisher_eigenvectors.npz"]
    monkeypatch.setattr(core_experiment, "measure_sentence", None)  # those of all layers have not been lost
    assert scripts.core_experiment(model_directory, output, *WORDS, *ALL) == 0
    assert_same_experiment(output, all_layers)


@pytest.mark.usefixtures("without_pictures")
def test_layers_of_a_run_only_grow(model_directory, tmp_path, capsys):
    """What is unfinished goes on with all its layers, and what is asked for later comes in addition."""
    output, few = tmp_path / "out", ["--num-sentences", "3"]
    assert scripts.core_experiment(model_directory, output, *WORDS, *few, "--layers", "2") == 0
    for more, layers in (("1", "1 2"), ("2", None), ("0", "0 1 2"), ("1", "0 1 2")):
        with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[2]):
            code = scripts.core_experiment(model_directory, output, *WORDS, "--num-sentences", "2", "--layers", more)
        said = capsys.readouterr().out
        assert code == (130 if layers else 0)
        assert (f"All 3 sentences are measured again with layers {layers}" if layers else "is finished") in said
    assert "Resuming after the 1 sentences" in said
    assert scripts.core_experiment(model_directory, output, *WORDS, "--num-sentences", "2", "--layers", "1") == 0
    document, arrays = experiment_results(output)
    assert arrays["layers"].tolist() == [0, 1, 2] and len(document["sentences"]) == 3  # it has not lost any


@pytest.mark.usefixtures("without_pictures")
def test_an_unfinished_run_of_more_layers_goes_on_with_them(model_directory, undisturbed, tmp_path):
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[3]):
        assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS) == 130
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS, "--layers", "2") == 0
    assert len(calls) == 4
    (found, _), (expected, _) = map(experiment_results, (tmp_path / "out", undisturbed))
    assert found["checksum"] == expected["checksum"]


@pytest.mark.usefixtures("without_pictures")
def test_layers_are_added_to_all_prompts(model_directory, tmp_path):
    words = ["--model-name", str(model_directory), "--output-dir", str(tmp_path / "out"), "--max-vocab-subset", "30"]
    words += ["--device", "cpu", "--scales", "1", "--prompt", "The zoo has", "--layers"]
    assert scripts.run("core_experiment", [*words, "0", "--prompt", "We like"]) == 0
    assert scripts.run("core_experiment", [*words, "1"]) == 0
    document, arrays = experiment_results(tmp_path / "out")
    assert arrays["layers"].tolist() == [0, 1] and len(document["sentences"]) == 2


def test_what_adding_layers_takes_is_said_and_other_runs_are_refused(model_directory, undisturbed, capsys):
    before = contents(undisturbed)
    assert scripts.core_experiment(model_directory, undisturbed, *WORDS, *ALL, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "All 6 sentences are measured again with layers 0 1 2" in said and "would be replaced" not in said
    assert "6 to run:" in said and "at each of 3 layers" in said
    assert scripts.core_experiment(model_directory, undisturbed, *WORDS, *ALL, "--num-controls", "1") == 2
    assert "holds a run with other settings (num_controls was 2 and is 1)" in capsys.readouterr().err
    assert scripts.core_experiment(model_directory, undisturbed, *WORDS, "--layers", "3") == 2
    assert "--layers 3: the model has layers 0 to 2" in capsys.readouterr().err
    assert contents(undisturbed) == before


def test_how_much_is_done_at_once_is_no_other_run(model_directory, undisturbed, capsys):
    before = contents(undisturbed)
    assert scripts.core_experiment(model_directory, undisturbed, *WORDS, "--batch-size=5") == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert contents(undisturbed) == before


def test_a_finished_run_is_left_alone(model_directory, undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.*")}
    for name in (".perturbation_analysis.png-00", "items/.run.json-00"):  # what a killed process was writing
        (undisturbed / name).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_experiment, "load", None)  # no model is needed to see it
        assert scripts.core_experiment(model_directory, undisturbed, *WORDS) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("fisher_eigenvectors.npz", damage) for damage in ("gone", "cut", "flipped", "of another run")),
        *(("experiment_results.json", damage) for damage in ("gone", "cut", "flipped")),
        ("perturbation_analysis.png", "flipped"),
        ("perturbation_analysis.png", "gone"),
        ("fisher_similarity_matrix.png", "of another run"),
        ("report.html", "flipped"),
        ("report.html", "gone"),
    ],
)
def test_what_is_damaged_is_made_again(
    name, damage, model_directory, undisturbed, finished_experiment, tmp_path, monkeypatch
):
    if name.endswith((".png", ".html")):  # which is never a reason to compute anything
        monkeypatch.setattr(core_experiment, "load", None)
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    content = bytearray((output / name).read_bytes())
    if damage == "gone":
        (output / name).unlink()
    elif damage == "of another run":
        shutil.copy(finished_experiment / name, output / name)
    else:
        content[len(content) // 2] ^= 1
        (output / name).write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    assert_same_experiment(output, undisturbed)


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": "residual-fisher/1"}'])
def test_results_without_a_manifest_are_refused_and_overwritten_when_asked(
    content, model_directory, undisturbed, tmp_path, capsys
):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    manifest = output / "items" / "run.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    before = contents(output)
    assert scripts.core_experiment(model_directory, output, *WORDS) == 2
    said = capsys.readouterr().err
    assert "holds results without a readable items/run.json: --overwrite replaces them" in said
    assert contents(output) == before
    assert scripts.core_experiment(model_directory, output, *WORDS, "--overwrite") == 0
    assert_same_experiment(output, undisturbed)


def test_another_run_is_refused_and_its_files_stay(model_directory, undisturbed, tmp_path, capsys):
    model = shutil.copytree(model_directory, tmp_path / "model")
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.\nWe like wild animals.")
    words, output = ["--data-file", str(data)], tmp_path / "out"
    assert scripts.core_experiment(model, output, *words) == 0
    before = contents(output)

    def refused(*more: str) -> str:
        assert scripts.core_experiment(model, output, *words, *more) == 2
        assert contents(output) == before
        return capsys.readouterr().err

    said = refused("--seed", "1")
    assert "holds a run with other settings (seed was 0 and is 1): --overwrite replaces it" in said
    seconds = [s for stage, s in experiment_results(output)[0]["timings"].items() if stage != "load"]
    assert f", with its 2 finished sentences (about {duration(sum(seconds))})\n" in said
    data.write_text("The zoo has many animals.\nWe like tame animals.")
    said = refused()
    assert "the data have changed since the run in" in said and "without its 2 finished sentences (about " in said
    assert "holds a run of other sentences" in refused("--num-sentences", "21")
    assert "the data have changed since the run in" in refused("--layers", "all")
    data.write_text("The zoo has many animals.\nWe like wild animals.")
    lm, _ = loading.load(str(model), device="cpu")
    lm.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    lm.save_pretrained(model)
    assert "holds a run of another model" in refused()
    assert "holds a run of another model" in refused("--layers", "all")


def test_results_of_an_older_version_are_not_lost(model_directory, undisturbed, tmp_path, capsys):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    shutil.rmtree(output / "items")
    document = json.loads((output / "experiment_results.json").read_text())
    del document["run"], document["checksum"]
    (output / "experiment_results.json").write_text(json.dumps(document))
    assert scripts.core_experiment(model_directory, output, *WORDS) == 2
    assert "--overwrite replaces them" in capsys.readouterr().err
    assert scripts.run("core_experiment", ["--redraw", str(output)]) == 0


def test_overwriting_that_is_stopped_early_leaves_the_earlier_run(model_directory, undisturbed, tmp_path):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    with calls_of(core_experiment, "measure_sentence", Stopped), pytest.raises(Stopped):
        scripts.core_experiment(model_directory, output, *WORDS, "--seed", "1", "--overwrite")
    assert_same_experiment(output, undisturbed)


@pytest.mark.parametrize("name", sorted(EXPERIMENT_FILES - {"items"}))
def test_a_directory_in_a_files_place_is_found_before_the_work(name, model_directory, tmp_path, capsys, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(core_experiment, "measure_sentence", None)
    assert scripts.core_experiment(model_directory, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"core_experiment.py: error: cannot write {tmp_path / name}: a directory has its place")


def test_a_second_run_in_the_directory_says_who_has_it(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--num-sentences", "60")
    running = scripts.start("core_experiment", words, tmp_path / "out", scripts.slow_sentences)
    running.wait_until((tmp_path / "out" / "items" / "run.json").exists)
    assert scripts.core_experiment(model_directory, tmp_path / "out") == 2
    assert f"is in use by process {running.process.pid} on " in capsys.readouterr().err
    running.send(signal.SIGINT)
    assert running.end()[0] == 130


@pytest.mark.parametrize("change", [
    lambda d: d["fisher"].clear(), lambda d: d.update(contexts=[1]), lambda d: d.update(environment=None),
    lambda d: d["experiment_config"].clear(), lambda d: d.update(similarity_matrix=[["a"]]),
    lambda d: d.update(perturbation_results="no"), lambda d: d.update(fisher=[{}]),
])  # fmt: skip
def test_drawing_results_of_another_form_is_one_line(change, undisturbed, tmp_path, capsys):
    document = json.loads((undisturbed / "experiment_results.json").read_text())
    del document["checksum"]
    change(document)
    (tmp_path / "experiment_results.json").write_text(json.dumps(document))
    assert scripts.run("core_experiment", ["--redraw", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"core_experiment.py: error: the results in {tmp_path} are of another form: ")
    assert said.count("\n") == 1
