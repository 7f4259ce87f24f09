"""Estimators on two halves, where own correctness has no direction: `estimator_arms.py`."""

from ml_collections import ConfigDict

from configs import estimator_arms, tiny
from spiral_jax.studies import design

_TOKENS = 540_000
_STEPS = {
    "set_control_variate": 44,
    "marginal_mean": 44,
    "with_without": 44,
    "aggregator_only": 64,
    "paragator": 80,
    "pkpo": 80,
    "grpo": 72,
}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        # In the second round every arm is lost, as the reader has never read an aggregation.
        return estimator_arms.evaluation(tiny.get_config(), rounds=1)
    return estimator_arms.experiment(tiny.get_config(), name, _STEPS, _TOKENS, searched=16)


def _study() -> ConfigDict:
    s = estimator_arms.study()
    s.title = "Estimators on two halves"
    s.measures = ("aggregated", "mixed", "right_if_mixed", "single", "pass@8", "rsa@1")
    s.strategies = 2
    s.claims = (
        ("aggregated", "set_control_variate", "marginal_mean", -0.01),
        ("aggregated", "set_control_variate", "paragator", 0.20),
        ("aggregated", "set_control_variate", "aggregator_only", 0.0),
        ("aggregated", "set_control_variate", "grpo", 0.0),
        ("aggregated", "set_control_variate", "optimum", -0.05),
    )
    return s
