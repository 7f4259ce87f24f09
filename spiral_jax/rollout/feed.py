"""The rollouts of one step as a stream: problems enter in cursor order, and each goes through its
stages by itself.

    problem -> search group -> subsets -> aggregation groups (-> subsets of them -> ...) -> verdicts
    -> kept or not

Stages are numbered as rounds are in the ids of groups: 0 is search, r the r-th round of
aggregation, which reads the traces of stage r - 1. Nothing waits for another problem's stage.
Admission knows the time only as decode chunks, and a verdict only `sampling.verdict_delay` chunks
after its group ended (it waits for a late one), so what is tried, kept and discarded depends on
data, keys and token counts alone, never on how quick verifier or device are. In a run of several
processes each judges its share of a group's traces; the shares are united when the verdicts are
due, at the same time on all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections import Counter, deque
from collections.abc import Callable

import numpy as np

from spiral_jax.core import distributed, faults
from spiral_jax.core.config import ESTIMATORS, ConfigError, aggregation_rounds
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role, concat_groups
from spiral_jax.objective import subsets
from spiral_jax.rollout.requests import (
    Actor,
    Rollouts,
    Round,
    aggregation_requests,
    as_population,
    concat_rollouts,
    fits,
    load_strategy,
    number_strategies,
    rewarded,
    search_requests,
    trace_texts,
)
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.verifier import count_verdicts, exchange

_PRIOR = 8  # decided problems that config.sampling.keep_rate weighs as much as
_Judging = concurrent.futures.Future[list[Verdict]]


@dataclasses.dataclass
class _Tried:
    """One problem on its way."""

    problem: Problem
    cursor: int
    arrived: dict[int, dict[int, Groups]] = dataclasses.field(default_factory=dict)  # stage, set
    strategy_1xN: np.ndarray | None = None
    member_1xKxS: list[np.ndarray] = dataclasses.field(
        default_factory=list
    )  # of every round that has begun
    judging: dict[int, _Judging] = dataclasses.field(
        default_factory=dict
    )  # by stage; this process's share
    verdicts: dict[int, list[Verdict]] = dataclasses.field(default_factory=dict)  # by stage
    due: int | None = None  # when its verdicts may be known
    rollouts: Rollouts | None = None  # B = 1, rewards filled in
    kept: bool = False

    @property
    def decided(self) -> bool:
        return self.rollouts is not None

    def stage(self, stage: int) -> Groups:
        """The groups of a complete stage, in the order of their sets."""
        arrived = self.arrived[stage]
        return concat_groups([arrived[k] for k in range(len(arrived))])


class RolloutFeed:
    """A `sampling.protocol.Feed` of one training step, finished when the first B kept problems are
    known.

    Args:
      keep: whether the rollouts of one problem (B = 1) carry a signal.
    """

    def __init__(self, actor: Actor, step: int, cursor: int, keep: Callable[[Rollouts], bool]):
        self._actor, self._step, self._keep = actor, step, keep
        self._strategy = (
            load_strategy(actor.c, actor.task) if actor.c.loss.estimator == "polychromic" else None
        )
        self._rounds = aggregation_rounds(actor.c)
        self._limit = int(actor.c.sampling.max_ratio * actor.c.batch.problems)
        self._tried: list[_Tried] = []
        self._by_cursor: dict[int, _Tried] = {}
        self._ready: deque[GroupRequests] = (
            deque()
        )  # aggregation groups: they go before new problems
        self._counts: Counter[str] = Counter()
        self._verifying_s = 0.0  # that all verdicts asked for so far may take
        self._verifying = concurrent.futures.ThreadPoolExecutor(
            max_workers=1
        )  # the verifier serves one call at a time
        self.next_cursor = cursor  # behind the last problem that was tried
        self.too_long = 0  # problems that were left out

    def __enter__(self) -> RolloutFeed:
        return self

    def __exit__(self, *exception: object) -> None:
        self._verifying.shutdown(cancel_futures=True)

    @property
    def tried(self) -> int:
        return len(self._tried)

    def take_verdicts(self, now: int) -> None:
        """Takes in the verdicts that are due by now."""
        self._decide(
            [t for t in self._tried if t.due is not None and t.due <= now and not t.decided]
        )
        if not all(tried.arrived for tried in self._tried):
            faults.passed("search")

    def finished(self) -> bool:
        """The first B kept problems are known, or all that may be tried has been."""
        kept = 0
        for tried in self._tried:
            if not tried.decided:
                return False
            kept += tried.kept
            if kept == self._actor.c.batch.problems:
                return True
        return self.tried >= self._limit

    def next(self, now: int) -> GroupRequests | None:
        """An aggregation group that is due, else a new problem's search group, else None."""
        if self._ready:
            return self._ready.popleft()
        return self._admit() if self._wants_more() else None

    def done(self, group: Groups, now: int) -> None:
        """The last group of a stage sends it to the verifier; the next stage reads it, or its
        problem is judged.
        """
        _, _, cursor, stage, _, k = (int(x) for x in group.requests.id_Ux6[0])
        tried = self._by_cursor[cursor]
        arrived = tried.arrived.setdefault(stage, {})
        arrived[k] = group
        if stage and len(arrived) < tried.member_1xKxS[stage - 1].shape[1]:
            return
        self._submit(tried, stage)
        if stage < self._rounds:
            self._aggregate(tried, stage + 1)
        else:
            tried.due = now + self._actor.c.sampling.verdict_delay

    def decided(self) -> tuple[Rollouts, Counter, list[Verdict]]:
        """All decided problems in cursor order, counts for the log (`search_*`, `aggregation_*`),
        and all verdicts.
        """
        found = [tried for tried in self._tried if tried.decided]
        counts, all_verdicts = self._counts.copy(), []
        for tried in found:
            for stage, verdicts in tried.verdicts.items():
                all_verdicts += verdicts
                for status, count in count_verdicts(verdicts).items():
                    counts[f"{_role(stage).label}_{status}"] += count
        return concat_rollouts([tried.rollouts for tried in found]), counts, all_verdicts

    def _wants_more(self) -> bool:
        """Whether those on the way will probably not fill the batch, at the rate at which problems
        are kept so far.
        """
        decided = sum(tried.decided for tried in self._tried)
        kept = sum(tried.kept for tried in self._tried)
        rate = (kept + _PRIOR * self._actor.c.sampling.keep_rate) / (decided + _PRIOR)
        expected = kept + (self.tried - decided) * rate
        return self.tried < self._limit and expected < self._actor.c.batch.problems

    def _admit(self) -> GroupRequests:
        start = self.next_cursor
        while not fits(self._actor, problem := self._actor.task.train(self.next_cursor)):
            self.next_cursor += 1
            self.too_long += 1
            if self.next_cursor - start >= 10_000:
                raise ConfigError(
                    f"none of 10,000 problems from cursor {start} has a search prompt of at most "
                    f"config.prompt.max_problem_tokens = {self._actor.c.prompt.max_problem_tokens} tokens: raise it."
                )
        tried = _Tried(problem, self.next_cursor)
        self._tried.append(tried)
        self._by_cursor[tried.cursor] = tried
        self.next_cursor += 1
        return search_requests(
            self._actor, [problem], np.array([tried.cursor]), Purpose.TRAIN, self._step
        )

    def _aggregate(self, tried: _Tried, round: int) -> None:
        """Asks for a round: K sets of the stage before, M traces for each."""
        c, a = self._actor.c, self._actor.c.aggregation
        draw = (
            subsets.disjoint_subsets
            if ESTIMATORS[c.loss.estimator] == "partition"
            else subsets.draw_subsets
        )
        search = tried.stage(0)
        candidates = search if round == 1 else as_population(tried.stage(round - 1), search)
        N = candidates.requests.traces
        member_KxS = draw(
            c.seed, int(Purpose.TRAIN), self._step, tried.cursor, round - 1, N, a.subset_size, a.subsets
        )  # fmt: skip
        tried.member_1xKxS.append(member_KxS[None])
        faults.passed("aggregation")
        requests, cleaned = aggregation_requests(
            self._actor, [tried.problem], candidates, member_KxS[None], a.traces, round
        )
        self._ready.extend(requests.take([u]) for u in range(len(requests)))
        self._counts.update({f"aggregation_{name}": count for name, count in cleaned.items()})

    def _submit(self, tried: _Tried, stage: int) -> None:
        """Texts are decoded here: a tokenizer does not serve two threads."""
        groups = tried.stage(stage)
        own = distributed.share(groups.trace_len_UxC.size)
        items = [(text, tried.problem) for text in trace_texts(self._actor, groups, own)]
        if stage == 0 and self._strategy:
            texts = trace_texts(self._actor, groups)
            tried.strategy_1xN = number_strategies(
                [self._strategy(text, tried.problem) for text in texts]
            )[None]
        self._verifying_s += self._actor.verifier.longest_s(len(items))
        tried.judging[stage] = self._verifying.submit(self._actor.verifier.judge, items)

    def _decide(self, due: list[_Tried]) -> None:
        """Takes in the verdicts of problems that are due, those of all processes in one exchange."""
        if not due:
            return
        asked = [(tried, stage) for tried in due for stage in tried.judging]
        for (tried, stage), verdicts in zip(
            asked, exchange([self._wait_for(t, s) for t, s in asked]), strict=True
        ):
            tried.verdicts[stage] = verdicts
        for tried in due:
            search, *read = (
                rewarded(tried.stage(stage), tried.verdicts[stage]) for stage in tried.judging
            )
            rounds = tuple(Round(*pair) for pair in zip(tried.member_1xKxS, read, strict=True))
            tried.rollouts = Rollouts(
                [tried.problem], np.array([tried.cursor]), search, rounds, tried.strategy_1xN
            )
            tried.kept = self._keep(tried.rollouts)

    def _wait_for(self, tried: _Tried, stage: int) -> list[Verdict]:
        try:
            return tried.judging[stage].result(self._verifying_s)
        except concurrent.futures.TimeoutError:
            raise VerifierFailure(
                f"waited {self._verifying_s:.0f} s for the verdicts on the {_role(stage).label} traces of problem "
                f"{tried.problem.id!r}, longer than they take if every answer hangs (config.verifier.timeout_s = "
                f"{self._actor.c.verifier.timeout_s:g}). Is the machine out of memory or processes?"
            ) from None


def _role(stage: int) -> Role:
    return Role.AGGREGATION if stage else Role.SEARCH
