"""The trace log's rows, from rollouts of a scripted sampler: what the report explains is what
happened.
"""

import re

import numpy as np
from scripted_sampler import TOKENIZER, make_actor

from spiral_jax.core.groups import Role
from spiral_jax.rollout.collect import collect_batch
from spiral_jax.run.trace_log import trace_rows


def script(role, cursor, k, i):
    """Odd cursors are informative; even ones are flat. Trace 3 is cut off."""
    if role is Role.SEARCH:
        return f"left:{i}..." if i == 3 else f"left:{i}, \\boxed{{{i}1}}"
    return "\\boxed{7}" if cursor % 2 and k == 0 else "\\boxed{8}"


def rows_of(actor):
    batch = collect_batch(actor, None, step=0, cursor=0)
    return batch, list(trace_rows(actor.c, batch, TOKENIZER))


def test_kept_problems_come_first_then_the_discarded_ones_before_the_next_cursor_with_no_advantage():
    batch, rows = rows_of(make_actor(script))
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


def test_the_order_is_that_of_the_prompt_and_leaves_out_what_it_leaves_out():
    for truncated, dropped in (("keep_tail", set()), ("drop", {3})):
        actor = make_actor(script, prompt__truncated=truncated)
        batch, rows = rows_of(actor)
        groups, seen = batch.rollouts.aggregation, 0
        for row in rows:
            if row["role"] != "aggregation" or not row["kept"] or row["trace"]:
                continue
            prompt = groups.requests.prompt_UxP[seen, : groups.requests.prompt_len_U[seen]]
            listed = re.findall(r"left:\s*(\d)", TOKENIZER.decode(prompt))
            assert [int(n) for n in listed] == row["order"]
            assert set(row["order"]) == set(row["subset"]) - dropped
            assert row["set"] == seen % 4
            np.testing.assert_array_equal(
                row["subset"], batch.rollouts.rounds[0].member_BxKxS[seen // 4, seen % 4]
            )
            seen += 1
        assert seen == 16


def test_the_fraction_is_of_kept_and_of_discarded_problems():
    actor = make_actor(script, trace_log__fraction=0.5)
    _, rows = rows_of(actor)
    assert list(dict.fromkeys(row["cursor"] for row in rows)) == [1, 3, 0, 2]
    actor.c.trace_log.fraction = 0.01
    _, rows = rows_of(actor)
    assert list(dict.fromkeys(row["cursor"] for row in rows)) == [1]


def test_grpo_rows_have_no_sets():
    def alone(role, cursor, k, i):
        return f"\\boxed{{{7 if i < cursor % 3 else 8}}}"

    _, rows = rows_of(make_actor(alone, loss__estimator="grpo"))
    assert {row["role"] for row in rows} == {"search"}
    assert all(
        row["set"] is None and row["order"] is None and row["subset"] is None for row in rows
    )
    assert {row["kept"] for row in rows} == {True, False}
