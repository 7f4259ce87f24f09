"""docs/scaling.md from the JSON files of docs/scaling/."""

from __future__ import annotations

import json
import pathlib
from typing import Any

GIB = 2**30
HEAD = """# Will the paper's run fit, and how fast can it be?

Written by `python -m benchmarks.scaling` from the files in `docs/scaling/`: the configuration of `configs/qwen3_4b.py`
(B = 256, LoRA rank 32, 8 search and 4 x 4 aggregation traces of up to 4,096 tokens), planned by `spiral_jax.plan`.
TPUs: the real programs, compiled by libtpu for a slice that was not there; costs are read from their HLO, loops taken
as often as they run. GPUs: arithmetic alone. Nothing here was measured on an accelerator: every second is a roofline,
the least that the slowest of compute, HBM and links needs when all overlap. Numbers are those of one chip. On one H100
decoding took 1.9 times that and prefill 3 times, of the one shape that was measured (one_device.json).
`python -m spiral_jax.plan --config=configs/qwen3_4b.py --topology=MACHINE` says the same with the flags given below.

Assumed for a step: mean problem of 256 tokens, mean traces of 2,048, half of the problems kept, 80 % of decode rows
busy. Verifier and host are not counted.

What lies on a chip of a mesh (data, fsdp, tensor) beside a program's own memory, by arithmetic: the frozen base,
4,022,468,096 parameters of 2 bytes over fsdp x tensor; adapters, 66,060,288 of 4 bytes, and twice that for Adam, over
fsdp on their side of width D and over tensor on a side that is cut by heads or columns; and while traces are sampled
the decode copy, base, adapters and a transposed head of 388,956,160, 2 bytes each, over tensor, and keys and values,
147,456 bytes a token over all chips.
"Padding" is what the compiled program's arguments take beyond that, "activations" what the remat policy keeps.
"""


def table(directory: pathlib.Path) -> str:
    """All sections; a plan that is not there yet is said to be missing."""
    plans = {}
    for name in ("v5e_8x8", "v6e_8x8", "v5p_4x4x4", "h100_8", "h200_8"):
        file = directory / f"{name}.json"
        plans[name] = json.loads(file.read_text()) if file.exists() else None
    parts = [HEAD, "## A step at its best", "", *_steps(plans), "", "## Programs", ""]
    for plan in filter(None, plans.values()):
        parts += _programs(plan)
    weak = directory / "weak.json"
    parts += ["## Bars", "", *_bars(plans)]
    parts += (
        _weak(json.loads(weak.read_text()))
        if weak.exists()
        else ["- Weak scaling: not compiled yet."]
    )
    return "\n".join(parts).rstrip() + "\n"


def _steps(plans: dict[str, Any]) -> list[str]:
    lines = [
        "| machine | source | fits with 10 % free | fullest program | prefill s | decode s | train s | step s | "
        "sampled tokens/s | trained tokens/s, training alone |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, plan in plans.items():
        if plan is None:
            lines.append(f"| {name.replace('_', ':')} | not compiled yet |  |  |  |  |  |  |  |  |")
            continue
        fullest = max(plan["programs"].values(), key=lambda one: one["needed_bytes"])
        need = f"{fullest['program'].split(',')[0]}, {fullest['needed_bytes'] / GIB:.1f} GiB"
        start = f"| {plan['topology']} | {plan['source']} | {'yes' if plan['fits'] else 'no'} | {need} |"
        step = plan["step"]
        if step is None:
            lines.append(f"{start} | | | | | |")
            continue
        seconds = step["seconds"]
        lines.append(
            f"{start} {seconds['prefill']:.0f} | {seconds['decode']:.0f} | {seconds['train']:.0f} | "
            f"{step['step_seconds']:.0f} | {step['sampled_tokens_per_s']:,.0f} | "
            f"{step['trained_tokens_per_s_training']:,.0f} |"
        )
    return lines


def _programs(plan: dict[str, Any]) -> list[str]:
    stamp = f"{plan['machine']}, commit {plan['commit']}"
    lines = [
        f"### {plan['topology']} ({plan['source']}; {stamp})",
        "",
        f"`{plan['flags']}`",
        "",
        "| program | GiB by kind | GiB | unit | TFLOP | / ideal | HBM GB | sent GB | ms | bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in plan["programs"].values():
        kinds = ", ".join(
            f"{kind} {size / GIB:.1f}"
            for kind, size in one["memory_bytes"].items()
            if size > 0.05 * GIB
        )
        sent = (
            ", ".join(
                f"{kind} {size / 1e9:.2f}" for kind, size in one["sent_bytes"].items() if size > 5e6
            )
            or "-"
        )
        ratio = f"{one['flops_over_ideal']:.2f}" if one["flops_over_ideal"] else "-"
        work = f"{one['unit']} | {one['flops'] / 1e12:.2f} | {ratio} | {one['hbm_bytes'] / 1e9:.1f} | {sent}"
        lines.append(
            f"| {one['program']} | {kinds} | {one['needed_bytes'] / GIB:.1f} | {work} | {1e3 * one['seconds']:.1f} | "
            f"{one['bound']} |"
        )
    return [*lines, ""]


def _bars(plans: dict[str, Any]) -> list[str]:
    """Each bar with what was found; "missed" where it is."""
    compiled = [plan for plan in plans.values() if plan and plan["source"] == "compiled"]
    if not compiled:
        return ["Nothing was compiled yet."]
    lines = []
    for plan in compiled:
        train = [
            one
            for name, one in plan["programs"].items()
            if name.startswith("train") and one["flops_over_ideal"]
        ]
        worst = max(one["flops_over_ideal"] for one in train)
        lines.append(f"- {plan['topology']}, operations of a micro-batch at most 1.15 x ideal for its remat policy: "
                     f"at most {worst:.3f}, {_met(worst <= 1.15)}.")  # fmt: skip
        found = sorted({array for one in train for array in one["forbidden_arrays"]})
        checked = [f"{one['program']}: {', '.join(one['checked_for'])}" for one in train]
        lines.append(f"- {plan['topology']}, no whole logits [.., T, V] and no whole scores [.., P, P]: "
                     f"{', '.join(found) or 'none found'}, {_met(not found)}. "
                     f"Looked for in {'; '.join(checked)}.")  # fmt: skip
        padding = max(
            one["memory_bytes"].get("padding", 0) / _resident(one)
            for one in plan["programs"].values()
        )
        lines.append(f"- {plan['topology']}, state within 5 % of the arithmetic of shapes and shardings: "
                     f"{padding:.1%} above it at most, {_met(padding <= 0.05)}.")  # fmt: skip
    if plan := plans["v5e_8x8"]:
        why = "" if plan["fits"] else f" ({plan['tried'][0]['verdict']})"
        lines.append(f"- The paper's batch fits v5e:8x8 with 10 % free: {_met(plan['fits'])}{why}.")
    return lines


def _resident(one: dict[str, Any]) -> int:
    """Bytes of what lies there by arithmetic: the program's own left out."""
    own = ("activations", "temporaries", "results", "padding")
    return sum(size for kind, size in one["memory_bytes"].items() if kind not in own)


def _weak(weak: dict[str, Any]) -> list[str]:
    slices = weak["slices"]
    sent = [sum(one["sent_bytes"].values()) for one in slices]
    spread = max(sent) / min(sent) - 1
    lines = [
        f"- Bytes sent a chip at constant work a chip, v5e of {slices[0]['chips']} to {slices[-1]['chips']} chips, "
        f"flat within 10 %: {spread:.1%} apart, {_met(spread <= 0.1)}.",
        "",
        "The train step on search groups of 1,024 + 8 x 1,024 tokens, one for each 4 chips; mesh (chips / 16, 4, 4):",
        "",
        "| chips | TFLOP | GB sent | of that all-gather | all-reduce | other | ms | bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one, total in zip(slices, sent, strict=True):
        gather, reduce = (one["sent_bytes"].get(kind, 0.0) for kind in ("all-gather", "all-reduce"))
        kinds = " | ".join(
            f"{size / 1e9:.3f}" for size in (total, gather, reduce, total - gather - reduce)
        )
        lines.append(
            f"| {one['chips']} | {one['flops'] / 1e12:.2f} | {kinds} | {1e3 * one['seconds']:.1f} | {one['bound']} |"
        )
    return lines


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
