"""The paper's sets of problems as JSONL files, from the Hugging Face Hub or from downloads.

    python -m spiral_jax.prepare_data --out=data                  # fetches all that SETS lists
    python -m spiral_jax.prepare_data --out=data polaris_53k aime_2025=DIR      # one, from DIR

Data set -> checked problems -> OUT/NAME.jsonl, lines of {"id", "problem", "answer"} for task.name =
"jsonl". A file that is there already is kept and read. OUT/report.json and the terminal say how
many problems each file has, its SHA-256, which problems are there twice, and which evaluation
problems are in a training set too.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys

from spiral_jax.core.errors import UserError
from spiral_jax.tasks import hub, jsonl
from spiral_jax.tasks.finite import unique_problems
from spiral_jax.tasks.overlap import Overlap, describe, find_overlap
from spiral_jax.tasks.problem import Problem, TaskError


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a set comes from. All have the columns "problem" and "answer"."""

    dataset: str
    split: str
    training: bool = False


SETS = {
    "polaris_53k": Source("POLARIS-Project/Polaris-Dataset-53K", "train", training=True),
    "aime_2025": Source("MathArena/aime_2025", "train"),  # its only split
    "aime_2026": Source("MathArena/aime_2026", "train"),  # its only split
    "beyond_aime": Source("ByteDance-Seed/BeyondAIME", "test"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sets", nargs="*", metavar="NAME[=DIRECTORY]", help=f"default: {' '.join(SETS)}"
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="directory of the files")
    words = parser.parse_args()
    wanted = dict(word.partition("=")[::2] for word in words.sets or SETS)
    if unknown := sorted(wanted.keys() - SETS.keys()):
        parser.error(f"unknown sets {unknown}: must be among {', '.join(SETS)}")
    try:
        sys.exit(0 if prepare(wanted, words.out) else 1)
    except UserError as error:
        parser.error(str(error))


def prepare(wanted: dict[str, str], out: pathlib.Path) -> bool:
    """Writes the files and the report; what cannot be had is said and left out.

    Args:
      wanted: names in `SETS` -> a local directory instead of the Hub, or "".

    Returns:
      whether everything is there.

    Raises:
      TaskError: `out` can be no directory.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise TaskError(f"--out={out}: can be no directory ({reason}); name another.") from error
    problems: dict[str, list[Problem]] = {}
    entries = {}
    for name, directory in wanted.items():
        file = out / f"{name}.jsonl"
        try:
            origin = write(name, directory or SETS[name].dataset, file)
            content = file.read_bytes()
            problems[name] = jsonl.parse(content, str(file), name)
        except UserError as error:
            print(f"{name}: error: {error}", flush=True)
            continue
        sha256, count = hashlib.sha256(content).hexdigest(), len(problems[name])
        entries[name] = {"file": file.name, "from": origin, "problems": count, "sha256": sha256}
        print(f"{name}: {count:,} problems, {origin}, sha256 {sha256[:16]}", flush=True)

    overlaps = find_overlaps(problems)
    for name, overlap in overlaps.items():
        print(f"{name}: {describe(overlap)}", flush=True)
    plain = {name: dataclasses.asdict(overlap) for name, overlap in overlaps.items()}
    report = {"files": entries, "overlaps": plain}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return len(problems) == len(wanted)


def write(name: str, dataset: str, file: pathlib.Path) -> str:
    """Writes the file of a set unless it is there; returns where its content is from.

    Raises:
      TaskError: the set cannot be had, or a row is malformed.
    """
    if file.exists():
        return "kept as it was"
    split = SETS[name].split
    origin = f"{dataset}, {split}"
    rows = hub.problems(dataset, "", split, "problem", "answer", name, set())
    lines = []
    for problem in unique_problems(rows, origin):
        if not problem.answer:
            raise TaskError(f"{origin}: {problem.id} has no answer; use another revision of it.")
        id = problem.id.removeprefix(f"{name}:")
        line = {"id": id, "problem": problem.text, "answer": problem.answer}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text("".join(lines), "utf-8")
    unfinished.replace(file)
    return origin


def find_overlaps(problems: dict[str, list[Problem]]) -> dict[str, Overlap]:
    """By name of an evaluation set, which of its problems are trained on.

    Where nothing is evaluated, the repeats in "training" alone.
    """
    train = []
    held_out = {}
    for name, of_set in problems.items():
        if SETS[name].training:
            train += of_set
        else:
            held_out[name] = of_set
    if train and not held_out:
        return {"training": find_overlap(train, [])}
    return {name: find_overlap(train, of_set) for name, of_set in held_out.items()}


if __name__ == "__main__":
    main()
