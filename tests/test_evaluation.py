"""What an evaluation reports, against counts made by hand on scripted traces."""

import dataclasses

import pytest
from scripted_sampler import make_actor, number_task

from spiral_jax.config import ConfigError
from spiral_jax.evaluation import evaluate
from spiral_jax.groups import Purpose, Role


def script(role, cursor, k, i):
    """Search: traces 0 and 1 are right, 2 to 6 agree on a wrong answer, 7 has none. Aggregation: set 0 right."""
    if role is Role.SEARCH:
        return {0: "\\boxed{7}", 1: "\\boxed{7}", 7: "left=1..."}.get(i, "\\boxed{8}")
    return "\\boxed{7}" if k == 0 and cursor % 2 == 0 else "\\boxed{9}"


def test_measures_are_means_over_problems_of_what_the_traces_say():
    actor = make_actor(script, eval__problems=20, eval__subsets=2, eval__traces=3)
    result = evaluate(actor, None, step=5)
    assert result["step"] == 5 and result["problems"] == 20 and result["too_long"] == 0
    assert result["single"]["mean"] == pytest.approx(2 / 8)
    assert result["pass_at_n"]["mean"] == 1.0
    assert result["aggregated"]["mean"] == pytest.approx(0.25)  # one of two sets, for every other problem
    assert result["aggregated"]["count"] == 20
    assert result["parse_rate_search"] == pytest.approx(7 / 8) and result["cut_off_search"] == pytest.approx(1 / 8)
    assert result["parse_rate_aggregation"] == 1.0
    assert {(int(ids[0]), int(ids[1])) for call in actor.sampler.calls for ids in call.id_Ux6} == {
        (Purpose.EVALUATION, 5)
    }


def test_the_majority_is_that_of_the_aggregated_sets_candidates_and_ties_are_split():
    # The two sets of four hold the two right answers together (set of 2 right, 2 wrong: a tie), or one each (lost).
    actor = make_actor(script, eval__problems=40)
    result = evaluate(actor, None, step=0)
    together = []
    for call in actor.sampler.calls:
        if call.id_Ux6[0, 4] == Role.AGGREGATION:
            for u in range(len(call)):
                text = actor.scaffold.tokenizer.decode(call.prompt_UxP[u, : call.prompt_len_U[u]])
                right, wrong = text.count("boxed{7}"), text.count("boxed{8}")
                together.append(1.0 if right > wrong else 0.5 if right == wrong else 0.0)
    assert sum(together) > 0
    assert result["majority"]["mean"] == pytest.approx(sum(together) / len(together))


def test_held_out_problems_that_are_too_long_are_left_out_and_counted():
    task = number_task()
    longer = dataclasses.replace(
        task, held_out=lambda i: dataclasses.replace(task.held_out(i), text="left=" + "1+" * (40 if i % 4 == 0 else 1))
    )
    result = evaluate(make_actor(script, longer, eval__problems=8), None, step=0)
    assert result["problems"] == 6 and result["too_long"] == 2 and result["single"]["count"] == 6
    nothing = dataclasses.replace(longer, held_out=lambda i: longer.held_out(0))
    with pytest.raises(ConfigError, match="prompt.max_problem_tokens = 16"):
        evaluate(make_actor(script, nothing, eval__problems=8), None, step=0)
