"""The results file and its tables: what is written is what is read, and nothing undefined is
printed.
"""

import json

import pytest
from rich.console import Console

from spiral_jax.evaluation.measures import summarise
from spiral_jax.evaluation.results import (
    number,
    percent,
    powers_of_two,
    results_tables,
    write_results,
)


def results(records, **problems):
    settings = {
        "n": 2,
        "subsets": 1,
        "traces": 1,
        "population": 2,
        "set_size": 1,
        "rounds": 1,
        "subset_size": 2,
    }
    counts = dict.fromkeys(
        ("correct", "wrong", "unparsed", "timeout", "error", "sampled_tokens"), 3
    )
    return {
        "version": 1,
        "model": {"hf_path": "DIR"},
        "problems": {"task": "t", "count": len(records), "too_long": 0} | problems,
        "settings": settings,
        "counts": {stage: counts for stage in ("search", "aggregation", "rsa")},
        "measures": summarise(records, 0),
        "records": records,
    }


def record(answer):
    stage = {"answer": answer, "length": [1] * len(answer), "cut_off": [0] * len(answer)}
    return {"index": 0, "id": "p", "search": stage, "limits": [], "aggregation": {"member": [[0, 1]]} | stage,
            "rsa": [stage]}  # fmt: skip


def test_a_file_is_plain_json_of_what_was_given_and_has_a_line_for_each_record(tmp_path):
    found = results([record([0, 1]), record([None, -1])])
    write_results(tmp_path / "results.json", found)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(found))
    assert sum(line.lstrip().startswith('{"index"') for line in text.splitlines()) == 2


@pytest.mark.parametrize("answers", [[[0, 1]], [[-1, -1], [-1, -1]], [[None, None], [None, 1]]])
def test_tables_fit_into_80_columns_and_show_dashes_for_what_is_undefined(answers):
    console = Console(width=80, record=True)
    for table in results_tables(results([record(answer) for answer in answers], too_long=3)):
        console.print(table)
    text = console.export_text()
    assert "3 too long and left out" in text and "nan" not in text.lower() and "None" not in text
    assert "…" not in text and "–" in text  # nothing is shortened; some rate has no set of its kind


def test_numbers_are_percent_with_intervals_where_there_are_any():
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.5}
    assert percent(estimate) == "25.0 [12.5, 50.0]"
    assert percent({"mean": 0.25, "low": None, "high": None}) == "25.0"
    assert percent({"mean": -1e-9, "low": -0.01, "high": 0.02}, "+") == "+0.0 [-1.0, +2.0]"
    assert percent({"mean": None, "low": None, "high": None}) == number({"mean": None}, 1) == "–"
    assert number({"mean": 1.386}, 2) == "1.39" and number({"mean": 0.5}, 1, scale=100) == "50.0"


def test_powers_of_two_end_with_n():
    assert (
        powers_of_two(1) == [1]
        and powers_of_two(8) == [1, 2, 4, 8]
        and powers_of_two(6) == [1, 2, 4, 6]
    )
