"""config.verifier as one value."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from spiral_jax.core.config import require


@dataclasses.dataclass(frozen=True)
class VerifierSettings:
    """How answers are judged.

    Attributes:
      workers: child processes, >= 1.
      timeout_s: seconds for one answer, > 0, from when a ready worker is handed it: neither the
        wait for a free worker nor its start counts.
      memory_gb: address space of a child process, 10^9 bytes.
      environment: names of variables that child processes see beside those that Python needs.
      max_error_rate: share of our own failures above which a run stops, see `check_failures`.
      max_timeout_rate: the same of answers that a reward function of the user's took too long for.
    """

    workers: int
    timeout_s: float
    memory_gb: float = 4.0
    environment: tuple[str, ...] = ()
    max_error_rate: float = 0.05
    max_timeout_rate: float = 0.05

    @classmethod
    def from_config(cls, verifier: ConfigDict) -> VerifierSettings:
        """Checks config.verifier. Raises `ConfigError`."""
        v, names = verifier, list(verifier.environment)
        require(v.workers >= 1, "verifier.workers", v.workers, ">= 1")
        for field in ("timeout_s", "memory_gb"):
            require(v[field] > 0, f"verifier.{field}", v[field], "> 0")
        for field in ("max_error_rate", "max_timeout_rate"):
            require(0 <= v[field] <= 1, f"verifier.{field}", v[field], "between 0 and 1")
        are_names = all(isinstance(name, str) and name for name in names)
        require(are_names, "verifier.environment", names, "a tuple of names of variables")
        return cls(
            workers=v.workers,
            timeout_s=v.timeout_s,
            memory_gb=v.memory_gb,
            environment=tuple(names),
            max_error_rate=v.max_error_rate,
            max_timeout_rate=v.max_timeout_rate,
        )
