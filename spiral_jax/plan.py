"""Will it fit, and how fast can it be? The programs of a run, compiled for a TPU slice that need
not exist.

    pip install -r requirements-plan.txt
    python -m spiral_jax.plan --config=configs/qwen3_4b.py --topology=v5p:4x4x4 [--json=FILE]
    [--config.mesh.tensor=2]

No TPU, no weights, no tokenizer: config.json of `model.hf_path` is enough, or its name where
spiral_jax ships the
architecture. For each program: bytes a chip by kind, operations and bytes of one unit of its work
against the ideal count, bytes sent by kind of collective, the roofline and what bounds it; from
these a whole step, at its best. What does not fit is changed, micro-batch, remat, slots, mesh,
until it does. For GPUs (h100:8, h200:8, b200:8) the same by arithmetic alone.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from spiral_jax.core import config
from spiral_jax.core.config_checks import validate
from spiral_jax.core.errors import UserError
from spiral_jax.planning.fit import Attempt, Planner, as_flags
from spiral_jax.planning.profile import Profile
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import Topology, find_topology
from spiral_jax.planning.whole_step import Assumptions

GIB = 2**30


def define_flags() -> None:
    defaults = Assumptions()
    config_flags.DEFINE_config_file("config", None, "configuration file", lock_config=True)
    flags.DEFINE_string("topology", None, "TPU slice such as v5e:8x8, or GPUs such as h100:8")
    flags.DEFINE_string("json", None, "file that gets the plan")
    flags.DEFINE_float("free", 0.1, "share of a chip's memory that must stay free", 0.0, 0.9)
    flags.DEFINE_integer("most_tries", 12, "changed configurations that are tried, at most", 1)
    flags.DEFINE_float(
        "problem_share",
        defaults.problem_share,
        "mean search prompt / prompt.max_problem_tokens",
        0,
        1,
    )
    flags.DEFINE_float(
        "response_share", defaults.response_share, "mean trace / its limit, of both roles", 0, 1
    )
    flags.DEFINE_float(
        "row_occupancy", defaults.row_occupancy, "decode rows that draw a token", 0.01, 1
    )
    flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    f = flags.FLAGS
    jax.config.update(
        "jax_platforms", "cpu"
    )  # the programs are for other devices than those of this machine
    assumed = Assumptions(f.problem_share, f.response_share, f.row_occupancy)
    try:
        report = plan(f.config, f.topology, assumed, f.free, f.most_tries)
    except UserError as error:
        sys.exit(f"error: {error}")
    if f.json:
        pathlib.Path(f.json).write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if report["fits"] else 1)


def plan(c: Any, name: str, assumed: Assumptions, free: float, most_tries: int) -> dict[str, Any]:
    """Plans `c` on the topology of that name; prints as it goes, and returns what --json writes.

    Raises:
      ConfigError: a configuration, model or topology that cannot be planned.
    """
    validate(c)
    topology, (model, where) = find_topology(name), planned_model(c)
    chip, how = (
        topology.chip,
        "compiled" if topology.devices else "by arithmetic, nothing is compiled",
    )
    print(f"{name}: {topology.chips} x {chip.name}, {how}; model: {where}", flush=True)
    tried: list[Attempt] = []
    say = lambda text: print(f"  {text}", flush=True)  # noqa: E731
    planner = Planner(model.arch, topology, assumed, free, say)
    for attempt in planner.attempts(c, most_tries):
        tried.append(attempt)
        print(f"{as_flags(attempt.overrides) or 'as configured'}: {attempt.verdict}", flush=True)
    last = tried[-1]
    for one in last.profiles.values():
        print("\n" + "\n".join(program_lines(one)), flush=True)
    print("\n" + "\n".join(verdict_lines(last, topology, free)), flush=True)
    return {
        "topology": name,
        "chips": topology.chips,
        "chip": chip.name,
        "model": pathlib.Path(where).parent.name,
        "source": "compiled" if topology.devices else "arithmetic",
        "fits": last.fits,
        "tried": [{"change": as_flags(one.overrides), "verdict": one.verdict} for one in tried],
        "programs": {key: one.to_plain() for key, one in last.profiles.items()},
        "step": last.step,
    }


def program_lines(one: Profile) -> list[str]:
    """What a person reads of one program."""
    unit, line = one.unit, one.roofline
    memory = ", ".join(
        f"{kind} {size / GIB:.2f}" for kind, size in one.memory.items() if size >= 0.005 * GIB
    )
    ratio = f" = {one.flops_ratio:.2f} x ideal" if one.flops_ratio else ""
    read = f" = {one.hbm_ratio:.2f} x weights and cache" if one.hbm_ratio else ""
    sent = (
        ", ".join(
            f"{kind} {size / 1e9:.3f}" for kind, size in sorted(unit.sent_bytes.items()) if size
        )
        or "none"
    )
    lines = [
        f"{one.program.name}: {'fits' if one.fits else 'DOES NOT FIT'}, {one.needed / GIB:.2f} of {one.room / GIB:.2f}"
        f" GiB a chip ({'compiled' if one.compiled else 'estimated'})",
        f"  GiB         {memory}",
    ]
    if one.fits:
        lines += [
            f"  {one.program.unit}: {unit.flops / 1e12:.3f} TFLOP{ratio}; {unit.hbm_bytes / 1e9:.2f} GB of HBM{read}",
            f"  GB sent     {sent}",
            f"  roofline    {1e3 * line.seconds:.2f} ms, bound by {line.bound} (compute {1e3 * line.compute:.2f}, "
            f"hbm {1e3 * line.hbm:.2f}, links {1e3 * line.links:.2f})",
        ]
    return lines


def verdict_lines(last: Attempt, topology: Topology, free: float) -> list[str]:
    """What to do, and a step at its best."""
    if not last.fits:
        return [
            f"Nothing that was tried fits {topology.name} with {free:.0%} free. Last: {last.verdict}"
        ]
    step = last.step
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in step["seconds"].items())
    lengths = ", ".join(
        f"{role} {n['prompt']} + {n['response']}" for role, n in step["mean_tokens"].items()
    )
    stated = ", ".join(f"{name} {value:g}" for name, value in step["assumptions"].items())
    return [
        f"Fits with {free:.0%} free: {as_flags(last.overrides) or 'as configured'}",
        f"A step at its best: {step['step_seconds']:.1f} s ({phases}); {step['sampled_tokens_per_s']:,.0f} sampled "
        f"tokens/s, decoding alone {step['sampled_tokens_per_s_decoding']:,.0f}, training alone "
        f"{step['trained_tokens_per_s_training']:,.0f} trained tokens/s",
        f"Assumed: {stated}; mean tokens {lengths}; every program at its roofline, verifier and host not counted.",
    ]


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
