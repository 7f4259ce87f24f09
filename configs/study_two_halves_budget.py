r"""How to spend a problem's tokens, on two halves: N, K and M at one ceiling.

    python -m spiral_jax.study --config=configs/study_two_halves_budget.py \
        --workdir=runs/study_budget --at_once=2

`marginal_mean` of `study_two_halves.py` throughout. The sequential part stays as it is: with fewer
than 26 tokens a search trace holds no half and an answer, with more than 31 it holds both. The
arms took 1.3 hours on two cores.
"""

import re

from ml_collections import ConfigDict

from configs import study_two_halves
from spiral_jax.studies import design

# Arms without aggregation have 416 tokens a problem.
# (N, K, M) with 400 <= N * 26 + K * M * 12 <= 416 tokens: from many aggregations of few traces to
# the reverse
_BALANCES = (
    *((6, 7, 3), (6, 3, 7)),
    *((8, 8, 2), (8, 4, 4), (8, 2, 8)),
    *((10, 6, 2), (10, 4, 3), (10, 3, 4), (10, 2, 6)),
    *((12, 4, 2), (12, 2, 4)),
)


def _name(N: int, K: int, M: int) -> str:
    return f"N{N}_K{K}_M{M}"


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        return study_two_halves.get_config(name)
    c = study_two_halves.get_config("marginal_mean")
    N, K, M = (int(number) for number in re.fullmatch(r"N(\d+)_K(\d+)_M(\d+)", name).groups())
    c.search.traces, c.aggregation.subsets, c.aggregation.traces = N, K, M
    c.batch.aggregation_groups = 16  # divides 16 problems times any K
    # A tenth more than the tokens buy: 34 steps with 2 sets, 41 with 4 and 52 with 8
    # (docs/results/study_two_halves_ablations.md), as with more sets more problems have a signal.
    c.train.steps = round(1.1 * (28 + 3 * K))
    return c


def _study() -> ConfigDict:
    s = study_two_halves.get_config()
    s.title = "Two halves: the balance of search and aggregation"
    s.question = (
        "At one ceiling of tokens a problem: more search traces, more sets, or more aggregations "
        "of each set?"
    )
    s.arms = ((design.BASE, (0, 1)), *((_name(*balance), (0, 1)) for balance in _BALANCES))
    s.baseline = "N8_K4_M4"
    s.cross = ()
    s.claims = (
        ("aggregated", "N8_K8_M2", "N8_K2_M8", 0.0),
        ("aggregated", "N10_K6_M2", "N10_K2_M6", 0.0),
    )
    return s
