"""Processes that find each other, tell each other what one knows, and end with one message."""

import json
import os

import jax
import pytest
from small_pods import launch

from spiral_jax.core import distributed
from spiral_jax.core.distributed import DistributedError, detect_cluster, start

ON_CPUS = pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")

WORKER = ["-m", "tests.pod_worker"]


@pytest.fixture
def clean(monkeypatch):
    """No cluster's environment; the list holds what `jax.distributed.initialize` is asked."""
    prefixes = ("SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_PLATFORMS")
    for name in list(os.environ):
        if name.startswith(prefixes):
            monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "_TPU_DEVICES", ())
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
    return asked


def setenv(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_without_flags_and_cluster_a_process_is_alone_and_asks_nobody(clean):
    assert start(None, None, None, 5) is False and detect_cluster() is None and not clean


def test_one_process_is_alone_whatever_the_environment_says(clean, monkeypatch):
    setenv(monkeypatch, **SLURM, SLURM_NTASKS="16")
    assert start(None, 1, None, 5) is False and start("localhost:1", 1, 0, 5) is False and not clean


def test_flags_go_to_jax_as_they_are_and_nothing_is_detected(clean, monkeypatch):
    setenv(monkeypatch, **SLURM, SLURM_NTASKS="16")
    assert start("host-0:1234", 4, 3, 17)
    (asked,) = clean
    assert asked == {
        "coordinator_address": "host-0:1234",
        "num_processes": 4,
        "process_id": 3,
        "initialization_timeout": 77,
        "cluster_detection_method": "deactivate",
        "shutdown_timeout_seconds": distributed.EXCHANGE_TIMEOUT_S,
    }


@pytest.mark.parametrize(
    "flags, parts",
    [
        (
            ("h:1", 2, None),
            ["--coordinator=h:1, --processes=2", "--process is missing", "all three"],
        ),
        ((None, None, 0), ["--process=0", "--coordinator, --processes is missing"]),
        (("h", 2, 0), ["--coordinator=h: must be HOST:PORT"]),
        ((":80", 2, 0), ["must be HOST:PORT"]),
        (("h:70000", 2, 0), ["below 65536"]),
        (("h:1", 2, 2), ["--process must be between 0 and --processes - 1"]),
        (("h:1", 2, -1), ["--process must be between 0 and --processes - 1"]),
        (("h:1", 0, 0), ["--process must be between 0 and --processes - 1"]),
    ],
)
def test_flags_that_make_no_whole_are_an_error_that_shows_them(clean, flags, parts):
    with pytest.raises(DistributedError) as error:
        start(*flags, 5)
    assert all(part in str(error.value) for part in parts) and not clean


def test_slurm_is_joined_by_several_tasks_alone(clean, monkeypatch):
    setenv(monkeypatch, **SLURM, SLURM_NTASKS="1")
    assert not start(None, None, None, 5)
    setenv(monkeypatch, SLURM_NTASKS="2", SLURM_STEP_TASKS_PER_NODE="8(x2)", SLURM_GPUS_ON_NODE="8")
    assert detect_cluster() == "SLURM: SLURM_NTASKS=2" and start(None, None, None, 5)
    setenv(monkeypatch, SLURM_STEP_TASKS_PER_NODE="1(x2)")
    assert start(None, None, None, 5)
    # jax gives each of several tasks on a node one GPU; the only one has all
    assert [asked["local_device_ids"] for asked in clean] == [None, list(range(8))]


def test_tpus_are_joined_where_their_library_is(clean, monkeypatch):
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b"}
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    setenv(monkeypatch, **hosts)
    assert detect_cluster() is None
    monkeypatch.setattr(distributed, "find_spec", lambda name: name == "libtpu")
    assert detect_cluster() == "GKE: TPU_WORKER_HOSTNAMES=a,b, 1 slices"
    setenv(monkeypatch, TPU_WORKER_HOSTNAMES="a")
    assert detect_cluster() is None  # one host
    setenv(monkeypatch, MEGASCALE_NUM_SLICES="2")
    assert "2 slices" in detect_cluster()
    monkeypatch.delenv("MEGASCALE_NUM_SLICES")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    assert detect_cluster() is None  # the library alone: a machine that plans
    monkeypatch.setattr(distributed, "_TPU_DEVICES", ("/dev/null",))
    assert detect_cluster() == "TPU VM: its metadata server"
    setenv(monkeypatch, JAX_PLATFORMS="cpu")
    assert detect_cluster() is None


def test_an_indexed_job_of_kubernetes_is_joined(clean, monkeypatch):
    setenv(monkeypatch, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert detect_cluster() is None  # any pod
    setenv(monkeypatch, JOB_COMPLETION_INDEX="3")
    assert detect_cluster().startswith("Kubernetes")
    assert start(None, None, None, 5) and clean[0]["local_device_ids"] is None


def test_what_jax_could_not_find_is_named(clean, monkeypatch):
    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")

    setenv(monkeypatch, KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        DistributedError, match="Kubernetes.*coordinator_address should be.*--processes=1"
    ):
        start(None, None, None, 5)


def test_alone_everything_is_the_own_value():
    assert distributed.is_first() and distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.from_first(lambda: 5) == 5 and distributed.share(4) == range(4)
    distributed.check_equal(config="x")


@pytest.mark.parametrize("count, processes", [(0, 1), (7, 1), (0, 3), (2, 3), (7, 3), (9, 3)])
def test_shares_united_are_all_items_in_order(count, processes):
    shares = [list(range(process, count, processes)) for process in range(processes)]
    assert distributed.unite(shares) == list(range(count))


@ON_CPUS
@pytest.mark.slow
def test_a_process_that_nobody_joins_says_whom_it_waited_for():
    (alone,) = launch([*WORKER, "exchange", "--start_timeout=2"], 2, 1, only=[1])
    assert alone.returncode != 0
    assert (
        "2 processes at --coordinator=localhost:" in alone.stderr
        and "itself number 1" in alone.stderr
    )


@ON_CPUS
@pytest.mark.slow
def test_processes_exchange_replay_alike_and_a_checkpoint_goes_from_mesh_to_mesh(tmp_path):
    """2 x 4 devices -> 1 x 8 -> 2 x 4 cut along other axes; each process checks what it holds."""
    at = f"--directory={tmp_path / 'checkpoints'}"
    tasks = ["exchange", "replay", "checkpoint"]
    first = launch([*WORKER, *tasks, at, "--mesh=2,2,2"], 2, 4)
    assert [done.returncode for done in first] == [0, 0], first
    for process, done in enumerate(first):
        assert (
            f"process {process} of 2: 4 of 8 devices, cpu (cpu), mesh data=2, fsdp=2, tensor=2\n"
            in done.stdout
        )
    printed = [json.dumps({"done": tasks}) in done.stdout for done in first]
    assert printed == [True, False]
    (single,) = launch([*WORKER, "checkpoint", at, "--mesh=1,8,1"], 1, 8)
    assert single.returncode == 0, single
    again = launch([*WORKER, "checkpoint", at, "--mesh=1,4,2"], 2, 4)
    assert [done.returncode for done in again] == [0, 0], again
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]


@ON_CPUS
@pytest.mark.slow
def test_a_preemption_notice_to_one_process_ends_all_before_the_same_chunk():
    done = launch([*WORKER, "preempt"], 2, 1, timeout=120)
    assert [process.returncode for process in done] == [0, 0], done


@ON_CPUS
@pytest.mark.slow
@pytest.mark.parametrize(
    "task, who, message",
    [
        (
            "differ",
            (0, 1),
            "the processes were not started with the same config: of 0 on [0]; of 1 on [1]",
        ),
        ("late", (0,), "process 0 waited 1 s for all 2 processes"),
        ("fail", (1,), "process 1 of 2: the disc is full: empty it"),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_message(task, who, message):
    done = launch([*WORKER, task], 2, 1, timeout=60)
    for process in done:
        assert process.returncode == 1 and message in process.stderr, done
        assert "done" not in process.stdout
    assert not any("Traceback" in done[process].stderr for process in who)  # the message says all
