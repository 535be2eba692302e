"""How the model continues, against one full pass of everything for every token."""

import json

import pytest
import torch
from torch import Tensor, nn

import core_experiment
import families
import fisher
from residual_fisher.experiment import figures
from residual_fisher.experiment.continuation import choose_scales, continuations, end_tokens
from residual_fisher.experiment.report import continuation_block
from residual_fisher.model.reading import PrefixMode
import scripts
from scripts import experiment_results
import tiny

TOKENS = 6
WORDS = ["--num-sentences", "3", "--layers", "0", "2", "--scale-unit", "nats", "--scales", "-1", "0", "0.5", "1", "3"]
CONTINUE = ["--continue", str(TOKENS), "--continue-nats", "2.000000001"]  # more digits than JSON keeps


@torch.no_grad()
def the_long_way(model: nn.Module, ids: Tensor, layer: nn.Module, delta: Tensor, tokens: int) -> list[int]:
    """Greedy tokens, each by a full pass without a cache, with delta added at the prompt's last token."""
    last = len(ids) - 1

    def add(module, args, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[:, last] += delta
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = layer.register_forward_hook(add)
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    handle.remove()
    said, end = ids[last + 1 :].tolist(), model.config.eos_token_id
    return said[: said.index(end)] if end in said else said


def perturbed_point(model: nn.Module, tokens: int = 9) -> tuple[fisher.Point, Tensor]:
    """All layers of a model, and perturbations (layers, 2 directions, 2 scales, d) that change what follows."""
    point = fisher.linearize(model, tiny.prompt(tokens))
    deltas = torch.randn(len(point.layers), 2, 2, tiny.D, generator=torch.Generator().manual_seed(2))
    return point, deltas * 0.2 * point.activations.norm(dim=-1)[:, None, None, None]


@pytest.mark.parametrize(
    ("name", "mode", "tokens"),
    [
        ("llama", PrefixMode.SHARED, 9),
        ("llama", PrefixMode.SHARED, 1),  # nothing is cached before it
        ("gemma3", PrefixMode.SHARED, 9),  # windows shorter than the prompt
        ("gpt2", PrefixMode.SHARED, 9),
        ("bloom", PrefixMode.COPIED, 9),
        ("mamba", PrefixMode.WHOLE, 9),
        ("jamba", PrefixMode.WHOLE, 9),
    ],
)
def test_continuations_are_those_of_full_passes_without_a_cache(name, mode, tokens):
    model = families.shared(name)
    point, deltas = perturbed_point(model, tokens)
    assert point.reading.mode is mode
    chosen = [(layer, scale) for layer in range(len(deltas)) for scale in (0, 1)]
    before = point.reading.logits()
    found = continuations(point, tokens, deltas, chosen, TOKENS, fisher.Chunks(5))
    nothing = torch.zeros(tiny.D)
    assert found.unperturbed == the_long_way(model, tiny.prompt(tokens), point.modules[0], nothing, TOKENS)
    assert len(found.perturbed) == 4 * len(deltas)
    for layer, scale, direction, ids in found.perturbed:
        delta = deltas[layer, direction, scale]
        assert ids == the_long_way(model, tiny.prompt(tokens), point.modules[layer], delta, TOKENS)
    assert len({tuple(ids) for *_, ids in found.perturbed}) > 2  # else nothing was tried
    assert torch.equal(point.reading.logits(), before)  # the prefix is as it was


@pytest.mark.parametrize("tokens", [tiny.ORIGINAL - 3, tiny.ORIGINAL, tiny.ORIGINAL + 1])
def test_a_continuation_in_which_all_positions_are_rotated_otherwise_is_that_of_full_passes(tokens):
    """And that of `generate`, which makes its cache anew there too; in transformers 5.7 from the last token alone."""
    model = tiny.build("longrope")
    model.generation_config.eos_token_id = model.config.eos_token_id = 500  # which it never says
    point, deltas = perturbed_point(model, tokens)
    chosen = [(layer, 1) for layer in range(len(deltas))]
    found = continuations(point, tokens, deltas, chosen, TOKENS, fisher.Chunks(4))
    nothing = torch.zeros(tiny.D)
    assert found.unperturbed == the_long_way(model, tiny.prompt(tokens), point.modules[0], nothing, TOKENS)
    if not tiny.before("5.23"):
        said = model.generate(tiny.prompt(tokens)[None], max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        assert found.unperturbed == said[0, tokens:].tolist()
    for layer, scale, direction, ids in found.perturbed:
        delta = deltas[layer, direction, scale]
        assert ids == the_long_way(model, tiny.prompt(tokens), point.modules[layer], delta, TOKENS)


def test_the_batch_does_not_matter():
    point, deltas = perturbed_point(tiny.shared("llama"))
    chosen = [(layer, 0) for layer in range(len(deltas))]
    one, all_at_once = (continuations(point, 9, deltas, chosen, TOKENS, fisher.Chunks(size)) for size in (1, 256))
    assert one == all_at_once


def test_the_farthest_scale_within_the_limit_is_chosen_by_layer_and_sign():
    scales = [-3, -1, 0.5, 2]
    predicted = torch.tensor([[9, 1, 0.25, 4], [2.0000002, 0.2, 0.1, 2], [90, 10, 2.5, 40]])
    assert choose_scales(scales, predicted, 2.0) == [(0, 1), (0, 2), (1, 0), (1, 3), (2, 1), (2, 2)]
    assert choose_scales([2.0], torch.tensor([[9.0]]), 2.0) == [(0, 0)]


def test_a_row_ends_before_an_end_token_and_at_the_models_last_position(monkeypatch):
    model = tiny.build("llama")
    point, deltas = perturbed_point(model)
    chosen = [(0, 0)]
    model.generation_config.eos_token_id = 500  # which it never says
    whole = continuations(point, 9, deltas, chosen, TOKENS, fisher.Chunks())
    assert len(whole.unperturbed) == TOKENS
    third = whole.unperturbed[2]
    for ends in (third, [third, 500]):
        model.generation_config.eos_token_id = ends
        found = continuations(point, 9, deltas, chosen, TOKENS, fisher.Chunks())
        assert found.unperturbed == whole.unperturbed[: whole.unperturbed.index(third)]
        for (*_, ids), (*_, ended) in zip(whole.perturbed, found.perturbed, strict=True):
            assert ended == (ids[: ids.index(third)] if third in ids else ids)
    model.generation_config.eos_token_id = None
    assert end_tokens(model) == {2}  # of the configuration
    model.generation_config.eos_token_id = 500
    monkeypatch.setattr(model.config, "max_position_embeddings", 11)
    assert continuations(point, 9, deltas, chosen, TOKENS, fisher.Chunks()).unperturbed == whole.unperturbed[:3]


def test_a_row_whose_numbers_overflow_ends_and_no_other_does():
    point, deltas = perturbed_point(tiny.shared("llama"))
    deltas[0, 0, 0] = float("inf")
    found = continuations(point, 9, deltas, [(0, 0), (1, 0)], TOKENS, fisher.Chunks())
    assert [len(ids) for *_, ids in found.perturbed] == [0, TOKENS, TOKENS, TOKENS]


def test_a_full_batch_that_runs_out_of_memory_is_halved():
    point, deltas = perturbed_point(tiny.build("llama"))
    chunks = fisher.Chunks()
    expected = continuations(point, 9, deltas, [(0, 0)], TOKENS, fisher.Chunks())
    third_pass = scripts.calls_of(point.model, "forward", torch.OutOfMemoryError, at=[3])
    with third_pass, pytest.warns(match="out of memory"):
        assert continuations(point, 9, deltas, [(0, 0)], TOKENS, chunks) == expected
    assert chunks.size == 1


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(model_directory, tmp_path_factory):
    """The results without and with continuations."""
    outputs = [tmp_path_factory.mktemp("runs") / name for name in ("without", "with")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder, document: None)
        for output, more in zip(outputs, ([], CONTINUE), strict=True):
            assert scripts.core_experiment(model_directory, output, *WORDS, *more) == 0
    return outputs


def test_the_records_hold_what_follows_the_perturbations_that_are_recorded(both):
    results, _ = experiment_results(both[1])
    assert len(results["continuations"]) == len(results["sentences"]) == 3
    for said, context, records in zip(
        results["continuations"], results["contexts"], results["perturbation_results"], strict=True
    ):
        assert list(said) == ["none", "0", "2"] and set(said["none"]) == {"ids", "text"}
        assert said["none"]["ids"][:1] in (context["top_ids"][:1], [])  # [] if it is the end token
        for layer in ("0", "2"):
            assert list(said[layer]) == ["-1", "1"]  # 3 is too far: 4.5 nats
            for scale, entries in said[layer].items():
                assert list(entries) == ["fisher", "random_0"]
                along_v = records[layer][scale]
                for name, entry in entries.items():
                    record = along_v if name == "fisher" else along_v["controls"][name]
                    assert (entry["step"], entry["predicted_kl"]) == (record["step"], record["predicted_kl"])
                    assert entry["ids"][:1] in (record["top_ids"][:1], [])
                    assert len(entry["ids"]) <= TOKENS and isinstance(entry["text"], str)


def test_without_the_option_nothing_is_new_and_with_it_only_the_continuations_are(both):
    documents, arrays = zip(*map(experiment_results, both), strict=True)
    for document in documents:
        for key in ("experiment_config", "timings", "run", "checksum"):
            del document[key]
    assert "continuations" not in documents[0]
    del documents[1]["continuations"]
    assert json.dumps(documents[0]) == json.dumps(documents[1])
    assert all((arrays[0][name] == arrays[1][name]).all() for name in arrays[0] if name != "run")


@pytest.mark.usefixtures("without_pictures")
def test_stopped_and_resumed_with_it_ends_as_if_never_stopped(model_directory, both, tmp_path, capsys):
    with scripts.calls_of(core_experiment, "measure_sentence", KeyboardInterrupt, at=[3]):
        assert scripts.core_experiment(model_directory, tmp_path, *WORDS, *CONTINUE) == 130
    assert len(experiment_results(tmp_path)[0]["continuations"]) == 2
    assert scripts.core_experiment(model_directory, tmp_path, *WORDS) == 2
    assert "(continue was 6 and is 0): --overwrite replaces it" in capsys.readouterr().err
    assert scripts.core_experiment(model_directory, tmp_path, *WORDS, *CONTINUE) == 0
    texts = []
    for output in (tmp_path, both[1]):
        document, _ = experiment_results(output)
        del document["timings"], document["experiment_config"]["output_dir"]
        texts.append(json.dumps(document))
    assert texts[0] == texts[1]
    name = "fisher_eigenvectors.npz"
    assert (tmp_path / name).read_bytes() == (both[1] / name).read_bytes()


def test_the_console_shows_it_in_lines_of_the_terminals_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    usual = {"ids": [4, 5], "text": " as\x1b[31m\n usual"}
    along_v = {"ids": [4], "text": " otherwise" * 20, "step": 1.0, "predicted_kl": 2.0}
    at_layer = {"-1": {"fisher": along_v, "random_0": usual}, "1": {"fisher": along_v | usual}}
    said = {"none": usual, "3": at_layer}
    lines = continuation_block(said, ["3"], 2).splitlines()
    assert lines[1] == r"  none                | as\x1b[31m\n usual"
    assert lines[2].startswith("  3         -1     2  | otherwise otherwise") and lines[2].endswith("…")
    assert lines[3] == "  3          1     2  (the same)"
    assert lines[4] == "  random_0 of the same lengths: 1 of 1 the same"
    assert max(map(len, lines)) == 70
    assert continuation_block({"none": usual}, [], 3).endswith("usual [end]")
