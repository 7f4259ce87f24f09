"""What test files share: devices, how programs are compiled, checkpoints that transformers wrote.

Tests run on CPUs unless JAX_PLATFORMS says otherwise; launch/test_gpu.sh runs some on a GPU.
"""

import functools
import os
import sys

from small_pods import quick_to_compile  # this one does not import jax

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On CPUs most programs are compiled for one small run. Accelerators multiply float32 matrices in
# TF32 or bfloat16 unless they are asked for float32, and test oracles do not ask. Processes that
# tests start inherit it.
if os.environ["JAX_PLATFORMS"].startswith("cpu"):
    os.environ |= quick_to_compile(os.environ.get("XLA_FLAGS", ""))
else:
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import pytest
from ml_collections import ConfigDict
from small_verifier import REWARD_MODULE

from benchmarks.family_cases import FIELDS, randomise
from spiral_jax.core.mesh import make_mesh

LONGEST_FIRST = ("commands", "run", "sampling", "learner", "model", "planning")


def pytest_addoption(parser):
    parser.addoption(
        "--at_once", action="store_true", help="print each failure as soon as its test has ended"
    )


@pytest.hookimpl(trylast=True)  # when the terminal is there
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("at_once") and terminal:  # a worker of xdist has no terminal
        config.pluginmanager.register(FailuresAtOnce(terminal))


class FailuresAtOnce:
    """A run that is cut off has then shown what failed."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.section(f"{report.when} of {report.nodeid}", sep="_")
            self.terminal.write_line(report.longreprtext)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self, session):
        session.config.option.tbstyle = "no"  # once is enough


def pytest_collection_modifyitems(items):
    """Rooms whose files take long come first: of two processes, neither then waits at the end."""

    def place(item):
        room = item.path.parent.name
        return LONGEST_FIRST.index(room) if room in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)
    for item in items:
        about = item.get_closest_marker("cpu_bits")
        if about and jax.default_backend() != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"about CPUs: {about.args[0]}"))


@pytest.fixture(scope="session")
def mesh():
    """The mesh of all devices: 2 x 2 x 2 in a process with 8 of them, 1 x 1 x 1 with one."""
    cut = 2 if jax.device_count() % 8 == 0 else 1
    return make_mesh(ConfigDict({"data": -1, "fsdp": cut, "tensor": cut}))


@pytest.fixture(scope="session")
def qwen3_checkpoint(tmp_path_factory):
    """(shard="5GB", **fields) -> (directory, transformers' random model).

    Files are of at most `shard`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    @functools.cache
    def make(shard="5GB", **fields):
        model = randomise(Qwen3ForCausalLM(Qwen3Config(**(FIELDS | fields))))
        directory = tmp_path_factory.mktemp("qwen3")
        model.save_pretrained(directory, max_shard_size=shard)
        return directory, model

    return make


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory):
    """The same for Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    @functools.cache
    def make(shard="5GB", **fields):
        model = randomise(LlamaForCausalLM(LlamaConfig(**(FIELDS | fields))))
        directory = tmp_path_factory.mktemp("llama")
        model.save_pretrained(directory, max_shard_size=shard)
        return directory, model

    return make


@pytest.fixture
def reward_path(tmp_path, monkeypatch):
    """Name of `small_verifier.REWARD_MODULE`'s function, for `task.reward`."""
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("verifier_test_reward", None)
    (tmp_path / "verifier_test_reward.py").write_text(REWARD_MODULE)
    yield "verifier_test_reward:reward"
    sys.modules.pop("verifier_test_reward", None)
