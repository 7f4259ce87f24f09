"""config.prompt as one value: wording, and how candidates are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

FENCES = ("auto", "always", "never")


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """config.prompt, field by field: `core/config.py` says what each one means."""

    template: str
    system: str
    template_kwargs: Mapping[str, Any]
    stop: tuple[str | int, ...]
    search: str
    aggregation: str
    candidate: str
    fence: str
    truncated: str
    keep_tail_tokens: int
    candidate_tail: int
    thinking: str
    max_problem_tokens: int

    @classmethod
    def from_config(cls, prompt: ConfigDict) -> PromptSettings:
        """Of config.prompt."""
        return cls(**prompt.to_dict() | {"stop": tuple(prompt.stop)})
