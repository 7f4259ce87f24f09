"""The results file: what is written is what is read."""

import json
import pathlib

import pytest

from spiral_jax.evaluation.results import VERSION, ResultsError, read_results, write_results

GOLDEN = pathlib.Path(__file__).parents[1] / "golden_results.json"
RECORD = {"index": 0, "id": "p", "search": {"answer": [0, None, -1], "length": [1, 2, 3]}}
RECORD |= {"limits": [], "aggregation": None, "rsa": []}


def test_a_file_is_plain_json_of_what_was_given_and_has_a_line_for_each_record(tmp_path):
    path = tmp_path / "new" / "results.json"
    rows = [{"k": k, "mean": 0.1 * k} for k in range(1, 4)]
    parts = dict.fromkeys(("model", "problems", "scaffold", "settings", "counts"), {"a": 1})
    parts |= {"measures": {"pass_at_k": rows}}
    results = {"version": VERSION} | parts | {"records": [RECORD, RECORD]}
    write_results(path, results)
    lines = path.read_text().splitlines()
    assert json.loads(path.read_text()) == read_results(path) == results
    assert sum(line.lstrip().startswith('{"index"') for line in lines) == 2
    assert sum(line.lstrip().startswith('{"k"') for line in lines) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a results.json"),
        ("[]", "not a results.json"),
        ('{"version": 99}', "version 99"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_results_are_refused(content, reason, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError) as error:
        read_results(path)
    assert str(path) in str(error.value) and reason in str(error.value)


def test_a_results_file_that_lacks_something_says_what(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    file = tmp_path / "results.json"
    lacking = {
        "measures": {name: golden[name] for name in golden if name != "measures"},
        "records": golden | {"records": []},
        r"records\[1\].search": golden | {"records": [golden["records"][0], {"index": 1}]},
        "model": {"version": 1},
    }
    for name, content in lacking.items():
        file.write_text(json.dumps(content))
        with pytest.raises(ResultsError, match=f"{file}: damaged: it lacks .*{name}"):
            read_results(file)
    file.write_text(json.dumps(golden))
    assert read_results(file) == golden
