"""What a person reads of a rollout: rows of the trace log, and the examples that the first step prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.collect import Batch
from spiral_jax.groups import Groups, Purpose, Role, Stop
from spiral_jax.prompts import listed_order
from spiral_jax.rollout import Rollouts

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase


def trace_rows(c: ConfigDict, batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """One JSON object a trace, problem by problem, of the first `trace_log.fraction` of the problems (at least one).

    Kept problems first, then those that dynamic sampling discarded (`kept` is false, advantages are 0).

        problem, cursor, kept, problem_text, reference_answer    the same in all rows of a problem
        role, set, subset, order, trace     `set` k reads the search traces `subset`, listed in its prompt by `order`
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
            place = {"role": Role.SEARCH.label, "set": None, "subset": None, "order": None}
            yield from _group_rows(shared | place, rollouts.search, b, tokenizer)
            if rollouts.aggregation is None:
                continue
            for k, member_S in enumerate(rollouts.member_BxKxS[b]):
                u = b * rollouts.member_BxKxS.shape[1] + k
                order = _listed(c, rollouts.search, b, member_S, rollouts.aggregation.requests.id_Ux6[u])
                place = {"role": Role.AGGREGATION.label, "set": k, "subset": member_S.tolist(), "order": order}
                yield from _group_rows(shared | place, rollouts.aggregation, u, tokenizer)


def _listed(c: ConfigDict, search: Groups, b: int, member_S: np.ndarray, id_6: np.ndarray) -> list[int]:
    """The search traces of a set in the order of its prompt, without those that it left out."""
    purpose, step, cursor, round, _, k = (int(x) for x in id_6)
    order = listed_order(c, Purpose(purpose), step, cursor, round, k, len(member_S))
    drops = c.prompt.truncated == "drop"
    return [int(n) for n in member_S[order] if not (drops and search.stop_UxC[b, n] == Stop.LENGTH)]


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
    """One search prompt, one aggregation prompt (text and ids) and one trace of each, as they really were."""
    parts = [("search", rollouts.search)]
    if rollouts.aggregation is not None:
        parts.append(("aggregation", rollouts.aggregation))
    lines = []
    for name, groups in parts:
        prompt = groups.requests.prompt_UxP[0, : groups.requests.prompt_len_U[0]]
        lines += [f"--- {name} prompt, {len(prompt)} tokens", tokenizer.decode(prompt), f"ids: {prompt.tolist()}"]
        lines += [f"--- {name} trace, reward {groups.reward_UxC[0, 0]:g}", tokenizer.decode(groups.trace_ids(0, 0))]
    return "\n".join([*lines, "---"])
