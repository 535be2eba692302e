"""How far the quadratic prediction holds: known curves, and a float64 forward pass at the radius that was found."""

import math

import pytest
import torch

from residual_fisher.experiment.perturbation import TrustRadii, trust_radii
import scripts
import tiny


@pytest.mark.parametrize("third", [1.0, -1.0])
def test_known_curves(third):
    """KL = 1/2 c s^2 (1 + s / length) departs by a tenth at s = length / 10."""
    curvature, lengths = torch.tensor([1.0, 50.0, 0.02]), torch.tensor([0.5, 0.01, 3.0])

    def kl_of(steps):
        return 0.5 * curvature[:, None] * steps**2 * (1 + third * steps / lengths[:, None]).clamp(min=0)

    assert torch.allclose(trust_radii(kl_of, curvature), lengths / 10, rtol=0.01)


def test_a_departure_from_which_kl_returns_is_found_wherever_it_lies():
    """KL is above its prediction by a tenth from 0.39 to 0.61 of a length, at most by 10.5%, and below it from 1.19."""
    lengths = torch.logspace(-1, 1, 50)

    def kl_of(steps):
        part = steps / lengths[:, None]
        return 0.5 * steps**2 * (1 + 0.42 * part * (1 - part))

    expected = lengths * (1 - (1 - 0.4 / 0.42) ** 0.5) / 2
    assert torch.allclose(trust_radii(kl_of, torch.ones(50)), expected, rtol=0.015)


def test_what_rounding_hides_is_not_a_number():
    """With rounding of 1e-2 nats at step 0, a departure at 1e-3 nats is hidden, one at 10 nats is not."""
    curvature, lengths = torch.ones(2), torch.tensor([0.45, 45.0])

    def kl_of(steps):
        return 0.5 * steps**2 * (1 + steps / lengths[:, None]) + 1e-2

    found = trust_radii(kl_of, curvature)
    assert math.isnan(found[0])
    assert found[1].item() == pytest.approx(4.5, rel=0.02)


def test_a_prediction_that_always_holds_has_an_infinite_radius():
    assert trust_radii(lambda steps: 0.5 * steps**2, torch.ones(1)).item() == math.inf


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("subset", ["20", "all"])
def test_kl_at_the_radius_departs_by_a_tenth(model_directory, tmp_path, capsys, subset):
    """Also from a truncated matrix, whose own eigenvalue KL would depart from at once."""
    output = tmp_path / "out"
    words = ["--trust-radius", "--max-vocab-subset", subset, "--dtype", "float64"]
    assert scripts.core_experiment(model_directory, output, *words) == 0
    assert "within 10% of its quadratic prediction" in capsys.readouterr().out
    results, arrays = scripts.experiment_results(output)
    model = tiny.hf.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float64).eval()
    tokenizer = tiny.hf.AutoTokenizer.from_pretrained(model_directory)
    layers = list(model.model.layers)
    checked = 0
    for sentence, (entries, context) in enumerate(zip(results["fisher"], results["contexts"], strict=True)):
        ids = torch.tensor(tokenizer(context["prompt"]).input_ids)
        base = tiny.plain_log_probs(model, ids)
        for row, (layer, entry) in enumerate(entries.items()):
            radius = entry["trust_radius"]
            assert radius["step"] == min(radius["steps"])
            assert radius["norms"] == pytest.approx(radius["step"] / entry["activation_norm"])
            v = torch.tensor(arrays["eigenvectors"][sentence, row]).double()
            departures = []
            for step, sign in zip(radius["steps"], (-1, 1), strict=True):
                log_q = tiny.plain_log_probs(model, ids, layers[int(layer)], sign * step * v)
                kl = (base.exp() * (base - log_q)).sum().item()
                predicted = radius["nats"] * (step / radius["step"]) ** 2
                departures.append(abs(kl / predicted - 1))
            assert departures == pytest.approx([0.1, 0.1], rel=0.05)
            checked += 1
    assert checked == 4 * 2  # sentences and layers
    assert results["summary"]["layers"]["0"]["trust_radius_nats_median"] > 0


def test_where_the_activation_is_zero_only_the_steps_are_recorded():
    radii = TrustRadii(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 0.25]]))
    assert radii.record(0, 0.0) == {"step": None, "nats": None, "norms": None, "steps": [2, 1]}
