"""How the bundled tiny model is made: supervised traces of the two-halves task, one seed, two CPU
cores.

    python -m spiral_jax.sft --config=configs/tiny_sft.py --out=DIR

Its search is lopsided on purpose: nine traces in ten work on the left half. Its reader is good:
every fair mix of candidates is practised.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # weights and demonstrations
    c.task = "two_halves"
    c.task_seed = 0  # which problems: only training problems are practised
    c.prompt = ConfigDict(tiny.get_config().prompt)  # the scaffold that the model will be used with

    c.model = ConfigDict()  # sizes by their axis letter (spiral_jax/core/groups.py)
    c.model.vocab_size = 352  # pieces: 256 bytes, the task's characters and their merges
    c.model.D = 128
    c.model.F = 384
    c.model.L = 4
    c.model.H = 4
    c.model.J = 2
    c.model.E = 32
    c.model.norm_eps = 1e-6
    c.model.rope_theta = 10_000.0

    c.data = ConfigDict()
    c.data.search_problems = 16  # a step
    c.data.search_traces = 4  # demonstrations of each
    # chance that a search demonstration works on the left half
    c.data.search = ConfigDict({"left_share": 0.9})
    c.data.sets = 48  # aggregation demonstrations a step
    c.data.set_size = 4  # candidates of each
    # a set's own chance of a left candidate is one of these
    c.data.aggregation = ConfigDict({"left_shares": (0.5, 0.5, 0.9, 0.1, 1.0, 0.0)})

    c.optimizer = ConfigDict()
    c.optimizer.steps = 1500
    c.optimizer.lr = 3e-3  # peak of a cosine to zero
    c.optimizer.warmup_steps = 100
    c.optimizer.b2 = 0.98
    c.optimizer.clip_norm = 1.0
    return c.lock()
