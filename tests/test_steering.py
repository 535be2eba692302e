"""Raising a token at the least cost: gradients where perturbations have led, and what is said of every perturbation."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import families
import fisher
from residual_fisher.common.program import UserError
from residual_fisher.experiment.steering import steering_record, steering_summary
from residual_fisher.model import steering
from residual_fisher.model.embedded import EMBEDDED
from residual_fisher.model.loading import decoder_layers, load
from residual_fisher.model.reading import PrefixMode
from residual_fisher.model.steering import GOALS, Linearised, Lines, Steered, least_kl, steer_along, waypoints
from residual_fisher.model.words import token_of
import scripts
from scripts import experiment_results
from test_continuation import the_long_way
import tiny

TARGET = 11
MODES = {"llama": PrefixMode.SHARED, "bloom": PrefixMode.COPIED, "mamba": PrefixMode.WHOLE, "gemma2": PrefixMode.SHARED}


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() * (log_p - log_q)).sum().item()


def random_deltas(point: fisher.Point, rows: int, share: float = 0.2) -> Tensor:
    u = torch.randn(rows, tiny.D, generator=torch.Generator().manual_seed(3))
    return share * u * point.activations.norm(dim=-1).mean() / tiny.D**0.5


@pytest.mark.parametrize("name", MODES)
def test_where_a_perturbation_has_led_gradients_are_those_of_float64(name):
    """Two rows at the first layer and one at the last, each with derivatives of its own."""
    model, reference, ids = families.shared(name), families.shared(name, torch.float64), tiny.prompt()
    point = fisher.linearize(model, ids)
    assert point.reading.mode is MODES[name]
    at = torch.tensor([0, 0, len(point.modules) - 1])
    deltas = random_deltas(point, 3)
    here = fisher.linearize_perturbed(point, deltas, at)
    tokens = torch.tensor([3, TARGET, 40]).expand(3, -1)
    gradients = fisher.pull_back(here, here.cotangents(tokens))
    assert gradients.shape == (1, 3, 3, tiny.D)
    for row, layer in enumerate(at.tolist()):
        module = list(decoder_layers(reference).values())[layer]

        def log_probs(delta: Tensor, module=module) -> Tensor:
            return tiny.plain_log_probs(reference, ids, module, delta)

        delta = deltas[row].to(reference.dtype)
        assert torch.allclose(here.log_probs[row].to(delta), log_probs(delta), atol=1e-4)
        expected = torch.autograd.functional.jacobian(log_probs, delta)[[3, TARGET, 40]]
        assert (gradients[0, row].to(delta) - expected).norm() <= 1e-4 * expected.norm()


def test_the_least_kl_is_that_of_the_tilted_distribution_and_no_other_costs_less():
    p = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for goal in GOALS:
        odds = goal / (1 - goal) / (p[7] / (1 - p[7]))
        q = p.clone()
        q[7] *= odds
        q /= q.sum()
        least = kl(p.log(), q.log())
        assert math.isclose(q[7], goal) and math.isclose(least, least_kl(p[7].item(), goal), rel_tol=1e-9)
        others = q * torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        others[7] = 0
        others *= (1 - goal) / others.sum()
        others[7] = goal
        assert kl(p.log(), others.log()) > least
    assert least_kl(0.0, 0.5) == pytest.approx(math.log(2)) and least_kl(1e-30, 0.5) == pytest.approx(math.log(2))
    assert least_kl(0.1, 1.0) > least_kl(0.1, 0.999)


def test_the_way_ends_at_the_goals_and_takes_the_steps_asked_for():
    for probability in (0.0, 1e-6, 0.003, 0.09, 0.2, 0.4):
        goals = [goal for goal in GOALS if goal > probability]
        way = waypoints(probability, goals, 8)
        assert way == sorted(way) and set(goals) <= set(way) and way[0] > probability
        assert way.index(0.5) + 1 == 8
    assert waypoints(0.6, [0.9], 8)[-1] == 0.9


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_natural_gradient_solves_with_f_and_its_damping(name):
    """All tokens counted, against the dense float64 system; and at the point reached, as well as unperturbed."""
    ids, layer = tiny.prompt(), 1
    point = fisher.linearize(families.shared(name), ids, [layer])
    reference = families.shared(name, torch.float64)
    module = tiny.layers_of(reference)[layer]
    for delta in (torch.zeros(1, tiny.D), random_deltas(point, 1)):
        here = Linearised(point, delta, TARGET, tiny.VOCABULARY, fisher.Chunks())

        def log_probs(delta: Tensor) -> Tensor:
            return tiny.plain_log_probs(reference, ids, module, delta)

        rows = torch.autograd.functional.jacobian(log_probs, delta[0].double())
        p = log_probs(delta[0].double()).exp()
        matrix = rows.mT @ (p[:, None] * rows)
        rise = rows[TARGET] / (1 - p[TARGET])
        assert torch.allclose(here.rise[0], rise, rtol=1e-3, atol=1e-5)
        damped = matrix + 0.01 * torch.linalg.eigvalsh(matrix)[-1] * torch.eye(tiny.D)
        expected = torch.linalg.solve(damped, rise)
        found = here.solve(here.rise, 0.01)[0]
        assert (found - expected).norm() <= 1e-3 * expected.norm()
        before = tiny.plain_log_probs(reference, ids).exp()  # d KL(before || here) / d delta
        assert torch.allclose(here.kl_gradient[0], -before @ rows, atol=1e-5)


def steered_at_all_layers(name: str, dtype: torch.dtype = torch.float32) -> tuple[fisher.Point, Steered]:
    point = fisher.linearize(families.shared(name, dtype), tiny.prompt())
    v = fisher.top_k(point, 30).eigenpairs().vectors[:, 0]
    target = int(point.log_probs.argsort(descending=True)[12])
    return point, steer_along(point, {"fisher": v}, target, 60, 8, 0.003, fisher.Chunks(7), fisher.Chunks(50))


@pytest.mark.parametrize("name", ["llama", "bloom", pytest.param("mamba", marks=pytest.mark.long)])
def test_every_figure_is_what_the_perturbation_does(name):
    point, steered = steered_at_all_layers(name)
    assert steered.names == ["natural", "gradient", "fisher", "natural_steps", "gradient_steps"]
    layers = [str(layer) for layer in point.layers]
    record = json.loads(json.dumps(steering_record(steered, layers, str)))
    assert record["token"] == str(steered.target) and record["probability"] == steered.before
    found = 0
    for row, layer in enumerate(layers):
        module = point.modules[row]
        for column, goal in enumerate(steered.goals):
            for name in steered.names:
                entry = record["layers"][layer][name][f"{goal:g}"]
                assert entry is None or entry["ratio"] >= 1 - 1e-3
                assert entry is None or math.isclose(entry["probability"], goal, rel_tol=0.03)
            entry, delta = record["layers"][layer]["natural_steps"][f"{goal:g}"], steered.deltas[row, column]
            if entry is None:
                assert delta.isnan().all()
                continue
            found += 1
            both = (tiny.plain_log_probs(point.model, tiny.prompt(), module, d) for d in (delta * 0, delta))
            log_p, log_q = (log_probs.double() for log_probs in both)
            assert math.isclose(log_q[steered.target].exp(), entry["probability"], rel_tol=1e-3)
            assert math.isclose(kl(log_p, log_q), entry["kl"], rel_tol=1e-3, abs_tol=1e-5)
            others = torch.arange(len(log_p)) != steered.target
            log_p, log_q = (part[others].log_softmax(-1) for part in (log_p, log_q))
            assert math.isclose(kl(log_p, log_q), entry["others_kl"], rel_tol=1e-2, abs_tol=1e-4)
            assert math.isclose(delta.norm() / point.activations[row].norm(), entry["norms"], rel_tol=1e-4)
    assert found >= 4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_later_step_pulls_back_the_part_of_f_that_counts_most(name, monkeypatch):
    """At the same point, the best approximation of that rank is in what is pulled back."""
    asked, pull_back = [], steering.pull_back

    def recorded(*arguments) -> Tensor:
        asked.append(pull_back(*arguments))
        return asked[-1]

    monkeypatch.setattr(steering, "pull_back", recorded)
    point = fisher.linearize(families.shared(name), tiny.prompt())
    deltas = random_deltas(point, tiny.DEPTH)
    whole = Linearised(point, deltas, TARGET, 20, fisher.Chunks())
    monkeypatch.setattr(steering, "RANK", 6)
    Linearised(point, deltas, TARGET, 20, fisher.Chunks(), whole)
    assert [pulled.shape[2] for pulled in asked] == [21 + 2, 6 + 2]
    for ours, root in zip(asked[1][0], whole.root, strict=True):
        best = torch.linalg.svd(root)[2][:6]
        q = torch.linalg.qr(ours.double().mT)[0]
        assert (best - best @ q @ q.mT).norm() <= 1e-4 * best.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_later_step_knows_the_rest_of_f_from_before(name, monkeypatch):
    """Gradients are exact; F is the nearer to that of all rows, the more of them are pulled back anew."""
    point = fisher.linearize(families.shared(name), tiny.prompt())
    deltas = random_deltas(point, tiny.DEPTH)
    whole, exact = (Linearised(point, share * deltas, TARGET, 20, fisher.Chunks()) for share in (1, 0.5))
    f, errors, leading_part = exact.root.mT @ exact.root, [], steering.leading_part
    for rank in (0, 6, 18):
        monkeypatch.setattr(steering, "RANK", rank)
        monkeypatch.setattr(steering, "leading_part", leading_part if rank else lambda rows, _: rows[:, :0])
        later = Linearised(point, 0.5 * deltas, TARGET, 20, fisher.Chunks(), whole)
        assert torch.allclose(later.rise, exact.rise, atol=1e-5)
        assert torch.allclose(later.kl_gradient, exact.kl_gradient, atol=1e-5)
        errors.append(((later.root.mT @ later.root - f).norm(dim=(1, 2)) / f.norm(dim=(1, 2))).max())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_steps_with_a_part_of_f_cost_hardly_more(monkeypatch):
    monkeypatch.setattr(steering, "RANK", 61)
    _, whole = steered_at_all_layers("llama")
    monkeypatch.setattr(steering, "RANK", 8)
    _, part = steered_at_all_layers("llama")
    costs, expected = (s.kl[:, s.names.index("natural_steps")] for s in (part, whole))
    both = costs.isfinite() & expected.isfinite()
    assert both.sum() >= 6 and (costs[both] / expected[both]).median() < 1.03


def test_a_goal_is_located_where_the_log_odds_are_first_reached():
    """On lines where the log-odds are known functions of length: smooth, with a leap, falling again, too low."""
    functions = (
        lambda t: t**3 - 2,
        lambda t: torch.where(t < 1.3, -1.0, 2.5),
        lambda t: 9 * t * (2 - t) - 8,
        lambda t: t - 9,
    )
    at = torch.arange(4)
    lines = Lines(at, torch.zeros(4, 1), torch.ones(4, 1))

    def move(some: Lines, lengths: Tensor) -> Tensor:
        lengths = lengths.expand(len(some.layers), -1)
        rows = [functions[i](row) for i, row in zip(some.layers.tolist(), lengths, strict=True)]
        return torch.stack([lengths, torch.stack(rows).sigmoid().log(), lengths.square()])

    tried = move(lines, torch.tensor([0.0, 0.7, 1.4, 2.0]))
    length, log_prob, kl = steering.reach(move, lines, tried, torch.zeros(4))
    assert abs(length[0] - 2 ** (1 / 3)) < 0.003 and abs(length[2] - 2 / 3) < 0.003
    assert 1.3 <= length[1] <= 1.4 and length[3].isnan()
    assert (log_prob[:3].exp() >= 0.5 - 0.002).all() and torch.allclose(kl, length.square(), equal_nan=True)


def test_what_has_reached_a_goal_in_half_precision_is_not_below_it():
    """Log-odds go in leaps there, of several per cent; 0.005 of them are allowed for interpolation."""
    _, steered = steered_at_all_layers("llama", torch.bfloat16)
    goals = torch.tensor(steered.goals).expand_as(steered.log_prob)
    reached = steered.log_prob.isfinite()
    assert reached.sum() >= 20
    assert (steered.log_prob.exp() >= goals - 0.005 * goals * (1 - goals) - 1e-5)[reached].all()


@pytest.mark.parametrize("hidden", [1e-8, 0.02])
def test_a_cost_whose_least_is_below_rounding_has_no_ratio(hidden):
    """0.4999 to 0.5 costs 2e-8 nats at least, 0.5 to 0.5 nothing, 0.3 to 0.5 a tenth of a nat."""
    records = []
    for before in (0.4999, 0.5, 0.3):
        parts = (torch.tensor([[[value]]]) for value in (math.log(0.5), 0.2, 0.01))
        steered = Steered(3, before, ["natural"], [0.5], *parts, torch.zeros(1, 1, 4), hidden)
        records.append(steering_record(steered, ["0"], str))
    near, same, far = (record["layers"]["0"]["natural"]["0.5"]["ratio"] for record in records)
    assert (near is None) == (hidden == 0.02) and same is None and far == pytest.approx(0.2 / least_kl(0.3, 0.5))
    summary = steering_summary(records[1:], ["0"])["0"]["natural"]["0.5"]
    assert summary == {"ratio_median": far, "reached": 1}
    assert steering_summary(records[1:2], ["0"])["0"]["natural"]["0.5"]["ratio_median"] is None


def test_in_steps_the_natural_gradient_costs_less_than_the_gradient():
    _, steered = steered_at_all_layers("llama")
    natural, gradient = (steered.kl[:, steered.names.index(f"{name}_steps")] for name in ("natural", "gradient"))
    both = natural.isfinite() & gradient.isfinite()
    assert both.sum() >= 6 and (natural[both] <= gradient[both] * 1.01).float().mean() >= 0.8


def test_a_certain_token_has_no_goals():
    point = fisher.linearize(tiny.shared("llama"), tiny.prompt())
    point.log_probs[TARGET] = math.log(0.95)
    steered = steer_along(point, {}, TARGET, 20, 8, 0.003, fisher.Chunks(), fisher.Chunks())
    record = steering_record(steered, ["0", "1", "2"], str)
    assert steered.goals == [] and record["layers"] == {"0": {}, "1": {}, "2": {}}


def test_a_token_is_named_by_its_text():
    _, tokenizer = load(EMBEDDED, "float32", "cpu")
    dogs = token_of(tokenizer, "dogs")
    assert tokenizer.decode([dogs]) == " dogs" and token_of(tokenizer, " dogs") == dogs
    with pytest.raises(UserError, match="has to be one token, and is"):
        token_of(tokenizer, "hippopotamuses")


# --- the script ----------------------------------------------------------------------------------

WORDS = ["--num-sentences", "3", "--layers", "0", "2", "--steer", "--steer-steps", "3"]


def test_the_script_writes_records_vectors_a_table_and_a_picture(model_directory, tmp_path, capsys):
    assert scripts.core_experiment(model_directory, tmp_path, *WORDS) == 0
    document, arrays = experiment_results(tmp_path)
    assert len(document["steering"]) == 3
    assert arrays["steering_deltas"].shape == (3, 2, len(GOALS), arrays["activations"].shape[-1])
    entry = document["steering"][1]["layers"]["2"]
    assert list(entry) == ["natural", "gradient", "difference", "fisher", "natural_steps", "gradient_steps"]
    reached = [e["layers"]["2"]["natural_steps"]["0.1"] is not None for e in document["steering"]]
    assert document["summary"]["steering"]["2"]["natural_steps"]["0.1"]["reached"] == pytest.approx(np.mean(reached))
    assert any(reached)
    out = capsys.readouterr().out
    assert "KL over the least that any perturbation costs" in out and "steering.png" in out
    assert (tmp_path / "steering.png").stat().st_size > 20_000
    before = (tmp_path / "steering.png").read_bytes()
    assert scripts.core_experiment(model_directory, tmp_path, *WORDS) == 0
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "steering.png").read_bytes() == before
    assert scripts.core_experiment(model_directory, tmp_path, *WORDS[:-3], "--overwrite") == 0
    assert not (tmp_path / "steering.png").exists()  # a picture of the run that was replaced


@pytest.mark.usefixtures("without_pictures")
def test_a_run_with_steering_is_as_it_is_without(model_directory, tmp_path):
    for name, words in (("with", WORDS), ("without", WORDS[:-3])):
        assert scripts.core_experiment(model_directory, tmp_path / name, *words) == 0
    documents, arrays = zip(*(experiment_results(tmp_path / name) for name in ("with", "without")), strict=True)
    for key in ("fisher", "perturbation_results", "contexts"):
        assert documents[0][key] == documents[1][key]
    assert all((arrays[0][name] == arrays[1][name]).all() for name in arrays[1] if name != "run")


@pytest.mark.usefixtures("without_pictures")
def test_with_continuations_the_steered_text_goes_on_as_full_passes_say(model_directory, tmp_path, capsys):
    assert scripts.core_experiment(model_directory, tmp_path, *WORDS, "--steer-steps", "8", "--continue", "4") == 0
    document, arrays = experiment_results(tmp_path)
    model, tokenizer = load(str(model_directory), "float32", "cpu")
    found = 0
    for sentence, record in enumerate(document["steering"]):
        ids = torch.tensor(tokenizer(document["contexts"][sentence]["prompt"]).input_ids)
        for row, layer in enumerate(("0", "2")):
            for name, goals in record["layers"][layer].items():
                for goal, entry in goals.items():
                    assert entry is None or ("text" in entry) == (name == "natural_steps")
                    if entry is None or name != "natural_steps":
                        continue
                    delta = torch.from_numpy(arrays["steering_deltas"][sentence, row, GOALS.index(float(goal))])
                    said = the_long_way(model, ids, tiny.layers_of(model)[int(layer)], delta, 4)
                    assert (entry["ids"], entry["text"]) == (said, tokenizer.decode(said))
                    found += float(goal) < 0.5 or said[0] == record["id"]  # a likely token is what comes next
    assert found >= 2 and " raised " in capsys.readouterr().out


def test_a_text_that_is_no_token_is_a_one_line_error(model_directory, tmp_path, capsys):
    words = [*WORDS, "--steer-token", "a text of several tokens"]
    assert scripts.core_experiment(model_directory, tmp_path, *words) == 2
    assert "has to be one token" in capsys.readouterr().err
