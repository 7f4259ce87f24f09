"""The quickstart: the bundled one-million-parameter model on the two-halves task, minutes on two
CPU cores.
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "bundled:tiny"
    c.model.compute_dtype = "float32"
    c.model.lora_rank = 0  # full fine-tuning
    c.model.remat = "none"  # memory is not what is short here

    c.task.name = "two_halves"
    c.prompt.search = "{problem}"  # 15 tokens; the model knows no other task, so it needs no words
    c.prompt.aggregation = "{problem}{candidates}"
    c.prompt.candidate = "#{candidate}"
    c.prompt.keep_tail_tokens = 26
    c.prompt.max_problem_tokens = 16

    # one half costs 16 tokens, the answer 8: there is no room for both halves
    c.search.max_tokens = 26
    # below the cost of one half: an aggregation trace can read, not compute
    c.aggregation.max_tokens = 12

    c.sampling.rows = 512
    c.sampling.chunk = 8
    c.sampling.prefill_tokens = 4096
    c.sampling.prefill_chunk = 64
    c.sampling.keep_rate = 0.75  # at the start; it rises with training
    c.batch.problems = 16
    c.batch.search_lengths = ((16, 26),)
    c.batch.search_groups = 16
    c.batch.aggregation_lengths = ((124, 12),)
    c.batch.aggregation_groups = 32
    c.loss.logprob_chunk = 32

    c.optimizer.lr = 3e-4
    # a constant rate overshoots the even split of the halves again and again
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 5
    c.train.steps = 40
    c.train.mismatch_limit = 1e-4  # float32: sampler and trainer must agree to this
    c.checkpoint.every = 10
    c.trace_log.every = 10

    c.eval.n = 32
    # the first gains; the second shows that candidates that are aggregations are new to this model
    c.eval.rounds = 2
    return c
