"""Will it fit, and how fast can it be? The programs of a run, compiled for machines not there.

    pip install ".[plan]"  (TPUs; for GPUs ".[plan-gpu]")
    python -m spiral_jax.plan --config=configs/qwen3_4b.py --topology=v5p:4x4x4 [--json=FILE]
        [--config.mesh.tensor=2]

No TPU, no weights, no tokenizer: config.json of `model.hf_path` is enough, or its name where
spiral_jax ships the architecture. For each program: bytes a chip by kind, operations and bytes of
one unit of its work against the ideal count, bytes sent by kind of collective, the roofline and
what bounds it; from these a whole step, and the run in hours and chip-hours, at their best; and
what of a chip's memory stays free. What does not fit is changed (micro-batch, remat, memory for
pages, mesh) until it does. Programs for TPUs are compiled by libtpu, those for GPUs (h100:8,
h200:8, b200:8, rtx4090:1) by jax's CUDA plugin; without it all is by arithmetic alone, and the plan
says so.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
from absl import flags
from ml_collections import config_flags

from spiral_jax.core.command import run_command
from spiral_jax.core.config import require_whole
from spiral_jax.core.errors import UserError
from spiral_jax.planning.text import plan
from spiral_jax.planning.work import Assumptions


def define_flags() -> None:
    defaults = Assumptions()
    config_flags.DEFINE_config_file("config", None, "configuration file", lock_config=True)
    flags.DEFINE_string("topology", None, "TPU slice such as v5e:8x8, or GPUs such as h100:8")
    flags.DEFINE_string("json", None, "file that gets the plan")
    flags.DEFINE_float("free", 0.1, "share of a chip's memory that must stay free", 0.0, 0.9)
    flags.DEFINE_integer("most_tries", 12, "changed configurations that are tried, at most", 1)
    shares = (
        ("problem_share", "mean search prompt / prompt.max_problem_tokens", 0),
        ("response_share", "mean trace / its limit, of both roles", 0),
        ("row_occupancy", "decode rows that draw a token, if pages allow", 0.01),
    )
    for name, meaning, least in shares:
        flags.DEFINE_float(name, getattr(defaults, name), meaning, least, 1)
    flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    f = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # the programs are for other devices than ours
    try:
        require_whole(f.config)
        report = plan(
            f.config,
            f.topology,
            Assumptions(f.problem_share, f.response_share, f.row_occupancy),
            free=f.free,
            most_tries=f.most_tries,
            say=say,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    if f.json:
        pathlib.Path(f.json).write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["fits"] else 1)


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    define_flags()
    run_command(main)
