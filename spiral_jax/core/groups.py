"""The one data structure: a group is one prompt and the C traces that continue it.

Axis legend, used in names, docstrings and einsums everywhere:

    B problems                    N search traces of a problem        K subsets of a problem
    S traces in a subset          M aggregation traces of a subset    U groups
    C traces of a group           P prompt tokens                     G generated tokens
    T tokens of a row             L layers                            D model width
    H query heads                 J key/value heads                   E head width
    F feed-forward width          V vocabulary

Search: one group a problem, C = N. Aggregation: one group a subset, C = M, groups in (problem,
subset) order. Rows are right-padded with zeros; masks only ever come from lengths (a pad id may
equal a stop id).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence

import numpy as np


class Role(enum.IntEnum):
    """What a trace is for. The value is part of its random key: never renumber."""

    SEARCH = 0
    AGGREGATION = 1

    @property
    def label(self) -> str:
        return self.name.lower()


ROLE_OF_ID = 4  # place of a group's role in `GroupRequests.id_Ux6`


class Purpose(enum.IntEnum):
    """Which stream of random numbers a draw belongs to. Part of the key: never renumber."""

    TRAIN = 0
    EVALUATION = 1
    REPLAY = 2  # which stored populations a step reads


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
        neighbours or its pages.
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

    def take(self, index: np.ndarray | Sequence[int]) -> GroupRequests:
        """The requests at `index` (integers into U), in that order."""
        return dataclasses.replace(
            self,
            prompt_UxP=self.prompt_UxP[index],
            prompt_len_U=self.prompt_len_U[index],
            id_Ux6=self.id_Ux6[index],
            limit_UxC=None if self.limit_UxC is None else self.limit_UxC[index],
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
      reward_UxC: float32 in [0, 1]; NaN where the reward could not be had by our own failure. None:
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

    @property
    def sampled_tokens(self) -> int:
        return int(self.trace_len_UxC.sum())

    def take(self, index: np.ndarray | Sequence[int]) -> Groups:
        """The groups at `index` (integers into U), in that order."""
        return self._reshaped(self.requests.take(index), lambda array: array[index])

    def first(self, n: int) -> Groups:
        """The first `n` traces of each group."""
        return self._reshaped(
            dataclasses.replace(self.requests, traces=n), lambda array: array[:, :n]
        )

    def as_population(self, search: GroupRequests) -> Groups:
        """All traces of each problem as one group, so that sets can be made of them.

        Args:
          search: of the B problems: prompts and ids of the result. U is a multiple of B, and the
            groups of a problem stand together.

        Returns:
          B groups of U * C / B traces, in the order of the groups.
        """
        B = len(search)
        requests = dataclasses.replace(
            search,
            traces=self.trace_len_UxC.size // B,
            max_tokens=self.requests.max_tokens,
            limit_UxC=None,  # those of its own traces are not these
        )
        return self._reshaped(requests, lambda array: array.reshape(B, -1, *array.shape[2:]))

    def cut_at(self, limit: int) -> Groups:
        """The same traces under a smaller limit on their length, not verified.

        Exactly what the sampler would have given with it: a trace's tokens depend on those before
        them, never on its limit.
        """
        is_cut_UxC = self.trace_len_UxC > limit
        limit_UxC = self.requests.limit_UxC
        requests = dataclasses.replace(
            self.requests,
            max_tokens=limit,
            limit_UxC=None if limit_UxC is None else np.minimum(limit_UxC, limit),
        )
        return Groups(
            requests,
            trace_UxCxG=self.trace_UxCxG[:, :, :limit],
            trace_len_UxC=np.minimum(self.trace_len_UxC, limit),
            logprob_UxCxG=self.logprob_UxCxG[:, :, :limit],
            stop_UxC=np.where(is_cut_UxC, np.int32(Stop.LENGTH), self.stop_UxC),
        )

    def _reshaped(
        self, requests: GroupRequests, change: Callable[[np.ndarray], np.ndarray]
    ) -> Groups:
        """These traces under `requests`, with `change` made to every array [U, C, ..]."""
        limit_UxC = self.requests.limit_UxC
        if limit_UxC is not None:
            requests = dataclasses.replace(requests, limit_UxC=change(limit_UxC))
        arrays = {name: change(array) for name, array in self._arrays().items()}
        return Groups(requests, **arrays)

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays [U, C, ..] that are there, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["requests"]
        return {name: array for name, array in fields.items() if array is not None}


def pad_rows(rows: list[np.ndarray], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads int32 rows with zeros -> (rows [U, width], lengths [U]).

    Args:
      width: None: that of the longest row.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    width = int(lengths.max(initial=1)) if width is None else width
    padded = np.zeros((len(rows), width), np.int32)
    for u, row in enumerate(rows):
        padded[u, : len(row)] = row
    return padded, lengths


def concat_groups(parts: Sequence[Groups]) -> Groups:
    """The groups of all parts, one after the other; prompts are padded to the widest.

    Raises:
      ValueError: the parts differ in C, in G, or in which of rewards, verdicts, advantages and
        limits they have.
    """
    kinds = {_kind(part) for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"groups of several kinds (traces, max_tokens, limits, arrays): {sorted(kinds)}"
        )
    requests = _concat_requests([part.requests for part in parts])
    arrays = {}
    for name in parts[0]._arrays():
        arrays[name] = np.concatenate([getattr(part, name) for part in parts])
    return Groups(requests, **arrays)


def take_groups(groups: Groups, index: np.ndarray) -> Groups:
    """`groups.take(index)`."""
    return groups.take(index)


def _concat_requests(parts: Sequence[GroupRequests]) -> GroupRequests:
    width = max(part.prompt_UxP.shape[1] for part in parts)
    prompts = []
    for part in parts:
        missing = width - part.prompt_UxP.shape[1]
        prompts.append(np.pad(part.prompt_UxP, ((0, 0), (0, missing))))
    has_limits = parts[0].limit_UxC is not None
    return dataclasses.replace(
        parts[0],
        prompt_UxP=np.concatenate(prompts),
        prompt_len_U=np.concatenate([part.prompt_len_U for part in parts]),
        id_Ux6=np.concatenate([part.id_Ux6 for part in parts]),
        limit_UxC=np.concatenate([part.limit_UxC for part in parts]) if has_limits else None,
    )


def _kind(part: Groups) -> tuple[int, int, bool, tuple[str, ...]]:
    """What groups have in common that can be put together."""
    requests = part.requests
    has_limits = requests.limit_UxC is not None
    return requests.traces, requests.max_tokens, has_limits, tuple(part._arrays())
