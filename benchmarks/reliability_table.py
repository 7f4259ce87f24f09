"""docs/kill_soak.json, docs/verifier_soak.json, docs/bf16_mismatch.json -> docs/reliability.md.

python -m benchmarks.reliability_table
"""

from __future__ import annotations

import json
import pathlib

from spiral_jax.core.faults import POINTS

DOCS = pathlib.Path(__file__).parent.parent / "docs"
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

# (event, what the run does, the tests that hold it)
BEHAVIOUR = (
    (
        "newest checkpoint damaged",
        "moves it to `checkpoints_damaged/`, says so, goes on from the one before; an only one is an error",
        "`test_checkpoint.py`, `test_drills.py`",
    ),
    (
        "disk full while saving",
        "reports it, removes the half-written files, goes on with the older checkpoint, tries again at the "
        "next save; `checkpoint/failed_saves` counts; after `checkpoint.max_failures` in a row it ends",
        "`test_checkpoint.py`",
    ),
    (
        "log or trace cannot be written (full, read only, gone)",
        "ends with the path and what to look at",
        "`test_workdir.py`",
    ),
    (
        "SIGTERM",
        "leaves sampling at once, saves, exit code 0 within `train.grace_s`; several processes leave between the "
        "same two decode chunks, through jax's preemption service (two on one machine, not tried on a pod)",
        "`test_preemption.py`, `test_drills.py`, `test_pod_drills.py`",
    ),
    (
        "preempted in a cluster where exit code 0 means finished (GKE, SLURM)",
        "ends with `--preempted_exit_code`, which the launchers set, and is started again (not tried on a cluster)",
        "`test_launch.py`, `test_pod_drills.py`",
    ),
    (
        "loss or gradient not finite",
        "step skipped inside jit, no bit of the state changes, `skipped_update` = 1; after "
        "`train.max_bad_steps` in a row the run ends and its batch is in `bad_step_*.npz`",
        "`test_train_step.py`, `test_guards.py`",
    ),
    (
        "loss or gradient norm far from the last 32 steps",
        "flagged: `spike/*` = 1 and a printed line; more than `train.spike` median absolute deviations",
        "`test_guards.py`",
    ),
    (
        "sampler and trainer disagree at step 0, or their ratio is NaN",
        "the run ends (`train.mismatch_limit`)",
        "`test_end_to_end.py`",
    ),
    (
        "problems all right or all wrong",
        "no advantage, so they are tried and not kept; fewer than a quarter kept: the run ends with the "
        "histogram of rewards",
        "`test_collect.py`",
    ),
    (
        "all traces cut off",
        "positive advantages are gated to 0, negative ones stay; finite",
        "`test_collect.py`, `test_train_step.py`",
    ),
    (
        "nothing but padding, zero weights, single-token traces",
        "finite; zero gradient where there is nothing to learn",
        "`test_train_step.py`",
    ),
    (
        "a wait (data, weights, checkpoint) beyond `train.wait_s`",
        "ends with exit code 75, what it waited for, and all stacks",
        "`test_watchdog.py`",
    ),
    (
        "verdicts later than if every answer hung",
        "ends and names the problem",
        "`test_collect.py`",
    ),
    (
        "a step, an evaluation or a wave of one beyond `train.watchdog` times the median (while there is none: "
        "`train.wait_s`)",
        "all stacks on standard error, once; the run goes on",
        "`test_watchdog.py`",
    ),
    (
        "malformed rows, repeated ids",
        "ends before anything is sampled; all are counted, ten are listed",
        "`test_data.py`",
    ),
    (
        "another config in the same directory",
        "refused with the difference, unless `resume.allow` names the fields",
        "`test_workdir.py`",
    ),
)


def main() -> None:
    kills, answers, mismatch = (
        json.loads((DOCS / f"{name}.json").read_text())
        for name in ("kill_soak", "verifier_soak", "bf16_mismatch")
    )
    lines = [
        *kill_lines(kills),
        *behaviour_lines(),
        *verifier_lines(answers),
        *mismatch_lines(mismatch),
    ]
    (DOCS / "reliability.md").write_text(INTRODUCTION + "\n".join(lines) + "\n")


def kill_lines(soak: dict) -> list[str]:
    """The table of drills."""
    compared = (
        f"**{len(soak['differences'])} differences**"
        if soak["comparisons"]
        else "**none has ended yet**"
    )
    half_written = sum(drill["half_written"] for drill in soak["drills"].values())
    lines = [
        "",
        f"**{soak['kills']} of {soak['asked']} kills**; {soak['comparisons']} runs of {soak['steps']} steps compared "
        "bit for bit with one that was left alone (final parameters and optimizer state, metrics but the clock's, "
        f"traces): {compared}, {soak['orphans']} processes left behind.",
        "",
        "| drill | what the run is doing | times tried | decode chunks before it, at least | finished steps lost, at "
        "most | left half written |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, drill in soak["drills"].items():
        chunks = "-" if drill["least_chunks"] is None else drill["least_chunks"]
        lines.append(
            f"| {name} | {POINTS.get(name) or DRILLS[name]} | {drill['tried']} | {chunks} | "
            f"{drill['finished_steps_lost_most']} | {drill['half_written']} |"
        )
    lines += [
        "",
        "The current step is always done again. A finished step is lost only while its own checkpoint is still being "
        f"written ({half_written} checkpoints were half written; the next start removed them), or when its checkpoint "
        f"is damaged afterwards ({soak['set_aside']} were set aside). `checkpoint.every` = 1 here; "
        "otherwise the steps since the last checkpoint are lost too.",
        "",
        f"Machine: {soak['machine']}, shared with other work; commit {soak['commit']}. Median start-up "
        f"{soak['median_start_up_s']} s, median drill {soak['median_cycle_s']} s.",
    ]
    return lines


def behaviour_lines() -> list[str]:
    """The table of everything else."""
    lines = [
        "",
        "## What happens otherwise",
        "",
        "| event | what the run does | held by |",
        "| --- | --- | --- |",
    ]
    return lines + [f"| {event} | {does} | {tests} |" for event, does, tests in BEHAVIOUR]


def verifier_lines(soak: dict) -> list[str]:
    """The table of answers by kind and outcome."""
    total = {
        status: sum(of_kind[status] for of_kind in soak["counts"].values()) for status in STATUSES
    }
    lines = [
        "",
        "## Answers made to break the verifier",
        "",
        f"**{soak['answers']:,} of {soak['asked']:,} answers** in {soak['seconds']:.0f} s on {soak['workers']} "
        f"workers, {soak['timeout_s']:g} s an answer; largest worker {soak['peak_worker_bytes'] / 1e6:.0f} MB (limit "
        f"on its address space: {soak['memory_gb'] * 1e3:.0f} MB); {soak['replaced']} workers killed or dead and "
        f"replaced, {soak['orphans']} left behind. The file that answers with code try to create was "
        f"{'' if soak['canary'] else 'not '}created. "
        f"Outcomes that a kind rules out: {len(soak['not_allowed'])}.",
        "",
        "| kind | " + " | ".join(STATUSES) + " |",
        "| --- |" + " --- |" * len(STATUSES),
    ]
    for kind, of_kind in soak["counts"].items():
        lines.append(
            f"| {kind} | " + " | ".join(str(of_kind[status]) for status in STATUSES) + " |"
        )
    lines.append("| **all** | " + " | ".join(f"**{total[status]}**" for status in STATUSES) + " |")
    errors = "; ".join(f"{detail} ({times}x)" for detail, times in soak["errors"].items())
    lines += ["", f"Errors: {errors or 'none'}.", "", f"Machine: {soak['machine']}, shared with other work; commit "
              f"{soak['commit']}."]  # fmt: skip
    return lines


def mismatch_lines(found: dict) -> list[str]:
    """How far sampler and trainer are apart in either dtype."""
    lines = [
        "",
        "## Sampler against trainer in bfloat16",
        "",
        f"Largest |log ratio| a token over the first {found['steps']} steps of the bundled model's run, and the "
        "estimated KL. A `train.mismatch_limit` below the bfloat16 row would stop a sound run; float32 runs are held "
        "to 1e-4.",
        "",
        "| compute dtype | largest abs log ratio | KL a token |",
        "| --- | --- | --- |",
    ]
    for dtype in ("float32", "bfloat16"):
        largest = max(step["mismatch/max_abs_log_ratio"] for step in found[dtype])
        kl = max(step["mismatch/kl"] for step in found[dtype])
        lines.append(f"| {dtype} | {largest:.2e} | {kl:.2e} |")
    return [*lines, "", f"Machine: {found['machine']}; commit {found['commit']}."]


if __name__ == "__main__":
    main()
