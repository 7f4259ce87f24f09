"""Checks of the configuration that need no data and no devices; a `ConfigError` names field, value
and what to do.
"""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.config import (
    ESTIMATORS,
    LATER_ROUNDS,
    MEASURES,
    METRIC_WRITERS,
    MOST_EVAL_TRACES,
    MOST_SCORED_SETS,
    REMAT,
    TASKS,
    ConfigError,
    eval_subset_size,
    groups_of_step,
    uses_aggregation,
)


def validate(c: ConfigDict) -> None:
    """Checks everything that training needs and that needs neither data nor devices; raises
    `ConfigError`.
    """
    _validate_choices(c)
    _validate_task(c, training=True)
    _validate_sets(c)
    _validate_batch(c)
    _validate_sampling(c)
    _validate_reliability(c)
    _validate_loss(c)
    steps = list(c.profile.steps)
    ok = not steps or (
        len(steps) == 2 and all(type(n) is int for n in steps) and 0 <= steps[0] < steps[1]
    )
    _require(ok, "profile.steps", steps, "() or (first, end) with 0 <= first < end")


def validate_evaluation(c: ConfigDict) -> None:
    """The same for `spiral_jax.evaluate`, which needs no training data and no batches."""
    _validate_choices(c)
    _validate_sampling(c)
    _require(not c.model.init_from or "@" in c.model.init_from, "model.init_from", c.model.init_from,
             "WORKDIR@step in evaluations", "The newest one may change while an evaluation is stopped.")  # fmt: skip
    _require(c.eval.searcher in ("", "base") or "@" in c.eval.searcher, "eval.searcher", c.eval.searcher,
             '"", "base" or WORKDIR@step')  # fmt: skip
    _validate_task(c, training=False)
    e, s = c.eval, eval_subset_size(c)
    for field in ("problems", "subsets", "traces", "n", "rounds", "wave"):
        _require(e[field] >= 1, f"eval.{field}", e[field], ">= 1")
    _require(e.n <= MOST_EVAL_TRACES, "eval.n", e.n, f"at most {MOST_EVAL_TRACES}")
    _require(s <= e.n, "eval.subset_size" if e.subset_size else "aggregation.subset_size", s,
             f"at most eval.n = {e.n}")  # fmt: skip
    _require(e.subsets * s <= e.n, "eval.subsets", e.subsets, f"at most eval.n // eval.subset_size = {e.n // s}",
             "The subsets are disjoint: raise eval.n.")  # fmt: skip
    _validate_populations(c, e.n, "eval.n")
    limits = list(e.limits)
    in_range = all(isinstance(limit, int) and 1 <= limit <= c.search.max_tokens for limit in limits)
    _require(in_range and limits == sorted(set(limits)), "eval.limits", limits,
             f"ascending whole numbers of tokens between 1 and search.max_tokens = {c.search.max_tokens}",
             "Longer traces need a larger search.max_tokens.")  # fmt: skip


def _validate_populations(c: ConfigDict, n: int, field: str) -> None:
    """RSA's sizes where `n` search traces are sampled, as `field` says."""
    population, set_size = c.eval.population, c.eval.set_size
    for name in ("population", "set_size"):
        _require(c.eval[name] >= 1, f"eval.{name}", c.eval[name], ">= 1")
    _require(population <= n, "eval.population", population, f"at most {field} = {n}",
             "The first population are search traces.")  # fmt: skip
    _require(
        set_size <= population, "eval.set_size", set_size, f"at most eval.population = {population}"
    )


def _require(ok: bool, field: str, value: Any, allowed: str, advice: str = "") -> None:
    if not ok:
        raise ConfigError(
            f"config.{field} = {value!r}: must be {allowed}." + (f" {advice}" if advice else "")
        )


def _validate_choices(c: ConfigDict) -> None:
    choices = {
        "model.param_dtype": ("float32", "bfloat16"),
        "model.compute_dtype": ("float32", "bfloat16"),
        "model.remat": REMAT,
        "task.name": TASKS,
        "aggregation.order": ("shuffled", "sampled"),
        "sampling.cache_dtype": ("compute", "int8"),
        "prompt.template": ("chat", "plain"),
        "prompt.truncated": ("keep_tail", "drop", "mark"),
        "prompt.thinking": ("answer_only", "full"),
        "loss.estimator": ESTIMATORS,
        "loss.normalizer": ("unbiased", "sum"),
        "optimizer.schedule": ("constant", "linear", "cosine"),
        "checkpoint.keep_best": ("", *MEASURES),
    }
    for field, allowed in choices.items():
        room, name = field.split(".")
        _require(c[room][name] in allowed, field, c[room][name], f"one of {', '.join(allowed)}")
    _validate_prompt(c)
    writers = list(c.metrics.writers)
    _require(len(set(writers)) == len(writers) and set(writers) <= set(METRIC_WRITERS), "metrics.writers", writers,
             f"a tuple of {', '.join(METRIC_WRITERS)}, each at most once")  # fmt: skip
    _require(
        bool(c.model.hf_path),
        "model.hf_path",
        c.model.hf_path,
        "a directory with config.json and weights",
    )
    _require(not c.model.adapter_path or c.model.lora_rank > 0, "model.adapter_path", c.model.adapter_path,
             "empty at model.lora_rank = 0", "Set model.lora_rank to the adapter's r.")  # fmt: skip
    _require(not (c.model.adapter_path and c.model.init_from), "model.init_from", c.model.init_from,
             "empty beside model.adapter_path", "A run starts from one of the two.")  # fmt: skip
    minima = {
        "search.traces": 1, "search.max_tokens": 1, "aggregation.max_tokens": 1,
        "sampling.chunk": 1, "sampling.exit_groups": 1, "sampling.prefill_tokens": 1, "sampling.prefill_chunk": 1,
        "sampling.verdict_delay": 0, "sampling.max_ratio": 1, "batch.problems": 1,
        "eval.temperature": 0, "eval.top_k": 0, "eval.min_p": 0,
        "batch.search_groups": 1, "batch.aggregation_groups": 1, "loss.logprob_chunk": 1, "train.steps": 1,
        "train.max_sampled_tokens": 0, "eval.problems": 0, "eval.every": 0, "eval.rounds_in_training": 0,
        "verifier.workers": 1,
        "checkpoint.every": 0, "checkpoint.keep": 1, "checkpoint.keep_every": 0, "checkpoint.max_failures": 1,
        "train.max_bad_steps": 1, "train.spike": 0, "train.watchdog": 0, "model.lora_rank": 0,
        "model.attention_block": 1,
        "trace_log.every": 0, "trace_log.keep_steps": 1, "optimizer.warmup_steps": 0, "prompt.max_problem_tokens": 1,
        "loss.length_gate": 0, "prompt.keep_tail_tokens": 1, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
        "aggregation.subset_size": 1, "aggregation.rounds": 1, "eval.subset_size": 0,
        "loss.clip_low": 0, "loss.clip_high": 0, "loss.dual_clip": 0, "loss.tis_cap": 0, "loss.kl_coef": 0,
    }  # fmt: skip
    for field, least in minima.items():
        room, name = field.split(".")
        _require(c[room][name] >= least, field, c[room][name], f">= {least}")
    _require(c.seed >= 0, "seed", c.seed, ">= 0")
    for field in ("sampling.temperature", "sampling.keep_rate", "optimizer.lr", "verifier.timeout_s", "train.wait_s",
                  "train.grace_s", "verifier.memory_gb"):  # fmt: skip
        room, name = field.split(".")
        _require(c[room][name] > 0, field, c[room][name], "> 0")
    if c.task.name == "reasoning_gym":
        _require(
            bool(c.task.generator),
            "task.generator",
            c.task.generator,
            "the name of a reasoning-gym generator",
        )
    _require(c.task.reward in ("", "math") or ":" in c.task.reward, "task.reward", c.task.reward,
             'empty, "math" or "package.module:function"')  # fmt: skip


def _validate_reliability(c: ConfigDict) -> None:
    names = list(c.verifier.environment)
    _require(all(isinstance(name, str) and name for name in names), "verifier.environment", names,
             "a tuple of names of variables")  # fmt: skip
    rooms = {
        room: set(fields) if isinstance(fields, ConfigDict) else set() for room, fields in c.items()
    }
    allowed = list(c.resume.allow)
    unknown = [
        field for field in allowed if not isinstance(field, str) or not _is_field(rooms, field)
    ]
    _require(
        not unknown,
        "resume.allow",
        allowed,
        f"a tuple of fields or rooms of the config; {unknown} are none",
    )
    _require(not c.checkpoint.keep_best or c.eval.problems > 0, "checkpoint.keep_best", c.checkpoint.keep_best,
             'empty at eval.problems = 0', "Without evaluations there is no best checkpoint.")  # fmt: skip


def _is_field(rooms: dict[str, set[str]], field: str) -> bool:
    room, dot, name = field.partition(".")
    return room in rooms and room != "resume" and (not dot or name in rooms[room])


def _validate_prompt(c: ConfigDict) -> None:
    stop = list(c.prompt.stop)
    _require(all(isinstance(token, str) or type(token) is int for token in stop), "prompt.stop", stop,
             "a tuple of texts or ids of tokens")  # fmt: skip
    if c.prompt.template == "plain":
        _require(not c.prompt.system, "prompt.system", c.prompt.system, 'empty at prompt.template = "plain"',
                 "Write its words into prompt.search and prompt.aggregation.")  # fmt: skip
        given = c.prompt.template_kwargs.to_dict()
        _require(not given, "prompt.template_kwargs", given, '{} at prompt.template = "plain"',
                 "There is no chat template to read them.")  # fmt: skip


def _validate_task(c: ConfigDict, training: bool) -> None:
    """What the task reads is named: the training split for training, the held-out one where it is
    evaluated.
    """
    if c.task.name == "hf":
        for field in ("dataset", "problem_column", "answer_column"):
            _require(bool(c.task[field]), f"task.{field}", c.task[field], "a name")
        fields, allowed = ("split_train", "split_eval"), "a split of the data set"
    elif c.task.name in ("jsonl", "parquet"):
        fields, allowed = ("train_path", "eval_path"), f"a {c.task.name} file"
    else:
        return
    _require(
        not training or bool(c.task[fields[0]]), f"task.{fields[0]}", c.task[fields[0]], allowed
    )
    _require(not c.eval.problems or bool(c.task[fields[1]]), f"task.{fields[1]}", c.task[fields[1]], allowed,
             "Set eval.problems = 0 to train without evaluation." if training else "")  # fmt: skip


def _validate_sets(c: ConfigDict) -> None:
    n, k, s, m = (
        c.search.traces,
        c.aggregation.subsets,
        c.aggregation.subset_size,
        c.aggregation.traces,
    )
    if not uses_aggregation(c):
        _require(n >= 2, "search.traces", n, f">= 2 for {c.loss.estimator}",
                 "One trace has no baseline, so no signal.")  # fmt: skip
        return
    _require(1 <= s <= n, "aggregation.subset_size", s, f"between 1 and search.traces = {n}")
    _validate_search_signal(c, n, k, s)
    _require(m >= 2, "aggregation.traces", m, ">= 2",
             "With one trace a subset every aggregation advantage is zero.")  # fmt: skip
    if c.aggregation.rounds > 1:
        _validate_later_rounds(c, k * m, k, s)
    if c.eval.problems:
        size = eval_subset_size(c)
        _require(
            c.eval.subset_size <= n,
            "eval.subset_size",
            c.eval.subset_size,
            f"at most search.traces = {n}",
        )
        _require(1 <= c.eval.subsets <= n // size, "eval.subsets", c.eval.subsets,
                 f"between 1 and search.traces // aggregation.subset_size = {n // size}")  # fmt: skip
        _require(c.eval.traces >= 1, "eval.traces", c.eval.traces, ">= 1")
        if c.eval.rounds_in_training:
            _validate_populations(c, n, "search.traces")


def _validate_later_rounds(c: ConfigDict, n: int, k: int, s: int) -> None:
    """The sets of rounds that read the n traces of the round before."""
    _require(c.loss.estimator in LATER_ROUNDS, "aggregation.rounds", c.aggregation.rounds,
             f"1 for {c.loss.estimator}", f"More are defined for {', '.join(LATER_ROUNDS)}.")  # fmt: skip
    total = math.comb(n, s)
    _require(k <= total and s < n, "aggregation.rounds", c.aggregation.rounds, f"1 at {n} traces a round",
             f"A later round needs {k} distinct sets of {s} of them, with some trace outside.")  # fmt: skip


def _validate_search_signal(c: ConfigDict, n: int, k: int, s: int) -> None:
    """The sets that an estimator needs to tell search traces apart."""
    estimator, total = c.loss.estimator, math.comb(n, s)
    if ESTIMATORS[estimator] == "partition":
        _require(1 <= k <= n // s, "aggregation.subsets", k, f"between 1 and search.traces // subset_size = {n // s}",
                 f"The subsets of {estimator} are disjoint.")  # fmt: skip
    else:
        _require(1 <= k <= total, "aggregation.subsets", k, f"between 1 and C(N={n}, S={s}) = {total}",
                 "Subsets are distinct: raise search.traces or lower aggregation.subsets.")  # fmt: skip
    if estimator in ("marginal_mean", "with_without", "disjoint_sets"):
        _require(k >= 2, "aggregation.subsets", k, ">= 2",
                 "With one subset every set advantage is zero, so search gets no signal.")  # fmt: skip
    if estimator in ("marginal_mean", "with_without", "disjoint_sets", "paragator", "polychromic"):
        _require(s < n, "aggregation.subset_size", s, f"below search.traces = {n}",
                 "A trace that is in every subset has no baseline.")  # fmt: skip
    if estimator in ("pkpo", "polychromic"):
        _require(s >= 2, "aggregation.subset_size", s, f">= 2 for {estimator}",
                 "Of single traces it has no baseline, or no diversity.")  # fmt: skip
    if estimator == "polychromic":
        _require(total <= MOST_SCORED_SETS, "aggregation.subset_size", s,
                 f"such that C(N={n}, S) = {total} is at most {MOST_SCORED_SETS}", "All sets are scored.")  # fmt: skip
    if estimator == "online_multitask":
        _require(n >= 2, "search.traces", n, ">= 2", "One trace has no baseline.")


def _validate_loss(c: ConfigDict) -> None:
    clip = c.loss.clip_low or c.loss.clip_high or c.loss.dual_clip
    _require(c.loss.clip_low < 1, "loss.clip_low", c.loss.clip_low, "below 1")
    _require(
        c.loss.dual_clip == 0 or c.loss.dual_clip > 1,
        "loss.dual_clip",
        c.loss.dual_clip,
        "0 = off, or above 1",
    )
    _require(not (c.loss.tis_cap and clip), "loss.tis_cap", c.loss.tis_cap, "0 where the ratio is clipped",
             "Both bound the same ratio: a batch makes one update.")  # fmt: skip


def _validate_batch(c: ConfigDict) -> None:
    for role, groups in groups_of_step(c).items():
        micro = c.batch[f"{role}_groups"]
        _require(
            groups % micro == 0,
            f"batch.{role}_groups",
            micro,
            f"a divisor of the {groups} {role} groups of a step",
        )
        lengths = [tuple(pair) for pair in c.batch[f"{role}_lengths"]]
        ok = (
            bool(lengths) and all(len(pair) == 2 for pair in lengths) and lengths == sorted(lengths)
        )
        _require(ok, f"batch.{role}_lengths", lengths, "ascending (prompt, response) lengths")
        limit = c[role].max_tokens
        _require(lengths[-1][1] >= limit, f"batch.{role}_lengths", lengths,
                 f"wide enough in its last entry for {role}.max_tokens = {limit}")  # fmt: skip


def _validate_sampling(c: ConfigDict) -> None:
    rows = [tuple(row) for row in c.sampling.classes]
    ok = bool(rows) and all(
        len(row) == 4 and all(type(n) is int and n >= 1 for n in row) for row in rows
    )
    _require(ok and len(set(rows)) == len(rows), "sampling.classes", rows,
             "different rows (slots, C, P, G) of whole numbers >= 1")  # fmt: skip
    for prompt in sorted({P for _, _, P, _ in rows}):
        of_prompt = [(C, G) for _, C, P, G in rows if prompt == P]
        widest, longest = max(C for C, _ in of_prompt), max(G for _, G in of_prompt)
        _require((widest, longest) in of_prompt, "sampling.classes", rows,
                 f"with a class of C = {widest} and G = {longest} for P = {prompt}",
                 "Else a group that stays wide has nowhere to go on.")  # fmt: skip
    counts = list(c.sampling.row_counts)
    ok = all(type(count) is int and count >= 1 for count in counts) and counts == sorted(
        set(counts)
    )
    _require(ok, "sampling.row_counts", counts, "ascending whole numbers >= 1")
    _require(0 < c.eval.top_p <= 1, "eval.top_p", c.eval.top_p, "above 0 and at most 1")
    _require(c.eval.min_p < 1, "eval.min_p", c.eval.min_p, "below 1")
