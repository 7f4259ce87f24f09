"""docs/results/scaling.md from the JSON files of docs/results/scaling/."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from benchmarks.markdown import table_lines
from spiral_jax.planning.text import pages_line

GIB = 2**30
PLANS = ("v5e_8x8", "v6e_8x8", "v5p_4x4x4", "h100_8", "h200_8")
HEAD = """# Will the paper's run fit, and how fast can it be?

Written by `python -m benchmarks.scaling` from the files in `docs/results/scaling/`: the
configuration of `configs/qwen3_4b.py` (B = 256, LoRA rank 32, 8 search and 4 x 4 aggregation traces
of up to 4,096 tokens), planned by `spiral_jax.plan`. TPUs: the real programs, compiled by libtpu
for a slice that was not there; costs are read from their HLO, loops taken as often as they run.
GPUs: arithmetic alone. Nothing here was measured on an accelerator: every second is a roofline, the
least that the slowest of compute, HBM and links needs when all overlap. Numbers are those of one
chip. On one H100 decoding with slots took 1.9 times its roofline and prefill 3 times, of the one
shape that was measured (one_device.json). `python -m spiral_jax.plan --config=configs/qwen3_4b.py
--topology=MACHINE` says the same with the flags given below.

Assumed for a step: mean problem of 256 tokens, traces of 0 to 4,096 tokens, 2,048 in the mean, half
of the problems kept, 80 % of decode rows busy. So a row that runs holds 1,365 tokens of its own,
and the rows of a group read its prompt together until they end. Verifier and host are not counted.

What lies on a chip of a mesh (data, fsdp, tensor) beside a program's own memory, by arithmetic: the
frozen base, 4,022,468,096 parameters of 2 bytes over fsdp x tensor; adapters, 66,060,288 of 4
bytes, and twice that for Adam, over fsdp on their side of width D and over tensor on a side that is
cut by heads or columns; and while traces are sampled the decode copy, base, adapters and a
transposed head of 388,956,160, 2 bytes each, over tensor, and pages of keys and values, 147,456
bytes a token over tensor. "Padding" is what the compiled program's arguments take beyond that,
"activations" what the remat policy keeps.
"""
# of a plan that was made before there were pages
_OF_SLOTS = (
    "Planned with slots, which pages have replaced: the flag `sampling.classes` is refused now. "
    "Decoding with pages is in [decode_tpu.md](decode_tpu.md)."
)


def table(directory: pathlib.Path) -> str:
    """All sections; a plan that is not there yet is said to be missing."""
    plans = {}
    for name in PLANS:
        file = directory / f"{name}.json"
        plans[name] = json.loads(file.read_text()) if file.exists() else None
    parts = [HEAD, "## A step at its best", "", *_steps(plans), "", "## Programs", ""]
    for plan in filter(None, plans.values()):
        parts += _programs(plan)
    parts += ["## Bars", "", *_bars(plans)]
    weak = directory / "weak.json"
    if weak.exists():
        parts += _weak(json.loads(weak.read_text()))
    else:
        parts.append("- Weak scaling: not compiled yet.")
    return "\n".join(parts).rstrip() + "\n"


def _steps(plans: dict[str, Any]) -> list[str]:
    heads = (
        "machine",
        "source",
        "fits with 10 % free",
        "fullest program",
        "prefill s",
        "decode s",
        "train s",
        "step s",
        "sampled tokens/s",
        "trained tokens/s, training alone",
    )
    rows = []
    for name, plan in plans.items():
        cells = [name.replace("_", ":"), "not compiled yet"] if plan is None else _step_cells(plan)
        rows.append(cells + [""] * (len(heads) - len(cells)))
    return table_lines(heads, rows)


def _step_cells(plan: dict[str, Any]) -> list[str]:
    fullest = max(plan["programs"].values(), key=lambda program: program["needed_bytes"])
    need = f"{fullest['program'].split(',')[0]}, {fullest['needed_bytes'] / GIB:.1f} GiB"
    cells = [plan["topology"], plan["source"], "yes" if plan["fits"] else "no", need]
    step = plan["step"]
    if step is None:
        return cells
    seconds = [step["seconds"][phase] for phase in ("prefill", "decode", "train")]
    return [
        *cells,
        *(f"{value:.0f}" for value in (*seconds, step["step_seconds"])),
        f"{step['sampled_tokens_per_s']:,.0f}",
        f"{step['trained_tokens_per_s_training']:,.0f}",
    ]


def _programs(plan: dict[str, Any]) -> list[str]:
    stamp = f"{plan['machine']}, commit {plan['commit']}"
    heads = (
        "program",
        "GiB by kind",
        "GiB",
        "unit",
        "TFLOP",
        "/ ideal",
        "HBM GB",
        "sent GB",
        "ms",
        "bound",
    )
    return [
        f"### {plan['topology']} ({plan['source']}; {stamp})",
        "",
        f"`{plan['flags']}`",
        "",
        pages_line(plan["sampler"]) if "sampler" in plan else _OF_SLOTS,
        "",
        *table_lines(heads, [_program_cells(program) for program in plan["programs"].values()]),
        "",
    ]


def _program_cells(program: dict[str, Any]) -> list[str]:
    memory, sent = program["memory_bytes"], program["sent_bytes"]
    ratio = program["flops_over_ideal"]
    return [
        program["program"],
        ", ".join(f"{kind} {n / GIB:.1f}" for kind, n in memory.items() if n > 0.05 * GIB),
        f"{program['needed_bytes'] / GIB:.1f}",
        program["unit"],
        f"{program['flops'] / 1e12:.2f}",
        f"{ratio:.2f}" if ratio else "-",
        f"{program['hbm_bytes'] / 1e9:.1f}",
        ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in sent.items() if n > 5e6) or "-",
        f"{1e3 * program['seconds']:.1f}",
        program["bound"],
    ]


def _bars(plans: dict[str, Any]) -> list[str]:
    """Each bar with what was seen; "missed" where it is."""
    compiled = [plan for plan in plans.values() if plan and plan["source"] == "compiled"]
    if not compiled:
        return ["Nothing was compiled yet."]
    lines = []
    for plan in compiled:
        lines += _bars_of_plan(plan)
    if plan := plans["v5e_8x8"]:
        why = "" if plan["fits"] else f" ({plan['tried'][0]['verdict']})"
        lines.append(f"- The paper's batch fits v5e:8x8 with 10 % free: {_met(plan['fits'])}{why}.")
    return lines


def _bars_of_plan(plan: dict[str, Any]) -> list[str]:
    topology, programs = plan["topology"], plan["programs"]
    training = [
        program
        for name, program in programs.items()
        if name.startswith("train") and program["flops_over_ideal"]
    ]
    worst = max(program["flops_over_ideal"] for program in training)
    arrays = sorted({array for program in training for array in program["forbidden_arrays"]})
    checked = "; ".join(f"{p['program']}: {', '.join(p['checked_for'])}" for p in training)
    padding = max(
        program["memory_bytes"].get("padding", 0) / _resident(program)
        for program in programs.values()
    )
    return [
        f"- {topology}, operations of a micro-batch at most 1.15 x ideal for its remat policy: "
        f"at most {worst:.3f}, {_met(worst <= 1.15)}.",
        f"- {topology}, no whole logits [.., T, V] and no whole scores [.., P, P]: "
        f"{', '.join(arrays) or 'none found'}, {_met(not arrays)}. Looked for in {checked}.",
        f"- {topology}, state within 5 % of the arithmetic of shapes and shardings: "
        f"{padding:.1%} above it at most, {_met(padding <= 0.05)}.",
    ]


def _resident(program: dict[str, Any]) -> int:
    """Bytes of what lies there by arithmetic: the program's own left out."""
    own = ("activations", "temporaries", "results", "padding")
    return sum(size for kind, size in program["memory_bytes"].items() if kind not in own)


def _weak(weak: dict[str, Any]) -> list[str]:
    slices = weak["slices"]
    sent = [sum(program["sent_bytes"].values()) for program in slices]
    spread = max(sent) / min(sent) - 1
    sizes = f"{slices[0]['chips']} to {slices[-1]['chips']}"
    heads = (
        "chips",
        "TFLOP",
        "GB sent",
        "of that all-gather",
        "all-reduce",
        "other",
        "ms",
        "bound",
    )
    rows = []
    for program, total in zip(slices, sent, strict=True):
        gather = program["sent_bytes"].get("all-gather", 0.0)
        reduce = program["sent_bytes"].get("all-reduce", 0.0)
        kinds = (total, gather, reduce, total - gather - reduce)
        rows.append(
            (
                program["chips"],
                f"{program['flops'] / 1e12:.2f}",
                *(f"{size / 1e9:.3f}" for size in kinds),
                f"{1e3 * program['seconds']:.1f}",
                program["bound"],
            )
        )
    return [
        f"- Bytes sent a chip at constant work a chip, v5e of {sizes} chips, flat within 10 %: "
        f"{spread:.1%} apart, {_met(spread <= 0.1)}.",
        "",
        "The train step on search groups of 1,024 + 8 x 1,024 tokens, one for each 4 chips; "
        "mesh (chips / 16, 4, 4):",
        "",
        *table_lines(heads, rows),
    ]


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
