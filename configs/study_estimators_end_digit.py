"""Estimators on the end digit, where pass@S is all that a set needs: `estimator_arms.py`."""

from ml_collections import ConfigDict

from configs import end_digit, estimator_arms
from spiral_jax.studies import design

_TOKENS = 800_000
_STEPS = {
    "set_control_variate": 52,
    "marginal_mean": 33,
    "with_without": 33,
    "aggregator_only": 44,
    "paragator": 50,
    "pkpo": 50,
    "grpo": 54,
}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        return estimator_arms.evaluation(end_digit.get_config(), rounds=10)
    return estimator_arms.experiment(end_digit.get_config(), name, _STEPS, _TOKENS, searched=24)


def _study() -> ConfigDict:
    s = estimator_arms.study()
    s.title = "Estimators on the end digit"
    s.measures = ("aggregated", "single", "pass@4", "pass@16", "rsa@1", "rsa@10")
    s.claims = (
        ("aggregated", "set_control_variate", "paragator", -0.01),
        ("rsa@10", "set_control_variate", "paragator", -0.01),
        ("aggregated", "set_control_variate", "marginal_mean", 0.0),
        ("aggregated", "set_control_variate", "aggregator_only", 0.0),
        ("aggregated", "set_control_variate", "grpo", 0.0),
    )
    return s
