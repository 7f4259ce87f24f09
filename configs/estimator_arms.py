"""Which way to reward search loses nowhere? Seven estimators on three tasks, one study each.

    bash launch/estimators.sh --at_once=2

On two halves own correctness has no direction, and only the success of sets does. On the end digit
own correctness of a set, pass@S, is all that an aggregator needs. On three parts they agree in
part. This file has what the three studies share: arms, seeds, and what is claimed of all of them.

All arms of a task have the same ceiling of output tokens a problem, and the same sampled tokens
end their runs. A limit of steps lies beyond: a tenth more than the tokens buy, as far as pilots of
an arm, or of one like it, tell. It is the length of the learning rate's cosine.

Equal tokens are not equal operations: GRPO reads no aggregation prompts. So every run is read a
second time where all had spent the same. Its checkpoints on the way stay for that, at most 390 MB
a run and 6 to 9 GB a study, at 9.3 MB each.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from spiral_jax.studies import design

_FIVE, _THREE = (0, 1, 2, 3, 4), (0, 1, 2)
_SEEDS = {
    "base": _THREE,
    "set_control_variate": _FIVE,
    "marginal_mean": _FIVE,
    "paragator": _FIVE,
    "aggregator_only": _FIVE,
    "with_without": _THREE,
    "pkpo": _THREE,
    "grpo": _THREE,
}
_N, _K, _M = 8, 4, 4  # traces, sets of S = 4, aggregation traces of each; GRPO searches only


def study() -> ConfigDict:
    """Arms and words that the three studies have in common."""
    s = design.defaults()
    s.question = (
        "Does set_control_variate, which has the success of sets and their own correctness, lose "
        "to neither of the estimators that have one of them?"
    )
    s.notes = (
        "One model of 0.8 M parameters a task, made for it: nothing here shows what happens at 4B. "
        "The tasks are made so that own correctness and usefulness to a set differ in three ways; "
        "they do not say how often real problems are like either."
    )
    s.arms = tuple(_SEEDS.items())
    s.baseline = "marginal_mean"
    s.equal_operations = True
    return s


def experiment(
    c: ConfigDict, arm: str, steps: Mapping[str, int], tokens: int, searched: int
) -> ConfigDict:
    """A task's configuration -> that of an arm.

    Args:
      steps: at most, by arm.
      tokens: sampled ones that end a run.
      searched: N of GRPO, which has the ceiling of tokens for search alone.
    """
    c.loss.estimator = arm
    c.search.traces = searched if arm == "grpo" else _N
    c.aggregation.subsets, c.aggregation.traces = _K, _M
    c.train.steps, c.train.max_sampled_tokens = steps[arm], tokens
    c.eval.problems = 0  # every arm is evaluated by the same program afterwards
    c.checkpoint.every = c.checkpoint.keep_every = 2  # to be read at equal operations
    return c


def evaluation(c: ConfigDict, rounds: int) -> ConfigDict:
    """A task's configuration -> how every arm is evaluated."""
    c.eval.problems = c.eval.wave = 192
    c.eval.n = 16
    c.eval.subsets = 4  # all of the 16 traces
    c.eval.rounds = rounds
    return c
