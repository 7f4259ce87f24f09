"""SPIRAL on Qwen3-4B-Instruct-2507 at the paper's settings (arXiv 2606.23595, Table 1 and section
3.2).

A problem costs 8 search and 4 x 4 aggregation traces of up to 4,096 tokens: at most 98,304, as in
`grpo_qwen3_4b.py`. What is not named here is in `spiral_jax/core/config.py`.

    --config.model.hf_path=DIR --config.task.train_path=FILE --config.task.eval_path=FILE
"""

from ml_collections import ConfigDict

from spiral_jax.core.config import defaults


def get_config() -> ConfigDict:
    c = defaults()
    c.model.hf_path = "models/Qwen3-4B-Instruct-2507"  # Hugging Face directory (paper: this model)
    # adapters on all seven projections, one set for both roles: 66.06 M parameters (paper)
    c.model.lora_rank = 32
    c.model.lora_alpha = 32.0  # scale alpha / rank = 1 (unpublished)
    # of the frozen base: 8.0 GB; adapters and Adam's moments: float32
    c.model.param_dtype = "bfloat16"

    # One host of 8 devices, or several. fsdp: the base is cut in 8, 1.0 GB a device. tensor:
    # 1 if a device holds the decode weights, 8.0 GB in bfloat16, beside its share of the cache (144
    # KiB a token); else up to 8, the number of key/value heads. All U below must be multiples of
    # data * fsdp.
    c.mesh.data = -1
    c.mesh.fsdp = 8
    c.mesh.tensor = 1

    c.task.name = "jsonl"  # paper: a filtered POLARIS-53K; the filter is unpublished
    c.task.train_path = "data/train.jsonl"
    c.task.eval_path = "data/eval.jsonl"
    # 0/1 on the final answer in \boxed{} (paper: exact answer; the parser is ours)
    c.task.reward = "math"
    # tokens of a search prompt; longer ones are left out (paper)
    c.prompt.max_problem_tokens = 1024

    c.search.traces = 8  # N (paper)
    c.search.max_tokens = 4096  # tokens a search trace (paper)
    c.search.temperature = 1.0  # (paper)
    c.aggregation.subsets = 4  # K sets a problem (paper)
    c.aggregation.subset_size = 4  # S traces a set (paper)
    c.aggregation.traces = 4  # M a set (paper)
    c.aggregation.max_tokens = 4096  # tokens an aggregation trace (paper)
    c.aggregation.temperature = 1.0  # (paper)

    # Keys and values take 144 KiB a token in bfloat16, over the devices of mesh.tensor.
    c.sampling.memory = 0.8
    c.sampling.max_ratio = 4.0  # problems tried / batch.problems, at most

    c.batch.problems = 256  # B, with a non-zero advantage (paper)
    c.batch.search_lengths = ((1024, 4096),)  # (P, G) tokens
    c.batch.search_groups = 16  # U a micro-batch, 8 traces each
    c.batch.aggregation_lengths = ((2048, 4096), (9216, 4096), (17920, 4096))  # tokens
    c.batch.aggregation_groups = 16  # U a micro-batch, 4 traces each

    c.loss.estimator = "marginal_mean"  # Eq. 6-8 (paper)
    c.loss.normalizer = "unbiased"  # both terms are gradients of the same J (unpublished)
    c.loss.search_weight = 1.0  # w_s (unpublished)
    c.loss.aggregation_weight = 1.0  # w_a (unpublished)
    # positive advantages die on traces that the limit cut off (paper: a shorter, unpublished limit)
    c.loss.length_gate = 0.0

    c.optimizer.lr = 2e-5  # constant, without warm-up (paper; its schedule is unpublished)
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.b1 = 0.9  # Adam's three (the paper's framework's defaults)
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0  # (unpublished)
    c.optimizer.clip_norm = 0.0  # no clipping (unpublished)
    c.train.steps = 250  # (paper: about 250, two epochs)

    c.eval.problems = 512  # held-out, at the start and the end; eval_path must have as many
    c.eval.subsets = 2  # disjoint sets of 4 of the 8 traces
    c.eval.traces = 2  # aggregation traces a set
    return c
