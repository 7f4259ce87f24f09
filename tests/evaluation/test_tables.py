"""Tables of results: what is undefined is a dash, and nothing is shortened or nan."""

import math

import numpy as np
import pytest
from rich.console import Console

from spiral_jax.evaluation.results import summarise
from spiral_jax.evaluation.tables import (
    evaluation_table,
    name_sides,
    number,
    percent,
    powers_of_two,
    results_tables,
)

UNDEFINED = {"mean": None, "low": None, "high": None, "standard_error": None, "count": 0}
LABELS = {
    "aggregated": "aggregated",
    "majority": "majority vote",
    "single": "single trace",
    "pass_at_n": "pass@N",
    "parse_rate_search": "parse rate, search",
    "parse_rate_aggregation": "parse rate, aggregation",
}


def results(answers_B):
    """Results of problems whose two search traces, and all that follows, have these answers."""
    records = []
    for answers in answers_B:
        stage = {"answer": answers, "length": [1, 1], "cut_off": [0, 0]}
        plain = {"member": [[0, 1]]} | stage
        records.append({"search": stage, "limits": [], "aggregation": plain, "rsa": [stage]})
    counted = ("correct", "wrong", "unparsed", "timeout", "error", "sampled_tokens")
    return {
        "model": {"hf_path": "DIR"},
        "problems": {"task": "t", "count": len(records), "too_long": 3},
        "settings": {"n": 2, "subset_size": 2, "traces": 1, "population": 2, "set_size": 1},
        "counts": {role: dict.fromkeys(counted, 3) for role in ("search", "aggregation", "rsa")},
        "measures": summarise(records, 0),
    }


@pytest.mark.parametrize("answers_B", [[[0, 1]], [[-1, -1], [-1, -1]], [[None, None], [None, 1]]])
def test_tables_fit_into_80_columns_and_show_dashes_for_what_is_undefined(answers_B):
    console = Console(width=80, record=True)
    for table in results_tables(results(answers_B)):
        console.print(table)
    text = console.export_text()
    assert "3 too long" in text and "nan" not in text.lower() and "None" not in text
    assert "…" not in text and "–" in text  # nothing is shortened; some rate has no set of its kind


def test_numbers_are_percent_with_intervals_where_there_are_any():
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.5}
    assert percent(estimate) == "25.0 [12.5, 50.0]"
    assert percent({"mean": 0.25, "low": None, "high": None}) == "25.0"
    assert percent({"mean": -1e-9, "low": -0.01, "high": 0.02}, "+") == "+0.0 [-1.0, +2.0]"
    assert percent(UNDEFINED) == number(UNDEFINED, 1) == "–"
    assert number({"mean": 1.386}, 2) == "1.39" and number({"mean": 0.5}, 1, scale=100) == "50.0"


def test_powers_of_two_end_with_n():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]


BASE = {"hf_path": "models/Qwen3-4B", "adapter_path": "", "init_from": ""}


@pytest.mark.parametrize(
    "paths, models, expected",
    [
        (("a/r.json", "b/r.json"), (BASE, BASE | {"init_from": "runs/4b@200"}), "Qwen3-4B,4b@200"),
        (
            ("runs/4b/evaluations/step_000000/results.json", "b/r.json"),
            (BASE, BASE | {"adapter_path": "x/lora"}),
            "4b@0,lora",
        ),
        (("x/one/r.json", "x/two/r.json"), (BASE, BASE), "Qwen3-4B (one),Qwen3-4B (two)"),
        (("a/run/r.json", "b/run/r.json"), (BASE, BASE), "A: Qwen3-4B (run),B: Qwen3-4B (run)"),
    ],
)
def test_sides_of_a_comparison_are_named_by_model_and_step_and_never_alike(paths, models, expected):
    assert name_sides(paths, models) == expected.split(",")


# The table of a training run


def estimate(mean, count=400):
    error = math.sqrt(mean * (1 - mean) / count)
    ends = {"low": mean - 1.96 * error, "high": mean + 1.96 * error}
    return {"mean": mean, "standard_error": error, "count": count} | ends


def evaluation(step, rng):
    measures = {name: estimate(rng.random()) for name in list(LABELS)[:4]}
    rates = {name: rng.random() for name in list(LABELS)[4:]}
    return {"step": step} | measures | rates


def parse_table(text):
    """{row label: {column: text}} of a Markdown table."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    heads, rule, *body = rows
    assert all(set(cell) <= set("-:") for cell in rule)
    assert {len(row) for row in rows} == {len(heads)}
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in body}


def test_table_holds_the_first_and_last_evaluation_in_percent_and_their_difference():
    rng = np.random.default_rng(0)
    first, middle, last = (evaluation(step, rng) for step in (0, 30, 60))
    table = parse_table(evaluation_table([last, first, middle]))
    assert list(table) == list(LABELS.values())
    for name, label in LABELS.items():
        assert list(table[label]) == ["step 0", "step 60", "change (points)"]
        means = []
        for source in (first, last):
            value, cell = source[name], table[label][f"step {source['step']}"]
            if isinstance(value, float):
                expected = [value]
            else:
                expected = [value["mean"], value["low"], value["high"]]
            shown = [float(part.strip("[],")) for part in cell.split()]
            assert shown == pytest.approx([100 * v for v in expected], abs=0.0501)  # one decimal
            means.append(expected[0])
        change = table[label]["change (points)"]
        assert change[0] in "+-"
        assert float(change) == pytest.approx(100 * (means[1] - means[0]), abs=0.0501)


def test_table_of_one_evaluation_has_no_change_and_no_rows_of_what_it_does_not_have():
    without_aggregation = {"step": 0, "single": estimate(0.2), "parse_rate_search": 0.9}
    table = parse_table(evaluation_table([without_aggregation]))
    assert list(table) == ["single trace", "parse rate, search"]
    assert all(list(row) == ["step 0"] for row in table.values())


def test_missing_and_undefined_measures_are_dashes_and_never_nan():
    lone = UNDEFINED | {"mean": 0.5, "count": 1}
    bad = dict.fromkeys(UNDEFINED, math.nan) | {"count": 3}
    before = {"step": 0, "single": lone, "majority": UNDEFINED, "aggregated": bad}
    after = {"step": 5, "single": estimate(0.25), "majority": estimate(0.5)}
    before["parse_rate_search"], after["parse_rate_search"] = math.nan, 1.0
    text = evaluation_table([before, after])
    table = parse_table(text)
    assert list(table) == ["majority vote", "single trace", "parse rate, search"]
    assert table["single trace"]["step 0"] == "50.0"
    assert table["single trace"]["change (points)"] == "-25.0"
    assert table["majority vote"]["step 0"] == table["majority vote"]["change (points)"] == "–"
    assert table["parse rate, search"] == {"step 0": "–", "step 5": "100.0", "change (points)": "–"}
    assert "nan" not in text.lower()
    assert "None" not in text


def test_no_change_has_no_minus_sign():
    rates = ((0, 0.9), (1, 0.89999))
    text = evaluation_table([{"step": step, "parse_rate_search": rate} for step, rate in rates])
    assert parse_table(text)["parse rate, search"]["change (points)"] == "+0.0"


def test_table_says_how_many_problems_it_is_over():
    same = [{"step": 0, "single": estimate(0.2, 512)}, {"step": 9, "single": estimate(0.3, 512)}]
    assert "; 512 held-out problems" in evaluation_table(same)
    same[1]["single"]["count"] = 509
    assert "; 509 to 512 held-out problems" in evaluation_table(same)


def test_a_table_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="evaluations"):
        evaluation_table([])
