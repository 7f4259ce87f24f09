r"""Deep rounds on three parts, the arms of `study_rounds.py`.

    python -m spiral_jax.study --config=configs/study_rounds_three_parts.py \
        --workdir=runs/study_rounds_three_parts --at_once=2

Twice the tokens of `study_estimators_three_parts.py`. The limits of steps are estimates, as nothing
was tuned on this task.
"""

from ml_collections import ConfigDict

from configs import estimator_arms, study_rounds, three_parts
from spiral_jax.studies import design

_TOKENS = 600_000  # sampled tokens that end a run of any arm
_STEPS = {"1_round": 92, "2_rounds": 92, "replay": 88}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        return estimator_arms.evaluation(three_parts.get_config(), rounds=10)
    c = three_parts.get_config()
    c.loss.estimator = "marginal_mean"
    c.eval.problems = 0  # every arm is evaluated by the same program afterwards
    return study_rounds.experiment(c, name, _TOKENS, _STEPS[name])


def _study() -> ConfigDict:
    s = study_rounds.study()
    s.title = "Rounds on three parts"
    # "reward" is the mean over answers, "aggregated" the share of them with all three parts
    s.measures = ("reward", "aggregated", "reward_single", "pass@16")
    s.measures += tuple(f"reward_rsa@{round}" for round in range(1, 11))
    s.claims = (
        ("reward_rsa@10", "replay", "2_rounds", 0.0),
        ("reward_rsa@10", "replay", "1_round", 0.0),
        ("reward", "replay", "1_round", -0.02),
    )
    return s
