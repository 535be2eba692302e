"""Panels drawn one by one: with --redraw --panel into files of their own, and from a notebook."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from matplotlib.axes import Axes
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
import pytest

from residual_fisher.common.program import UserError
from residual_fisher.experiment import figures, map_figure
from residual_fisher.pipeline import figures as spectra
import scripts

LAYERS, SENTENCES = ("0", "2"), range(4)  # of the finished experiment
GOAL = {"probability": 0.5, "kl": 1.0, "least_kl": 0.5, "ratio": 2.0, "others_kl": 0.0, "norms": 0.1}
RADIUS = {"step": 2.0, "nats": 0.5, "norms": 0.01, "steps": [2.0, 3.0]}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def results(finished_experiment) -> dict:
    return scripts.experiment_results(finished_experiment)[0]


@pytest.fixture
def more(results) -> dict:
    """The results of a run with --trust-radius and --steer too."""
    for number, entries in enumerate(results["fisher"]):
        for layer, entry in entries.items():
            nats = 0.1 * (1 + number) * (1 + int(layer))
            entry["trust_radius"] = {**RADIUS, "nats": nats}
    results["steering"] = [
        {
            "token": " a",
            "id": 1,
            "probability": 0.1 * number,
            "layers": {
                layer: {"natural": {"0.5": {**GOAL, "kl": 1.0 + number + int(layer), "ratio": 2.0 + number}}}
                for layer in LAYERS
            },
        }
        for number in SENTENCES
    ]
    return results


def new_axes(count: int = 1) -> Axes | np.ndarray:
    return plt.subplots(1, count)[1]


def line(ax: Axes, label: str) -> np.ndarray:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found.get_ydata()


# --- from a notebook -----------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", [None, 1])
def test_kl_is_of_the_layers_and_the_sentence_asked_for(sentence, results):
    axes = new_axes(2)
    figures.kl(axes, results, layers=[0, 2], sentence=sentence)
    figures.kl(alone := new_axes(), results, layers=[2], sentence=sentence)
    for layer, ax in zip(("0", "2", "2"), (*axes, alone), strict=True):
        some = results["perturbation_results"] if sentence is None else [results["perturbation_results"][sentence]]
        expected = [np.median([record[layer][scale]["kl"] for record in some]) for scale in ("0.1", "1")]
        assert line(ax, "Fisher eigenvector") == pytest.approx(expected)
        assert f"layer {layer}" in ax.get_title() and ("S1" in ax.get_title()) == (sentence == 1)
        assert ax.get_xlabel() == "scale α (steps of 1/√λ)" and "nats" in ax.get_ylabel()


def test_without_layers_those_are_drawn_that_there_are_axes_for(results):
    figures.kl(axes := new_axes(2), results)
    figures.kl(alone := new_axes(), results)
    assert [ax.get_title() for ax in (*axes, alone)] == ["layer 0", "layer 2", "layer 2"]
    with pytest.raises(UserError, match="2 layers need as many axes, not 1"):
        figures.kl(new_axes(), results, layers=[0, 2])


def test_the_shares_are_those_of_one_sentence_at_one_layer(results):
    base, scales = set(results["contexts"][3]["top_ids"]), ("-1", "0", "0.1", "1")
    records = [results["perturbation_results"][3]["2"][scale] for scale in scales]
    for panel, expected in (
        (figures.kept, [len(base & set(record["top_ids"])) / 5 for record in records]),
        (figures.changed, [float(record["top_changed"]) for record in records]),
    ):
        panel(ax := new_axes(), results, layers=[2], sentence=3)
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(expected)
        assert ax.get_title().endswith(", S3")
        panel(ax := new_axes(), results, sentence=3)
        assert np.array(ax.images[0].get_array())[1] == pytest.approx(expected)


def test_the_words_and_probabilities_are_of_the_sentence_asked_for(results):
    figures.probabilities(ax := new_axes(), results, layers=[0], sentence=3)
    expected = [results["perturbation_results"][3]["0"][scale]["target_prob"] for scale in ("-1", "0", "0.1", "1")]
    assert line(ax, f"“{results['contexts'][3]['target_token']}”") == pytest.approx(expected)
    figures.tokens(ax := new_axes(), results, layers=[2], sentence=3)
    said = results["fisher"][3]["2"]["tokens"][0]
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx(
        sorted(np.copysign(token["share"], token["slope"]) for token in said)
    )
    assert "S3" in ax.get_title() and [label.get_text() for label in ax.get_yticklabels()] == ["2"]


def test_in_a_narrow_panel_fewer_tokens_have_room_for_their_text(results):
    shown = []
    for width in (4, 16):
        _, ax = plt.subplots(figsize=(width, 3))
        figures.tokens(ax, results)
        shown.append(len(ax.texts))
        renderer = ax.figure.canvas.get_renderer()
        bars = [bar.get_window_extent(renderer) for bar in ax.patches]
        for text in ax.texts:
            own = text.get_window_extent(renderer)
            assert any(bar.x0 <= own.x0 and own.x1 <= bar.x1 for bar in bars), text.get_text()
    assert shown[0] < shown[1]


def test_the_cosines_are_those_of_the_pairs_asked_for(results):
    matrix = np.array(results["similarity_matrix"])
    image = figures.pairs(new_axes(), results, layers=[2])
    assert np.array_equal(image.get_array(), matrix[4:, 4:])
    image = figures.pairs(new_axes(), results, sentence=3)
    assert np.array_equal(image.get_array(), matrix[np.ix_([3, 7], [3, 7])])
    image = figures.means(ax := new_axes(), results, sentence=3)
    assert image.get_array()[0, 1] == pytest.approx(matrix[3, 7]) and "within" not in ax.get_title()
    assert figures.means(ax := new_axes(), results, layers=[0]) is None
    assert [bar.get_width() for bar in ax.patches] == pytest.approx((matrix[:4, :4].sum(axis=1) - 1) / 3)


def test_trust_radii_and_steering_are_of_the_sentence_asked_for(more):
    figures.trust(ax := new_axes(), more, sentence=2)
    assert ax.lines[0].get_ydata() == pytest.approx([0.3, 0.9])
    figures.cost(ax := new_axes(), more, layers=[2])
    assert line(ax, "natural gradient, one step") == pytest.approx([4.5])  # the median of 3, 4, 5, 6
    figures.cost(ax := new_axes(), more, layers=[2], sentence=3)
    assert line(ax, "natural gradient, one step") == [6]
    figures.ratio(ax := new_axes(), more, sentence=3)
    assert line(ax, "natural gradient, one step").tolist() == [5, 5]
    figures.reached(ax := new_axes(), more, sentence=3)
    assert line(ax, "natural gradient, one step").tolist() == [1, 1]
    more["steering"][0]["layers"] = {layer: {} for layer in LAYERS}
    with pytest.raises(UserError, match="nothing was steered in sentence 0"):
        figures.cost(new_axes(), more, sentence=0)


def test_what_a_run_has_not_measured_is_said(results):
    with pytest.raises(UserError, match="no trust radii: --trust-radius measures them"):
        figures.trust(new_axes(), results)
    for panel in (figures.cost, figures.ratio, figures.reached):
        with pytest.raises(UserError, match="nothing was steered in these results: --steer does it"):
            panel(new_axes(), results)


@pytest.mark.parametrize(("environment", "backend"), [({"MPLBACKEND": "svg"}, "svg"), ({}, "agg")])
def test_a_notebook_keeps_its_own_way_to_show_pictures(environment, backend):
    """Jupyter names it in this variable; without one, no display is needed."""
    code = "import matplotlib, residual_fisher.common.drawing; print(matplotlib.get_backend())"
    others = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=scripts.ROOT, env=others | environment, text=True)
    assert found.strip().lower() == backend


@pytest.mark.parametrize("panel", [*figures.PANELS])
def test_every_panel_refuses_layers_and_sentences_that_are_not_there(panel, more):
    draw = figures.PANELS[panel].draw
    with pytest.raises(UserError, match="no layer 1: these results have layers 0, 2"):
        draw(new_axes(), more, layers=[1])
    for number in (4, -1):
        with pytest.raises(UserError, match=f"no sentence {number}: these results have 0 to 3"):
            draw(new_axes(), more, sentence=number)


def test_the_pipelines_panels_are_drawn_from_a_notebook(finished_pipeline):
    records = scripts.records(finished_pipeline)
    prompts = spectra.collect(records)
    spectra.spectra(ax := new_axes(), prompts)
    assert line(ax, "median") == pytest.approx(np.median([r["singular_values"] for r in records], axis=0), rel=1e-5)
    spectra.coordinates(ax := new_axes(), prompts)
    spectra.scores(ax := new_axes(), prompts, false_alarms=0.2)
    assert "p ≤ 0.2" in ax.get_title()
    spectra.oddest(ax := new_axes(), prompts)
    assert max(records, key=lambda record: record["outlier_score"])["prompt"] in {t.get_text() for t in ax.texts}


# --- --redraw --panel ----------------------------------------------------------------------------


def drawn(folder: Path, output: Path, *words: str, script: str = "core_experiment") -> set[str]:
    """The files that a call adds to a copy of a run; it changes no other."""
    if not output.exists():
        shutil.copytree(folder, output)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.*")}
    assert scripts.run(script, ["--redraw", str(output), *words]) == 0
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.*")}
    assert after.items() >= before.items()
    return {path.name for path in after.keys() - before.keys()}


def test_a_panel_is_drawn_into_a_file_of_its_own(finished_experiment, tmp_path, capsys):
    words = ["--panel", "kl", "--layers", "2", "--sentence", "1", "--format", "pdf"]
    assert drawn(finished_experiment, tmp_path / "out", *words) == {"perturbation_analysis_kl_layers_2_S1.pdf"}
    assert capsys.readouterr().out == f"Drawn in {tmp_path / 'out'}: perturbation_analysis_kl_layers_2_S1.pdf\n"
    names = drawn(finished_experiment, tmp_path / "out", "--panel", "kl", "--layers", "all")
    assert names == {"perturbation_analysis_kl.png"}
    with Image.open(tmp_path / "out" / names.pop()) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 100


@pytest.mark.parametrize("name", figures.PANELS)
def test_every_panel_of_a_run_can_be_drawn_alone(name, more, tmp_path):
    for part in ((None, None), ([0, 2], 1)):
        file = figures.draw_panel(tmp_path, more, name, *part)
        assert (tmp_path / file).is_file()
        assert file.startswith(figures.PANELS[name].picture.removesuffix(".png") + f"_{name}")
    figure = figures.panel_figure(more, figures.PANELS[name], None, None)
    legends = figure.legends + [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert len(legends) == (name in ("kl", "probabilities", "cost", "ratio", "reached"))


@pytest.mark.parametrize("name", spectra.PANELS)
def test_every_panel_of_a_pipelines_run_can_be_drawn_alone(name, finished_pipeline, tmp_path):
    words = ["--panel", name, "--format", "svg"]
    found = drawn(finished_pipeline, tmp_path / "out", *words, script="compute_fisher")
    assert found == {f"fisher_spectra_{name}.svg"}


def test_the_panels_of_a_map_are_drawn_alone(model_directory, tmp_path, capsys):
    output = tmp_path / "map"
    words = ["--model-name", str(model_directory), "--output-dir", str(output), "--map", "The wild animals of a river"]
    assert scripts.run("core_experiment", [*words, "--max-vocab-subset", "20"]) == 0
    for name in map_figure.PANELS:
        assert drawn(output, output, "--panel", name) == {f"fisher_map_{name}.png"}
    assert drawn(output, output, "--panel", "grid", "--layers", "1") == {"fisher_map_grid_layers_1.png"}
    results = json.loads((output / "fisher_map.json").read_text())
    image = map_figure.grid(new_axes(), results, layers=[1])
    assert np.array(image.get_array())[:, 0] == pytest.approx(
        [token["layers"]["1"]["nats"] for token in results["tokens"]]
    )
    capsys.readouterr()
    for more, said in {
        "--panel kl": "no panel 'kl': these results have grid, surprisal, predictions",
        "--panel grid --layers 9": "no layer 9: these results have layers 0, 1, 2",
        "--panel surprisal --layers 1": "--layers has no effect on the panel surprisal",
        "--panel grid --sentence 0": "--sentence has no effect: ",
    }.items():
        assert scripts.run("core_experiment", ["--redraw", str(output), *more.split()]) == 2
        assert capsys.readouterr().err.startswith(f"core_experiment.py: error: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--panel kk", "no panel 'kk': these results have kl, kept, changed, probabilities, tokens, pairs, means"),
        ("--panel trust", "no panel 'trust': these results have kl, "),
        ("--panel kl --layers 0,1", "no layer 1: these results have layers 0, 2"),
        ("--panel kl --sentence 4", "no sentence 4: these results have 0 to 3"),
        ("--panel means --layers 2 --sentence 1", "a single sentence at a single layer has no other"),
    ],
)
def test_a_panel_that_is_not_there_is_one_line_with_those_that_are(words, said, finished_experiment, capsys):
    before = scripts.contents(finished_experiment)
    assert scripts.run("core_experiment", ["--redraw", str(finished_experiment), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"core_experiment.py: error: {said}") and error.count("\n") == 1
    assert scripts.contents(finished_experiment) == before


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("core_experiment", "--panel kl", "argument --panel: it has no effect without --redraw"),
        ("compute_fisher", "--panel spectra", "argument --panel: it has no effect without --redraw"),
        ("core_experiment", "--sentence 0", "argument --sentence: it has no effect without --panel"),
        ("core_experiment", "--redraw x --sentence 0", "argument --sentence: it has no effect without --panel"),
        ("core_experiment", "--redraw x --layers 3", "argument --layers: beside --redraw it has no effect without"),
        ("compute_fisher", "--redraw x --sentence 0", "unrecognized argument --sentence"),
    ],
)
def test_what_only_a_panel_has_is_an_error_without_one(script, words, said, capsys):
    assert scripts.as_program(script, words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{script}.py: error: {said}") and error.count("\n") == 1


def test_an_unknown_panel_of_the_pipeline_is_one_line(finished_pipeline, capsys):
    assert scripts.run("compute_fisher", ["--redraw", str(finished_pipeline), "--panel", "kl"]) == 2
    said = "no panel 'kl': these results have spectra, scores, coordinates, oddest"
    assert capsys.readouterr().err == f"compute_fisher.py: error: {said}\n"
