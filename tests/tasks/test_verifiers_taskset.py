"""Tasksets of verifiers, an optional package: what runs, what is refused, what an answer earns."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("verifiers", reason='needs pip install ".[verifiers]"')

from configs import tiny
from spiral_jax.tasks import verifiers_taskset
from spiral_jax.tasks.load import load_task
from spiral_jax.tasks.problem import TaskError
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

# A package of a taskset. Its questions are those of the bundled model's task; `wants` adds what
# is refused.
TASKSET = """
import verifiers.v1 as vf
from spiral_jax.tasks import two_halves


class Sum(vf.TaskData):
    answer: str


class Tools(vf.Toolset):
    pass


class SumTaskConfig(vf.TaskConfig):
    note: str = ""
    {of_config}


class SumTask(vf.Task[Sum, vf.State, SumTaskConfig]):
    {of_task}

    @vf.reward(weight=3.0)
    async def right(self, task, trace{runtime}) -> float:
        return float(vf.extract_boxed_answer(trace.last_reply, strict=True) == task.answer)

    @vf.reward
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 60)

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


class SumsConfig(vf.TasksetConfig):
    task: SumTaskConfig = SumTaskConfig()
    split: str = "train"


class Sums(vf.Taskset[SumTask, SumsConfig]):
    INFINITE = True

    def load(self):
        task, i = two_halves.task(0), 0
        while True:
            made = getattr(task, self.config.split)(i)
            yield SumTask(Sum(prompt=made.text, answer=made.answer, {of_data}), self.config.task)
            i += 1


{of_module}
__all__ = ["Sums"] + {more}
"""


@pytest.fixture
def taskset(tmp_path, monkeypatch):
    """Writes the package of that name, with what it needs, onto the path."""

    def write(name, more=(), **parts):
        empty = dict.fromkeys(("of_config", "of_task", "runtime", "of_data", "of_module"), "")
        source = TASKSET.format(**empty | parts, more=list(more))
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    monkeypatch.syspath_prepend(str(tmp_path))
    return write


def first(n):
    return {"select": {"limit": n}}


def test_tasks_become_problems_and_rewards_are_their_weighted_mean(taskset):
    name = taskset("sums_taskset")
    c = tiny.get_config()
    c.task.name, c.task.environment = "verifiers", name
    with c.task.environment_args.unlocked(), c.task.environment_eval_args.unlocked():
        c.task.environment_args = {"select": {"limit": 3, "skip": 1}}
        c.task.environment_eval_args = {"split": "held_out"} | first(2)
    task = load_task(c.task, 0, "")
    assert sorted(task.train(i).id for i in range(3)) == [f"train:{i}" for i in (1, 2, 3)]
    assert [task.held_out(i).id for i in range(task.held_out_size)] == ["held_out:0", "held_out:1"]
    problem = task.held_out(0)
    assert json.loads(json.dumps(problem.metadata)) == problem.metadata
    box = f"\\boxed{{{problem.answer}}}"
    texts = [box, f"<think>\\boxed{{0}}</think>{box}", box + "." * 60, "short", "." * 60]
    with Verifier(task.reward, VerifierSettings(workers=1, timeout_s=60.0)) as verifier:
        verdicts = verifier.verify([(text, problem) for text in texts])
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.75, 0.25, 0.0]


def test_a_reward_that_takes_too_long_is_a_failure_and_no_wrong_answer(taskset):
    slow = "@vf.reward\n    def slow(self, trace): __import__('time').sleep(1000)"
    task = verifiers_taskset.task(taskset("slow_taskset", of_task=slow), first(1), {}, "", 0)
    with Verifier(task.reward, VerifierSettings(workers=1, timeout_s=1.0)) as verifier:
        (verdict,) = verifier.verify([("x", task.train(0))])
    assert verdict.status.value == "timeout" and verdict.is_failure


REFUSED = {
    "a runtime (for right)": {"runtime": ", runtime"},
    "a runtime (for setup)": {"of_task": "async def setup(self, trace, runtime): pass"},
    "a container": {"of_task": "NEEDS_CONTAINER = True"},
    "a container, by an image": {"of_data": "image='python:3.12'"},
    "tools": {
        "of_task": "@classmethod\n    def toolsets(cls, config): return [Tools(vf.ToolsetConfig())]"
    },
    "a judge (grader)": {"of_config": "grader: vf.JudgeConfig = vf.JudgeConfig()"},
    "an environment of its own (Talk)": {
        "of_module": "class Talk(vf.Env): pass\n",
        "more": ["Talk"],
    },
    "its system prompt is 'Be brief.'": {"of_data": "system_prompt='Be brief.'"},
    "weights of rewards": {
        "of_task": "@vf.reward(weight=-1.0)\n    async def loud(self, trace): return 1.0"
    },
}


@pytest.mark.parametrize("need", REFUSED)
def test_what_needs_more_than_an_answer_is_refused_by_name(need, taskset):
    name = taskset(f"refused_{list(REFUSED).index(need)}", **REFUSED[need])
    with pytest.raises(TaskError) as error:
        verifiers_taskset.task(name, first(2), {}, "", 0)
    assert need.partition(", by")[0] in str(error.value) and name in str(error.value)


def test_a_judge_in_the_settings_is_refused(taskset):
    args = first(2) | {"task": {"judges": [{"id": "decision"}]}}
    with pytest.raises(TaskError, match=r"a judge \(decision\)"):
        verifiers_taskset.task(taskset("judged_taskset"), args, {}, "", 0)


def test_settings_that_cannot_be_are_refused(taskset):
    name = taskset("sums_taskset_2")
    for args, part in (
        ({"split": "train"}, "without end"),
        ({"spilt": "train"}, "refuses them"),
        ({"select": {"limt": 3}}, "refuses them"),
    ):
        with pytest.raises(TaskError, match=part):
            verifiers_taskset.task(name, args, {}, "", 0)
    with pytest.raises(TaskError, match="no installed taskset"):
        verifiers_taskset.task("no-such-taskset", first(1), {}, "", 0)


@pytest.mark.slow
def test_a_taskset_is_evaluated_end_to_end(taskset, tmp_path):
    name = taskset("sums_taskset_3")
    flags = {
        "task.name": "verifiers",
        "task.environment": name,
        "task.environment_eval_args": "{'split': 'held_out', 'select': {'limit': 4}}",
        "eval.problems": 4,
        "eval.n": 8,
        "eval.rounds": 1,
    }
    command = [sys.executable, "-m", "spiral_jax.evaluate", "--config=configs/tiny.py"]
    command += [f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.{field}={value}" for field, value in flags.items()]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["problems"]["count"] == 4
