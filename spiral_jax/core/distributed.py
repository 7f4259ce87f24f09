"""Several processes that run as one: their start, what they tell each other, their common end.

Every process makes the same calls in the same order on the same values. What only one host knows
(its verdicts, the files of the run) goes through `gather` or `from_first` before anything depends
on it. Small values travel over jax's coordination service and not over the devices, so that a host
that does not come is an error with its number.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import flags
from jax._src.distributed import global_state  # the coordination service has no public name
from jax.sharding import Mesh

from spiral_jax.core.errors import UserError

# the slowest host may be behind by this: compiling, or verifying hard answers
EXCHANGE_TIMEOUT_S = 1800
_POLL_S = 1.0  # between two looks at whether another process has failed
_FAILURE = "spiral_jax/failure"  # key under which the first process that fails says why
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # there is a TPU in this machine
# Without one of these in /dev no driver of an accelerator works.
_ACCELERATORS = ("accel*", "vfio/*", "nvidia*", "dxg", "kfd")
# of exchanges: the same on all processes, since all make the same calls in the same order
_numbers = itertools.count()

T = TypeVar("T")


class DistributedError(UserError):
    """Processes do not find each other, or do not do the same; the message says who waited."""


def define_flags() -> None:
    """The flags of `session`; without them a cluster's environment says what they would."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT where process 0 can be reached by all processes"
    )
    flags.DEFINE_integer(
        "processes", None, "number of processes; 1: alone, whatever the environment says"
    )
    flags.DEFINE_integer("process", None, "number of this process, from 0")
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all processes at the start")


@contextlib.contextmanager
def session(given: flags.FlagValues) -> Iterator[None]:
    """All processes of a run as one, from the first call of jax until all have ended.

    An exception that leaves the block ends this process and then all others, each with the message
    on stderr. For a single process nothing happens.

    Args:
      given: the flags of `define_flags`.

    Raises:
      DistributedError: see `start`.
    """
    if not start(given.coordinator, given.processes, given.process, given.start_timeout):
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_end_with_the_others, args=(ended,), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        _end_all(error)
    ended.set()
    watch.join()
    jax.distributed.shutdown()


def start(
    coordinator: str | None, processes: int | None, process: int | None, timeout_s: int
) -> bool:
    """Connects this process with the others of its run. Before any other call of jax.

    Args:
      coordinator, processes, process: the flags; all three, or none where the environment says them
        or there is one process, which connects with nobody.
      timeout_s: how long to wait for the others.

    Returns:
      whether jax was initialised for several processes.

    Raises:
      DistributedError: one of the flags lacks the others or has a value that cannot be, or jax
        cannot read the environment. Processes that do not come within `timeout_s` end this one with
        a message: jax's own timeout would abort it with a stack trace of C++.
    """
    named = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if processes == 1 and process in (None, 0):
        return False
    arguments: dict[str, Any]
    if any(value is not None for value in named.values()):
        _check_flags(named)
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
        others = f"{processes} processes at --coordinator={coordinator}, itself number {process}"
    else:
        cluster = detect_cluster()
        if cluster is None:
            return False
        arguments = {"local_device_ids": _slurm_devices() if "SLURM" in cluster else None}
        others = f"the processes that the environment describes ({cluster})"

    late = (
        f"after --start_timeout={timeout_s} s this process still waited for {others}. Do all of "
        "them run, with the same --coordinator and --processes, each with its own --process? Can "
        "they reach that port?"
    )
    alarm = threading.Timer(timeout_s, _end, [late])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout_s + 60,
            # the others wait while process 0 draws its pictures
            shutdown_timeout_seconds=EXCHANGE_TIMEOUT_S,
        )
    except Exception as error:  # of the cluster's detection, of the metadata server
        raise DistributedError(
            f"jax cannot join {others}: {type(error).__name__}: {error}. Give --coordinator, "
            "--processes and --process, or --processes=1 to run this process alone."
        ) from error
    finally:
        alarm.cancel()
    return True


def detect_cluster() -> str | None:
    """The cluster whose environment describes several processes, with the variable that says so.

    jax itself then reads addresses and numbers from it. A TPU VM counts always: only its metadata
    know the others. None: there is no such environment.
    """
    e = os.environ
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= e.keys():
        tasks = int(e.get("SLURM_NTASKS", 1))
        return f"SLURM: SLURM_NTASKS={tasks}" if tasks > 1 else None
    if "tpu" in e.get("JAX_PLATFORMS", "tpu") and find_spec("libtpu"):
        hosts, slices = e.get("TPU_WORKER_HOSTNAMES", ""), int(e.get("MEGASCALE_NUM_SLICES", 1))
        if "," in hosts or slices > 1:
            return f"GKE: TPU_WORKER_HOSTNAMES={hosts}, {slices} slices"
        has_tpu = any(Path(device).exists() for device in _TPU_DEVICES)
        if has_tpu and not hosts and "TPU_SKIP_MDS_QUERY" not in e:
            return "TPU VM: its metadata server"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= e.keys():
        return f"Kubernetes: an indexed Job, JOB_COMPLETION_INDEX={e['JOB_COMPLETION_INDEX']}"
    return None


def skip_missing_tpu() -> None:
    """Has jax look for no TPU on a machine without accelerators; before any other call of jax.

    libtpu, where it is installed, says in five lines that it finds none.
    """
    if os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or not find_spec("libtpu"):
        return
    if not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS):
        jax.config.update("jax_platforms", "cpu")


def announce(mesh: Mesh) -> None:
    """Prints this process's first line, which is the last one of all processes but the first.

    What each would print is the same; errors of all still go to stderr.
    """
    local = jax.local_devices()
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{len(local)} of {jax.device_count()} devices, "
        f"{local[0].platform} ({local[0].device_kind}), mesh {shape}",
        flush=True,
    )
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def is_first() -> bool:
    """Whether this is process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def gather(value: Any, timeout_s: float = EXCHANGE_TIMEOUT_S) -> list[Any]:
    """The values of all processes, in their order.

    A collective: all processes call it, in the same order, on their main thread.

    Args:
      value: JSON types.

    Raises:
      DistributedError: a process did not come within `timeout_s`; the message names it.
    """
    if jax.process_count() == 1:
        return [value]
    client, me, number = global_state.client, jax.process_index(), next(_numbers)
    client.key_value_set(_key(number, me), json.dumps(value))
    try:
        client.wait_at_barrier(f"spiral_jax/all_there/{number}", int(1000 * timeout_s))
    except Exception as error:  # of jaxlib; no name of its own
        raise DistributedError(
            f"process {me} waited {timeout_s:g} s for all {jax.process_count()} processes at "
            f"exchange {number}; some hang or have ended: {error}"
        ) from error
    if number:  # all have come this far, so all have read the exchange before
        client.key_value_delete(_key(number - 1, me))
    texts = {}
    for key, text in client.key_value_dir_get(_key(number, "")):
        texts[int(key.rsplit("/", 1)[1])] = text
    return [json.loads(texts[process]) for process in range(jax.process_count())]


def from_first(read: Callable[[], T]) -> T:
    """What `read` returns on process 0, JSON types. A collective, as `gather`."""
    return gather(read() if is_first() else None)[0]


def check_equal(**values: str) -> None:
    """Checks that all processes were started with the same. A collective, as `gather`.

    Raises:
      DistributedError: a value differs; the message names it and who has which.
    """
    everywhere = gather(values)
    for name in values:
        holders: dict[str, list[int]] = {}
        for process, theirs in enumerate(everywhere):
            holders.setdefault(theirs[name], []).append(process)
        if len(holders) > 1:
            parts = [f"{value[:12]} on {processes}" for value, processes in holders.items()]
            stated = "; ".join(parts)
            raise DistributedError(
                f"the processes were not started with the same {name}: {stated}."
            )


def share(count: int) -> range:
    """The part of `count` items that this process works on: every n-th of them."""
    return range(jax.process_index(), count, jax.process_count())


def unite(shares: Sequence[Sequence[T]]) -> list[T]:
    """The items in order, from what each process made of its `share`."""
    items: list[T] = [None] * sum(map(len, shares))
    for process, part in enumerate(shares):
        items[process :: len(shares)] = part
    return items


def _key(number: int, process: int | str) -> str:
    return f"spiral_jax/exchange/{number}/{process}"


def _check_flags(named: dict[str, Any]) -> None:
    missing = [name for name, value in named.items() if value is None]
    stated = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
    if missing:
        raise DistributedError(
            f"{stated}: {', '.join(missing)} is missing. Give all three, or none where the "
            "environment (TPU VM, GKE, SLURM, an indexed Kubernetes Job) says them."
        )
    host, _, port = named["--coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DistributedError(
            f"--coordinator={named['--coordinator']}: must be HOST:PORT, a port below 65536."
        )
    if named["--processes"] < 1 or not 0 <= named["--process"] < named["--processes"]:
        raise DistributedError(f"{stated}: --process must be between 0 and --processes - 1.")


def _slurm_devices() -> list[int] | None:
    """All GPUs of a node for the only process on it; None: jax gives each of several its own."""
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdecimal() else None


def _end_all(error: BaseException) -> None:
    """Ends this process, and tells the others why, unless one of them has failed first."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    said = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    own = f"process {jax.process_index()} of {jax.process_count()}: {said}"
    _say(own)  # before the service is asked, which may have ended and then aborts whoever asks
    if (first := _failure()) is not None:
        _end(f"the first to fail was {first}")
    with contextlib.suppress(Exception):  # another process was quicker
        global_state.client.key_value_set(_FAILURE, own)
    _end()


def _end_with_the_others(ended: threading.Event) -> None:
    while not ended.wait(_POLL_S):
        if (first := _failure()) is not None:
            _end(first)


def _failure() -> str | None:
    """Why the first process failed; None: none has."""
    try:
        return global_state.client.key_value_try_get(_FAILURE)
    except Exception:  # jaxlib's for a key that is not there
        return None


def _end(message: str | None = None) -> None:
    """Ends this process without clean-up.

    Checkpoints and devices would wait for processes that are gone.
    """
    if message is not None:
        _say(message)
    sys.stdout.flush()
    if global_state.service is not None:  # process 0 has it, and the others read there why
        time.sleep(3 * _POLL_S)
    os._exit(1)


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
