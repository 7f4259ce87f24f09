"""Measures of hand-made records, against values worked out by hand."""

import math

import numpy as np
import pytest

from spiral_jax.evaluation.measures import accuracy, any_correct, columns, set_votes, vote
from spiral_jax.evaluation.results import summarise


def stage(answer, length=None, cut_off=None):
    return {
        "answer": answer,
        "length": length or [1] * len(answer),
        "cut_off": cut_off or [0] * len(answer),
    }


def record(search, sets, aggregated, rsa=((0, 0),), limits=()):
    return {
        "index": 0,
        "id": "p",
        "search": search,
        "limits": [{"limit": limit, "answer": answer} for limit, answer in limits],
        "aggregation": {"member": sets} | aggregated,
        "rsa": [round if isinstance(round, dict) else stage(list(round)) for round in rsa],
    }


def mean(records, name, q=0):
    total, count = columns(records)[name]
    return total[:, q].sum() / count[:, q].sum()


def test_shares_and_votes_leave_errors_of_ours_out():
    assert accuracy([0, 1, None, -1]) == pytest.approx(1 / 3)
    assert math.isnan(accuracy([-1, -1])) and math.isnan(any_correct([-1]))
    assert any_correct([0, -1]) == 1.0 and any_correct([1, None, -1]) == 0.0
    assert vote([0, 1, -1, -1]) == 0.5 and vote([None, 0, None]) == 1.0 and vote([1, 1, 0]) == 0.0
    assert set_votes(stage([0, 1, 1, None]), [[0, 1], [1, 2], [0, 3]]) == [0.5, 0.0, 1.0]


def test_curves_count_a_problem_up_to_its_samples_that_are_no_errors():
    records = [
        record(stage([0, 1, 1, -1]), [[0]], stage([0])),
        record(stage([1, 1, 1, 1]), [[0]], stage([0])),
    ]
    total, count = columns(records)["pass_at_k"]
    np.testing.assert_allclose(total, [[1 / 3, 2 / 3, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(count, [[1, 1, 1, 0], [1, 1, 1, 1]])
    total, _ = columns(records)["majority_at_k"]
    np.testing.assert_allclose(total, [[1 / 3, 1 / 3, 0, 0], [0, 0, 0, 0]], atol=1e-15)


def test_a_set_is_mixed_if_its_candidates_have_two_strategies():
    search = stage([1] * 6) | {"strategy": ["left", "left", "right", None, "left", None]}
    sets = [[0, 1], [1, 2], [2, 3], [3, 5]]  # mixed: no, yes, no (none is no strategy), no
    aggregated = stage([0, 1, 0, 0, 1, -1, 0, 0])
    others = stage([1] * 6) | {"strategy": ["right"] * 2 + ["left"] * 4}
    other = record(others, [[0, 5]], stage([0, 1]))
    records = [record(search, sets, aggregated), other]
    assert mean(records, "mixed") == pytest.approx(2 / 5)
    assert mean(records, "right_if_mixed") == pytest.approx((2 + 1) / (2 + 2))
    # an error of ours is no aggregation trace
    assert mean(records, "right_if_alike") == pytest.approx((1 + 0 + 2) / (2 + 1 + 2))
    assert mean(records, "commonest") == pytest.approx((3 + 4) / 12)
    assert summarise(records, 0)["strategies"]["mixed"]["mean"] == pytest.approx(2 / 5)
    assert "strategies" not in summarise([record(stage([1] * 6), sets, aggregated)], 0)


def test_mean_rewards_stand_beside_shares_where_answers_earn_partial_credit():
    """A stage without a reward of its own has the answers' zeros and ones; None is an error."""
    partial = stage([0, 1, 2, -1]) | {"reward": [1.0, 0.25, 0.0, None]}
    rounds = (stage([1, 2]) | {"reward": [0.5, 0.75]}, (0, -1))
    records = [
        record(partial, [[0, 1]], stage([0, 1]) | {"reward": [1.0, 0.5]}, rounds),
        record(stage([0, 0, 1, None]), [[0, 1]], stage([1, 1]), ((0, 0), (1, 1))),
    ]
    assert mean(records, "reward/single") == pytest.approx(((1 + 0.25) / 3 + 2 / 4) / 2)
    assert mean(records, "single") == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert mean(records, "reward/aggregated") == pytest.approx((0.75 + 0) / 2)
    by_round = [mean(records, "reward/rsa", t) for t in range(3)]
    assert by_round == pytest.approx([(1.25 / 2 + 1) / 2, (0.625 + 1) / 2, (1 + 0) / 2])
    measures = summarise(records, seed=0)["rewards"]
    assert [row["mean"] for row in measures["rsa"]] == pytest.approx(by_round)
    assert not [name for name in columns(records[1:]) if name.startswith("reward")]
    assert "rewards" not in summarise(records[1:], seed=0)


def test_rescue_and_spoil_are_shares_among_the_sets_of_their_kind():
    search = stage([0, 0, 1, 1, 2, None])
    # votes: right, tied, wrong, wrong; some right: yes, yes, no, no
    sets = [[0, 1], [0, 2], [2, 3], [4, 5]]
    aggregated = stage([0, 1, 0, 0, 0, 1, 1, 1])  # right: 1/2, 1, 1/2, 0
    records = [record(search, sets, aggregated)]
    assert mean(records, "aggregated") == pytest.approx(0.5)
    assert mean(records, "aggregated/majority") == pytest.approx(1.5 / 4)
    assert mean(records, "rescue_vote_wrong") == pytest.approx((0.5 * 1 + 1 * 0.5 + 0) / 2.5)
    assert mean(records, "spoil_vote_right") == pytest.approx((1 * 0.5 + 0.5 * 0) / 1.5)
    assert mean(records, "rescue_none_right") == pytest.approx((0.5 + 0) / 2)
    assert mean(records, "spoil_some_right") == pytest.approx((0.5 + 0) / 2)


def test_rates_pool_sets_over_problems_and_are_none_where_no_set_is_of_their_kind():
    right = record(stage([0, 0]), [[0], [1]], stage([0, 1]))
    wrong = record(stage([1, 1]), [[0], [1]], stage([1, -1]))  # set 1: no valid aggregation
    found = summarise([right, wrong], seed=0)
    assert found["spoil_some_right"]["mean"] == 0.5 and found["spoil_some_right"]["count"] == 1
    assert found["rescue_none_right"]["mean"] == 0.0
    only_right = summarise([right, right], seed=0)
    undefined = {"mean": None, "low": None, "high": None, "standard_error": None, "count": 0}
    assert only_right["rescue_none_right"] == undefined


def test_tokens_add_up_and_the_critical_path_takes_the_longest_of_each_stage():
    search = stage([0, 1, 1, 1], [10, 2, 4, 8], [1, 0, 0, 0])
    rsa = [stage([0, 1], [5, 3], [0, 1]), stage([0, 0], [2, 1])]
    records = [record(search, [[0, 1], [2, 3]], stage([0, 0, 0, 0], [1, 2, 3, 6]), rsa)]
    assert [mean(records, "tokens_at_k", q) for q in range(4)] == [6, 12, 18, 24]
    assert mean(records, "critical_path_at_k", 1) == pytest.approx(np.mean([10, 10, 10, 4, 8, 8]))
    assert mean(records, "critical_path_at_k", 3) == 10
    # a set's candidates and one aggregation trace
    assert mean(records, "aggregated/tokens") == 12 + 3
    assert mean(records, "aggregated/critical_path") == (10 + 8) / 2 + 3
    # round 0: the first two traces
    assert [mean(records, "rsa/tokens", t) for t in range(3)] == [12, 20, 23]
    assert [mean(records, "rsa/critical_path", t) for t in range(3)] == [10, 15, 17]
    assert [mean(records, "rsa/cut_off", t) for t in range(3)] == [0.5, 0.5, 0]
    assert mean(records, "cut_off/search") == 0.25


def test_rounds_have_mean_pass_vote_and_entropy_of_their_population():
    rsa = [stage([0, 0, 1, None]), stage([0, 0, 0, 0]), stage([None, None, -1, -1])]
    records = [record(stage([1, 2, 3, 0, 0]), [[0]], stage([0]), rsa)]
    assert [mean(records, "rsa/single", t) for t in range(4)] == [0.25, 0.5, 1, 0]
    assert [mean(records, "rsa/pass_at_n", t) for t in range(4)] == [1, 1, 1, 0]
    assert [mean(records, "rsa/majority", t) for t in range(4)] == [0.25, 1, 1, 0]
    assert mean(records, "rsa/entropy", 0) == pytest.approx(math.log(4))
    assert mean(records, "rsa/entropy", 2) == 0
    # no parsed answer, no entropy
    assert summarise(records, 0)["rsa"][3]["entropy"]["mean"] is None


def test_limits_have_their_own_answers_and_cut_offs_from_the_lengths():
    search = stage([0, 0, 1, 0], [3, 5, 5, 9], [0, 0, 1, 1])
    limits = [(3, [0, None, None, None]), (5, [0, 0, 1, None])]
    records = [record(search, [[0]], stage([0]), limits=limits)]
    found = summarise(records, 0)["limits"]
    assert [row["limit"] for row in found] == [3, 5]
    assert [row["single"]["mean"] for row in found] == [0.25, 0.5]
    assert [row["majority"]["mean"] for row in found] == [1, 1]
    # at 5: the one that reached it, and the longer one
    assert [row["cut_off"]["mean"] for row in found] == [0.75, 0.5]
    assert [row["tokens"] for row in found] == [3, 4.5]


def test_one_problem_has_means_without_intervals():
    found = summarise([record(stage([0, 1]), [[0]], stage([0]))], 0)
    lone = {"mean": 0.5, "low": None, "high": None, "standard_error": None, "count": 1}
    assert found["single"] == lone
    assert found["pass_at_k"][1]["mean"] == 1.0
