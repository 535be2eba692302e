"""compute_fisher.py with --reference and --base: what prompts are scored against."""

import json
from pathlib import Path
import shutil

import pytest
import torch
import transformers as hf
import yaml

import compute_fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.pipeline import derived, figures
from residual_fisher.pipeline.scores import SCORES, ScoredRun, outlier_scores
import scripts
from scripts import Stopped, arrays, calls_of, pipeline_words, records

pytestmark = pytest.mark.usefixtures("without_pictures")
EXPLAINED = {"differs_along", "odd_words", "principal_coordinates", "likeness", "group"}
SCORE_KEYS = {*SCORES, "outlier_score", "p_value", *EXPLAINED}


@pytest.fixture(scope="module")
def trusted(chat_directory, dataset, tmp_path_factory) -> Path:
    """A finished run over the first 24 prompts."""
    output = tmp_path_factory.mktemp("trusted") / "run"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=24) == 0
    return output


@pytest.fixture
def finished(finished_pipeline, tmp_path) -> Path:
    return shutil.copytree(finished_pipeline, tmp_path / "out")


def metadata(folder: Path) -> dict:
    return yaml.safe_load((folder / "metadata.yaml").read_text())


def scored(folder: Path) -> list[dict]:
    return [{key: record[key] for key in SCORE_KEYS} for record in records(folder)]


def expected(folder: Path, **against: Path) -> list[dict]:
    """The scores by the library, from what is on disk."""

    def run(of: Path) -> ScoredRun:
        return ScoredRun.of(records(of), load_fisher_matrices(of))

    found = outlier_scores(run(folder), **{kind: run(of) for kind, of in against.items()})
    return [{key: found[key][i] for key in SCORE_KEYS} for i in range(len(records(folder)))]


def test_a_finished_run_is_scored_against_another_and_back_without_its_model(
    trusted, finished, chat_directory, dataset, capsys
):
    before, matrices = scored(finished), arrays(finished)
    with calls_of(hf.AutoTokenizer, "from_pretrained") as loaded:
        assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
        said = capsys.readouterr().out
        assert (
            f"from the trusted ones in {trusted}, with a p-value of" in said and "its prompts were scored anew" in said
        )
        for found, wanted in zip(scored(finished), expected(finished, reference=trusted), strict=True):
            for key in ("odd_words", "group"):
                assert found.pop(key) == wanted.pop(key)
            for key in found:
                assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5)
        assert metadata(finished)["scores"]["against"] == "reference"
        assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
        assert "is finished: nothing to do" in capsys.readouterr().out
        assert scripts.compute_fisher(chat_directory, dataset, finished) == 0
    assert scored(finished) == before and not loaded
    assert all(arrays(finished)[name].tobytes() == array.tobytes() for name, array in matrices.items())


def test_a_new_run_with_a_reference_has_the_scores_of_one_that_is_scored_later(
    trusted, finished, chat_directory, dataset, tmp_path
):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "new", reference=trusted) == 0
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    assert scored(tmp_path / "new") == scored(finished)


def test_a_reference_is_its_matrices_wherever_they_lie_and_whatever_has_become_of_derived_files(
    trusted, finished, chat_directory, dataset, tmp_path, capsys
):
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    before = (finished / "prompts.jsonl").stat().st_mtime_ns
    elsewhere = shutil.copytree(trusted, tmp_path / "elsewhere")
    (elsewhere / "prompts.jsonl").write_text("{}")
    (elsewhere / "metadata.yaml").unlink()
    (elsewhere / "fisher_spectra.png").unlink()
    capsys.readouterr()
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=elsewhere) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert (finished / "prompts.jsonl").stat().st_mtime_ns == before
    assert metadata(finished)["scores"]["directory"] == str(elsewhere)


@pytest.mark.parametrize(
    ("owner", "step"),
    [(derived, "outlier_scores"), (figures, "draw"), (derived.page, "write"), (derived, "write_metadata")],
    ids=["scores", "picture", "page", "metadata"],
)
def test_stopped_while_it_scores_anew_it_loses_no_matrix(owner, step, trusted, finished, chat_directory, dataset):
    matrices = arrays(finished)
    with calls_of(owner, step, Stopped), pytest.raises(Stopped):
        scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted)
    with calls_of(hf.AutoTokenizer, "from_pretrained") as loaded:
        assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    assert not loaded and metadata(finished)["scores"]["against"] == "reference"
    for found, wanted in zip(scored(finished), expected(finished, reference=trusted), strict=True):
        assert found["outlier_score"] == pytest.approx(wanted["outlier_score"], rel=1e-4, abs=1e-5)
    assert all(arrays(finished)[name].tobytes() == array.tobytes() for name, array in matrices.items())


def earlier(count: int) -> dict:
    return {"z_subspace": [0.1] * count, "likeness": [0.1] * count, "group": [None] * count}


def test_scores_of_an_earlier_version_are_made_again(finished, chat_directory, dataset, tmp_path, capsys, monkeypatch):
    wanted = scored(finished)
    with monkeypatch.context() as patch:
        patch.setattr(derived, "SCORING_VERSION", 1)
        patch.setattr(derived, "outlier_scores", lambda run: earlier(len(run.trace)))
        patch.setattr(compute_fisher.report, "final_table", lambda *_: "")
        patch.setattr(derived.page, "write", lambda *_: None)
        scripts.compute_fisher(chat_directory, dataset, finished)
    assert "z_subspace" in records(finished)[0]
    capsys.readouterr()
    assert scripts.compute_fisher(chat_directory, dataset, finished) == 0
    assert "its prompts were scored anew" in capsys.readouterr().out
    assert scored(finished) == wanted and "z_subspace" not in records(finished)[0]


def test_a_dry_run_says_that_only_scores_are_missing(trusted, finished, chat_directory, dataset, capsys):
    words = pipeline_words(chat_directory, dataset, finished, reference=trusted)
    assert scripts.as_program("compute_fisher", [*words, "--dry-run"]) == 0
    assert "is finished: only its prompts would be scored anew" in capsys.readouterr().out
    assert metadata(finished)["scores"]["against"] is None


def test_another_share_of_false_alarms_is_drawn_and_told_anew_and_changes_no_score(
    trusted, finished, chat_directory, dataset, capsys
):
    words = {"reference": trusted, "num_prompts": 40}
    assert scripts.compute_fisher(chat_directory, dataset, finished, **words) == 0
    before, picture = (finished / "prompts.jsonl").read_bytes(), (finished / "fisher_spectra.png").stat().st_mtime_ns
    capsys.readouterr()
    assert scripts.compute_fisher(chat_directory, dataset, finished, false_alarms=0.2, **words) == 0
    said = capsys.readouterr().out
    beyond = sum(record["p_value"] <= 0.2 for record in records(finished))
    assert f"{beyond} of 40 prompts stand out" in said and "with a p-value of at most 0.2" in said
    assert "was finished: its picture was drawn anew" in said
    assert (finished / "prompts.jsonl").read_bytes() == before
    assert (finished / "fisher_spectra.png").stat().st_mtime_ns > picture
    assert metadata(finished)["scores"]["false_alarms"] == 0.2


# --- a base model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_directory(chat_directory, tmp_path_factory) -> Path:
    """The model with other weights in one layer."""
    path = shutil.copytree(chat_directory, tmp_path_factory.mktemp("models") / "tuned")
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.layers[2].mlp.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(path)
    return path


def test_prompts_are_scored_by_their_change_from_a_base_model(
    finished_pipeline, tuned_directory, dataset, tmp_path, capsys
):
    output = tmp_path / "tuned"
    assert scripts.compute_fisher(tuned_directory, dataset, output, base=finished_pipeline) == 0
    assert f"by their change from {finished_pipeline}" in capsys.readouterr().out
    for found, wanted in zip(scored(output), expected(output, base=finished_pipeline), strict=True):
        assert found["outlier_score"] == pytest.approx(wanted["outlier_score"], rel=1e-4, abs=1e-5)
    assert scored(output) != scored(finished_pipeline)


# --- what is refused -----------------------------------------------------------------------------


def refused(words: list[str], capsys) -> str:
    assert scripts.as_program("compute_fisher", words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_finished_run_with_the_same_settings_is_refused_before_a_model_is_loaded(
    trusted, chat_directory, dataset, tmp_path, capsys
):
    def said(**options) -> str:
        return refused(pipeline_words(chat_directory, dataset, tmp_path / "out", **options), capsys)

    with calls_of(hf.AutoTokenizer, "from_pretrained") as loaded:
        assert f"no finished run in {tmp_path / 'none'}: --reference takes" in said(reference=tmp_path / "none")
        assert "choose one" in said(reference=trusted, base=trusted)
        assert "--base is the --output-dir itself" in said(base=tmp_path / "out")
        assert "has top_k_tokens 6, and this one 5" in said(reference=trusted, top_k_tokens=5)
        assert "bias_positions 'all', and this one 'last'" in said(reference=trusted, bias_positions="last")
        assert "answer_tokens 1, and this one 3" in said(reference=trusted, answer_tokens=3)
        assert "max_length 2048, and this one 100" in said(base=trusted, max_length=100)
        for name in ("items/records.jsonl", "fisher_matrices_compressed.npz"):
            damaged = shutil.copytree(trusted, tmp_path / "damaged" / name)
            (damaged / name).write_text("{}")
            assert f"{damaged / name} is missing or damaged: the command that made it" in said(base=damaged)
        manifest = json.loads((damaged / "items" / "run.json").read_text())
        (damaged / "items" / "run.json").write_text(json.dumps({**manifest, "complete": False}))
        assert "no finished run" in said(reference=damaged)
    assert not loaded and not (tmp_path / "out").exists()


def test_a_reference_of_another_model_or_layer_or_of_few_prompts_is_refused(
    trusted, finished, chat_directory, tuned_directory, dataset, tmp_path, capsys
):
    def said(model: Path, output: Path, **options) -> str:
        return refused(pipeline_words(model, dataset, output, **options), capsys)

    assert "is of another model" in said(tuned_directory, tmp_path / "new", reference=trusted)
    assert "is hooked at another layer" in said(chat_directory, tmp_path / "new", hook_layer_name=2, base=trusted)
    line = said(chat_directory, tmp_path / "new", dtype="bfloat16", base=trusted)
    assert "is of another dtype ('float32', and this one 'bfloat16')" in line
    assert not (tmp_path / "new").exists()
    elsewhere = tmp_path / "elsewhere"  # two finished runs, whose models are not loaded again
    assert scripts.compute_fisher(chat_directory, dataset, elsewhere, hook_layer_name=2, num_prompts=24) == 0
    capsys.readouterr()
    assert "is hooked at another layer" in said(chat_directory, finished, reference=elsewhere)
    assert "is of other prompts (first at prompt 24)" in said(chat_directory, finished, base=trusted)
    few = tmp_path / "few"
    assert scripts.compute_fisher(chat_directory, dataset, few, num_prompts=19) == 0
    capsys.readouterr()
    assert f"19 prompts in {few} are too few to trust: 20 at least" in said(chat_directory, finished, reference=few)
    assert len(records(finished)) == 40  # and it can still be scored
    assert scripts.compute_fisher(chat_directory, dataset, finished) == 0
