"""What a person reads of a rollout: rows of the trace log, and the examples that the first step
prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.groups import Groups, Role, Stop
from spiral_jax.prompts.prompts import listed_order
from spiral_jax.rollout.collect import Batch
from spiral_jax.rollout.requests import Rollouts

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase


def trace_rows(
    c: ConfigDict, batch: Batch, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """One JSON object a trace, problem by problem, of the first `trace_log.fraction` of the
    problems (at least one).

    Kept problems first, then those that dynamic sampling discarded (`kept` is false, advantages are
    0).

        problem, cursor, kept, problem_text, reference_answer    the same in all rows of a problem
        role, round, set, subset, order, trace    `set` k of a round reads the traces `subset`, listed in its prompt by
                                      `order`: search traces, or those of the round before, numbered
                                      k * M + trace
        text, ids, logprobs, length, stop   as sampled; `stop` is "stop" or "length"
        verdict, verdict_detail, reward     a verifier's `Status`, what an error was, and 0, 1 or null
        advantage                           as trained on, behind the length gate
    """
    for rollouts, kept in ((batch.rollouts, True), (batch.discarded, False)):
        for b in range(max(int(kept), round(c.trace_log.fraction * len(rollouts)))):
            shared = {
                "problem": rollouts.problems[b].id,
                "cursor": int(rollouts.cursor_B[b]),
                "kept": kept,
                "problem_text": rollouts.problems[b].text,
                "reference_answer": rollouts.problems[b].answer,
            }
            place = {
                "role": Role.SEARCH.label,
                "round": None,
                "set": None,
                "subset": None,
                "order": None,
            }
            yield from _group_rows(shared | place, rollouts.search, b, tokenizer)
            for r, of_round in enumerate(rollouts.rounds, start=1):
                K = of_round.member_BxKxS.shape[1]
                stop_N = rollouts.stages[r - 1].stop_UxC.reshape(len(rollouts), -1)[b]
                for k, member_S in enumerate(of_round.member_BxKxS[b]):
                    u = b * K + k
                    order = _listed(c, stop_N, member_S, of_round.groups.requests.id_Ux6[u])
                    place = {
                        "role": Role.AGGREGATION.label,
                        "round": r,
                        "set": k,
                        "subset": member_S.tolist(),
                    }
                    yield from _group_rows(
                        shared | place | {"order": order}, of_round.groups, u, tokenizer
                    )


def _listed(c: ConfigDict, stop_N: np.ndarray, member_S: np.ndarray, id_6: np.ndarray) -> list[int]:
    """The traces of a set in the order of its prompt, without those that it left out; `stop_N` is
    why each ended.
    """
    order = listed_order(c.aggregation.order, c.seed, id_6, len(member_S))
    drops = c.prompt.truncated == "drop"
    return [int(n) for n in member_S[order] if not (drops and stop_N[n] == Stop.LENGTH)]


def _group_rows(
    shared: dict[str, Any], groups: Groups, u: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    for i in range(groups.trace_len_UxC.shape[1]):
        ids, length = groups.trace_ids(u, i), int(groups.trace_len_UxC[u, i])
        reward, verdict = float(groups.reward_UxC[u, i]), groups.verdict_UxC[u, i]
        yield shared | {
            "trace": i,
            "text": tokenizer.decode(ids),
            "ids": ids.tolist(),
            "logprobs": [round(float(x), 6) for x in groups.logprob_UxCxG[u, i, :length]],
            "length": length,
            "stop": Stop(groups.stop_UxC[u, i]).name.lower(),
            "verdict": verdict.status.value,
            "verdict_detail": verdict.detail,
            "reward": None if np.isnan(reward) else reward,
            "advantage": float(groups.advantage_UxC[u, i]),
        }


def render_examples(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> str:
    """A search prompt, an aggregation prompt of each round (text and ids) and a trace of each, as
    they really were.
    """
    lines = []
    for r, groups in enumerate(rollouts.stages):
        name = ("search", "aggregation")[r] if r < 2 else f"aggregation, round {r},"
        prompt = groups.requests.prompt_UxP[0, : groups.requests.prompt_len_U[0]]
        lines += [
            f"--- {name} prompt, {len(prompt)} tokens",
            tokenizer.decode(prompt),
            f"ids: {prompt.tolist()}",
        ]
        lines += [
            f"--- {name} trace, reward {groups.reward_UxC[0, 0]:g}",
            tokenizer.decode(groups.trace_ids(0, 0)),
        ]
    return "\n".join([*lines, "---"])
