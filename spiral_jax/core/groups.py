"""The one data structure: a group is one prompt and the C traces that continue it.

Axis legend, used in names, docstrings and einsums everywhere:

    B problems          N search traces of a problem    K subsets of a problem     S traces in a subset
    M aggregation traces of a subset                    U groups                   C traces of a group
    P prompt tokens     G generated tokens              T tokens of a row          L layers
    D model width       H query heads                   J key/value heads          E head width
    F feed-forward width                                V vocabulary

Search: one group a problem, C = N. Aggregation: one group a subset, C = M, groups in (problem,
subset) order. Rows are right-padded with zeros; masks only ever come from lengths (a pad id may
equal a stop id).
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np


class Role(enum.IntEnum):
    """What a trace is for. The value is part of its random key: never renumber."""

    SEARCH = 0
    AGGREGATION = 1

    @property
    def label(self) -> str:
        return self.name.lower()


class Purpose(enum.IntEnum):
    """Which stream of random numbers a draw belongs to. The value is part of the key: never
    renumber.
    """

    TRAIN = 0
    EVALUATION = 1


class Stop(enum.IntEnum):
    """Why a trace ended: it emitted a stop id (kept as its last token), or it reached its limit."""

    STOP = 0
    LENGTH = 1


@dataclasses.dataclass(frozen=True)
class GroupRequests:
    """What a sampler is asked for: U groups of one role.

    Attributes:
      prompt_UxP: int32 token ids, right-padded.
      prompt_len_U: int32, >= 1.
      id_Ux6: int32 (purpose, step, cursor, round, role, set): with the run's seed and the trace's
        index this is all that a group's random numbers depend on, so a trace does not know its
        neighbours or its slot.
      traces: C.
      max_tokens: limit on a trace's length G, its stop id included.
      limit_UxC: int32 limits of single traces, 1 ... max_tokens. None: `max_tokens` for all.
    """

    prompt_UxP: np.ndarray
    prompt_len_U: np.ndarray
    id_Ux6: np.ndarray
    traces: int
    max_tokens: int
    limit_UxC: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_len_U)

    def take(self, index: np.ndarray | list[int]) -> GroupRequests:
        """The requests at `index` (integers into U), in that order."""
        arrays = {
            name: getattr(self, name)
            for name in ("prompt_UxP", "prompt_len_U", "id_Ux6", "limit_UxC")
        }
        return dataclasses.replace(
            self, **{n: a[index] for n, a in arrays.items() if a is not None}
        )


@dataclasses.dataclass(frozen=True)
class Groups:
    """Completed groups of one role; rewards and advantages are filled in by later stages.

    Attributes:
      requests: what was asked for; `prompt_UxP` and `prompt_len_U` come from there.
      trace_UxCxG: int32 token ids, right-padded, the stop id included.
      trace_len_UxC: int32.
      logprob_UxCxG: float32, of the distribution that was really sampled from, recorded while
      decoding.
      stop_UxC: int32 values of `Stop`.
      reward_UxC: float32 in {0, 1}; NaN where the reward could not be had by our own failure. None:
      not verified.
      verdict_UxC: objects, the `verifier.rewards.Verdict` behind each reward. None: not verified.
      advantage_UxC: float32. None: not computed.
    """

    requests: GroupRequests
    trace_UxCxG: np.ndarray
    trace_len_UxC: np.ndarray
    logprob_UxCxG: np.ndarray
    stop_UxC: np.ndarray
    reward_UxC: np.ndarray | None = None
    verdict_UxC: np.ndarray | None = None
    advantage_UxC: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def trace_ids(self, u: int, c: int) -> np.ndarray:
        """int32 ids of one trace without padding."""
        return self.trace_UxCxG[u, c, : self.trace_len_UxC[u, c]]

    def as_population(self) -> Groups:
        """One group (U = 1) of all traces, group by group, with the first group's prompt."""
        G = self.requests.max_tokens
        requests = dataclasses.replace(self.requests.take([0]), traces=self.trace_len_UxC.size)
        return dataclasses.replace(
            self,
            requests=requests,
            trace_UxCxG=self.trace_UxCxG.reshape(1, -1, G),
            trace_len_UxC=self.trace_len_UxC.reshape(1, -1),
            logprob_UxCxG=self.logprob_UxCxG.reshape(1, -1, G),
            stop_UxC=self.stop_UxC.reshape(1, -1),
            reward_UxC=None,
            verdict_UxC=None,
            advantage_UxC=None,
        )

    def first(self, n: int) -> Groups:
        """The first n traces of each group."""
        return dataclasses.replace(
            self,
            requests=dataclasses.replace(self.requests, traces=n),
            trace_UxCxG=self.trace_UxCxG[:, :n],
            trace_len_UxC=self.trace_len_UxC[:, :n],
            logprob_UxCxG=self.logprob_UxCxG[:, :n],
            stop_UxC=self.stop_UxC[:, :n],
        )

    def cut_at(self, limit: int) -> Groups:
        cut_UxC = self.trace_len_UxC > limit
        return dataclasses.replace(
            self,
            requests=dataclasses.replace(self.requests, max_tokens=limit),
            trace_UxCxG=self.trace_UxCxG[:, :, :limit],
            trace_len_UxC=np.minimum(self.trace_len_UxC, limit),
            logprob_UxCxG=self.logprob_UxCxG[:, :, :limit],
            stop_UxC=np.where(cut_UxC, Stop.LENGTH, self.stop_UxC),
            reward_UxC=None,
            verdict_UxC=None,
        )

    @property
    def sampled_tokens(self) -> int:
        return int(self.trace_len_UxC.sum())


def pad_rows(rows: list[np.ndarray], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads int32 rows with zeros; returns (rows [U, width], lengths [U]). Default width: the
    longest row.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    width = int(lengths.max(initial=1)) if width is None else width
    padded = np.zeros((len(rows), width), np.int32)
    for u, row in enumerate(rows):
        padded[u, : len(row)] = row
    return padded, lengths


def take_groups(groups: Groups, index: np.ndarray) -> Groups:
    """The groups at `index` (integers into U), in that order."""
    arrays = {
        field.name: None
        if getattr(groups, field.name) is None
        else getattr(groups, field.name)[index]
        for field in dataclasses.fields(groups)
        if field.name != "requests"
    }
    return Groups(requests=groups.requests.take(index), **arrays)


def concat_groups(parts: list[Groups]) -> Groups:
    """The groups of all parts, one after the other; prompts are padded to the widest.

    Raises:
      ValueError: the parts differ in C, in G, or in which of rewards, verdicts, advantages and
      limits they have.
    """
    kinds = {
        (p.requests.traces, p.requests.max_tokens)
        + tuple(
            a is None for a in (p.reward_UxC, p.verdict_UxC, p.advantage_UxC, p.requests.limit_UxC)
        )
        for p in parts
    }
    if len(kinds) > 1:
        raise ValueError(
            f"groups of several kinds (traces, max_tokens, no rewards, verdicts, advantages, limits): {sorted(kinds)}"
        )
    width = max(part.requests.prompt_UxP.shape[1] for part in parts)
    requests = dataclasses.replace(
        parts[0].requests,
        prompt_UxP=np.concatenate(
            [
                np.pad(p.requests.prompt_UxP, ((0, 0), (0, width - p.requests.prompt_UxP.shape[1])))
                for p in parts
            ]
        ),
        prompt_len_U=np.concatenate([part.requests.prompt_len_U for part in parts]),
        id_Ux6=np.concatenate([part.requests.id_Ux6 for part in parts]),
        limit_UxC=None
        if parts[0].requests.limit_UxC is None
        else np.concatenate([part.requests.limit_UxC for part in parts]),
    )
    arrays = {
        field.name: None
        if getattr(parts[0], field.name) is None
        else np.concatenate([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Groups)
        if field.name != "requests"
    }
    return Groups(requests=requests, **arrays)
