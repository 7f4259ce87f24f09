"""The paper's sets of problems as JSONL files: fetched from the Hugging Face Hub, or converted from
downloads.

    python -m spiral_jax.prepare_data --out=data                              # all that SETS lists
    python -m spiral_jax.prepare_data --out=data polaris_53k aime_2025=DIR    # one fetched, one from a local directory

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
from spiral_jax.tasks.problem import Problem


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
    sys.exit(0 if prepare(wanted, words.out) else 1)


def prepare(wanted: dict[str, str], out: pathlib.Path) -> bool:
    """Writes the files and the report; what cannot be had is said and left out. Returns whether
    everything is there.

    Args:
      wanted: names in `SETS` -> a local directory instead of the Hub, or "".
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Problem]] = {}
    files = {}
    for name, directory in wanted.items():
        try:
            found[name], files[name] = fetch(
                name, directory or SETS[name].dataset, out / f"{name}.jsonl"
            )
        except UserError as error:
            print(f"{name}: error: {error}", flush=True)
            continue
        entry = files[name]
        print(
            f"{name}: {entry['problems']:,} problems, {entry['from']}, sha256 {entry['sha256'][:16]}",
            flush=True,
        )
    overlaps = compare(found)
    for against, overlap in overlaps.items():
        print(f"{against}: {describe(overlap)}", flush=True)
    report = {
        "files": files,
        "overlaps": {name: dataclasses.asdict(overlap) for name, overlap in overlaps.items()},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return len(found) == len(wanted)


def fetch(name: str, dataset: str, file: pathlib.Path) -> tuple[list[Problem], dict]:
    """The problems of a set, with `file` written if it was not there, and what report.json says of
    the file.

    Raises:
      TaskError: the set cannot be had, or a row is malformed.
    """
    source = "kept as it was"
    if not file.exists():
        source = f"{dataset}, {SETS[name].split}"
        rows = hub.problems(dataset, "", SETS[name].split, "problem", "answer", name)
        lines = [
            {
                "id": problem.id.removeprefix(f"{name}:"),
                "problem": problem.text,
                "answer": problem.answer,
            }
            for problem in unique_problems(rows, source)
        ]
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8"
        )
        unfinished.replace(file)
    content = file.read_bytes()
    problems = jsonl.parse(content, str(file), name)
    sha256 = hashlib.sha256(content).hexdigest()
    return problems, {
        "file": file.name,
        "from": source,
        "problems": len(problems),
        "sha256": sha256,
    }


def compare(found: dict[str, list[Problem]]) -> dict[str, Overlap]:
    """Each evaluation set against all training sets together; training sets alone where nothing is
    evaluated.
    """
    train = [
        problem for name, problems in found.items() if SETS[name].training for problem in problems
    ]
    held_out = {name: problems for name, problems in found.items() if not SETS[name].training}
    if train and not held_out:
        return {"training": find_overlap(train, [])}
    return {name: find_overlap(train, problems) for name, problems in held_out.items()}


if __name__ == "__main__":
    main()
