"""--dry-run of both scripts: it writes nothing, counts what the run then does, and fails as the run fails."""

from collections.abc import Iterator
from pathlib import Path
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml

import compute_fisher
from conftest import FINISHED_EXPERIMENT
import core_experiment
import fisher
from residual_fisher.common.lock import lock_directory
from residual_fisher.common.run import Item, Run
from residual_fisher.common.text import duration, size
from residual_fisher.experiment.records import file_sizes, split_results
from residual_fisher.experiment.sentences import Context
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Encoded, Prompt
from residual_fisher.pipeline.settings import parse
import scripts
from scripts import calls_of, experiment_results, experiment_words, pipeline_words, records
import tiny

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
    document, _ = experiment_results(finished_experiment)
    items = list(split_results(finished_experiment, {text: i for i, text in enumerate(document["sentences"])}))
    found = file_sizes(items, 4)
    for name, expected in zip(("experiment_results.json", "fisher_eigenvectors.npz"), found, strict=True):
        # 1,500 bytes: the NPZ's headers
        assert (finished_experiment / name).stat().st_size == pytest.approx(expected, rel=0.1, abs=1500)
    assert file_sizes(items, 40)[1] == 10 * found[1]


def test_a_dry_experiment_says_what_an_earlier_run_has_left(finished_experiment, model_directory, tmp_path, capsys):
    output = shutil.copytree(finished_experiment, tmp_path / "out")
    before = tree(tmp_path)
    words = experiment_words(model_directory, output, *FINISHED_EXPERIMENT)
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and said.splitlines()[-1] == f"{output} is finished: nothing to do (--overwrite starts anew)"
    code, said, _ = say("core_experiment", [*words, "--overwrite"], capsys)
    assert code == 0 and f"An earlier run in {output} would be replaced." in said and "time: about " in said
    *found, refusal = say("core_experiment", [*words, "--seed", "1"], capsys)
    assert found[0] == core_experiment.main(core_experiment.parse([*words, "--seed", "1"])) == 2
    assert refusal == capsys.readouterr().err and "holds a run with other settings" in refusal
    words += ["--num-sentences", "6"]
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and "Resuming after the 4 sentences that are finished." in said
    assert tree(tmp_path) == before
    with calls_of(core_experiment, "perturb") as calls:
        assert core_experiment.main(core_experiment.parse(words)) == 0
    assert len(calls) == numbers(said, "sentences: ")[-1] == 2


def test_a_dry_experiment_resumes_after_the_sentences_of_a_stopped_run(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--require-predicted", "false")
    with calls_of(core_experiment, "perturb", KeyboardInterrupt, at=[3]):
        assert core_experiment.main(core_experiment.parse(words)) == 130
    (tmp_path / "out" / ".experiment_results.json-00").touch()  # a run would remove it
    before = tree(tmp_path)
    _, said, _ = say("core_experiment", words, capsys)
    assert "Resuming after the 2 sentences that are finished." in said and numbers(said, "sentences: ")[-1] == 2
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


def test_a_model_that_fails_on_every_sentence_fails_dry_too(model_directory, tmp_path, capsys):
    with calls_of(core_experiment, "perturb", fisher.NumericalError("NaN in the logits")):
        code, _, error = say("core_experiment", experiment_words(model_directory, tmp_path / "out"), capsys)
    assert code == 2 and "core_experiment.py: error: NaN in the logits of sentence" in error
    assert list(tmp_path.iterdir()) == []


def test_how_many_sentences_qualify_is_only_bounded(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--require-predicted")
    _, said, _ = say("core_experiment", words, capsys)
    assert "usable, at most 4 to run:" in said and "time: about at most " in said


def test_the_experiments_seconds_grow_with_its_sentences(monkeypatch):
    """Those of median and of greatest length are tried; the first round, which takes longer, is the start's."""
    lengths, tried = [10, 20, 5, 9], []
    contexts = [Context(f"s{n}", "p", list(range(n)), 0) for n in lengths]
    settings = core_experiment.parse(["--layers", "0"])
    about_run = core_experiment.Experiment(settings, tiny.shared("llama"), None, contexts, None, {}, {}, 3.0)

    def measure(experiment, numbers: list[int], *_) -> Iterator[Item]:
        tried.append([lengths[number] for number in numbers])
        for number in numbers:
            seconds = {"prefix": 0.25, "sweep": {9: 0.75, 10: 0.75, 20: 1.85}[lengths[number]]}
            yield Item(number, {"fisher": {"0": {}}, "perturbations": {"0": {}}, "seconds": seconds}, {})

    def about(todo: list[int], others: int = 0) -> str:
        clock = SimpleNamespace(perf_counter=iter([0.0, 4.0, 10.0, 13.1]).__next__)
        monkeypatch.setattr(core_experiment, "time", clock)
        return core_experiment.describe_costs(about_run, todo, others, len(todo), "").splitlines()[1]

    monkeypatch.setattr(core_experiment, "measure", measure)
    start = 4.0 - 3.1
    expected = "1 s to 2.1 s a sentence; and 3 s to load the model"
    assert about([0, 1, 2, 3]) == f"time: about {duration(start + 1 + 1 + 1.1 + 2.1)}, {expected}"
    assert tried == [[9, 20]] * 2
    assert about([0, 1, 2, 3] * 10) == f"time: about {duration(start + 52)}, {expected}"
    assert about([0, 1, 2, 3], others=8) == f"time: about {duration(start + 5.2 + 2)}, {expected}"
    assert "1 s a sentence; " in about([0]) and tried[-1] == [10]


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


def test_of_a_stream_only_a_sample_is_read(tmp_path):
    run = Run(tmp_path / "none", "compute_fisher.py", [])
    for asked, taken in (("all", None), ("5000", 5000)):
        stream = (Prompt(i, i, "text") for i in range(10**9))
        pipeline = SimpleNamespace(settings=parse(["--num-prompts", asked]))
        found = compute_fisher.survey(pipeline, stream, run, to_its_end=False)
        assert (len(found.sample), found.taken, found.done) == (compute_fisher.SAMPLE, taken, 0)
        assert next(stream).index == compute_fisher.SAMPLE
    short = compute_fisher.survey(pipeline, iter([Prompt(0, 0, "text")]), run, to_its_end=False)
    assert (len(short.sample), short.taken) == (1, 1)


def test_a_dry_pipeline_says_what_an_earlier_run_has_left(chat_directory, dataset, finished_pipeline, tmp_path, capsys):
    output = shutil.copytree(finished_pipeline, tmp_path / "out")
    words = pipeline_words(chat_directory, dataset, output)
    before = tree(tmp_path)
    code, said, _ = say("compute_fisher", words, capsys)
    assert (code, said) == (0, f"{output} is finished: nothing to do (--overwrite starts anew)\n")
    code, said, _ = say("compute_fisher", [*words, "--overwrite"], capsys)
    assert code == 0 and f"An earlier run in {output} would be replaced." in said and "resuming" not in said
    *_, refusal = say("compute_fisher", [*words, "--top-k-tokens", "5"], capsys)
    assert "holds a run with other settings (top_k_tokens was 6 and is 5)" in refusal
    assert tree(tmp_path) == before

    with calls_of(compute_fisher, "finish", KeyboardInterrupt):
        assert compute_fisher.main(compute_fisher.parse([*words, "--overwrite"])) == 130
    (output / "items" / "00000032-00000039.npz").write_bytes(b"damaged")  # a run would remove it
    (output / "items" / ".run.json-00").touch()
    before = tree(tmp_path)
    _, said, _ = say("compute_fisher", words, capsys)
    assert "resuming: 32 are finished, 8 are left" in said.splitlines()
    assert tree(tmp_path) == before

    changed = tmp_path / "changed.jsonl"
    changed.write_text(dataset.read_text().replace(" 3", " three"))
    words[words.index(str(dataset))] = str(changed)
    code, _, error = say("compute_fisher", words, capsys)
    assert code == 2 and "other settings" in error


def test_a_dry_pipeline_counts_what_extends_a_finished_run(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=6) == 0
    before, words = tree(tmp_path), pipeline_words(chat_directory, dataset, output, num_prompts=10)
    code, said, _ = say("compute_fisher", words, capsys)
    assert code == 0 and "resuming: 6 are finished, 4 are left" in said.splitlines()
    assert tree(tmp_path) == before
    with calls_of(compute_fisher, "measure") as calls:
        assert compute_fisher.main(compute_fisher.parse(words)) == 0
    assert sum(len(batch) for *_, batch in calls) == 4 and len(records(output)) == 10


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


def test_the_pipelines_seconds_follow_the_sizes_of_its_batches(monkeypatch):
    """Batches of the least, the median and the most tokens are tried, and the one with the longest prompt."""

    def batch(prompts: int, tokens: int) -> list[Encoded]:
        return [Encoded(Prompt(0, 0, ""), list(range(tokens)), False)] * prompts

    batches, tried = [batch(1, 50), batch(4, 20), batch(8, 10), batch(8, 5), batch(2, 5)], []

    def measure(settings, subject, some: list[Encoded]) -> list[Item]:
        tried.append(compute_fisher.padded(some))
        seconds = {10: 1.0, 50: 5.0, 80: 8.0}[tried[-1]] / len(some)
        return [Item(0, {"seconds": seconds}, {})] * len(some)

    monkeypatch.setattr(compute_fisher, "into_batches", lambda *_: batches)
    monkeypatch.setattr(compute_fisher, "check_once", lambda *_: False)
    monkeypatch.setattr(compute_fisher, "measure", measure)
    subject = SimpleNamespace(model=tiny.shared("llama"))
    pipeline = compute_fisher.Pipeline(parse([]), subject, 100, {}, {})
    found = compute_fisher.Survey([], taken=230, done=0)
    said = compute_fisher.describe_costs(pipeline, found, [some for batch in batches for some in batch], 3.0, 1)
    assert tried == [10, 50, 80]
    each, tokens = (5 + 8 + 8 + 4 + 1) / 23, 50 + 80 + 80 + 40 + 10
    expected = f"{duration(230 * each)}, {duration(each)} a prompt, {tokens / 26:.0f} tokens/s"
    assert said.splitlines()[0] == f"time: about {expected}; and 3 s to load and check the model"


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
