"""Rollouts without a model: the second implementation of the sampler protocol writes a script."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import tiny
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role, Stop
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation import settings as evaluation
from spiral_jax.evaluation.wave import Evaluator
from spiral_jax.model import hf
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.settings import ObjectiveSettings, objective_settings
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer
from spiral_jax.rollout.actor import Actor
from spiral_jax.rollout.collect import Batch
from spiral_jax.rollout.populations import Population
from spiral_jax.rollout.requests import Asked, Writer
from spiral_jax.rollout.settings import dynamic_sampling, training_stages
from spiral_jax.run.examples import show_nothing
from spiral_jax.tasks.problem import Problem, Task
from spiral_jax.verifier.rewards import RewardFunction, judge
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

TOKENIZER = load_tokenizer(hf.resolve_path("bundled:tiny"))
CUT_OFF = "..."  # at the end of a text: the limit cuts it off there

Script = Callable[[Role, int, int, int], str]  # (role, cursor, set, trace) -> text


@dataclasses.dataclass
class ScriptedSampler:
    """A `Sampler` whose traces are the texts of a script.

    Attributes:
      at_once: groups that run at the same time.
      calls: the groups that were asked for, in order.
    """

    script: Script
    at_once: int = 6
    calls: list[GroupRequests] = dataclasses.field(default_factory=list)

    def start_report(self):
        return "scripted: nothing to compile"

    def prepare(self, variables):
        return variables

    def stream(self, weights, feed):
        return ScriptedSampling(self, feed)

    def advance(self, feed, now):
        """Takes up to `at_once` groups, then returns them; yields what was sampled."""
        taken = []
        while len(taken) < self.at_once and (request := feed.next(now)) is not None:
            taken.append(request)
        self.calls += taken
        for request in taken:
            group = self.write(request)
            feed.done(group, now)
            yield group

    def write(self, request: GroupRequests) -> Groups:
        C, G = request.traces, request.max_tokens
        trace, length = np.zeros((1, C, G), np.int32), np.zeros((1, C), np.int32)
        stop = np.full((1, C), Stop.STOP, np.int32)
        for i in range(C):
            text = self.text(request, i)
            ids = TOKENIZER.encode(text, add_special_tokens=False)
            if text.endswith(CUT_OFF):
                stop[0, i] = Stop.LENGTH
            else:
                ids = [*ids, TOKENIZER.eos_token_id]
            trace[0, i, : len(ids)], length[0, i] = ids, len(ids)
        return Groups(request, trace, length, np.zeros((1, C, G), np.float32), stop)

    def text(self, request: GroupRequests, i: int) -> str:
        _, _, cursor, _, role, k = request.id_Ux6[0]
        return self.script(Role(role), int(cursor), int(k), i)


class ScriptedSampling:
    """A `Sampling`; one turn of `sampler.advance` is one unit of virtual time."""

    def __init__(self, sampler, feed):
        self._sampler, self._feed, self._tokens = sampler, feed, 0

    def __iter__(self):
        for now in itertools.count():
            yield now
            if self._feed.finished():
                return
            for group in self._sampler.advance(self._feed, now):
                self._tokens += group.sampled_tokens

    def metrics(self):
        return {"sampling/generated_tokens": float(self._tokens)}


class SamplerByRound(ScriptedSampler):
    """Its script is told the round instead of the role."""

    def text(self, request, i):
        _, _, cursor, round, _, k = map(int, request.id_Ux6[0])
        return self.script(round, cursor, k, i)


class ReadingSampler(ScriptedSampler):
    """Aggregation traces repeat the largest box that their prompt shows."""

    def text(self, request, i):
        if request.id_Ux6[0, 4] == Role.SEARCH:
            return super().text(request, i)
        boxes = re.findall(r"boxed\{(\d)\}", prompt_text(request))
        return f"\\boxed{{{max(map(int, boxes), default=0)}}}"


@dataclasses.dataclass
class UnorderedSampler(ReadingSampler):
    """Groups end in any order, one in a unit of time."""

    seed: int = 0
    running: list[GroupRequests] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self._rng = np.random.default_rng(self.seed)

    def advance(self, feed, now):
        while len(self.running) < self.at_once and (request := feed.next(now)) is not None:
            self.running.append(request)
            self.calls.append(request)
        if self.running:
            group = self.write(self.running.pop(self._rng.integers(len(self.running))))
            feed.done(group, now)
            yield group


def prompt_text(requests: GroupRequests, u: int = 0) -> str:
    return TOKENIZER.decode(requests.prompt_UxP[u, : requests.prompt_len_U[u]])


def number_task() -> Task:
    """Problem "left=CURSOR": the answer is always 7."""

    def problem(cursor):
        return Problem(id=f"p{cursor}", text=f"left={cursor}", answer="7")

    return Task(train=problem, held_out=problem, held_out_size=100, fingerprint="numbers")


def with_text(task: Task, change: Callable[[int, str], str]) -> Task:
    """The task with the text `change(cursor, text)` for each problem's."""

    def changed(problem_at):
        def problem(cursor):
            given = problem_at(cursor)
            return dataclasses.replace(given, text=change(cursor, given.text))

        return problem

    return dataclasses.replace(task, train=changed(task.train), held_out=changed(task.held_out))


def scripted_config(**overrides: Any) -> ConfigDict:
    """The quickstart's with 4 problems a step; `room__field=value` overrides a field."""
    c = tiny.get_config()
    c.batch.problems = 4
    c.search.max_tokens = 32
    for field, value in overrides.items():
        room, name = field.split("__")
        c[room][name] = value
    return c


def scripted_scaffold(c: ConfigDict):
    return make_scaffold(TOKENIZER, PromptSettings.from_config(c.prompt), (TOKENIZER.eos_token_id,))


def asked(cursor: int) -> Asked:
    """A problem of `number_task` on its way into a rollout."""
    problem = number_task().train(cursor)
    return Asked(cursor, problem, search_prompt(scripted_scaffold(scripted_config()), problem.text))


def scripted_writer(c: ConfigDict, purpose: Purpose = Purpose.TRAIN, step: int = 0) -> Writer:
    return Writer(scripted_scaffold(c), purpose, step, c.seed, c.aggregation.order)


def math_verifier() -> Verifier:
    """Its processes never start: the scripts' answers are integers."""
    return Verifier("math", VerifierSettings(workers=1, timeout_s=5.0))


class InlineVerifier(Verifier):
    """Calls a reward function in this process."""

    def __init__(self, reward: RewardFunction):
        super().__init__("math", VerifierSettings(workers=1, timeout_s=5.0))
        self._reward = reward

    def compares_answers(self, problem):
        return False

    def judge(self, items):
        return [judge(self._reward, text, problem) for text, problem in items]


def nothing_to_do() -> None:
    """Between two decode chunks."""


@dataclasses.dataclass(frozen=True)
class ScriptedTraining:
    """What of a training run its rollouts need."""

    c: ConfigDict
    actor: Actor
    objective: ObjectiveSettings

    @property
    def sampler(self) -> ScriptedSampler:
        return self.actor.sampler

    def with_actor(self, **changes: Any) -> "ScriptedTraining":
        return dataclasses.replace(self, actor=dataclasses.replace(self.actor, **changes))

    def collect(
        self, step: int = 0, cursor: int = 0, populations: Sequence[Population] = ()
    ) -> Batch:
        """The batch of a step: the lines of train.py."""
        problems = self.actor.first_kept(cursor, populations)
        for rollout in self.actor.rollouts(None, step, problems):
            advantages = compute_advantages(self.objective.estimator, rollout.rewards())
            problems.add(rollout, advantages)
        return problems.batch(self.objective)


def scripted_training(
    script: Script,
    task: Task | None = None,
    *,
    at_once: int = 6,
    strategy: Callable[[str, Problem], str] | None = None,
    verdict_delay: int = 2,
    sampler_class: type[ScriptedSampler] = ScriptedSampler,
    **overrides: Any,
) -> ScriptedTraining:
    """Training on `scripted_config(**overrides)` with a sampler that follows the script."""
    c = scripted_config(**overrides)
    objective, stages = objective_settings(c.loss), training_stages(c)
    actor = Actor(
        stages=stages,
        dynamic_sampling=dataclasses.replace(dynamic_sampling(c), verdict_delay=verdict_delay),
        order=c.aggregation.order,
        max_problem_tokens=c.prompt.max_problem_tokens,
        task=task or number_task(),
        scaffold=scripted_scaffold(c),
        sampler=sampler_class(script, at_once),
        verifier=math_verifier(),
        strategy=strategy,
        progress=Progress(1, 0),
        between_chunks=nothing_to_do,
        show=show_nothing,
    )
    return ScriptedTraining(c, actor, objective)


def scripted_evaluator(
    sampler: ScriptedSampler,
    task: Task | None = None,
    *,
    training: bool = False,
    strategy: Callable[[str, Problem], str | None] | None = None,
    **overrides: Any,
) -> Evaluator:
    """The evaluator of the command, or of a training run."""
    c = scripted_config(**overrides)
    return Evaluator(
        settings=evaluation.for_training(c) if training else evaluation.for_command(c),
        order=c.aggregation.order,
        task=task or number_task(),
        scaffold=scripted_scaffold(c),
        sampler=sampler,
        verifier=math_verifier(),
        failures=VerifierSettings.from_config(c.verifier),
        strategy=strategy,
        progress=Progress(1, 0),
        between_chunks=nothing_to_do,
        show=show_nothing,
    )
