"""From a configuration to the objects of a run, every check on the way.

Nothing is written, no weight is read and nothing is sampled here. The sections of the config are
handed over to the rooms, whose settings come back.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.core.functions import load_function
from spiral_jax.core.groups import Groups
from spiral_jax.core.mesh import bytes_on_a_device, make_mesh
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation import settings as evaluation_settings
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.evaluation.stages import evaluation_stages
from spiral_jax.evaluation.wave import Evaluator
from spiral_jax.learner.blocks import abstract_blocks, check_micro_batches
from spiral_jax.learner.settings import LearnerSettings, learner_settings
from spiral_jax.learner.state import abstract_state, keeps_base
from spiral_jax.learner.step import make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import check_mesh, read_architecture
from spiral_jax.model.attention.backends import choose_backend, choose_page_backend
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.objective.settings import ObjectiveSettings, objective_settings
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import Scaffold, make_scaffold, max_aggregation_prompt
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer, stop_ids
from spiral_jax.rollout.judge import Strategy
from spiral_jax.rollout.settings import (
    DynamicSampling,
    TrainingStages,
    dynamic_sampling,
    training_stages,
)
from spiral_jax.rollout.stages import Stage
from spiral_jax.run.checks import check_run, check_shared
from spiral_jax.run.metric_writers import check_installed
from spiral_jax.run.start import Start
from spiral_jax.run.watchdog import deadline
from spiral_jax.sampling.engine import Engine, make_samplers
from spiral_jax.sampling.memory import Room, memory_of_a_device
from spiral_jax.sampling.settings import GroupLimits, check_sampling
from spiral_jax.tasks.load import check_task, load_task
from spiral_jax.tasks.problem import Task
from spiral_jax.verifier.choice import RewardChoice, choose_fences, choose_rewards
from spiral_jax.verifier.references import check_problems
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

_TRIED_OF_ENDLESS = 1000  # problems of a task that makes them without end


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training run has beside what an evaluation has: how it draws, rewards and updates."""

    stages: TrainingStages
    dynamic_sampling: DynamicSampling
    objective: ObjectiveSettings
    learner: LearnerSettings


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of, before any weight is loaded.

    Attributes:
      c: the configuration; all of it has been settings.
      reward: what config.task names, or the task's own.
      strategy: the function that names a trace's strategy; None where neither the config nor the
        task has one.
      evaluation: what its evaluations sample.
      sampler: of training.
      eval_sampler: the same one unless config.eval draws tokens in another way.
      training: None for `spiral_jax.evaluate`.
    """

    c: ConfigDict
    mesh: Mesh
    start: Start
    task: Task
    reward: RewardChoice
    strategy: Strategy | None
    tokenizer: PreTrainedTokenizerBase
    scaffold: Scaffold
    verifier: VerifierSettings
    evaluation: EvaluationSettings
    sampler: Engine
    eval_sampler: Engine
    training: Training | None

    @property
    def model(self) -> ModelConfig:
        return self.start.model


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that a restart compiles nothing.

    It lies in ~/.cache/spiral_jax; JAX_COMPILATION_CACHE_DIR names another place. Off on CPUs
    unless it is set: their programs fit one kind of machine.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        cache = pathlib.Path.home() / ".cache" / "spiral_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


class RunSettings(NamedTuple):
    """The settings of the rooms that a run needs, all of them settings.

    Attributes:
      training: None for `spiral_jax.evaluate`.
    """

    verifier: VerifierSettings
    evaluation: EvaluationSettings
    training: Training | None


def check_training(c: ConfigDict) -> RunSettings:
    """Checks everything that training needs and that needs neither data nor devices.

    Raises:
      ConfigError: a field that cannot be, or fields that do not go together.
    """
    check_shared(c)
    check_run(c)
    check_task(c.task, training=True, evaluated=c.eval.problems > 0)
    check_sampling(c)
    verifier = VerifierSettings.from_config(c.verifier)
    objective, dynamic, stages = objective_settings(c.loss), dynamic_sampling(c), training_stages(c)
    learner = learner_settings(c, stages.groups(dynamic.problems))
    training = Training(stages, dynamic, objective, learner)
    return RunSettings(verifier, evaluation_settings.for_training(c), training)


def check_evaluation(c: ConfigDict) -> RunSettings:
    """The same for `spiral_jax.evaluate`, which reads no training data and updates nothing."""
    check_shared(c)
    check_task(c.task, training=False, evaluated=True)
    check_sampling(c)
    verifier = VerifierSettings.from_config(c.verifier)
    return RunSettings(verifier, evaluation_settings.for_command(c), training=None)


def set_up_training(c: ConfigDict) -> Setup:
    """Builds everything that `c` names for `spiral_jax.train`.

    Raises:
      ConfigError: see `check_training`; or what the data, the checkpoint or the mesh do not allow.
      TaskError: the problems cannot be had.
    """
    settings = check_training(c)
    check_installed(c.metrics.writers)
    setup = _set_up(c, settings)
    check_micro_batches(settings.training.learner.shapes, setup.mesh)
    _check_trained_prompts(setup, settings.training)
    _check_some_fit(setup)
    return setup


def set_up_evaluation(c: ConfigDict) -> Setup:
    """The same for `spiral_jax.evaluate`."""
    settings = check_evaluation(c)
    c = c.copy_and_resolve_references()
    c.task.train_path = ""  # else it would be read
    with c.task.environment_args.unlocked():
        c.task.environment_args = {}
    return _set_up(c, settings)


def _set_up(c: ConfigDict, settings: RunSettings) -> Setup:
    mesh = make_mesh(c.mesh)
    task = _load_task(c, settings.evaluation.problems)
    reward = _load_reward(c, task, settings.training is not None)
    task = _with_readable_references(task, reward)
    start = _start(c, mesh, settings.training is not None)
    check_mesh(start.model.arch, mesh)
    tokenizer = load_tokenizer(start.path)
    if len(tokenizer) > start.model.arch.V:
        raise ConfigError(
            f"{start.path}: the tokenizer has {len(tokenizer)} ids, its vocab_size is "
            f"{start.model.arch.V}."
        )
    stops = stop_ids(tokenizer, start.path, c.prompt.stop)
    fences = choose_fences(c.prompt.fence, reward)
    scaffold = make_scaffold(tokenizer, PromptSettings.from_config(c.prompt), stops, fences)
    sampler, eval_sampler = make_samplers(
        c,
        start.model,
        mesh,
        stops,
        limits=_group_limits(c, settings, scaffold),
        room=Room(memory_of_a_device(mesh), _resident_bytes(settings, start.model, mesh)),
    )
    return Setup(
        c=c,
        mesh=mesh,
        start=start,
        task=task,
        reward=reward,
        strategy=_load_strategy(c, task, settings.training),
        tokenizer=tokenizer,
        scaffold=scaffold,
        verifier=settings.verifier,
        evaluation=settings.evaluation,
        sampler=sampler,
        eval_sampler=eval_sampler,
        training=settings.training,
    )


def _load_task(c: ConfigDict, held_out: int) -> Task:
    """The task, which has so many held-out problems. Raises: see `load_task`; `ConfigError`."""
    with deadline("the problems that config.task names to be read", c.train.wait_s):
        task = load_task(c.task, c.seed, c.prompt.system)
    if held_out > task.held_out_size:
        raise ConfigError(
            f"config.eval.problems = {held_out}: the task has {task.held_out_size} held-out "
            "problems."
        )
    return task


def _start(c: ConfigDict, mesh: Mesh, training: bool) -> Start:
    path = hf.resolve_path(c.model.hf_path)
    model = hf.model_config(read_architecture(path), c.model)
    device, arch = mesh.devices.flat[0], model.arch
    attention = choose_backend(c.model.attention, device, model.compute_dtype, arch.E)
    pages = choose_page_backend(c.model.attention, device, arch.E)
    model = dataclasses.replace(model, attention=attention, pages=pages)
    has_adapters = c.model.adapter_path or c.model.init_from or c.eval.searcher not in ("", "base")
    if not training and not has_adapters:
        # The checkpoint as it is: a base without adapters keeps its dtype.
        model = dataclasses.replace(model, lora_rank=0)
    return Start(path, model, mesh, c.model.adapter_path, c.model.init_from)


def _load_reward(c: ConfigDict, task: Task, training: bool) -> RewardChoice:
    """The reward functions, which can be loaded. Raises `ConfigError`."""
    by_source = c.task.rewards.to_dict()
    reward = c.task.reward or ("" if by_source else task.reward)
    choice = choose_rewards(reward, by_source, task.problems)
    choice.check(task.problems, training)
    choice.load()
    return choice


def _with_readable_references(task: Task, reward: RewardChoice) -> Task:
    """The task, whose report says what judges which source, and what to know of the references.

    Raises:
      TaskError: a reward of this package cannot read some, or some tests; see `check_problems`.
    """
    notes = check_problems(task.problems, reward.of)
    sources = reward.describe(task.problems)
    report = "\n".join(filter(None, (task.report, sources, notes)))
    return dataclasses.replace(task, report=report)


def _load_strategy(c: ConfigDict, task: Task, training: Training | None) -> Strategy | None:
    """The function that names a trace's strategy; None where neither config nor task has one.

    Raises:
      ConfigError: it cannot be loaded, or there is none for the estimator that needs one.
    """
    name = c.task.strategy or task.strategy
    needed = training is not None and training.objective.row.needs.strategies
    if not name and not needed:
        return None
    return load_function(
        "task.strategy",
        name,
        f'must be "package.module:function" for {c.loss.estimator}, since the task {c.task.name} '
        "names no strategies.",
    )


def _group_limits(c: ConfigDict, settings: RunSettings, scaffold: Scaffold) -> list[GroupLimits]:
    return [
        GroupLimits(_longest_prompt(c, scaffold, stage), stage.traces, stage.max_tokens)
        for stage in sampled_stages(settings)
    ]


def sampled_stages(settings: RunSettings) -> list[Stage]:
    """Every stage of training and evaluation."""
    stages = evaluation_stages(settings.evaluation) if settings.evaluation.problems else []
    if settings.training:
        stages += settings.training.stages.sampled()
    return stages


def _longest_prompt(c: ConfigDict, scaffold: Scaffold, stage: Stage) -> int:
    """Tokens that a prompt of a stage has at most."""
    problem_tokens = c.prompt.max_problem_tokens
    if stage.reads is None:
        return problem_tokens
    return max_aggregation_prompt(
        scaffold,
        size=stage.set_size,
        candidate_tokens=stage.reads.max_tokens,
        problem_tokens=problem_tokens,
    )


def _resident_bytes(settings: RunSettings, model: ModelConfig, mesh: Mesh) -> int:
    """Bytes a device of what lies there while traces are sampled, beside the sampler's own."""
    base = hf.abstract_params(model)
    base = meshes.with_shardings(base, meshes.weight_shardings(base, mesh))
    if settings.training is None:
        return bytes_on_a_device(base)
    learner = settings.training.learner
    kept = base if keeps_base(learner, model) else None
    return bytes_on_a_device([kept, abstract_state(learner, model, mesh)])


def _check_trained_prompts(setup: Setup, training: Training) -> None:
    """The micro-batches have room for the longest prompt of every stage."""
    for stage in training.stages.sampled():
        widest = training.learner.shapes[stage.role].lengths[-1][0]
        field = f"batch.{stage.role.label}_lengths"
        longest = _longest_prompt(setup.c, setup.scaffold, stage)
        _require_room(field, widest, stage, longest)


def _check_some_fit(setup: Setup) -> None:
    """Not all problems of training, nor all held-out ones, are too long to be asked."""
    limit = setup.c.prompt.max_problem_tokens
    tried = len(setup.task.problems) or _TRIED_OF_ENDLESS
    splits = {
        "training": map(setup.task.train, range(tried)),
        "held-out": map(setup.task.held_out, range(setup.evaluation.problems)),
    }
    for split, problems in splits.items():
        shortest = math.inf
        for problem in problems:
            shortest = min(shortest, len(search_prompt(setup.scaffold, problem.text)))
            if shortest <= limit:
                break
        if limit < shortest < math.inf:
            raise ConfigError(
                f"config.prompt.max_problem_tokens = {limit}: all {split} problems have longer "
                f"search prompts, the shortest {shortest} tokens. Raise it, with the widest of "
                "batch.search_lengths."
            )


def _require_room(field: str, widest: int, stage: Stage, longest: int) -> None:
    if widest < longest:
        raise ConfigError(
            f"config.{field}: its widest prompt with traces of {stage.max_tokens} tokens is "
            f"{widest}, but {stage.role.label} prompts may have up to {longest} ({stage.name}). "
            "Widen it, or lower prompt.max_problem_tokens or prompt.keep_tail_tokens."
        )


def make_evaluator(
    setup: Setup,
    verifier: Verifier,
    progress: Progress,
    between_chunks: Callable[[], None],
    show: Callable[[Stage, Groups], None],
) -> Evaluator:
    """What evaluates the setup's held-out problems, in training or by command."""
    return Evaluator(
        settings=setup.evaluation,
        order=setup.c.aggregation.order,
        task=setup.task,
        scaffold=setup.scaffold,
        sampler=setup.eval_sampler,
        verifier=verifier,
        failures=setup.verifier,
        strategy=setup.strategy,
        progress=progress,
        between_chunks=between_chunks,
        show=show,
    )


def check_shapes(setup: Setup) -> None:
    """Traces the whole train step on shapes alone: what it would reject, it rejects here."""
    setup.start.check()
    learner, model = setup.training.learner, setup.model
    base = hf.abstract_params(model) if keeps_base(learner, model) else None
    state = abstract_state(learner, model, setup.mesh)
    with jax.set_mesh(setup.mesh):
        jax.eval_shape(
            make_train_step(learner, model), state, base, abstract_blocks(learner.shapes)
        )
