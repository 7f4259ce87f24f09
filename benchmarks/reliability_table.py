"""docs/results/: kill_soak.json, verifier_soak.json, bf16_mismatch.json -> reliability.md.

python -m benchmarks.reliability_table
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from benchmarks.markdown import paragraph, table_lines
from spiral_jax.core.faults import POINTS

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
STATUSES = ("correct", "wrong", "unparsed", "timeout", "error")

INTRODUCTION = """# What a run survives

Written by `python -m benchmarks.reliability_table` from `kill_soak.json`, `verifier_soak.json` and
`bf16_mismatch.json`; all are made again by `bash launch/soak.sh`.

## Killed, preempted, damaged: the same run
"""

DRILLS = {
    "SIGTERM": "SIGTERM while traces are decoded or verified",
    "truncated": "newest checkpoint cut in half on disk",
}


class Behaviour(NamedTuple):
    """What a run does when something happens, and the tests that hold it."""

    event: str
    reaction: str
    tests: str


BEHAVIOUR = (
    Behaviour(
        event="newest checkpoint damaged",
        reaction=(
            "goes on from the one before; once that has been read, moves it to "
            "`checkpoints_damaged/` and says so; where none is whole, nothing is moved and it is "
            "an error"
        ),
        tests="`test_checkpoint.py`, `test_drills.py`",
    ),
    Behaviour(
        event=(
            "a checkpoint that the machine refuses to read (memory of host or device, open files, "
            "permissions, disk, mount)"
        ),
        reaction=(
            "ends and says what was refused; nothing is moved, and the next start reads the same "
            "one"
        ),
        tests="`test_refused_reads.py`",
    ),
    Behaviour(
        event="a checkpoint that its run deletes while another command reads it",
        reaction="that command ends and says so, and which there are",
        tests="`test_refused_reads.py`",
    ),
    Behaviour(
        event="disk full while saving",
        reaction=(
            "reports it, removes the half-written files, goes on with the older checkpoint, "
            "tries again at the next save; `checkpoint/failed_saves` counts; after "
            "`checkpoint.max_failures` in a row it ends"
        ),
        tests="`test_checkpoint.py`",
    ),
    Behaviour(
        event="log or trace cannot be written (full, read only, gone)",
        reaction="ends with the path and what to look at",
        tests="`test_workdir.py`",
    ),
    Behaviour(
        event="SIGTERM",
        reaction=(
            "leaves sampling at once, saves, exit code 0 within `train.grace_s`; several "
            "processes leave between the same two decode chunks, through jax's preemption "
            "service (two on one machine, not tried on a pod)"
        ),
        tests="`test_preemption.py`, `test_drills.py`, `test_pod_drills.py`",
    ),
    Behaviour(
        event="Ctrl-C",
        reaction=(
            "as SIGTERM, with exit code 130, in training, evaluation and study; a second one ends "
            "the process at once"
        ),
        tests="`test_preemption.py`, `test_drills.py`, `test_evaluate.py`, `test_runner.py`",
    ),
    Behaviour(
        event="a second process on the same workdir",
        reaction=(
            "is refused, with pid, host and start of the first; a lock that kill -9 has left is "
            "taken over at once on the same machine, elsewhere after a minute without a sign of "
            "life (other machines are stood in for)"
        ),
        tests="`test_lock.py`, `test_drills.py`",
    ),
    Behaviour(
        event="preempted in a cluster where exit code 0 means finished (GKE, SLURM)",
        reaction=(
            "ends with `--preempted_exit_code`, which the launchers set, and is started again "
            "(not tried on a cluster)"
        ),
        tests="`test_launch.py`, `test_pod_drills.py`",
    ),
    Behaviour(
        event="loss or gradient not finite",
        reaction=(
            "step skipped inside jit, no bit of the state changes, `skipped_update` = 1; "
            "after `train.max_bad_steps` in a row the run ends and its batch is in "
            "`bad_step_*.npz`"
        ),
        tests="`test_train_step.py`, `test_guards.py`",
    ),
    Behaviour(
        event="loss or gradient norm far from the last 32 steps",
        reaction=(
            "flagged: `spike/*` = 1 and a printed line; more than `train.spike` median "
            "absolute deviations"
        ),
        tests="`test_guards.py`",
    ),
    Behaviour(
        event="sampler and trainer disagree at step 0, or their ratio is NaN",
        reaction="the run ends (`train.mismatch_limit`)",
        tests="`test_end_to_end.py`",
    ),
    Behaviour(
        event="problems all right or all wrong",
        reaction=(
            "no advantage, so they are tried and not kept; fewer than a quarter kept: the run "
            "ends with the histogram of rewards, and its traces are written for the report"
        ),
        tests="`test_collect.py`, `test_first_batch.py`",
    ),
    Behaviour(
        event="all traces cut off",
        reaction="positive advantages are gated to 0, negative ones stay; finite",
        tests="`test_collect.py`, `test_train_step.py`",
    ),
    Behaviour(
        event="nothing but padding, zero weights, single-token traces",
        reaction="finite; zero gradient where there is nothing to learn",
        tests="`test_train_step.py`",
    ),
    Behaviour(
        event="a wait (data, weights, checkpoint) beyond `train.wait_s`",
        reaction="ends with exit code 75, what it waited for, and all stacks",
        tests="`test_watchdog.py`",
    ),
    Behaviour(
        event="verdicts later than if every answer hung",
        reaction="ends and names the problem",
        tests="`test_collect.py`",
    ),
    Behaviour(
        event=(
            "a step, an evaluation or a wave of one beyond `train.watchdog` times the median "
            "(while there is none: `train.wait_s`)"
        ),
        reaction="all stacks on standard error, once; the run goes on",
        tests="`test_watchdog.py`",
    ),
    Behaviour(
        event="malformed rows, repeated ids",
        reaction="ends before anything is sampled; all are counted, ten are listed",
        tests="`test_data.py`",
    ),
    Behaviour(
        event="another config in the same directory",
        reaction="refused with the difference, unless `resume.allow` names the fields",
        tests="`test_workdir.py`",
    ),
)


def main() -> None:
    lines = [
        *kill_lines(read("kill_soak")),
        *behaviour_lines(),
        *verifier_lines(read("verifier_soak")),
        *mismatch_lines(read("bf16_mismatch")),
    ]
    (RESULTS / "reliability.md").write_text(INTRODUCTION + "\n".join(lines) + "\n")


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def kill_lines(soak: dict) -> list[str]:
    """The table of drills."""
    compared = "**none has ended yet**"
    if soak["comparisons"]:
        compared = f"**{len(soak['differences'])} differences**"
    half_written = sum(drill["half_written"] for drill in soak["drills"].values())
    summary = paragraph(f"""
        **{soak["kills"]} of {soak["asked"]} kills**; {soak["comparisons"]} runs of {soak["steps"]}
        steps compared bit for bit with one that was left alone (final parameters and optimizer
        state, metrics but the clock's, traces): {compared}, {soak["orphans"]} processes left
        behind.
    """)
    heads = (
        "drill",
        "what the run is doing",
        "times tried",
        "decode chunks before it, at least",
        "finished steps lost, at most",
        "left half written",
    )
    rows = []
    for name, drill in soak["drills"].items():
        chunks = "-" if drill["least_chunks"] is None else drill["least_chunks"]
        rows.append(
            (
                name,
                POINTS.get(name) or DRILLS[name],
                drill["tried"],
                chunks,
                drill["finished_steps_lost_most"],
                drill["half_written"],
            )
        )
    lost = paragraph(f"""
        The current step is always done again. A finished step is lost only while its own checkpoint
        is still being written ({half_written} checkpoints were half written; the next start removed
        them), or when its checkpoint is damaged afterwards ({soak["set_aside"]} were set aside).
        `checkpoint.every` = 1 here; otherwise the steps since the last checkpoint are lost too.
    """)
    machine = paragraph(f"""
        Machine: {soak["machine"]}, shared with other work; commit {soak["commit"]}. Median start-up
        {soak["median_start_up_s"]} s, median drill {soak["median_cycle_s"]} s.
    """)
    return ["", summary, "", *table_lines(heads, rows), "", lost, "", machine]


def behaviour_lines() -> list[str]:
    """The table of everything else."""
    table = table_lines(("event", "what the run does", "held by"), BEHAVIOUR)
    return ["", "## What happens otherwise", "", *table]


def verifier_lines(soak: dict) -> list[str]:
    """The table of answers by kind and outcome."""
    summary = paragraph(f"""
        **{soak["answers"]:,} of {soak["asked"]:,} answers** in {soak["seconds"]:.0f} s on
        {soak["workers"]} workers, {soak["timeout_s"]:g} s an answer; largest worker
        {soak["peak_worker_bytes"] / 1e6:.0f} MB (limit on its address space:
        {soak["memory_gb"] * 1e3:.0f} MB); {soak["replaced"]} workers killed or dead and replaced,
        {soak["orphans"]} left behind. The file that answers with code try to create was
        {"" if soak["canary"] else "not "}created. Outcomes that a kind rules out:
        {len(soak["not_allowed"])}.
    """)
    counts = soak["counts"]
    rows = [(kind, *(counts[kind][status] for status in STATUSES)) for kind in counts]
    totals = [sum(counts[kind][status] for kind in counts) for status in STATUSES]
    rows.append(("**all**", *(f"**{total}**" for total in totals)))
    errors = "; ".join(f"{detail} ({times}x)" for detail, times in soak["errors"].items())
    machine = f"Machine: {soak['machine']}, shared with other work; commit {soak['commit']}."
    return [
        "",
        "## Answers made to break the verifier",
        "",
        summary,
        "",
        *table_lines(("kind", *STATUSES), rows),
        "",
        f"Errors: {errors or 'none'}.",
        "",
        machine,
    ]


def mismatch_lines(runs: dict) -> list[str]:
    """How far sampler and trainer are apart in either dtype."""
    summary = paragraph(f"""
        Largest |log ratio| a token over the first {runs["steps"]} steps of the bundled model's run,
        and the estimated KL. A `train.mismatch_limit` below the bfloat16 row would stop a sound
        run; float32 runs are held to 1e-4.
    """)
    rows = []
    for dtype in ("float32", "bfloat16"):
        largest = max(step["mismatch/max_abs_log_ratio"] for step in runs[dtype])
        kl = max(step["mismatch/kl"] for step in runs[dtype])
        rows.append((dtype, f"{largest:.2e}", f"{kl:.2e}"))
    return [
        "",
        "## Sampler against trainer in bfloat16",
        "",
        summary,
        "",
        *table_lines(("compute dtype", "largest abs log ratio", "KL a token"), rows),
        "",
        f"Machine: {runs['machine']}; commit {runs['commit']}.",
    ]


if __name__ == "__main__":
    main()
