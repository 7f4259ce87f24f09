"""Two results side by side: known efficiency ratios, paired gaps, refusals."""

import copy
import json

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from spiral_jax import evaluate
from spiral_jax.evaluation import comparison
from spiral_jax.evaluation.comparison import compare, samples_needed, scaling_efficiency
from spiral_jax.evaluation.results import VERSION, ResultsError, summarise, write_results
from spiral_jax.evaluation.tables import comparison_tables

SETTINGS = {
    "temperature": 1.0,
    "subset_size": 2,
    "population": 2,
    "set_size": 1,
    "rounds": 2,
    "limits": [],
}


def results(correct_B, n, rsa_right_B=None, tokens=10, **settings):
    """Results whose problem b has correct_B[b] of n right search traces.

    RSA is right on the problems given, and so is plain aggregation.
    """
    records = []
    for b, correct in enumerate(correct_B):
        right = 0 if rsa_right_B is not None and rsa_right_B[b] else 1
        search = {
            "answer": [0] * correct + list(range(1, n - correct + 1)),
            "length": [tokens] * n,
            "cut_off": [0] * n,
        }
        plain = {"member": [[0, 1]], "answer": [right], "length": [tokens], "cut_off": [0]}
        population = {"answer": [right] * 2, "length": [tokens] * 2, "cut_off": [0, 0]}
        stages = {"search": search, "limits": [], "aggregation": plain, "rsa": [population] * 2}
        records.append({"index": b, "id": f"held_out:{b}"} | stages)
    count = len(records)
    return {
        "version": VERSION,
        "model": {"hf_path": "models/m", "adapter_path": "", "init_from": ""},
        "problems": {"task": "t", "reward": "", "count": count, "fingerprint": "same"},
        "scaffold": {"search": "{problem}", "thinking": "full"},
        "settings": SETTINGS | {"n": n} | settings,
        "counts": {},
        "records": records,
    }


def exact_curve(miss, n):
    """[1, n]: pass@k of problems that a trace misses with these chances."""
    return (1 - np.array(miss)[:, None] ** np.arange(1, n + 1)).mean(axis=0)[None]


def repeated(curve, rows=3):
    return np.repeat(curve, rows, axis=0)


def test_efficiency_is_exactly_four_where_a_trace_of_a_is_worth_four_of_b():
    # 1 - (m^4)^k = 1 - m^(4k) for every problem: B needs 4 k samples for what A has with k, so
    # A / B = 1/4.
    miss = np.random.default_rng(0).uniform(0.6, 0.999, 40)
    strong, weak = repeated(exact_curve(miss**4, 32)), repeated(exact_curve(miss, 128))
    for row in scaling_efficiency(strong, weak):
        assert row["samples_b"] == pytest.approx(4 * row["samples_a"], rel=1e-9)
        assert row["ratio"] == row["low"] == row["high"] == pytest.approx(0.25, rel=1e-9)
        assert row["bound"] is None
    reversed_rows = scaling_efficiency(weak, strong)
    assert [row["at"] for row in reversed_rows][-2:] == ["A at k=128", "both"]
    assert reversed_rows[-1]["ratio"] == pytest.approx(4)
    assert reversed_rows[0]["bound"] == "at least" and reversed_rows[0]["ratio"] == pytest.approx(1)
    # B reaches it at k = 1
    assert reversed_rows[2]["ratio"] == pytest.approx(4) and reversed_rows[2]["bound"] is None


def test_efficiency_of_sampled_counts_has_the_true_ratio_in_its_interval():
    rng = np.random.default_rng(1)
    miss = rng.uniform(0.7, 0.99, 300)
    a, b = (results(rng.binomial(64, 1 - chance), 64) for chance in (miss, miss**4))
    rows = {row["at"]: row for row in compare(a, b)["efficiency"]}
    assert rows["both"]["bound"] is None and rows["both"]["low"] < 4 < rows["both"]["high"]
    assert rows["A at k=16"]["ratio"] == pytest.approx(4, rel=0.1)
    assert 3 < rows["A at k=16"]["low"] < 4 < rows["A at k=16"]["high"] < 5


@pytest.mark.parametrize(
    ("level", "samples", "bound"),
    [
        (0.2, 1, 0),
        (0.3, 2**0.5, 0),
        (0.4, 2, 0),
        (0.6, (3 * 4) ** 0.5, 0),
        (0.8, 4, 0),
        (0.1, 1, -1),
        (0.9, 4, 1),
    ],
)
def test_interpolation_is_linear_in_log_k_and_takes_the_first_k_of_a_flat_stretch(
    level, samples, bound
):
    needed = samples_needed(np.array([[0.2, 0.4, 0.4, 0.8]]), np.array([level]))
    assert needed.samples_R == pytest.approx(samples) and needed.bound_R == bound


@pytest.mark.parametrize(
    ("curve_a", "curve_b", "bound"),
    [
        ((0.5, 0.55, 0.6, 0.62), (0.4, 0.4, 0.4, 0.4), "at most"),  # A needs less than one sample
        ((0.4, 0.4, 0.4, 0.4), (0.5, 0.55, 0.6, 0.62), "at least"),  # B does
        ((0.5, 0.55, 0.6, 0.62), (0.5, 0.5, 0.5, 0.5), None),  # both need exactly one
        ((0.5, 0.55, 0.6, 0.62), (0.4, 0.45, 0.5, 0.6), None),
        ((0.5, 0.6, 0.45, 0.4), (0.5, 0.6, 0.7, 0.8), None),  # A has had 0.6 before it fell
    ],
)
def test_the_highest_coverage_of_both_says_on_which_side_it_is_a_bound(curve_a, curve_b, bound):
    a, b = (repeated(np.array([curve])) for curve in (curve_a, curve_b))
    assert scaling_efficiency(a, b)[-1]["bound"] == bound


def test_a_curve_that_falls_stays_at_what_it_had_reached():
    fallen = np.array([[0.2, 0.5, 0.45, 0.8]])  # problems with fewer samples have left the mean
    assert samples_needed(fallen, np.array([0.5])).samples_R == 2


def test_gaps_are_paired_over_problems():
    rng = np.random.default_rng(2)
    correct = rng.integers(0, 8, 60)
    a = results(correct, 8, rsa_right_B=rng.random(60) < 0.3)
    b = results(correct + 1, 8, rsa_right_B=np.ones(60, bool))
    found = compare(a, b)
    gaps = {row["measure"]: row for row in found["gaps"]}
    single = gaps["single trace"]
    assert single["b"] - single["a"] == pytest.approx(1 / 8)
    # each problem gains the same: paired, nothing is uncertain, however much problems differ
    assert single["gap"]["low"] == single["gap"]["high"] == pytest.approx(1 / 8)
    assert gaps["RSA round 2"]["gap"]["mean"] == pytest.approx(1 - gaps["RSA round 2"]["a"])
    of_search = ["single trace", "pass@8", "maj@8"]
    assert list(gaps) == [*of_search, "aggregated pass@1, S=2", "RSA round 1", "RSA round 2"]
    for row in compare(a, copy.deepcopy(a))["gaps"]:
        assert row["gap"]["mean"] == row["gap"]["low"] == row["gap"]["high"] == 0


def with_failures(side, problems):
    """The first so many problems have lost a wrong trace each to an error of ours."""
    for record in side["records"][:problems]:
        record["search"]["answer"][-1] = -1
    return side


@pytest.mark.parametrize("failed", [39, 40])
def test_curves_end_where_nearly_all_problems_have_as_many_traces(failed):
    """Above k = 7 the mean would be over one problem that B never solves, or over none."""
    a, b = (results([right] * 39 + [0], 8) for right in (2, 4))
    whole = compare(a, b)
    found = compare(with_failures(copy.deepcopy(a), failed), with_failures(b, failed))
    both = found["efficiency"][-1]
    assert both["coverage"] == pytest.approx(39 / 40) and both["samples_a"] == pytest.approx(6)
    assert [side["largest_k"] for side in (found["a"], found["b"])] == [7, 7]
    assert [row["measure"] for row in found["gaps"]][1:3] == ["pass@7", "maj@7"]
    assert found["gaps"][1]["gap"]["count"] == 40
    votes = [row for row in found["equal_tokens"] if row["method"] == "majority vote"]
    assert votes[-1]["tokens"] == 70
    for side in "AB":
        assert any(f"k = 7 of {side}" in line for line in found["left_out"])
    json.dumps(found, allow_nan=False)
    assert [side["largest_k"] for side in (whole["a"], whole["b"])] == [8, 8]
    assert not whole["left_out"]


def test_a_side_without_failures_keeps_its_curve_and_gaps_are_at_what_both_have():
    a, b = (results([2] * 40, 8) for _ in "ab")
    found = compare(a, with_failures(b, 5))
    assert [side["largest_k"] for side in (found["a"], found["b"])] == [8, 7]
    assert [row["at"] for row in found["efficiency"]][-2:] == ["A at k=8", "both"]
    assert found["gaps"][1]["measure"] == "pass@7" and len(found["left_out"]) == 1


def test_a_few_failures_leave_curves_as_they_are():
    a = results([2] * 40, 8)
    found = compare(a, with_failures(copy.deepcopy(a), 4))
    assert found["b"]["largest_k"] == 8 and not found["left_out"]


def test_gaps_at_equal_tokens_are_at_equal_tokens():
    # A's traces are twice as long, with the same answers
    a, b = results([1] * 6, 8, tokens=20), results([1] * 6, 8, tokens=10)
    rows = [row for row in compare(a, b)["equal_tokens"] if row["method"] == "RSA"]
    assert rows[-1]["tokens"] == 60  # what both have: B's three rounds of two traces
    votes = [row for row in compare(a, b)["equal_tokens"] if row["method"] == "majority vote"]
    assert [row["tokens"] for row in votes] == [20, 40, 80]  # 10 is less than one trace of A
    assert all(row["gap"]["mean"] == pytest.approx(row["b"] - row["a"]) for row in rows + votes)


def test_what_was_not_sampled_alike_is_left_out_and_named():
    found = compare(results([1, 2], 4), results([1, 2], 4, population=4, subset_size=1))
    assert [row["measure"] for row in found["gaps"]] == ["single trace", "pass@4", "maj@4"]
    assert found["left_out"] == [
        "aggregated pass@1 (subset_size: 2 -> 1)",
        "RSA by round (population: 2 -> 4)",
    ]
    assert (
        "left out: RSA by round (population: 2 -> 4)"
        in comparison_tables(found, ["a", "b"])[-1].caption
    )


def changed(**parts):
    other = results([1, 2, 0], 4)
    for room, fields in parts.items():
        other[room] = other[room] | fields
    return other


def other_problems():
    other = changed(problems={"fingerprint": "other"})
    other["records"] = other["records"][:2]
    other["records"][1] = other["records"][1] | {"id": "held_out:77"}
    return other


REFUSED = {
    "scaffold": (
        changed(scaffold={"thinking": "answer_only"}),
        ["prompt.thinking: 'full' -> 'answer_only'"],
    ),
    "a field that one file has": (
        changed(scaffold={"system": "Be brief."}),
        ["prompt.system: '' -> 'Be brief.'"],
    ),
    "reward": (changed(problems={"reward": "a:b"}), ["task.reward: '' -> 'a:b'"]),
    "texts": (changed(problems={"fingerprint": "other"}), ["same ids"]),
    "problems": (
        other_problems(),
        [
            "3 of t -> 2 of t",
            "only in A: 2, first held_out:1",
            "only in B: 1, first held_out:77",
        ],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_results_of_other_problems_or_scaffolds_are_refused_with_what_differs(name):
    other, parts = REFUSED[name]
    with pytest.raises(ResultsError) as caught:
        compare(results([1, 2, 0], 4), other)
    for part in parts:
        assert part in str(caught.value)


def test_results_from_before_a_field_existed_count_as_its_default():
    newer = changed(scaffold={"system": "", "template_kwargs": {}, "stop": [], "template": "chat"})
    comparison.check_comparable(results([1, 2, 0], 4), newer)


@pytest.fixture
def two_results(tmp_path):
    """Paths of two results.json, the second with more right answers."""
    rng = np.random.default_rng(3)
    for name, low in (("grpo", 1), ("spiral", 3)):
        side = results(rng.integers(low, low + 4, 30), 8, rsa_right_B=rng.random(30) < low / 4)
        side["measures"] = summarise(side["records"], 0)
        write_results(tmp_path / name / "results.json", side)
    return [str(tmp_path / name / "results.json") for name in ("grpo", "spiral")]


def test_bars_of_two_sides_stand_side_by_side_under_their_names(two_results, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    evaluate.compare_results(*two_results, str(tmp_path), ["before", "after"])
    (voting,) = {f for f in figures if f.axes[0].get_title("left").startswith("Voting")}
    lone = [line for line in voting.axes[0].get_lines() if "once" in line.get_label()]
    assert [line.get_label().partition(":")[0] for line in lone] == ["before", "after"]
    (a,), (b,) = (line.get_xdata() for line in lone)
    assert a < b < 1.2 * a  # both at S + 1 traces
    bars = [bar for bar in voting.axes[0].collections if isinstance(bar, LineCollection)]
    assert sorted(bar.get_segments()[0][0][0] for bar in bars) == [a, b]


def test_compare_writes_its_findings_and_pictures_beside_b(two_results, tmp_path, capsys):
    evaluate.compare_results(*two_results, None)
    out = tmp_path / "spiral" / "compare"
    names = ("pass_at_k", "rsa", "tokens", "voting")
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {"comparison.json"} | pictures
    found = json.loads((out / "comparison.json").read_text())
    assert found["version"] == comparison.VERSION and found["efficiency"][-1]["ratio"] > 1
    printed = capsys.readouterr().out
    assert "A m (grpo), B m (spiral): samples for equal coverage" in printed
    assert "gaps at equal sampled tokens" in printed
    assert "nan" not in printed
