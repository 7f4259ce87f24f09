"""A real small model, end to end: SmolLM2-135M-Instruct with LoRA on GSM8K, float32, hours on a CPU.

    bash launch/fetch_smollm2.sh
    python -m spiral_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \\
        --config.task.train_path=train.jsonl --config.task.eval_path=test.jsonl

GSM8K's own lines, {"question", "answer": "... #### 42"}. The settings make steps of minutes; they are not tuned.
"""

from ml_collections import ConfigDict

from spiral_jax.config import defaults


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
    c.prompt.max_problem_tokens = 288  # GSM8K's longest search prompts have 271 (train) and 236 (test) tokens
    c.prompt.keep_tail_tokens = 192

    c.search.traces = 8
    c.search.max_tokens = 192
    c.aggregation.subsets = 4
    c.aggregation.subset_size = 4
    c.aggregation.traces = 2
    c.aggregation.max_tokens = 192

    # (slots, C, P, G); the longest aggregation prompt, question, 4 candidates and words, has 1,126 tokens
    c.sampling.classes = ((4, 8, 288, 192), (4, 4, 288, 192), (4, 2, 288, 192), (8, 2, 1152, 192), (4, 1, 1152, 192))
    c.sampling.chunk = 16
    c.sampling.exit_groups = 1
    c.sampling.prefill_tokens = 2304
    c.sampling.row_counts = (2, 4, 8, 12, 16, 24, 32, 48)
    c.batch.problems = 4
    c.batch.search_lengths = ((288, 192),)
    c.batch.search_groups = 2
    c.batch.aggregation_lengths = ((896, 192), (1152, 192))
    c.batch.aggregation_groups = 2
    c.loss.logprob_chunk = 64

    c.optimizer.lr = 5e-5
    c.train.steps = 100
    c.train.mismatch_limit = 1e-3  # float32 at logits of order 20
    c.eval.problems = 32
    c.eval.subsets = 2
    c.checkpoint.every = 5
    c.trace_log.every = 1
    return c
