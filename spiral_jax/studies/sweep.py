"""Arms that optuna proposes from what those before them have reached, for many possible choices.

The study's file says what there is to choose: `propose(trial)` asks an `optuna.trial.Trial` for
numbers and returns the name of the arm that they make, one that its `get_config` knows, or None if
they do not fit together. An arm whose training reward stays below the median of those before it is
given up on the way (`rungs.py`). Proposals are kept in DIRECTORY/sweep.db, so that a sweep goes on
where it was stopped and a report has its arms. The best of many arms with one seed each is partly
luck: list it in the file with more seeds before claiming anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, Trial, TrialState

from spiral_jax.core.config import ConfigError
from spiral_jax.studies.design import SWEEP_SEED, Study
from spiral_jax.studies.directory import StudyDirectory
from spiral_jax.studies.processes import Processes
from spiral_jax.studies.rungs import GIVEN_UP, GivesUp

# times optuna is asked for each arm that is wanted: it may propose what does not fit, or was tried
_ASKS = 10
_ARMS_BEFORE = 5  # that are through before one is given up, as a median of few says little
_RUNGS_BEFORE = 3  # that an arm always has
_TOP = 0.25  # share of the arms that importance tells from the others
_STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: GIVEN_UP,
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "not finished",
}
_KNOWN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # what failed is tried again

Run = Callable[[Study, str, GivesUp], float | None]


def sweep(
    study: Study, directory: StudyDirectory, count: int, processes: Processes, run: Run
) -> Study:
    """Lets optuna propose until `count` different arms were tried, or it has no new ones.

    Args:
      processes: says how many arms are tried at once.
      run: trains and evaluates an arm of the study that it is given, as far as that was not done;
        returns what is to be large, None if it failed or was given up.

    Returns:
      The study with the arms.

    Raises:
      ConfigError: the study's file proposes nothing, or an arm that cannot run.
    """
    if not hasattr(study.module, "propose"):
        raise ConfigError(
            f"{study.file}: has no function propose(trial), so there is nothing to sweep over."
        )
    trials = _open(directory)
    _try_again(trials)
    search = _Search(study, trials, count, _ASKS * count)
    processes.each([lambda: search.try_arms(run)] * processes.at_once)
    return study.with_proposed(_arms(trials))


class _Search:
    """A sweep under way, of which several threads try an arm each."""

    def __init__(self, study: Study, trials: optuna.Study, count: int, asks: int):
        self._study, self._trials, self._count, self._asks = study, trials, count, asks
        self._guard = threading.Lock()

    def try_arms(self, run: Run) -> None:
        """Tries one arm after the other until there are enough."""
        while (asked := self._ask()) is not None:
            trial, arm, study = asked
            given_up = False

            def gives_up(rung: int, reward: float, trial: Trial = trial) -> bool:
                nonlocal given_up
                with self._guard:
                    trial.report(reward, rung)
                    given_up = trial.should_prune()
                return given_up

            value = run(study, arm, gives_up)
            with self._guard:
                if value is not None:
                    self._trials.tell(trial, value)
                else:
                    state = TrialState.PRUNED if given_up else TrialState.FAIL
                    self._trials.tell(trial, state=state)

    def _ask(self) -> tuple[Trial, str, Study] | None:
        """A trial, its arm, and the study with it; None: there are enough, or no new ones."""
        with self._guard:
            while self._asks > 0:
                tried = _arms(self._trials)
                if len(tried) >= self._count and not _waiting(self._trials):
                    return None
                self._asks -= 1
                trial = self._trials.ask()
                arm = self._study.module.propose(trial)
                if arm is None or arm in _arms(self._trials, *_KNOWN):
                    self._trials.tell(trial, state=TrialState.PRUNED)
                    continue
                trial.set_user_attr("arm", arm)
                self._study = self._study.with_proposed([*tried, arm])
                return trial, arm, self._study
            return None


def proposed(directory: StudyDirectory) -> list[str]:
    """Arms that a sweep in this directory has proposed, in order."""
    return _arms(_open(directory)) if directory.sweep.exists() else []


def outcome(directory: StudyDirectory) -> dict[str, Any]:
    """What a report says of the sweep in this directory.

    Returns:
      arms: by arm, its state, what was chosen, what it has reached (None: nothing), and how many
        rungs it has done.
      importance: of each choice for being among the best quarter of the arms that are done
        (PED-ANOVA, arXiv 2304.10255), all together 1; {} as long as there are too few.
      direction: Spearman's rank correlation of each choice with what those arms have reached.
    """
    trials = _open(directory)
    done = trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = {"arms": {}, "importance": {}, "direction": {}}
    for trial in trials.get_trials(deepcopy=False):
        if "arm" in trial.user_attrs:
            found["arms"][trial.user_attrs["arm"]] = {
                "state": _STATES.get(trial.state, "not finished"),
                "chosen": trial.params,
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "rungs": len(trial.intermediate_values),
            }
    if len({trial.value for trial in done}) > 1:
        evaluator = PedAnovaImportanceEvaluator(target_quantile=_TOP)
        found["importance"] = get_param_importances(trials, evaluator=evaluator)
        found["direction"] = {name: _rank_correlation(done, name) for name in found["importance"]}
    return found


def _rank_correlation(done: list[FrozenTrial], name: str) -> float:
    """Spearman's, of the trials that have chosen a number of this name; 0 where all are equal."""
    pairs = [(trial.params[name], trial.value) for trial in done if name in trial.params]
    chosen, values = (_ranks(np.array(numbers, float)) for numbers in zip(*pairs, strict=True))
    spread = chosen.std() * values.std()
    covariance = np.mean((chosen - chosen.mean()) * (values - values.mean()))
    return float(covariance / spread) if spread else 0.0


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Equal numbers share the mean of their ranks."""
    below = (numbers < numbers[:, None]).sum(axis=1)
    equal = (numbers == numbers[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def _try_again(trials: optuna.Study) -> None:
    """Queues what a sweep that was killed has left running."""
    for stopped in trials.get_trials(states=(TrialState.RUNNING,)):
        trials.tell(stopped.number, state=TrialState.FAIL)
        trials.enqueue_trial(stopped.params)


def _arms(trials: optuna.Study, *states: TrialState) -> list[str]:
    """Arms of the trials in these states (none: in any), each once."""
    chosen = trials.get_trials(deepcopy=False, states=states or None)
    arms = [trial.user_attrs["arm"] for trial in chosen if "arm" in trial.user_attrs]
    return list(dict.fromkeys(arms))


def _waiting(trials: optuna.Study) -> bool:
    """Whether some trial is queued."""
    return bool(trials.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _open(directory: StudyDirectory) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=f"sqlite:///{directory.sweep}",
        study_name="sweep",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=SWEEP_SEED, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(_ARMS_BEFORE, _RUNGS_BEFORE),
    )
