"""What a study runs, measures and claims, all stated before the runs.

A study is a file of configs/ whose `get_config` takes a name:

    get_config("")              the study itself: `defaults()` with what differs
    get_config("paragator")     that arm: a configuration of `python -m spiral_jax.train`
    get_config("evaluation")    how all arms are evaluated: one of `python -m spiral_jax.evaluate`

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
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.command import file_message
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.evaluation.measures import STRATEGIES
from spiral_jax.evaluation.settings import EvaluationSettings, for_command
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.run.setup import check_evaluation, check_training

# names that are no arms of a file: the untrained model, and sides and kinds of claims
BASE = "base"
EVALUATION = "evaluation"
OPTIMUM = "optimum"
EFFICIENCY = "efficiency"
ENTROPY = "entropy"

SWEEP_SEED = 0  # of the runs of a sweep
_MEASURE = re.compile(
    rf"(single|aggregated|reward|reward_single|{'|'.join(STRATEGIES)}"
    r"|(pass|maj|rsa|reward_rsa)@[1-9][0-9]*)"
)


def defaults() -> ConfigDict:
    """Every field of a study. Locked."""
    s = ConfigDict()
    s.title = ""  # of the report
    s.question = ""  # what the study is to answer, for the report's reader
    s.notes = ""  # what it does not show, and choices that a reader should know
    # (arm, seeds of its runs) in the report's order; the same seed sees the same problems in order
    s.arms = ()
    # shares that are reported, of held-out problems: "single", "aggregated", "pass@k", "maj@k",
    # "rsa@t" (round t); where strategies are named, those of `measures.STRATEGIES`; and where
    # answers earn partial credit, mean rewards: "reward" (aggregated), "reward_single",
    # "reward_rsa@t"
    s.measures = ("aggregated", "single")
    s.baseline = ""  # arm that gaps and scaling efficiency are against
    # V strategies, of which a set needs two: then at most 1 - V * V^-S of all sets of independent
    # traces are mixed (`measures.STRATEGIES`), which with the measured reading of `base` bounds the
    # aggregated accuracy: the "optimum". 0 = no such bound is known
    s.strategies = 0
    # arms of which each one's search traces are read by each other's aggregator, after training
    s.cross = ()
    # read every run once more where all had spent the same operations, see `studies/operations.py`;
    # for that its arms keep checkpoints on the way (config.checkpoint.every and keep_every)
    s.equal_operations = False
    # each (measure, arm, other, difference): the arm is to be above the other by more than this;
    # other = "": the arm itself is to be above it. Either side may be the "optimum" of
    # "aggregated". ("efficiency", arm, baseline, times): samples for equal coverage, in pass@k.
    # ("entropy", arm, other, difference): nat a token of search traces, over the last tenth of a
    # training's steps
    s.claims = ()
    return s.lock()


class Claim(NamedTuple):
    """What is claimed of an arm; see `defaults`."""

    measure: str
    arm: str
    other: str
    difference: float


class Pair(NamedTuple):
    """An evaluation in which one arm aggregates what another has searched."""

    searcher: str
    reader: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The training of one arm.

    Attributes:
      plain: its configuration, as plain JSON types.
      aggregates: whether it has aggregation traces.
    """

    plain: dict[str, Any]
    aggregates: bool

    def has_ended(self, steps: Sequence[Mapping[str, Any]]) -> bool:
        """Whether nothing is left to train after these, rows of metrics."""
        return self.share_done(steps) >= 1

    def share_done(self, steps: Sequence[Mapping[str, Any]]) -> float:
        """How much is done of its steps or of its tokens, whichever is more; 1: all."""
        train = self.plain["train"]
        sampled_tokens = sum(row["sampling/generated_tokens"] for row in steps)
        of_tokens = sampled_tokens / (train["max_sampled_tokens"] or np.inf)
        return max(len(steps) / train["steps"], of_tokens)

    def budget(self) -> dict[str, Any]:
        """What it may spend: traces, sets, limits, and its ceiling of output tokens a problem."""
        search, aggregation = self.plain["search"], self.plain["aggregation"]
        row = {
            "estimator": self.plain["loss"]["estimator"],
            "N": search["traces"],
            "L search": search["max_tokens"],
        }
        rollouts, ceiling = search["traces"], search["traces"] * search["max_tokens"]
        if self.aggregates:
            row |= {
                "S": aggregation["subset_size"],
                "K": aggregation["subsets"],
                "M": aggregation["traces"],
                "R": aggregation["rounds"],
                "L aggregation": aggregation["max_tokens"],
            }
            aggregations = row["K"] * row["M"] * row["R"]
            rollouts += aggregations
            ceiling += aggregations * row["L aggregation"]
            if self.plain["replay"]["problems"]:
                row["populations a step"] = self.plain["replay"]["problems"]
        return row | {
            "rollouts": rollouts,
            "ceiling": ceiling,
            "problems a step": self.plain["batch"]["problems"],
            "steps": self.plain["train"]["steps"],
            "token budget": self.plain["train"]["max_sampled_tokens"],
            "lr": self.plain["optimizer"]["lr"],
        }


@dataclasses.dataclass(frozen=True)
class Study:
    """A study and the experiments that its file describes.

    Attributes:
      file: of configs/.
      title, question, notes, measures, baseline, strategies, cross, equal_operations: see
        `defaults`.
      evaluation: how every arm is evaluated.
      listed: (arm, seeds) of the file.
      proposed: arms of a sweep, beside those of the file.
      experiments: by arm, without `base`.
      module: the file's; its `get_config` knows arms that are not listed too, its `propose` names
        some.
    """

    file: pathlib.Path
    title: str
    question: str
    notes: str
    listed: tuple[tuple[str, tuple[int, ...]], ...]
    measures: tuple[str, ...]
    baseline: str
    strategies: int
    cross: tuple[str, ...]
    equal_operations: bool
    claims: tuple[Claim, ...]
    evaluation: EvaluationSettings
    module: ModuleType
    experiments: dict[str, Experiment] = dataclasses.field(default_factory=dict)
    proposed: tuple[str, ...] = ()

    @property
    def arms(self) -> dict[str, list[int]]:
        """Arm -> its seeds."""
        arms = {arm: list(seeds) for arm, seeds in self.listed}
        return arms | {arm: [SWEEP_SEED] for arm in self.proposed}

    @property
    def seeds(self) -> list[int]:
        """Of any arm, in order."""
        return sorted({seed for seeds in self.arms.values() for seed in seeds})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of all runs, seed by seed: a study that is stopped early has every arm."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms if seed in self.arms[arm]]

    @property
    def pairs(self) -> list[Pair]:
        """All evaluations that pair two arms of `cross`, seed by seed."""
        arms = self.arms
        pairs = []
        for seed in self.seeds:
            for searcher, reader in itertools.permutations(self.cross, 2):
                if seed in arms[searcher] and seed in arms[reader]:
                    pairs.append(Pair(searcher, reader, seed))
        return pairs

    def with_proposed(self, arms: Iterable[str]) -> Study:
        """The study with these arms of a sweep, as far as the file does not list them; checked."""
        listed = dict(self.listed)
        added = tuple(arm for arm in dict.fromkeys(arms) if arm not in listed)
        study = dataclasses.replace(self, proposed=added)
        _check(study)
        return study._with_experiments(arm for arm in added if arm not in self.experiments)

    def chosen(self, arms: Sequence[str], seeds: Sequence[str]) -> list[tuple[str, int]]:
        """`runs` of these arms and seeds, as a command names them; none named: of all.

        Raises:
          ConfigError: the study has no such arm or seed.
        """
        known_seeds = [str(seed) for seed in self.seeds]
        for flag, asked, known in (("arms", arms, self.arms), ("seeds", seeds, known_seeds)):
            unknown = [name for name in asked if name not in known]
            if unknown:
                raise ConfigError(
                    f"--{flag}={','.join(asked)}: {self.file} has no {', '.join(unknown)}. It has "
                    f"{', '.join(known)}."
                )
        return [
            (arm, seed)
            for arm, seed in self.runs
            if (not arms or arm in arms) and (not seeds or str(seed) in seeds)
        ]

    def plain(self) -> dict[str, Any]:
        """What the study's directory holds it to: what is measured and claimed.

        Arms and seeds may be added later; runs and evaluations are held to their configurations one
        by one.
        """
        return {
            "baseline": self.baseline,
            "claims": [list(claim) for claim in self.claims],
            "measures": list(self.measures),
            "strategies": self.strategies,
        }

    def _with_experiments(self, arms: Iterable[str]) -> Study:
        """The study with the checked experiments of these arms too."""
        experiments = dict(self.experiments)
        for arm in arms:
            c = self.module.get_config(arm)
            try:
                check_training(c)
            except ConfigError as error:
                raise ConfigError(f"{self.file}, arm {arm}: {error}") from error
            if self.equal_operations and not (c.checkpoint.every and c.checkpoint.keep_every):
                raise ConfigError(
                    f"{self.file}, arm {arm}: checkpoint.every = {c.checkpoint.every}, keep_every "
                    f"= {c.checkpoint.keep_every}: must be > 0 with equal_operations, which reads "
                    "checkpoints from before the end."
                )
            experiments[arm] = Experiment(to_plain(c), ESTIMATORS[c.loss.estimator].aggregates)
        return dataclasses.replace(self, experiments=experiments)


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
    try:
        spec.loader.exec_module(module)
        s = module.get_config("")
    except Exception as error:
        raise ConfigError(file_message(file, error)) from error
    if not isinstance(s, ConfigDict) or set(s) != set(defaults()):
        raise ConfigError(
            f"--config={path}: get_config('') must return design.defaults() with what differs."
        )
    study = Study(
        file=file,
        title=s.title,
        question=s.question,
        notes=s.notes,
        listed=tuple((arm, tuple(seeds)) for arm, seeds in s.arms),
        measures=tuple(s.measures),
        baseline=s.baseline,
        strategies=s.strategies,
        cross=tuple(s.cross),
        equal_operations=s.equal_operations,
        claims=tuple(Claim(*claim) for claim in s.claims),
        evaluation=_read_evaluation(file, module.get_config(EVALUATION)),
        module=module,
    )
    _check(study)
    return study._with_experiments(arm for arm in study.arms if arm != BASE)


def _read_evaluation(file: pathlib.Path, c: ConfigDict) -> EvaluationSettings:
    try:
        check_evaluation(c)
        return for_command(c)
    except ConfigError as error:
        raise ConfigError(f"{file}, evaluation: {error}") from error


def _check(study: Study) -> None:
    """Checks all but the experiments. Raises ConfigError."""
    arms = study.arms
    for arm, seeds in arms.items():
        _check_arm(arm, seeds)
    if len(arms) != len(study.listed) + len(study.proposed) or study.baseline not in arms:
        listed = [arm for arm, _ in study.listed]
        raise ConfigError(
            f"baseline = {study.baseline!r}: must be one of the arms {listed}, each once."
        )
    for measure in study.measures:
        _check_measure(study, measure)
    if not set(study.cross) <= set(arms) or len(set(study.cross)) != len(study.cross):
        raise ConfigError(
            f"cross = {study.cross!r}: must be of the arms {', '.join(arms)}, each at most once."
        )
    if study.strategies and (study.strategies < 2 or BASE not in arms):
        raise ConfigError(
            f"strategies = {study.strategies}: must be 0 or at least 2, and 0 without the arm "
            f"{BASE}."
        )
    for claim in study.claims:
        _check_claim(study, claim)


def _check_arm(arm: str, seeds: list[int]) -> None:
    are_seeds = all(type(seed) is int and seed >= 0 for seed in seeds)
    differ = len(set(seeds)) == len(seeds) > 0
    if not are_seeds or not differ or arm in (EVALUATION, OPTIMUM, "") or set("+@") & set(arm):
        raise ConfigError(
            f"arms.{arm} = {seeds!r}: must be different seeds >= 0, and the arm no reserved name "
            'and without "+" and "@".'
        )


def _check_measure(study: Study, measure: str) -> None:
    match = _MEASURE.fullmatch(measure)
    kind, _, number = measure.partition("@")
    e = study.evaluation
    most = e.rounds if kind in ("rsa", "reward_rsa") else e.n
    if not match or number and int(number) > most:
        raise ConfigError(
            f"measures: {measure!r} must be single, aggregated, reward, reward_single, "
            f"{', '.join(STRATEGIES)}, pass@k or maj@k with k up to eval.n = {e.n}, or rsa@t or "
            f"reward_rsa@t with t up to eval.rounds = {e.rounds}."
        )


def _check_claim(study: Study, claim: Claim) -> None:
    sides = list(study.arms)
    if claim.measure == ENTROPY:
        known = bool(claim.other)
        sides = [arm for arm in sides if arm != BASE]
    elif claim.measure == EFFICIENCY:
        known = claim.other == study.baseline
    else:
        known = claim.measure in study.measures
        if study.strategies and claim.measure == "aggregated":
            sides.append(OPTIMUM)
    are_sides = claim.arm in sides and claim.other in [*sides, ""]
    can_differ = claim.arm != claim.other and (claim.arm, claim.other) != (OPTIMUM, "")
    if not (known and are_sides and can_differ):
        raise ConfigError(
            f"claims: {tuple(claim)!r} must be (measure, arm, other, difference) of the measures "
            f"{', '.join(study.measures)} and of two different ones of {', '.join(sides)}, or "
            f'an arm and "", or ({EFFICIENCY!r}, arm, {study.baseline!r}, times), or '
            f"({ENTROPY!r}, arm, other, nat) of two that are trained."
        )
