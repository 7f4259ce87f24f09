"""What a model does on held-out problems before any RL, in the sizes of its training.

Each problem is searched, and one set of its traces is aggregated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from spiral_jax.core.progress import Progress
from spiral_jax.evaluation.wave import Evaluator
from spiral_jax.run.setup import Setup, set_up_training
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier


def set_up(c: ConfigDict, problems: int) -> Setup:
    """The setup of a training run whose evaluations read one set, of the size of training's."""
    c.eval.problems = problems
    c.eval.subsets, c.eval.subset_size = 1, c.aggregation.subset_size
    c.eval.traces, c.eval.rounds_in_training = c.aggregation.traces, 0
    return set_up_training(c)


@contextlib.contextmanager
def open_evaluator(setup: Setup) -> Iterator[Evaluator]:
    """An evaluator that draws tokens as training does."""
    settings = VerifierSettings(workers=1, timeout_s=setup.c.verifier.timeout_s)
    with Verifier(setup.reward, settings) as verifier, jax.set_mesh(setup.mesh):
        yield Evaluator(
            settings=setup.evaluation,
            order=setup.c.aggregation.order,
            task=setup.task,
            scaffold=setup.scaffold,
            sampler=setup.sampler,
            verifier=verifier,
            max_error_rate=setup.verifier.max_error_rate,
            strategy=None,
            progress=Progress(1, 0),
            between_chunks=lambda: None,
        )
