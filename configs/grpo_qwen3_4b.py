"""The paper's GRPO baseline on Qwen3-4B-Instruct-2507 (arXiv 2606.23595, Table 1): search traces
alone.

A problem costs 12 traces of up to 8,192 tokens: at most 98,304, as in `qwen3_4b.py`. All else is as
there; what the paper does not say of its baseline is taken from its SPIRAL run.

    --config.model.hf_path=DIR --config.task.train_path=FILE --config.task.eval_path=FILE
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "models/Qwen3-4B-Instruct-2507"  # Hugging Face directory (paper: this model)
    c.model.lora_rank = 32  # adapters on all seven projections: 66.06 M parameters (paper)
    c.model.lora_alpha = 32.0  # scale alpha / rank = 1 (unpublished)
    # of the frozen base: 8.0 GB; adapters and Adam's moments: float32
    c.model.param_dtype = "bfloat16"

    c.mesh.data = -1  # reasons in qwen3_4b.py
    c.mesh.fsdp = 8
    c.mesh.tensor = 1

    c.task.name = "jsonl"  # paper: a filtered POLARIS-53K; the filter is unpublished
    c.task.train_path = "data/train.jsonl"
    c.task.eval_path = "data/eval.jsonl"
    # 0/1 on the final answer in \boxed{} (paper: exact answer; the parser is ours)
    c.task.reward = "math"
    c.prompt.max_problem_tokens = 1024  # tokens of a prompt; longer ones are left out (paper)

    c.search.traces = 12  # N (paper)
    c.search.max_tokens = 8192  # tokens a trace (paper)
    c.search.temperature = 1.0  # (SPIRAL's)

    # At the limit a group has 14.6 GB of keys and values, against 5.0 in SPIRAL.
    c.sampling.max_ratio = 4.0  # problems tried / batch.problems, at most

    c.batch.problems = 256  # B, with a non-zero advantage (SPIRAL's)
    c.batch.search_lengths = ((1024, 4096), (1024, 8192))  # (P, G) tokens
    c.batch.search_groups = 8  # U a micro-batch, 12 traces each; 16 on two hosts of 8 devices

    # (r - mean) / std, mean over the tokens of the batch (paper: GRPO; its form unpublished)
    c.loss.estimator = "grpo"
    c.loss.search_weight = 1.0
    c.loss.length_gate = 0.0  # as SPIRAL; whether the paper's baseline had the gate is unpublished

    c.optimizer.lr = 2e-5  # constant, without warm-up (SPIRAL's)
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.b1 = 0.9  # Adam's three (the paper's framework's defaults)
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0  # (unpublished)
    c.optimizer.clip_norm = 0.0  # no clipping (unpublished)
    c.train.steps = 250  # (paper: about 250)

    c.eval.problems = 512  # held-out, at the start and the end; eval_path must have as many
    return c
