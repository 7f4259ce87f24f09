"""A taskset of the package verifiers (0.4) -> `Task`, and its reward, computed offline.

The package is optional: pip install ".[verifiers]". What runs is one question, one answer, and
rewards that need nothing but the answer. What needs a runtime, tools, a container, a judge or
several turns is refused by name.

    task.name = "verifiers"
    task.environment = "my-taskset"                       # an installed package, or one of its own
    task.environment_args = {"split": "train"}            # what the taskset's own config has
    task.environment_eval_args = {"split": "test", "select": {"limit": 200}}

`select` is the package's own selection: include, exclude, shuffle, seed, skip, limit.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from spiral_jax.tasks.answer import after_thinking
from spiral_jax.tasks.finite import (
    HELD_OUT,
    TRAIN,
    attempt,
    fingerprint_of,
    finite_task,
    make_problem,
    unique_problems,
)
from spiral_jax.tasks.problem import Problem, Task, TaskError

try:
    import verifiers.v1 as vf
except ImportError as error:
    raise TaskError(
        'config.task.name = "verifiers" needs the package verifiers, which is optional: '
        'pip install ".[verifiers]"'
    ) from error

_SELECT = "select"


def task(
    environment: str,
    args: Mapping[str, Any],
    eval_args: Mapping[str, Any],
    system: str,
    seed: int,
) -> Task:
    """Training problems, shuffled each epoch, and held-out ones in their order.

    Args:
      environment: id of an installed taskset.
      args: settings of the taskset that differ from its defaults, and `select`; {} = no training
        problems.
      eval_args: the same of the held-out problems.
      system: config.prompt.system; a task's own system prompt must be this one.
      seed: >= 0; with the epoch it decides the order.

    Raises:
      TaskError: there is no such taskset, it refuses its settings, has no end, or needs more than
        an answer; or a task is malformed.
    """
    train = _problems(environment, args, "environment_args", TRAIN, system)
    held_out = _problems(environment, eval_args, "environment_eval_args", HELD_OUT, system)
    version = importlib.metadata.version("verifiers")
    parts = [json.dumps([p.id, p.text, p.answer, p.metadata]).encode() for p in train + held_out]
    return finite_task(
        train,
        held_out,
        seed,
        fingerprint_of([f"verifiers {version} {environment}".encode(), *parts]),
        reward="spiral_jax.tasks.verifiers_taskset:reward",
    )


def reward(text: str, problem: Problem) -> float:
    """The mean of the task's rewards, by their weights; what follows thinking is the answer.

    Their sum, as verifiers has it, may be above 1.
    """
    made = problem.metadata
    asked = _task_of(made["environment"], made["config"], made["data"])
    data = asked.data
    trace = vf.Trace(
        task=vf.TraceTask(type=type(asked).__name__, data=data),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        verifiers=vf.VersionInfo(version=importlib.metadata.version("verifiers")),
        nodes=_conversation(problem.text, data.system_prompt, after_thinking(text)),
    )
    asyncio.run(asked.score(trace))
    given = [each for each in trace.rewards.values() if each is not None]
    return sum(each.value for each in given) / sum(each.weight for each in given)


def _conversation(question: str, system: str | None, answer: str) -> list[vf.MessageNode]:
    messages = [vf.SystemMessage(content=system)] if system else []
    messages += [vf.UserMessage(content=question), vf.AssistantMessage(content=answer)]
    return [
        vf.MessageNode(parent=i - 1 if i else None, message=message, sampled=i == len(messages) - 1)
        for i, message in enumerate(messages)
    ]


@functools.lru_cache(maxsize=64)  # a problem has many traces
def _task_of(environment: str, config: str, data: str) -> vf.Task:
    """The task whose config and data are these, in JSON."""
    kind = vf.task_type(environment)
    return kind(
        kind.data_type().model_validate_json(data),
        kind.config_type().model_validate_json(config),
    )


def _problems(
    environment: str, args: Mapping[str, Any], field: str, split: str, system: str
) -> list[Problem]:
    """All problems of a split; none, if nothing is said of it. Raises `TaskError`."""
    if not args:
        return []
    taskset = _load(environment, args, field)
    rows = _rows(environment, taskset, split, system)
    return unique_problems(rows, f"config.task.environment = {environment!r}")


def _load(environment: str, args: Mapping[str, Any], field: str) -> vf.Taskset:
    own = {name: value for name, value in args.items() if name != _SELECT}
    try:
        config = vf.taskset_config_type(environment)(id=environment, **own)
        select = vf.SelectConfig(**args.get(_SELECT, {}))
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise TaskError(
            f"config.task.environment = {environment!r}: no installed taskset of verifiers 0.4 "
            f"({error})."
        ) from error
    except ValueError as error:  # pydantic's
        raise TaskError(
            f"config.task.{field} = {dict(args)}: {environment} refuses them ({error})."
        ) from error
    taskset = vf.load_taskset(config)
    if needs := _needs_of_set(environment, taskset):
        raise TaskError(_refusal(environment, needs))
    try:
        taskset = taskset.select(select)
    except ValueError as error:  # of a shuffle without end
        raise TaskError(f"config.task.{field} = {dict(args)}: {error}.") from error
    if not taskset.bounded:
        raise TaskError(
            f"config.task.environment = {environment!r}: it makes tasks without end. Say how many "
            f'in config.task.{field}, such as {{"{_SELECT}": {{"limit": 1000}}}}.'
        )
    return taskset


def _rows(
    environment: str, taskset: vf.Taskset, split: str, system: str
) -> Iterator[tuple[str, Problem | TaskError]]:
    for asked in taskset:
        where = f"{environment}, task {asked.data.idx} (from 0)"
        if needs := _needs_of_task(asked):
            raise TaskError(_refusal(environment, needs))
        yield where, attempt(_problem, environment, asked, where, split, system)


def _problem(environment: str, asked: vf.Task, where: str, split: str, system: str) -> Problem:
    data = asked.data
    if data.system_prompt is not None and data.system_prompt != system:
        raise TaskError(
            f"{where}: its system prompt is {data.system_prompt!r}, config.prompt.system is "
            f"{system!r}. One system message is used for all prompts: make the two equal."
        )
    answer = getattr(data, "answer", None)
    return make_problem(
        where,
        f"{split}:{data.idx}",
        _question(data.prompt, where),
        answer if isinstance(answer, str | int | float) and answer != "" else None,
        text_name="prompt",
        answer_name="answer",
        metadata={
            "environment": environment,
            "config": asked.config.model_dump_json(),
            "data": data.model_dump_json(),
        },
    )


def _question(prompt: Any, where: str) -> str:
    """The text of the one message of the user's. Raises `TaskError`."""
    if isinstance(prompt, str):
        return prompt
    if prompt and len(prompt) == 1 and prompt[0].role == "user":
        content = prompt[0].content
        if isinstance(content, str):
            return content
    roles = [message.role for message in prompt or []]
    raise TaskError(f"{where}: prompt must be one text of the user's; its roles are {roles}.")


def _needs_of_set(environment: str, taskset: vf.Taskset) -> list[str]:
    """What the taskset needs beside an answer, in words."""
    needs = []
    own = vf.environment_class(environment)
    if own is not vf.SingleAgentEnv:
        needs.append(f"an environment of its own ({own.__name__})")
    if taskset.toolsets(taskset.config):
        needs.append("tools")
    return needs


def _needs_of_task(asked: vf.Task) -> list[str]:
    """What a task needs beside an answer, in words."""
    kind, data = type(asked), asked.data
    needs = []
    if asked.NEEDS_CONTAINER or data.image or data.agent_user or data.skills:
        needs.append("a container")
    needs += [
        f"a runtime (for {name})"
        for name in ("setup", "finalize")
        if getattr(kind, name) is not getattr(vf.Task, name)
    ]
    if kind.toolsets(asked.config):
        needs.append("tools")
    needs += [f"a judge ({judge.id})" for judge in asked.config.judges]
    needs += [
        f"a judge ({name})" for name, value in asked.config if isinstance(value, vf.JudgeConfig)
    ]
    rewards = asked.hooks("reward")
    needs += [f"a runtime (for {each.__name__})" for each in rewards if _wants_runtime(each)]
    if not rewards:
        needs.append("a reward (it has none)")
    weights = [getattr(each, "_vf_weight", 1.0) for each in rewards]
    if rewards and (min(weights) < 0 or not sum(weights)):
        needs.append(f"weights of rewards >= 0, and one above it, not {weights}")
    return needs


def _wants_runtime(reward: Any) -> bool:
    runtime = inspect.signature(reward).parameters.get("runtime")
    return runtime is not None and runtime.default is inspect.Parameter.empty


def _refusal(environment: str, needs: list[str]) -> str:
    return (
        f"config.task.environment = {environment!r}: it needs {', '.join(needs)}. Only tasksets of "
        "one question and one answer run here, whose rewards need nothing but the answer."
    )
