"""A study's configuration: which arms, which seeds, what is measured and what is claimed, all
stated before the runs.

A study is a file of configs/ whose `get_config` takes a name:

    get_config("")              the study itself: `defaults()` with what differs
    get_config("paragator")     the experiment of that arm, an ordinary configuration of `python -m spiral_jax.train`
    get_config("evaluation")    how every arm is evaluated, an ordinary one of `python -m spiral_jax.evaluate`

so that any run of it can be repeated by hand with --config=configs/study_x.py:paragator. The arm
`base` is the model before any training. For sweeps it has a `propose(trial)` that names further
arms, see `studies/sweep.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import pathlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.evaluation.measures import STRATEGIES
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.run.setup import check_evaluation, check_training

BASE, EVALUATION, OPTIMUM, EFFICIENCY, ENTROPY = (
    "base",
    "evaluation",
    "optimum",
    "efficiency",
    "entropy",
)
SWEEP_SEED = 0  # of the runs of a sweep
_MAY_CHANGE = ("title", "question", "notes", "arms", "cross")
_MEASURE = re.compile(rf"(single|aggregated|{'|'.join(STRATEGIES)}|(pass|maj|rsa)@[1-9][0-9]*)")


def defaults() -> ConfigDict:
    """Every field of a study. Locked."""
    s = ConfigDict()
    s.title = ""  # of the report
    s.question = ""  # what the study is to answer, for the report's reader
    s.notes = ""  # what it does not show, and choices that a reader should know
    # (arm, seeds of its runs) in the report's order; the same seed sees the same problems in order
    s.arms = ()
    # shares that are reported, of held-out problems: "single", "aggregated", "pass@k", "maj@k",
    # "rsa@t" (round t); and where strategies are named, those of `measures.STRATEGIES`
    s.measures = ("aggregated", "single")
    s.baseline = ""  # arm that gaps and scaling efficiency are against
    # V strategies, of which a set needs two: then at most 1 - V * V^-S of all sets of independent
    # traces are mixed (`measures.STRATEGIES`), which with the measured reading of `base` bounds the
    # aggregated accuracy: the "optimum". 0 = no such bound is known
    s.strategies = 0
    # arms of which each one's search traces are read by each other's aggregator, after training
    s.cross = ()
    # each (measure, arm, other, difference): the arm is to be above the other by more than this;
    # other = "": the arm itself is to be above it. Either side may be the "optimum" of
    # "aggregated". ("efficiency", arm, baseline, times): samples for equal coverage, in pass@k.
    # ("entropy", arm, other, difference): nat a token of search traces, over the last tenth of a
    # training's steps
    s.claims = ()
    return s.lock()


@dataclasses.dataclass(frozen=True)
class Study:
    """A study and the experiments that its file describes.

    Attributes:
      file: of configs/.
      s: `defaults()` with what differs.
      experiments: arm -> configuration, without `base`.
      evaluation: configuration of all evaluations.
      module: the file's; its `get_config` knows arms that are not listed too, its `propose` names
      some.
      proposed: arms of a sweep, beside those of the file.
    """

    file: pathlib.Path
    s: ConfigDict
    experiments: dict[str, ConfigDict]
    evaluation: ConfigDict
    module: ModuleType
    proposed: tuple[str, ...] = ()

    @property
    def arms(self) -> dict[str, list[int]]:
        """Arm -> its seeds."""
        return {arm: list(seeds) for arm, seeds in self.s.arms} | {
            arm: [SWEEP_SEED] for arm in self.proposed
        }

    def with_proposed(self, arms: Iterable[str]) -> Study:
        """The study with these arms of a sweep, as far as the file does not list them; checked."""
        added = tuple(arm for arm in dict.fromkeys(arms) if arm not in dict(self.s.arms))
        experiments = self.experiments | {arm: self.module.get_config(arm) for arm in added}
        study = dataclasses.replace(self, proposed=added, experiments=experiments)
        _check(study)
        return study

    @property
    def seeds(self) -> list[int]:
        """Of any arm, in order."""
        return sorted({seed for of_arm in self.arms.values() for seed in of_arm})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of all runs, seed by seed: a study that is stopped early has every arm."""
        return [
            (arm, seed)
            for seed in self.seeds
            for arm, of_arm in self.arms.items()
            if seed in of_arm
        ]

    @property
    def pairs(self) -> list[tuple[tuple[str, str], int]]:
        """((searcher, reader), seed) of all evaluations that pair two arms of `cross`, seed by
        seed.
        """
        pairs = list(itertools.permutations(self.s.cross, 2))
        return sorted(
            [
                (pair, seed)
                for pair in pairs
                for seed in self.arms[pair[0]]
                if seed in self.arms[pair[1]]
            ],
            key=lambda item: item[1],
        )

    def plain(self) -> dict[str, Any]:
        """What the study's directory holds it to, as plain JSON types: what is measured and
        claimed.

        Arms and seeds may be added later; runs and evaluations are held to their configurations one
        by one.
        """
        return {name: value for name, value in to_plain(self.s).items() if name not in _MAY_CHANGE}


def load_study(path: str) -> Study:
    """Reads and checks the study in a file.

    Raises:
      ConfigError: no such file, or a field that cannot be; the message names it.
    """
    file = pathlib.Path(path)
    if ":" in path or not file.is_file():
        raise ConfigError(
            f"--config={path}: must be a file of configs/, without a name of an arm behind it."
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    s = module.get_config("")
    if not isinstance(s, ConfigDict) or set(s) != set(defaults()):
        raise ConfigError(
            f"--config={path}: get_config('') must return plan.defaults() with what differs."
        )
    experiments = {arm: module.get_config(arm) for arm, _ in s.arms if arm != BASE}
    study = Study(file, s, experiments, module.get_config(EVALUATION), module)
    _check(study)
    return study


def _check(study: Study) -> None:
    s, arms = study.s, study.arms
    for arm, seeds in arms.items():
        ok = (
            bool(seeds)
            and all(type(seed) is int and seed >= 0 for seed in seeds)
            and len(set(seeds)) == len(seeds)
        )
        if not ok or arm in (EVALUATION, OPTIMUM, "") or "+" in arm:
            raise ConfigError(
                f'arms.{arm} = {seeds!r}: must be different seeds >= 0, and the arm no reserved name and without "+".'
            )
    if len(arms) != len(s.arms) + len(study.proposed) or s.baseline not in arms:
        raise ConfigError(
            f"baseline = {s.baseline!r}: must be one of the arms {[arm for arm, _ in s.arms]}, each once."
        )
    for measure in s.measures:
        _check_measure(study, measure)
    if not set(s.cross) <= set(arms) or len(set(s.cross)) != len(s.cross):
        raise ConfigError(
            f"cross = {tuple(s.cross)!r}: must be of the arms {', '.join(arms)}, each at most once."
        )
    if s.strategies < 0 or s.strategies == 1 or (s.strategies and BASE not in arms):
        raise ConfigError(
            f"strategies = {s.strategies!r}: must be 0 or at least 2, and 0 without the arm {BASE}."
        )
    for claim in s.claims:
        _check_claim(study, claim)
    for name, c in study.experiments.items():
        try:
            check_training(c)
        except ConfigError as error:
            raise ConfigError(f"{study.file}, arm {name}: {error}") from error
    try:
        check_evaluation(study.evaluation)
    except ConfigError as error:
        raise ConfigError(f"{study.file}, evaluation: {error}") from error


def _check_claim(study: Study, claim: tuple) -> None:
    measure, arm, other, _ = claim
    s = study.s
    sides = [*study.arms, *([OPTIMUM] if s.strategies and measure == "aggregated" else [])]
    known = measure in s.measures or (measure == EFFICIENCY and other == s.baseline)
    if measure == ENTROPY:
        known, sides = bool(other), list(study.experiments)
    if not known or arm not in sides or other not in [*sides, ""]:
        raise ConfigError(
            f"claims: {claim!r} must be (measure, arm, other, difference) of the measures {', '.join(s.measures)} "
            f'and of {", ".join(sides)}, or "" as the other, or ({EFFICIENCY!r}, arm, {s.baseline!r}, times), or '
            f"({ENTROPY!r}, arm, other, nat) of two that are trained."
        )


def _check_measure(study: Study, measure: str) -> None:
    match = _MEASURE.fullmatch(measure)
    kind, _, number = measure.partition("@")
    e = study.evaluation.eval
    if not match or number and int(number) > (e.rounds if kind == "rsa" else e.n):
        raise ConfigError(
            f"measures: {measure!r} must be single, aggregated, {', '.join(STRATEGIES)}, pass@k or maj@k with k up to "
            f"eval.n = {e.n}, or rsa@t with t up to eval.rounds = {e.rounds}."
        )


def arm_row(c: ConfigDict) -> dict[str, Any]:
    """What an arm may spend: its traces, sets and limits, and its ceiling of output tokens a
    problem.
    """
    row = {"estimator": c.loss.estimator, "N": c.search.traces, "L search": c.search.max_tokens}
    rollouts, ceiling = c.search.traces, c.search.traces * c.search.max_tokens
    if ESTIMATORS[c.loss.estimator].aggregates:
        a = c.aggregation
        row |= {
            "S": a.subset_size,
            "K": a.subsets,
            "M": a.traces,
            "R": a.rounds,
            "L aggregation": a.max_tokens,
        }
        aggregations = a.subsets * a.traces * a.rounds
        rollouts += aggregations
        ceiling += aggregations * a.max_tokens
    stop = {
        "problems a step": c.batch.problems,
        "steps": c.train.steps,
        "token budget": c.train.max_sampled_tokens,
    }
    return row | {"rollouts": rollouts, "ceiling": ceiling} | stop | {"lr": c.optimizer.lr}
