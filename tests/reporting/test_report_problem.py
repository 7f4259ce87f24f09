"""The page of a problem from rows of the trace log: flags, quotes, the length gate, what was
discarded.
"""

import itertools

import numpy as np
import pytest

from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax.core.config import to_plain
from spiral_jax.reporting.problem_page import FLAGS, problem_page, split_problems
from spiral_jax.reporting.quotes import Quoting
from spiral_jax.run.trace_log import read_traces, trace_files

PLAIN = to_plain(tiny.get_config())
REWARD = {"correct": 1.0, "wrong": 0.0, "unparsed": 0.0, "timeout": 0.0, "error": None}


def row(role, trace, text, verdict="wrong", **more):
    shared = {"problem": "p0", "cursor": 5, "kept": True, "problem_text": "What is 6 * 7?",
              "reference_answer": "42", "round": None, "set": None, "subset": None, "order": None, "length": 10,
              "stop": "stop", "verdict_detail": ""}  # fmt: skip
    return shared | {"role": role, "trace": trace, "text": text, "verdict": verdict, "reward": REWARD[verdict],
                     "advantage": 0.0} | more  # fmt: skip


def of_set(k, order, *verdicts, text="\\boxed{42}", **more):
    return [row("aggregation", m, text if verdict == "correct" else "\\boxed{9}", verdict, round=1, set=k,
                subset=sorted(order), order=order, **more) for m, verdict in enumerate(verdicts)]  # fmt: skip


RIGHT, WRONG = row("search", 0, "\\boxed{42}", "correct"), row("search", 1, "\\boxed{8}")


def page(*rows, **changes):
    plain = {
        room: dict(fields) if isinstance(fields, dict) else fields for room, fields in PLAIN.items()
    }
    for field, value in changes.items():
        plain["loss"][field] = value
    return problem_page(3, list(itertools.chain(*rows)), plain)


def test_a_set_rescues_and_spoils_against_the_vote_of_its_candidates():
    search = [RIGHT, row("search", 1, "\\boxed{42.0}", "correct"), row("search", 2, "\\boxed{8}"),
              row("search", 3, "\\boxed{8}")]  # fmt: skip
    found = page(search, of_set(0, [0, 1, 2], "correct", "wrong"), of_set(1, [0, 2, 3], "correct", "wrong"),
                 of_set(2, [0, 1, 3], "correct", "correct"), of_set(3, [0, 2], "correct", "wrong"))  # fmt: skip
    # the two right ones are spelt differently and vote together; the two wrong ones are spelt alike
    assert [(s["vote"], s["flags"]) for s in found["sets"]] == [
        (1.0, ["spoil"]), (0.0, ["rescue"]), (1.0, ["flat"]), (0.5, []),
    ]  # fmt: skip
    assert found["flags"] == ["rescue", "spoil", "flat"] and set(found["flags"]) <= set(FLAGS)
    assert [trace["sets"] for trace in found["search"]] == [[0, 1, 2, 3], [0, 2], [0, 1, 3], [1, 2]]


def test_truncated_unverified_and_discarded_problems_are_flagged():
    assert page([RIGHT, WRONG])["flags"] == []
    assert page([RIGHT, WRONG | {"stop": "length"}])["flags"] == ["truncated"]
    assert page([RIGHT, row("search", 1, "", "timeout")])["flags"] == ["error"]
    assert page([RIGHT, row("search", 1, "", "error")])["flags"] == [
        "flat",
        "error",
    ]  # alone in its mean
    discarded = page([RIGHT | {"kept": False}, WRONG | {"kept": False}])
    assert discarded["flags"] == ["flat"] and not discarded["kept"]
    assert all("discarded" in trace["why"] for trace in discarded["search"])


def test_the_answer_of_an_unverified_aggregation_is_in_no_count():
    (found,) = page([RIGHT, WRONG], of_set(0, [0, 1], "correct", "error", "wrong"))["sets"]
    assert (found["right"], found["verified"]) == (1, 2)
    assert [trace["reward"] for trace in found["traces"]] == [1.0, None, 0.0]


@pytest.mark.parametrize(("gate", "length", "stop", "words"), [
    (0, 10, "length", "cut off at its limit"), (9, 10, "stop", "longer than 9 tokens"),
    (0.25, 7, "stop", "longer than 6.5"),
])  # fmt: skip
def test_the_length_gate_is_part_of_the_reason(gate, length, stop, words):
    search = [RIGHT | {"length": length, "stop": stop}, WRONG]
    found = page(
        search,
        of_set(0, [0], "correct", "correct"),
        of_set(1, [1], "wrong", "wrong"),
        length_gate=gate,
    )
    why = found["search"][0]["why"]
    assert "+0.500. The length gate takes it" in why and words in why and "But" not in why
    ungated = page(
        [RIGHT, WRONG], of_set(0, [0], "correct", "correct"), of_set(1, [1], "wrong", "wrong")
    )
    # a log that says otherwise is not explained away
    assert "But +0.0000 was logged" in ungated["search"][0]["why"]


@pytest.mark.parametrize(
    "estimator", ["marginal_mean", "with_without", "aggregator_only", "grpo", "paragator"]
)
@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_no_logged_advantage_of_a_run_contradicts_its_reason(tmp_path, estimator, gate):
    c = tiny.get_config()
    c.loss.estimator, c.loss.length_gate, c.batch.problems, c.trace_log.every = (
        estimator,
        gate,
        16,
        1,
    )
    write_run(tmp_path / "run", c, range(2), failing=0.1)
    numbers, gated = [], 0
    for step, file in trace_files(tmp_path / "run" / "traces").items():
        for rows in split_problems(read_traces(file)):
            found = problem_page(step, rows, to_plain(c))
            traces = [*found["search"], *(trace for of in found["sets"] for trace in of["traces"])]
            assert [trace["advantage"] for trace in traces] == [
                logged["advantage"] for logged in rows
            ]
            assert not any("was logged" in trace["why"] for trace in traces)
            numbers += [trace["advantage"] for trace in traces]
            gated += sum("length gate takes it" in trace["why"] for trace in traces)
    assert np.count_nonzero(numbers) > 20 and gated > 0


def test_quotes_are_shared_runs_of_words_that_neither_the_problem_nor_all_candidates_have():
    problem = "one two three four five six seven eight"
    shared = "this line is in every single attempt of them"
    first = f"{shared} alpha beta gamma delta epsilon zeta eta theta iota"
    second = f"{shared} {problem} nothing else of interest here"
    read = f"{shared} {problem} alpha beta gamma delta epsilon zeta eta theta iota and so on until the very end of it"
    copied = Quoting(problem, [first, second, "other words " * 20]).copied(read, [0, 1])
    own = {tuple(read.split()[i : i + 8]) for i in range(len(read.split()) - 7)}
    left = own - {tuple(problem.split())} - {tuple(shared.split()[i : i + 8]) for i in (0, 1)}
    assert copied[0] == pytest.approx(2 / len(left))  # alpha ... theta, beta ... iota
    assert copied[1] == pytest.approx(
        sum(f" {' '.join(run)} " in f" {second} " for run in left) / len(left)
    )
    assert (
        Quoting(problem, [first]).copied(read, [0])[0] > 0
    )  # of one candidate alone, all of it counts
    assert Quoting(problem, ["", ""]).copied("", [0, 1]) == [0.0, 0.0]


def test_short_aggregations_are_matched_by_short_runs_and_answers_by_the_verifiers_word():
    search = [
        row("search", 0, "so left:3, maybe right:1, \\boxed{31}"),
        row("search", 1, "so right:6, \\boxed{36}", "correct"),
        row("search", 2, "no idea"),
        row("search", 3, "\\boxed{ 9 }"),
    ]
    rows = of_set(
        0, [3, 2, 1, 0], "correct", "wrong", "unparsed", text="left:3, right:6, \\boxed{36}"
    )
    (found,) = page(search, rows)["sets"]
    quotes = [
        {quote["name"]: quote["same_answer"] for quote in trace["quotes"]}
        for trace in found["traces"]
    ]
    assert quotes[0] == {"1": True, "0": False}
    assert quotes[1] == {"3": True}  # 9 and " 9 "
    assert quotes[2].get("2") is None  # no answer equals no other


def test_what_a_candidate_thought_cannot_be_quoted_where_it_was_not_shown():
    search = [row("search", 0, "<think>alpha beta gamma</think>delta"), WRONG]
    rows = of_set(0, [0, 1], "correct", "wrong", text="alpha beta gamma")
    assert page(search, rows)["sets"][0]["traces"][0]["quotes"] == []
    full = {**PLAIN, "prompt": PLAIN["prompt"] | {"thinking": "full"}}
    (trace, _) = problem_page(0, [*search, *rows], full)["sets"][0]["traces"]
    assert [quote["name"] for quote in trace["quotes"]] == ["0"]
