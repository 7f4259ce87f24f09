r"""What the paper leaves open, on two halves: one change at a time to the arm `marginal_mean`.

    python -m spiral_jax.study --config=configs/study_two_halves_ablations.py \
        --workdir=runs/study_ablations --at_once=2

The arm is that of `study_two_halves.py`. The learning rate is Adam's, so a weight on both terms
changes little; the balance of the two does. 12 arms and the base with 3 seeds: two and a quarter
hours on two cores. Stopped, it goes on with the same command.
"""

from ml_collections import ConfigDict

from configs import study_two_halves
from spiral_jax.studies import design

_LONG = {"train.max_sampled_tokens": 1_400_000, "train.steps": 115}
# arm: what differs
_ARMS = {
    "marginal_mean": {},
    "with_without": {"loss.estimator": "with_without"},
    # 0.886 and 12 times the true gradients of search and aggregation
    "sum": {"loss.normalizer": "sum"},
    "search_weight_0.25": {"loss.search_weight": 0.25},
    "search_weight_4": {"loss.search_weight": 4.0},
    # K sets x M samples at 16 aggregations a problem; prediction: more sets beat more samples
    "2_sets_of_8": {"aggregation.subsets": 2, "aggregation.traces": 8},
    "8_sets_of_2": {"aggregation.subsets": 8, "aggregation.traces": 2},
    # length gate; `marginal_mean` has it at traces that the limit cut off, of which this task has
    # none; search traces have 20 to 24 tokens: 22 hits the longer sums, not a half
    "gate_off": {"loss.length_gate": 1.0},
    "gate_22_tokens": {"loss.length_gate": 22.0},
    # candidates in the order of their sampling; prediction: nothing changes, as a problem's traces
    # are exchangeable
    "order_sampled": {"aggregation.order": "sampled"},
    # as many aggregations, half of them of aggregations; prediction: this reader is not lost in
    # later rounds of RSA. A pilot of seed 0: 1 answer in 10 of the second round was right at
    # 540,000 tokens, 9 were at 1.4 million.
    "1_round_long": _LONG,
    "2_rounds_long": _LONG | {"aggregation.rounds": 2, "aggregation.traces": 2},
}


def get_config(name: str = "") -> ConfigDict:
    if not name:
        return _study()
    if name == design.EVALUATION:
        return study_two_halves.get_config(name)
    c = study_two_halves.get_config("marginal_mean")
    for field, value in _ARMS[name].items():
        room, key = field.split(".")
        c[room][key] = value
    return c


def _study() -> ConfigDict:
    s = study_two_halves.get_config()
    s.title = "Two halves: ablations"
    s.question = (
        "Estimator, normaliser, weight of the search term, sets against samples a set, length "
        "gate, order of the candidates, and a second round of aggregation in training, one at a "
        "time."
    )
    s.arms = tuple((arm, (0, 1, 2)) for arm in (design.BASE, *_ARMS))
    s.baseline = "marginal_mean"
    s.cross = ()
    s.claims = (
        ("aggregated", "with_without", "marginal_mean", -0.02),
        ("aggregated", "8_sets_of_2", "2_sets_of_8", 0.0),
        ("aggregated", "gate_off", "marginal_mean", -0.02),
        ("aggregated", "order_sampled", "marginal_mean", -0.02),
        ("rsa@10", "2_rounds_long", "1_round_long", 0.10),
    )
    return s
