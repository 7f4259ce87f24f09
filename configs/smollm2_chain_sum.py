"""A real small model on one GPU, minutes: SmolLM2-135M-Instruct with LoRA on sums of reasoning-gym,
bfloat16.

    bash launch/fetch_smollm2.sh
    python -m spiral_jax.train --config=configs/smollm2_chain_sum.py --workdir=runs/chain_sum

Two numbers of one or two digits, added or subtracted in one line; an aggregation trace reads four
such lines. GRPO at as many traces a problem:

    --config.loss.estimator=grpo --config.search.traces=24

On an H100 a step takes seconds (docs/log.md). Nothing is tuned.
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults

SEARCH = (
    "State the final answer to the following arithmetic problem: 41 - 7 =\n"
    "41 - 7 = 34, so the answer is \\boxed{{34}}.\n"
    "State the final answer to the following arithmetic problem: 8 + 65 =\n"
    "8 + 65 = 73, so the answer is \\boxed{{73}}.\n"
    "{problem}\n"
)
AGGREGATION = (
    "State the final answer to the following arithmetic problem: 41 - 7 =\n"
    "Attempt: 41 - 7 = 35, so the answer is \\boxed{{35}}.\n"
    "Attempt: 41 - 7 = 34, so the answer is \\boxed{{34}}.\n"
    "The best attempt: 41 - 7 = 34, so the answer is \\boxed{{34}}.\n"
    "{problem}\n{candidates}The best attempt:"
)


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "models/SmolLM2-135M-Instruct"  # as launch/fetch_smollm2.sh makes it
    c.model.param_dtype = "bfloat16"
    c.model.compute_dtype = "bfloat16"
    c.model.lora_rank = 16
    c.model.lora_alpha = 32.0
    c.model.remat = "dots"

    c.task.name = "reasoning_gym"
    c.task.generator = "chain_sum"
    c.task.generator_args = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    c.task.reward = "math"
    c.prompt.template = "plain"  # a model of this size follows an example, not an instruction
    c.prompt.search, c.prompt.aggregation, c.prompt.candidate = (
        SEARCH,
        AGGREGATION,
        "Attempt: {candidate}\n",
    )
    c.prompt.stop = ("\n",)
    c.prompt.max_problem_tokens = 128
    c.prompt.keep_tail_tokens = 32

    c.search.traces = 8
    c.search.max_tokens = 32
    c.aggregation.subsets = 4
    c.aggregation.subset_size = 4
    c.aggregation.traces = 4
    c.aggregation.max_tokens = 32

    c.sampling.rows = 512
    c.sampling.chunk = 16
    c.sampling.prefill_tokens = 16384
    c.batch.problems = 32  # and as many groups a micro-batch, for a device of 80 GB
    c.batch.search_lengths = ((128, 32),)
    c.batch.search_groups = 32
    c.batch.aggregation_lengths = ((320, 32),)
    c.batch.aggregation_groups = 32
    c.loss.logprob_chunk = 32

    c.optimizer.lr = 1e-4
    c.train.steps = 100
    c.eval.problems = 256
    c.eval.subsets = 2
    c.checkpoint.every = 50
    c.trace_log.every = 10
    return c
