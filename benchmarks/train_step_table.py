"""The training benchmark's JSON as markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import paragraph, table_lines

HEADS = (
    "contestant",
    "trained tokens/s: median [min, max]",
    "memory over loaded, MiB",
    "groups a micro-batch",
    "cores used",
    "useful GFLOP/s",
    "gradient's distance",
)


def table(report: dict[str, Any]) -> str:
    """One section an entry."""
    sections = [section(name, entry) for name, entry in sorted(report["entries"].items())]
    return "\n\n".join(["# Train step", *sections]) + "\n"


def section(name: str, entry: dict[str, Any]) -> str:
    """Speed is response tokens over the wall time of a whole step: forward, backward, Adam."""
    rows = [contestant_cells(name, row, entry) for name, row in entry["contestants"].items()]
    shared, repeated = entry["flops"]["shared"], entry["flops"]["repeated"]
    operations = paragraph(f"""
        With the prompt once a group the step needs {shared / 1e12:.2f} TFLOP, repeated for each
        trace {repeated / 1e12:.2f}: {repeated / shared:.2f}x.
    """)
    lines = [
        f"## {name}",
        "",
        f"{entry['title']}; {entry['machine']}, commit {entry['commit']}.",
        "",
        *table_lines(HEADS, rows),
        "",
        operations,
    ]
    if "better_peer" in entry:
        speed, memory = entry["speed_over_better_peer"], entry["memory_over_better_peer"]
        lines += [
            "",
            f"Against the better peer, {entry['better_peer']}: **{speed:.2f}x** the speed, "
            f"**{memory:.2f}x** the memory.",
        ]
    return "\n".join(lines)


def contestant_cells(name: str, row: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    tokens, flops = entry["trained_tokens"], entry["flops"]
    needed = flops["shared" if name == "spiral_step" else "repeated"]
    speed, seconds = row["tokens_per_s"], sorted(run["seconds"] for run in row["runs"])
    cores = sum(run["cpu_seconds"] for run in row["runs"]) / sum(seconds)
    tried = ", ".join(
        f"{size}: {tokens / run['seconds']:.0f}/s, {run['bytes_over_loaded'] / 2**20:.0f} MiB"
        for size, run in row["tried"].items()
    )
    return [
        name,
        f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]",
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['micro_batch']:g} ({tried})",
        f"{cores:.2f}",
        f"{needed / seconds[len(seconds) // 2] / 1e9:.0f}",
        f"{row['gradient_distance']:.1e}",
    ]
