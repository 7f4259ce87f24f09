"""Directories of studies, made without running anything."""

import copy
import dataclasses
import json
import pathlib

from spiral_jax.evaluation.results import describe_sampling
from spiral_jax.studies.design import load_study
from spiral_jax.studies.directory import StudyDirectory

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden_results.json").read_text())
STEP = {
    "sampling/generated_tokens": 100.0,
    "sampling/prefilled_tokens": 30.0,
    "time/step": 0.5,
    "reward/search": 0.1,
    "reward/aggregated": 0.3,
    "entropy/search": 0.2,
    "grad_norm/search": 1.0,
    "grad_norm/aggregation": 2.0,
    "verifier/parse_rate_search": 0.9,
    "verifier/parse_rate_aggregation": 1.0,
    "tflop/sampling": 1.0,
    "tflop/update": 2.0,
}


def unchanged(arm, seed, results):
    """An edit that changes nothing."""


def a_study(**changes):
    return dataclasses.replace(load_study("tests/study_small.py"), **changes)


def make_study(path, study, edit=unchanged, unfinished=(), entropy=()):
    """The directory of a study whose runs are done.

    Args:
      edit: changes the results of one (arm, seed).
      unfinished: (arm, seed) of runs that have done a step of three and were not evaluated.
      entropy: by arm, of its search traces; of others 0.2.
    """
    directory, entropy = StudyDirectory(path), dict(entropy)
    for arm, seed in study.runs:
        is_done = (arm, seed) not in unfinished
        if arm != "base":
            row = STEP | {"entropy/search": entropy.get(arm, 0.2)}
            rows = [row | {"step": step} for step in range(3 if is_done else 1)]
            directory.run(arm, seed).mkdir(parents=True)
            log = directory.run(arm, seed) / "metrics.jsonl"
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if is_done:
            results = copy.deepcopy(GOLDEN)
            results["settings"] = describe_sampling(study.evaluation) | {"seed": seed}
            for b, record in enumerate(results["records"]):
                strategies = [("left", "right", None)[(b + n) % 3] for n in range(6)]
                record["search"]["strategy"] = strategies
            edit(arm, seed, results)
            folder = directory.evaluation(arm, seed, 0 if arm == "base" else 3)
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(results))
    return directory
