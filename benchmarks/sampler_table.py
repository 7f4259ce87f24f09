"""The sampler benchmark's JSON as markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import paragraph, table_lines

HEADS = (
    "contestant",
    "useful tokens/s: median [min, max]",
    "runs (warm-ups)",
    "row occupancy",
    "groups a batch (tried: tokens/s)",
    "cores used",
    "peak RSS, GiB",
)


def table(report: dict[str, Any]) -> str:
    """One section a measured case, and one for memory."""
    sections = [case_section(name, entry) for name, entry in sorted(report["cases"].items())]
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
    rows = [contestant_cells(name, row) for name, row in entry["contestants"].items()]
    ratio = entry.get("ours_over_better_peer")
    verdict = "Peers were not measured on this case."
    if ratio:
        verdict = f"Ours over the better peer: **{ratio:.2f}x**."
    return "\n".join([*lines, *table_lines(HEADS, rows), "", verdict])


def contestant_cells(name: str, row: dict[str, Any]) -> list[str]:
    speed = row["tokens_per_s"]
    tried = ", ".join(f"{groups}: {tokens:.0f}" for groups, tokens in row["tried"].items())
    return [
        name,
        f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]",
        f"{len(row['runs'])} ({len(row['warmups'])})",
        f"{100 * row['occupancy']:.1f} %",
        f"{row['groups_per_batch']} ({tried})" if tried else "",
        f"{row['cores_used']:.2f}",
        f"{row['peak_rss_bytes'] / 2**30:.2f}",
    ]


def memory_section(entry: dict[str, Any]) -> str:
    peaks = ", ".join(
        f"{traces}: {peak / 2**20:.1f}" for traces, peak in entry["peak_bytes_by_traces"].items()
    )
    added, arithmetic = entry["bytes_per_added_trace"], entry["arithmetic_bytes_per_trace"]
    text = paragraph(f"""
        Peak memory of our program for (b) by traces a group, MiB: {peaks}. An added trace costs
        {added:,.0f} bytes; its own keys and values are 2 L J E G x 4 = {arithmetic:,} bytes
        ({added / arithmetic:.3f}x).
    """)
    return "\n".join(["## Memory of (b) by traces", "", place(entry), "", text])


def draw_section(entry: dict[str, Any]) -> str:
    """(a) with drawn and with greedy tokens."""
    runs = {
        temperature: ", ".join(f"{value:.2f}" for value in seconds)
        for temperature, seconds in entry["seconds_by_temperature"].items()
    }
    text = paragraph(f"""
        Seconds of (a), ours: {runs["1.0"]} at T = 1; {runs["0.0"]} greedy. Drawing adds
        {100 * entry["drawing_over_greedy"]:.1f} % (medians).
    """)
    return "\n".join(["## What drawing costs", "", place(entry), "", text])


def place(entry: dict[str, Any]) -> str:
    """Machine, commit, and each contestant's versions and settings."""
    lines = [f"{entry['machine']}; commit {entry['commit']}.", ""]
    for contestant, versions in entry["versions"].items():
        stated = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"- {contestant} ({stated}): {entry['settings'][contestant]}")
    return "\n".join(lines)
