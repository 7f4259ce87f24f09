"""Verdicts on the traces of a rollout, while sampling goes on.

The verifier works in the background, and time is counted in decode chunks: a problem's verdicts
count a fixed number of chunks after its last group ended, and are waited for where they are late.
So what is tried, kept and discarded depends on data, keys and token counts alone, never on how
quick the verifier or the device are. Of several processes each judges its share of a stage's
traces; the shares are united when the verdicts are due, at the same time on all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spiral_jax.core import distributed
from spiral_jax.core.groups import Groups
from spiral_jax.rollout.feed import Completed, Course
from spiral_jax.rollout.stages import Stage
from spiral_jax.rollout.traces import Replayed, Rollouts, Round
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.verifier import Verifier, exchange

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

Strategy = Callable[[str, Problem], Hashable | None]


@dataclasses.dataclass
class _Trial:
    """A problem whose traces are being judged: this process's share of each stage."""

    course: Course
    verdicts: dict[str, concurrent.futures.Future[list[Verdict]]]
    due: int | None = None  # in decode chunks; None: a stage is still missing


class Judge:
    """Judges complete stages in the background; a context manager.

    Args:
      delay: decode chunks from a problem's last group until its verdicts count.
      strategy: names the strategy of a search trace; None where nobody asks.
    """

    def __init__(
        self,
        verifier: Verifier,
        tokenizer: PreTrainedTokenizerBase,
        delay: int,
        strategy: Strategy | None,
    ):
        self._verifier, self._tokenizer, self._strategy = verifier, tokenizer, strategy
        self._delay = delay
        self._trials: dict[int, _Trial] = {}  # by cursor
        self._longest_s = 0.0  # that all verdicts asked for so far may take
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)  # one call at a time

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, completed: Completed) -> None:
        """Begins to judge a stage."""
        course, stage, now = completed
        trial = self._trials.setdefault(course.asked.cursor, _Trial(course, {}))
        groups = course.of_stage(stage)
        share = distributed.share(groups.trace_len_UxC.size)
        # Texts are decoded here and not in the thread: a tokenizer does not serve two.
        texts = trace_texts(self._tokenizer, groups, share)
        items = [(text, course.asked.problem) for text in texts]
        self._longest_s += self._verifier.longest_s(len(items))
        trial.verdicts[stage.name] = self._pool.submit(self._verifier.judge, items)
        if stage is course.stages[-1]:
            trial.due = now + self._delay

    def due(self, now: int) -> list[Rollouts | Replayed]:
        """The problems whose verdicts are due, rewards filled in: B = 1 each, in cursor order.

        A collective where there are several processes.

        Raises:
          VerifierFailure: the verifier does not answer.
        """
        trials = [trial for trial in self._trials.values() if trial.due is not None]
        trials = [trial for trial in trials if trial.due <= now]
        trials.sort(key=lambda trial: trial.course.asked.cursor)
        if not trials:
            return []
        asked = [(trial, stage) for trial in trials for stage in trial.course.stages]
        verdicts = iter(exchange([self._wait_for(trial, stage) for trial, stage in asked]))
        rollouts = []
        for trial in trials:
            course = trial.course
            del self._trials[course.asked.cursor]
            rewarded = [reward(course.of_stage(stage), next(verdicts)) for stage in course.stages]
            if course.asked.population is None:
                rollouts.append(self._rollout(course, rewarded))
            else:
                rollouts.append(_replayed(course, rewarded))
        return rollouts

    def _wait_for(self, trial: _Trial, stage: Stage) -> list[Verdict]:
        try:
            return trial.verdicts[stage.name].result(self._longest_s)
        except concurrent.futures.TimeoutError:
            raise VerifierFailure(
                f"waited {self._longest_s:.0f} s for the verdicts on the {stage.name} traces of "
                f"problem {trial.course.asked.problem.id!r}, longer than they take if every answer "
                "hangs (config.verifier.timeout_s). Is the machine out of memory or processes?"
            ) from None

    def _rollout(self, course: Course, rewarded: list[Groups]) -> Rollouts:
        problem = course.asked.problem
        rounds = [
            Round(course.member[stage.name][None], groups)
            for stage, groups in zip(course.stages[1:], rewarded[1:], strict=True)
        ]
        strategy_1xN = None
        if self._strategy:
            texts = trace_texts(self._tokenizer, rewarded[0])
            names = [self._strategy(text, problem) for text in texts]
            strategy_1xN = number_strategies(names)[None]
        cursor_1 = np.array([course.asked.cursor])
        return Rollouts([problem], cursor_1, rewarded[0], tuple(rounds), strategy_1xN)


def _replayed(course: Course, rewarded: list[Groups]) -> Replayed:
    asked, stages = course.asked, course.stages
    rounds = [
        Round(course.member[stage.name][None], groups)
        for stage, groups in zip(stages, rewarded, strict=True)
    ]
    stored = course.of_stage(stages[0].reads)
    return Replayed([asked.problem], [asked.population], stored, tuple(rounds))


def trace_texts(
    tokenizer: PreTrainedTokenizerBase, groups: Groups, index: Iterable[int] | None = None
) -> list[str]:
    """Texts without special tokens of all U * C traces, or of those at `index` in that order."""
    U, C = groups.trace_len_UxC.shape
    index = range(U * C) if index is None else index
    return tokenizer.batch_decode(
        [groups.trace_ids(*divmod(i, C)) for i in index], skip_special_tokens=True
    )


def reward(groups: Groups, verdicts: Sequence[Verdict]) -> Groups:
    """The groups with the verdicts and rewards of their U * C traces."""
    shape = groups.trace_len_UxC.shape
    reward_UxC = np.array([verdict.reward for verdict in verdicts], np.float32).reshape(shape)
    verdict_UxC = np.array(verdicts, object).reshape(shape)
    return dataclasses.replace(groups, reward_UxC=reward_UxC, verdict_UxC=verdict_UxC)


def number_strategies(names: Sequence[Hashable | None]) -> np.ndarray:
    """int32 [N]: equal names have equal numbers, in order of appearance; None is -1."""
    number: dict[Hashable | None, int] = {None: -1}
    return np.array([number.setdefault(name, len(number) - 1) for name in names], np.int32)
