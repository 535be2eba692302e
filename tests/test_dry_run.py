"""--dry-run of both scripts: it writes nothing, counts what the run then does, and fails as the run fails."""

from pathlib import Path
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml

import compute_fisher
import core_experiment
from residual_fisher.common.lock import lock_directory
from residual_fisher.common.text import duration, size
from residual_fisher.experiment import estimate as of_experiment
from residual_fisher.experiment.sentences import Context
from residual_fisher.pipeline import estimate as of_pipeline
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Encoded, Prompt
from residual_fisher.pipeline.settings import parse
import scripts
from scripts import experiment_results, experiment_words, pipeline_words, records

pytestmark = pytest.mark.usefixtures("without_pictures")


def tree(folder: Path) -> dict:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def say(script: str, words: list[str], capsys) -> tuple[int, str, str]:
    """The exit code of a dry run, and what it prints."""
    module = {"core_experiment": core_experiment, "compute_fisher": compute_fisher}[script]
    capsys.readouterr()
    code = module.main(module.parse([*words, "--dry-run"]))
    return code, *capsys.readouterr()


def numbers(said: str, line: str) -> list[int]:
    """The whole numbers of the line that begins so."""
    (found,) = [row for row in said.splitlines() if row.startswith(line)]
    return [int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w.])", found)]


# --- core_experiment.py --------------------------------------------------------------------------


def test_a_dry_experiment_writes_nothing_and_counts_what_the_run_does(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "a" / "out")
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert core_experiment.main(core_experiment.parse(words)) == 0
    shown = capsys.readouterr().out
    results, _ = experiment_results(tmp_path / "a" / "out")
    assert said.splitlines()[0] == shown.splitlines()[0]  # the model, the layers
    assert numbers(said, "sentences: ")[-1] == len(results["sentences"]) == 4
    prompts = [context["prompt"] for context in results["contexts"]]
    assert [line.strip().lstrip("…") for line in said.splitlines()[2:5]] == [prompt[-47:] for prompt in prompts[:3]]
    by_layer = results["perturbation_results"][0]
    records = [record for scale, record in by_layer["0"].items() if float(scale)]
    assert numbers(said, "each: ") == [sum(1 + len(record["controls"]) for record in records), len(by_layer)]
    assert "dry_run" not in results["experiment_config"]


def test_the_sizes_of_the_experiments_files_are_about_right(finished_experiment):
    document, arrays = experiment_results(finished_experiment)
    results = core_experiment.Results(document["experiment_config"], {}, {}, (0, 2), SimpleNamespace(decode=str), {})
    results.go_on_from(document, {name: array for name, array in arrays.items() if array.ndim > 1})
    found = of_experiment.file_sizes(results, 4)
    for name, expected in zip(("experiment_results.json", "fisher_eigenvectors.npz"), found, strict=True):
        assert (finished_experiment / name).stat().st_size == pytest.approx(
            expected, rel=0.1, abs=1500
        )  # the NPZ's headers
    assert of_experiment.file_sizes(results, 40)[1] == 10 * found[1]


def test_a_dry_experiment_says_what_an_earlier_run_has_left(finished_experiment, model_directory, tmp_path, capsys):
    output = shutil.copytree(finished_experiment, tmp_path / "out")
    before = tree(tmp_path)
    nats = ["--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1"]
    words = experiment_words(model_directory, output, *nats)
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and said.splitlines()[-1] == f"{output} is finished: nothing to do (--overwrite starts anew)"
    code, said, _ = say("core_experiment", [*words, "--overwrite"], capsys)
    assert code == 0 and f"An earlier run in {output} would be replaced." in said and "time: about " in said
    for others in (["--seed", "1"], ["--num-sentences", "5"]):
        *found, refusal = say("core_experiment", [*words, *others], capsys)
        assert found[0] == core_experiment.main(core_experiment.parse([*words, *others])) == 2
        assert refusal == capsys.readouterr().err and "holds a run with other settings" in refusal
    assert tree(tmp_path) == before


def test_a_dry_experiment_goes_on_after_the_sentences_of_a_stopped_run(model_directory, tmp_path, monkeypatch, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--require-predicted", "false")
    perturb, calls = core_experiment.perturb, []

    def stop_at_the_third(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perturb(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(core_experiment, "perturb", stop_at_the_third)
        assert core_experiment.main(core_experiment.parse(words)) == 130
    (tmp_path / "out" / ".experiment_results.json-00").touch()  # a run would remove it
    before = tree(tmp_path)
    _, said, _ = say("core_experiment", words, capsys)
    assert "Going on after the 2 sentences that are finished." in said and numbers(said, "sentences: ")[-1] == 2
    assert tree(tmp_path) == before


BAD_EXPERIMENTS = {
    "layer": ["--layers", "7"],
    "word": ["--target-word", "xyzzy"],
    "file": ["--data-file", "none.txt"],
}


@pytest.mark.parametrize("mistake", BAD_EXPERIMENTS)
def test_a_dry_experiment_fails_as_the_run_does(mistake, model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", *BAD_EXPERIMENTS[mistake])
    code, _, error = say("core_experiment", words, capsys)
    assert code == core_experiment.main(core_experiment.parse(words)) == 2
    assert error == capsys.readouterr().err and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fails_on_every_sentence_fails_dry_too(model_directory, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise core_experiment.fisher.NumericalError("NaN in the logits")

    monkeypatch.setattr(core_experiment, "perturb", fail)
    code, _, error = say("core_experiment", experiment_words(model_directory, tmp_path / "out"), capsys)
    assert code == 2 and "core_experiment.py: error: NaN in the logits of sentence" in error
    assert list(tmp_path.iterdir()) == []


def test_how_many_sentences_qualify_is_only_bounded(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--require-predicted")
    _, said, _ = say("core_experiment", words, capsys)
    assert "usable, at most 4 to run:" in said and "time: about at most " in said


def test_the_experiments_seconds_grow_with_its_sentences():
    contexts = [Context(f"s{n}", "p", list(range(n)), 0) for n in (5, 9, 10, 20)]
    chosen = of_experiment.representatives(contexts)
    assert [len(context.ids) for context in chosen] == [9, 20]
    assert of_experiment.representatives(contexts[:1]) == contexts[:1]
    trial = of_experiment.Trial(chosen, first=4.0, seconds=[1.0, 2.1], linearizing=0.25, results=None)
    start = 4.0 - 3.1
    assert of_experiment.total_seconds(trial, contexts) == pytest.approx(start + 1 + 1 + 1.1 + 2.1)
    assert of_experiment.total_seconds(trial, contexts * 10) == pytest.approx(start + 52)
    assert of_experiment.total_seconds(trial, contexts, others=8) == pytest.approx(start + 5.2 + 2)


# --- compute_fisher.py ---------------------------------------------------------------------------


def test_a_dry_pipeline_writes_nothing_and_counts_what_the_run_does(chat_directory, dataset, tmp_path, capsys):
    words = pipeline_words(chat_directory, dataset, tmp_path / "a" / "out", max_length=16)
    code, said, _ = say("compute_fisher", words, capsys)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "a" / "out", max_length=16) == 0
    found = records(tmp_path / "a" / "out")
    lengths, cut = [r["tokens"] for r in found], sum(r["truncated"] for r in found)
    assert said.splitlines()[0] == capsys.readouterr().out.splitlines()[0]  # the model, the hook
    statistics = yaml.safe_load((tmp_path / "a" / "out" / "metadata.yaml").read_text())["statistics"]
    prompts, *_, skipped = numbers(said, "prompts: ")
    assert (prompts, skipped) == (len(found), statistics["skipped_rows"]) == (40, 2)
    assert numbers(said, "tokens: ")[:2] == [min(lengths), max(lengths)]
    assert numbers(said, "tokens: ")[-3:] == [len(found), cut, 16] and 0 < cut < 40
    assert "dry_run" not in (tmp_path / "a" / "out" / "metadata.yaml").read_text()


@pytest.mark.parametrize("number", ["all", "1000"])
def test_all_prompts_or_too_many_are_counted(number, chat_directory, dataset, tmp_path, capsys):
    words = pipeline_words(chat_directory, dataset, tmp_path / "out", num_prompts=number)
    _, said, _ = say("compute_fisher", words, capsys)
    assert numbers(said, "prompts: ")[0] == 40
    assert ("note: 1000 prompts were asked for, only 40 are available" in said) is (number == "1000")


def test_of_a_stream_only_a_sample_is_read():
    for asked, taken in (("all", None), ("5000", 5000)):
        stream = (Prompt(i, i, "text") for i in range(10**9))
        settings = parse(["--num-prompts", asked])
        found = of_pipeline.survey(settings, stream, 128, None, to_its_end=False)
        assert (len(found.sample), found.taken, found.todo) == (of_pipeline.SAMPLE, taken, taken)
        assert next(stream).index == of_pipeline.SAMPLE
    short = of_pipeline.survey(settings, iter([Prompt(0, 0, "text")]), 128, None, to_its_end=False)
    assert (len(short.sample), short.taken) == (1, 1)


def test_a_dry_pipeline_says_what_an_earlier_run_has_left(
    chat_directory, dataset, finished_pipeline, tmp_path, monkeypatch, capsys
):
    output = shutil.copytree(finished_pipeline, tmp_path / "out")
    words = pipeline_words(chat_directory, dataset, output)
    before = tree(tmp_path)
    code, said, _ = say("compute_fisher", words, capsys)
    assert (code, said) == (0, f"{output} is finished: nothing to do (--overwrite starts anew)\n")
    code, said, _ = say("compute_fisher", [*words, "--overwrite"], capsys)
    assert code == 0 and f"An earlier run in {output} would be replaced." in said and "going on" not in said
    *_, refusal = say("compute_fisher", [*words, "--top-k-tokens", "5"], capsys)
    assert "holds a run with other settings (top_k_tokens was 6 and is 5)" in refusal
    assert tree(tmp_path) == before

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compute_fisher.RunDirectory, "finish", stop)
        assert compute_fisher.main(compute_fisher.parse([*words, "--overwrite"])) == 130
    (output / "shards" / "shard_00001.npz").write_bytes(b"damaged")  # of 8 prompts: a run would remove it
    (output / "shards" / ".index.json-00").touch()
    before = tree(tmp_path)
    _, said, _ = say("compute_fisher", words, capsys)
    assert "going on: 32 are finished, 8 are left" in said.splitlines()
    assert tree(tmp_path) == before

    changed = tmp_path / "changed.jsonl"
    changed.write_text(dataset.read_text().replace(" 3", " three"))
    words[words.index(str(dataset))] = str(changed)
    code, _, error = say("compute_fisher", words, capsys)
    assert code == 2 and "other settings" in error


BAD_PIPELINES = {
    "layer": ({"hook_layer_name": 9}, "its layers are"),
    "column": ({"prompt_column": "none"}, "no column 'none'"),
    "room": ({"max_length": 2}, "leaves no room"),
}


@pytest.mark.parametrize("mistake", BAD_PIPELINES)
def test_a_dry_pipeline_fails_as_the_run_does(mistake, chat_directory, dataset, tmp_path, capsys):
    options, what = BAD_PIPELINES[mistake]
    code, _, error = say("compute_fisher", pipeline_words(chat_directory, dataset, tmp_path / "out", **options), capsys)
    assert code == scripts.compute_fisher(chat_directory, dataset, tmp_path / "out", **options) == 2
    assert error == capsys.readouterr().err and error.count("\n") == 1 and what in error
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_first_alone_works_and_counts_them(chat_directory, dataset, tmp_path, capsys):
    command = parse([*pipeline_words(chat_directory, dataset, tmp_path / "out"), "--dry-run"])
    assert compute_fisher.dry_run(command, Processes(1, 2, 1)) == 0
    assert capsys.readouterr().out == ""
    assert compute_fisher.dry_run(command, Processes(0, 2, 0)) == 0
    assert "tokens/s, by 2 processes as fast as this one;" in capsys.readouterr().out


def test_the_pipelines_seconds_follow_the_sizes_of_its_batches():
    def batch(prompts: int, tokens: int) -> list[Encoded]:
        return [Encoded(Prompt(0, 0, ""), list(range(tokens)), False)] * prompts

    batches = [batch(1, 50), batch(4, 20), batch(8, 10), batch(8, 5), batch(2, 5)]
    chosen = of_pipeline.representatives(batches)
    assert [of_pipeline.padded(some) for some in chosen] == [10, 50, 80] and batches[0] in chosen
    trial = of_pipeline.Trial(chosen, [1.0, 5.0, 8.0], [])
    assert of_pipeline.seconds_each(trial, batches) == pytest.approx((5 + 8 + 8 + 4 + 1) / 23)
    assert of_pipeline.seconds_each(trial, batches * 3) == pytest.approx(26 / 23)


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["core_experiment", "compute_fisher"])
def test_what_a_run_would_not_be_let_into_is_said(script, tmp_path, capsys):
    with lock_directory(tmp_path / "out"):
        code, said, error = say(script, ["--output-dir", str(tmp_path / "out")], capsys)
        assert (code, said) == (2, "") and "is in use by process " in error
    (tmp_path / "file").touch()
    code, said, error = say(script, ["--output-dir", str(tmp_path / "file")], capsys)
    assert (code, said) == (2, "") and "cannot write to" in error
    with pytest.raises(SystemExit) as end:
        say(script, ["--redraw", str(tmp_path)], capsys)
    assert end.value.code == 2 and "argument --dry-run: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_amounts_are_said_in_their_largest_unit():
    assert [duration(s) for s in (0.0123, 1.26, 59, 90, 5400, 260_000)] == [
        "0.012 s", "1.3 s", "59 s", "1.5 min", "1.5 h", "3 days",
    ]  # fmt: skip
    assert [size(b) for b in (0, 999, 1234, 56_000_000, 2.5e12)] == [
        "0 bytes",
        "999 bytes",
        "1.2 kB",
        "56 MB",
        "2.5 TB",
    ]
