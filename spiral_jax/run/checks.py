"""Checks of config sections that belong to the run itself, or to several rooms.

Each room checks its own numbers where it reads them; these need neither data nor devices either.
"""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from spiral_jax.core.config import MEASURES, METRIC_WRITERS, REMAT, require
from spiral_jax.model.attention.backends import BACKENDS
from spiral_jax.prompts.settings import FENCES
from spiral_jax.verifier.rewards import NAMED

_ROWS = {  # tuples of rows of so many integers
    "batch.search_lengths": 2,
    "batch.aggregation_lengths": 2,
}
_INTEGERS = ("eval.limits",)
# Of training and evaluation both; those `_OF_RUN` of training alone.
_CHOICES = {
    "model.param_dtype": ("float32", "bfloat16", "int8"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": REMAT,
    "model.attention": ("auto", *BACKENDS),
    "aggregation.order": ("shuffled", "sampled"),
    "prompt.template": ("chat", "plain"),
    "prompt.fence": FENCES,
    "prompt.truncated": ("keep_tail", "drop", "mark"),
    "prompt.thinking": ("answer_only", "full"),
}
_CHOICES_OF_RUN = {"checkpoint.keep_best": ("", *MEASURES)}
_LEAST = {
    "seed": 0,
    "model.lora_rank": 0,
    "model.attention_block": 1,
    "prompt.max_problem_tokens": 1,
    "prompt.keep_tail_tokens": 1,
    "prompt.candidate_tail": 0,
    "search.max_tokens": 1,
    "aggregation.max_tokens": 1,
    "eval.problems": 0,
    "train.watchdog": 0,
}
_LEAST_OF_RUN = {
    "eval.every": 0,
    "eval.rounds_in_training": 0,
    "train.steps": 1,
    "train.max_sampled_tokens": 0,
    "train.max_bad_steps": 1,
    "train.spike": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "checkpoint.max_failures": 1,
    "trace_log.every": 0,
    "trace_log.keep_steps": 1,
}
_POSITIVE = ("train.wait_s",)
_POSITIVE_OF_RUN = ("train.grace_s",)


def check_shared(c: ConfigDict) -> None:
    """What training and evaluation both need. Raises `ConfigError`."""
    _check_tuples(c)
    _check_values(c, _CHOICES, _LEAST, _POSITIVE)
    m = c.model
    require(bool(m.hf_path), "model.hf_path", m.hf_path, "a directory with config.json and weights")
    require(
        m.param_dtype != "int8" or m.lora_rank > 0,
        "model.param_dtype",
        m.param_dtype,
        "float32 or bfloat16 at model.lora_rank = 0",
        "Integers cannot be trained; set model.lora_rank to train adapters beside them.",
    )
    require(
        not m.lora_experts or m.lora_rank > 0,
        "model.lora_experts",
        m.lora_experts,
        "False at model.lora_rank = 0, where experts are trained themselves",
    )
    require(
        not m.adapter_path or m.lora_rank > 0,
        "model.adapter_path",
        m.adapter_path,
        "empty at model.lora_rank = 0",
        "Set model.lora_rank to the adapter's r.",
    )
    require(
        not (m.adapter_path and m.init_from),
        "model.init_from",
        m.init_from,
        "empty beside model.adapter_path",
        "A run starts from one of the two.",
    )
    reward, by_source = c.task.reward, c.task.rewards.to_dict()
    allowed = f'{", ".join(NAMED)} or "package.module:function"'
    require(not reward or _is_reward(reward), "task.reward", reward, f"empty, {allowed}")
    are_rewards = all(map(_is_reward, by_source.values()))
    require(are_rewards, "task.rewards", by_source, f"{{}} or {{data_source: {allowed}}}")
    _check_prompt(c)


def _is_reward(name: object) -> bool:
    return isinstance(name, str) and (name in NAMED or ":" in name)


def check_run(c: ConfigDict) -> None:
    """What a training run needs beside its rooms' own numbers. Raises `ConfigError`."""
    _check_values(c, _CHOICES_OF_RUN, _LEAST_OF_RUN, _POSITIVE_OF_RUN)
    writers = list(c.metrics.writers)
    require(
        len(set(writers)) == len(writers) and set(writers) <= set(METRIC_WRITERS),
        "metrics.writers",
        writers,
        f"a tuple of {', '.join(METRIC_WRITERS)}, each at most once",
    )
    steps = list(c.profile.steps)
    are_steps = len(steps) == 2 and all(type(step) is int for step in steps)
    require(
        not steps or (are_steps and 0 <= steps[0] < steps[1]),
        "profile.steps",
        steps,
        "() or (first, end) with 0 <= first < end",
    )
    require(
        not c.checkpoint.keep_best or c.eval.problems > 0,
        "checkpoint.keep_best",
        c.checkpoint.keep_best,
        "empty at eval.problems = 0",
        "Without evaluations there is no best checkpoint.",
    )
    _check_resume(c)


def _check_tuples(c: ConfigDict) -> None:
    """What stands in the tuples; that they are tuples the configuration itself has seen to."""
    for field, width in _ROWS.items():
        rows = _value(c, field)
        are_rows = all(
            isinstance(row, tuple | list) and len(row) == width and _are_integers(row)
            for row in rows
        )
        one = ", ".join(["4", "8", "256", "16"][:width])
        advice = ""
        if _are_integers(rows) and len(rows) == width:
            advice = f"A tuple of one row has a comma behind it: ({tuple(rows)},)."
        require(are_rows, field, rows, f"rows of {width} integers, such as (({one}),)", advice)
    for field in _INTEGERS:
        require(_are_integers(_value(c, field)), field, _value(c, field), "a tuple of integers")


def _are_integers(values: Iterable[object]) -> bool:
    return all(type(value) is int for value in values)


def _check_values(
    c: ConfigDict,
    choices: dict[str, tuple[str, ...]],
    least: dict[str, int],
    positive: tuple[str, ...],
) -> None:
    for field, allowed in choices.items():
        value = _value(c, field)
        require(value in allowed, field, value, f"one of {', '.join(allowed)}")
    for field, number in least.items():
        value = _value(c, field)
        require(value >= number, field, value, f">= {number}")
    for field in positive:
        value = _value(c, field)
        require(value > 0, field, value, "> 0")


def _value(c: ConfigDict, field: str) -> object:
    section, dot, name = field.partition(".")
    return c[section][name] if dot else c[section]


def _check_prompt(c: ConfigDict) -> None:
    stop = list(c.prompt.stop)
    are_tokens = all(isinstance(token, str) or type(token) is int for token in stop)
    require(are_tokens, "prompt.stop", stop, "a tuple of texts or ids of tokens")
    if c.prompt.template != "plain":
        return
    require(
        not c.prompt.system,
        "prompt.system",
        c.prompt.system,
        'empty at prompt.template = "plain"',
        "Write its words into prompt.search and prompt.aggregation.",
    )
    variables = c.prompt.template_kwargs.to_dict()
    require(
        not variables,
        "prompt.template_kwargs",
        variables,
        '{} at prompt.template = "plain"',
        "There is no chat template to read them.",
    )


def _check_resume(c: ConfigDict) -> None:
    allowed = list(c.resume.allow)
    unknown = [field for field in allowed if not isinstance(field, str) or not _exists(c, field)]
    require(
        not unknown,
        "resume.allow",
        allowed,
        f"a tuple of fields or sections of the config; {unknown} are none",
    )


def _exists(c: ConfigDict, field: str) -> bool:
    section, dot, name = field.partition(".")
    if section not in c or section == "resume":
        return False
    return not dot or (isinstance(c[section], ConfigDict) and name in c[section])
