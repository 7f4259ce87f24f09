r"""Estimators on a real small model: SmolLM2-135M-Instruct on sums that it can half do, one GPU.

    bash launch/fetch_smollm2.sh
    timeout 240 python -m spiral_jax.study --config=configs/study_smollm2.py \
        --workdir=runs/study_smollm2 --at_once=4

The same command goes on where it was stopped: pieces of four minutes, twelve in all, are what it is
sized for on one H100. Four runs share the card, and compile once for all: what differs between the
three that aggregate is only advantages, which the host computes.
"""

from ml_collections import ConfigDict

from configs import smollm2_chain_sum
from spiral_jax.studies import design

_TOKENS = 500_000  # sampled ones that end a run; sized by the time that there is
_STEPS = {"set_control_variate": 45, "marginal_mean": 45, "paragator": 60, "grpo": 45}
_SEEDS = (0, 1)


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    return _evaluation() if name == design.EVALUATION else _experiment(name)


def _study() -> ConfigDict:
    s = design.defaults()
    s.title = "Estimators on SmolLM2-135M: sums of two numbers"
    s.question = (
        "Does what the bundled models show hold for a pretrained model, on a task whose right "
        "answers are found by single traces?"
    )
    s.notes = (
        "Two seeds and minutes of training: a difference must be large to be seen. The model "
        "copies an example; nothing here says what larger ones gain from aggregation."
    )
    s.arms = (("base", (0,)), *((arm, _SEEDS) for arm in _STEPS))
    s.measures = ("aggregated", "single", "pass@4", "pass@16", "maj@8", "rsa@1")
    s.baseline = "grpo"
    s.claims = (
        ("aggregated", "marginal_mean", "base", 0.0),
        ("aggregated", "set_control_variate", "marginal_mean", -0.02),
        ("aggregated", "set_control_variate", "paragator", -0.02),
        ("aggregated", "set_control_variate", "grpo", 0.0),
    )
    return s


def _experiment(arm: str) -> ConfigDict:
    c = smollm2_chain_sum.get_config()
    c.loss.estimator = arm
    if arm == "grpo":
        c.search.traces = 24  # as many as there are traces of both kinds in the other arms
    c.train.steps, c.train.max_sampled_tokens = _STEPS[arm], _TOKENS
    c.eval.problems = 0  # every arm is evaluated by the same program afterwards
    c.checkpoint.every = 10
    return c


def _evaluation() -> ConfigDict:
    c = smollm2_chain_sum.get_config()
    c.eval.problems = c.eval.wave = 256
    c.eval.n = 16
    c.eval.subsets = 4  # all of the 16 traces
    c.eval.rounds = 1
    return c
