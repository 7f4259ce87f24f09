"""A reward function that does what the text says, and how its processes are watched."""

import os
import pathlib
import time

import psutil

from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

# A user's reward function that does what the text says. In the test's own process its import has no
# side effects.
REWARD_MODULE = r"""
import os, pathlib, subprocess, sys, time

ITEMS = 0

def reward(text, problem):
    global ITEMS
    ITEMS += 1
    command, _, argument = text.partition(" ")
    if command == "return":
        return eval(argument)
    if command == "raise":
        raise ValueError(argument)
    if command == "die":
        os._exit(3)
    if command == "sleep":
        time.sleep(float(argument))
        return True
    if command == "hang_once_used":
        while ITEMS > 1:
            time.sleep(0.01)
        return True
    if command == "wait_for":
        while not pathlib.Path(argument).exists():
            time.sleep(0.01)
        return True
    if command == "touch":
        pathlib.Path(argument).touch()
        return False
    if command == "hang_first_time":  # leaves its process id
        if pathlib.Path(argument).exists():
            return True
        part = pathlib.Path(argument + ".part")
        part.write_text(str(os.getpid()))
        part.rename(argument)
        time.sleep(1000)
    if command == "child":
        child = subprocess.Popen(["sleep", "1000"])
        pathlib.Path(argument).write_text(str(child.pid))
        return True
    if command == "modules":
        # pytest: the program that started it
        return not {"jax", "flax", "numpy", "pytest"} & set(sys.modules)
    if command == "environment":
        return dict(os.environ).get(argument) == "seen"
    if command == "print":
        print(argument, end="")
        print("to stderr", file=sys.stderr)
        return True
    if command == "allocate":
        return len(bytearray(int(argument))) > 0
    if command == "echo":
        return text == "echo " + problem.answer and problem.metadata == {"x": [1, None]}
"""


def problem(answer="42", name="p"):
    return Problem(name, "?", answer)


def make_verifier(reward, workers=1, timeout_s=20.0, **settings):
    return Verifier(reward, VerifierSettings(workers, timeout_s, **settings))


def worker_pids(parent=None):
    """Process ids of the verifier's child processes that a process, by default this one, has."""
    pids = []
    for child in psutil.Process(parent).children():
        try:
            if any("pool.serve()" in word for word in child.cmdline()):
                pids.append(child.pid)
        except psutil.Error:  # it has just ended
            continue
    return pids


def statuses(verdicts):
    return [verdict.status.value for verdict in verdicts]


def alive(pid):
    """Whether a process runs; on Linux, a zombie that nobody has collected yet does not."""
    try:
        os.kill(pid, 0)
        return ") Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # no /proc, or it has just ended
        return not pathlib.Path("/proc/self/stat").exists()


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen")
