"""The traces of an evaluation as a stream: problems enter in order, and each goes through its
stages by itself.

    problem -> search group -> disjoint subsets -> aggregation groups
                            -> the first population -> round 1 -> round 2 ... of self-aggregation

Nothing waits for another problem, and no verdict for what is sampled next. A trace's tokens depend
on its key and its prompt alone, so they are those of one stage after the other.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.config import eval_subset_size
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role, concat_groups, take_groups
from spiral_jax.objective import subsets
from spiral_jax.rollout.requests import Actor, aggregation_requests, as_population, search_requests
from spiral_jax.tasks.problem import Problem

_PLAIN = (
    1  # the round in the random keys of plain aggregation; round r of self-aggregation has r + 1
)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """All traces of B held-out problems, in problem order.

    Attributes:
      search: U = B groups of N traces.
      member_BxKxS: which of them are aggregated together.
      aggregation: U = B * K groups.
      rounds: of self-aggregation, for each the U = B * population groups of one trace.
      cleaned: what cleaning removed from candidates, by stage (`aggregation_*`, `rsa_*`).
    """

    search: Groups
    member_BxKxS: np.ndarray
    aggregation: Groups
    rounds: list[Groups]
    cleaned: Counter


@dataclasses.dataclass
class _Asked:
    """One problem on its way."""

    problem: Problem
    index: int
    search: Groups | None = None
    member_1xKxS: np.ndarray | None = None
    population: Groups | None = None  # what the next round reads
    by_round: dict[int, dict[int, Groups]] = dataclasses.field(
        default_factory=dict
    )  # round of the keys, set

    def groups(self, round: int) -> Groups:
        """Of a complete round, in the order of its sets."""
        found = self.by_round[round]
        return concat_groups([found[k] for k in range(len(found))])


class EvaluationFeed:
    """A `sampling.protocol.Feed`, finished when every problem has been through all stages.

    Args:
      actor: its `c` is that of one of the `config.for_evaluation*`.
      index_B: where each problem stands among the held-out ones.
      step: of training; names the random numbers.
      search: the problems' search groups where other weights have drawn them; None: they are asked
      for.
    """

    def __init__(
        self,
        actor: Actor,
        problems: list[Problem],
        index_B: np.ndarray,
        step: int,
        search: Groups | None = None,
    ):
        self._actor, self._step = actor, step
        self._asked = [
            _Asked(problem, int(index)) for problem, index in zip(problems, index_B, strict=True)
        ]
        self._by_index = {asked.index: asked for asked in self._asked}
        self._new = deque(self._asked if search is None else ())
        self._ready: deque[GroupRequests] = (
            deque()
        )  # aggregation groups: they go before new problems
        self._open = 0  # groups that are ready or on their way
        self._cleaned: Counter[str] = Counter()
        for b, asked in enumerate(self._asked if search is not None else ()):
            self._searched(asked, take_groups(search, np.array([b])))

    def finished(self) -> bool:
        return not self._new and not self._open

    def next(self, now: int) -> GroupRequests | None:
        """An aggregation group whose candidates are there, else a new problem's search group, else
        None.
        """
        if self._ready:
            return self._ready.popleft()
        if not self._new:
            return None
        asked, self._open = self._new.popleft(), self._open + 1
        index_1 = np.array([asked.index])
        return search_requests(
            self._actor, [asked.problem], index_1, Purpose.EVALUATION, self._step
        )

    def done(self, group: Groups, now: int) -> None:
        """Takes a group, and asks for what reads it as soon as all that is read with it is there."""
        _, _, index, round, role, k = (int(x) for x in group.requests.id_Ux6[0])
        asked, e = self._by_index[index], self._actor.c.eval
        if role == Role.SEARCH:
            self._searched(asked, group)
        else:
            of_round = asked.by_round.setdefault(round, {})
            of_round[k] = group
            if round > _PLAIN and len(of_round) == e.population:
                asked.population = as_population(asked.groups(round), asked.search)
                self._begin_round(asked, round - _PLAIN + 1)
        self._open -= 1

    def sampled(self) -> Sampled:
        """Everything, once the feed is finished."""
        of_round = lambda round: concat_groups([asked.groups(round) for asked in self._asked])  # noqa: E731
        return Sampled(
            search=concat_groups([asked.search for asked in self._asked]),
            member_BxKxS=np.concatenate([asked.member_1xKxS for asked in self._asked]),
            aggregation=of_round(_PLAIN),
            rounds=[of_round(_PLAIN + round) for round in range(1, self._actor.c.eval.rounds + 1)],
            cleaned=self._cleaned,
        )

    def _searched(self, asked: _Asked, group: Groups) -> None:
        """Takes a problem's search group; its plain aggregation and its first round of
        self-aggregation can begin.
        """
        e = self._actor.c.eval
        asked.search, asked.population = group, _first_traces(group, e.population)
        asked.member_1xKxS = _disjoint(self._actor.c, asked.index, self._step)[None]
        self._aggregate(asked, group, asked.member_1xKxS, e.traces, _PLAIN)
        self._begin_round(asked, 1)

    def _begin_round(self, asked: _Asked, round: int) -> None:
        """Recursive self-aggregation (arXiv 2509.26626): each member of the next population reads its own
        `eval.set_size` distinct members of this one and is one new trace. The first population are search traces."""
        c, e = self._actor.c, self._actor.c.eval
        if round > e.rounds:
            return
        member_KxS = subsets.independent_subsets(
            c.seed,
            int(Purpose.EVALUATION),
            self._step,
            asked.index,
            round,
            e.population,
            e.set_size,
            e.population,
        )
        self._aggregate(asked, asked.population, member_KxS[None], 1, _PLAIN + round)

    def _aggregate(
        self, asked: _Asked, candidates: Groups, member_1xKxS: np.ndarray, traces: int, round: int
    ) -> None:
        requests, cleaned = aggregation_requests(
            self._actor, [asked.problem], candidates, member_1xKxS, traces, round
        )
        self._ready.extend(requests.take([u]) for u in range(len(requests)))
        self._open += len(requests)
        stage = "aggregation" if round == _PLAIN else "rsa"
        self._cleaned.update({f"{stage}_{name}": count for name, count in cleaned.items()})


def _disjoint(c: ConfigDict, index: int, step: int) -> np.ndarray:
    """int32 [K, S]: which search traces are aggregated together."""
    N, S, K = c.search.traces, eval_subset_size(c), c.eval.subsets
    return subsets.disjoint_subsets(c.seed, int(Purpose.EVALUATION), step, index, 0, N, S, K)


def _first_traces(group: Groups, size: int) -> Groups:
    """The first `size` traces of a group (U = 1)."""
    return dataclasses.replace(
        group,
        requests=dataclasses.replace(group.requests, traces=size),
        trace_UxCxG=group.trace_UxCxG[:, :size],
        trace_len_UxC=group.trace_len_UxC[:, :size],
        logprob_UxCxG=group.logprob_UxCxG[:, :size],
        stop_UxC=group.stop_UxC[:, :size],
    )
