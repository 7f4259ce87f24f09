"""SPIRAL on Qwen3-30B-A3B-Instruct-2507, a mixture of experts: one host of 8 devices of 80 GB.

The paper's settings for the 4B model (`qwen3_4b.py`), with adapters on attention alone; nothing is
tuned.

    --config.model.hf_path=DIR --config.task.train_path=FILE --config.task.eval_path=FILE
"""

from ml_collections import ConfigDict

from configs import qwen3_4b


def get_config() -> ConfigDict:
    c = qwen3_4b.get_config()
    c.model.hf_path = "models/Qwen3-30B-A3B-Instruct-2507"  # Hugging Face directory
    # of the frozen base: 61 GB; adapters on q, k, v and o: 26.74 M parameters. On experts
    # (model.lora_experts) they would be 1.66 G more.
    c.model.param_dtype = "bfloat16"

    # tensor: a device holds the decode weights of all experts, cut by it: 15.3 GB by 4, which is
    # the number of key/value heads. Keys and values take 96 KiB a token, over 4 devices.
    c.mesh.data = -1
    c.mesh.fsdp = 2
    c.mesh.tensor = 4

    # U a micro-batch: each token has a row for each of its 8 experts.
    c.batch.search_groups = 4
    c.batch.aggregation_groups = 4
    return c
