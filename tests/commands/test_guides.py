"""The guides are tried: their commands run as they stand, in one folder and with small settings.

A fenced block of a guide says behind its language what becomes of it:

    bash tried       each command is run
    bash read        needs a network, a server, a pod or hours: flags and configuration are parsed
    python tried     is run; a following `text output` is what it prints
    python read      is compiled: test_library.py runs the like of it
    python file=F    is written to F

`text` alone is what something printed once.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from typing import NamedTuple

import pytest

from benchmarks.nursery import Nursery

pytestmark = pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = (
    "quickstart",
    "method",
    "your_data",
    "your_model",
    "evaluate",
    "clusters",
    "library",
    "reproduce",
)
STEPS = 2  # the one run here has so many, where guides speak of the default run's 40
# Of all runs here, and of the notebook: the same programs, which are compiled once.
SMALL = {
    "model.remat": "none",
    "prompt.keep_tail_tokens": 26,
    "sampling.memory": 8_000_000,  # bytes: as many pages in evaluations as in training
    "sampling.rows": 16,  # few enough for one decode program
    "sampling.chunk": 8,
    "sampling.prefill_tokens": 4096,
    "sampling.prefill_chunk": 64,
    "batch.problems": 2,
    "batch.search_lengths": ((16, 26),),
    "batch.search_groups": 2,
    "batch.aggregation_lengths": ((124, 12),),
    "batch.aggregation_groups": 8,
    "loss.logprob_chunk": 32,
    "verifier.workers": 1,
    "train.steps": STEPS,
    "optimizer.lr": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "eval.problems": 4,
    "eval.n": 32,
    "eval.rounds": 2,
}
DEFAULT_RUN = "python -m spiral_jax.train --config=configs/tiny.py --workdir=runs/tiny"
END_OF_BLOCK = "--- the block has ended ---"


class Block(NamedTuple):
    """A fenced block of a guide: `language mark`, or `text` alone, and what it holds."""

    language: str
    mark: str
    text: str


def blocks_of(guide: str) -> list[Block]:
    page = (DOCS / f"{guide}.md").read_text()
    found = re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", page, re.MULTILINE)
    return [Block(*block) for block in found]


def commands_of(block: Block) -> list[list[str]]:
    text = block.text.replace("\\\n", " ")
    lines = text.replace("@40", f"@{STEPS}").replace("_000040", f"_{STEPS:06}").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the guides' commands run: a checkout whose `configs/tiny.py` is small."""
    folder = tmp_path_factory.mktemp("guides")
    shutil.copytree(ROOT / "configs", folder / "configs")
    small = (
        f"\n\n_large = get_config\n\n\ndef get_config():\n    c = _large()\n    small = {SMALL}\n"
    )
    small += "    c.update_from_flattened_dict(small)\n    return c\n"
    with open(folder / "configs" / "tiny.py", "a") as file:
        file.write(small)
    for name in ("launch", "spiral_jax", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with Nursery(environment) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def run(folder, nursery):
    """words of a command -> what it has printed; the same command is run once for all guides."""
    printed = {DEFAULT_RUN: ""}

    def run(words: list[str]) -> str:
        key = shlex.join(words)
        if key not in printed:
            printed[key] = output_of(words, folder, nursery)
        return printed[key]

    return run


@pytest.fixture(scope="module")
def trained(folder, run):
    """The run of your_data; it stands for the default run too, which other guides go on with.

    Training takes most of the time here, and test_end_to_end.py starts the default run as it is.
    """
    try_commands(blocks_of("your_data"), folder, run)
    (folder / "runs" / "tiny").symlink_to("mine")


def try_commands(blocks: list[Block], folder: pathlib.Path, run: Callable[[list[str]], str]):
    for block in blocks:
        if block.mark.startswith("file="):
            (folder / block.mark.removeprefix("file=")).write_text(block.text)
        elif (block.language, block.mark) == ("bash", "tried"):
            for words in commands_of(block):
                run(words)


def output_of(words: list[str], folder: pathlib.Path, nursery: Nursery) -> str:
    if words[:2] == ["python", "-m"]:
        flags = words[3:]
        if "--config=my_config.py" in flags:
            flags = [*flags, *(f"--config.{name}={value}" for name, value in SMALL.items())]
        done = nursery.run(flags, program=words[2], folder=folder)
    elif words[0] == "python" and (folder / words[1]).parent == folder:
        done = nursery.run(words[2:], program=words[1], folder=folder)
    else:
        python = {"python": sys.executable}
        command = ["env", *(python.get(word, word) for word in words)]  # words may begin with A=B
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guides_commands_run(guide, folder, run, trained):
    try_commands(blocks_of(guide), folder, run)


def scripts() -> list[str]:
    return [g for g in GUIDES if any(b[:2] == ("python", "tried") for b in blocks_of(g))]


@pytest.mark.slow
@pytest.mark.parametrize("guide", scripts())
def test_a_guides_python_prints_what_stands_there(guide, folder, run):
    blocks, lines, expected = blocks_of(guide), [], []
    for block, following in zip(blocks, [*blocks[1:], Block("", "", "")], strict=True):
        if (block.language, block.mark) == ("python", "tried"):
            lines += [block.text, f'if __name__ == "__main__":\n    print("{END_OF_BLOCK}")\n']
            expected.append(following.text if following.mark == "output" else None)
    (folder / f"{guide}_guide.py").write_text("\n".join(lines))
    printed = run(["python", f"{guide}_guide.py"]).split(f"{END_OF_BLOCK}\n")[:-1]
    for of_block, what in zip(printed, expected, strict=True):
        assert what is None or of_block.split() == what.split()


@pytest.mark.slow
def test_the_notebook_runs(nursery):
    done = nursery.run(
        ["docs/one_step.ipynb", "--check"], program="benchmarks/notebook.py", folder=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_only_shows_can_be_read(guide, nursery):
    for block in blocks_of(guide):
        if (block.language, block.mark) == ("bash", "read"):
            for words in commands_of(block):
                read(words, nursery)
        elif block.mark == "read":
            compile(block.text, guide, "exec")


def read(words: list[str], nursery: Nursery) -> None:
    if words[:2] == ["python", "-m"]:
        done = nursery.run(words[3:], program=words[2], parse_only=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    elif words[0] == "bash":
        assert (ROOT / words[1]).exists()
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\w[\w-]*", words[2])
        assert set(named) <= extras["optional-dependencies"].keys()
    else:  # of a server, or of a model that an export has written
        assert words[0] == "transformers" or words[1].endswith("spiral_infer.py"), words


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_is_short_and_its_blocks_say_what_becomes_of_them(guide):
    assert len((DOCS / f"{guide}.md").read_text().splitlines()) <= 120  # two screens
    marks = {
        "bash": {"tried", "read"},
        "python": {"tried", "read"},
        "text": {"", "output"},
    }
    for block in blocks_of(guide):
        is_file = block.language == "python" and block.mark.startswith("file=")
        assert is_file or block.mark in marks[block.language], block
