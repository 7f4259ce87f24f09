"""What a person reads of a rollout: rows of the trace log, and the examples that the first step prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from spiral_jax.groups import Groups, Role, Stop
from spiral_jax.rollout import Rollouts


def trace_rows(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, fraction: float) -> Iterator[dict[str, Any]]:
    """One JSON object a trace, for the first `fraction` of the problems (at least one), problem by problem."""
    for b in range(max(1, round(fraction * len(rollouts)))):
        yield from _group_rows(rollouts, tokenizer, Role.SEARCH, rollouts.search, b, b, None)
        if rollouts.aggregation is not None:
            for k, member_S in enumerate(rollouts.member_BxKxS[b]):
                u = b * rollouts.member_BxKxS.shape[1] + k
                yield from _group_rows(rollouts, tokenizer, Role.AGGREGATION, rollouts.aggregation, b, u, member_S)


def _group_rows(
    rollouts: Rollouts,
    tokenizer: PreTrainedTokenizerBase,
    role: Role,
    groups: Groups,
    b: int,
    u: int,
    member_S: np.ndarray | None,
) -> Iterator[dict[str, Any]]:
    for i in range(groups.trace_len_UxC.shape[1]):
        ids, length = groups.trace_ids(u, i), int(groups.trace_len_UxC[u, i])
        reward = float(groups.reward_UxC[u, i])
        yield {
            "problem": rollouts.problems[b].id,
            "cursor": int(rollouts.cursor_B[b]),
            "role": role.label,
            "subset": None if member_S is None else member_S.tolist(),
            "trace": i,
            "text": tokenizer.decode(ids),
            "ids": ids.tolist(),
            "logprobs": [round(float(x), 6) for x in groups.logprob_UxCxG[u, i, :length]],
            "length": length,
            "stop": Stop(groups.stop_UxC[u, i]).name.lower(),
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
