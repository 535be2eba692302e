"""Jacobian lenses: their files, the prompt's own Jacobian, and how far either predicts a change."""

import json

import numpy as np
import pytest
import torch

import core_experiment
import fisher
from residual_fisher.common.program import UserError
from residual_fisher.experiment.lens_audit import KINDS, PREDICTORS, audit
from residual_fisher.model.lens import JacobianLens, read_lens, write_lens
import scripts
import tiny


def random_lens(d: int = tiny.D, layers=(0, 1)) -> JacobianLens:
    generator = torch.Generator().manual_seed(0)
    return JacobianLens({n: torch.eye(d) + 0.1 * torch.randn(d, d, generator=generator) for n in layers}, 3)


# --- the prompt's own Jacobian -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "opt"])
def test_the_jacobian_between_streams_matches_finite_differences(name):
    # some of these round to float32 in between, to 1e-7: a step of 0.003 leaves 1e-4 of it
    model, ids, step = tiny.shared(name, torch.float64), tiny.prompt(), 3e-3
    found = fisher.stream_jacobians(model, ids)
    layers, streams = tiny.layers_of(model), []
    assert torch.allclose(found[-1], torch.eye(tiny.D))

    def keep(module, args, output):
        streams.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    u = torch.randn(tiny.D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, layer in enumerate(layers[:-1]):
        streams.clear()
        handle = layers[-1].register_forward_hook(keep)
        for sign in (1, -1):
            tiny.plain_log_probs(model, ids, layer, sign * step * u)
        handle.remove()
        expected = (streams[0] - streams[1]) / (2 * step)
        assert (found[row].double() @ u - expected).norm() <= 1e-3 * expected.norm()


# --- the audit -----------------------------------------------------------------------------------


def audited(lens: JacobianLens, layers: list[int] | None = None) -> torch.Tensor:
    point = fisher.linearize(tiny.shared("llama", torch.float64), tiny.prompt(), layers)
    return audit(point, lens, 0, fisher.Chunks(16)).errors  # (layers, kinds, predictors)


def test_the_own_jacobian_predicts_a_small_change_and_another_lens_does_not():
    errors = audited(random_lens())
    assert (errors[:2, :, PREDICTORS.index("local")] < 0.05).all()  # what is left is of second order in 1% of |h|
    assert (errors[:2, :, PREDICTORS.index("mean")] > 0.2).all()
    assert errors[2].isnan().all()  # from the last layer nothing is carried anywhere


def test_a_layers_errors_do_not_depend_on_the_other_layers():
    assert torch.allclose(audited(random_lens(), [1, 2])[0], audited(random_lens())[1], rtol=1e-4)


def test_a_lens_of_this_very_prompt_predicts_as_well_as_its_own_jacobian():
    """Two ways to the same numbers: gradients pulled back to h, and h carried to the last layer."""
    own = fisher.stream_jacobians(tiny.shared("llama", torch.float64), tiny.prompt())
    errors = audited(JacobianLens({0: own[0], 1: own[1]}, 1))
    local, mean = (errors[:2, :, PREDICTORS.index(name)] for name in ("local", "mean"))
    assert torch.allclose(local, mean, rtol=1e-3)


def test_a_lens_that_carries_nothing_is_the_logit_lens():
    errors = audited(JacobianLens({0: torch.eye(tiny.D)}, 1))
    mean, plain = (errors[0, 0, PREDICTORS.index(name)] for name in ("mean", "logit_lens"))
    assert mean.item() == pytest.approx(plain.item())
    assert errors[1].isnan().all()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lens.pt", "lens.npz"])
def test_a_lens_is_read_as_it_was_written(name, tmp_path):
    lens = random_lens()
    write_lens(tmp_path / name, lens)
    found = read_lens(tmp_path / name)
    assert list(found.matrices) == [0, 1] and found.prompts == 3
    assert all(torch.equal(found.matrices[n], lens.matrices[n].half().float()) for n in (0, 1))


def test_the_public_form_is_read(tmp_path):
    """As others write it: a dictionary in half precision; as an array in the safe formats."""
    from safetensors.torch import save_file

    j = random_lens().matrices
    about = {"n_prompts": 7, "source_layers": [0, 1], "d_model": tiny.D}
    torch.save({"J": {n: m.half() for n, m in j.items()}, **about}, tmp_path / "a.pt")
    tensors = {name: torch.tensor(value) for name, value in about.items()}
    save_file({"J": torch.stack([j[0], j[1]]), **tensors}, str(tmp_path / "a.safetensors"))
    for name in ("a.pt", "a.safetensors"):
        found = read_lens(tmp_path / name)
        assert found.prompts == 7 and torch.allclose(found.matrices[1], j[1], atol=1e-3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "cannot read the lens"),
        (b"no archive", "cannot read the lens"),
        ({"jacobian_sum": {}}, "has no 'source_layers'"),
        ([1], "it holds no keys"),
        ({"J": {0: torch.eye(3)}, "n_prompts": 1, "source_layers": [0], "d_model": 4}, "a matrix of width 4"),
        ({"J": {0: torch.eye(3) * torch.nan}, "n_prompts": 1, "source_layers": [0], "d_model": 3}, "NaN or infinity"),
    ],
)
def test_what_is_no_lens_is_one_line(content, said, tmp_path):
    path = tmp_path / "lens.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=said) as caught:
        read_lens(path)
    assert "\n" not in str(caught.value)


class Unsafe:
    def __reduce__(self):
        return print, ("run",)


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    torch.save({"J": Unsafe()}, tmp_path / "lens.pt")
    with pytest.raises(UserError, match="cannot read the lens"):
        read_lens(tmp_path / "lens.pt")
    assert capsys.readouterr().out == ""


# --- the script ----------------------------------------------------------------------------------


def test_an_experiment_records_how_far_a_lens_predicts(model_directory, tmp_path, capsys):
    write_lens(tmp_path / "lens.npz", random_lens())
    words = ["--lens", str(tmp_path / "lens.npz"), "--layers", "all"]
    assert scripts.core_experiment(model_directory, tmp_path / "run", *words) == 0
    document, _ = scripts.experiment_results(tmp_path / "run")
    for sentence in document["fisher"]:
        assert sentence["2"]["lens"]["random"]["mean"] is None
        for layer in ("0", "1"):
            assert set(sentence[layer]["lens"]) == set(KINDS)
            assert all(set(errors) == set(PREDICTORS) for errors in sentence[layer]["lens"].values())
    errors = [sentence["0"]["lens"]["random"]["mean"] for sentence in document["fisher"]]
    assert document["summary"]["layers"]["0"]["lens_random_mean_median"] == pytest.approx(np.median(errors), rel=1e-5)
    assert "mean (along lens)" in capsys.readouterr().out
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    ("lens", "words", "said"),
    [
        (random_lens(8), ["--layers", "all"], "is not of this model, of 3 layers of width 32"),
        (random_lens(layers=(5,)), ["--layers", "all"], "is not of this model"),
        (random_lens(), ["--layers", "0"], "--lens needs the last layer among --layers"),
        (random_lens(layers=(2,)), ["--layers", "all"], "and another one that the lens has"),
    ],
)
def test_a_lens_that_does_not_fit_is_one_line_and_code_2(lens, words, said, model_directory, tmp_path, capsys):
    write_lens(tmp_path / "lens.pt", lens)
    assert scripts.core_experiment(model_directory, tmp_path / "run", "--lens", str(tmp_path / "lens.pt"), *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_a_lens_a_run_is_the_same_run_as_before():
    assert "lens" not in core_experiment.identity_of(core_experiment.parse([]))
