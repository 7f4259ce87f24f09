r"""The study on a task where search is hard and checking is easy: every arm on the end digit.

    python -m spiral_jax.study --config=configs/study_end_digit.py \
        --workdir=runs/study_end_digit --at_once=2

The task is `spiral_jax/tasks/end_digit.py`.

Own correctness has a direction here, unlike on two halves, and it is another one than that of sets:
a single trace is right most often if it always tries the first expression, a set if its traces try
different ones. All arms have the same ceiling of output tokens a problem, 24 traces of L = 28: GRPO
spends it on search alone. Traces of 2 L would not help it, as the model tries once.

A run ends when its sampled tokens are spent, or at its limit of steps, which lies beyond (from
pilots of seed 0); there is no other stopping rule, and no run is left out: one whose policy has
collapsed until no problem gives a signal ends there, is listed as failed, and is evaluated at its
last checkpoint. 36 runs and 39 evaluations, of up to 5 and 2.5 minutes on one core: two hours on
two cores with --at_once=2. Stopped or killed at any time, it goes on with the same command; seeds
come one after the other, so that what is there always has all arms.
"""

from ml_collections import ConfigDict

from configs import end_digit
from spiral_jax.studies import design

_TOKENS = 800_000  # sampled tokens that end a run of any arm
# Rollouts of a problem, all of at most 28 tokens: N search traces, K sets of S = 4, M aggregation
# traces
_SPIRAL = {"N": 8, "K": 4, "M": 4}
_DISJOINT = {"N": 8, "K": 2, "M": 8}  # as many traces of each role; only the sets differ
_SEARCH = {"N": 24}
# estimator: rollouts, and steps at most, which are the length of the learning rate's cosine: a
# tenth more than the tokens buy, as steps differ in how many problems they have to try
_ARMS = {
    "marginal_mean": (_SPIRAL, 33),
    "with_without": (_SPIRAL, 33),
    "disjoint_sets": (_DISJOINT, 33),
    "aggregator_only": (_SPIRAL, 44),
    "online_multitask": (_SPIRAL, 50),
    "paragator": (_SPIRAL, 50),
    "pkpo": (_SPIRAL, 50),
    "polychromic": (_SPIRAL, 50),  # is told which expression a trace tries
    "grpo": (_SEARCH, 54),
    "rloo": (_SEARCH, 54),
}
_FIVE, _THREE = (0, 1, 2, 3, 4), (0, 1, 2)


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    return _evaluation() if name == design.EVALUATION else _experiment(name)


def _study() -> ConfigDict:
    s = design.defaults()
    s.title = "End digit: search is hard, checking is easy"
    s.question = (
        "Where single traces can learn by themselves, does training on the success of the "
        "aggregator still cover more, and does it aggregate better, than training search on its "
        "own correctness?"
    )
    s.notes = (
        "One model of 0.8 M parameters on one synthetic task: nothing here shows what happens at "
        "4B. The task is made so that single traces and sets gain from different things; it does "
        "not say how often real problems are like that. A trace makes one try: the sequential part "
        "of the budget is not tested. `polychromic` is told which expression a trace tries."
    )
    five = ("marginal_mean", "grpo", "paragator")
    s.arms = (("base", _THREE), *((arm, _FIVE if arm in five else _THREE) for arm in _ARMS))
    s.measures = (
        "aggregated",
        "single",
        "pass@4",
        "pass@32",
        "maj@8",
        "commonest",
        "rsa@1",
        "rsa@10",
    )
    s.baseline = "grpo"
    s.claims = (
        ("efficiency", "marginal_mean", "grpo", 3.0),
        ("rsa@10", "marginal_mean", "grpo", 0.10),
        ("entropy", "marginal_mean", "grpo", 0.0),
        ("aggregated", "marginal_mean", "grpo", 0.0),
        ("aggregated", "marginal_mean", "base", 0.0),
        ("aggregated", "marginal_mean", "aggregator_only", 0.0),
        ("aggregated", "marginal_mean", "paragator", 0.0),
        ("rsa@10", "marginal_mean", "paragator", 0.0),
        ("aggregated", "with_without", "marginal_mean", -0.02),
    )
    return s


def _experiment(arm: str) -> ConfigDict:
    c = end_digit.get_config()
    rollouts, steps = _ARMS[arm]
    c.loss.estimator = arm
    c.search.traces = rollouts["N"]
    if "K" in rollouts:
        c.aggregation.subsets, c.aggregation.traces = rollouts["K"], rollouts["M"]
    c.train.steps, c.train.max_sampled_tokens = steps, _TOKENS
    c.eval.problems = 0  # every arm is evaluated by the same program afterwards
    return c


def _evaluation() -> ConfigDict:
    c = end_digit.get_config()
    c.eval.problems = 96  # ten rounds cost 80 aggregations a problem
    c.eval.n = 32
    c.eval.subsets = 4
    c.eval.rounds = 10  # trained for one
    c.eval.wave = 96
    return c
