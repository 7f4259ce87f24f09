"""The second bundled task and model: search is hard, checking is easy
(`spiral_jax/tasks/end_digit.py`).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config().unlock()
    c.model.hf_path = "bundled:end_digit"
    c.task.name = "end_digit"
    c.prompt.keep_tail_tokens = 28
    c.search.max_tokens = 28  # one try has 25 to 27 tokens
    c.aggregation.max_tokens = 28  # it may try once more itself
    c.batch.search_lengths = ((16, 28),)
    c.batch.aggregation_lengths = ((132, 28),)
    return c.lock()
