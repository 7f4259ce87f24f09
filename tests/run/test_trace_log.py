"""The trace log: files that a kill leaves whole, and rows that say what happened."""

import gzip
import hashlib
import json
import math
import re

import numpy as np
import pytest
from scripted_sampler import TOKENIZER, InlineVerifier, scripted_training

from spiral_jax.core.groups import Role
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.run.trace_log import TraceLog, TraceRows, read_traces, trace_files
from spiral_jax.run.workdir import WorkdirError

# --- files ----------------------------------------------------------------------------------------

ROW = {"problem": 3, "text": "√2 \u2028", "ids": np.arange(5, dtype=np.int32), "logprob": math.nan}
ROWS = [ROW]


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_rows_give_the_same_bytes_and_read_back(tmp_path, monkeypatch):
    first = TraceLog(tmp_path / "one", 3).write(7, ROWS)
    monkeypatch.setattr("time.time", lambda: 2e9)  # gzip stores a time unless told not to
    second = TraceLog(tmp_path / "two", 3).write(7, iter(ROWS))
    other_step = TraceLog(tmp_path / "two", 3).write(8, ROWS)
    assert first.name == "step_000007.jsonl.gz"
    assert digest_of(first) == digest_of(second) == digest_of(other_step)
    assert digest_of(TraceLog(tmp_path / "two", 3).write(9, ROWS * 2)) != digest_of(first)
    with gzip.open(first, "rt", encoding="utf-8", newline="\n") as file:
        assert [json.loads(line) for line in file] == [
            ROW | {"ids": [0, 1, 2, 3, 4], "logprob": None}
        ]


def test_only_the_newest_trace_files_are_kept_and_others_are_left_alone(tmp_path):
    log = TraceLog(tmp_path / "traces", 2)
    log.write(999_999, ROWS)
    (tmp_path / "traces" / "notes.txt").write_text("")
    for step in (1_000_000, 2_000_000):  # one digit more: name order is not step order
        log.write(step, ROWS)
    names = sorted(path.name for path in log.directory.iterdir())
    assert names == ["notes.txt", "step_1000000.jsonl.gz", "step_2000000.jsonl.gz"]


def test_cutting_back_deletes_the_trace_files_from_the_step_on(tmp_path):
    log = TraceLog(tmp_path / "traces", 10)
    for step in (0, 10, 20, 30):
        log.write(step, ROWS)
    assert log.cut_back(20) == 2
    assert sorted(path.name for path in log.directory.iterdir()) == [
        "step_000000.jsonl.gz",
        "step_000010.jsonl.gz",
    ]


def test_a_trace_file_whose_writing_fails_does_not_appear_or_replace_one(tmp_path):
    log = TraceLog(tmp_path / "traces", 10)
    before = digest_of(log.write(4, ROWS))

    def rows():
        yield ROWS[0]
        raise RuntimeError("killed")

    for step in (4, 5):
        with pytest.raises(RuntimeError):
            log.write(step, rows())
    assert [path.name for path in log.directory.iterdir()] == ["step_000004.jsonl.gz"]
    assert digest_of(log.directory / "step_000004.jsonl.gz") == before


def test_a_file_reads_back_and_a_damaged_one_is_an_error_that_names_it(tmp_path):
    path = TraceLog(tmp_path, 3).write(7, ROWS)
    assert trace_files(tmp_path) == {7: path}
    assert list(read_traces(path)) == [ROW | {"ids": [0, 1, 2, 3, 4], "logprob": None}]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WorkdirError, match=f"{path}: damaged"):
        list(read_traces(path))
    assert trace_files(tmp_path / "nowhere") == {}


# --- rows, from scripted rollouts -----------------------------------------------------------------


def script(role, cursor, k, i):
    """Odd cursors are informative; even ones are flat. Trace 3 is cut off."""
    if role is Role.SEARCH:
        return f"left:{i}..." if i == 3 else f"left:{i}, \\boxed{{{i}1}}"
    return "\\boxed{7}" if cursor % 2 and k == 0 else "\\boxed{8}"


@pytest.fixture(scope="module")
def training():
    return scripted_training(script)


@pytest.fixture(scope="module")
def batch(training):
    return training.collect()


def trace_rows(c, fraction=1.0):
    return TraceRows(
        tokenizer=TOKENIZER,
        fraction=fraction,
        order=c.aggregation.order,
        seed=c.seed,
        drops_truncated=c.prompt.truncated == "drop",
    )


def rows_of(c, batch, fraction=1.0):
    return list(trace_rows(c, fraction).make(batch))


def test_kept_problems_come_first_then_the_discarded_ones_with_no_advantage(training, batch):
    rows = rows_of(training.c, batch)
    N, K, M = 8, 4, 4
    cursors = [row["cursor"] for row in rows[:: N + K * M]]
    assert cursors == [1, 3, 5, 7, 0, 2, 4, 6] and batch.next_cursor == 8
    assert len(rows) == 8 * (N + K * M)
    for row in rows:
        assert row["kept"] == (row["cursor"] % 2 == 1)
        assert row["kept"] or row["advantage"] == 0
        assert (row["problem_text"], row["reference_answer"]) == (f"left={row['cursor']}", "7")
        verdict = "unparsed" if row["role"] == "search" and row["trace"] == 3 else row["verdict"]
        assert row["verdict"] == verdict and row["reward"] == float(verdict == "correct")
        assert row["verdict_detail"] == ""
    assert any(row["advantage"] for row in rows)


@pytest.mark.parametrize(("truncated", "dropped"), [("keep_tail", set()), ("drop", {3})])
def test_the_order_is_that_of_the_prompt_and_leaves_out_what_it_leaves_out(truncated, dropped):
    training = scripted_training(script, prompt__truncated=truncated)
    batch = training.collect()
    groups, seen = batch.rollouts.aggregation, 0
    for row in rows_of(training.c, batch):
        if row["role"] != "aggregation" or not row["kept"] or row["trace"]:
            continue
        prompt = groups.requests.prompt_UxP[seen, : groups.requests.prompt_len_U[seen]]
        listed = re.findall(r"left:\s*(\d)", TOKENIZER.decode(prompt))
        assert [int(n) for n in listed] == row["order"]
        assert set(row["order"]) == set(row["subset"]) - dropped
        assert row["set"] == seen % 4
        member_S = batch.rollouts.rounds[0].member_BxKxS[seen // 4, seen % 4]
        np.testing.assert_array_equal(row["subset"], member_S)
        seen += 1
    assert seen == 16


@pytest.mark.parametrize(("fraction", "cursors"), [(0.5, [1, 3, 0, 2]), (0.01, [1])])
def test_the_fraction_is_of_kept_and_of_discarded_problems(training, batch, fraction, cursors):
    rows = rows_of(training.c, batch, fraction)
    assert list(dict.fromkeys(row["cursor"] for row in rows)) == cursors


def test_sets_of_a_later_round_read_the_traces_of_the_round_before():
    training = scripted_training(script, aggregation__rounds=2)
    batch = training.collect()
    rows = [row for row in rows_of(training.c, batch) if row["cursor"] == 1]
    by_round = {r: [row for row in rows if row["round"] == r] for r in (None, 1, 2)}
    assert [len(of_round) for of_round in by_round.values()] == [8, 16, 16]
    assert max(n for row in by_round[1] for n in row["subset"]) < 8
    assert max(n for row in by_round[2] for n in row["subset"]) >= 8
    for row in by_round[2]:
        assert sorted(row["order"]) == sorted(row["subset"])


def test_rows_say_what_a_reward_function_says_that_the_answer_is():
    def reward(text, problem):
        return (0.5 if "{7}" in text else 0.25), f"answer to {problem.id}"

    training = scripted_training(script).with_actor(verifier=InlineVerifier(reward))
    rows = rows_of(training.c, training.collect())
    assert {row["reward"] for row in rows} == {0.25, 0.5}
    assert all(row["answer"] == f"answer to {row['problem']}" for row in rows)


def test_grpo_rows_have_no_sets():
    def alone(role, cursor, k, i):
        return f"\\boxed{{{7 if i < cursor % 3 else 8}}}"

    training = scripted_training(alone, loss__estimator="grpo")
    rows = rows_of(training.c, training.collect())
    assert {row["role"] for row in rows} == {"search"}
    assert {row["kept"] for row in rows} == {True, False}
    for row in rows:
        assert row["round"] is row["set"] is row["order"] is row["subset"] is None


def test_a_step_without_a_batch_is_logged_whole():
    def script(role, cursor, k, i):
        return "\\boxed{8}"

    training = scripted_training(script)
    problems = training.actor.first_kept(3)
    assert problems.decided() is None
    for rollout in training.actor.rollouts(None, 0, problems):
        advantages = compute_advantages(training.objective.estimator, rollout.rewards())
        problems.add(rollout, advantages)
    rows = list(trace_rows(training.c).make_failed(problems.decided()))
    assert list(dict.fromkeys(row["cursor"] for row in rows)) == list(range(3, 19))
    assert len(rows) == 16 * (8 + 4 * 4)
    assert {(row["kept"], row["advantage"], row["reward"]) for row in rows} == {(False, 0.0, 0.0)}
