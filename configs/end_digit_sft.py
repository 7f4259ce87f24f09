"""How the model of the task `end_digit` is made, as `tiny_sft.py`: one seed, two CPU cores.

    python -m spiral_jax.sft --config=configs/end_digit_sft.py --out=DIR

It works out any try and knows whether it hits, but leans to one of the twelve expressions. Its
reader finds a candidate that hits.
"""

from ml_collections import ConfigDict

from configs import end_digit, tiny_sft


def get_config() -> ConfigDict:
    c = tiny_sft.get_config().unlock()
    c.task = "end_digit"
    c.prompt = ConfigDict(end_digit.get_config().prompt)
    # the other expressions are tried equally often
    c.data.search = ConfigDict({"first_share": 0.8})
    # a candidate hits with this chance beside that of any try: 7 sets in 10 have one that does
    c.data.aggregation = ConfigDict({"right": 0.1, "first_share": 0.8})
    c.data.sets = 24
    c.optimizer.steps = 2000
    return c.lock()
