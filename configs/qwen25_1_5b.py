"""SPIRAL on Qwen2.5-1.5B-Instruct, in traces of up to 2,048 tokens: one host of 8 devices.

The paper has no run of this model. Its settings for the 4B model (`qwen3_4b.py`) with shorter
traces, which are what this model writes, and half the problems a step; nothing is tuned.

    --config.model.hf_path=DIR --config.task.train_path=FILE --config.task.eval_path=FILE
"""

from ml_collections import ConfigDict

from configs import qwen3_4b


def get_config() -> ConfigDict:
    c = qwen3_4b.get_config()
    c.model.hf_path = "models/Qwen2.5-1.5B-Instruct"  # Hugging Face directory
    # of the frozen base: 3.1 GB; adapters on all seven projections: 36.93 M parameters
    c.model.param_dtype = "bfloat16"

    # 2 key/value heads: mesh.tensor may be 1 or 2. Keys and values take 28 KiB a token.
    c.mesh.fsdp = 8
    c.mesh.tensor = 1

    c.search.max_tokens = 2048
    c.aggregation.max_tokens = 2048
    c.batch.problems = 128
    c.batch.search_lengths = ((1024, 2048),)
    # the longest: a problem, 4 candidates, the words around them
    c.batch.aggregation_lengths = ((2048, 2048), (5120, 2048), (9728, 2048))
    return c
