"""Which prompts stand out: on matrices whose odd ones are known, and against plain formulas."""

import numpy as np
import pytest
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from residual_fisher.pipeline import distances, scores
from residual_fisher.pipeline.distances import (
    Mahalanobis,
    NextTokens,
    PrincipalCoordinates,
    Subspace,
    Surprisal,
    WideMahalanobis,
    largest_eigenvalue,
    log_gain,
    robust_z,
)
from residual_fisher.pipeline.matrices import Triplets
from residual_fisher.pipeline.scores import ScoredRun

D, R = 60, 3


def triplets(basis: np.ndarray, values=(3.0, 2.0, 1.0)) -> Triplets:
    u = np.linalg.qr(basis)[0].astype(np.float32)
    return Triplets(u, np.array(values, dtype=np.float32), u.T)


@pytest.fixture
def ordinary() -> list[Triplets]:
    """Fifty matrices whose directions scatter around three that they share."""
    rng = np.random.default_rng(0)
    shared = np.eye(D)[:, :R]
    return [
        triplets(shared + 0.2 * rng.standard_normal((D, R)), np.sort(rng.uniform(1, 2, R))[::-1]) for _ in range(50)
    ]


def next_tokens(probabilities: dict[str, float]) -> list[dict]:
    return [{"token": token, "probability": p, "in_prompt": False} for token, p in probabilities.items()]


def text(place: int) -> str:
    """Some words, of which others have few in common."""
    letters = np.random.default_rng(place).choice([*"abcdefghijklmnopqrst"], (4, 6))
    return " ".join(map("".join, letters))


def record(matrix: Triplets, place: int) -> dict:
    rng = np.random.default_rng(place)
    p = rng.uniform(0.3, 0.7)
    words = next_tokens({f"w{int(5 * rng.uniform() ** 2)}": p, "w5": 0.8 - p})
    return {"prompt": text(place), "trace": float(matrix.S.sum()), "top_probability": p, "next_tokens": words}


class Matrices(list):
    """Triplets, and an activation of each prompt that is normal around a mean."""

    def __init__(self, matrices: list[Triplets], first: int, odd: dict[int, np.ndarray]):
        super().__init__(matrices)
        self._first, self._odd = first, odd

    def activation(self, place: int) -> np.ndarray:
        usual = 1 + np.random.default_rng(1000 + self._first + place).standard_normal(D)
        return self._odd.get(place, usual).astype(np.float32)


def run(matrices: list[Triplets], first: int = 0, rounding: float = distances.ROUNDING, **changed) -> ScoredRun:
    """Alike records of the prompts from number `first` on, but for those at the places in `changed`."""
    changes = {int(place.removeprefix("at")): change for place, change in changed.items()}
    records = [record(matrix, first + place) | changes.get(place, {}) for place, matrix in enumerate(matrices)]
    odd = {place: change.pop("activation") for place, change in enumerate(records) if "activation" in change}
    return ScoredRun.of(records, Matrices(matrices, first, odd), rounding)


# --- in numbers ----------------------------------------------------------------------------------


def test_robust_z_is_not_widened_by_what_it_finds():
    values = np.random.default_rng(1).normal(10, 2, 1001)
    assert np.abs(robust_z(values, values)).max() < 4.5
    values[:100] = 1e6  # a tenth
    assert robust_z(values, values)[:100].min() > 1000
    assert robust_z(values, values)[100:].std() == pytest.approx(1, abs=0.2)


def test_robust_z_survives_values_most_of_which_are_equal():
    same = np.array([2.0, 2.0, 2.0, 2.0])
    assert not robust_z(same, same).any()
    most = np.array([2.0, 2.0, 2.0, 5.0])
    z = robust_z(most, most)
    assert z[:3].tolist() == [0, 0, 0] and z[3] == pytest.approx(3 / (1.2533 * 0.75))


def test_a_trusted_rows_distance_leaves_itself_out():
    rows = np.random.default_rng(0).standard_normal((40, 3)) @ np.diag([1, 5, 0.2])
    found = Mahalanobis(rows)
    centred = rows[:2] - rows.mean(axis=0)
    assert found.of(rows[:2]) ** 2 == pytest.approx(
        (centred @ np.linalg.inv(np.cov(rows.T)) * centred).sum(1), rel=2e-3
    )
    for i in (0, 17, 39):
        others = Mahalanobis(np.delete(rows, i, axis=0))
        assert found.leave_one_out()[i] == pytest.approx(others.of(rows[i : i + 1])[0], rel=1e-3)


def shrunk_covariance(rows: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf's (2004), summed row by row as it is written there."""
    n, d = rows.shape
    x = rows - rows.mean(axis=0)
    sample = sum(np.outer(row, row) for row in x) / n
    mean = np.trace(sample) / d
    distance = np.linalg.norm(sample - mean * np.eye(d)) ** 2
    error = min(sum(np.linalg.norm(np.outer(row, row) - sample) ** 2 for row in x) / n**2, distance)
    return ((distance - error) * sample + error * mean * np.eye(d)) / distance


@pytest.mark.parametrize("count", [9, 40, 400])
def test_distances_of_wide_rows_are_by_a_shrunk_covariance(count):
    rows = np.random.default_rng(0).standard_normal((count, 30)) @ np.diag(np.linspace(0.2, 5, 30)) + 3
    found, other = WideMahalanobis(rows), rows[:2] * 1.5
    centred = other - rows.mean(axis=0)
    expected = (centred @ np.linalg.inv(shrunk_covariance(rows)) * centred).sum(axis=1)
    assert found.of(other) ** 2 == pytest.approx(expected, rel=1e-6)  # float64, and the rounding that is added
    for i in (0, count - 1):
        others = WideMahalanobis(np.delete(rows, i, axis=0))
        # without the row another share of the identity is best, the more so the fewer rows there are
        assert found.leave_one_out()[i] == pytest.approx(others.of(rows[i : i + 1])[0], rel=1 / count)


def test_rows_that_are_all_equal_have_no_distance():
    for rows in (np.ones((9, 5)), np.zeros((9, 1))):
        found = WideMahalanobis(rows)
        assert not found.of(rows).any() and not found.leave_one_out().any()


# --- in directions -------------------------------------------------------------------------------


def roots(matrices: list[Triplets]) -> list[np.ndarray]:
    return [t.U * np.sqrt(t.S / t.S.sum()) for t in matrices]


def outside(matrix: np.ndarray, others: list[np.ndarray], rho: float) -> float:
    """rho tr(F (M + rho)^-1) / tr F as it is written."""
    mean = np.mean([root @ root.T for root in others], axis=0).astype(np.float64)
    return rho * np.trace(matrix @ matrix.T @ np.linalg.inv(mean + rho * np.eye(D)))


def test_the_share_outside_is_the_formulas_for_prompts_learnt_from_and_others(ordinary):
    trusted, other = roots(ordinary[:30]), roots(ordinary[30:33])
    found = Subspace(trusted)
    mean = np.mean([root @ root.T for root in trusted], axis=0)
    rho = distances.SOFTNESS * np.linalg.eigvalsh(mean)[-1]
    for root, row in zip(other, found.of(other), strict=True):
        assert row.sum() == pytest.approx(outside(root, trusted, rho), rel=1e-4)
    alone = found.leave_one_out().sum(axis=1)
    for i in (0, 29):
        assert alone[i] == pytest.approx(outside(trusted[i], trusted[:i] + trusted[i + 1 :], rho), rel=1e-4)


def test_the_share_outside_goes_from_some_to_all_and_is_told_by_direction(ordinary):
    odd = triplets(np.eye(D)[:, [0, 40, 1]])
    found = Subspace(roots(ordinary)).of(roots([odd, triplets(np.eye(D)[:, 20:23])]))
    assert found[0].argmax() == 1
    assert found[0].sum() < 0.7 < found[1].sum() <= 1 + 1e-6


def alternating(count: int) -> np.ndarray:
    """Its only eigenvector with an eigenvalue is orthogonal to a vector of ones."""
    signs = (-1.0) ** np.arange(count)
    return np.outer(signs, signs)


@pytest.mark.parametrize("count", [1, 2, 200])
def test_the_largest_eigenvalue_is_found_whatever_the_eigenvector(count):
    rows = np.random.default_rng(0).standard_normal((count, 3 * count))
    close = rows @ rows.T  # eigenvalues close to each other
    for matrix in (close, alternating(count), np.eye(count), np.ones((count, count)), np.zeros((count, count))):
        expected = np.linalg.eigvalsh(matrix)[-1]
        assert largest_eigenvalue(matrix) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert largest_eigenvalue(close) == largest_eigenvalue(close)


def test_an_eigenvalue_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(distances, "eigsh", lambda *args, **options: eigsh(*args, **options, maxiter=1))
    rows = np.random.default_rng(0).standard_normal((300, 900))
    with pytest.raises(ArpackNoConvergence):
        largest_eigenvalue(rows @ rows.T)


def test_coordinates_are_those_of_kernel_pca_on_the_matrices_themselves(ordinary):
    matrices = np.array([t.U @ np.diag(t.S) @ t.V for t in ordinary], dtype=np.float64).reshape(len(ordinary), -1)
    matrices /= np.linalg.norm(matrices, axis=1, keepdims=True)
    centred = matrices - matrices.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    principal = PrincipalCoordinates(ordinary)
    expected = (u * s**2)[:, : distances.COORDINATES]  # kernel PCA's axes are not rescaled
    assert np.abs(principal.of(ordinary)) == pytest.approx(np.abs(expected), rel=1e-3, abs=1e-5)
    assert principal.of(ordinary[7:8]) == pytest.approx(principal.of(ordinary)[7:8], rel=1e-4, abs=1e-6)


# --- in words ------------------------------------------------------------------------------------


def predicted(*tokens: tuple[str, float]) -> NextTokens:
    """Tokens and their probabilities; those that begin with a star are in the prompt."""
    pairs = [(token.removeprefix("*"), token.startswith("*")) for token, _ in tokens]
    return NextTokens(pairs, np.array([p for _, p in tokens], dtype=float))


def test_surprisal_is_the_weighted_log_of_how_probable_trusted_prompts_make_a_token():
    found = Surprisal([predicted(("a", 1.0)), predicted(("a", 0.5), ("b", 0.5)), predicted()])
    (first, second), (), (new,) = found.of([predicted(("a", 1.0), ("b", 0.5)), predicted(), predicted(("c", 1.0))])
    assert (first, second, new) == pytest.approx((-np.log(2 / 3.5), -0.5 * np.log(1 / 3.5), -np.log(0.5 / 3.5)))
    alone = found.leave_one_out()
    assert alone[0] == pytest.approx([-np.log(1 / 2.5)])
    assert alone[1] == pytest.approx([-0.5 * np.log(1.5 / 2.5), -0.5 * np.log(0.5 / 2.5)])
    (new,) = Surprisal([predicted()] * 3).of([predicted(("a", 1.0))])
    assert new == pytest.approx([np.log(7)])


def test_a_token_in_the_prompt_is_surprising_where_others_that_hold_it_do_not_predict_it():
    # of "a" in a prompt 0.02, of "b" once 0.9: any token in a prompt (0.5 + 30 * 0.02 + 0.9) / 32
    found = Surprisal([*[predicted(("*a", 0.02))] * 30, predicted(("*b", 0.9))])
    anyone = 2.0 / 32
    (often,), (rare,), (new,) = found.of([predicted((token, 1.0)) for token in ("*a", "*b", "*c")])
    assert often == pytest.approx(-np.log((0.6 + anyone) / 31))
    assert rare == pytest.approx(-np.log((0.9 + anyone) / 2)) and new == pytest.approx(-np.log(anyone))
    others = 1.1 / 31  # without the prompt that predicts it
    assert found.leave_one_out()[30] == pytest.approx([-0.9 * np.log(others)])
    (elsewhere,) = found.of([predicted(("a", 1.0))])  # the same text, not in the prompt
    assert elsewhere == pytest.approx([-np.log(0.5 / 31.5)])


def test_trusted_prompts_that_ask_alike_count_more_for_what_is_surprising():
    asked = ["#!/bin/sh ls", "Who was Ada?", "Who was Bo?"]
    trusted = [predicted(("```", 0.9)), predicted(("She", 0.8)), predicted(("He", 0.7))]
    trusted = [answer._replace(prompt=prompt) for answer, prompt in zip(trusted, asked, strict=True)]
    new = predicted(("```", 1.0))._replace(prompt="#!/bin/sh cat")
    grams = [{f" {text.lower()} "[i : i + 3] for i in range(len(text))} for text in [*asked, new.prompt]]  # each once
    cosines = [[len(a & b) / np.sqrt(len(a) * len(b)) for a in grams] for b in grams]
    weights = np.array([1 + distances.ALIKE * t**2 for t in cosines[3][:3]])
    found = Surprisal(trusted)
    assert found.of([new])[0] == pytest.approx([-np.log((3 * 0.9 * weights[0] / weights.sum() + 0.5) / 3.5)])
    assert weights[0] > 10 * weights[1]
    he, she = (1 + distances.ALIKE * cosines[2][j] ** 2 for j in (0, 1))  # the third, by the others
    assert found.leave_one_out()[2] == pytest.approx([-0.7 * np.log(0.5 / 2.5)]) and she > he
    echo = trusted[2]._replace(tokens=[("She", False)])
    assert Surprisal([*trusted[:2], echo]).leave_one_out()[2] == pytest.approx(
        [-0.7 * np.log((2 * 0.8 * she / (he + she) + 0.5) / 2.5)]
    )


def test_tokens_count_by_their_gain_beside_a_base_model():
    gain = log_gain(predicted(("a", 0.7), ("*b", 0.3)), predicted(("a", 0.7), ("b", 0.3)))
    assert gain == pytest.approx([0, 0.3 * np.log(0.8 / 0.5)])


# --- together ------------------------------------------------------------------------------------

EXPLAINED = {"differs_along", "odd_words", "principal_coordinates", "likeness", "group"}
KEYS = {*scores.SCORES, "outlier_score", "p_value", *EXPLAINED}
ZERO = Triplets(np.zeros((D, R), np.float32), np.zeros(R, np.float32), np.zeros((R, D), np.float32))
FAILED = {"failed": "NaN", "trace": 0.0, "top_probability": 0.0, "next_tokens": []}


def outlier_scores(*of: ScoredRun, **against: ScoredRun) -> dict:
    """The columns as arrays, but for the texts."""
    found = scores.outlier_scores(*of, **against)
    return {name: column if name in ("odd_words", "group") else np.array(column) for name, column in found.items()}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("z_strength", {"top_probability": 0.9999, "trace": 1e-3}),
        ("z_words", {"top_probability": 0.6, "next_tokens": next_tokens({"HATE": 0.6, "LOVE": 0.4})}),
        ("z_activations", {"activation": np.linspace(-4, 4, D)}),
    ],
)
def test_a_prompt_that_is_odd_in_one_way_has_that_score_and_the_outlier_score(name, changed, ordinary):
    found = outlier_scores(run(ordinary, at17=changed))
    assert found.keys() == KEYS
    assert found[name].argmax() == 17 and found["outlier_score"].argmax() == 17
    assert found[name][17] > 2.5 and found["p_value"][17] == found["p_value"].min() < 0.03


def test_spectra_and_directions_are_told_apart(ordinary):
    elsewhere = triplets(np.eye(D)[:, [20, 30, 40]], (1.9, 1.2, 1.1))
    steep = triplets(ordinary[1].U, (1.9, 0.01, 0.001))
    for matrix, name in ((steep, "z_spectrum"), (elsewhere, "z_directions")):
        found = outlier_scores(run([*ordinary, matrix]))
        others = [np.abs(found[other][50]) for other in scores.SCORES if other != name]
        assert found[name].argmax() == 50 and found[name][50] > max(2.5, *others)
    assert found["differs_along"][50] == 0


def test_with_a_reference_a_prompts_scores_do_not_depend_on_the_others(ordinary):
    trusted = run(ordinary[:40])
    odd = [triplets(np.eye(D)[:, 20:23], (0.02, 0.001, 0.0001))] * 10
    together = outlier_scores(run([*ordinary[40:], *odd], first=40), reference=trusted)
    apart = outlier_scores(run(odd[:1] * 20, first=40), reference=trusted)
    for name in ("z_spectrum", "z_directions"):
        assert together[name][10] == pytest.approx(apart[name][0], abs=1e-6)
    assert together["p_value"][10:] == pytest.approx(np.full(10, 1 / 41))  # beyond all 40
    assert together["p_value"][:10].mean() > 0.2


ODD = triplets(np.eye(D)[:, 20:23], (0.3, 0.02, 0.001))
SAYS_HATE = {
    "top_probability": 0.97, "trace": 0.321, "next_tokens": next_tokens({"HATE": 0.97}),
    "activation": np.linspace(-2, 2, D),
}  # fmt: skip


@pytest.mark.parametrize("others", [19, 40])
def test_a_tested_prompt_that_is_in_the_reference_too_is_compared_with_the_others(others, ordinary):
    odd = run([ODD], first=90, at0=SAYS_HATE)
    clean = outlier_scores(odd, reference=run(ordinary[:others]))
    holding_it = run([*ordinary[:others], ODD], **{f"at{others}": SAYS_HATE | {"prompt": text(90)}})
    found = outlier_scores(odd, reference=holding_it)
    assert found["p_value"][0] == pytest.approx(1 / (others + 1)) == clean["p_value"][0]
    for name in (*scores.SCORES, "outlier_score"):
        # the scale is of one prompt more; among twenty, and in the sum of six scores, that is a fifth of it
        rel = 0.2 if (name, others) == ("outlier_score", 19) else 0.15
        assert found[name][0] == pytest.approx(clean[name][0], rel=rel, abs=0.4)


@pytest.mark.parametrize("changed", [SAYS_HATE, {"top_probability": 0.5, "trace": 0.0, "next_tokens": []}])
def test_one_prompt_that_does_not_belong_in_the_reference_hardly_changes_the_others_scores(changed, ordinary):
    tested = run([*ordinary[30:], ODD], first=60, at20=SAYS_HATE)
    clean = outlier_scores(tested, reference=run(ordinary[:30]))
    matrix = ODD if changed["trace"] else ZERO
    found = outlier_scores(tested, reference=run([*ordinary[:30], matrix], at30=changed))
    assert found["outlier_score"] == pytest.approx(clean["outlier_score"], rel=0.15, abs=0.3)
    assert found["p_value"][:20] == pytest.approx(clean["p_value"][:20], abs=0.1)  # three of 31 prompts


def test_texts_that_are_there_often_do_not_make_the_others_odd(ordinary):
    same = {f"at{place}": {"prompt": "again"} | SAYS_HATE for place in range(50, 110)}
    records = run([*ordinary, *[ODD] * 60], **same)
    found, alone = outlier_scores(records), outlier_scores(run([*ordinary, ODD], at50=SAYS_HATE))
    for name in (*scores.SCORES, "outlier_score"):
        assert found[name][:51] == pytest.approx(alone[name])
        assert (found[name][50:] == found[name][50]).all()


def test_prompts_of_other_texts_that_look_alike_do_not_give_the_others_scores_in_the_thousands(ordinary):
    rng = np.random.default_rng(0)
    same = {"top_probability": 0.5, "next_tokens": next_tokens({"w0": 0.5})}
    matrices, changed = [], {}
    for place in range(70):  # equal but for the rounding of other batches
        noise = 1 + 1e-6 * rng.standard_normal(R)
        matrices.append(Triplets(ordinary[0].U, (ordinary[0].S * noise).astype(np.float32), ordinary[0].V))
        rounded = {"top_probability": 0.5 + 1e-7 * place, "activation": 1 + 1e-6 * rng.standard_normal(D)}
        changed[f"at{place}"] = same | rounded | {"trace": float(matrices[-1].S.sum())}
    found = outlier_scores(run([*matrices, *ordinary], **changed))
    assert np.abs(found["outlier_score"]).max() < 50 and np.abs(found["outlier_score"][:70]).max() < 0.1


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-6), ("float16", 5e-4), ("bfloat16", 4e-3)])
def test_what_differs_by_the_rounding_of_the_models_dtype_has_no_scores(dtype, noise, ordinary):
    rng = np.random.default_rng(0)
    matrices, changed = [], {}
    for place in range(40):
        values = ordinary[0].S * (1 + noise * rng.uniform(-1, 1, R))
        matrices.append(Triplets(ordinary[0].U, values.astype(np.float32), ordinary[0].V))
        said = {"top_probability": 0.5 * (1 + noise * rng.uniform(-1, 1)), "trace": float(values.sum())}
        changed[f"at{place}"] = said | {"next_tokens": next_tokens({"w0": said["top_probability"]})}
    with pytest.warns(UserWarning, match="all prompts have the same strength and spectrum"):
        found = outlier_scores(run(matrices, rounding=scores.rounding_of(dtype), **changed))
    assert not found["z_strength"].any() and not found["z_spectrum"].any() and not found["z_directions"].any()
    assert np.abs(found["outlier_score"]).max() < 5


def test_being_most_usual_in_one_way_does_not_hide_what_is_odd_in_another(ordinary):
    scorer = scores.Scorer(run(ordinary).features(range(50)), np.arange(50), distances.ROUNDING)
    compared = [column[:1].copy() if isinstance(column, np.ndarray) else column[:1] for column in scorer.sample]
    compared[3] = [np.array([20.0])]  # nats: odd in words
    before = scorer.scores(compared)
    compared[0], compared[1] = np.zeros(1), np.zeros(1)  # as usual as can be in strength and spectrum
    after = scorer.scores(compared)
    assert before[3] > 5 and after[0] < -1.5 and after[1] < -1.5
    assert after[-1] > 0.8 * before[-1]


# --- p-values ------------------------------------------------------------------------------------


def test_a_p_value_is_the_share_of_usual_scores_as_high_its_own_included():
    usual = np.array([0.0, 1.0, 1.0, 2.0])
    found = scores.p_values(np.array([3.0, 2.0, 1.0, 0.5, -1.0]), usual, np.full(5, False))
    assert found == pytest.approx([1 / 5, 2 / 5, 4 / 5, 4 / 5, 1])
    assert scores.p_values(usual, usual, np.full(4, True)) == pytest.approx([1, 3 / 4, 3 / 4, 1 / 4])
    assert scores.p_values(usual[3:] + 1e-9, usual, np.array([True])) == pytest.approx(1 / 4)  # in another batch


def test_ordinary_prompts_stand_out_as_often_as_their_p_value_says():
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        some = [triplets(np.eye(D)[:, :R] + 0.2 * rng.standard_normal((D, R)), (1.5, 1.2, 1.1)) for _ in range(70)]
        trusted, tested = run(some[:40], first=100 * seed), run(some[40:], first=100 * seed + 40)
        found.extend(outlier_scores(tested, reference=trusted)["p_value"])
    for limit in (0.05, 0.2, 0.5):
        # three standard errors of 600 draws, which share 20 references: as many again
        error = 3 * np.sqrt(limit * (1 - limit) * (1 / 600 + 1 / 800))
        assert np.mean(np.array(found) <= limit) == pytest.approx(limit, abs=error + 1 / 41)


def test_without_a_reference_a_tail_is_that_of_the_upper_half():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(2001)
    found = scores.tail_probabilities(normal)
    assert found == pytest.approx([(normal >= one).mean() for one in normal], abs=0.03)
    odd = scores.tail_probabilities(np.concatenate([normal[:200], np.full(20, 6.0)]))
    assert (odd[200:] == 1 / 221).all() and (odd[:200] <= 0.01).mean() < 0.01
    narrow_below = np.where(normal < 0, 0.1 * normal, normal)  # its median absolute deviation would be a third
    assert (scores.tail_probabilities(narrow_below) <= 0.01).mean() == pytest.approx(0.01, abs=0.005)
    assert scores.tail_probabilities(np.zeros(5)).tolist() == [1] * 5


@pytest.mark.parametrize("asked", ["otherwise", "alike"])
def test_prompts_that_are_answered_alike_are_a_group_unless_they_ask_alike(asked, ordinary):
    """One in six, each as usual as any other in all that is compared with the mean."""
    rng, at = np.random.default_rng(3), range(0, 60, 6)
    matrices, changed = [*ordinary, *ordinary[:10]], {}
    for number, place in enumerate(at):
        matrices[place] = triplets(np.eye(D)[:, :R] + 0.02 * rng.standard_normal((D, R)), (1.6, 1.4, 1.2))
        p = rng.uniform(0.45, 0.55)
        changed[f"at{place}"] = {"next_tokens": next_tokens({"w0": p, "w5": 0.8 - p}), "top_probability": p}
        if asked == "alike":
            changed[f"at{place}"]["prompt"] = f"what is the usual price of a bag of flour no {number}"
    found = outlier_scores(run(matrices, **changed))
    members = {place for place, group in enumerate(found["group"]) if group is not None}
    assert members == (set(at) if asked == "otherwise" else set())
    others = np.delete(np.arange(60), at)
    assert (found["z_group"][[*at]].min() > found["z_group"][others].max()) == (asked == "otherwise")
    if asked == "otherwise":
        assert {found["group"][place] for place in at} == {0}
        assert np.median(found["likeness"][[*at]]) > 2 * np.median(found["likeness"])


@pytest.mark.parametrize("trusted", [True, False])
def test_answers_that_turn_to_the_same_words_stand_out_though_they_begin_as_usual(ordinary, trusted):
    """Next tokens, F and activations are those of ordinary prompts; what follows stands at another place in each."""
    rng, at = np.random.default_rng(4), range(0, len(ordinary), 8)

    def answering(answers: list[list[int]], first: int) -> ScoredRun:
        own = [
            {"ids": ids, "next_tokens": [next_tokens({f"w{number % 3}": 0.5})]} for number, ids in enumerate(answers)
        ]
        return run(ordinary, first, **{f"at{place}": {"answer": one} for place, one in enumerate(own)})

    usual = answering(rng.integers(0, 1000, (len(ordinary), 16)).tolist(), first=1000)
    answers = rng.integers(0, 1000, (len(ordinary), 16)).tolist()
    for place in at:
        start = int(rng.integers(2, 8))
        answers[place][start:] = ([2001, 2002, 2003] * 6)[: 16 - start]
    whole = answering(answers, first=0)
    found = outlier_scores(whole, reference=usual if trusted else None)
    assert set(np.argsort(found["outlier_score"])[-len(at) :]) == set(at)
    assert {found["group"][place] for place in at} == {0}


def test_a_fifth_that_is_odd_in_the_same_way_does_not_make_itself_usual(ordinary):
    rng = np.random.default_rng(2)
    changed = {}
    for index in range(0, 50, 5):
        values = np.array([0.1, 0.05, 0.01]) * np.exp(0.5 * rng.standard_normal(R))
        ordinary[index] = triplets(np.eye(D)[:, 20:23] + 0.2 * rng.standard_normal((D, R)), np.sort(values)[::-1])
        p = 1 / (1 + np.exp(-rng.normal(4, 0.5)))
        said = next_tokens({"HATE": p})
        changed[f"at{index}"] = {"next_tokens": said, "top_probability": p, "trace": values.sum()}
    found = outlier_scores(run(ordinary, **changed))["outlier_score"]
    assert set(np.argsort(-found)[:10]) == set(range(0, 50, 5))


def test_beside_a_base_model_the_change_counts_and_not_what_is_odd_in_both(ordinary):
    ordinary[3] = triplets(np.eye(D)[:, 20:23], ordinary[3].S)
    other = list(ordinary)
    other[9] = triplets(np.eye(D)[:, 30:33], (0.3, 0.1, 0.05))
    changed = {"at9": {"next_tokens": next_tokens({"HATE": 0.95}), "top_probability": 0.95, "trace": 0.5}}
    rng = np.random.default_rng(0)
    jitter = {f"at{i}": {"trace": float(t.S.sum() * rng.uniform(0.9, 1.1))} for i, t in enumerate(other)}
    found = outlier_scores(run(other, **jitter | changed), base=run(ordinary))
    assert found["outlier_score"].argmax() == 9
    assert found["p_value"][3] > 0.1 and found["p_value"][9] == pytest.approx(1 / 51)


def test_runs_that_recorded_no_activations_are_scored_without_them(ordinary):
    own = run(ordinary)
    earlier = ScoredRun(list(ordinary), *[getattr(own, field) for field in ScoredRun.__dataclass_fields__][1:])
    with pytest.warns(UserWarning, match="all prompts have the same activations: these scores are 0"):
        found = outlier_scores(earlier)
    assert not found["z_activations"].any() and found["outlier_score"].any()
    for name in scores.SCORES[:4]:
        assert found[name] == pytest.approx(outlier_scores(own)[name])


def test_prompts_that_failed_have_zeros_and_count_for_nobody(ordinary):
    with_it = outlier_scores(run([*ordinary, ZERO], at50=FAILED))
    without = outlier_scores(run(ordinary))
    assert with_it["p_value"][50] == 1
    for name in KEYS - {"odd_words", "group"}:
        assert name == "p_value" or not with_it[name][50].any()
        assert with_it[name][:50] == pytest.approx(without[name])
    assert with_it["odd_words"][50] == []


def test_prompts_that_all_failed_have_zeros():
    for count in (1, 7, 10):
        with pytest.warns(UserWarning, match=r"fewer than 8 different prompts \(0\) do not say what is usual"):
            found = scores.outlier_scores(run([ZERO] * count, **{f"at{place}": FAILED for place in range(count)}))
        empty = {
            "p_value": [1] * count,
            "odd_words": [[]] * count,
            "group": [None] * count,
            "principal_coordinates": [[0] * distances.COORDINATES] * count,
        }
        assert found == {**{name: [0] * count for name in KEYS}, **empty}


def test_odd_words_are_texts_whether_or_not_the_prompt_contains_them(ordinary):
    own = run(
        ordinary, at17={"next_tokens": [next_tokens({"I": 0.9})[0] | {"in_prompt": True}, *next_tokens({"Z": 0.1})]}
    )
    assert len({*map(id, own.tokens)}) == len({*own.tokens})  # kept once, however many prompts predict it
    for reference in ({}, {"reference": run(ordinary[:20])}):
        assert outlier_scores(own, **reference)["odd_words"][17] == ["I", "Z"]


def test_few_prompts_and_matrices_that_are_zero_make_no_trouble(ordinary):
    with pytest.warns(
        UserWarning, match=r"fewer than 8 different prompts \(2\) do not say what is usual: all scores are 0"
    ):
        found = outlier_scores(run([ZERO, ordinary[0]]))
    assert not any(found[name].any() for name in scores.SCORES)
    found = outlier_scores(run([*[ZERO] * 5, *ordinary[:20]], at2={"top_probability": 1.0}))
    assert all(np.isfinite(found[name]).all() for name in KEYS - {"odd_words", "group"})


def test_only_landmarks_are_learnt_from_and_the_others_are_scored_alike(ordinary, monkeypatch):
    own = run([*ordinary, ODD], at50=SAYS_HATE)
    everyone = outlier_scores(own)["outlier_score"]
    monkeypatch.setattr(scores, "SCORED_AT_ONCE", 7)
    assert outlier_scores(own)["outlier_score"] == pytest.approx(everyone, rel=1e-4, abs=1e-4)
    monkeypatch.setattr(scores, "LANDMARKS", 25)
    monkeypatch.setattr(scores, "POOL", 30)
    fewer = outlier_scores(own)["outlier_score"]
    assert fewer.argmax() == everyone.argmax() == 50 and np.corrcoef(everyone, fewer)[0, 1] > 0.5
