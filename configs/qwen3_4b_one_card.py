"""SPIRAL on Qwen3-4B-Instruct-2507 on one card of 24 GB: the base in int8, shorter traces.

As `qwen3_4b.py` but for what memory and time of one card ask. Nothing is tuned; what fits is in
docs/your_model.md, by `python -m spiral_jax.plan --topology=rtx4090:1`.

    --config.model.hf_path=DIR --config.task.train_path=FILE --config.task.eval_path=FILE
"""

from ml_collections import ConfigDict

from configs import qwen3_4b


def get_config() -> ConfigDict:
    c = qwen3_4b.get_config()
    # one copy of the projections, 3.6 GB, which sampler and trainer both read; the embedding, which
    # is the head too, stays in bfloat16: 0.8 GB
    c.model.param_dtype = "int8"
    c.model.remat = "layer"
    c.mesh.data = c.mesh.fsdp = c.mesh.tensor = 1

    c.prompt.max_problem_tokens = 512
    c.search.max_tokens = 2048
    c.aggregation.max_tokens = 2048
    c.prompt.candidate_tail = 1024  # of each candidate; aggregation prompts stay below 4,864 tokens
    c.prompt.keep_tail_tokens = 1024
    c.sampling.cache_dtype = "int8"  # 74 KiB a token in place of 144
    c.sampling.prefill_tokens = 4096

    c.batch.problems = 32
    c.batch.search_lengths = ((512, 2048),)
    c.batch.search_groups = 1  # U a micro-batch, 8 traces each
    c.batch.aggregation_lengths = ((4864, 2048),)
    c.batch.aggregation_groups = 1
    c.loss.logprob_chunk = 64

    c.train.steps = 250
    c.eval.problems = 128
    return c
