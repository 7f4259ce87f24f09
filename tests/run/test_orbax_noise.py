"""What a full disk and a damaged checkpoint print: what we say of them, and nothing else."""

import os
import subprocess
import sys
import textwrap

import pytest

from spiral_jax.core import distributed
from spiral_jax.run.orbax_noise import in_short

CODE = """
    import pathlib, resource, signal, sys
    import jax.numpy as jnp
    from spiral_jax.run.checkpoint import Checkpoints
    from spiral_jax.run.saver import Saver

    folder = pathlib.Path(sys.argv[1])
    state = {"a": jnp.arange(100_000.0), "b": {"c": jnp.ones((300, 300))}}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(folder, 3) as checkpoints:
        saver = Saver(checkpoints, max_failures=9, wait_s=60)
        for step in (1, 2):
            saver.save(step, state, {})
            saver.settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for step in (3, 4, 5):
            saver.save(step, state, {})
            saver.settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files = [path for path in (folder / "2").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with Checkpoints(folder, 3) as checkpoints:
        checkpoints.restore_newest(state)
"""


@pytest.mark.cpu_bits("it runs in a process of its own, on CPUs")
def test_three_saves_on_a_full_disk_and_a_damaged_checkpoint_are_two_lines_each(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CODE), str(tmp_path / "c")]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # not a file: their size is limited
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2 * 3 + 2, done.stdout
    assert all("File too large" in line for line in lines[:6:2]), done.stdout
    assert "damaged" in lines[6] and lines[7].startswith("Set aside: ")


@pytest.mark.parametrize(
    "more", ["", " [os_error_code='28', tensorstore_spec='{" + 400 * "x" + "}']"]
)
def test_a_reason_is_that_of_the_first_cause_in_a_part_of_a_line(more):
    try:
        try:
            raise ValueError("OUT_OF_RANGE:\n" + "path/" * 200 + " No space left" + more)
        except ValueError as error:
            raise RuntimeError("pages\n" * 100) from error
    except RuntimeError as error:
        text = in_short(error)
    assert text.startswith("ValueError: OUT_OF_RANGE: path/") and text.endswith("No space left")
    assert len(text) < 300 and "\n" not in text


TPU = """
    import jax
    from spiral_jax.core.distributed import skip_missing_tpu
    skip_missing_tpu()
    assert jax.devices()[0].platform == "cpu"
"""


@pytest.mark.cpu_bits("where there is an accelerator it is used")
def test_a_machine_without_accelerators_says_nothing_of_a_missing_tpu():
    environment = {name: text for name, text in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", textwrap.dedent(TPU)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if distributed.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    assert done.returncode == 0 and done.stderr == "", done.stderr
