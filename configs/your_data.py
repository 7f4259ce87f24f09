"""SPIRAL on problems of your own: what must be said, and nothing else. Copy it and change it.

    python -m spiral_jax.train --config=configs/your_data.py --dry_run       # tries data and reward
    python -m spiral_jax.train --config=configs/your_data.py --workdir=runs/mine

All other fields, with units and defaults: spiral_jax/core/config.py. Micro-batches follow from the
limits below.
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "models/Qwen3-0.6B"  # a family of docs/models.md: a directory, or a Hub id

    c.task.train_path = "data/train.jsonl"  # lines {"problem": ..., "answer": ..., all you like}
    c.task.eval_path = "data/eval.jsonl"
    c.task.reward = "math"  # or "my_reward:reward": a function (text, problem) -> 0 ... 1
    c.prompt.max_problem_tokens = 1024  # longer ones are left out and counted
    c.search.max_tokens = 2048  # what a search trace needs, thinking included
    c.aggregation.max_tokens = 2048

    c.batch.problems = 32  # with a signal, for each of train.steps
    c.train.steps = 100
    c.eval.problems = 64  # of eval_path
    return c
