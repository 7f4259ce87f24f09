"""Population replay: what a deeper round of self-aggregation would read, kept from step to step.

The answers of a round of aggregation of a problem are its population. A later step reads some
populations as rounds more, as many as its own problems have: the first candidates are stale, the
answers are the policy's own. So a round costs what it samples, and not the rounds before it, and
nothing has to wait for the data to come round again.

Answers take the place of what they are answers to once they have earned as much on average, so
rounds grow deeper as the policy learns to read them. Until then the same population is read again,
in other sets: what a policy that cannot read has written is not what a better one will have to
read. Every process has all populations, and what is kept and read is a pure function of keys, steps
and rewards.
"""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spiral_jax.core.groups import GroupRequests, Groups, Purpose, pad_rows
from spiral_jax.objective.subsets import Key, draw_subsets
from spiral_jax.rollout.settings import ReplaySettings
from spiral_jax.verifier.rewards import Verdict


@dataclasses.dataclass(frozen=True)
class Population:
    """The C = K * M answers of one round of aggregation of one problem.

    Attributes:
      cursor: where its problem stands in the task's stream.
      step, round: in which they were sampled; round 1 reads search traces.
      trace_CxG, trace_len_C, stop_C: int32, as in `Groups`.
      verdict_C: objects; rewards are theirs.
      uses: how many steps have read it.
    """

    cursor: int
    step: int
    round: int
    trace_CxG: np.ndarray
    trace_len_C: np.ndarray
    stop_C: np.ndarray
    verdict_C: np.ndarray
    uses: int = 0

    @classmethod
    def of(cls, cursor: int, round: int, answers: Groups) -> Population:
        """The population that the judged groups of a problem's sets are, set by set."""
        step = int(answers.requests.id_Ux6[0, 1])
        longest = int(answers.trace_len_UxC.max(initial=1))
        return cls(
            cursor=cursor,
            step=step,
            round=round,
            trace_CxG=answers.trace_UxCxG.reshape(-1, answers.requests.max_tokens)[:, :longest],
            trace_len_C=answers.trace_len_UxC.reshape(-1),
            stop_C=answers.stop_UxC.reshape(-1),
            verdict_C=answers.verdict_UxC.reshape(-1),
        )

    @property
    def reward_C(self) -> np.ndarray:
        """float32; NaN: our own failure."""
        return np.array([verdict.reward for verdict in self.verdict_C], np.float32)

    @property
    def mean_reward(self) -> float:
        """Of the answers that were verified; 0 if none was."""
        reward_C = self.reward_C.astype(np.float64)
        valid = ~np.isnan(reward_C)
        return float(reward_C[valid].sum() / max(valid.sum(), 1))

    def as_group(self, search: GroupRequests, max_tokens: int) -> Groups:
        """One group (U = 1) under the problem's search prompt.

        Its log-probs are not known, and its advantages are 0: it is read and not trained on.

        Args:
          max_tokens: limit of an answer.
        """
        C, G = self.trace_CxG.shape
        trace_CxG = np.pad(self.trace_CxG, ((0, 0), (0, max_tokens - G)))
        return Groups(
            dataclasses.replace(search, traces=C, max_tokens=max_tokens),
            trace_UxCxG=trace_CxG[None],
            trace_len_UxC=self.trace_len_C[None],
            logprob_UxCxG=np.full((1, C, max_tokens), np.nan, np.float32),
            stop_UxC=self.stop_C[None],
            reward_UxC=self.reward_C[None],
            verdict_UxC=self.verdict_C[None],
            advantage_UxC=np.zeros((1, C), np.float32),
        )

    def to_plain(self) -> dict[str, Any]:
        """JSON types; ids are packed, as there may be millions."""
        ids = [
            trace[:length] for trace, length in zip(self.trace_CxG, self.trace_len_C, strict=True)
        ]
        packed = zlib.compress(np.concatenate(ids).astype("<i4").tobytes(), level=1)
        return {
            "cursor": self.cursor,
            "step": self.step,
            "round": self.round,
            "uses": self.uses,
            "ids": base64.b64encode(packed).decode("ascii"),
            "lengths": self.trace_len_C.tolist(),
            "stops": self.stop_C.tolist(),
            "verdicts": [verdict.to_plain() for verdict in self.verdict_C],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Population:
        """What `to_plain` wrote."""
        ids = np.frombuffer(zlib.decompress(base64.b64decode(plain["ids"])), "<i4")
        rows = np.split(ids, np.cumsum(plain["lengths"])[:-1])
        trace_CxG, trace_len_C = pad_rows(rows)
        verdicts = [Verdict.from_plain(verdict) for verdict in plain["verdicts"]]
        return cls(
            cursor=plain["cursor"],
            step=plain["step"],
            round=plain["round"],
            trace_CxG=trace_CxG,
            trace_len_C=trace_len_C,
            stop_C=np.array(plain["stops"], np.int32),
            verdict_C=np.array(verdicts, object),
            uses=plain["uses"],
        )


@dataclasses.dataclass(frozen=True)
class Populations:
    """Those that may still be read, those of early steps first; a run carries them and saves them.

    Attributes:
      kept: at most `settings.capacity`.
    """

    settings: ReplaySettings
    kept: tuple[Population, ...] = ()

    def drawn(self, step: int) -> list[Population]:
        """Those that a step reads, in cursor order: `settings.problems`, or all if there are fewer.

        Each is as likely as any other; the draw is keyed by the step.
        """
        count = min(self.settings.problems, len(self.kept))
        if not count:
            return []
        key = Key(self.settings.seed, int(Purpose.REPLAY), step, 0, 0)
        (chosen,) = draw_subsets(key, len(self.kept), count, 1)
        return sorted((self.kept[i] for i in chosen), key=lambda each: each.cursor)

    def after(
        self,
        step: int,
        sampled: Iterable[Population],
        replayed: Iterable[Sequence[Population]],
    ) -> Populations:
        """What the next step can read.

        A population is gone when the answers to it take its place: once they have earned as much,
        and where a step reads several rounds, once those of the last have; when it was read as
        often as it may be; and when it is too old. What has earned nothing at all is not kept. New
        problems fill the room that is left, drawn by key: if they pushed older ones out, a batch
        larger than the store would leave nothing to read deeper rounds of.

        Args:
          step: that has ended.
          sampled: the first answers to search traces of its problems.
          replayed: the answers to what `drawn` has given, in that order, round by round.
        """
        kept, deeper = [], []
        read = self.drawn(step)
        answers = dict(zip((each.cursor for each in read), replayed, strict=True))
        for population in self.kept:
            if answer := answers.get(population.cursor):
                if answer[-1].mean_reward >= population.mean_reward:
                    deeper.append(answer[0])
                    continue
                population = dataclasses.replace(population, uses=population.uses + 1)
            if self._is_fresh(population, step + 1):
                kept.append(population)
        deeper = list(filter(self._is_readable, deeper))
        fresh = list(filter(self._is_readable, sampled))
        room = self.settings.capacity - len(kept) - len(deeper)
        return dataclasses.replace(self, kept=(*kept, *self._some(fresh, room, step), *deeper))

    def _some(self, fresh: list[Population], room: int, step: int) -> list[Population]:
        """As many as there is room for, in their order."""
        if not fresh or room <= 0:  # less than none: a resumed run may have a smaller store
            return []
        key = Key(self.settings.seed, int(Purpose.REPLAY), step, 0, 1)
        (chosen,) = draw_subsets(key, len(fresh), min(room, len(fresh)), 1)
        return [fresh[i] for i in chosen]

    def _is_readable(self, population: Population) -> bool:
        """Whether answers to it are rounds that are trained, and it has earned anything."""
        deepest = self.settings.rounds - self.settings.reads
        return population.round <= deepest and population.mean_reward > 0

    def to_plain(self) -> list[dict[str, Any]]:
        """JSON types."""
        return [population.to_plain() for population in self.kept]

    def restored(self, plain: Sequence[dict[str, Any]], step: int) -> Populations:
        """Those that `to_plain` wrote and that these settings, which may be others, let be read.

        Args:
          step: that reads them next.
        """
        kept = map(Population.from_plain, plain)
        return dataclasses.replace(self, kept=tuple(p for p in kept if self._may_be_read(p, step)))

    def _may_be_read(self, population: Population, step: int) -> bool:
        s = self.settings
        has_size = len(population.trace_len_C) == s.answers
        fits = has_size and population.trace_len_C.max() <= s.max_tokens
        return fits and self._is_fresh(population, step) and self._is_readable(population)

    def _is_fresh(self, population: Population, step: int) -> bool:
        """Whether it is young enough for that step, and was not read too often."""
        s = self.settings
        return population.uses < s.uses and step - population.step <= s.max_age
