"""An experiment in a directory that has one already: it is gone on with, left alone, or refused."""

import json
import math
import os
from pathlib import Path
import shutil
import signal
import time

import pytest

import core_experiment
from residual_fisher.common.files import write_json
from residual_fisher.experiment import results
from residual_fisher.model import loading
import scripts
from scripts import EXPERIMENT_FILES, experiment_results, experiment_words

WORDS = ["--num-sentences", "6", "--layers", "0", "2", "--scales", "-1", "1", "--scale-unit", "nats"]


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def undisturbed(model_directory, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "six"
    assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    return output


def assert_same(output: Path, expected: Path) -> None:
    """All files, byte for byte, but for timings and the directory's name."""
    for name in EXPERIMENT_FILES - {"experiment_results.json"}:
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    documents = []
    for path in (output, expected):
        document, _ = experiment_results(path)
        del document["timings"], document["experiment_config"]["output_dir"]
        documents.append(json.dumps(document))
    assert documents[0] == documents[1]
    assert set(os.listdir(output)) == EXPERIMENT_FILES


def slow_down() -> None:
    """And save after every sentence."""
    core_experiment.SAVE_EVERY, core_experiment.SAVE_SHARE = 0.0, math.inf
    perturb = core_experiment.perturb
    core_experiment.perturb = lambda *arguments: (time.sleep(0.1), perturb(*arguments))[1]


def test_killed_again_and_again_it_ends_as_if_never_stopped(model_directory, undisturbed, tmp_path):
    output, kept = tmp_path / "out", []

    def sentences() -> int:
        path = output / "experiment_results.json"
        return len(json.loads(path.read_text())["sentences"]) if path.exists() else 0

    for wanted in (1, 3):
        running = scripts.start("core_experiment", experiment_words(model_directory, output, *WORDS), output, slow_down)
        running.wait_until(lambda wanted=wanted: sentences() >= wanted)
        running.send(signal.SIGKILL)
        assert running.end()[0] == -signal.SIGKILL
        kept.append(sentences())
    calls, perturb = [], core_experiment.perturb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_experiment, "perturb", lambda *a: calls.append(1) or perturb(*a))
        assert scripts.core_experiment(model_directory, output, *WORDS) == 0
    assert kept[0] < kept[1] < 6 and len(calls) == 6 - kept[1]  # what was there was not computed again
    assert_same(output, undisturbed)


@pytest.mark.parametrize("moment", ["arrays of the first save", "arrays of a later save", "pictures"])
def test_stopped_between_two_files_it_goes_on(moment, model_directory, undisturbed, tmp_path, monkeypatch):
    saves = []

    def stop_or_write(path, document):
        saves.append(1)
        if len(saves) == (1 if moment == "arrays of the first save" else 2):
            raise Stopped
        write_json(path, document)

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(core_experiment, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(core_experiment, "SAVE_SHARE", math.inf)
    with monkeypatch.context() as patch:
        if moment == "pictures":
            patch.setattr(core_experiment.figures, "draw", stop)
        else:
            patch.setattr(results, "write_json", stop_or_write)
            patch.setattr(core_experiment.RunDirectory, "save", once(core_experiment.RunDirectory.save))
        with pytest.raises(Stopped):
            scripts.core_experiment(model_directory, tmp_path / "out", *WORDS)
    assert (tmp_path / "out" / "fisher_eigenvectors.npz").exists()
    assert scripts.core_experiment(model_directory, tmp_path / "out", *WORDS) == 0
    assert_same(tmp_path / "out", undisturbed)


def once(save):
    """`save`, and nothing more after it was stopped: as a kill would have it."""
    stopped = []

    def until_stopped(*arguments):
        if stopped:
            raise Stopped
        try:
            save(*arguments)
        except Stopped:
            stopped.append(1)
            raise

    return until_stopped


def test_a_finished_run_is_left_alone(model_directory, undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    assert scripts.core_experiment(model_directory, undisturbed, *WORDS) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("fisher_eigenvectors.npz", damage) for damage in ("gone", "cut", "flipped", "of another run")),
        ("perturbation_analysis.png", "flipped"),
        ("fisher_similarity_matrix.png", "of another run"),
    ],
)
def test_what_is_damaged_is_made_again(name, damage, model_directory, undisturbed, finished_experiment, tmp_path):
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
    assert_same(output, undisturbed)


@pytest.mark.parametrize("content", [None, "", "[]", "flipped"])
def test_results_that_cannot_be_read_are_refused_and_overwritten_when_asked(
    content, model_directory, undisturbed, tmp_path, capsys
):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    records = output / "experiment_results.json"
    if content == "flipped":
        records.write_text(records.read_text().replace('"trace": 0.', '"trace": 1.', 1))
    elif content is None:
        records.unlink()
        (output / "fisher_eigenvectors.npz").unlink()
    else:
        records.write_text(content)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert scripts.core_experiment(model_directory, output, *WORDS) == 2
    said = capsys.readouterr().err
    assert "no readable experiment_results.json in" in said and "--overwrite replaces" in said
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert scripts.core_experiment(model_directory, output, *WORDS, "--overwrite") == 0
    assert_same(output, undisturbed)


def test_another_run_is_refused_and_its_files_stay(model_directory, undisturbed, tmp_path, capsys):
    model = shutil.copytree(model_directory, tmp_path / "model")
    data = tmp_path / "data.txt"
    data.write_text("The zoo has many animals.\nWe like wild animals.")
    words, output = ["--data-file", str(data)], tmp_path / "out"
    assert scripts.core_experiment(model, output, *words) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def refused(*more: str) -> str:
        assert scripts.core_experiment(model, output, *words, *more) == 2
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        return capsys.readouterr().err

    assert "holds a run with other settings (seed was 0 and is 1): --overwrite replaces it" in refused("--seed", "1")
    data.write_text("The zoo has many animals.\nWe like tame animals.")
    assert "holds a run of other sentences: --overwrite replaces it" in refused()
    data.write_text("The zoo has many animals.\nWe like wild animals.")
    lm, _ = loading.load(str(model), device="cpu")
    lm.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    lm.save_pretrained(model)
    assert "holds a run of another model: --overwrite replaces it" in refused()


def test_results_of_an_older_version_are_not_lost(model_directory, undisturbed, tmp_path, capsys):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    document = json.loads((output / "experiment_results.json").read_text())
    del document["run"], document["checksum"]
    (output / "experiment_results.json").write_text(json.dumps(document))
    assert scripts.core_experiment(model_directory, output, *WORDS) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert core_experiment.main(core_experiment.parse(["--redraw", str(output)])) == 0


def test_overwriting_that_is_stopped_early_leaves_the_earlier_run(model_directory, undisturbed, tmp_path, monkeypatch):
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):

        def stop(*_):
            raise Stopped

        patch.setattr(core_experiment, "perturb", stop)
        scripts.core_experiment(model_directory, output, *WORDS, "--seed", "1", "--overwrite")
    assert_same(output, undisturbed)


@pytest.mark.parametrize("name", sorted(EXPERIMENT_FILES))
def test_a_directory_in_a_files_place_is_found_before_the_work(name, model_directory, tmp_path, capsys, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(core_experiment, "perturb", None)
    assert scripts.core_experiment(model_directory, tmp_path) == 2
    said = capsys.readouterr().err
    assert said == f"core_experiment.py: error: cannot write {tmp_path / name}: a directory has its place\n"


def test_a_second_run_in_the_directory_says_who_has_it(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--num-sentences", "60")
    running = scripts.start("core_experiment", words, tmp_path / "out", slow_down)
    running.wait_until((tmp_path / "out" / "experiment_results.json").exists)
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
    assert core_experiment.main(core_experiment.parse(["--redraw", str(tmp_path)])) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"core_experiment.py: error: the results in {tmp_path} are of another form: ")
    assert said.count("\n") == 1
