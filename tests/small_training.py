"""The drills' run as a configuration: a model of one layer, two problems a step, seconds."""

import ast

from benchmarks import drill
from configs import tiny


def small_training(folder, steps):
    """Writes model and problems into `folder`, once, and returns the configuration."""
    drill.prepare(folder)
    c = tiny.get_config()
    for flag in drill.FLAGS[1:]:
        field, value = flag.removeprefix("--config.").split("=", 1)
        section, name = field.split(".")
        is_text = isinstance(c[section][name], str)
        c[section][name] = value if is_text else ast.literal_eval(value)
    c.model.hf_path = str(folder / "model")
    c.task.train_path = str(folder / "train.jsonl")
    c.train.steps = steps
    return c
