r"""How to spend a problem's rollouts on the end digit: N, S, K, M and the search term's weight.

    pip install ".[sweep]"
    python -m spiral_jax.study --config=configs/study_balance.py --workdir=runs/study_balance \
        --at_once=2 --sweep=24

The paper's future work names an automated search for the balance of the three kinds of compute.
Here optuna proposes balances under one ceiling, 24 rollouts a problem of at most 28 tokens, and
gives up those whose training reward stays below the median of the others. On two halves every
balance ends at the optimum (docs/results/study_two_halves_budget.md); here disjoint sets, two
instead of four, end lower (docs/results/study_end_digit.md).

Lengths are no choice here: one try of the bundled model has 25 to 27 tokens, and it makes one.
All arms are evaluated with sets of S = 4. The learning rate is constant, so that an arm that is
given up was no worse off than one that is not.
"""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from configs import end_digit, estimator_arms
from spiral_jax.studies import design

_ROLLOUTS = 24  # a problem, at most
_TOKENS = 400_000  # sampled ones that end a run
_STEPS = 40  # at most; the tokens buy fewer
_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
_LISTED = "N8_S4_K4_M4_w1.0"  # the studies' balance


def propose(trial: Any) -> str | None:
    """As many sets as the ceiling leaves room for; None: hardly any, or more than there are."""
    N, S = trial.suggest_int("N", 4, 16), trial.suggest_int("S", 2, 6)
    M = trial.suggest_int("M", 2, 8)
    weight = trial.suggest_categorical("search_weight", _WEIGHTS)
    K = (_ROLLOUTS - N) // M
    fits = S < N and 2 <= K <= math.comb(N, S) and N + K * M >= 0.9 * _ROLLOUTS
    return f"N{N}_S{S}_K{K}_M{M}_w{weight}" if fits else None


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    c = end_digit.get_config()
    if name == design.EVALUATION:
        return estimator_arms.evaluation(c, rounds=1)
    N, S, K, M = (int(number) for number in re.findall(r"[NSKM](\d+)", name))
    c.loss.estimator = "set_control_variate"
    c.loss.search_weight = float(name.rpartition("_w")[2])
    c.search.traces, c.aggregation.subset_size = N, S
    c.aggregation.subsets, c.aggregation.traces = K, M
    c.batch.aggregation_lengths = ((16 + 29 * S, 28),)  # a problem, and S candidates
    c.batch.aggregation_groups = 16  # divides 16 problems times any K
    c.optimizer.schedule = "constant"
    c.train.max_sampled_tokens, c.train.steps = _TOKENS, _STEPS
    c.eval.problems = 0  # every arm is evaluated by the same program afterwards
    return c


def _study() -> ConfigDict:
    s = design.defaults()
    s.title = "End digit: the balance of search and aggregation"
    s.question = (
        "Under one ceiling of rollouts a problem: how many search traces, how many sets of how "
        "many of them, how many aggregations of each, and how much weight for search?"
    )
    s.notes = (
        "One seed an arm, and the best of many: a choice that stands out here is a question for a "
        "study with more seeds, not a result."
    )
    s.arms = ((design.BASE, (0,)), (_LISTED, (0,)))
    s.measures = ("aggregated", "single", "pass@4", "pass@16", "rsa@1")
    s.baseline = _LISTED
    s.claims = (("aggregated", _LISTED, design.BASE, 0.0),)
    return s
