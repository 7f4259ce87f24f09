"""The guides are tried: their commands run as they stand, in one folder and with small settings.

A fenced block of a guide says behind its language what becomes of it:

    bash tried       each command is run
    bash read        needs a network, a server, a pod or hours: flags and configuration are parsed
    python tried     is run; a following `text output` is what it prints
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
from typing import NamedTuple

import pytest
from small_pods import QUICK_TO_COMPILE

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
STEPS = "2"  # a checkpoint that a guide names by the default run's 40 steps is of so many here
# Of all runs here, and of the notebook: the same programs, which are compiled once.
SMALL = {
    "model.remat": "none",
    "prompt.keep_tail_tokens": 26,
    "sampling.rows": 32,
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
    "train.steps": int(STEPS),
    "optimizer.lr": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "eval.problems": 4,
    "eval.n": 32,
    "eval.rounds": 2,
}
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
    lines = block.text.replace("\\\n", " ").replace("@40", f"@{STEPS}").splitlines()
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
        "XLA_FLAGS": QUICK_TO_COMPILE,
    }
    with Nursery(environment) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def run(folder, nursery):
    """words of a command -> what it has printed; the same command is run once for all guides."""
    printed = {}

    def run(words: list[str]) -> str:
        key = " ".join(words)
        if key not in printed:
            printed[key] = output_of(words, folder, nursery)
        return printed[key]

    return run


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
        line = shlex.join([python.get(word, word) for word in words])
        done = subprocess.run(
            ["bash", "-c", re.sub(r"^'?(\w+=[^' ]+)'?", r"\1", line)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(run):
    """The run that other guides go on with."""
    for block in blocks_of("quickstart"):
        if (block.language, block.mark) == ("bash", "tried"):
            for words in commands_of(block):
                run(words)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guides_commands_run(guide, folder, run, quickstart):
    for block in blocks_of(guide):
        if block.mark.startswith("file="):
            (folder / block.mark.removeprefix("file=")).write_text(block.text)
        elif (block.language, block.mark) == ("bash", "tried"):
            for words in commands_of(block):
                run(words)


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
def test_every_block_of_a_guide_says_what_becomes_of_it(guide):
    marks = {
        "bash": {"tried", "read"},
        "python": {"tried"},
        "text": {"", "output"},
    }
    for block in blocks_of(guide):
        is_file = block.language == "python" and block.mark.startswith("file=")
        assert is_file or block.mark in marks[block.language], block
