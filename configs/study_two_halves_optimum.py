r"""How close SPIRAL comes to what is possible on two halves, with as many problems as that takes.

    python -m spiral_jax.study --config=configs/study_two_halves_optimum.py \
        --workdir=runs/study_optimum --at_once=2

Arms and seeds of `study_two_halves.py`, whose 128 problems left this open: an interval of 7 points
around a bar 5 below the optimum. So it was asked again, of the same runs, once that was known. 512
problems without the ten rounds of self-aggregation cost less. From nothing half an hour on two
cores.
"""

from ml_collections import ConfigDict

from configs import study_two_halves, study_two_halves_reduced
from spiral_jax.studies import design


def get_config(name: str = "") -> ConfigDict:
    if name == design.EVALUATION:
        return study_two_halves_reduced.get_config(name)
    c = study_two_halves.get_config(name)
    if not name:
        c.title = "Two halves: how close to the optimum"
        c.question = (
            "Does training on the success of the aggregator end within 5 points of what is "
            "possible?"
        )
        c.arms = tuple(
            (arm, (0, 1, 2))
            for arm in (design.BASE, "marginal_mean", "with_without", "disjoint_sets")
        )
        c.baseline = "marginal_mean"
        c.cross = ()
        c.measures = tuple(measure for measure in c.measures if measure != "rsa@10")
        c.claims = tuple(
            ("aggregated", arm, "optimum", -0.05)
            for arm in ("marginal_mean", "with_without", "disjoint_sets")
        )
    return c
