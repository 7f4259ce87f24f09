"""The training benchmark's JSON as markdown."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """One section an entry."""
    return (
        "\n\n".join(
            ["# Train step", *(section(*item) for item in sorted(report["entries"].items()))]
        )
        + "\n"
    )


def section(name: str, entry: dict[str, Any]) -> str:
    """Speed is response tokens over the wall time of a whole step: forward, backward, Adam."""
    flops = entry["flops"]
    lines = [
        f"## {name}",
        "",
        f"{entry['title']}; {entry['machine']}, commit {entry['commit']}.",
        "",
    ]
    heads = [
        "contestant",
        "trained tokens/s: median [min, max]",
        "memory over loaded, MiB",
        "groups a micro-batch",
    ]
    heads += ["cores used", "useful GFLOP/s", "gradient's distance"]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for contestant, row in entry["contestants"].items():
        speed, seconds = row["tokens_per_s"], sorted(run["seconds"] for run in row["runs"])
        needed = flops["shared" if contestant == "spiral_step" else "repeated"]
        cores = sum(run["cpu_seconds"] for run in row["runs"]) / sum(seconds)
        tried = ", ".join(
            f"{size}: {entry['trained_tokens'] / run['seconds']:.0f}/s, {run['bytes_over_loaded'] / 2**20:.0f} MiB"
            for size, run in row["tried"].items()
        )
        cells = [contestant, f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]"]
        cells += [
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['micro_batch']:g} ({tried})",
            f"{cores:.2f}",
        ]
        cells += [
            f"{needed / seconds[len(seconds) // 2] / 1e9:.0f}",
            f"{row['gradient_distance']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = f"With the prompt once a group the step needs {flops['shared'] / 1e12:.2f} TFLOP, repeated for each trace "
    text += f"{flops['repeated'] / 1e12:.2f}: {flops['repeated'] / flops['shared']:.2f}x."
    lines += ["", text]
    if "better_peer" in entry:
        speed, memory = entry["speed_over_better_peer"], entry["memory_over_better_peer"]
        text = f"Against the better peer, {entry['better_peer']}: **{speed:.2f}x** the speed, "
        text += f"**{memory:.2f}x** the memory."
        lines += ["", text]
    return "\n".join(lines)
