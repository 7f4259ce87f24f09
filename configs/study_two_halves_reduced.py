r"""The reduced study: `study_two_halves.py` with one seed and two arms.

    python -m spiral_jax.study --config=configs/study_two_halves_reduced.py \
        --workdir=runs/study_reduced

It takes 6 min 20 s on two CPU cores that do nothing else; its report is
docs/results/study_two_halves_reduced.md.
Ends with status 1 if the ordering does not hold.
"""

from ml_collections import ConfigDict

from configs import study_two_halves
from spiral_jax.studies import design


def get_config(name: str = "") -> ConfigDict:
    c = study_two_halves.get_config(name)
    if not name:
        c.arms = tuple((arm, (0,)) for arm in ("base", "marginal_mean", "grpo"))
        c.cross = ()
        c.title = "Two halves, reduced: one seed, two arms"
        c.measures = tuple(measure for measure in c.measures if measure != "rsa@10")
        c.claims = (
            ("right_if_mixed", "base", "", 0.95),
            ("aggregated", "marginal_mean", "optimum", -0.05),
            ("aggregated", "optimum", "grpo", 0.05),
            ("aggregated", "marginal_mean", "grpo", 0.0),
        )
    elif name == design.EVALUATION:
        c.eval.problems = 512
        c.eval.rounds = 1
    return c
