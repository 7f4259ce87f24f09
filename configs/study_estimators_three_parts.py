"""Estimators on three parts, where both agree in part: `estimator_arms.py`."""

from ml_collections import ConfigDict

from configs import estimator_arms, three_parts
from spiral_jax.studies import design

_TOKENS = 300_000  # in a pilot marginal_mean no longer gains from 150,000 on, and ParaGator loses
_STEPS = {
    "set_control_variate": 46,
    "marginal_mean": 46,
    "with_without": 46,
    "aggregator_only": 46,
    "paragator": 32,  # as it tries more and more problems before a batch is full
    "pkpo": 32,
    "grpo": 46,
}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        # In later rounds every arm is lost, as the reader has never read an aggregation: the base
        # falls from 43 to 18 % in ten, marginal_mean of a pilot from 79 to 20.
        return estimator_arms.evaluation(three_parts.get_config(), rounds=1)
    return estimator_arms.experiment(three_parts.get_config(), name, _STEPS, _TOKENS, searched=18)


def _study() -> ConfigDict:
    s = estimator_arms.study()
    s.title = "Estimators on three parts"
    # the first is the mean reward; "aggregated" is the share of answers with all three parts
    s.measures = ("reward", "aggregated", "reward_single", "pass@16", "reward_rsa@1")
    s.claims = (
        ("reward", "set_control_variate", "paragator", -0.01),
        ("reward", "set_control_variate", "marginal_mean", -0.01),
        ("reward", "set_control_variate", "aggregator_only", 0.0),
        ("reward", "set_control_variate", "grpo", 0.0),
    )
    return s
