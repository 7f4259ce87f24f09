"""A requested group, and what has been drawn for it so far. NumPy only."""

from __future__ import annotations

import dataclasses

import numpy as np

from spiral_jax.core.groups import GroupRequests, Groups, Stop


@dataclasses.dataclass(eq=False)
class Job:
    """A group (U = 1) that is being sampled.

    Attributes:
      limit_C: int32 tokens of each trace.
      trace_CxG, length_C, logprob_CxG, stop_C: as in `Groups`.
      pages: of its prompt, while they are there.
      begun: how many of its traces have a row, or had one: the first ones.
      ended: how many of them have ended.
    """

    request: GroupRequests
    limit_C: np.ndarray = dataclasses.field(init=False)
    trace_CxG: np.ndarray = dataclasses.field(init=False)
    logprob_CxG: np.ndarray = dataclasses.field(init=False)
    length_C: np.ndarray = dataclasses.field(init=False)
    stop_C: np.ndarray = dataclasses.field(init=False)
    pages: list[int] = dataclasses.field(default_factory=list)
    begun: int = 0
    ended: int = 0

    def __post_init__(self) -> None:
        C, G = self.request.traces, self.request.max_tokens
        limits = self.request.limit_UxC
        self.limit_C = np.full(C, G, np.int32) if limits is None else limits[0]
        self.trace_CxG = np.zeros((C, G), np.int32)
        self.logprob_CxG = np.zeros((C, G), np.float32)
        self.length_C = np.zeros(C, np.int32)
        self.stop_C = np.full(C, Stop.LENGTH, np.int32)

    @property
    def prompt(self) -> np.ndarray:
        """int32 tokens, at least one."""
        return self.request.prompt_UxP[0, : self.request.prompt_len_U[0]]

    @property
    def prefix(self) -> int:
        """Tokens of its prompt in pages: all but the last."""
        return int(self.request.prompt_len_U[0]) - 1

    @property
    def waits(self) -> bool:
        """Whether some of its traces have not begun."""
        return self.begun < self.request.traces

    def end(self, trace: int, token_n: np.ndarray, logprob_n: np.ndarray, stopped: bool) -> None:
        """Takes a trace that has ended."""
        n = len(token_n)
        self.trace_CxG[trace, :n], self.logprob_CxG[trace, :n] = token_n, logprob_n
        self.length_C[trace] = n
        if stopped:
            self.stop_C[trace] = Stop.STOP
        self.ended += 1

    def group(self) -> Groups:
        """The completed group (U = 1)."""
        return Groups(
            self.request,
            trace_UxCxG=self.trace_CxG[None],
            trace_len_UxC=self.length_C[None],
            logprob_UxCxG=self.logprob_CxG[None],
            stop_UxC=self.stop_C[None],
        )
