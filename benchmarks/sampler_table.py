"""The sampler benchmark's JSON as markdown."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """One section a measured case, and one for memory."""
    sections = [case_section(*item) for item in sorted(report["cases"].items())]
    if "memory" in report:
        sections.append(memory_section(report["memory"]))
    if "draw" in report:
        sections.append(draw_section(report["draw"]))
    return "\n\n".join(["# Sampler", *sections]) + "\n"


def case_section(name: str, entry: dict[str, Any]) -> str:
    """Speed is useful tokens over wall time, prefill and drain included."""
    lines = [f"## ({name}) {entry['title']}", "", place(entry), ""]
    if not all("tokens_per_s" in row for row in entry["contestants"].values()):
        return "\n".join([*lines, "Not measured: only warm-up runs so far."])
    heads = ["contestant", "useful tokens/s: median [min, max]", "runs (warm-ups)", "row occupancy"]
    heads += ["groups a batch (tried: tokens/s)", "cores used", "peak RSS, GiB"]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for contestant, row in entry["contestants"].items():
        speed = row["tokens_per_s"]
        tried = ", ".join(
            f"{groups}: {tokens_per_s:.0f}" for groups, tokens_per_s in row["tried"].items()
        )
        cells = [contestant, f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]"]
        cells += [f"{len(row['runs'])} ({len(row['warmups'])})", f"{100 * row['occupancy']:.1f} %"]
        cells += [
            f"{row['groups_per_batch']} ({tried})" if tried else "",
            f"{row['cores_used']:.2f}",
        ]
        lines.append("| " + " | ".join([*cells, f"{row['peak_rss_bytes'] / 2**30:.2f}"]) + " |")
    ratio = entry.get("ours_over_better_peer")
    verdict = (
        f"Ours over the better peer: **{ratio:.2f}x**."
        if ratio
        else "Peers were not measured on this case."
    )
    return "\n".join([*lines, "", verdict])


def memory_section(entry: dict[str, Any]) -> str:
    peaks = ", ".join(
        f"{traces}: {peak / 2**20:.1f}" for traces, peak in entry["peak_bytes_by_traces"].items()
    )
    added, arithmetic = entry["bytes_per_added_trace"], entry["arithmetic_bytes_per_trace"]
    text = f"Peak memory of our program for (b) by traces a group, MiB: {peaks}. An added trace costs {added:,.0f} "
    text += f"bytes; its own keys and values are 2 L J E G x 4 = {arithmetic:,} bytes ({added / arithmetic:.3f}x)."
    return "\n".join(["## Memory of (b) by traces", "", place(entry), "", text])


def draw_section(entry: dict[str, Any]) -> str:
    """(a) with drawn and with greedy tokens."""
    runs = {
        t: ", ".join(f"{s:.2f}" for s in seconds)
        for t, seconds in entry["seconds_by_temperature"].items()
    }
    text = f"Seconds of (a), ours: {runs['1.0']} at T = 1; {runs['0.0']} greedy. Drawing adds "
    text += f"{100 * entry['drawing_over_greedy']:.1f} % (medians)."
    return "\n".join(["## What drawing costs", "", place(entry), "", text])


def place(entry: dict[str, Any]) -> str:
    """Machine, commit, and each contestant's versions and settings."""
    lines = [f"{entry['machine']}; commit {entry['commit']}.", ""]
    for contestant, versions in entry["versions"].items():
        stated = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"- {contestant} ({stated}): {entry['settings'][contestant]}")
    return "\n".join(lines)
