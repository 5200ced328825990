"""The gates and their calibration, against brute force over thresholds, pairs and queries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from meg_kernels.familiarity import (
    FamiliarityNetwork,
    Rewording,
    SimilarityGate,
    calibrate,
    nearest,
    transplant,
)

# Few distinct values, so that scores tie; some of them lie closer than any rounded threshold.
scores = st.lists(
    st.sampled_from([-2.0, -1e-3, -1e-7, -1e-8, 0.0, 1e-8, 0.25, 0.5, 0.500001, 0.75, 1.0]),
    min_size=1,
    max_size=8,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


# Calibration


@given(scores, scores)
def test_the_threshold_is_the_best_of_all(positive, negative):
    found = calibrate(torch.tensor(positive), torch.tensor(negative), 4)

    def decided(threshold):
        accepted = sum(score > threshold for score in positive) / len(positive)
        rejected = sum(score <= threshold for score in negative) / len(negative)
        return accepted, rejected

    # A threshold at each score decides in every way that there is, but for accepting all.
    best = max(sum(decided(t)) for t in [-math.inf, *positive, *negative])
    assert found.acceptance + found.rejection == pytest.approx(best)
    accepted, rejected = (
        (torch.tensor(positive) > found.threshold).double().mean(),
        (torch.tensor(negative) <= found.threshold).double().mean(),
    )
    assert (float(accepted), float(rejected)) == (found.acceptance, found.rejection)
    assert (found.num_positives, found.num_negatives) == (len(positive), len(negative))


@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_the_right_order(positive, negative):
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positive, negative)
    ]
    found = calibrate(torch.tensor(positive), torch.tensor(negative), 4)
    assert found.auroc == pytest.approx(sum(wins) / len(wins))


def test_the_threshold_lies_in_the_middle_of_the_gap():
    found = calibrate(torch.tensor([0.75, 1.0]), torch.tensor([-0.5, 0.25]), 4)
    assert (found.threshold, found.auroc) == (0.5, 1)
    assert (found.acceptance, found.rejection) == (1, 1)


@pytest.mark.parametrize("name", ["positive", "negative"])
@pytest.mark.parametrize(
    "bad", [torch.tensor([]), torch.tensor([0.5, math.nan]), torch.tensor([math.inf]), torch.eye(2)]
)
def test_scores_that_are_empty_or_not_finite_are_refused(name, bad):
    arguments = {"positive": torch.ones(2), "negative": torch.zeros(2), name: bad}
    arguments["num_edited"] = 4
    with pytest.raises(ValueError, match=f"^{name} must be finite scores, at least one; got"):
        calibrate(**arguments)


# Transplanting


def test_transplanting_maps_origin_to_target_and_keeps_lengths_and_angles():
    origin, target, z = (unit(50, 16, seed=seed) for seed in range(3))
    torch.testing.assert_close(transplant(origin, origin, target), target)
    moved = transplant(z, origin, target)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close((moved * target).sum(-1), (z * origin).sum(-1))


def test_transplanting_keeps_the_angles_between_all_that_is_moved_alike():
    origin, target = unit(1, 16, seed=0), unit(1, 16, seed=1)
    z = unit(20, 16, seed=2)
    moved = transplant(z, origin, target)
    torch.testing.assert_close(moved @ moved.T, z @ z.T)


def test_a_rewording_is_as_far_from_its_query_as_a_known_paraphrase_is():
    queries, paraphrases, z = unit(6, 16, seed=0), unit(6, 16, seed=1), unit(200, 16, seed=2)
    moved = Rewording(queries, paraphrases)(z, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(200, dtype=torch.float64))
    cosines = (moved * z).sum(-1, keepdim=True)
    known = (queries * paraphrases).sum(-1)
    taken = (cosines - known).abs().argmin(1)
    torch.testing.assert_close(cosines[:, 0], known[taken])
    assert taken.unique().tolist() == list(range(6))  # all of them are used


def test_transplanting_to_the_same_place_changes_nothing():
    origin, z = unit(5, 16, seed=0), unit(5, 16, seed=1)
    torch.testing.assert_close(transplant(z, origin, origin), z, rtol=0, atol=0)


def test_transplanting_back_restores():
    origin, target, z = (unit(50, 16, seed=seed) for seed in range(3))
    torch.testing.assert_close(transplant(transplant(z, origin, target), target, origin), z)


# The similarity gate


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_the_nearest_query_is_found(queries, rows, seed):
    known, z = unit(queries, 4, seed=seed), unit(rows, 4, seed=seed + 1)
    similarity, row = nearest(z, known)
    assert similarity.shape == row.shape == (rows,)
    for i in range(rows):
        cosines = [float(F.cosine_similarity(z[i], query, dim=0)) for query in known]
        assert float(similarity[i]) == pytest.approx(max(cosines))
        assert int(row[i]) == cosines.index(max(cosines))
    assert torch.equal(SimilarityGate(known).score(z), similarity)
    assert torch.equal(SimilarityGate(known[:1], 0.5).over(known).score(z), similarity)


def test_a_known_query_is_its_own_nearest_with_cosine_one():
    known = unit(6, 4)
    similarity, row = nearest(known, known)
    assert row.tolist() == list(range(6))
    torch.testing.assert_close(similarity, torch.ones(6, dtype=torch.float64))


def test_nothing_is_near_where_nothing_was_edited():
    similarity, row = nearest(torch.randn(3, 4), torch.empty(0, 4))
    assert similarity.tolist() == [-1.0] * 3
    assert row.tolist() == [-1] * 3
    assert row.dtype == torch.int64


# The familiarity network


def clusters(count: int, around: int, seed: int, spread: float = 0.02):
    """[count] centres far from each other, and `around` unit vectors near each."""
    centres = unit(count, 32, seed=seed).float()
    generator = torch.Generator().manual_seed(seed + 1)
    noise = spread * torch.randn(count * around, 32, generator=generator)
    return centres, F.normalize(centres.repeat_interleave(around, 0) + noise, dim=-1)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FamiliarityNetwork(32, depth=2)


@pytest.mark.parametrize("with_outliers", [False, True])
def test_the_network_learns_which_queries_it_has_seen(network, with_outliers):
    edited, near = clusters(24, 4, seed=0)
    _, others = clusters(200, 1, seed=10)
    _, outliers = clusters(200, 1, seed=20)
    network.eval()
    before = calibrate(network.score(near), network.score(others), 4).auroc
    network.fit(edited, outliers if with_outliers else None, steps=150, learning_rate=3e-3)
    after = calibrate(network.score(near), network.score(others), 4).auroc
    assert before < 0.7
    assert after > (0.99 if with_outliers else 0.9)
    assert network.score(edited).min() > -0.5


def test_scores_are_minus_the_entropy_of_the_prediction(network):
    network.eval()
    z = 5 * unit(40, 32).float()
    p = network(z).double().softmax(-1)
    entropy = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(network.score(z).double(), -entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_scores_lie_between_unknown_and_certain(network, size):
    network.eval()
    with torch.no_grad():
        network.head.weight *= size
        network.head.bias *= size
    found = network.score(unit(40, 32).float())
    assert (found <= 0).all() and (found >= -math.log(10) - 1e-6).all()
    if size == 0:
        torch.testing.assert_close(found, torch.full((40,), -math.log(10)))
    if size == 1e4:
        assert found.max() > -1e-3


def test_training_depends_on_its_seed_alone(network, undrawn):
    edited, outliers = unit(6, 32).float(), unit(9, 32, seed=1).float()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def fitted(seed, outside):
        torch.manual_seed(outside)
        network.load_state_dict(start)
        network.fit(edited, outliers, steps=3, seed=seed)
        assert undrawn(outside)
        return network.score(edited)

    assert torch.equal(fitted(0, outside=1), fitted(0, outside=2))
    assert not torch.equal(fitted(0, outside=1), fitted(1, outside=1))
    assert not network.training


def test_an_empty_set_of_outliers_is_none(network):
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.fit(unit(6, 32).float(), torch.empty(0, 32), steps=2)
    found = network.score(unit(6, 32).float())
    network.load_state_dict(start)
    network.fit(unit(6, 32).float(), None, steps=2)
    assert torch.equal(found, network.score(unit(6, 32).float()))


def test_a_network_without_queries_is_refused(network):
    with pytest.raises(ValueError, match=r"^there are no queries to become familiar with$"):
        network.fit(torch.empty(0, 32))
