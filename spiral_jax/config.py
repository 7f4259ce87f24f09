"""The configuration: every field with its unit and origin, and the checks that need no data and no devices.

`defaults()` holds the paper's settings ("paper": arXiv 2606.23595, Table 1 and section 3.2) and ours where it is silent
("ours"). A file in `configs/` starts from it and sets what differs; the result is locked, so a misspelt field is an
error that names the nearest one.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from typing import Any

from absl import app
from ml_collections import ConfigDict

MOST_EVAL_TRACES = 1000  # above, binomials leave float64: see estimators.py
ESTIMATORS = ("marginal_mean", "with_without", "aggregator_only", "grpo")


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, its value, what is allowed and what to do."""


def defaults() -> ConfigDict:
    """Every field, at the paper's value or ours. Locked."""
    c = ConfigDict()
    c.seed = 0  # all randomness of a run: data order, subsets, candidate order, sampling (ours)

    c.model = ConfigDict()
    c.model.hf_path = ""  # directory with config.json, model.safetensors and the tokenizer; "bundled:tiny" is ours
    c.model.param_dtype = "bfloat16"  # of a frozen base; what is trained is always float32 (ours)
    c.model.compute_dtype = "bfloat16"  # of activations and caches; norms, rope and softmax are float32 (ours)
    c.model.lora_rank = 32  # adapters on all seven projections; 0 = full fine-tuning (paper)
    c.model.lora_alpha = 32.0  # adapter output is scaled by alpha / rank (ours; unpublished)
    c.model.remat = True  # recompute each layer in the backward pass instead of keeping its activations (ours)
    c.model.attention_query_block = 256  # queries a block: scores in memory are [.., block, keys] (ours)

    c.mesh = ConfigDict()  # devices along each axis; one of them may be -1 = all the rest (ours)
    c.mesh.data = -1  # groups
    c.mesh.fsdp = 1  # groups, and slices of every weight and optimizer state
    c.mesh.tensor = 1  # heads and feed-forward columns

    c.task = ConfigDict()
    c.task.name = "jsonl"  # "jsonl", "two_halves" or "reasoning_gym" (ours)
    c.task.train_path = ""  # jsonl: file of {"problem" or "question", "answer"}; GSM8K's `#### 42` is understood
    c.task.eval_path = ""  # jsonl: held-out file, same layout
    c.task.generator = ""  # reasoning_gym: generator's name, e.g. "chain_sum"
    c.task.seed = 0  # procedural tasks: which problems; train and held-out never share one (ours)
    c.task.reward = ""  # "" = the task's own; "math" (0/1 on the last \\boxed{}); your "package.module:function" (ours)

    c.prompt = ConfigDict()
    # asks for a search trace; {problem} is the task's text (ours; the paper's wording is unpublished)
    c.prompt.search = "{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."
    # asks for an aggregation trace; {candidates} are those below one after the other, {count} their number (ours)
    c.prompt.aggregation = (
        "{problem}\n\nBelow are {count} independent attempts at this problem. Any number of them may be wrong.\n\n"
        "{candidates}\n\nFirst audit every attempt: name its errors. Then verify which parts can be used. Finally "
        "synthesise one complete and consistent solution, and put its final answer within \\boxed{{}}."
    )
    c.prompt.candidate = "Attempt {index}:\n{candidate}\n\n"  # repeated for each candidate, in shuffled order
    c.prompt.truncated = "keep_tail"  # candidate that hit the limit: "keep_tail", "drop" or "mark" (ours)
    c.prompt.keep_tail_tokens = 4096  # tokens of a truncated candidate that "keep_tail" and "mark" keep (ours)
    c.prompt.thinking = "answer_only"  # "answer_only" drops a candidate's <think> block, "full" keeps it (ours)
    c.prompt.max_problem_tokens = 1024  # longer search prompts are left out and counted (paper)

    c.search = ConfigDict()
    c.search.traces = 8  # N (paper)
    c.search.max_tokens = 4096  # limit of a search trace (paper)

    c.aggregation = ConfigDict()
    c.aggregation.subsets = 4  # K subsets of a problem's N traces (paper)
    c.aggregation.subset_size = 4  # S (paper)
    c.aggregation.traces = 4  # M for each subset (paper)
    c.aggregation.max_tokens = 4096  # limit of an aggregation trace (paper)

    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # (paper); top-p and top-k do not exist in training: their log-probs would be others
    c.sampling.search_groups = 32  # U of a sampler call for search (ours)
    c.sampling.aggregation_groups = 32  # U of a sampler call for aggregation (ours)
    c.sampling.prompt_buckets = (256, 512, 1024, 2048, 4096, 9216, 17920)  # P of the sampler's programs (ours)
    c.sampling.wave = 256  # problems sampled at once while a batch is filled (ours)
    c.sampling.max_ratio = 4.0  # at most this many times batch.problems are tried for one batch (ours)

    c.batch = ConfigDict()
    c.batch.problems = 256  # B kept problems an optimizer step (paper)
    c.batch.search_lengths = ((1024, 4096),)  # (P, G) of the search micro-batches, ascending (ours)
    c.batch.search_groups = 16  # U of a search micro-batch (ours)
    c.batch.aggregation_lengths = ((2048, 4096), (9216, 4096), (17920, 4096))  # the same for aggregation (ours)
    c.batch.aggregation_groups = 16  # U of an aggregation micro-batch (ours)

    c.loss = ConfigDict()
    c.loss.estimator = "marginal_mean"  # one of ESTIMATORS: see objective/advantages.py (paper)
    c.loss.normalizer = "unbiased"  # "unbiased": both terms are gradients of the same J; "sum" (ours; unpublished)
    c.loss.search_weight = 1.0  # w_s (ours; unpublished)
    c.loss.aggregation_weight = 1.0  # w_a (ours; unpublished)
    c.loss.length_gate = 0.0  # positive advantages die above this length: tokens if > 1, else a fraction of the
    # limit; 0 = only on traces that were cut off by the limit (paper; its value is unpublished)
    c.loss.logprob_chunk = 256  # response positions of each trace whose logits exist at once (ours)

    c.optimizer = ConfigDict()
    c.optimizer.lr = 2e-5  # peak learning rate (paper)
    c.optimizer.schedule = "constant"  # after warm-up: "constant", "linear" or "cosine" to zero at train.steps (ours)
    c.optimizer.warmup_steps = 0  # linear from lr / (warmup_steps + 1) (ours)
    c.optimizer.b1 = 0.9  # Adam (ours: the paper's framework's default)
    c.optimizer.b2 = 0.95  # (ours: the same default)
    c.optimizer.eps = 1e-8  # (ours: the same default)
    c.optimizer.weight_decay = 0.0  # decoupled, on matrices only (ours)
    c.optimizer.clip_norm = 0.0  # of the global gradient; 0 = no clipping (ours)

    c.train = ConfigDict()
    c.train.steps = 250  # optimizer steps (paper: about 250)
    c.train.max_sampled_tokens = 0  # stop after the step that reaches this many sampled tokens; 0 = no limit (ours)
    c.train.mismatch_limit = 0.0  # first step: largest |log ratio| a token, sampler against trainer; 0 = off (ours)

    c.eval = ConfigDict()
    c.eval.problems = 512  # held-out problems; 0 = no evaluation (ours)
    c.eval.every = 0  # steps between evaluations beside those at the start and the end; 0 = only those (ours)
    c.eval.subsets = 2  # disjoint subsets of a problem's traces that are aggregated (ours)
    c.eval.subset_size = 0  # S traces in each of them; 0 = aggregation.subset_size, as in training (ours)
    c.eval.traces = 2  # M aggregation traces for each of them (ours)
    # The rest is for `python -m spiral_jax.evaluate` alone; evaluations during training sample search.traces.
    c.eval.n = 64  # search traces of a problem: pass@k and maj@k up to k = n (ours; the paper draws 256)
    c.eval.limits = ()  # tokens, ascending: the search traces once more, cut off here; up to search.max_tokens (ours)
    c.eval.population = 8  # traces in the population of recursive self-aggregation, RSA (paper)
    c.eval.set_size = 4  # of which each member of the next population reads so many (paper)
    c.eval.rounds = 10  # of RSA, after the search traces (paper: up to 10)
    c.eval.wave = 32  # problems sampled at once; a stopped evaluation goes on after the last whole wave (ours)

    c.verifier = ConfigDict()
    c.verifier.workers = 2  # child processes (ours)
    c.verifier.timeout_s = 5.0  # seconds for one answer, counted from when a worker picks it up (ours)
    c.verifier.max_error_rate = 0.05  # share of our own failures in a batch above which the run stops (ours)

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # steps; the last step is always saved; 0 = only that (ours)
    c.checkpoint.keep = 2  # newest checkpoints that are kept (ours)

    c.trace_log = ConfigDict()
    c.trace_log.every = 10  # steps between files of traces; 0 = none (ours)
    c.trace_log.fraction = 1.0  # share of a step's problems that are written (ours)
    c.trace_log.keep_steps = 50  # newest files that are kept (ours)
    return c.lock()


def parse_flags(argv: list[str]) -> list[str]:
    """`flags_parser` of `app.run`: an unknown field in `--config.a.b=c` ends the program with the nearest name."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # what ml_collections raises on its way to the field
        cause = error.args[0]
        message = cause.args[0] if isinstance(cause, Exception) else cause
        sys.exit(f"error: --config has no such field: {' '.join(str(message).split())}")


def uses_aggregation(c: ConfigDict) -> bool:
    """Whether the rollout has an aggregation stage: all estimators but GRPO, the control with search traces alone."""
    return c.loss.estimator != "grpo"


def eval_subset_size(c: ConfigDict) -> int:
    """S of the subsets that evaluation aggregates."""
    return c.eval.subset_size or c.aggregation.subset_size


def for_evaluation(c: ConfigDict) -> ConfigDict:
    """The configuration that `spiral_jax.evaluate` runs with: its own numbers where stages read those of training."""
    c = c.copy_and_resolve_references()
    c.search.traces, c.aggregation.subset_size = c.eval.n, eval_subset_size(c)
    return c


def validate(c: ConfigDict) -> None:
    """Checks everything that training needs and that needs neither data nor devices; raises `ConfigError`."""
    _validate_choices(c)
    _validate_task(c)
    _validate_sets(c)
    _validate_batch(c)


def validate_evaluation(c: ConfigDict) -> None:
    """The same for `spiral_jax.evaluate`, which needs no training data and no batches."""
    _validate_choices(c)
    _require(c.task.name != "jsonl" or bool(c.task.eval_path), "task.eval_path", c.task.eval_path, "a JSONL file")
    e, s = c.eval, eval_subset_size(c)
    for field in ("problems", "subsets", "traces", "n", "population", "set_size", "rounds", "wave"):
        _require(e[field] >= 1, f"eval.{field}", e[field], ">= 1")
    _require(e.n <= MOST_EVAL_TRACES, "eval.n", e.n, f"at most {MOST_EVAL_TRACES}")
    _require(s <= e.n, "eval.subset_size" if e.subset_size else "aggregation.subset_size", s,
             f"at most eval.n = {e.n}")  # fmt: skip
    _require(e.subsets * s <= e.n, "eval.subsets", e.subsets, f"at most eval.n // eval.subset_size = {e.n // s}",
             "The subsets are disjoint: raise eval.n.")  # fmt: skip
    _require(e.population <= e.n, "eval.population", e.population, f"at most eval.n = {e.n}",
             "The first population are search traces.")  # fmt: skip
    _require(e.set_size <= e.population, "eval.set_size", e.set_size, f"at most eval.population = {e.population}")
    limits = list(e.limits)
    in_range = all(isinstance(limit, int) and 1 <= limit <= c.search.max_tokens for limit in limits)
    _require(in_range and limits == sorted(set(limits)), "eval.limits", limits,
             f"ascending whole numbers of tokens between 1 and search.max_tokens = {c.search.max_tokens}",
             "Longer traces need a larger search.max_tokens.")  # fmt: skip


def _require(ok: bool, field: str, value: Any, allowed: str, advice: str = "") -> None:
    if not ok:
        raise ConfigError(f"config.{field} = {value!r}: must be {allowed}." + (f" {advice}" if advice else ""))


def _validate_choices(c: ConfigDict) -> None:
    choices = {
        "model.param_dtype": ("float32", "bfloat16"),
        "model.compute_dtype": ("float32", "bfloat16"),
        "task.name": ("jsonl", "two_halves", "reasoning_gym"),
        "prompt.truncated": ("keep_tail", "drop", "mark"),
        "prompt.thinking": ("answer_only", "full"),
        "loss.estimator": ESTIMATORS,
        "loss.normalizer": ("unbiased", "sum"),
        "optimizer.schedule": ("constant", "linear", "cosine"),
    }
    for field, allowed in choices.items():
        room, name = field.split(".")
        _require(c[room][name] in allowed, field, c[room][name], f"one of {', '.join(allowed)}")
    _require(bool(c.model.hf_path), "model.hf_path", c.model.hf_path, "a directory with config.json and weights")
    minima = {
        "search.traces": 1, "search.max_tokens": 1, "aggregation.max_tokens": 1, "sampling.search_groups": 1,
        "sampling.aggregation_groups": 1, "sampling.wave": 1, "sampling.max_ratio": 1, "batch.problems": 1,
        "batch.search_groups": 1, "batch.aggregation_groups": 1, "loss.logprob_chunk": 1, "train.steps": 1,
        "train.max_sampled_tokens": 0, "eval.problems": 0, "eval.every": 0, "verifier.workers": 1,
        "checkpoint.every": 0, "checkpoint.keep": 1, "model.lora_rank": 0, "model.attention_query_block": 1,
        "trace_log.every": 0, "trace_log.keep_steps": 1, "optimizer.warmup_steps": 0, "prompt.max_problem_tokens": 1,
        "loss.length_gate": 0, "prompt.keep_tail_tokens": 1, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
        "aggregation.subset_size": 1, "eval.subset_size": 0,
    }  # fmt: skip
    for field, least in minima.items():
        room, name = field.split(".")
        _require(c[room][name] >= least, field, c[room][name], f">= {least}")
    _require(c.seed >= 0, "seed", c.seed, ">= 0")
    for field in ("sampling.temperature", "optimizer.lr", "verifier.timeout_s"):
        room, name = field.split(".")
        _require(c[room][name] > 0, field, c[room][name], "> 0")
    if c.task.name == "reasoning_gym":
        _require(bool(c.task.generator), "task.generator", c.task.generator, "the name of a reasoning-gym generator")
    _require(c.task.reward in ("", "math") or ":" in c.task.reward, "task.reward", c.task.reward,
             'empty, "math" or "package.module:function"')  # fmt: skip
    buckets = list(c.sampling.prompt_buckets)
    _require(bool(buckets) and buckets == sorted(set(buckets)), "sampling.prompt_buckets", buckets, "ascending lengths")


def _validate_task(c: ConfigDict) -> None:
    if c.task.name == "jsonl":
        _require(bool(c.task.train_path), "task.train_path", c.task.train_path, "a JSONL file")
        if c.eval.problems:
            _require(bool(c.task.eval_path), "task.eval_path", c.task.eval_path, "a JSONL file",
                     "Set eval.problems = 0 to train without evaluation.")  # fmt: skip


def _validate_sets(c: ConfigDict) -> None:
    n, k, s, m = c.search.traces, c.aggregation.subsets, c.aggregation.subset_size, c.aggregation.traces
    if not uses_aggregation(c):
        _require(n >= 2, "search.traces", n, ">= 2 for grpo", "One trace has no baseline, so no signal.")
        return
    _require(1 <= s <= n, "aggregation.subset_size", s, f"between 1 and search.traces = {n}")
    total = math.comb(n, s)
    _require(k <= total, "aggregation.subsets", k, f"at most C(N={n}, S={s}) = {total}",
             "Subsets are distinct: raise search.traces or lower aggregation.subsets.")  # fmt: skip
    if c.loss.estimator != "aggregator_only":
        _require(k >= 2, "aggregation.subsets", k, ">= 2",
                 "With one subset every set advantage is zero, so search gets no signal.")  # fmt: skip
        _require(s < n, "aggregation.subset_size", s, f"below search.traces = {n}",
                 "A trace that is in every subset has no baseline.")  # fmt: skip
    _require(m >= 2, "aggregation.traces", m, ">= 2",
             "With one trace a subset every aggregation advantage is zero.")  # fmt: skip
    if c.eval.problems:
        size = eval_subset_size(c)
        _require(c.eval.subset_size <= n, "eval.subset_size", c.eval.subset_size, f"at most search.traces = {n}")
        _require(1 <= c.eval.subsets <= n // size, "eval.subsets", c.eval.subsets,
                 f"between 1 and search.traces // aggregation.subset_size = {n // size}")  # fmt: skip
        _require(c.eval.traces >= 1, "eval.traces", c.eval.traces, ">= 1")


def _validate_batch(c: ConfigDict) -> None:
    roles = [("search", c.batch.problems)]
    if uses_aggregation(c):
        roles.append(("aggregation", c.batch.problems * c.aggregation.subsets))
    for role, groups in roles:
        micro = c.batch[f"{role}_groups"]
        _require(
            groups % micro == 0, f"batch.{role}_groups", micro, f"a divisor of the {groups} {role} groups of a step"
        )
        lengths = [tuple(pair) for pair in c.batch[f"{role}_lengths"]]
        ok = bool(lengths) and all(len(pair) == 2 for pair in lengths) and lengths == sorted(lengths)
        _require(ok, f"batch.{role}_lengths", lengths, "ascending (prompt, response) lengths")
        limit = c[role].max_tokens
        _require(lengths[-1][1] >= limit, f"batch.{role}_lengths", lengths,
                 f"wide enough in its last entry for {role}.max_tokens = {limit}")  # fmt: skip
    _require(c.sampling.wave <= c.batch.problems * c.sampling.max_ratio, "sampling.wave", c.sampling.wave,
             f"at most batch.problems * sampling.max_ratio = {c.batch.problems * c.sampling.max_ratio:g}")  # fmt: skip


def digest(c: ConfigDict) -> str:
    """SHA-256 of the configuration's JSON: two runs with the same digest were asked for the same thing."""
    return hashlib.sha256(json.dumps(to_plain(c), sort_keys=True).encode()).hexdigest()


def to_plain(c: ConfigDict) -> dict:
    """The configuration as plain JSON types (tuples become lists)."""
    return json.loads(c.to_json_best_effort())


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `field: old -> new` for every field in which two plain configurations differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
