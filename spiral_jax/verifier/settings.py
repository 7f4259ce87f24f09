"""temp"""
from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class VerifierSettings:
    workers: int
    timeout_s: float
    max_error_rate: float
    memory_gb: float = 4.0
    environment: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, v: ConfigDict) -> VerifierSettings:
        return cls(v.workers, v.timeout_s, v.max_error_rate, v.memory_gb, tuple(v.environment))
