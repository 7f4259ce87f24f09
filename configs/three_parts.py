"""The third bundled task and model: partial answers compose, rewards are fractions
(`spiral_jax/tasks/three_parts.py`).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config().unlock()
    c.model.hf_path = "bundled:three_parts"
    c.task.name = "three_parts"
    c.prompt.keep_tail_tokens = 20
    c.prompt.max_problem_tokens = 24
    c.search.max_tokens = 20  # one part has 16 to 19 tokens, its box among them
    # below the cost of one part: an aggregation trace can read, not compute; all three are named
    # in 11
    c.aggregation.max_tokens = 12
    c.batch.search_lengths = ((24, 20),)
    c.batch.aggregation_lengths = ((112, 12),)
    return c.lock()
