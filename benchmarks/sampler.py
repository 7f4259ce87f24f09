"""How fast is the sampler? Ours against transformers' `generate` and tunix's, on the same work.

    bash benchmarks/peers/venvs.sh                            # once: an interpreter for each peer
    python -m benchmarks.sampler --json=docs/results/sampler.json   # writes sampler.md too

Each contestant is a process of its own that stays; one works at a time and may use every core. They
take turns, run by run, so that all see the same machine. All have the same weights, and everything
is compiled in the warm-up runs. The files are written after every round; cases that are not run
this time keep what the JSON has of them. A case that the same commit has measured in part, on the
same machine, goes on until it has its repeats: (c) takes hours, which need not be one sitting.
`--against=` measures ours alone.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
from typing import Any

from absl import app, flags

from benchmarks import sampler_cases, sampler_table
from benchmarks.machine import commit, machine
from benchmarks.peers.process import OURS, PEERS, ContestantProcess
from benchmarks.sampler_cases import Case

JSON = flags.DEFINE_string(
    "json", "docs/results/sampler.json", "the report; its table goes beside it as .md"
)
ONLY = flags.DEFINE_list("only", ["a", "b", "c", "memory", "draw"], "what to measure")
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/sampler", "where the model and the contestants' logs go"
)
REPEATS = flags.DEFINE_integer(
    "repeats", 5, "measured runs of (a) and (b), earlier sittings included"
)
WARMUPS = flags.DEFINE_integer("warmups", 2, "unmeasured runs before them, in every sitting")
REPEATS_C = flags.DEFINE_integer(
    "repeats_c", 5, "measured runs of (c), which take many minutes, earlier sittings included"
)
WARMUPS_C = flags.DEFINE_integer("warmups_c", 2, "unmeasured runs of it, in every sitting")
GROUPS_C = flags.DEFINE_integer("groups_c", 64, "groups of (c); fewer for a quick look")

AGAINST = flags.DEFINE_list(
    "against", list(PEERS), "peers to measure; none: ours alone, without a ratio"
)

GREEDY_TOKENS = 32
MEMORY_TRACES = (1, 2, 4, 8)

Contestants = dict[str, ContestantProcess]


def main(argv: list[str]) -> None:
    workdir, out = pathlib.Path(WORKDIR.value), pathlib.Path(JSON.value)
    sampler_cases.write_model(workdir / "model")
    report = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    with contextlib.ExitStack() as stack:
        contestants = {name: ContestantProcess(name, workdir) for name in (OURS, *AGAINST.value)}
        for contestant in contestants.values():
            stack.callback(contestant.close)
        where = {"machine": machine(), "commit": commit()} | load(contestants, workdir / "model")
        for name in ONLY.value:
            if name == "memory":
                report["memory"] = where | measure_memory(contestants[OURS])
                write(report, out)
            elif name == "draw":
                report["draw"] = where | measure_draw(contestants[OURS])
                write(report, out)
            else:
                measure_case(name, report, where, contestants, out)


def measure_case(
    name: str,
    report: dict[str, Any],
    where: dict[str, Any],
    contestants: Contestants,
    out: pathlib.Path,
) -> None:
    """Rounds of a case until it has its repeats, those of earlier sittings included."""
    case = sampler_cases.make_case(name, GROUPS_C.value)
    repeats, warmups = (REPEATS_C, WARMUPS_C) if name == "c" else (REPEATS, WARMUPS)
    entry = earlier_entry(report["cases"].get(name), case, where, contestants)
    if entry is None:
        entry = where | start_case(case, contestants)
    report["cases"][name] = entry
    done = len(entry["contestants"][OURS]["runs"])
    for round_ in range(warmups.value):
        run_round(case, entry, contestants, round_, "warmups")
    for round_ in range(done, repeats.value):
        run_round(case, entry, contestants, round_, "runs")
        write(report, out)


def load(contestants: Contestants, model: pathlib.Path) -> dict[str, Any]:
    """Loads the model everywhere, and makes sure that all compute the same function.

    Returns their versions and settings.
    """
    loaded = {
        name: contestant.call("load", model=str(model))["returned"]
        for name, contestant in contestants.items()
    }
    prompt = sampler_cases.greedy_prompt()
    greedy = {
        name: contestant.call("greedy", prompt=prompt, tokens=GREEDY_TOKENS)["returned"]
        for name, contestant in contestants.items()
    }
    if any(ids != greedy[OURS] for ids in greedy.values()):
        raise RuntimeError(f"greedy tokens differ, so speeds cannot be compared: {greedy}")
    return {
        key: {name: fields[key] for name, fields in loaded.items()}
        for key in ("versions", "settings")
    }


def earlier_entry(
    entry: dict[str, Any] | None, case: Case, where: dict[str, Any], contestants: Contestants
) -> dict[str, Any] | None:
    """The entry if it is of this very measurement, with whole rounds alone; else None."""
    same = entry and entry["title"] == case.title and all(entry[key] == where[key] for key in where)
    if not same or entry["contestants"].keys() != contestants.keys():
        return None
    whole = min(len(row["runs"]) for row in entry["contestants"].values())
    for row in entry["contestants"].values():
        del row["runs"][whole:]
    return entry


def start_case(case: Case, contestants: Contestants) -> dict[str, Any]:
    """The case's entry without runs; each peer has tried its batch sizes."""
    entry = {"title": case.title, "useful_tokens": case.work.useful_tokens, "contestants": {}}
    for name, contestant in contestants.items():
        tried = try_batch_sizes(case, contestant) if name in PEERS else {}
        best = int(max(tried, key=tried.get)) if tried else case.groups_per_batch[-1]
        print(f"{case.title}; {name}: useful tokens/s by groups per batch {tried}", flush=True)
        entry["contestants"][name] = {
            "groups_per_batch": best,
            "tried": tried,
            "warmups": [],
            "runs": [],
        }
    return entry


def try_batch_sizes(case: Case, contestant: ContestantProcess) -> dict[str, float]:
    """Useful tokens/s of the case's first groups, compilation excluded.

    By groups per batch, as the keys of JSON.
    """
    work, tried = case.work.first(case.trial_groups), {}
    for groups in case.groups_per_batch:
        for _ in range(2):  # the first one compiles
            seconds = contestant.call(
                "sample", work=work.to_json(), groups_per_batch=groups, seed=0
            )["seconds"]
        tried[str(groups)] = work.useful_tokens / seconds
    return tried


def run_round(
    case: Case, entry: dict[str, Any], contestants: Contestants, round_: int, kind: str
) -> None:
    """One run of each contestant, appended to its `kind` of runs."""
    work = case.work
    for name, contestant in contestants.items():
        row = entry["contestants"][name]
        answer = contestant.call(
            "sample", work=work.to_json(), groups_per_batch=row["groups_per_batch"], seed=round_
        )
        row[kind].append({"computed_rows": answer.pop("returned"), **answer})
        tokens_per_s = work.useful_tokens / answer["seconds"]
        print(
            f"{case.title}; {kind} {len(row[kind])}; {name}: {tokens_per_s:.1f} useful tokens/s",
            flush=True,
        )


def measure_memory(ours: ContestantProcess) -> dict[str, Any]:
    """Peak bytes of (b) by traces, and what an added trace costs, measured and by arithmetic."""
    peak = {}
    for traces in MEMORY_TRACES:
        work = sampler_cases.memory_work(traces)
        answer = ours.call("peak_bytes", work=work.to_json(), groups_per_batch=len(work.prompt_UxP))
        peak[str(traces)] = answer["returned"]
    fewest, most = MEMORY_TRACES[0], MEMORY_TRACES[-1]
    added = (most - fewest) * len(work.prompt_UxP)
    return {
        "peak_bytes_by_traces": peak,
        "bytes_per_added_trace": (peak[str(most)] - peak[str(fewest)]) / added,
        "arithmetic_bytes_per_trace": sampler_cases.bytes_per_trace(work.longest),
    }


def measure_draw(ours: ContestantProcess) -> dict[str, Any]:
    """What drawing costs: seconds of (a) at T = 1 and greedy, in turns."""
    work, seconds = sampler_cases.make_case("a", 0).work.to_json(), {"1.0": [], "0.0": []}
    for round_ in range(WARMUPS.value + REPEATS.value):
        for temperature, runs in seconds.items():
            answer = ours.call(
                "sample",
                work=work,
                groups_per_batch=1,
                seed=round_,
                temperature=float(temperature),
            )
            if round_ >= WARMUPS.value:
                runs.append(answer["seconds"])
    medians = {temperature: statistics.median(runs) for temperature, runs in seconds.items()}
    return {
        "seconds_by_temperature": seconds,
        "drawing_over_greedy": medians["1.0"] / medians["0.0"] - 1,
    }


def summarise(entry: dict[str, Any]) -> None:
    """Adds to a case's entry what follows from its measured runs, once the first is complete."""
    for row in entry["contestants"].values():
        if not row["runs"]:
            return
        speeds = [entry["useful_tokens"] / run["seconds"] for run in row["runs"]]
        row["tokens_per_s"] = {
            "median": statistics.median(speeds),
            "min": min(speeds),
            "max": max(speeds),
        }
        row["cores_used"] = statistics.median(
            run["cpu_seconds"] / run["seconds"] for run in row["runs"]
        )
        row["occupancy"] = entry["useful_tokens"] / row["runs"][-1]["computed_rows"]
        row["peak_rss_bytes"] = row["runs"][-1]["peak_rss_bytes"]
    median = {name: row["tokens_per_s"]["median"] for name, row in entry["contestants"].items()}
    if peers := [median[name] for name in PEERS if name in median]:
        entry["ours_over_better_peer"] = median[OURS] / max(peers)


def write(report: dict[str, Any], out: pathlib.Path) -> None:
    for entry in report["cases"].values():
        summarise(entry)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(sampler_table.table(report))


if __name__ == "__main__":
    app.run(main)
