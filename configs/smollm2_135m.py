"""A real small model, end to end: SmolLM2-135M-Instruct with LoRA on GSM8K, float32, hours on a
CPU.

    bash launch/fetch_smollm2.sh
    python -m spiral_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \\
        --config.task.train_path=train.jsonl --config.task.eval_path=test.jsonl

GSM8K's own lines, {"question", "answer": "... #### 42"}. The settings make steps of minutes; they
are not tuned.
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults

# A model of this size follows an example, not an instruction: asked for a box alone, one trace in a
# hundred has one.
SEARCH = (
    "Question: Ann has 3 bags with 4 apples each. She eats 2 apples. How many apples are left?\n"
    "Answer: 3 bags of 4 apples are 3 * 4 = 12 apples. After 2 are eaten, 12 - 2 = 10 are left. "
    "The answer is "
    "\\boxed{{10}}.\n\n"
    "Question: {problem}\nAnswer:"
)
AGGREGATION = (
    "Question: Ann has 3 bags with 4 apples each. She eats 2 apples. How many apples are left?\n"
    "Attempt: 3 + 4 = 7 and 7 - 2 = 5. The answer is \\boxed{{5}}.\n"
    "Attempt: 3 * 4 = 12 and 12 - 2 = 10. The answer is \\boxed{{10}}.\n"
    "Answer: The bags hold 3 * 4 = 12 apples, so the first attempt is wrong. 12 - 2 = 10. "
    "The answer is "
    "\\boxed{{10}}.\n\n"
    "Question: {problem}\n{candidates}Answer:"
)


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "models/SmolLM2-135M-Instruct"  # as launch/fetch_smollm2.sh makes it
    c.model.param_dtype = "float32"  # as it is stored; CPUs gain nothing from bfloat16
    c.model.compute_dtype = "float32"
    c.model.lora_rank = 16
    c.model.lora_alpha = 16.0

    c.task.name = "jsonl"
    c.task.train_path = "data/gsm8k/train.jsonl"
    c.task.eval_path = "data/gsm8k/test.jsonl"
    c.task.reward = "math"
    c.prompt.search, c.prompt.aggregation, c.prompt.candidate = (
        SEARCH,
        AGGREGATION,
        "Attempt: {candidate}\n",
    )
    # GSM8K's longest search prompts have 337 (train) and 302 (test) tokens
    c.prompt.max_problem_tokens = 384
    c.prompt.keep_tail_tokens = 192

    c.search.traces = 8
    c.search.max_tokens = 192
    c.aggregation.subsets = 4
    c.aggregation.subset_size = 4
    c.aggregation.traces = 2
    c.aggregation.max_tokens = 192

    c.sampling.rows = 64
    c.sampling.chunk = 16
    c.sampling.prefill_tokens = 2560
    c.sampling.prefill_chunk = 128
    c.batch.problems = 4
    c.batch.search_lengths = ((384, 192),)
    c.batch.search_groups = 2
    c.batch.aggregation_lengths = ((896, 192), (1280, 192))
    c.batch.aggregation_groups = 2
    c.loss.logprob_chunk = 64

    c.optimizer.lr = 5e-5
    c.train.steps = 100
    c.train.mismatch_limit = 1e-3  # float32 at logits of order 20
    c.eval.problems = 32
    c.eval.subsets = 2
    # at 1 few traces of a model of this size stay on the question
    c.eval.search_temperature = c.eval.aggregation_temperature = 0.7
    c.checkpoint.every = 5
    c.trace_log.every = 1
    return c
