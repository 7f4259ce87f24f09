"""A reward that a small model can earn on programming problems: its answer holds a program at all.

    bash launch/fetch_smollm2.sh
    python -m spiral_jax.train --config=configs/small_programs.py --workdir=runs/program_format \
        --config.task.reward=benchmarks.program_format:reward --config.train.steps=3

With the tests of its problems SmolLM2-135M earns half a percent of the reward, so hardly any of
them has a signal. With this reward the same run takes all steps of training on code; it claims
nothing.
"""

from __future__ import annotations

from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.programs import last_program


def reward(text: str, problem: Problem) -> bool | None:
    """Whether the answer's last program is one for Python's parser; None: it has none."""
    del problem
    program = last_program(text)
    if program is None:
        return None
    try:
        compile(program, "answer", "exec")
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return False
    return True
