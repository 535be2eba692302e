"""compute_fisher.py as a user calls it, on a tiny model: its files."""

from dataclasses import replace
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

import compute_fisher
import fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.common.text import excerpt
from residual_fisher.model import loading
from residual_fisher.pipeline import batches, matrices, report
from residual_fisher.pipeline.scores import SCORES
import scripts
from scripts import PIPELINE_FILES, ROOT, arrays, records
import tiny

# --- the files -----------------------------------------------------------------------------------


def test_a_run_writes_four_files_and_what_it_needs_to_be_extended(finished_pipeline):
    assert {path.name for path in finished_pipeline.iterdir()} == PIPELINE_FILES


def test_arrays_have_the_documented_names_shapes_and_order(finished_pipeline):
    found = arrays(finished_pipeline)
    assert list(found) == [f"{part}_{i}" for i in range(40) for part in "USVH"]
    for i in range(40):
        u, s, v = found[f"U_{i}"], found[f"S_{i}"], found[f"V_{i}"]
        assert u.shape == (tiny.D, 4) and s.shape == (4,) and v.shape == (4, tiny.D)
        assert u.dtype == s.dtype == v.dtype == found[f"H_{i}"].dtype == np.float32
        assert (np.diff(s) <= 0).all() and (s >= 0).all()
        assert np.abs(u - v.T).max() < 1e-6 and np.abs(v @ u - np.eye(4)).max() < 1e-5


def test_every_prompts_triplets_are_those_of_its_float64_fisher_matrix(
    finished_pipeline, chat_directory, chat_tokenizer
):
    model = loading.load(str(chat_directory), "float64", "cpu")[0]
    matrices = load_fisher_matrices(finished_pipeline)
    for record in records(finished_pipeline)[::6]:
        turn = [{"role": "user", "content": record["prompt"]}]
        text = chat_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(chat_tokenizer(text, add_special_tokens=False)["input_ids"])
        assert record["tokens"] == len(ids)
        matrix = tiny.brute_force_fisher(model, ids, tiny.layers_of(model)[1], 6, everywhere=True).numpy()
        u, s, v = np.linalg.svd(matrix)
        found = matrices[record["index"]]
        assert np.abs(found.S - s[:4]).max() <= 1e-4 * s[0]
        assert np.abs(found.U @ np.diag(found.S) @ found.V - u[:, :4] @ np.diag(s[:4]) @ v[:4]).max() <= 1e-3 * s[0]
        stream = model(ids[None], output_hidden_states=True).hidden_states[2][0, -1]  # after model.layers.1
        assert matrices.activation(record["index"]) == pytest.approx(stream.detach().numpy(), rel=1e-4, abs=1e-5)
        assert record["trace"] == pytest.approx(matrix.trace(), rel=1e-4)
        probabilities = tiny.plain_log_probs(model, ids).exp().sort(descending=True).values
        assert record["captured_mass"] == pytest.approx(float(probabilities[:6].sum()), rel=1e-4)
        said = [token["probability"] for token in record["next_tokens"]]
        assert said == pytest.approx(probabilities[:10].tolist(), rel=1e-4) and said[0] == record["top_probability"]
        shown = chat_tokenizer.decode([record["next_tokens"][0]["id"]])
        assert record["top_token"] == shown


def test_records_follow_the_dataset_and_metadata_counts_what_was_skipped(finished_pipeline, dataset):
    rows = [json.loads(line)["prompt"] for line in dataset.read_text().splitlines()]
    found = records(finished_pipeline, timings=True)
    assert [r["prompt"] for r in found] == [row for row in rows if row]
    assert all(rows[r["row"]] == r["prompt"] for r in found)
    triplets = load_fisher_matrices(finished_pipeline)
    for record in found:
        assert record["singular_values"] == pytest.approx(triplets[record["index"]].S.tolist(), rel=1e-5)
        assert record["seconds"] > 0
    metadata = yaml.safe_load((finished_pipeline / "metadata.yaml").read_text())
    assert metadata["complete"] is True
    assert (metadata["num_prompts"], metadata["num_singular_values"], metadata["bias_dim"]) == (40, 4, tiny.D)
    assert metadata["hook_layer"] == "model.layers.1"
    assert metadata["statistics"]["skipped_rows"] == 2  # the last one comes after prompt 40
    assert metadata["config"]["top_k_tokens"] == 6 and "torch" in metadata["environment"]


def test_the_final_table_names_the_prompts_that_stand_out(finished_pipeline, chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=8) == 0
    shown = capsys.readouterr().out
    found = records(tmp_path / "out")
    for label, key in {"trace of F": "trace", "captured mass": "captured_mass", "tokens": "tokens"}.items():
        values = [record[key] for record in found]
        (line,) = [line for line in shown.splitlines() if line.startswith(label)]
        numbers = [float(word) for word in line.removeprefix(label).split()]
        assert numbers == pytest.approx([np.median(values), min(values), max(values)], rel=1e-3)
    lowest = min(record["p_value"] for record in found)
    *_, leading = shown.partition("0 of 8 prompts stand out from most of them, with a p-value of at most 0.01")
    assert f"(the lowest is {lowest:.2g}: n usual prompts show none below 1/(n + 1))" in leading
    lines = leading[: leading.index("no prompts are answered more alike")].splitlines()[5:]
    starts = [place for place, line in enumerate(lines) if not line.startswith(" ")]
    expected = sorted(found, key=lambda record: -record["outlier_score"])[:5]
    for start, end, record in zip(starts, [*starts[1:], len(lines)], expected, strict=True):
        number, *numbers = lines[start].split()[:9]
        scores = [f"{record[name]:+.1f}" for name in SCORES]
        assert int(number) == record["index"]
        assert numbers == [f"{record['outlier_score']:.1f}", f"{record['p_value']:.2g}", *scores]
        assert " ".join(lines[start].split()[9:]) == excerpt(record["prompt"], 40)
        *why, differs = lines[start + 1 : end]
        leading_two = sorted((name for name in SCORES if record[name] > 2), key=lambda name: -record[name])[:2]
        assert [line.split(":")[0].strip() for line in why] == [f"{n[2:]} {record[n]:+.1f}" for n in leading_two]
        assert differs.strip().startswith(excerpt("says " + " ".join(record["odd_words"]), 60)) and " ← → " in differs
    assert max(map(len, lines)) <= 120


def test_reasons_say_what_is_odd_in_figures_of_the_prompt(finished_pipeline):
    """Of the two largest scores that are notable, in words; none of an ordinary prompt."""
    (record, *_), group = records(finished_pipeline), [3, 0, 40]
    statistics = {"lambda_1": {"median": 2.0}, "effective_rank": {"median": 3.5}}
    usual = {**record, **dict.fromkeys(SCORES, 0.5), "odd_words": ["No", "Never", "I"], "effective_rank": 1.25}
    assert report.reasons(usual, statistics, [], changed=False) == []
    odd = {**usual, "z_words": 4.0, "z_group": 6.0, "z_spectrum": 3.0}
    assert report.reasons(odd, statistics, group, changed=False) == [
        "group +6.0: others that ask otherwise are answered like it (3, 40)",
        "words +4.0: its answer begins with No or Never, as hardly any other does",
    ]
    assert report.reasons({**usual, "z_spectrum": 3.0}, statistics, [], changed=False) == [
        "spectrum +3.0: its sensitivity lies in 1.2 directions (median 3.5)"
    ]
    assert report.reasons(odd, statistics, [], changed=True)[1] == (
        "words +4.0: its answer begins with No or Never, as it hardly did"
    )


@pytest.mark.filterwarnings("error")
def test_kept_matrices_are_compared_like_eigenpairs(finished_pipeline):
    with load_fisher_matrices(finished_pipeline) as matrices:
        a, b = matrices[0], matrices[6]
    f, g = (x.U.astype(float) @ np.diag(x.S) @ x.V for x in (a, b))
    expected = np.trace(f @ g) / (np.linalg.norm(f) * np.linalg.norm(g))
    assert float(fisher.matrix_similarity(a, b)) == pytest.approx(expected, rel=1e-4)
    assert float(fisher.subspace_overlap(a, a)) == pytest.approx(1)


def test_results_are_read_without_torch_or_matplotlib(finished_pipeline):
    code = (
        "import sys; from residual_fisher import load_fisher_matrices\n"
        f"U, S, V = load_fisher_matrices({str(finished_pipeline)!r})[39]\n"
        f"assert U.shape == ({tiny.D}, 4) and S.shape == (4,) and V.shape == (4, {tiny.D})\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- what changes a result and what does not -----------------------------------------------------


@pytest.mark.usefixtures("without_pictures")
def test_results_do_not_depend_on_the_batch_size(chat_directory, dataset, finished_pipeline, tmp_path):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", batch_size=7) == 0
    ours, theirs = load_fisher_matrices(tmp_path / "out"), load_fisher_matrices(finished_pipeline)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.S / b.S - 1).max() < 1e-4
        assert np.linalg.svd(a.V @ b.U, compute_uv=False).min() > 1 - 1e-6


@pytest.mark.usefixtures("without_pictures")
def test_prompts_too_long_for_the_model_are_cut_and_counted(chat_directory, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "many wild animals " * 60}) + "\n" + '{"prompt": "hi"}')
    assert scripts.compute_fisher(chat_directory, tmp_path / "long.jsonl", tmp_path / "out") == 0
    first, second = records(tmp_path / "out")
    assert first["truncated"] and 60 <= first["tokens"] <= 64 and not second["truncated"]
    assert yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())["statistics"]["truncated_prompts"] == 1


@pytest.mark.usefixtures("without_pictures")
def test_more_singular_values_than_tokens_are_lowered_noted_and_recorded(chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", top_k_tokens=3, num_prompts=5) == 0
    note = "note: --num-singular-values 4 is more than a matrix of 3 tokens has: keeping 3"
    assert capsys.readouterr().out.count(note) == 1
    assert yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())["num_singular_values"] == 3
    assert arrays(tmp_path / "out")["U_0"].shape == (tiny.D, 3)


def test_of_the_whole_vocabulary_there_are_no_more_singular_values_than_tokens():
    config = tiny.hf.LlamaConfig(**{**tiny.GROUPED, "vocab_size": 6})
    subject = batches.Subject(tiny.hf.AutoModelForCausalLM.from_config(config), None, "", None)
    settings, said = replace(compute_fisher.parse([]), top_k_tokens="all", num_singular_values=10), []
    assert compute_fisher.clamp_to_model(settings, subject, said.append).num_singular_values == 6
    assert said == ["note: --num-singular-values 10 is more than a matrix of 6 tokens has: keeping 6"]


def test_of_equally_probable_next_tokens_the_lower_one_is_recorded_first(chat_directory, monkeypatch):
    model, tokenizer = loading.load(str(chat_directory), "float32", "cpu")
    subject = batches.Subject(model, tokenizer, *loading.find_module(model, "1"))
    batch = [batches.encode(tokenizer, batches.Prompt(0, 0, "wild animals"), 64)]
    linearize = batches.linearize_batch

    def with_ties(*arguments):
        point, *others = linearize(*arguments)
        point.log_probs[:, [90, 41, 60, 11, 93]] = point.log_probs.max() + 1
        return point, *others

    monkeypatch.setattr(batches, "linearize_batch", with_ties)
    settings = replace(compute_fisher.parse([]), top_k_tokens=6, num_singular_values=2)
    (item,) = batches.measure_batch(settings, subject, batch, "eager")
    assert [token["id"] for token in item.record["next_tokens"]][:5] == [11, 41, 60, 90, 93]


@pytest.mark.usefixtures("without_pictures")
def test_more_tokens_than_the_vocabulary_are_clamped_with_a_note(chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", top_k_tokens=99999, num_prompts=2) == 0
    assert "note: --top-k-tokens 99999 is more than the vocabulary: counting all" in capsys.readouterr().out
    assert [record["captured_mass"] for record in records(tmp_path / "out")] == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.usefixtures("without_pictures")
def test_fewer_prompts_than_asked_for_are_used_and_noted(chat_directory, dataset, tmp_path, capsys):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", num_prompts=41) == 0
    assert "note: 41 prompts were asked for, only 40 are available" in capsys.readouterr().out
    assert len(records(tmp_path / "out")) == 40


# --- the whole vocabulary ------------------------------------------------------------------------


def test_the_whole_vocabulary_can_be_counted(chat_directory, dataset, tmp_path):
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", top_k_tokens="all", num_prompts=3) == 0
    for record in records(tmp_path / "out"):
        assert record["captured_mass"] == 1
        assert 0 <= record["residual"] <= 1e-3
        assert 0 <= record["trace_error"] < 0.1 * record["trace"]
        assert sum(record["singular_values"]) <= record["trace"] + 3 * record["trace_error"]


@pytest.mark.usefixtures("without_pictures")
def test_the_whole_vocabulary_has_no_more_singular_values_than_the_width(chat_directory, dataset, tmp_path, capsys):
    options = {"top_k_tokens": "all", "num_singular_values": 200, "num_prompts": 2}
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", **options) == 0
    assert f"keeping {tiny.D}" in capsys.readouterr().out
    for record in records(tmp_path / "out"):
        assert record["trace"] == pytest.approx(sum(record["singular_values"]), rel=1e-3)


@pytest.mark.usefixtures("without_pictures")
def test_long_prompts_go_one_by_one_where_attention_keeps_its_matrices(chat_directory, dataset, tmp_path, monkeypatch):
    """The results are those of whole batches."""
    options = {"top_k_tokens": "all", "num_prompts": 4}
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "together", **options) == 0
    monkeypatch.setattr(batches, "ATTENTION_BYTES", 1)
    parts = []
    linearize_batch = batches.linearize_batch
    monkeypatch.setattr(
        batches,
        "linearize_batch",
        lambda s, m, batch, *kind: parts.append(len(batch)) or linearize_batch(s, m, batch, *kind),
    )
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "apart", **options) == 0
    assert parts == [1, 1, 1, 1, 1]  # the first is the trial of the first prompt
    together, apart = (load_fisher_matrices(tmp_path / name) for name in ("together", "apart"))
    for a, b in zip(together, apart, strict=True):
        assert np.abs(a.S / b.S - 1).max() < 1e-4


# --- reading and drawing again -------------------------------------------------------------------


@pytest.mark.usefixtures("without_pictures")
def test_compact_and_sharded_results_read_the_same(chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "ONE_FILE", 10)
    expected = load_fisher_matrices(finished_pipeline)
    for form, tolerance in (("full", 0), ("compact", 1e-3)):
        output = tmp_path / form
        assert scripts.compute_fisher(chat_directory, dataset, output, store=form) == 0
        assert not (output / "fisher_matrices_compressed.npz").exists()
        files = {path.name for path in (output / "items").iterdir()}
        assert files == {"run.json", "00000000-00000031.npz", "00000032-00000039.npz"}
        with load_fisher_matrices(output) as found:
            assert len(found) == 40
            for index in (0, 31, 32, 39, -1):  # on both sides of the archives' border
                assert found[index].U.dtype == np.float32 and found[index].V.shape == (4, tiny.D)
                for ours, theirs in zip(found[index], expected[index], strict=True):
                    assert np.abs(ours - theirs).max() <= tolerance
                assert found.activation(index) == pytest.approx(expected.activation(index), rel=tolerance)
            with pytest.raises(IndexError, match="prompt 40 of 40"):
                found[40]
        assert records(output)[3]["prompt"] == records(finished_pipeline)[3]["prompt"]
    sizes = [sum(p.stat().st_size for p in (tmp_path / s / "items").glob("*.npz")) for s in ("full", "compact")]
    assert sizes[1] < 0.8 * sizes[0]  # of matrices this small, records and zip headers are the larger part


def test_the_picture_can_be_drawn_again_from_the_records_alone(finished_pipeline, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_bytes((finished_pipeline / "prompts.jsonl").read_bytes())
    assert scripts.as_program("compute_fisher", ["--redraw", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "fisher_spectra.png", "report.html"}
    assert (tmp_path / "fisher_spectra.png").read_bytes() == (finished_pipeline / "fisher_spectra.png").read_bytes()


@pytest.mark.parametrize("content", [None, "", "{", "{}\n"])
def test_drawing_again_without_results_is_one_line_and_exit_code_2(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "prompts.jsonl").write_text(content)
    before = os.listdir(tmp_path)
    assert scripts.as_program("compute_fisher", ["--redraw", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("compute_fisher.py: error: ") and said.count("\n") == 1
    assert "no readable prompts.jsonl" in said or "holds no prompts" in said
    assert os.listdir(tmp_path) == before
