"""A stage's groups as requests to the sampler: prompts of token ids, names of random keys."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Stop, pad_rows
from spiral_jax.prompts.prompts import aggregation_prompt, listed_order
from spiral_jax.prompts.scaffold import Scaffold
from spiral_jax.rollout.populations import Population
from spiral_jax.rollout.stages import Stage
from spiral_jax.tasks.problem import Problem


@dataclasses.dataclass(frozen=True)
class Asked:
    """A problem that enters a rollout.

    Attributes:
      cursor: where it stands in its stream, or among the held-out problems.
      prompt_P: int32 ids of its search prompt.
      population: stored answers that are read in place of new search traces; None: there are none.
    """

    cursor: int
    problem: Problem
    prompt_P: np.ndarray
    population: Population | None = None


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes the requests of one training step, or of one evaluation.

    Attributes:
      purpose, step: name the random keys of all groups, beside problem, round, role and set.
      seed: config.seed.
      order: config.aggregation.order.
    """

    scaffold: Scaffold
    purpose: Purpose
    step: int
    seed: int
    order: str

    def search(self, stage: Stage, asked: Asked) -> GroupRequests:
        """Of a problem's search group: U = 1."""
        return GroupRequests(
            prompt_UxP=asked.prompt_P[None],
            prompt_len_U=np.array([len(asked.prompt_P)], np.int32),
            id_Ux6=self._ids(stage, asked.cursor, 1),
            traces=stage.traces,
            max_tokens=stage.max_tokens,
        )

    def aggregation(
        self, stage: Stage, asked: Asked, candidates: Groups, member_KxS: np.ndarray
    ) -> tuple[GroupRequests, Counter[str]]:
        """Of a problem's sets in a stage: U = K, and what cleaning took out of the candidates.

        Prompts are spliced from sampled ids, candidates in the order of config.aggregation.order.

        Args:
          candidates: one group (U = 1) of the traces that the sets are made of.
        """
        id_Kx6 = self._ids(stage, asked.cursor, len(member_KxS))
        fences = self.scaffold.fences
        fenced = fences is not None and fences(asked.problem)
        prompts, cleaned = [], Counter()
        for member_S, id_6 in zip(member_KxS, id_Kx6, strict=True):
            shown = [
                (candidates.trace_ids(0, n), Stop(candidates.stop_UxC[0, n])) for n in member_S
            ]
            order_S = listed_order(self.order, self.seed, id_6, len(shown))
            prompt = aggregation_prompt(self.scaffold, asked.problem.text, shown, order_S, fenced)
            prompts.append(prompt.ids)
            cleaned.update(
                removed_special=prompt.removed_special,
                dropped=prompt.dropped,
                empty=prompt.empty,
                candidates=len(shown),
            )
        prompt_UxP, prompt_len_U = pad_rows(prompts)
        requests = GroupRequests(prompt_UxP, prompt_len_U, id_Kx6, stage.traces, stage.max_tokens)
        return requests, cleaned

    def _ids(self, stage: Stage, cursor: int, sets: int) -> np.ndarray:
        """int32 [sets, 6]: (purpose, step, cursor, round, role, set)."""
        fixed = (self.purpose, self.step, cursor, stage.round, stage.role)
        return np.array([[*fixed, k] for k in range(sets)], np.int32)
