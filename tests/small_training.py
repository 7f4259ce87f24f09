"""The drills' run as a configuration: a model of one layer, two problems a step, seconds."""

import ast

from benchmarks import drill
from configs import tiny


def small_training(folder, steps):
    """Writes model and problems into `folder`, once, and returns the configuration."""
    drill.prepare(folder)
    c = tiny.get_config()
    for flag in [*drill.FLAGS[1:], *drill.files_of(folder)]:
        field, value = flag.removeprefix("--config.").split("=", 1)
        section, name = field.split(".")
        is_text = isinstance(c[section][name], str)
        c[section][name] = value if is_text else ast.literal_eval(value)
    c.train.steps = steps
    return c
