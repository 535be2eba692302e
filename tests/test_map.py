"""The map of a text: each token as if the text ended there, against `linearize` and against float64."""

from functools import partial
import json
import os
import re

import numpy as np
import pytest
import torch
import transformers as hf

import core_experiment
import fisher
from residual_fisher.experiment import text_map
from residual_fisher.model import each_token
from residual_fisher.model.lens import JacobianLens, has_lens, lens_logits, write_lens
from residual_fisher.model.passes import ways_of
from residual_fisher.model.template import render
from residual_fisher.pipeline.prompts import Prompt, encode
import scripts
import tiny

K, TOKENS = 20, 13
RELATIVE = 1e-4  # a three-layer float32 network, as in test_fisher.py


def tokenizer_of(ids: torch.Tensor):
    """Whatever the text, these tokens."""
    return lambda text: hf.BatchEncoding({"input_ids": ids.tolist()})


@pytest.fixture
def blocks_of_five(monkeypatch):
    """13 tokens are three blocks, of which the last is shorter."""
    monkeypatch.setattr(fisher, "TEXT_MEMORY", 5 * 4 * tiny.D * tiny.DEPTH * K)


def map_of(name: str, dtype: torch.dtype = torch.float32, k: int | str = K) -> tuple[torch.Tensor, fisher.TextMap]:
    ids = tiny.prompt(TOKENS)
    return ids, fisher.map_text(tiny.shared(name, dtype), tokenizer_of(ids), "", k=k)


def assert_row_is_that_of_the_prompt(found: fisher.TextMap, row: int, point: fisher.Point, matrix, relative=RELATIVE):
    eigen = matrix.eigenpairs()
    for ours, theirs in (
        (found.eigenvalues[row], eigen.values[:, 0]),
        (found.trace[row], eigen.trace),
        (found.effective_rank[row], eigen.effective_rank),
        (found.activations[row], point.activations),
        (found.top_log_probs[row], fisher.most_probable(point.log_probs, 5)[0]),
    ):
        assert torch.allclose(ours, theirs, rtol=relative, atol=relative * float(theirs.abs().max()))
    assert ((found.vectors[row] * eigen.vectors[:, 0]).sum(-1) > 1 - 10 * relative).all()
    slopes = matrix.slopes(eigen.vectors)[:, 0]  # (layers, k)
    shares = (matrix.weights * slopes**2 / eigen.values).sort(descending=True).values
    assert torch.allclose(found.shares.shares[row], shares[:, :8], atol=100 * relative)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("blocks_of_five")
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_token_has_what_linearize_gives_for_the_text_up_to_it(name):
    ids, found = map_of(name)
    for row in (0, 6, TOKENS - 1):
        point = fisher.linearize(tiny.shared(name), ids[: row + 1])
        assert_row_is_that_of_the_prompt(found, row, point, fisher.top_k(point, K))
    alone = "text" in ways_of(tiny.shared(name))
    assert alone == (name in ("bloom", "falcon", "falcon-alibi"))  # their attention is their own


@pytest.mark.usefixtures("blocks_of_five")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "bloom"])
@pytest.mark.parametrize("row", [3, 11])
def test_a_cell_matches_float64_brute_force(name, row):
    ids, found = map_of(name)
    for layer, matrix in enumerate(tiny.reference_layers(name, ids[: row + 1], K)):
        values, vectors = torch.linalg.eigh(matrix)
        assert found.eigenvalues[row, layer].item() == pytest.approx(values[-1].item(), rel=1e-3)
        assert found.trace[row, layer].item() == pytest.approx(values.sum().item(), rel=1e-3)
        assert (found.vectors[row, layer].double() @ vectors[:, -1]).abs() > 0.999


def test_over_the_whole_vocabulary_a_cell_is_exact():
    ids, found = map_of("llama", k="all")
    for row in (0, 7):
        point = fisher.linearize(tiny.shared("llama"), ids[: row + 1])
        assert_row_is_that_of_the_prompt(found, row, point, fisher.full_vocabulary(point), relative=1e-3)
    assert torch.allclose(found.captured_mass, torch.ones(TOKENS))


def test_surprisal_is_that_of_plain_forward_passes():
    ids, found = map_of("llama")
    assert found.surprisal[0].isnan()
    for row in (1, 5, TOKENS - 1):
        expected = -tiny.reference_log_probs("llama", ids[:row])[ids[row]]
        assert found.surprisal[row].item() == pytest.approx(expected.item(), rel=1e-4)


def test_later_tokens_change_nothing():
    ids = tiny.prompt(TOKENS)
    other = torch.cat([ids[:7], ids[7:].flip(0)])
    first, second = (fisher.map_text(tiny.shared("llama"), tokenizer_of(some), "", k=K) for some in (ids, other))
    assert torch.allclose(first.eigenvalues[:7], second.eigenvalues[:7], rtol=1e-5)
    assert not torch.allclose(first.eigenvalues[8:], second.eigenvalues[8:], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_mapped_in_blocks_too(dtype):
    ids, found = map_of("llama", dtype)
    point = fisher.linearize(tiny.shared("llama", dtype), ids)
    expected = fisher.top_k(point, K).eigenpairs().values[:, 0]
    assert torch.allclose(found.eigenvalues[-1], expected, rtol=0.1 if dtype is torch.bfloat16 else 1e-5)
    assert "text" not in ways_of(tiny.shared("llama", dtype))


def plain_attention(module, query, key, value, mask, scaling, **_):
    """The same numbers, but a token's keys and values lead to the predictions of later tokens too."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    weights = (query @ key.mT * scaling + mask).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def test_a_pass_in_which_tokens_reach_later_predictions_is_not_trusted(monkeypatch):
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, each_token.EACH_TOKEN_ATTENTION, plain_attention)
    model, ids = tiny.build("llama"), tiny.prompt(TOKENS)
    with pytest.raises(fisher.UnsupportedModelError, match="gradients differ by"):
        list(fisher.linearize_each(model, ids, block=5))
    found = fisher.map_text(model, tokenizer_of(ids), "", k=K)
    point = fisher.linearize(model, ids)
    assert_row_is_that_of_the_prompt(found, TOKENS - 1, point, fisher.top_k(point, K))
    assert "gradients differ by" in ways_of(model)["text"]


def test_a_model_with_another_memory_is_mapped_token_by_token():
    config = hf.MambaConfig(hidden_size=tiny.D, num_hidden_layers=2, vocab_size=tiny.VOCABULARY, state_size=4)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = tiny.prompt(5)
    found = fisher.map_text(model, tokenizer_of(ids), "", k=K)
    expected = [fisher.top_k(fisher.linearize(model, ids[: n + 1]), K).eigenpairs().values[:, 0] for n in range(5)]
    assert torch.allclose(found.eigenvalues, torch.stack(expected), rtol=1e-4)
    assert ways_of(model)["text"].startswith("token by token: ")


def test_the_model_is_handed_back_as_it_was():
    model = tiny.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher.map_text(model, tokenizer_of(tiny.prompt()), "", layers=[1], k=K)
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_token_ids_are_mapped_as_their_text():
    ids = tiny.prompt()
    for given in (ids, ids.tolist(), {"input_ids": ids[None]}):
        found = fisher.map_text(tiny.shared("llama"), None, given, layers=[1], k=K)
        assert torch.equal(found.ids, ids)


def test_layers_and_texts_that_cannot_be_mapped_are_refused():
    model = tiny.shared("llama")
    with pytest.raises(ValueError, match="not ascending numbers from 0 to 2"):
        fisher.map_text(model, tokenizer_of(tiny.prompt()), "", layers=[3])
    with pytest.raises(ValueError, match="token ids of one prompt"):
        fisher.map_text(model, tokenizer_of(torch.tensor([], dtype=torch.int64)), "")


# --- J h: what h is in the last layer's stream, to first order --------------------------------------


def carried_by_brute_force(name: str, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """J h (d,) at the last token from all of J, in float64, by whole passes."""
    model = tiny.shared(name, torch.float64)
    modules, streams = tiny.layers_of(model), {}

    def final(delta: torch.Tensor) -> torch.Tensor:
        def keep(number: int, module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            streams[number] = h[0, -1]
            if number != layer:
                return None
            moved = torch.cat([h[:, :-1], h[:, -1:] + delta], dim=1)
            streams["moved"] = moved[0, -1]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handles = [module.register_forward_hook(partial(keep, number)) for number, module in enumerate(modules)]
        model(ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return streams["moved"] if layer == len(modules) - 1 else streams[len(modules) - 1]

    j = torch.autograd.functional.jacobian(final, torch.zeros(tiny.D, dtype=torch.float64))
    return j @ streams[layer].detach()


@pytest.mark.usefixtures("blocks_of_five")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "bloom"])
def test_h_is_carried_by_the_jacobian_of_its_own_token(name):
    ids, found = map_of(name, torch.float64)
    assert torch.equal(found.carried[:, -1], found.activations[:, -1])  # nothing follows the last layer
    for row in (6, TOKENS - 1):
        for layer in range(tiny.DEPTH):
            expected = carried_by_brute_force(name, ids[: row + 1], layer)
            # some of these round to float32 in between, to 1e-7
            assert (found.carried[row, layer] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_in_single_precision_too(name):
    ids, found = map_of(name)
    expected = fisher.carry(fisher.linearize(tiny.shared(name, torch.float64), ids))
    assert torch.allclose(found.carried[-1], expected, atol=RELATIVE * float(expected.abs().max()))


class Kernel(torch.autograd.Function):
    """2 x, whose backward pass leaves the graph, as that of a compiled kernel may."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.detach()


def with_kernel() -> torch.nn.Module:
    model = tiny.build("llama")
    tiny.layers_of(model)[1].mlp.register_forward_hook(lambda module, args, output: Kernel.apply(output))
    return model


def test_a_kernel_that_leaves_the_graph_is_noticed():
    with pytest.raises(fisher.UnsupportedModelError, match="forward and backward differ by"):
        fisher.carry(fisher.linearize(with_kernel(), tiny.prompt()))


def test_then_only_j_h_is_missing():
    model, ids = with_kernel(), tiny.prompt()
    found = fisher.map_text(model, tokenizer_of(ids), "", k=K)
    assert found.carried.isnan().all() and found.eigenvalues.isfinite().all()
    assert "forward and backward differ by" in ways_of(model)["local_lens"] and "text" not in ways_of(model)


def test_a_batch_of_prompts_is_not_carried():
    ids, lengths = tiny.prompts()
    model = tiny.shared("llama")
    with pytest.raises(fisher.UnsupportedModelError, match="stream of its last layer is not known"):
        fisher.carry(fisher.linearize_prompts(model, tiny.layers_of(model)[0], ids, lengths))


# --- the logit lens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_lens_reads_the_last_layer_as_the_model_does(name):
    model, ids = tiny.shared(name), tiny.prompt()
    point = fisher.linearize(model, ids)
    assert has_lens(model)
    assert torch.allclose(lens_logits(model, point.activations[-1:]).log_softmax(-1)[0], point.log_probs, atol=1e-4)


def test_the_lens_is_the_norm_and_the_head():
    model, h = tiny.shared("llama"), torch.randn(4, tiny.D, generator=torch.Generator().manual_seed(0))
    scaled = h / (h.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * model.model.norm.weight
    assert torch.allclose(lens_logits(model, h), scaled @ model.lm_head.weight.T, atol=1e-4)


# --- the script ----------------------------------------------------------------------------------

TEXT = "The zoo keeps many wild animals in large cages."
FILES = {"items", "fisher_map.json", "fisher_map.npz", "fisher_map.png", "report.html"}


def words(model, output, text: str = TEXT, *more: str) -> list[str]:
    return ["--model-name", str(model), "--output-dir", str(output), "--map", text, "--device", "cpu", *more]


def run(*arguments: str) -> int:
    return scripts.run("core_experiment", words(*arguments))


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(text_map, "draw_map", lambda folder, document: None)


@pytest.fixture(scope="module")
def finished(model_directory, tmp_path_factory):
    output = tmp_path_factory.mktemp("maps") / "map"
    assert run(model_directory, output) == 0
    return output


def results(output) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(output / "fisher_map.npz", allow_pickle=False) as archive:
        return json.loads((output / "fisher_map.json").read_text(encoding="utf-8")), dict(archive)


def test_a_map_holds_what_map_text_gives(finished, model_directory):
    document, arrays = results(finished)
    assert set(os.listdir(finished)) == FILES
    model, tokenizer = fisher.load(str(model_directory), device="cpu")
    found = fisher.map_text(model, tokenizer, TEXT, k=200)
    assert document["text"] == TEXT and document["layers"] == [0, 1, 2] == arrays["layers"].tolist()
    assert document["map_config"]["max_vocab_subset"] == 200
    for name, array in {
        "eigenvalues": found.eigenvalues, "eigenvectors": found.vectors, "trace": found.trace, "ids": found.ids,
        "effective_rank": found.effective_rank, "activations": found.activations, "surprisal": found.surprisal,
        "captured_mass": found.captured_mass, "carried": found.carried,
    }.items():  # fmt: skip
        assert np.array_equal(arrays[name], array.numpy(), equal_nan=name == "surprisal"), name
    assert len(document["tokens"]) == len(found.ids) and document["tokens"][0]["surprisal"] is None
    for row, record in enumerate(document["tokens"]):
        assert record["id"] == found.ids[row] and len(record["predicted"]) == 5
        for column, cell in enumerate(record["layers"].values()):
            norm = found.activations[row, column].norm()
            assert cell["eigenvalue"] == pytest.approx(float(found.eigenvalues[row, column]), rel=1e-5)
            assert cell["nats"] == pytest.approx(
                float(0.5 * found.eigenvalues[row, column] * (norm / 100) ** 2), rel=1e-5
            )
            assert sum(token["share"] for token in cell["tokens"]) <= 1 + 1e-5 and cell["lens"]
        # what leaves the last layer reads as the prediction
        assert cell["lens"][0] == record["predicted"][0]["token"]
        assert cell["local_lens"] == cell["lens"]
    write = fisher.token_writer(tokenizer)
    for column, layer in enumerate(("0", "1", "2")):
        best = lens_logits(model, found.carried[:, column]).argmax(-1).tolist()
        assert [record["layers"][layer]["local_lens"][0] for record in document["tokens"]] == list(map(write, best))


def test_a_cell_of_the_map_is_the_experiments_at_that_prompt(finished, finished_experiment, model_directory, tmp_path):
    experiment = json.loads((finished_experiment / "experiment_results.json").read_text())
    prompt, k = experiment["contexts"][0]["prompt"], experiment["experiment_config"]["max_vocab_subset"]
    assert run(model_directory, tmp_path / "map", prompt, "--max-vocab-subset", str(k)) == 0
    document, _ = results(tmp_path / "map")
    for layer, found in experiment["fisher"][0].items():
        cell = document["tokens"][-1]["layers"][layer]
        assert cell["eigenvalue"] == pytest.approx(found["eigenvalues"][0], rel=1e-4)
        assert cell["trace"] == pytest.approx(found["trace"], rel=1e-4)
        assert [t["id"] for t in cell["tokens"][:3]] == [t["id"] for t in found["tokens"][0][:3]]


def test_the_same_command_makes_the_same_bytes_and_a_finished_map_is_left_alone(
    finished, model_directory, tmp_path, capsys
):
    again = tmp_path / "again"
    assert run(model_directory, again) == 0
    for name in ("fisher_map.npz", "fisher_map.png", "report.html"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    before = scripts.contents(again)
    with scripts.calls_of(fisher, "map_text") as calls:
        assert run(model_directory, again) == 0
    assert not calls and scripts.contents(again) == before
    assert "nothing to do" in capsys.readouterr().out


def test_a_lost_picture_is_drawn_again_and_a_damaged_primary_file_computed(finished, model_directory, tmp_path):
    output = tmp_path / "map"
    assert run(model_directory, output) == 0
    before = scripts.contents(output)
    for name in ("fisher_map.png", "report.html"):
        (output / name).unlink()
        with scripts.calls_of(fisher, "map_text") as calls:
            assert run(model_directory, output) == 0
        assert not calls and scripts.contents(output) == before
    (output / "fisher_map.png").unlink()
    assert scripts.run("core_experiment", ["--redraw", str(output)]) == 0
    assert scripts.contents(output) == before
    scripts.flip(output / "fisher_map.npz")
    assert run(model_directory, output) == 0
    assert (output / "fisher_map.npz").read_bytes() == (finished / "fisher_map.npz").read_bytes()


def test_a_jacobian_lens_reads_each_cell_too(model_directory, tmp_path):
    """One of identities reads what the logit lens does; one that turns h round does not."""
    eye, turned = torch.eye(tiny.D), -torch.eye(tiny.D)
    write_lens(tmp_path / "lens.npz", JacobianLens({0: eye, 1: turned}, 1))
    assert run(model_directory, tmp_path / "map", TEXT, "--lens", str(tmp_path / "lens.npz")) == 0
    document, _ = results(tmp_path / "map")
    for record in document["tokens"]:
        first, second, last = record["layers"].values()
        assert first["jacobian_lens"] == first["lens"] and second["jacobian_lens"][0] != second["lens"][0]
        assert "jacobian_lens" not in last


@pytest.mark.usefixtures("undrawn")
def test_a_lens_of_this_very_text_reads_its_last_token_as_the_local_jacobian_does(model_directory, tmp_path):
    model, tokenizer = fisher.load(str(model_directory), device="cpu")
    own = fisher.stream_jacobians(model, tokenizer(TEXT).input_ids)
    write_lens(tmp_path / "lens.npz", JacobianLens({0: own[0], 1: own[1]}, 1))
    assert run(model_directory, tmp_path / "map", TEXT, "--lens", str(tmp_path / "lens.npz")) == 0
    document, _ = results(tmp_path / "map")
    first, second, _ = document["tokens"][-1]["layers"].values()
    for cell in (first, second):  # the file is in half precision
        assert cell["jacobian_lens"][0] == cell["local_lens"][0]
    assert first["local_lens"] != first["lens"]


@pytest.mark.usefixtures("undrawn")
def test_where_j_h_is_missing_the_other_lenses_are_read(model_directory, tmp_path):
    with scripts.calls_of(fisher, "carry", fisher.UnsupportedModelError("no")):
        assert run(model_directory, tmp_path / "map") == 0
    document, arrays = results(tmp_path / "map")
    assert np.isnan(arrays["carried"]).all() and document["environment"]["ways"]["local_lens"] == "none: no"
    cells = [cell for record in document["tokens"] for cell in record["layers"].values()]
    assert all(cell["lens"] and "local_lens" not in cell for cell in cells)


def test_a_model_whose_gradients_are_not_its_derivatives_is_refused(model_directory, tmp_path, capsys):
    error = fisher.UnsupportedModelError("its gradients are wrong")
    with scripts.calls_of(fisher, "check_prediction", error):
        assert run(model_directory, tmp_path / "map") == 2
    assert "this model is not supported: its gradients are wrong" in capsys.readouterr().err


def test_a_text_may_be_a_file(finished, model_directory, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert run(model_directory, tmp_path / "map", str(tmp_path / "text.txt")) == 0
    assert (tmp_path / "map" / "fisher_map.npz").read_bytes() == (finished / "fisher_map.npz").read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_chat_is_read_in_the_models_template_as_the_pipeline_reads_it(chat_directory, tmp_path):
    _, tokenizer = fisher.load(str(chat_directory), device="cpu")
    assert run(chat_directory, tmp_path / "user", TEXT, "--chat") == 0
    document, arrays = results(tmp_path / "user")
    assert document["text"] == render(tokenizer, TEXT) != TEXT and document["map_config"]["chat"]
    assert arrays["ids"].tolist() == encode(tokenizer, Prompt(0, 0, TEXT), 64).ids
    assert run(chat_directory, tmp_path / "user") == 2  # without the template it is another text

    turns = [{"role": "user", "content": "Name animals."}, {"role": "assistant", "content": "Many wild animals."}]
    (tmp_path / "chat.json").write_text(json.dumps(turns), encoding="utf-8")
    for place, given in enumerate((str(tmp_path / "chat.json"), json.dumps({"messages": turns}))):
        assert run(chat_directory, tmp_path / f"{place}", given, "--chat") == 0
        document, _ = results(tmp_path / f"{place}")
        assert document["text"] == tokenizer.apply_chat_template(turns, tokenize=False)  # the answer is not begun anew


def test_a_chat_without_a_template_or_turns_is_one_line_and_code_2(model_directory, chat_directory, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    for model, text, said in (
        (model_directory, TEXT, "has no chat template"),
        (chat_directory, str(tmp_path / "rows.jsonl"), "rows.jsonl holds no conversation"),
    ):
        assert run(model, tmp_path / "map", text, "--chat") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--map", "Another text."], "holds a run with other settings"),
        (["--max-vocab-subset", "7"], r"max_vocab_subset was 200 and is 7"),
        (["--layers", "1"], r"layers was \['all'\] and is \[1\]"),
    ],
)
def test_another_map_is_refused_until_it_may_be_overwritten(more, said, model_directory, tmp_path, capsys):
    output = tmp_path / "map"
    assert run(model_directory, output) == 0
    capsys.readouterr()
    assert run(model_directory, output, TEXT, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error)
    assert run(model_directory, output, TEXT, *more, "--overwrite") == 0


def test_a_map_and_an_experiment_do_not_mix(finished, model_directory, capsys):
    assert scripts.core_experiment(model_directory, finished) == 2
    assert "other settings" in capsys.readouterr().err
    assert set(os.listdir(finished)) == FILES


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        (b"", [], "is empty"),
        (b"\xff\xfe\xfa", [], "cannot read the text"),
        (b"Fine.", ["--layers", "7"], "--layers 7: the model has layers 0 to 2"),
        (b"many " * 100, [], "and the model has positions for 64"),
    ],
)
def test_what_cannot_be_mapped_is_one_line_and_code_2(text, more, said, model_directory, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(text)
    assert run(model_directory, tmp_path / "map", str(tmp_path / "text.txt"), *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "map" / "fisher_map.json").exists()


def test_a_dry_run_writes_nothing(model_directory, tmp_path, capsys):
    assert run(model_directory, tmp_path / "map", TEXT, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "time: about" in shown and "Nothing was written" in shown
    assert not (tmp_path / "map").exists()


def test_no_control_character_reaches_the_terminal(model_directory, tmp_path, capsys):
    assert run(model_directory, tmp_path / "map", "wild \x1b[31mred\x07 \u202e$x^2$ animals\n\nmany") == 0
    shown = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\r" for c in shown.out)


def test_a_map_has_its_own_folder_by_default():
    folders = {
        ("--map", "Fine."): "map_results",
        ("--map", "Fine.", "--output-dir", "x"): "x",
        (): "experiment_results",
    }
    for options, folder in folders.items():
        assert str(core_experiment.parse(list(options)).folder) == folder


def test_a_certain_prediction_and_a_single_token_can_be_drawn(model_directory, tmp_path):
    assert run(model_directory, tmp_path / "one", "a") == 0
    document, _ = results(tmp_path / "one")
    for record in document["tokens"]:
        for cell in record["layers"].values():
            cell.update(eigenvalue=0.0, nats=0.0, tokens=[])
    text_map.draw_map(tmp_path, document)
    assert (tmp_path / "fisher_map.png").stat().st_size > 1000
