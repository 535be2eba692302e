"""compute_fisher.py with --reference and --base: what prompts are scored against."""

import json
from pathlib import Path
import shutil

import pytest
import torch
import transformers as hf
import yaml

from residual_fisher import load_fisher_matrices
from residual_fisher.pipeline import comparison, run_directory
from residual_fisher.pipeline.scores import SCORES, ScoredRun, outlier_scores
import scripts
from scripts import arrays, records

pytestmark = pytest.mark.usefixtures("without_pictures")
SCORE_KEYS = {*SCORES, "outlier_score", "differs_along", "odd_words", "principal_coordinates"}


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
        return ScoredRun.of(records(of), list(load_fisher_matrices(of)))

    found = outlier_scores(run(folder), **{kind: run(of) for kind, of in against.items()})
    return [{key: found[key][i] for key in SCORE_KEYS} for i in range(len(records(folder)))]


def test_a_finished_run_is_scored_against_another_and_back_without_its_model(
    trusted, finished, chat_directory, dataset, capsys, monkeypatch
):
    import compute_fisher

    before, matrices = scored(finished), arrays(finished)
    monkeypatch.setattr(compute_fisher, "prepare", lambda *_: pytest.fail("nothing has to be computed"))
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    said = capsys.readouterr().out
    assert f"from the trusted ones in {trusted}: scores above" in said and "its prompts were scored anew" in said
    for found, wanted in zip(scored(finished), expected(finished, reference=trusted), strict=True):
        assert found.pop("odd_words") == wanted.pop("odd_words")
        for key in found:
            assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5)
    assert metadata(finished)["scores"]["against"] == "reference"
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert scripts.compute_fisher(chat_directory, dataset, finished) == 0
    assert scored(finished) == before
    assert all(arrays(finished)[name].tobytes() == array.tobytes() for name, array in matrices.items())


def test_a_new_run_with_a_reference_has_the_scores_of_one_that_is_scored_later(
    trusted, finished, chat_directory, dataset, tmp_path
):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "new", reference=trusted) == 0
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    assert (tmp_path / "new" / "prompts.jsonl").exists()
    assert scored(tmp_path / "new") == scored(finished)


def test_a_copy_of_the_reference_elsewhere_is_the_same_reference(
    trusted, finished, chat_directory, dataset, tmp_path, capsys
):
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    elsewhere = shutil.copytree(trusted, tmp_path / "elsewhere")
    capsys.readouterr()
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=elsewhere) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_stopped_while_it_scores_anew_it_loses_no_matrix(trusted, finished, chat_directory, dataset, capsys):
    class Stopped(BaseException):
        pass

    def stop(*_, **__):
        raise Stopped

    matrices = arrays(finished)
    for where in ((run_directory, "outlier_scores"), (run_directory.figures, "draw")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(*where, stop)
            scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted)
        assert metadata(finished)["complete"] and metadata(finished)["scores"] is None
    capsys.readouterr()
    assert scripts.compute_fisher(chat_directory, dataset, finished, reference=trusted) == 0
    assert "its prompts were scored anew" in capsys.readouterr().out
    assert all(arrays(finished)[name].tobytes() == array.tobytes() for name, array in matrices.items())


def test_a_run_of_an_earlier_version_is_scored_anew(finished, chat_directory, dataset, capsys):
    wanted = scored(finished)
    about, old = metadata(finished), records(finished, timings=True)
    for record in old:
        for key in SCORE_KEYS - {"outlier_score", "principal_coordinates"}:
            del record[key]
        record |= {"z_log_lambda": 0.1, "subspace_distance": 0.1, "z_subspace": 0.1, "z_principal": 0.1}
    (finished / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    del about["scores"]
    about["files"]["prompts.jsonl"] = run_directory.seal(finished / "prompts.jsonl")
    (finished / "metadata.yaml").write_text(yaml.safe_dump(about))
    assert scripts.compute_fisher(chat_directory, dataset, finished) == 0
    assert "its prompts were scored anew" in capsys.readouterr().out
    assert scored(finished) == wanted and "z_subspace" not in records(finished)[0]


def test_a_dry_run_says_that_only_scores_are_missing(trusted, finished, chat_directory, dataset, capsys):
    words = scripts.pipeline_words(chat_directory, dataset, finished, reference=trusted)
    assert scripts.as_program("compute_fisher", [*words, "--dry-run"]) == 0
    assert "is finished: only its prompts would be scored anew" in capsys.readouterr().out
    assert metadata(finished)["scores"]["against"] is None


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
    trusted, chat_directory, dataset, tmp_path, capsys, monkeypatch
):
    import compute_fisher

    monkeypatch.setattr(compute_fisher, "prepare", lambda *_: pytest.fail("too late"))

    def said(**options) -> str:
        return refused(scripts.pipeline_words(chat_directory, dataset, tmp_path / "out", **options), capsys)

    assert f"no finished run in {tmp_path / 'none'}: --reference takes" in said(reference=tmp_path / "none")
    assert "choose one" in said(reference=trusted, base=trusted)
    assert "--base is the --output-dir itself" in said(base=tmp_path / "out")
    assert "has top_k_tokens 6, and this one 5" in said(reference=trusted, top_k_tokens=5)
    assert "bias_positions 'all', and this one 'last'" in said(reference=trusted, bias_positions="last")
    damaged = shutil.copytree(trusted, tmp_path / "damaged")
    (damaged / "prompts.jsonl").write_text("{}")
    assert f"{damaged / 'prompts.jsonl'} is missing or damaged" in said(base=damaged)
    about = metadata(trusted)
    (damaged / "metadata.yaml").write_text(yaml.safe_dump({**about, "complete": False}))
    assert "no finished run" in said(reference=damaged)
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_model_or_layer_or_of_few_prompts_is_refused(
    trusted, finished, chat_directory, tuned_directory, dataset, tmp_path, capsys, monkeypatch
):
    def said(model: Path, output: Path, **options) -> str:
        return refused(scripts.pipeline_words(model, dataset, output, **options), capsys)

    assert "is of another model" in said(tuned_directory, tmp_path / "new", reference=trusted)
    assert "is hooked at another layer" in said(chat_directory, tmp_path / "new", hook_layer_name=2, base=trusted)
    assert "is of other prompts (first at prompt 24)" in said(chat_directory, finished, base=trusted)
    monkeypatch.setattr(comparison, "FEWEST", 25)
    assert f"24 prompts in {trusted} are too few to trust" in said(chat_directory, finished, reference=trusted)
    assert len(records(finished)) == 40  # and it can still be scored
    monkeypatch.undo()
    assert scripts.compute_fisher(chat_directory, dataset, finished) == 0
