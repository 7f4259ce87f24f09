"""How to spend a problem's tokens between search and aggregation: N, K and M at one ceiling, on two halves.

    python -m spiral_jax.study --config=configs/study_two_halves_budget.py --workdir=runs/study_budget

`marginal_mean` of `study_two_halves.py` throughout. The sequential part stays as it is: with fewer than 26 tokens a
search trace holds no half and an answer, with more than 31 it holds both. Estimated: 1.5 hours on two cores.
"""

from ml_collections import ConfigDict

from configs import study_two_halves
from spiral_jax.studies import plan

# (N, K, M) with 400 <= N * 26 + K * M * 12 <= 416 tokens: from many aggregations of few traces to the reverse
_BALANCES = (
    *((6, 7, 3), (6, 3, 7)),
    *((8, 8, 2), (8, 4, 4), (8, 2, 8)),
    *((10, 6, 2), (10, 4, 3), (10, 3, 4), (10, 2, 6)),
    *((12, 4, 2), (12, 2, 4)),
)
_ARMS = {f"N{N}_K{K}_M{M}": (N, K, M) for N, K, M in _BALANCES}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == plan.EVALUATION:
        return study_two_halves.get_config(name)
    c = study_two_halves.get_config("marginal_mean")
    c.search.traces, c.aggregation.subsets, c.aggregation.traces = _ARMS[name]
    c.batch.aggregation_groups = 16  # divides 16 problems times any K
    c.train.steps = 56  # problems that are kept more often take fewer tokens a step
    return c


def _study() -> ConfigDict:
    s = study_two_halves.get_config()
    s.title = "Two halves: the balance of search and aggregation"
    s.question = "At one ceiling of tokens a problem: more search traces, more sets, or more aggregations of each set?"
    s.arms = ((plan.BASE, (0, 1)), *((arm, (0, 1)) for arm in _ARMS))
    s.baseline = "N8_K4_M4"
    s.cross = ()
    s.claims = (
        ("aggregated", "N8_K8_M2", "N8_K2_M8", 0.0),
        ("aggregated", "N10_K6_M2", "N10_K2_M6", 0.0),
    )
    return s
