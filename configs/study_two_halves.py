"""The study on a task with a known optimum: every arm on two halves, `tasks/two_halves.py`.

    python -m spiral_jax.study --config=configs/study_two_halves.py --workdir=runs/study_two_halves

No trace of any arm has room for both halves: one costs 16 tokens, more than half of the 26 of a
search trace, and more than the 12 of an aggregation trace, which can read but not compute. So GRPO
has more traces here, not longer ones: at 2 x 26 tokens one trace could hold the whole answer. The
bundled model works on the left half nine times in ten.

Of sets of S = 4 independent traces at most 1 - 2 * 2^-4 = 0.875 hold both halves. What the reader
makes of sets that do and that do not is measured on `base`, before any training: together they say
what is possible.

A run ends when its sampled tokens are spent, or at its limit of steps, which lies beyond (from
pilots of seed 0); there is no other stopping rule, and no run is left out. 30 runs of 3 to 5
minutes on one core, 33 evaluations of them and 18 of pairs of a minute and a half took 2 hours on
two cores with --at_once=2 (docs/results/study_two_halves.md). Stopped or killed at any time, it
goes on with the same command; seeds come one after the other, so that what is there always has all
arms.
"""

from ml_collections import ConfigDict

from configs import tiny
from spiral_jax.studies import design

# sampled tokens that end a run of any arm: what 40 steps of marginal_mean take
# (docs/results/quickstart.json)
_TOKENS = 540_000
# Rollouts of a problem: N search traces of 26 tokens, K sets of S = 4, M aggregation traces of 12
# tokens each. At most N * 26 + K * M * 12 tokens: 400, of the arms without aggregation 416, the
# next whole trace above it.
_SPIRAL = {"N": 8, "K": 4, "M": 4}
_DISJOINT = {"N": 8, "K": 2, "M": 8}  # as many traces of each role; only the sets differ
_SEARCH = {"N": 16}
# estimator: rollouts, and steps at most, which are the length of the learning rate's cosine: a
# tenth more than the tokens buy, as steps differ in how many problems they have to try
_ARMS = {
    "marginal_mean": (_SPIRAL, 44),
    "with_without": (_SPIRAL, 44),
    "disjoint_sets": (_DISJOINT, 40),
    "aggregator_only": (_SPIRAL, 64),
    "online_multitask": (_SPIRAL, 80),
    "paragator": (_SPIRAL, 80),
    "pkpo": (_SPIRAL, 80),
    "polychromic": (_SPIRAL, 80),
    "grpo": (_SEARCH, 72),
    "rloo": (_SEARCH, 72),
}
_SEEDS = (0, 1, 2)


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    return _evaluation() if name == design.EVALUATION else _experiment(name)


def _study() -> ConfigDict:
    s = design.defaults()
    s.title = "Two halves: a task with a known optimum"
    s.question = (
        "Does training on the success of the aggregator find the search that the aggregator needs, "
        "where no single trace gains from it, and how close does it come to what is possible? "
        "Which controls do not?"
    )
    s.notes = (
        "One model of 0.8 M parameters on one synthetic task: nothing here shows what happens at "
        "4B. A set's members gain nothing by themselves, so own correctness has no direction; that "
        "is what the task is for, and no measure of how often real problems are like it. "
        "`polychromic` is told which half a trace works on."
    )
    s.arms = tuple((arm, _SEEDS) for arm in (design.BASE, *_ARMS))
    s.measures = (
        "aggregated",
        "mixed",
        "right_if_mixed",
        "right_if_alike",
        "commonest",
        "single",
        "pass@8",
        "maj@8",
    )
    s.measures += ("rsa@1", "rsa@10")
    s.baseline = "grpo"
    s.strategies = 2  # the halves
    s.cross = ("base", "grpo", "marginal_mean")
    s.claims = (
        ("right_if_mixed", "base", "", 0.95),
        ("aggregated", "marginal_mean", "optimum", -0.05),
        ("aggregated", "with_without", "optimum", -0.05),
        ("aggregated", "optimum", "grpo", 0.05),
        ("aggregated", "optimum", "online_multitask", 0.05),
        ("aggregated", "optimum", "paragator", 0.05),
        ("aggregated", "optimum", "pkpo", 0.05),
        ("aggregated", "marginal_mean", "aggregator_only", 0.0),
        ("aggregated", "with_without", "marginal_mean", -0.02),
        ("rsa@1", "marginal_mean", "grpo", 0.10),
        ("rsa@10", "marginal_mean", "paragator", 0.0),
    )
    return s


def _experiment(arm: str) -> ConfigDict:
    c = tiny.get_config()
    rollouts, steps = _ARMS[arm]
    c.loss.estimator = arm
    c.search.traces = rollouts["N"]
    if "K" in rollouts:
        c.aggregation.subsets, c.aggregation.traces = rollouts["K"], rollouts["M"]
    c.train.steps, c.train.max_sampled_tokens = steps, _TOKENS
    c.eval.problems = 0  # every arm is evaluated by the same program afterwards
    return c


def _evaluation() -> ConfigDict:
    c = tiny.get_config()
    # ten rounds cost 80 aggregations a problem: more than a run of training costs with 512
    c.eval.problems = 128
    c.eval.n = 16
    c.eval.subsets = 4  # all of the 16 traces
    c.eval.rounds = 10  # trained for one
    c.eval.wave = 128
    return c
