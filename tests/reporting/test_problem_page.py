"""The page of a problem from rows of the trace log: flags, quotes, the length gate, discards."""

import itertools

import numpy as np
import pytest

from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax.core.config import to_plain
from spiral_jax.reporting.logged_problem import read_problem, split_problems
from spiral_jax.reporting.problem_page import FLAGS, PageSettings, problem_page
from spiral_jax.reporting.quotes import Quoting
from spiral_jax.run.trace_log import read_traces, trace_files

REWARD = {"correct": 1.0, "wrong": 0.0, "unparsed": 0.0, "timeout": 0.0, "error": None}


def row(role, trace, text, verdict="wrong", **changes):
    return {
        "problem": "p0",
        "cursor": 5,
        "kept": True,
        "problem_text": "What is 6 * 7?",
        "reference_answer": "42",
        "role": role,
        "round": None,
        "set": None,
        "subset": None,
        "order": None,
        "trace": trace,
        "text": text,
        "length": 10,
        "stop": "stop",
        "verdict": verdict,
        "verdict_detail": "",
        "reward": REWARD[verdict],
        "advantage": 0.0,
    } | changes


def rows_of_set(k, order, *verdicts, round=1, text="\\boxed{42}"):
    """The aggregations of set k."""
    place = {"round": round, "set": k, "subset": sorted(order), "order": order}
    rows = []
    for trace, verdict in enumerate(verdicts):
        said = text if verdict == "correct" else "\\boxed{9}"
        rows.append(row("aggregation", trace, said, verdict, **place))
    return rows


RIGHT, WRONG = row("search", 0, "\\boxed{42}", "correct"), row("search", 1, "\\boxed{8}")


def page_of(*groups, length_gate=0, thinking="answer_only"):
    c = tiny.get_config()
    c.loss.length_gate, c.prompt.thinking = float(length_gate), thinking
    rows = list(itertools.chain(*groups))
    return problem_page(3, rows, PageSettings.from_plain(to_plain(c)))


def test_rows_become_stages_whose_sets_read_traces_of_the_stage_before():
    rows = [
        *(RIGHT, WRONG),
        *rows_of_set(0, [1, 0], "correct", "wrong"),
        *rows_of_set(1, [1], "wrong", "wrong"),
        *rows_of_set(0, [3, 0], "correct", round=2),
    ]
    search, first, second = read_problem(rows).stages
    assert (search.reads, first.reads, second.reads) == (None, search, first)
    names = [[trace.name for trace in stage.traces] for stage in (search, first, second)]
    assert names == [["0", "1"], ["A.0", "A.1", "B.0", "B.1"], ["A'.0"]]
    for stage in (search, first, second):
        assert [trace.place for trace in stage.traces] == list(range(len(stage.traces)))
    assert [of_set.place for of_set in read_problem(rows).sets] == [0, 1, 2]
    (last,) = second.sets
    assert [first.traces[place].name for place in last.listed] == ["B.1", "A.0"]
    assert str(first.sets[0].score) == "1/2"


def test_a_set_rescues_and_spoils_against_the_vote_of_its_candidates():
    search = [
        RIGHT,
        row("search", 1, "\\boxed{42.0}", "correct"),
        row("search", 2, "\\boxed{8}"),
        row("search", 3, "\\boxed{8}"),
    ]
    page = page_of(
        search,
        rows_of_set(0, [0, 1, 2], "correct", "wrong"),
        rows_of_set(1, [0, 2, 3], "correct", "wrong"),
        rows_of_set(2, [0, 1, 3], "correct", "correct"),
        rows_of_set(3, [0, 2], "correct", "wrong"),
    )
    # the two right ones are spelt differently and vote together; the two wrong ones are spelt alike
    assert [(of_set["vote"], of_set["flags"]) for of_set in page["sets"]] == [
        (1.0, ["spoil"]),
        (0.0, ["rescue"]),
        (1.0, ["flat"]),
        (0.5, []),
    ]
    assert page["flags"] == ["rescue", "spoil", "flat"] and set(page["flags"]) <= set(FLAGS)
    assert [trace["sets"] for trace in page["search"]] == [[0, 1, 2, 3], [0, 2], [0, 1, 3], [1, 2]]


def test_partial_credit_counts_as_wrong_and_is_explained_and_an_answer_needs_no_box():
    search = [
        row("search", 0, "it is x", reward=0.75, answer="x"),
        row("search", 1, "or x", reward=0.25, answer="x"),
        row("search", 2, "it is y", "correct", answer="y"),
    ]
    partly = [change | {"reward": 0.5} for change in rows_of_set(0, [0, 1], "wrong", "wrong")]
    mixed = rows_of_set(1, [1, 2], "wrong", "correct")
    mixed[0] |= {"reward": 0.5, "advantage": -0.25}
    mixed[1] |= {"advantage": 0.25}
    page = page_of(search, partly, mixed)
    assert [trace["answer"] for trace in page["search"]] == ["x", "x", "y"]
    assert [(of_set["right"], of_set["verified"]) for of_set in page["sets"]] == [(0, 2), (1, 2)]
    assert [of_set["flags"] for of_set in page["sets"]] == [["flat"], []]
    assert [of_set["vote"] for of_set in page["sets"]] == [0.0, 0.5]
    why = page["sets"][1]["traces"][0]["why"]
    assert "earned 1.5 together" in why and "-0.250" in why and "was logged" not in why


def test_truncated_unverified_and_discarded_problems_are_flagged():
    assert page_of([RIGHT, WRONG])["flags"] == []
    assert page_of([RIGHT, WRONG | {"stop": "length"}])["flags"] == ["truncated"]
    assert page_of([RIGHT, row("search", 1, "", "timeout")])["flags"] == ["error"]
    alone = page_of([RIGHT, row("search", 1, "", "error")])  # the only one in its mean
    assert alone["flags"] == ["flat", "error"]
    discarded = page_of([RIGHT | {"kept": False}, WRONG | {"kept": False}])
    assert discarded["flags"] == ["flat"] and not discarded["kept"]
    assert all("discarded" in trace["why"] for trace in discarded["search"])


def test_the_answer_of_an_unverified_aggregation_is_in_no_count():
    rows = rows_of_set(0, [0, 1], "correct", "error", "wrong")
    (of_set,) = page_of([RIGHT, WRONG], rows)["sets"]
    assert (of_set["right"], of_set["verified"]) == (1, 2)
    assert [trace["reward"] for trace in of_set["traces"]] == [1.0, None, 0.0]


@pytest.mark.parametrize(
    ("gate", "length", "stop", "words"),
    [
        (0, 10, "length", "cut off at its limit"),
        (9, 10, "stop", "longer than 9 tokens"),
        (0.25, 7, "stop", "longer than 6.5"),
    ],
)
def test_the_length_gate_is_part_of_the_reason(gate, length, stop, words):
    sets = [*rows_of_set(0, [0], "correct", "correct"), *rows_of_set(1, [1], "wrong", "wrong")]
    search = [RIGHT | {"length": length, "stop": stop}, WRONG]
    why = page_of(search, sets, length_gate=gate)["search"][0]["why"]
    assert "+0.500. The length gate takes it" in why and words in why and "But" not in why
    # a log that says otherwise is not explained away
    ungated = page_of([RIGHT, WRONG], sets)["search"][0]["why"]
    assert "But +0.0000 was logged" in ungated


@pytest.mark.parametrize(
    "estimator", ["marginal_mean", "with_without", "aggregator_only", "grpo", "paragator"]
)
@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_no_logged_advantage_of_a_run_contradicts_its_reason(tmp_path, estimator, gate):
    c = tiny.get_config()
    c.loss.estimator, c.loss.length_gate = estimator, gate
    c.batch.problems, c.trace_log.every = 16, 1
    write_run(tmp_path / "run", c, range(2), failing=0.1)
    settings = PageSettings.from_plain(to_plain(c))
    advantages, gated = [], 0
    for step, file in trace_files(tmp_path / "run" / "traces").items():
        for rows in split_problems(read_traces(file)):
            page = problem_page(step, rows, settings)
            traces = list(page["search"])
            for of_set in page["sets"]:
                traces += of_set["traces"]
            shown = [trace["advantage"] for trace in traces]
            assert shown == [logged["advantage"] for logged in rows]
            assert not any("was logged" in trace["why"] for trace in traces)
            advantages += shown
            gated += sum("length gate takes it" in trace["why"] for trace in traces)
    assert np.count_nonzero(advantages) > 20 and gated > 0


def test_quotes_are_shared_runs_of_words_that_neither_the_problem_nor_all_candidates_have():
    problem = "one two three four five six seven eight"
    shared = "this line is in every single attempt of them"
    alphabet = "alpha beta gamma delta epsilon zeta eta theta iota"
    first = f"{shared} {alphabet}"
    second = f"{shared} {problem} nothing else of interest here"
    read = f"{shared} {problem} {alphabet} and so on until the very end of it"
    copied = Quoting(problem, [first, second, "other words " * 20]).copied(read, [0, 1])

    words = read.split()
    runs = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    known = {tuple(problem.split()), *(tuple(shared.split()[i : i + 8]) for i in (0, 1))}
    left = runs - known
    assert copied[0] == pytest.approx(2 / len(left))  # alpha ... theta, beta ... iota
    in_second = sum(f" {' '.join(run)} " in f" {second} " for run in left)
    assert copied[1] == pytest.approx(in_second / len(left))
    alone = Quoting(problem, [first]).copied(read, [0])
    assert alone[0] > 0  # of one candidate alone, all of it counts
    assert Quoting(problem, ["", ""]).copied("", [0, 1]) == [0.0, 0.0]


def test_short_aggregations_are_matched_by_short_runs_and_answers_by_the_verifiers_word():
    search = [
        row("search", 0, "so left:3, maybe right:1, \\boxed{31}"),
        row("search", 1, "so right:6, \\boxed{36}", "correct"),
        row("search", 2, "no idea"),
        row("search", 3, "\\boxed{ 9 }"),
    ]
    text = "left:3, right:6, \\boxed{36}"
    rows = rows_of_set(0, [3, 2, 1, 0], "correct", "wrong", "unparsed", text=text)
    (of_set,) = page_of(search, rows)["sets"]
    right, wrong, unparsed = (
        {quote["name"]: quote["same_answer"] for quote in trace["quotes"]}
        for trace in of_set["traces"]
    )
    assert right == {"1": True, "0": False}
    assert wrong == {"3": True}  # 9 and " 9 "
    assert "2" not in unparsed  # no answer equals no other


def test_what_a_candidate_thought_cannot_be_quoted_where_it_was_not_shown():
    search = [row("search", 0, "<think>alpha beta gamma</think>delta"), WRONG]
    rows = rows_of_set(0, [0, 1], "correct", "wrong", text="alpha beta gamma")
    assert page_of(search, rows)["sets"][0]["traces"][0]["quotes"] == []
    (trace, _) = page_of(search, rows, thinking="full")["sets"][0]["traces"]
    assert [quote["name"] for quote in trace["quotes"]] == ["0"]
