"""Arms that optuna proposes from what those before them have reached, for many possible choices.

The study's file says what there is to choose: `propose(trial)` asks an `optuna.trial.Trial` for
numbers and returns the name of the arm that they make, one that its `get_config` knows, or None if
they do not fit together. Proposals are kept in DIRECTORY/sweep.db, so that a sweep goes on where it
was stopped and a report has its arms. The best of many arms with one seed each is partly luck: list
it in the file with more seeds before claiming anything.
"""

from __future__ import annotations

from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from spiral_jax.core.config import ConfigError
from spiral_jax.studies.design import SWEEP_SEED, Study
from spiral_jax.studies.directory import StudyDirectory

# times optuna is asked for each arm that is wanted: it may propose what does not fit, or was tried
_ASKS = 20


def sweep(
    study: Study, directory: StudyDirectory, count: int, run: Callable[[Study, str], float | None]
) -> Study:
    """Lets optuna propose until `count` different arms were tried, or it has no new ones.

    Args:
      run: trains and evaluates an arm of the study that it is given, as far as that was not done;
        returns what is to be large, None if it failed.

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
    for _ in range(_ASKS * count):
        tried = _arms(trials, TrialState.COMPLETE, TrialState.FAIL)
        if len(tried) >= count and not _waiting(trials):
            return study.with_proposed(tried)
        trial = trials.ask()
        arm = study.module.propose(trial)
        if arm is None:
            trials.tell(trial, state=TrialState.PRUNED)
            continue
        value = _value(trials, arm)
        trial.set_user_attr("arm", arm)
        if value is None:
            value = run(study.with_proposed([*tried, arm]), arm)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        trials.tell(trial, value, state=state)
    return study.with_proposed(_arms(trials))


def proposed(directory: StudyDirectory) -> list[str]:
    """Arms that a sweep in this directory has proposed, in order."""
    return _arms(_open(directory)) if directory.sweep.exists() else []


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


def _value(trials: optuna.Study, arm: str) -> float | None:
    """What an arm that was proposed before has reached; None: nothing."""
    for trial in trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.user_attrs["arm"] == arm:
            return trial.value
    return None


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
        sampler=optuna.samplers.TPESampler(seed=SWEEP_SEED),
    )
