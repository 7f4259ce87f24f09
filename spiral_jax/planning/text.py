"""A plan as text: every program, what to change, a step at its best."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.model import hf
from spiral_jax.planning.fit import Attempt, Planner
from spiral_jax.planning.inventory import Inventory, take_inventory
from spiral_jax.planning.profile import Profile
from spiral_jax.planning.settings import Overrides, PlanSettings, apply_overrides, as_flags
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import find_topology, make_mesh
from spiral_jax.planning.work import Assumptions

GIB = 2**30


def plan(
    c: ConfigDict,
    topology_name: str,
    assumed: Assumptions,
    *,
    free: float,
    most_tries: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Plans a run on the topology of that name; returns what `spiral_jax.plan --json` writes.

    Args:
      free: share of a chip's memory that must stay free.
      most_tries: changed configurations that are tried, at most.
      say: is given the text, a piece at a time: compiling a program takes minutes.

    Raises:
      ConfigError: a configuration, model or topology that cannot be planned.
    """
    settings = PlanSettings.from_config(c)
    topology = find_topology(topology_name)
    model, file = planned_model(c.model, topology.devices)
    source = "compiled"
    if not topology.devices:
        source = f"by arithmetic, nothing is compiled: {topology.missing}"
    say(f"{topology_name}: {topology.chips} x {topology.chip.name}, {source}; model: {file}")

    def take(overrides: Overrides) -> Inventory:
        changed = apply_overrides(c, overrides)
        changed_model = hf.model_config(model.arch, changed.model)
        changed_model = dataclasses.replace(changed_model, attention=model.attention)
        mesh = make_mesh(changed.mesh, topology)
        return take_inventory(changed, changed_model, mesh, topology.chip.hbm_bytes)

    def say_program(name: str) -> None:
        say(f"  {name}")

    planner = Planner(settings, take, model.arch, topology, assumed, free, say_program)
    attempts = []
    for attempt in planner.attempts(most_tries):
        attempts.append(attempt)
        say(f"{as_flags(attempt.overrides) or 'as configured'}: {attempt.verdict}")
    last = attempts[-1]
    if last.pages:
        say("\n" + pages_line(last.pages))
    for profile in last.profiles.values():
        say("\n" + "\n".join(program_lines(profile)))
    memory = chip_memory(last, topology.chip.hbm_bytes) if last.fits else None
    say("\n" + "\n".join(verdict_lines(last, topology_name, free, memory)))
    say(source_line(list(last.profiles.values())))
    return {
        "topology": topology_name,
        "chips": topology.chips,
        "chip": topology.chip.name,
        "model": pathlib.Path(file).parent.name,
        "source": "compiled" if topology.devices else "arithmetic",
        "fits": last.fits,
        "tried": [
            {"change": as_flags(attempt.overrides), "verdict": attempt.verdict}
            for attempt in attempts
        ],
        "sampler": last.pages,
        "programs": {name: profile.to_plain() for name, profile in last.profiles.items()},
        "memory_of_a_chip": memory,
        "step": last.step,
        "run": last.run,
    }


def chip_memory(last: Attempt, chip_bytes: int) -> dict[str, Any]:
    """What the fullest program of a plan that fits leaves free of a chip, in bytes: for JSON."""
    fullest = last.fullest
    return {
        "bytes": chip_bytes,
        "needed_bytes": fullest.needed,
        "free_bytes": chip_bytes - fullest.needed,
        "fullest": fullest.program.name,
    }


def pages_line(pages: dict[str, int]) -> str:
    """What the sampler has room for."""
    return (
        f"sampler: each of {pages['shards']} shards has {pages['pages']:,} pages of "
        f"{pages['page_tokens']} tokens, {pages['tokens']:,} in all, for {pages['rows']:,} rows; "
        f"up to {pages['rows_a_bundle']} rows of a group read its prompt together"
    )


def program_lines(profile: Profile) -> list[str]:
    """What a person reads of one program."""
    program, unit, line = profile.program, profile.unit, profile.roofline
    fits = "fits" if profile.fits else "DOES NOT FIT"
    source = "compiled" if profile.compiled else "estimated"
    room = f"{profile.needed / GIB:.2f} of {profile.room / GIB:.2f} GiB a chip"
    memory = ", ".join(
        f"{kind} {size / GIB:.2f}" for kind, size in profile.memory.items() if size >= 0.005 * GIB
    )
    lines = [f"{program.name}: {fits}, {room} ({source})", f"  GiB         {memory}"]
    if not profile.fits:
        return lines

    flops = f"{unit.flops / 1e12:.3f} TFLOP"
    if profile.flops_ratio:
        flops += f" = {profile.flops_ratio:.2f} x ideal"
    moved = f"{unit.hbm_bytes / 1e9:.2f} GB of HBM"
    if profile.hbm_ratio:
        moved += f" = {profile.hbm_ratio:.2f} x weights and used tokens"
    sent = ", ".join(
        f"{kind} {size / 1e9:.3f}" for kind, size in sorted(unit.sent_bytes.items()) if size
    )
    resources = ", ".join(
        f"{name} {1e3 * seconds:.2f}"
        for name, seconds in (("compute", line.compute), ("hbm", line.hbm), ("links", line.links))
    )
    return [
        *lines,
        f"  {program.unit}: {flops}; {moved}",
        f"  GB sent     {sent or 'none'}",
        f"  roofline    {1e3 * line.seconds:.2f} ms, bound by {line.bound} ({resources})",
    ]


def source_line(profiles: list[Profile]) -> str:
    """Which numbers are the compiler's, and which are arithmetic."""
    if not any(profile.compiled for profile in profiles):
        return "All numbers are arithmetic; no program was compiled."
    arithmetic = [profile.program.name for profile in profiles if not profile.compiled]
    calls = sorted({call for profile in profiles for call in profile.by_formula})
    if calls:
        arithmetic.append(f"operations and workspace of the kernels {', '.join(calls)}")
    arithmetic.append("seconds, from the chip's data sheet")
    return (
        "Memory, bytes and operations are read from the compiled programs' HLO. "
        f"By arithmetic: {'; '.join(arithmetic)}."
    )


def verdict_lines(
    last: Attempt, topology_name: str, free: float, memory: dict[str, Any] | None
) -> list[str]:
    """What to change, what stays free, a step and the run at their best.

    Args:
      memory: what `chip_memory` says; None where nothing fits.
    """
    if not last.fits:
        return [
            f"Nothing that was tried fits {topology_name} with {free:.0%} free. "
            f"Last: {last.verdict}"
        ]
    step, run = last.step, last.run
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in step["seconds"].items())
    lengths = ", ".join(
        f"{role} {tokens['prompt']} + {tokens['response']}"
        for role, tokens in step["mean_tokens"].items()
    )
    usage = step["usage_of_a_shard"]
    stated = ", ".join(f"{name} {value:g}" for name, value in step["assumptions"].items())
    return [
        f"Fits with {free:.0%} free: {as_flags(last.overrides) or 'as configured'}",
        f"Free of a chip's {memory['bytes'] / GIB:.2f} GiB: {memory['free_bytes'] / GIB:.2f} "
        f"({memory['free_bytes'] / memory['bytes']:.0%}) in the fullest program, "
        f"{memory['fullest']}",
        f"A step at its best: {step['step_seconds']:.1f} s ({phases}); "
        f"{step['sampled_tokens_per_s']:,.0f} sampled tokens/s, "
        f"decoding alone {step['sampled_tokens_per_s_decoding']:,.0f}, "
        f"training alone {step['trained_tokens_per_s_training']:,.0f} trained tokens/s",
        f"The run at its best: {run['steps']:,} steps, {run['hours']:,.2f} hours, "
        f"{run['chip_hours']:,.1f} chip-hours; evaluations, compiling and checkpoints not counted",
        f"Rows of a shard that draw at once: {usage['rows']:.0f}, bound by {usage['bound']}; each "
        f"holds {usage['pages_a_row']:.1f} pages and reads {usage['own']:.0f} tokens of its own "
        f"and {usage['prompt_read']:.0f} of prompts a token drawn.",
        f"Assumed: {stated}; mean tokens {lengths}, traces of a role uniform around their mean; "
        "every program at its roofline, verifier and host not counted.",
    ]
