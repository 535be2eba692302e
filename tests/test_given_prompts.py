"""The experiment on prompts from the command line (--prompt): in their order, at their last tokens."""

import numpy as np
import pytest
import torch

from conftest import make_model_directory
import core_experiment
from residual_fisher.common.program import SOME_FAILED
from residual_fisher.model import loading
import scripts
from scripts import calls_of, contents, experiment_results

pytestmark = pytest.mark.usefixtures("without_pictures")

PROMPTS = ["We like wild", "The zoo has many", "In the sea live"]
WORDS = ["--scales", "-1", "0", "1", "--scale-unit", "nats", "--num-controls", "1", "--max-vocab-subset", "20"]


def run(model, output, prompts: list[str], *more: str) -> int:
    words = ["--model-name", str(model), "--output-dir", str(output), "--device", "cpu", *WORDS, *more]
    return scripts.run("core_experiment", [*words, *(word for text in prompts for word in ("--prompt", text))])


def test_a_prompt_is_measured_as_the_sentence_that_it_begins(model_directory, tmp_path):
    """All numbers but the target's are those of sentences that go on with the target word."""
    data = tmp_path / "data.txt"
    data.write_text("".join(f"{text} animals.\n" for text in PROMPTS))
    words = ["--data-file", str(data), "--num-sentences", "3"]
    assert scripts.core_experiment(model_directory, tmp_path / "data", *words, *WORDS) == 0
    (expected, arrays) = experiment_results(tmp_path / "data")
    order = [context["prompt"] for context in expected["contexts"]]
    assert sorted(order) == sorted(PROMPTS) and [context["line"] for context in expected["contexts"]] == [
        1 + PROMPTS.index(text) for text in order
    ]
    assert run(model_directory, tmp_path / "prompts", order) == 0
    found, found_arrays = experiment_results(tmp_path / "prompts")
    assert found["sentences"] == order
    for name in arrays.keys() - {"run"}:
        assert np.array_equal(found_arrays[name], arrays[name]), name

    def without_target(value):
        if isinstance(value, dict):
            return {k: without_target(v) for k, v in value.items() if not k.startswith("target") and k != "line"}
        return [without_target(v) for v in value] if isinstance(value, list) else value

    for key in ("contexts", "fisher", "perturbation_results", "similarity_matrix", "summary"):
        assert without_target(found[key]) == without_target(expected[key])


def test_prompts_keep_their_order_and_their_target_is_what_the_model_predicts(model_directory, tmp_path, capsys):
    assert run(model_directory, tmp_path / "out", PROMPTS) == 0
    assert "are available" not in capsys.readouterr().out
    results, _ = experiment_results(tmp_path / "out")
    model, tokenizer = loading.load(str(model_directory), device="cpu")
    assert results["sentences"] == [context["prompt"] for context in results["contexts"]] == PROMPTS
    for context, perturbed in zip(results["contexts"], results["perturbation_results"], strict=True):
        ids = tokenizer(context["prompt"])["input_ids"]
        probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        best = int(probabilities.argmax())
        assert context["position"] == len(ids) - 1 and "line" not in context
        assert (context["target_token"], context["target_rank"]) == (tokenizer.decode([best]), 1)
        assert context["target_probability"] == pytest.approx(float(probabilities[best]), rel=1e-4)
        assert perturbed["0"]["0"]["target_prob"] == pytest.approx(float(probabilities[best]), rel=1e-4)
    assert results["experiment_config"]["prompt"] == PROMPTS


def test_a_token_that_the_tokenizer_puts_behind_a_text_is_no_part_of_the_prompt(sentencepiece, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(sentencepiece.backend_tokenizer).from_str(sentencepiece.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    assert tokenizer(PROMPTS[0])["input_ids"][-1] == 1
    directory = make_model_directory(tmp_path / "model", tokenizer)
    assert run(directory, tmp_path / "out", PROMPTS[:1]) == 0
    (context,) = experiment_results(tmp_path / "out")[0]["contexts"]
    assert context["position"] == len(sentencepiece(PROMPTS[0])["input_ids"]) - 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("a " * 70, "the model has positions for 64 tokens, and --prompt 'a a a a"), ("", "it is empty")],
)
def test_a_prompt_that_cannot_be_read_is_one_line(prompt, said, model_directory, tmp_path, capsys):
    words = ["--model-name", str(model_directory), "--output-dir", str(tmp_path / "out"), "--prompt", prompt]
    assert scripts.as_program("core_experiment", words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_prompt_that_fails_is_left_out_and_no_other_is_missed(model_directory, tmp_path, capsys):
    error = core_experiment.fisher.NumericalError("NaN in the logits")
    for number, name in ((1, "first"), (2, "second")):
        with calls_of(core_experiment, "measure_sentence", error, at=[number]):
            assert run(model_directory, tmp_path / name, PROMPTS) == SOME_FAILED
        out, _ = capsys.readouterr()
        assert "1 sentences failed" in out and "are available" not in out
        left = [prompt for place, prompt in enumerate(PROMPTS, 1) if place != number]
        assert experiment_results(tmp_path / name)[0]["sentences"] == left
        assert run(model_directory, tmp_path / name, PROMPTS[:number]) == SOME_FAILED  # it has them, as far as they go
        assert "Medians over " in capsys.readouterr().out


def test_more_prompts_extend_a_run_and_others_are_refused(model_directory, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(model_directory, output, PROMPTS[:2]) == 0
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert run(model_directory, output, PROMPTS) == 0
    assert len(calls) == 1
    assert run(model_directory, tmp_path / "at once", PROMPTS) == 0
    for name in ("experiment_results.json", "fisher_eigenvectors.npz"):
        found, expected = ((folder / name).read_bytes() for folder in (output, tmp_path / "at once"))
        assert name.endswith("json") or found == expected
    (found, _), (expected, _) = experiment_results(output), experiment_results(tmp_path / "at once")
    assert found["checksum"] == expected["checksum"]
    assert run(model_directory, tmp_path / "one", PROMPTS[:1]) == 0  # which had no other to be compared with
    assert run(model_directory, tmp_path / "one", PROMPTS) == 0
    assert experiment_results(tmp_path / "one")[0]["checksum"] == expected["checksum"]
    assert run(model_directory, tmp_path / "two", PROMPTS[:1]) == 0
    assert run(model_directory, tmp_path / "two", PROMPTS[1:]) == 2
    before = contents(output)
    for prompts, code, said in (
        (PROMPTS, 0, "is finished"),
        (PROMPTS[:2], 0, "Medians over 2 sentences"),
        (PROMPTS[:1], 0, "Medians over 1 sentence;"),
        ([PROMPTS[1], PROMPTS[0]], 2, "a run of other texts (number 1 was 'We like wild', and is 'The zoo has many')"),
        ([*PROMPTS[:2], "Another"], 2, "number 3 was 'In the sea live', and is 'Another'"),
    ):
        capsys.readouterr()
        assert run(model_directory, output, prompts) == code
        assert said in "".join(capsys.readouterr()) and contents(output) == before
    assert scripts.core_experiment(model_directory, output, *WORDS) == 2
    assert "holds a run with other settings (prompt was 'given' and is None)" in capsys.readouterr().err
    assert contents(output) == before


def test_a_stopped_run_is_resumed_and_not_with_fewer_prompts(model_directory, tmp_path, capsys):
    with calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[3]):
        assert run(model_directory, tmp_path / "out", PROMPTS) == 130
    before = contents(tmp_path / "out")
    assert run(model_directory, tmp_path / "out", PROMPTS[:2]) == 2
    said = capsys.readouterr().err
    assert "holds an unfinished run of more texts (the next was 'In the sea live')" in said
    assert contents(tmp_path / "out") == before
    with calls_of(core_experiment, "measure_sentence") as calls:
        assert run(model_directory, tmp_path / "out", PROMPTS) == 0
    assert len(calls) == 1 and experiment_results(tmp_path / "out")[0]["sentences"] == PROMPTS


def test_a_dry_run_counts_the_prompts(model_directory, tmp_path, capsys):
    assert run(model_directory, tmp_path / "out", PROMPTS, "--dry-run") == 0
    assert "sentences: 3 given, 3 to run:\n  We like wild\n  The zoo has many\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
