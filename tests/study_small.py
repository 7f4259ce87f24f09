"""A miniature study: the bundled task, two arms and the base, a few steps of four problems."""

from ml_collections import ConfigDict

from configs import tiny
from spiral_jax.studies import design


def get_config(name: str = "") -> ConfigDict:
    if not name:
        s = design.defaults()
        s.title, s.question = "A miniature", "Does the machinery work?"
        s.arms = (("base", (0,)), ("marginal_mean", (0, 1)), ("grpo", (0,)))
        s.measures = (
            "aggregated",
            "mixed",
            "right_if_mixed",
            "right_if_alike",
            "commonest",
            "single",
            "pass@4",
            "maj@4",
            "rsa@1",
        )
        s.baseline, s.strategies, s.cross = "grpo", 2, ("base", "marginal_mean")
        s.claims = (
            ("aggregated", "marginal_mean", "grpo", -1.0),
            ("aggregated", "optimum", "grpo", -1.0),
            ("mixed", "base", "", 0.0),
        )
        return s
    c = tiny.get_config()
    c.batch.problems, c.batch.search_groups, c.batch.aggregation_groups = 4, 4, 8
    c.sampling.rows = 24
    c.train.steps, c.trace_log.every = 3, 0
    c.checkpoint.every = c.checkpoint.keep_every = 1
    c.eval.problems, c.eval.n, c.eval.rounds, c.eval.wave = 8, 8, 1, 4
    if name.startswith("N"):
        c.search.traces, c.eval.problems = int(name[1:]), 0
    elif name != design.EVALUATION:
        c.loss.estimator, c.eval.problems = name, 0
    return c


def propose(trial):
    N = trial.suggest_int("N", 5, 12)
    return f"N{N}" if N % 2 else None
