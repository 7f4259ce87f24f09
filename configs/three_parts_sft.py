"""How the model of the task `three_parts` is made, as `tiny_sft.py`: one seed, two CPU cores.

    python -m spiral_jax.sft --config=configs/three_parts_sft.py --out=DIR

It works out any part, but leans to the one that is worth least. Its reader practises to put
together what candidates name, three times in four those of search, else earlier aggregations.
"""

from ml_collections import ConfigDict

from configs import three_parts, tiny_sft


def get_config() -> ConfigDict:
    c = tiny_sft.get_config().unlock()
    c.task = "three_parts"
    c.prompt = ConfigDict(three_parts.get_config().prompt)
    c.model.vocab_size = 336  # its texts have no more pieces
    c.data.search = ConfigDict({"shares": (0.1, 0.1, 0.8)})
    # a set's candidates work on x, y and z with one of these shares
    mixes = ((1 / 3, 1 / 3, 1 / 3), (0.1, 0.1, 0.8), (0.8, 0.1, 0.1), (0.1, 0.8, 0.1))
    c.data.aggregation = ConfigDict({"mixes": mixes, "aggregated": 0.25})
    return c.lock()
