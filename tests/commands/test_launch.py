"""Launch scripts: shellcheck, dry runs without the clusters' tools, manifests that fit a schema."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import jax
import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [
    *sorted(ROOT.glob("launch/*.sh")),
    *sorted(ROOT.glob("launch/*.sbatch")),
    ROOT / ".ci" / "run",
]
FLAGS = [
    "--config=configs/qwen3_4b.py",
    "--config.batch.search_lengths=((1024, 4096),)",
    "--config.prompt.system=it's",
]
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
)
JOBSET = ["launch/gke_jobset.py", "--name=spiral", "--image=registry/spiral_jax:1", "--claim=share"]


def bash(*arguments, **env):
    outside_slurm = {key: os.environ[key] for key in os.environ if not key.startswith("SLURM_")}
    settings = outside_slurm | env
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, capture_output=True, text=True, env=settings, timeout=60
    )


@pytest.fixture
def without_tools(tmp_path):
    """A PATH on which every tool of a cluster fails and notes that it was called."""
    for tool in ("gcloud", "kubectl", "srun", "sbatch", "docker"):
        (tmp_path / tool).write_text(f"#!/bin/bash\ntouch {tmp_path}/called\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    yield f"{tmp_path}:/usr/bin:/bin"
    assert not (tmp_path / "called").exists()


def commands(output):
    """The words of every printed command."""
    return [shlex.split(line[1:]) for line in output.splitlines() if line.startswith("+")]


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) > 5 and done.returncode == 0, done.stdout + done.stderr


# TPU VMs


TPU = ["launch/tpu_pod.sh", "spiral", "v5litepod-64", "us-west4-b", "/mnt/spiral/runs/4b", *FLAGS]


def trains(words):
    """The words that a worker's shell makes of a command for all workers; None if it is another."""
    command = next((word for word in words if word.startswith("--command=")), "")
    return (
        shlex.split(command.removeprefix("--command=")) if "spiral_jax.train" in command else None
    )


def test_a_dry_run_of_a_tpu_pod_prints_every_command_and_keeps_the_flags(without_tools):
    done = bash(TPU[0], "--dry_run", *TPU[1:], SHARE="10.0.0.2:/share", PATH=without_tools)
    assert done.returncode == 0, done.stderr
    create, archive, copy, install, train, delete = commands(done.stdout)
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {
        "--spot",
        "--accelerator-type=v5litepod-64",
        "--runtime-version=v2-alpha-tpuv5-lite",
    } <= set(create)
    assert archive[:2] == ["git", "archive"] and copy[4] == "scp" and "--worker=all" in copy
    assert "10.0.0.2:/share /mnt/spiral" in str(install) and "install .[tpu]" in str(install)
    expected = [
        ".venv/bin/python",
        "-m",
        "spiral_jax.train",
        "--workdir=/mnt/spiral/runs/4b",
        *FLAGS,
    ]
    assert trains(train)[-len(expected) :] == expected and "--worker=all" in train
    assert delete[3:5] == ["queued-resources", "delete"]


@pytest.mark.parametrize(
    "arguments, expected", [(TPU[1:3], "Usage"), (TPU[1:4] + FLAGS, "Usage"), (TPU[1:], "SHARE")]
)
def test_a_tpu_pod_without_its_arguments_says_what_is_missing(arguments, expected):
    done = bash(TPU[0], "--dry_run", *arguments)
    assert done.returncode != 0 and expected in done.stderr and not commands(done.stdout)


# A gcloud that notes its calls; its slice is preempted during the first training and, made again,
# lasts to the end.
GCLOUD = """#!/bin/bash
echo "$*" >> "$STATE/calls"
case "$*" in
  *tpu-vm\\ describe*) [ -f "$STATE/slice" ] && cat "$STATE/slice" ;;
  *queued-resources\\ describe*) [ -f "$STATE/slice" ] ;;
  *queued-resources\\ create*) echo READY > "$STATE/slice" ;;
  *queued-resources\\ delete*) rm "$STATE/slice" ;;
  *spiral_jax.train*)
    [ ! -f "$STATE/trained" ] || exit 0
    touch "$STATE/trained"
    echo "$AFTER" > "$STATE/slice"
    echo "$SAYS"
    [ -n "$SAYS" ] ;;
esac
"""


SAYS = "preempted: saved at step 3; the same command goes on"


@pytest.mark.parametrize(
    "after, says, restarts, made",
    [
        ("PREEMPTED", "", 3, 2),
        ("READY", "", 3, 1),
        ("PREEMPTED", SAYS, 0, 2),
        ("READY", SAYS, 0, 1),
    ],
)
def test_a_preempted_slice_is_made_again_and_a_failed_run_started_again(
    tmp_path, after, says, restarts, made
):
    for name, text in (("gcloud", GCLOUD), ("sleep", "#!/bin/bash\n"), ("git", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    state = {"STATE": str(tmp_path), "AFTER": after, "SAYS": says, "RESTARTS": str(restarts)}
    done = bash(*TPU, SHARE="10.0.0.2:/share", PATH=path, **state)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("queued-resources create") == made == calls.count("install .[tpu]")
    assert (
        calls.count("spiral_jax.train") == 2 and calls.count("queued-resources delete") == made - 1
    )


def test_a_run_that_always_fails_on_a_healthy_slice_ends(tmp_path):
    (tmp_path / "gcloud").write_text('#!/bin/bash\necho READY\n[[ "$*" != *spiral_jax.train* ]]\n')
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)
    done = bash(*TPU, SHARE="s:/s", PATH=f"{tmp_path}:{os.environ['PATH']}", RESTARTS="2")
    assert done.returncode == 1 and "again and again" in done.stderr
    assert sum(trains(words) is not None for words in commands(done.stdout)) == 3


# SLURM


def test_a_dry_run_of_slurm_prints_the_step_and_keeps_the_flags(without_tools):
    done = bash("launch/slurm_gpu.sbatch", "--dry_run", "/shared/run", *FLAGS, PATH=without_tools)
    assert done.returncode == 0, done.stderr
    (step,) = commands(done.stdout)
    assert step[0] == "srun" and "--kill-on-bad-exit=1" in step
    assert step[-6:] == [
        "spiral_jax.train",
        "--workdir=/shared/run",
        "--preempted_exit_code=143",
        *FLAGS,
    ]


@pytest.mark.parametrize("code, queued", [(0, False), (1, False), (75, False), (143, True)])
def test_slurm_queues_a_preempted_run_again_and_no_other(tmp_path, code, queued):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "venv.sh").write_text("install() { :; }\n")
    for tool, does in (("srun", f"exit {code}"), ("scontrol", f'echo "$*" > {tmp_path}/asked')):
        (tmp_path / tool).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "PATH": f"{tmp_path}:/usr/bin:/bin",
    }
    done = bash("launch/slurm_gpu.sbatch", "/shared/run", *FLAGS, **slurm)
    assert done.returncode == code, done.stderr
    asked = tmp_path / "asked"
    assert asked.exists() == queued and (not queued or asked.read_text() == "requeue 7\n")


def test_slurm_without_a_job_or_a_workdir_is_an_error():
    outside = bash("launch/slurm_gpu.sbatch", "/shared/run", *FLAGS)
    assert outside.returncode == 2 and "sbatch" in outside.stderr
    assert "Usage" in bash("launch/slurm_gpu.sbatch", "--dry_run", *FLAGS).stderr


def test_every_sbatch_option_is_one_of_sbatch():
    """With those of https://slurm.schedmd.com/sbatch.html that the script may use."""
    known = (
        "job-name nodes ntasks-per-node gpus-per-node cpus-per-task exclusive requeue open-mode "
        "output"
    )
    lines = (ROOT / "launch" / "slurm_gpu.sbatch").read_text().splitlines()
    options = [
        line.removeprefix("#SBATCH --").split("=")[0]
        for line in lines
        if line.startswith("#SBATCH")
    ]
    assert set(options) <= set(known.split()) and len(options) == len(set(options))
    assert lines[0].startswith("#!")
    assert all(line.startswith("#SBATCH") for line in lines[1 : len(options) + 1])


# Kubernetes


def manifest(*arguments, path="/usr/bin:/bin"):
    command = [sys.executable, *JOBSET, *arguments, "--", "--workdir=/mnt/spiral/r", *FLAGS]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PATH": path}, timeout=60
    )
    return done.returncode, yaml.safe_load(done.stdout), done.stderr


@pytest.mark.parametrize(
    "slice, accelerator, hosts",
    [
        ("v5e:8x8", "tpu-v5-lite-podslice", 16),
        ("v5e:2x4", "tpu-v5-lite-podslice", 2),
        ("v5p:4x4x4", "tpu-v5p-slice", 16),
        ("v6e:16x16", "tpu-v6e-slice", 64),
    ],
)
def test_a_jobset_fits_the_schema_and_its_slice(slice, accelerator, hosts, without_tools):
    code, jobset, errors = manifest("--dry_run", f"--slice={slice}", path=without_tools)
    assert code == 0, errors
    assert not list(SCHEMA.iter_errors(jobset))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == slice.split(":")[1]
    (train,) = pod["containers"]
    # ends as a failure, so that all start again
    assert train["command"][-2:] == ["spiral_jax.train", "--preempted_exit_code=143"]
    assert train["args"] == ["--workdir=/mnt/spiral/r", *FLAGS]
    mounted = {mount["name"] for mount in train["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == mounted


@pytest.mark.parametrize(
    "slice", ["v5e:4x4x4", "v5p:8x8", "v5e", "v7x:8x8", "v5e:1x1", "v5e:2x2", "v5e:3x3", "v5e:8xx8"]
)
def test_a_slice_that_there_is_not_is_an_error(slice):
    code, _, errors = manifest("--dry_run", f"--slice={slice}")
    assert code == 1 and f"--slice={slice}" in errors and "Traceback" not in errors


def test_a_name_that_kubernetes_does_not_take_is_an_error():
    code, _, errors = manifest("--dry_run", "--slice=v5e:8x8", "--name=Spiral_4B")
    assert code == 1 and "--name=Spiral_4B" in errors


def test_without_a_dry_run_the_manifest_goes_to_kubectl(tmp_path):
    (tmp_path / "kubectl").write_text(
        f'#!/bin/bash\necho "$*" > {tmp_path}/asked\ncat > {tmp_path}/applied\nexit 3\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    command = [sys.executable, *JOBSET, "--slice=v5e:4x4", "--", "--config=c.py"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=60)
    assert done.returncode == 3 and (tmp_path / "asked").read_text() == "apply -f -\n"
    assert not list(SCHEMA.iter_errors(yaml.safe_load((tmp_path / "applied").read_text())))


@pytest.mark.parametrize(
    "old, new",
    [
        ("parallelism", "paralelism"),
        ("maxRestarts: 20", "maxRestarts: many"),
        ("google.com/tpu: 4", "google.com/tpus: 4"),
        ("v1alpha2", "v1alpha1"),
    ],
)
def test_the_schema_finds_what_a_cluster_would_ignore_or_refuse(old, new):
    _, jobset, _ = manifest("--dry_run", "--slice=v5e:8x8")
    text = yaml.safe_dump(jobset)
    assert old in text and list(SCHEMA.iter_errors(yaml.safe_load(text.replace(old, new))))


# One GPU

PYTHON_THAT_FAILS_TESTS = """#!/bin/bash
echo "${*//$'\\n'/ }" >> calls
case "$*" in *pytest*) exit 1 ;; esac
"""
TIMEOUT_OF_TRAINING = """#!/bin/bash
case "$*" in *spiral_jax.train*) exit 124 ;; esac
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec "$@"
"""


@pytest.fixture
def gpu_script(tmp_path):
    """(*arguments) -> the finished script, in a checkout whose interpreter only notes its calls."""
    (tmp_path / "launch").mkdir()
    for name in ("test_gpu.sh", "venv.sh"):
        (tmp_path / "launch" / name).write_bytes((ROOT / "launch" / name).read_bytes())
    for tool, does in (("python", PYTHON_THAT_FAILS_TESTS), ("timeout", TIMEOUT_OF_TRAINING)):
        (tmp_path / tool).write_text(does)
        (tmp_path / tool).chmod(0o755)
    env = {"READY_PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    return lambda *arguments: bash(tmp_path / "launch" / "test_gpu.sh", *arguments, **env)


def test_stages_run_in_their_order_whatever_fails_and_what_failed_is_named(gpu_script, tmp_path):
    done = gpu_script("--minutes=3")
    assert done.returncode == 1
    _, kernels, tests, benchmark = (tmp_path / "calls").read_text().splitlines()
    assert "pytest" in kernels and kernels.endswith("tests/model/test_pages_gpu.py")
    assert "pytest" in tests and "tests/learner/test_train_step.py" in tests
    assert "benchmarks.one_device" in benchmark and benchmark.endswith("--minutes=3")
    failures = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, parts in zip(
        failures,
        [("kernels", "code 1"), ("tests", "code 1"), ("train", "not done after 240 s")],
        strict=True,
    ):
        assert all(part in line for part in parts)


def test_stages_may_be_chosen_and_an_unknown_one_is_an_error_with_the_usage(gpu_script, tmp_path):
    done = gpu_script("--small", "benchmark")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[-1].endswith("--small")
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    unknown = gpu_script("attention")
    assert unknown.returncode == 2 and "Usage" in unknown.stderr and "kernels" in unknown.stderr


def test_without_a_gpu_nothing_is_called_a_success():
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    env = {"READY_PYTHON": sys.executable, "JAX_PLATFORMS": "cuda,cpu"}
    done = bash("launch/test_gpu.sh", "kernels", **env)
    assert done.returncode != 0 and "JAX_PLATFORMS=cpu and --small" in done.stderr
    assert "pytest" not in done.stdout and "passed" not in done.stdout


def test_the_files_of_the_gpu_script_exist(gpu_script, tmp_path):
    gpu_script("tests")
    files = [
        word.partition("::")[0]
        for word in (tmp_path / "calls").read_text().split()
        if word.startswith("tests/")
    ]
    assert len(files) > 15 and all((ROOT / file).is_file() for file in files)
