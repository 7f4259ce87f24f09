"""The package as pip installs it, run away from its checkout."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import spiral_jax
from spiral_jax.__main__ import commands

ROOT = pathlib.Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what `pip install .` installs of this package."""
    pytest.importorskip("setuptools", reason='pip install ".[test]"')
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "spiral_jax", source / "spiral_jax", ignore=without_caches)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    subprocess.run((*PIP, *offline, "--target", folder / "site", source), check=True, timeout=120)
    return folder / "site"


def run(installed, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        (sys.executable, "-m", *arguments),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_metadata_name_version_licence_and_what_requirements_txt_lists(installed):
    (found,) = importlib.metadata.distributions(name="spiral_jax", path=[str(installed)])
    assert found.version == spiral_jax.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    core = {r for r in found.requires if "extra ==" not in r}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line.split("#")[0].strip() for line in lines]
    names = {line.split(">")[0].split("[")[0] for line in listed if line}
    assert {r.split(">")[0].split("<")[0].split("[")[0] for r in core} == names
    extras = "cuda13 datasets gpu plan plan-gpu smollm2 sweep test tpu verifiers writers"
    assert sorted(found.metadata.get_all("Provides-Extra")) == extras.split()


def test_commands_run_from_any_directory(installed, tmp_path):
    listing = run(installed, tmp_path, "spiral_jax")
    assert listing.returncode == 0 and spiral_jax.__version__ in listing.stdout
    assert str(installed) in listing.stdout  # not the checkout's
    for name in ["evaluate", "export", "plan", "prepare_data", "report", "sft", "study", "train"]:
        assert f"spiral_jax.{name} " in listing.stdout and commands()[name]
    # a configuration that imports another of its folder, and a bundled model
    config = f"--config={ROOT}/configs/end_digit.py"
    checked = run(installed, tmp_path, "spiral_jax.train", config, "--dry_run=config")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "keep_tail_tokens" in checked.stdout  # the whole configuration
