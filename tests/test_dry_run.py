"""--dry-run of both scripts: it writes nothing, counts what the run then does, and fails as the run fails."""

from collections.abc import Iterator
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml

import compute_fisher
from conftest import FINISHED_EXPERIMENT
import core_experiment
import fisher
from residual_fisher.common.archives import Item
from residual_fisher.common.lock import lock_directory
from residual_fisher.common.run import Run
from residual_fisher.common.text import duration, size
from residual_fisher.experiment import estimate as of_experiment
from residual_fisher.experiment.records import file_sizes, split_results
from residual_fisher.pipeline import estimate as of_pipeline
from residual_fisher.pipeline import matrices
from residual_fisher.pipeline.processes import Processes
from residual_fisher.pipeline.prompts import Encoded, Prompt, Prompts
from residual_fisher.pipeline.settings import parse
import scripts
from scripts import calls_of, contents, experiment_results, experiment_words, pipeline_words, records, run
import tiny

pytestmark = pytest.mark.usefixtures("without_pictures")


def say(script: str, words: list[str], capsys) -> tuple[int, str, str]:
    """The exit code of a dry run, and what it prints."""
    capsys.readouterr()
    return run(script, [*words, "--dry-run"]), *capsys.readouterr()


def numbers(said: str, line: str) -> list[int]:
    """The whole numbers of the line that begins so."""
    (found,) = [row for row in said.splitlines() if row.startswith(line)]
    return [int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w.])", found)]


# --- core_experiment.py --------------------------------------------------------------------------


def test_a_dry_experiment_writes_nothing_and_counts_what_the_run_does(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "a" / "out")
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert run("core_experiment", words) == 0
    shown = capsys.readouterr().out
    results, _ = experiment_results(tmp_path / "a" / "out")
    assert said.splitlines()[0] == shown.splitlines()[0]  # the model, the layers
    assert numbers(said, "sentences: ")[-1] == len(results["sentences"]) == 4
    prompts = [context["prompt"] for context in results["contexts"]]
    assert [line.strip().lstrip("…") for line in said.splitlines()[2:5]] == [prompt[-47:] for prompt in prompts[:3]]
    swept = [results[f"perturbation_results{unit}"][0] for unit in ("", "_nats")]
    records = [record for by_layer in swept for scale, record in by_layer["0"].items() if float(scale)]
    assert numbers(said, "each: ") == [sum(1 + len(record["controls"]) for record in records), len(swept[0])]
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
    before = contents(tmp_path)
    words = experiment_words(model_directory, output, *FINISHED_EXPERIMENT)
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and said.splitlines()[-1] == f"{output} is finished: nothing to do (--overwrite starts anew)"
    code, said, _ = say("core_experiment", [*words, "--overwrite"], capsys)
    assert code == 0 and f"An earlier run in {output} would be replaced." in said and "time: about " in said
    *found, refusal = say("core_experiment", [*words, "--seed", "1"], capsys)
    assert found[0] == run("core_experiment", [*words, "--seed", "1"]) == 2
    assert refusal == capsys.readouterr().err and "holds a run with other settings" in refusal
    words += ["--num-sentences", "6"]
    code, said, _ = say("core_experiment", words, capsys)
    assert code == 0 and "Resuming after the 4 sentences that are finished." in said
    assert contents(tmp_path) == before
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert run("core_experiment", words) == 0
    assert len(calls) == numbers(said, "sentences: ")[-1] == 2


def test_a_dry_experiment_resumes_after_the_sentences_of_a_stopped_run(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--require-predicted", "false")
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[3]):
        assert run("core_experiment", words) == 130
    (tmp_path / "out" / ".experiment_results.json-00").touch()  # a run would remove it
    before = contents(tmp_path)
    _, said, _ = say("core_experiment", words, capsys)
    assert "Resuming after the 2 sentences that are finished." in said and numbers(said, "sentences: ")[-1] == 2
    assert contents(tmp_path) == before


def test_a_model_that_fails_on_every_sentence_fails_dry_too(model_directory, tmp_path, capsys):
    with calls_of(core_experiment, "measure_sentence", fisher.NumericalError("NaN in the logits")):
        code, _, error = say("core_experiment", experiment_words(model_directory, tmp_path / "out"), capsys)
    assert code == 2 and "core_experiment.py: error: NaN in the logits of sentence" in error
    assert list(tmp_path.iterdir()) == []


def test_how_many_sentences_qualify_is_only_bounded(model_directory, tmp_path, capsys):
    words = experiment_words(model_directory, tmp_path / "out", "--require-predicted")
    _, said, _ = say("core_experiment", words, capsys)
    assert "usable, at most 4 to run:" in said and "time: about at most " in said


def test_the_experiments_seconds_grow_with_its_sentences():
    """Those of median and of greatest length are tried; the first round, which takes longer, is the start's."""
    lengths, spent = {0: 10, 1: 20, 2: 5, 3: 9}, {3: 1.0, 1: 2.1}
    assert of_experiment.representatives(lengths) == [3, 1] and of_experiment.representatives({0: 10}) == [0]

    def record(seconds: float) -> dict:
        return {"fisher": {"0": {}}, "perturbations": {"0": {}}, "seconds": {"prefix": 0.25, "sweep": seconds - 0.25}}

    items = [Item(number, record(seconds), {}) for number, seconds in spent.items()]
    rounds = [(4.0, items), (3.1, items)]

    def about(lengths: dict[int, int], others: int = 0) -> str:
        return of_experiment.describe_costs(rounds, lengths, others, 4, "some", 3.0, "").splitlines()[1]

    start, a_sentence = 4.0 - 3.1, "1 s to 2.1 s a sentence; and 3 s to load the model"
    assert about(lengths) == f"time: about {duration(start + 1 + 1 + 1.1 + 2.1)}, {a_sentence}"
    many = {4 * turn + number: length for turn in range(10) for number, length in lengths.items()}
    assert about(many) == f"time: about {duration(start + 52)}, {a_sentence}"
    assert about(lengths, others=8) == f"time: about {duration(start + 5.2 + 2)}, {a_sentence}"


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


def test_of_a_stream_only_a_sample_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(of_pipeline, "encode", lambda tokenizer, prompt, longest: Encoded(prompt, [1], False))
    monkeypatch.setattr(of_pipeline, "describe_costs", lambda *_: "")
    run = Run(tmp_path / "none", "compute_fisher.py", [])
    prompts, subject = Prompts("hub/name", column="text"), SimpleNamespace(tokenizer=None)

    def said(asked: str, stream: Iterator[Prompt]) -> str:
        pipeline = SimpleNamespace(settings=parse(["--num-prompts", asked, "--dataset-name", "hub/name"]))
        pipeline.subject, pipeline.longest = subject, 9
        assert of_pipeline.describe_run(pipeline, prompts, stream, run, 0.0, 1) == 0
        return capsys.readouterr().out

    for asked, taken in (("all", "prompts: all of hub/name, column 'text': how many"), ("5000", "prompts: 5000 of")):
        stream = (Prompt(i, i, "text") for i in range(10**9))
        found = said(asked, stream)
        assert found.startswith(taken) and f"in the first {of_pipeline.SAMPLE} prompts" in found
        assert next(stream).index == of_pipeline.SAMPLE
    assert "in the first 1 prompts" in said("5000", iter([Prompt(0, 0, "text")]))


def test_a_dry_pipeline_says_what_an_earlier_run_has_left(chat_directory, dataset, finished_pipeline, tmp_path, capsys):
    output = shutil.copytree(finished_pipeline, tmp_path / "out")
    words = pipeline_words(chat_directory, dataset, output)
    before = contents(tmp_path)
    code, said, _ = say("compute_fisher", words, capsys)
    assert (code, said) == (0, f"{output} is finished: nothing to do (--overwrite starts anew)\n")
    code, said, _ = say("compute_fisher", [*words, "--overwrite"], capsys)
    assert code == 0 and f"An earlier run in {output} would be replaced." in said and "resuming" not in said
    *_, refusal = say("compute_fisher", [*words, "--top-k-tokens", "5"], capsys)
    assert "holds a run with other settings (top_k_tokens was 6 and is 5)" in refusal
    assert contents(tmp_path) == before

    with calls_of(matrices, "merge", KeyboardInterrupt):
        assert run("compute_fisher", [*words, "--overwrite"]) == 130
    (output / "items" / "00000032-00000039.npz").write_bytes(b"damaged")  # a run would remove it
    (output / "items" / ".run.json-00").touch()
    before = contents(tmp_path)
    _, said, _ = say("compute_fisher", words, capsys)
    assert "resuming: 32 are finished, 8 are left" in said.splitlines()
    assert contents(tmp_path) == before

    changed = tmp_path / "changed.jsonl"
    changed.write_text(dataset.read_text().replace(" 3", " three"))
    words[words.index(str(dataset))] = str(changed)
    code, _, error = say("compute_fisher", words, capsys)
    assert code == 2 and "other settings" in error


def test_a_dry_pipeline_counts_what_extends_a_finished_run(chat_directory, dataset, tmp_path, capsys):
    output = tmp_path / "out"
    assert scripts.compute_fisher(chat_directory, dataset, output, num_prompts=6) == 0
    before, words = contents(tmp_path), pipeline_words(chat_directory, dataset, output, num_prompts=10)
    code, said, _ = say("compute_fisher", words, capsys)
    assert code == 0 and "resuming: 6 are finished, 4 are left" in said.splitlines()
    assert contents(tmp_path) == before
    with calls_of(compute_fisher, "measure") as calls:
        assert run("compute_fisher", words) == 0
    assert sum(len(batch) for *_, batch in calls) == 4 and len(records(output)) == 10


def test_of_several_processes_the_first_alone_works_and_counts_them(chat_directory, dataset, tmp_path, capsys):
    command = parse([*pipeline_words(chat_directory, dataset, tmp_path / "out"), "--dry-run"])
    assert compute_fisher.run_pipeline(command, Processes(1, 2, 1)) == 0
    assert capsys.readouterr().out == ""
    assert compute_fisher.run_pipeline(command, Processes(0, 2, 0)) == 0
    assert "tokens/s, by 2 processes as fast as this one;" in capsys.readouterr().out


def test_the_pipelines_seconds_follow_the_sizes_of_its_batches(monkeypatch):
    """Batches of the least, the median and the most tokens are tried, and the one with the longest prompt."""

    def batch(prompts: int, tokens: int) -> list[Encoded]:
        return [Encoded(Prompt(0, 0, ""), list(range(tokens)), False)] * prompts

    batches, tried = [batch(1, 50), batch(4, 20), batch(8, 10), batch(8, 5), batch(2, 5)], []

    def measure(settings, subject, some: list[Encoded]) -> list[Item]:
        tried.append(of_pipeline.padded(some))
        seconds = {10: 1.0, 50: 5.0, 80: 8.0}[tried[-1]] / len(some)
        return [Item(0, {"seconds": seconds}, {})] * len(some)

    for name, function in {
        "into_batches": lambda *_: batches,
        "check_once": lambda *_: False,
        "measure": measure,
        "write_tokens": lambda subject, items: items,
    }.items():
        monkeypatch.setattr(of_pipeline, name, function)
    pipeline = SimpleNamespace(settings=parse([]), subject=SimpleNamespace(model=tiny.shared("llama")))
    encoded = [some for batch in batches for some in batch]
    said = of_pipeline.describe_costs(pipeline, encoded, 230, 0, load_seconds=3.0, processes=1)
    assert tried == [10, 50, 80]
    each, tokens = (5 + 8 + 8 + 4 + 1) / 23, 50 + 80 + 80 + 40 + 10
    expected = f"{duration(230 * each)}, {duration(each)} a prompt, {tokens / 26:.0f} tokens/s"
    assert said.splitlines()[0] == f"time: about {expected}; and 3 s to load and check the model"


def test_explaining_takes_its_prompts_and_the_answers_of_others(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    """A second for each prompt that is explained, whatever its length, and half of one for each answer in a batch."""
    clock = [0.0]

    def answers(chat, prompts: list[Prompt]) -> list[list[int]]:
        clock[0] += len(prompts) / 2
        return [[1, 2, 3]] * len(prompts)

    def explain_prompt(*_) -> None:
        clock[0] += 1.0

    monkeypatch.setattr(of_pipeline.findings.Chat, "answers", answers)
    monkeypatch.setattr(of_pipeline.findings, "explain_prompt", explain_prompt)
    monkeypatch.setattr(of_pipeline, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    _, said, _ = say("compute_fisher", [*pipeline_words(chat_directory, dataset, tmp_path), "--explain", "6"], capsys)
    least = 0.5 * (6 + 60)
    most = least + 6 * (1.0 + 0.5 * 0.5 * 20)
    assert f"explaining: {duration(least)} to {duration(most)}, of the 6 prompts that stand out most" in said


# --- both ----------------------------------------------------------------------------------------

MISTAKES = {
    ("core_experiment", "--layers 7"): "the model has layers 0 to 2",
    ("core_experiment", "--target-word xyzzy"): "has 'xyzzy' as a whole word",
    ("core_experiment", "--data-file none.txt"): "no such file",
    ("compute_fisher", "--hook-layer-name 9"): "its layers are",
    ("compute_fisher", "--prompt-column none"): "no column 'none'",
    ("compute_fisher", "--max-length 2"): "leaves no room",
}


@pytest.mark.parametrize(("script", "mistake"), MISTAKES)
def test_a_dry_run_fails_as_the_run_does(script, mistake, chat_directory, dataset, tmp_path, capsys):
    right = {
        "core_experiment": experiment_words(chat_directory, tmp_path / "out"),
        "compute_fisher": pipeline_words(chat_directory, dataset, tmp_path / "out"),
    }
    words = [*right[script], *mistake.split()]
    code, _, error = say(script, words, capsys)
    assert code == run(script, words) == 2
    assert error == capsys.readouterr().err and error.count("\n") == 1 and MISTAKES[script, mistake] in error
    assert list(tmp_path.iterdir()) == []


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
    durations = {0.0123: "0.012 s", 1.26: "1.3 s", 59: "59 s", 90: "1.5 min", 5400: "1.5 h", 260_000: "3 days"}
    assert all(duration(seconds) == said for seconds, said in durations.items())
    sizes = {0: "0 bytes", 999: "999 bytes", 1234: "1.2 kB", 56_000_000: "56 MB", 2.5e12: "2.5 TB"}
    assert all(size(number) == said for number, said in sizes.items())
