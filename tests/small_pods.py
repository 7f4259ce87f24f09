"""Pods on one machine: how to start several processes with fake CPU devices of their own."""

import os
import pathlib
import socket
import subprocess
import sys

import jaxlib

ROOT = pathlib.Path(__file__).parent.parent


def quick_to_compile(xla_flags=""):
    """The environment in which XLA compiles fast for CPUs.

    That is machine code without optimisations, in one piece, by another code generator where XLA
    still has one.

    Args:
      xla_flags: others.
    """
    xla_flags += " --xla_cpu_parallel_codegen_split_count=1"
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
        xla_flags += " --xla_cpu_use_fusion_emitters=false"
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": xla_flags}


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def launch(command, processes, devices, timeout=300, only=None, env=None):
    """Runs `command` in several processes at once, each with `devices` fake devices.

    `env` may be a function of the process's number. Returns the `CompletedProcess`es in order; on a
    time-out all are killed and it raises.

    Args:
      only: numbers of those that are started; None: all `processes`.
    """
    port, started = free_port(), []
    join = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
    foreign = ("SLURM_", "TPU_")
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith(foreign)}
    inherited |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    } | quick_to_compile(f"--xla_force_host_platform_device_count={devices}")
    try:
        for process in range(processes) if only is None else only:
            flags = [*join, f"--process={process}"] if processes > 1 else []
            own = env(process) if callable(env) else env
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, *flags],
                    cwd=ROOT,
                    env=inherited | (own or {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        done = []
        for process in started:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return done
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
