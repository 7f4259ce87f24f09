r"""Deep rounds on two halves: one round in training, two in the rollout, or stored populations.

    python -m spiral_jax.study --config=configs/study_rounds.py --workdir=runs/study_rounds \
        --at_once=2

Trained for one round, the model has never read an aggregation, and is lost in the second round of
self-aggregation. Two rounds in the rollout hold in one seed of three at 1.4 million tokens
(`study_two_halves_ablations`, 2_rounds_long: 88, 39 and 30 % after ten). `replay` has two rounds in
the rollout too, and reads stored populations beside it, of round 1 and deeper (config.replay). All
three end with the same sampled tokens, and differ in how they spend them:

    1_round     16 problems a step: 8 traces, 4 sets, 4 aggregations of each
    2_rounds    the same, 2 aggregations of each, and 4 sets of these with 2 of each
    replay      4 problems as in 2_rounds, but 4 aggregations of each set in both rounds, and 16
                stored populations, which two such rounds read

`replay` has few problems of its own because reading is what takes long to learn: the model's
answers to a prompt of aggregations are at first wrong and nearly all the same, so few sets teach
anything. That, the tokens and a quarter of the search term's weight are from pilots of seed 0
(docs/log.md, "Stored populations, pilots").
"""

from ml_collections import ConfigDict

from configs import study_two_halves
from spiral_jax.studies import design

_TOKENS = 4_400_000  # sampled tokens that end a run of any arm
_STEPS = {"1_round": 360, "2_rounds": 345, "replay": 490}  # at most: a little more than they buy
_SEEDS = (0, 1, 2)
# fields that differ
_ARMS = {
    "1_round": {},
    "2_rounds": {"aggregation.rounds": 2, "aggregation.traces": 2},
    "replay": {
        "aggregation.rounds": 2,
        "batch.problems": 4,
        "batch.search_groups": 4,
        "replay.problems": 16,
    },
}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        return study_two_halves.get_config(name)
    c = study_two_halves.get_config("marginal_mean")
    return experiment(c, name, _TOKENS, _STEPS[name])


def experiment(c: ConfigDict, arm: str, tokens: int, steps: int) -> ConfigDict:
    """A task's configuration of marginal_mean -> that of an arm."""
    # The search term is the larger one; with a quarter of it one round learns as much as before
    # (`study_two_halves_ablations`), and reading aggregations is learned sooner.
    c.loss.search_weight = 0.25
    c.update_from_flattened_dict(_ARMS[arm])
    c.train.max_sampled_tokens, c.train.steps = tokens, steps
    return c


def study() -> ConfigDict:
    """What the studies of rounds have in common."""
    s = design.defaults()
    s.question = (
        "Do stored populations train deep rounds of self-aggregation, at the tokens of one or two "
        "rounds in the rollout?"
    )
    s.notes = (
        "One model of 0.8 M parameters a task, made for it: nothing here shows what happens at 4B. "
        "How each arm spends its tokens is a choice; that of replay is from pilots of seed 0."
    )
    s.arms = tuple((arm, _SEEDS) for arm in (design.BASE, *_ARMS))
    s.baseline = "2_rounds"
    return s


def _study() -> ConfigDict:
    s = study()
    s.title = "Rounds on two halves"
    s.strategies = 2
    s.measures = ("aggregated", "mixed", "single", "pass@8")
    s.measures += tuple(f"rsa@{round}" for round in range(1, 11))
    s.claims = (
        ("rsa@10", "replay", "", 0.80),
        ("rsa@10", "replay", "2_rounds", 0.0),
        ("rsa@10", "replay", "1_round", 0.50),
        ("rsa@2", "replay", "1_round", 0.50),
        ("aggregated", "replay", "1_round", -0.02),
        ("aggregated", "2_rounds", "1_round", -0.02),
    )
    return s
