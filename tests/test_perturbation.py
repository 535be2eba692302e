"""Perturbations: their directions and lengths, and what a sweep of them says, against plain forward passes."""

import pytest
import torch

import fisher
from residual_fisher.experiment.perturbation import control_directions, step_lengths, sweep
from test_fisher import assert_close, directions, point_of
import tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_sweep_rows_equal_one_perturbed_full_forward_each(name):
    ids, point = point_of(name)
    deltas = directions(tiny.DEPTH, 2, 2, seed=2)
    swept = sweep(point, deltas, target=5)
    reference = tiny.shared(name, torch.float64)
    base = tiny.reference_log_probs(name, ids)
    for place in [(layer, i, j) for layer in range(tiny.DEPTH) for i in range(2) for j in range(2)]:
        layer = tiny.layers_of(reference)[place[0]]
        log_q = tiny.plain_log_probs(reference, ids, layer, deltas[place].double())
        top = log_q.topk(5)
        assert swept.top_ids[place].tolist() == top.indices.tolist()
        assert_close(swept.top_log_probs[place], top.values)
        assert swept.target_log_prob[place].item() == pytest.approx(log_q[5].item(), rel=1e-4)
        kl = (base.exp() * (base - log_q)).sum().item()
        assert swept.kl[place].item() == pytest.approx(kl, rel=1e-3)


def test_of_equally_probable_tokens_a_sweep_has_the_lower_one_first():
    _, point = point_of("llama", dtype=torch.bfloat16)
    deltas = directions(tiny.DEPTH, 40, seed=2)
    logits = torch.stack([fisher.perturb(point, rows, layer) for layer, rows in enumerate(deltas)])
    assert torch.equal(sweep(point, deltas).top_ids, logits.sort(descending=True, stable=True).indices[..., :5])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_sweeps_do_not_depend_on_the_chunk_size(size):
    _, point = point_of("llama")
    deltas = directions(tiny.DEPTH, 3, seed=5)
    for found, expected in zip(sweep(point, deltas, chunks=fisher.Chunks(size)), sweep(point, deltas), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4)


def test_a_sweep_perturbs_the_layers_it_is_told():
    _, point = point_of("llama")
    deltas = directions(tiny.DEPTH, 3, seed=5)
    at = torch.tensor([0, 2, 2])
    for found, expected in zip(sweep(point, deltas[at], at=at), sweep(point, deltas), strict=True):
        assert torch.allclose(found, expected[at], rtol=1e-4)


def test_a_perturbation_that_overflows_has_no_finite_kl_and_touches_no_other():
    _, point = point_of("llama")
    deltas = torch.ones(tiny.DEPTH, 2, tiny.D)
    expected = sweep(point, deltas)
    deltas[2, 1] = float("inf")
    swept = sweep(point, deltas)
    assert not swept.kl[2, 1].isfinite()
    swept.kl[2, 1] = expected.kl[2, 1]
    assert torch.allclose(swept.kl, expected.kl, rtol=1e-4)


@pytest.mark.parametrize("unit", ["eigenvalue", "nats", "norm"])
def test_step_lengths_are_scales_times_the_unit(unit):
    steps = step_lengths(unit, torch.tensor([-2.0, 1.0]), torch.tensor([0.25, 4.0]), torch.tensor([100.0, 300.0]))
    one = {"eigenvalue": [0.25, 4], "nats": [2, 0.5], "norm": [1, 3]}[unit]
    assert torch.allclose(steps, torch.tensor([[-2 * x, x] for x in one], dtype=torch.float32))


def test_controls_are_unit_directions_that_seed_sentence_layer_and_number_alone_determine():
    activations, other = directions(3, seed=1), directions(3, seed=2)
    found = control_directions(activations, other, [0, 5, 7], 2, (11, 4))
    assert list(found) == ["random_0", "random_1", "difference"]
    assert all(torch.allclose(d.norm(dim=-1), torch.ones(3)) for d in found.values())
    assert torch.allclose(found["difference"], torch.nn.functional.normalize(other - activations, dim=-1))
    one_layer = control_directions(activations[1:2], None, [5], 1, (11, 4))
    assert list(one_layer) == ["random_0"]
    assert torch.equal(one_layer["random_0"][0], found["random_0"][1])
    others = [control_directions(activations, None, [0, 5, 7], 1, key)["random_0"] for key in ((11, 5), (12, 4))]
    drawn = torch.stack([*found["random_0"], *found["random_1"], *others[0], *others[1]])
    assert (drawn @ drawn.T - torch.eye(12)).abs().max() < 0.8  # all different
