"""What a sweep has found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spiral_jax.studies.cost_tables import count_cell
from spiral_jax.studies.markdown import table
from spiral_jax.studies.rungs import GIVEN_UP, RUNGS


def sweep_text(gathered: Mapping[str, Any]) -> str:
    """Importance and direction of each choice, then the arms, best first; empty without a sweep."""
    sweep = gathered.get("sweep")
    if not sweep:
        return ""
    arms = sweep["arms"]
    of_choices = [
        [name, f"{share:.2f}", f"{sweep['direction'][name]:+.2f}"]
        for name, share in sweep["importance"].items()
    ]
    heads = ["choice", "importance", "rank correlation with what is reached"]
    given_up = [
        f"{arm} ({row['rungs']} of {RUNGS})"
        for arm, row in arms.items()
        if row["state"] == GIVEN_UP
    ]
    reached = {arm: row["value"] for arm, row in arms.items() if row["value"] is not None}
    best = sorted(reached, key=reached.get, reverse=True)
    chosen = list(dict.fromkeys(name for row in arms.values() for name in row["chosen"]))
    of_arms = [
        [
            arm,
            f"{100 * reached[arm]:.1f}",
            *(count_cell(arms[arm]["chosen"].get(c)) for c in chosen),
        ]
        for arm in best
    ]
    counts = (
        f"{len(arms)} arms were proposed, {len(reached)} are done and {len(given_up)} were given "
        f"up on the way{': ' if given_up else ''}"
        f"{', '.join(given_up)}."
    )
    parts = [counts, table(heads, of_choices)]
    parts.append(table(["arm", gathered["measures"][0], *chosen], of_arms))
    return "\n\n".join(part for part in parts if part)
