"""A run of two processes, one of which gets a SIGTERM: both save, and the run goes on.

As in test_drills.py, processes are forks: here of two that have imported the program, with one fake
device each.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_pods import free_port, quick_to_compile

from benchmarks import drill
from benchmarks.nursery import Nursery
from benchmarks.orphans import workers_left

pytestmark = pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")

STEPS = 5
# The least to compile, which process 1 does at every start (JAX keeps the programs of process 0
# alone): one role of traces. A notice and a checkpoint do not know of roles.
ONE_ROLE = [*drill.FLAGS, "--config.loss.estimator=grpo"]
ONE_ROLE += ["--config.eval.problems=0"]  # an evaluation aggregates
PREEMPTED = 143  # as a process that SIGTERM has killed


class Pod:
    """Runs the drills' program in two processes at once; a context manager."""

    def __init__(self, folder):
        drill.prepare(folder)
        self.folder = folder
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment |= quick_to_compile("--xla_force_host_platform_device_count=1")
        self._nurseries = [Nursery(environment) for _ in range(2)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for nursery in self._nurseries:
            nursery.__exit__(*error)

    def run(self, workdir, faults=("", "")):
        """Both processes from their start to their end."""
        flags = [
            *ONE_ROLE,
            *drill.files_of(self.folder),
            f"--workdir={workdir}",
            f"--config.train.steps={STEPS}",
            "--config.checkpoint.every=0",  # so that a notice is the only reason to save
            "--config.task.reward=tests.small_rewards:slow_coin",
            f"--coordinator=localhost:{free_port()}",
            "--processes=2",
            f"--preempted_exit_code={PREEMPTED}",
        ]
        with ThreadPoolExecutor(2) as both:
            runs = [
                both.submit(nursery.run, [*flags, f"--process={process}"], faults[process])
                for process, nursery in enumerate(self._nurseries)
            ]
            return [run.result(timeout=300) for run in runs]


@pytest.mark.slow
def test_a_notice_to_one_of_two_processes_saves_the_same_step_in_both_and_the_run_goes_on_from_it(
    tmp_path,
):
    left_alone, preempted = tmp_path / "left_alone", tmp_path / "preempted"
    with Pod(tmp_path) as pod:
        for done in pod.run(left_alone):
            assert done.returncode == 0, done.stderr[-3000:]
        first, second = pod.run(preempted, faults=("", "update:1:TERM"))  # in the first step
        assert "fault: SIGTERM at 'update'" in second.stderr and "fault" not in first.stderr
        for done in (first, second):
            assert done.returncode == PREEMPTED, done.stderr[-3000:]
        step = int(re.search(r"preempted: saved at step (\d)", first.stdout)[1])
        assert 1 <= step == drill.saved_step(preempted) == drill.finished_steps(preempted) < STEPS
        for done in pod.run(preempted):
            assert done.returncode == 0, done.stderr[-3000:]
    # parameters, metrics and traces, to the last bit
    assert drill.differences(left_alone, preempted) == []
    assert workers_left() == 0
