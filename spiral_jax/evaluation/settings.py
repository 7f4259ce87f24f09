"""What an evaluation samples and states, read from the configuration at its two doors.

`for_command` is for `python -m spiral_jax.evaluate`, `for_training` for the evaluations of a
training run, which sample as many search traces as training does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.config import digest_of, require, to_plain
from spiral_jax.evaluation.statistics import MOST_TRACES
from spiral_jax.objective.estimators import ESTIMATORS


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The numbers of an evaluation, and what its results say of themselves.

    Attributes:
      problems: held-out problems, the first ones.
      max_problem_tokens: a problem with a longer search prompt is left out and counted.
      wave: problems that the command samples at once.
      n: N, search traces of a problem.
      aggregates: whether traces are aggregated at all; GRPO and its relatives do not in training.
      subsets: K, disjoint subsets of a problem's search traces that are aggregated.
      subset_size: S.
      traces: M, aggregation traces of each subset.
      population: traces of a population of recursive self-aggregation (RSA).
      set_size: how many of them each member of the next population reads.
      rounds: T, rounds of RSA; 0 = none.
      limits: ascending; the search traces are judged once more, cut off at each.
      search_max_tokens: limit of a search trace.
      aggregation_max_tokens: limit of an aggregation trace.
      search_temperature, aggregation_temperature, top_k, top_p, min_p: how tokens are drawn.
      seed: of subsets, orders, tokens and bootstrap resamples.
      hf_path, adapter_path, init_from: the model, as config.model names it.
      searcher: whose search traces are aggregated; "" = the model's own.
      task, reward: their names in config.task.
      scaffold: wording of the prompts, and what they keep of candidates.
      config_digest: of the configuration with these numbers in it.
    """

    problems: int
    max_problem_tokens: int
    wave: int
    n: int
    aggregates: bool
    subsets: int
    subset_size: int
    traces: int
    population: int
    set_size: int
    rounds: int
    limits: tuple[int, ...]
    search_max_tokens: int
    aggregation_max_tokens: int
    search_temperature: float
    aggregation_temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    hf_path: str
    adapter_path: str
    init_from: str
    searcher: str
    task: str
    reward: str
    scaffold: Mapping[str, Any]
    config_digest: str


def for_command(c: ConfigDict) -> EvaluationSettings:
    """What `python -m spiral_jax.evaluate` samples: the numbers of config.eval.

    Raises:
      ConfigError: a number that cannot be.
    """
    settings = _read(c, c.eval.n, c.eval.rounds, tuple(c.eval.limits), aggregates=True)
    _check_for_command(settings, _subset_field(c))
    return settings


def for_training(c: ConfigDict) -> EvaluationSettings:
    """What the evaluations of a training run sample: search.traces traces of each problem.

    Raises:
      ConfigError: a number that cannot be.
    """
    rounds = c.eval.rounds_in_training
    settings = _read(
        c, c.search.traces, rounds, limits=(), aggregates=ESTIMATORS[c.loss.estimator].aggregates
    )
    if settings.problems and settings.aggregates:
        _check_for_training(settings, _subset_field(c))
    return settings


def _subset_field(c: ConfigDict) -> str:
    """The field that S is read from."""
    return "eval.subset_size" if c.eval.subset_size else "aggregation.subset_size"


def _read(
    c: ConfigDict, n: int, rounds: int, limits: tuple[int, ...], aggregates: bool
) -> EvaluationSettings:
    subset_size = c.eval.subset_size or c.aggregation.subset_size
    plain = to_plain(c)
    scaffold = dict(plain["prompt"])
    del scaffold["max_problem_tokens"]  # says what is left out, not how the rest is asked

    plain["eval"] |= {"n": n, "rounds": rounds, "limits": limits}
    plain["aggregation"]["subset_size"] = subset_size
    return EvaluationSettings(
        problems=c.eval.problems,
        max_problem_tokens=c.prompt.max_problem_tokens,
        wave=c.eval.wave,
        n=n,
        aggregates=aggregates,
        subsets=c.eval.subsets,
        subset_size=subset_size,
        traces=c.eval.traces,
        population=c.eval.population,
        set_size=c.eval.set_size,
        rounds=rounds,
        limits=limits,
        search_max_tokens=c.search.max_tokens,
        aggregation_max_tokens=c.aggregation.max_tokens,
        search_temperature=c.eval.search_temperature,
        aggregation_temperature=c.eval.aggregation_temperature,
        top_k=c.eval.top_k,
        top_p=c.eval.top_p,
        min_p=c.eval.min_p,
        seed=c.seed,
        hf_path=c.model.hf_path,
        adapter_path=c.model.adapter_path,
        init_from=c.model.init_from,
        searcher=c.eval.searcher,
        task=c.task.name,
        reward=_reward_names(c.task),
        scaffold=scaffold,
        config_digest=digest_of(plain),
    )


def _reward_names(task: ConfigDict) -> str:
    by_source = sorted(task.rewards.to_dict().items())
    return ", ".join([*filter(None, [task.reward]), *(f"{key}: {name}" for key, name in by_source)])


def _check_for_command(s: EvaluationSettings, subset_field: str) -> None:
    """Checks what the command needs; errors call S `subset_field`."""
    require(
        not s.init_from or "@" in s.init_from,
        "model.init_from",
        s.init_from,
        "WORKDIR@step in evaluations",
        "The newest one may change while an evaluation is stopped.",
    )
    require(
        s.searcher in ("", "base") or "@" in s.searcher,
        "eval.searcher",
        s.searcher,
        '"", "base" or WORKDIR@step',
    )

    require(s.subset_size >= 1, subset_field, s.subset_size, ">= 1")
    for name in ("problems", "subsets", "traces", "n", "rounds", "wave"):
        require(getattr(s, name) >= 1, f"eval.{name}", getattr(s, name), ">= 1")
    require(s.n <= MOST_TRACES, "eval.n", s.n, f"at most {MOST_TRACES}")
    require(s.subset_size <= s.n, subset_field, s.subset_size, f"at most eval.n = {s.n}")
    require(
        s.subsets * s.subset_size <= s.n,
        "eval.subsets",
        s.subsets,
        f"at most eval.n // eval.subset_size = {s.n // s.subset_size}",
        "The subsets are disjoint: raise eval.n.",
    )
    _check_populations(s, "eval.n")

    most = s.search_max_tokens
    are_limits = all(isinstance(limit, int) and 1 <= limit <= most for limit in s.limits)
    require(
        are_limits and list(s.limits) == sorted(set(s.limits)),
        "eval.limits",
        list(s.limits),
        f"ascending whole numbers of tokens between 1 and search.max_tokens = {most}",
        "Longer traces need a larger search.max_tokens.",
    )


def _check_for_training(s: EvaluationSettings, subset_field: str) -> None:
    """Checks what evaluations need in a training run that aggregates."""
    allowed = f"between 1 and search.traces = {s.n}"
    require(1 <= s.subset_size <= s.n, subset_field, s.subset_size, allowed)
    most = s.n // s.subset_size
    require(
        1 <= s.subsets <= most,
        "eval.subsets",
        s.subsets,
        f"between 1 and search.traces // eval.subset_size = {most}",
    )
    require(s.traces >= 1, "eval.traces", s.traces, ">= 1")
    if s.rounds:
        _check_populations(s, "search.traces")


def _check_populations(s: EvaluationSettings, traces_field: str) -> None:
    """Checks the sizes of RSA; errors call N `traces_field`."""
    require(s.population >= 1, "eval.population", s.population, ">= 1")
    require(s.set_size >= 1, "eval.set_size", s.set_size, ">= 1")
    require(
        s.population <= s.n,
        "eval.population",
        s.population,
        f"at most {traces_field} = {s.n}",
        "The first population are search traces.",
    )
    require(
        s.set_size <= s.population,
        "eval.set_size",
        s.set_size,
        f"at most eval.population = {s.population}",
    )
