"""Which prompts stand out: on matrices whose odd ones are known."""

import numpy as np
import pytest

from pipeline import scores
from pipeline.store import Triplets

D, R = 60, 3


def triplets(basis: np.ndarray, values=(3.0, 2.0, 1.0)) -> Triplets:
    u = np.linalg.qr(basis)[0].astype(np.float32)
    return Triplets(u, np.array(values, dtype=np.float32), u.T)


@pytest.fixture
def ordinary() -> list[Triplets]:
    """Fifty matrices whose directions scatter around three that they share."""
    rng = np.random.default_rng(0)
    shared = np.eye(D)[:, :R]
    return [triplets(shared + 0.2 * rng.standard_normal((D, R)), rng.uniform(1, 2, R)) for _ in range(50)]


def test_robust_z_is_not_widened_by_what_it_finds():
    values = np.random.default_rng(1).normal(10, 2, 1001)
    assert np.abs(scores.robust_z(values)).max() < 4.5
    values[:100] = 1e6  # a tenth
    assert scores.robust_z(values)[:100].min() > 1000
    assert scores.robust_z(values)[100:].std() == pytest.approx(1, abs=0.2)


def test_robust_z_survives_values_most_of_which_are_equal():
    assert not scores.robust_z(np.array([2.0, 2.0, 2.0, 2.0])).any()
    z = scores.robust_z(np.array([2.0, 2.0, 2.0, 5.0]))
    assert z[:3].tolist() == [0, 0, 0] and z[3] == pytest.approx(3 / (1.2533 * 0.75))


def test_the_mean_subspace_is_the_shared_one(ordinary):
    mean = scores.mean_subspace(ordinary)
    assert mean.shape == (D, R)
    assert np.linalg.svd(mean[:R]).S.min() > 0.95  # the first three axes


def test_the_distance_goes_from_none_to_all():
    mean = np.eye(D)[:, :R]
    assert scores.subspace_distance(triplets(np.eye(D)[:, :R]), mean) == pytest.approx(0, abs=1e-6)
    assert scores.subspace_distance(triplets(np.eye(D)[:, R : 2 * R]), mean) == pytest.approx(1, abs=1e-6)
    half = triplets(np.eye(D)[:, [0, 1, 10]], values=(2.0, 0.0, 2.0))
    assert scores.subspace_distance(half, mean) == pytest.approx(0.5, abs=1e-6)
    assert scores.subspace_distance(triplets(np.eye(D)[:, :R], values=(0.0, 0.0, 0.0)), mean) == 0


def test_a_single_odd_matrix_is_far_from_the_mean_subspace(ordinary):
    ordinary[17] = triplets(np.eye(D)[:, 20:23])
    mean = scores.mean_subspace(ordinary)
    distances = np.array([scores.subspace_distance(t, mean) for t in ordinary])
    assert scores.robust_z(distances).argmax() == 17
    assert scores.robust_z(distances)[17] > 3.5


def z_principal(matrices: list[Triplets]) -> np.ndarray:
    principal = scores.PrincipalCoordinates(matrices)
    coordinates = principal.coordinates(matrices)
    assert coordinates.shape == (len(matrices), scores.COORDINATES)
    return np.abs([scores.robust_z(column) for column in coordinates.T]).max(axis=0)


@pytest.mark.parametrize("landmarks", [256, 25])
def test_a_group_that_is_odd_in_the_same_way_stands_out_on_a_coordinate(ordinary, landmarks, monkeypatch):
    monkeypatch.setattr(scores, "LANDMARKS", landmarks)
    rng = np.random.default_rng(2)
    odd = list(range(0, 50, 7))
    for index in odd:
        ordinary[index] = triplets(np.eye(D)[:, 20:23] + 0.1 * rng.standard_normal((D, R)))
    z = z_principal(ordinary)
    assert set(np.argsort(-z)[: len(odd)]) == set(odd)
    assert z[odd].min() > 3.5


def test_coordinates_are_those_of_kernel_pca_on_the_matrices_themselves(ordinary):
    matrices = np.array([t.U @ np.diag(t.S) @ t.V for t in ordinary], dtype=np.float64).reshape(len(ordinary), -1)
    matrices /= np.linalg.norm(matrices, axis=1, keepdims=True)
    centred = matrices - matrices.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    principal = scores.PrincipalCoordinates(ordinary)
    expected = (u * s**2)[:, : scores.COORDINATES]  # kernel PCA's axes are not rescaled
    assert np.abs(principal.coordinates(ordinary)) == pytest.approx(np.abs(expected), rel=1e-3, abs=1e-5)
    assert principal.coordinates(ordinary[7:8]) == pytest.approx(
        principal.coordinates(ordinary)[7:8], rel=1e-4, abs=1e-6
    )


def test_few_prompts_and_matrices_that_are_zero_make_no_trouble():
    zero = Triplets(np.zeros((D, R), np.float32), np.zeros(R, np.float32), np.zeros((R, D), np.float32))
    for matrices in ([zero], [zero, zero], [zero, triplets(np.eye(D)[:, :R])]):
        principal = scores.PrincipalCoordinates(matrices)
        assert np.isfinite(principal.coordinates(matrices)).all()
        assert all(scores.subspace_distance(t, scores.mean_subspace(matrices)) <= 1 for t in matrices)


def test_scores_come_by_prompt_and_the_outlier_score_is_the_largest(ordinary):
    ordinary[17] = triplets(np.eye(D)[:, 20:23], values=(30.0, 2.0, 1.0))
    found = scores.outlier_scores(ordinary)
    assert {name: column.shape for name, column in found.items()} == {
        "z_log_lambda": (50,), "subspace_distance": (50,), "z_subspace": (50,),
        "principal_coordinates": (50, scores.COORDINATES), "z_principal": (50,), "outlier_score": (50,),
    }  # fmt: skip
    assert found["z_log_lambda"] == pytest.approx(scores.robust_z(np.log([t.S[0] for t in ordinary])), rel=1e-5)
    assert found["z_subspace"] == pytest.approx(scores.robust_z(found["subspace_distance"]))
    principal = [scores.robust_z(column) for column in found["principal_coordinates"].T]
    assert found["z_principal"] == pytest.approx(np.abs(principal).max(axis=0))
    three = [np.abs(found["z_log_lambda"]), found["z_subspace"], found["z_principal"]]
    assert found["outlier_score"] == pytest.approx(np.max(three, axis=0))
    assert found["outlier_score"].argmax() == 17
