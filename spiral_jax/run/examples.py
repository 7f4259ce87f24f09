"""What the first rollouts print: a prompt and a trace of search and of each round.

A wrong chat template shows there, before anything is judged: so it also shows where judging fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spiral_jax.core.groups import Groups, Role
from spiral_jax.rollout.stages import Stage

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase


class Examples:
    """Prints the first group of each kind, and its verdict once that is known.

    Rounds of RSA are not printed: they read what plain aggregation reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._printed: dict[str, tuple[int, ...]] = {}  # kind of group: which one

    def show(self, stage: Stage, groups: Groups) -> None:
        """Takes the groups of a stage: before they are judged, and again with their verdicts."""
        name = _name(stage)
        if name is None:
            return
        which = tuple(groups.requests.id_Ux6[0].tolist())
        if groups.verdict_UxC is None:
            if name not in self._printed:
                self._printed[name] = which
                print(render_example(name, groups, self._tokenizer), flush=True)
        elif self._printed.get(name) == which:
            verdict = groups.verdict_UxC[0, 0]
            detail = f" ({verdict.detail})" if verdict.detail else ""
            print(
                f"--- verdict on that {name} trace: {verdict.status.value}, reward "
                f"{verdict.reward:g}{detail}",
                flush=True,
            )


def show_nothing(stage: Stage, groups: Groups) -> None:
    """In place of `Examples.show` where nothing is printed."""


def render_example(name: str, groups: Groups, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first prompt (text and ids) and the first trace, as they really were."""
    prompt = groups.requests.prompt_UxP[0, : groups.requests.prompt_len_U[0]]
    lines = [
        f"--- {name} prompt, {len(prompt)} tokens",
        tokenizer.decode(prompt),
        f"ids: {prompt.tolist()}",
        f"--- {name} trace",
        tokenizer.decode(groups.trace_ids(0, 0)),
        "---",
    ]
    return "\n".join(lines)


def _name(stage: Stage) -> str | None:
    """What the stage is called; None: it is not printed."""
    if stage.role is Role.SEARCH:
        return "search"
    if stage.label != "aggregation":
        return None
    return "aggregation" if stage.round == 1 else f"aggregation, round {stage.round},"
