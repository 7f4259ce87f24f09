"""SPIRAL on Llama-3.2-1B-Instruct, in traces of up to 2,048 tokens: one host of 8 devices.

As `qwen25_1_5b.py`; nothing is tuned.

    --config.model.hf_path=DIR --config.task.train_path=FILE --config.task.eval_path=FILE
"""

from ml_collections import ConfigDict

from configs import qwen25_1_5b


def get_config() -> ConfigDict:
    c = qwen25_1_5b.get_config()
    c.model.hf_path = "models/Llama-3.2-1B-Instruct"  # Hugging Face directory
    # of the frozen base: 2.5 GB; adapters on all seven projections: 22.54 M parameters
    c.model.param_dtype = "bfloat16"
    # 8 key/value heads: mesh.tensor may be up to 8. Keys and values take 32 KiB a token.
    c.mesh.tensor = 1

    # Its chat template tells the model today's date: prompts would be others tomorrow.
    c.prompt.template_kwargs = ConfigDict({"date_string": "26 Jul 2024"})
    return c
