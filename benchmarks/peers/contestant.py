"""The contestant's end of the benchmarks: a process that answers JSON lines, and its work.

A request {"do": METHOD, ...arguments} on stdin is one call of a method; the answer on stdout is one
line with what it returned, its wall and CPU seconds and the process's peak memory, or with the
message of the error that it raised. What libraries print goes to stderr. Needs nothing but numpy,
so that every peer's own interpreter can import it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Work:
    """U prompts of P tokens, each continued by C traces of forced lengths.

    Attributes:
      prompt_UxP: int32 ids.
      limit_UxC: int32, the tokens of each trace.
    """

    prompt_UxP: np.ndarray
    limit_UxC: np.ndarray

    @property
    def useful_tokens(self) -> int:
        return int(self.limit_UxC.sum())

    @property
    def longest(self) -> int:
        return int(self.limit_UxC.max())

    def first(self, groups: int) -> Work:
        return Work(self.prompt_UxP[:groups], self.limit_UxC[:groups])

    def batches(self, groups_per_batch: int) -> Iterator[Work]:
        """Static batches in the given order."""
        for start in range(0, len(self.prompt_UxP), groups_per_batch):
            chosen = slice(start, start + groups_per_batch)
            yield Work(self.prompt_UxP[chosen], self.limit_UxC[chosen])

    def to_json(self) -> dict[str, Any]:
        return {"prompt_UxP": self.prompt_UxP.tolist(), "limit_UxC": self.limit_UxC.tolist()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Work:
        return Work(
            np.array(fields["prompt_UxP"], np.int32), np.array(fields["limit_UxC"], np.int32)
        )


class Contestant(Protocol):
    """What each file of this directory implements."""

    def load(self, model: str) -> dict[str, Any]:
        """Reads the Hugging Face directory.

        Returns {"versions": {package: version}, "settings": what was chosen}.
        """

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy continuation: shows that all contestants compute the same function."""

    def sample(self, work: dict[str, Any], groups_per_batch: int, seed: int) -> int:
        """Samples all traces at T = 1; a trace cut short is an error.

        Returns trace rows x steps really computed.
        """


def serve(contestant: Contestant) -> None:
    """Answers requests until stdin closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(contestant, request.pop("do"))
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            returned = method(**request)
        except Exception as error:  # the next request may do: memory that this one lacked is free
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
            print(json.dumps({"failed": message}), file=answers, flush=True)
            continue
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # as Linux counts
        answer = {
            "returned": returned,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_rss_bytes": peak_kib * 1024,
        }
        print(json.dumps(answer), file=answers, flush=True)
