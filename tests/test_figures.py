"""The pictures: their size, and that every panel shows the numbers it is named for."""

import copy
from pathlib import Path
import warnings

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
import pytest

from residual_fisher.common import drawing
from residual_fisher.experiment import figures
from residual_fisher.pipeline import figures as spectra
from residual_fisher.pipeline import report
from residual_fisher.pipeline.scores import SCORES
from residual_fisher.pipeline.settings import Settings
import scripts


@pytest.fixture(autouse=True)
def style(monkeypatch):
    monkeypatch.setattr(drawing, "DPI", 150)  # as users have them
    with plt.rc_context(drawing.STYLE):
        yield
    plt.close("all")


@pytest.fixture
def results(finished_experiment) -> dict:
    return copy.deepcopy(scripts.experiment_results(finished_experiment)[0])


def panel(figure: Figure, title: str) -> Axes:
    """The one whose title begins like this."""
    (found,) = [axes for axes in figure.axes if (axes.get_title() + axes.get_title("left")).startswith(title)]
    return found


def line(axes: Axes, label: str) -> np.ndarray:
    """The points (n, 2) of the line with this label in the legend."""
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found.get_xydata()


def assert_is_a_picture(path: Path, width: int, height: int):
    """In a page's resolution, and of many colours."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (width, height)
        assert image.info["dpi"][0] == pytest.approx(150, abs=1)
        assert len(image.convert("RGB").getcolors(maxcolors=width * height)) > 100


# --- the experiment ------------------------------------------------------------------------------


def test_the_experiments_pictures_are_of_a_readable_size(results, tmp_path):
    figures.draw(tmp_path, results)
    assert_is_a_picture(tmp_path / "fisher_similarity_matrix.png", 2250, 1110)
    assert_is_a_picture(tmp_path / "perturbation_analysis.png", 2400, 1611)


def test_the_similarity_picture_shows_all_pairs_and_their_means_by_layer(results):
    figure = figures.similarity_figure(results)
    matrix = np.array(results["similarity_matrix"])
    assert np.array_equal(panel(figure, "Top Fisher eigenvectors").images[0].get_array(), matrix)
    means = panel(figure, "Mean: ")
    blocks = matrix.reshape(2, 4, 2, 4).mean(axis=(1, 3))
    others = ~np.eye(4, dtype=bool)
    for layer in (0, 1):  # within a layer, of different sentences
        blocks[layer, layer] = matrix.reshape(2, 4, 2, 4)[layer, :, layer][others].mean()
    assert np.allclose(means.images[0].get_array(), blocks)
    assert means.get_title() == f"Mean: within a layer {np.diag(blocks).mean():.2f}, between layers {blocks[0, 1]:.2f}"
    assert sorted(text.get_text() for text in means.texts) == sorted(f"{value:.2f}" for value in blocks.flat)


def test_the_similarity_picture_of_a_single_sentence_and_layer_is_drawn(results):
    for key in ("fisher", "contexts", "sentences", "perturbation_results"):
        results[key] = results[key][:1]
    results["fisher"][0].pop("2")
    results["similarity_matrix"] = [[1.0]]
    figure = figures.similarity_figure(results)
    assert figure.axes[0].images[0].get_array() == [[1.0]]
    assert panel(figure, "Mean").get_title() == "Mean"


def test_every_layer_has_a_panel_of_kl_by_scale_with_the_prediction_beside_it(results):
    figure = figures.perturbation_figure(results)
    for layer in ("0", "2"):
        axes = panel(figure, f"layer {layer}")
        positive = [[s[layer][scale] for s in results["perturbation_results"]] for scale in ("0.1", "1")]
        expected = {
            "Fisher eigenvector": [[r["kl"] for r in at] for at in positive],
            "towards another sentence": [[r["controls"]["difference"]["kl"] for r in at] for at in positive],
            "random": [[r["controls"][f"random_{i}"]["kl"] for r in at for i in (0, 1)] for at in positive],
            "predicted for it, ½ δᵀFδ": [[r["predicted_kl"] for r in at] for at in positive],
        }
        for label, values in expected.items():
            found = line(axes, label)
            assert found[:, 0].tolist() == [0.1, 1]
            assert found[:, 1] == pytest.approx([np.median(at) for at in values])
        assert len(axes.lines) == 8  # the same for negative scales
        assert len(axes.collections) == 6  # quartiles, of all but the prediction
        assert axes.get_yscale() == "log"


def test_the_heatmaps_show_what_is_kept_and_what_changes(results):
    figure = figures.perturbation_figure(results)
    bases = [set(context["top_ids"]) for context in results["contexts"]]
    kept = panel(figure, "Top-5 tokens kept").images[0].get_array()
    changed = panel(figure, "Top token changed").images[0].get_array()
    for row, layer in enumerate(("0", "2")):
        for column, scale in enumerate(("-1", "0", "0.1", "1")):
            records = [s[layer][scale] for s in results["perturbation_results"]]
            shares = [len(base & set(r["top_ids"])) / 5 for base, r in zip(bases, records, strict=True)]
            assert kept[row, column] == pytest.approx(np.mean(shares))
            assert changed[row, column] == pytest.approx(np.mean([r["top_changed"] for r in records]))
    assert (kept[:, 1] == 1).all() and (changed[:, 1] == 0).all()


def test_the_example_shows_the_target_of_the_sentence_that_predicts_it_best(results):
    axes = panel(figures.perturbation_figure(results), "S")
    best = int(np.argmax([context["target_probability"] for context in results["contexts"]]))
    records = results["perturbation_results"][best]["2"]
    assert axes.get_title().startswith(f"S{best}, layer 2: “")
    found = line(axes, f"“{results['contexts'][best]['target_token']}”")
    assert found[:, 0].tolist() == [-1, 0, 0.1, 1]
    assert found[:, 1] == pytest.approx([records[scale]["target_prob"] for scale in ("-1", "0", "0.1", "1")])
    assert len(axes.lines) >= 2


def test_tokens_with_one_text_have_curves_of_their_own(results):
    """As parts of characters have: among them may be the target's."""
    for context in results["contexts"]:
        context["target_token"] = "\ufffd"
    for found in results["perturbation_results"]:
        for record in found["2"].values():
            record["top_tokens"] = ["\ufffd"] * 5
    best = int(np.argmax([context["target_probability"] for context in results["contexts"]]))
    records = [results["perturbation_results"][best]["2"][scale] for scale in ("-1", "0", "0.1", "1")]
    target, *others = panel(figures.perturbation_figure(results), "S").lines
    assert target.get_ydata() == pytest.approx([record["target_prob"] for record in records])
    highest = {}
    for record in records:
        for id_, p in zip(record["top_ids"], record["top_probs"], strict=True):
            if p != record["target_prob"]:
                highest[id_] = max(p, highest.get(id_, 0))
    expected = sorted(highest.values(), reverse=True)[:5]
    assert [np.nanmax(line.get_ydata()) for line in others] == pytest.approx(expected)


def of_layers(results: dict, layers: list[str], scales: list[float] | None = None) -> dict:
    """The results at layers that are copies of the two there are, and at some scales."""
    old, count = list(results["fisher"][0]), len(results["sentences"])
    source = [old[i % len(old)] for i in range(len(layers))]
    for key in ("fisher", "perturbation_results"):
        results[key] = [{to: found[of] for to, of in zip(layers, source, strict=True)} for found in results[key]]
    rows = [old.index(of) * count + i for of in source for i in range(count)]
    results["similarity_matrix"] = np.array(results["similarity_matrix"])[np.ix_(rows, rows)].tolist()
    results["experiment_config"]["scales"] = scales or results["experiment_config"]["scales"]
    return results


def test_of_many_layers_some_are_named_at_their_blocks(results):
    layers = [str(layer) for layer in range(30)]
    all_pairs, means, _ = figures.similarity_figure(of_layers(results, layers)).axes
    for panel, size in ((all_pairs, 4), (means, 1)):
        for axis in (panel.xaxis, panel.yaxis):
            named = {
                label.get_text(): place for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
            }
            assert 8 <= len(named) <= 12 and {"0", "29"} <= set(named)
            assert all(place == size * int(layer) + (size - 1) / 2 for layer, place in named.items())


def test_a_single_layer_has_bars_in_place_of_heatmaps(results):
    results = of_layers(results, ["0"])
    figure, bases = figures.perturbation_figure(results), [set(c["top_ids"]) for c in results["contexts"]]
    for title, statistic in (
        ("Top-5 tokens kept", lambda record, base: len(base & set(record["top_ids"])) / 5),
        ("Top token changed", lambda record, base: record["top_changed"]),
    ):
        for bar, scale in zip(panel(figure, title).patches, ("-1", "0", "0.1", "1"), strict=True):
            records = [s["0"][scale] for s in results["perturbation_results"]]
            assert bar.get_height() == pytest.approx(np.mean([*map(statistic, records, bases)]))
    similarity, matrix = figures.similarity_figure(results), np.array(results["similarity_matrix"])
    assert [label.get_text() for label in similarity.axes[0].get_xticklabels()] == ["S0", "S1", "S2", "S3"]
    for i, bar in enumerate(panel(similarity, "Mean: within a layer").patches):
        assert bar.get_width() == pytest.approx(np.mean(np.delete(matrix[i], i)))


LEGEND = ["Fisher eigenvector", "predicted for it, ½ δᵀFδ", "towards another sentence", "random"]


@pytest.mark.parametrize("scales", [[-1.0, 1.0], [-1.0], [-1.0, 0.0], [0.1, 1.0]])
def test_whatever_the_scales_the_prediction_is_seen_and_the_legend_is_there(scales, results):
    figure = figures.perturbation_figure(of_layers(results, ["0", "2"], scales))
    (legend,) = [legend for part in figure.subfigs for legend in part.legends]
    assert [text.get_text() for text in legend.get_texts()] == LEGEND
    predicted = [line for line in panel(figure, "layer 0").lines if line.get_linestyle() == "--"]
    assert len(predicted) == len({np.sign(scale) for scale in scales if scale})
    assert all(len(line.get_xdata()) > 1 or line.get_marker() == "_" for line in predicted)


def square_font(path: Path, family: str, character: str) -> None:
    """A font in which a character is a square, and no other is there."""
    builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    for number, corner in enumerate(((0, 0), (0, 700), (700, 700), (700, 0))):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)


def test_what_the_font_lacks_is_drawn_by_one_that_is_installed_and_without_a_word(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    known = drawing.font_families()
    assert known[0] == "DejaVu Sans" and set(known[1:]) <= {font.name for font in font_manager.fontManager.ttflist}
    square_font(tmp_path / "font.ttf", "Noto Sans CJK SC", "動")
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    monkeypatch.setitem(drawing.STYLE, "font.family", drawing.font_families())

    def page(text: str) -> Figure:
        figure = plt.figure(figsize=(1, 1), layout="none")
        figure.text(0.1, 0.3, text, fontsize=40)
        return figure

    drawing.save(tmp_path, {"a.png": lambda: page("動"), "b.png": lambda: page("物")})  # the other one is in no font
    with Image.open(tmp_path / "a.png") as drawn, Image.open(tmp_path / "b.png") as box:
        dark = [np.asarray(image.convert("L")) < 128 for image in (drawn, box)]
    rows, columns = (np.flatnonzero(dark[0].any(axis=axis)) for axis in (1, 0))
    assert dark[0][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95  # the square
    assert dark[1].any() and not np.array_equal(*dark) and caplog.records == []


RADIUS = {"step": 2.0, "nats": 0.5, "norms": 0.01, "steps": [2.0, 3.0]}
HIDDEN = {"step": None, "nats": None, "norms": None, "steps": [None, 2.0]}  # by rounding
SENTENCES = range(4)


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        ([(0, "2")], [0.5, 0.5]),
        ([(sentence, "0") for sentence in SENTENCES], [np.nan, 0.5]),
        ([(sentence, layer) for sentence in SENTENCES for layer in ("0", "2")], None),
    ],
    ids=["of one sentence", "at one of two layers", "at all layers"],
)
def test_the_trust_panel_shows_medians_of_the_radii_that_rounding_does_not_hide(hidden, shown, results, tmp_path):
    for sentence, entries in enumerate(results["fisher"]):
        for layer, entry in entries.items():
            entry["trust_radius"] = HIDDEN if (sentence, layer) in hidden else RADIUS
    figures.draw(tmp_path, results)
    assert_is_a_picture(tmp_path / "perturbation_analysis.png", 3000, 1611)
    axes = panel(figure := figures.perturbation_figure(results), "½ λ s² holds to 10% up to")
    if shown is None:
        assert "rounding hides it" in axes.texts[0].get_text()
        return
    assert axes.lines[0].get_ydata() == pytest.approx(shown, nan_ok=True)
    (norms,) = [other for other in figure.axes if other.get_ylabel() == "step there, norms of h"]
    assert norms.lines[0].get_ydata() == pytest.approx(np.array(shown) / 50, nan_ok=True)


def test_in_bfloat16_a_run__ends_with_its_pictures(model_directory, tmp_path):
    """Steps of a bfloat16 model are mostly rounded away: no radius may be visible at all."""
    words = ["--trust-radius", "--dtype", "bfloat16", "--num-sentences", "2"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 0
    assert_is_a_picture(tmp_path / "perturbation_analysis.png", 3000, 1611)


def test_labels_hold_nothing_that_matplotlib_or_a_terminal_takes_for_an_instruction(results, tmp_path):
    for context in results["contexts"]:
        context["prompt"] = context["target_token"] = "$\\alpha \x1b[31m$"
    axes = panel(figures.perturbation_figure(results), "S")
    assert axes.get_title().endswith(r"“\$\\alpha \x1b[31m\$”".replace("\\\\", "\\"))
    figures.draw(tmp_path, results)
    assert drawing.label("a$b\x07") == r"a\$b\x07"


def test_there_is_a_picture_of_steering_if_a_target_was_below_a_goal(results):
    entry = {"kl": 1.0, "ratio": 2.0}
    for directions, names in (({}, figures.FILES[:2]), ({"natural": {"0.9": entry}}, figures.FILES)):
        layers = dict.fromkeys(("0", "2"), directions)
        results["steering"] = [{"token": " a", "id": 1, "probability": 0.85, "layers": layers}]
        assert figures.pictures_of(results) == names
    axes = panel(figures.steering_figure(results), "KL over the least, to probability 0.9")
    assert axes.lines[1].get_ydata().tolist() == [2, 2]


# --- the pipeline --------------------------------------------------------------------------------


def spectra_figure(folder: Path) -> tuple[Figure, list[dict]]:
    return spectra.spectra_figure(iter(scripts.records(folder)), 0.2), scripts.records(folder)


def dots(axes: Axes) -> np.ndarray:
    """The points (n, 2) of all prompts; those that stand out are drawn again over them."""
    return max((line.get_xydata() for line in axes.lines), key=len)


def test_the_pipelines_picture_is_of_a_readable_size(finished_pipeline, tmp_path):
    spectra.draw(tmp_path, scripts.records(finished_pipeline), 0.05)
    assert_is_a_picture(tmp_path / "fisher_spectra.png", 3000, 1950)


def test_the_spectra_are_shown_as_quantiles_and_those_that_stand_out_as_lines(finished_pipeline):
    figure, records = spectra_figure(finished_pipeline)
    axes = panel(figure, "Spectra of 40 prompts")
    values = np.array([record["singular_values"] for record in records])
    assert line(axes, "median")[:, 1] == pytest.approx(np.median(values, axis=0), rel=1e-5)
    assert [band.get_label() for band in axes.collections] == ["all", "5 to 95 %", "25 to 75 %"]
    leading = sorted(records, key=lambda record: -record["outlier_score"])[:6]
    for found, record in zip(axes.lines[1:], leading, strict=True):
        assert found.get_ydata() == pytest.approx(record["singular_values"], rel=1e-5)


def test_every_prompt_is_in_every_panel(finished_pipeline):
    figure, records = spectra_figure(finished_pipeline)
    columns = {key: np.array([record[key] for record in records]) for key in records[0]}
    expected = {
        "Which directions": tuple(columns["principal_coordinates"][:, :2].T),
    }
    for title, (x, y) in expected.items():
        assert dots(panel(figure, title)) == pytest.approx(np.stack([x, y], axis=1), rel=1e-5)
    rows = [line.get_xdata() for line in panel(figure, "In which way unusual").lines if len(line.get_xdata()) == 40]
    for found, name in zip(rows, ("outlier_score", *SCORES), strict=True):
        assert found == pytest.approx(columns[name], rel=1e-5)
    outstanding = columns["outlier_score"][columns["p_value"] <= 0.2]
    assert f"; {len(outstanding)} of 40 stand out" in panel(figure, "The oddest prompts").get_title(loc="left")
    (limit,) = [line for line in panel(figure, "In which way unusual (dotted: p ≤ 0.2)").lines if line.get_ls() == ":"]
    assert limit.get_xdata() == pytest.approx([outstanding.min()] * 2)


def test_the_prompts_that_stand_out_are_named(finished_pipeline):
    figure, records = spectra_figure(finished_pipeline)
    texts = [text.get_text() for text in panel(figure, "The oddest prompts").texts]
    for record in sorted(records, key=lambda record: -record["outlier_score"])[:6]:
        numbers = {str(record["index"]), f"{record['outlier_score']:.1f}", f"p {record['p_value']:.2g}"}
        assert numbers | {record["prompt"]} <= set(texts)
        assert drawing.label("says " + " ".join(record["odd_words"])) in texts
        known = [record for record in records if "failed" not in record]
        usual = {
            "lambda_1": {"median": np.median([other["singular_values"][0] for other in known])},
            "effective_rank": {"median": np.median([other["effective_rank"] for other in known])},
        }
        assert set(map(drawing.label, report.reasons(record, usual, [], changed=False))) <= set(texts)


def test_groups_are_ringed_and_named_by_their_words(finished_pipeline):
    found = scripts.records(finished_pipeline)
    for index in (3, 7, 8, 20):
        found[index] = {**found[index], "group": 0, "odd_words": ["Sorry", "No"]}
    figure = spectra.spectra_figure(iter(found), 0.2)
    axes = panel(figure, "Which directions")
    (rings,) = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    expected = np.array([found[index]["principal_coordinates"][:2] for index in (3, 7, 8, 20)])
    assert rings.get_xydata() == pytest.approx(expected)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["4 answered alike: Sorry No"]
    assert panel(spectra_figure(finished_pipeline)[0], "Which directions").get_legend() is None


def test_beside_each_of_them_stand_the_tokens_of_the_direction_in_which_it_differs(finished_pipeline):
    figure, records = spectra_figure(finished_pipeline)
    (bars,) = panel(figure, "The oddest prompts").child_axes
    left = [bar.get_x() + min(bar.get_width(), 0) for bar in bars.patches]
    texts = {text.get_text() for text in bars.texts}
    for row, record in enumerate(sorted(records, key=lambda record: -record["outlier_score"])[:6]):
        said = record["directions"][record["differs_along"]]
        widths = [bar.get_width() for bar in bars.patches if round(bar.get_y() + 0.4) == row]
        expected = [np.copysign(token["share"], token["slope"]) for token in said]
        assert sorted(widths) == pytest.approx(sorted(expected))
        at = [x for x, bar in zip(left, bars.patches, strict=True) if round(bar.get_y() + 0.4) == row]
        assert min(at) == pytest.approx(sum(width for width in widths if width < 0), abs=1e-9)
        assert drawing.label(said[0]["token"]) in texts  # the largest has room for its text


@pytest.mark.parametrize("places", [slice(0, 3), slice(None)], ids=["some", "all"])
@pytest.mark.parametrize("change", [{"directions": None}, {"singular_values": [0.0] * 4}], ids=["earlier", "zero"])
def test_records_of_an_earlier_version_and_of_matrices_that_are_zero_are_drawn(
    change, places, finished_pipeline, tmp_path
):
    """There were no directions, or there are in those that a newer version added; and zero has no logarithm."""
    found = scripts.records(finished_pipeline)
    for record in found[places]:
        record.update(change)
        if record["directions"] is None:
            del record["directions"]
    spectra.draw(tmp_path, found, 0.05)
    assert_is_a_picture(tmp_path / "fisher_spectra.png", 3000, 1950)


NOTHING = {
    **dict.fromkeys(("trace", "captured_mass", "outlier_score", *SCORES), 0.0), "p_value": 1.0,
    "singular_values": [0.0] * 4, "principal_coordinates": [0.0] * 5, "directions": [], "odd_words": [],
    "failed": "NaN",
}  # fmt: skip


def test_a_few_prompts_that_all_failed_are_drawn(finished_pipeline, tmp_path):
    """Too few for scores, and without a Fisher matrix: all that is drawn is zero."""
    found = [{**record, **NOTHING} for record in scripts.records(finished_pipeline)[:7]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra.draw(tmp_path, found, 0.05)
        warnings.filterwarnings("ignore", "All-NaN")
        figure = spectra.spectra_figure(found, 0.05)
    assert_is_a_picture(tmp_path / "fisher_spectra.png", 3000, 1950)
    assert dots(panel(figure, "Which directions")).tolist() == [[0.0, 0.0]] * 7


@pytest.mark.parametrize(("count", "title"), [(1, "Spectra of 1 prompt"), (5, "Spectra of 5 prompts")])
def test_of_too_few_prompts_nothing_is_said_to_be_odd(count, title, finished_pipeline):
    without = {**dict.fromkeys(("outlier_score", *SCORES), 0.0), "p_value": 1.0}
    figure = spectra.spectra_figure([{**r, **without} for r in scripts.records(finished_pipeline)[:count]], 0.05)
    assert panel(figure, "Spectra of").get_title() == title
    scores = panel(figure, "In which way unusual")
    assert "too few" in scores.texts[0].get_text() and not any(line.get_visible() for line in scores.lines)
    first = panel(figure, "The first prompts: too few")
    assert not any(text.get_text().startswith("p ") for text in first.texts)
    (bars,) = first.child_axes
    assert bars.lines[-1].get_ydata() == pytest.approx([1 - count / 6, 1])  # no longer than the rows


def test_a_run_whose_prompts_all_failed_has_statistics_and_a_table(finished_pipeline):
    found = [{**record, **NOTHING} for record in scripts.records(finished_pipeline, timings=True)[:7]]
    statistics = report.summarize(report.columns_of(found), skipped=0)
    assert statistics["trace"] == {"median": 0, "min": 0, "max": 0} and statistics["tokens"]["max"] > 0
    said = report.final_table(lambda: found, statistics, Settings())
    assert "7 prompts failed (0, 1, 2, 3, 4, …): `failed` in prompts.jsonl says why" in said


def test_more_prompts_than_can_be_told_apart_are_thinned_out(finished_pipeline, monkeypatch):
    monkeypatch.setattr(spectra, "MAX_POINTS", 10)
    figure, records = spectra_figure(finished_pipeline)
    found = dots(panel(figure, "Which directions"))
    assert len(found) == 10
    for place in (0, -1):  # evenly, from the first to the last
        assert found[place] == pytest.approx(records[place]["principal_coordinates"][:2])
