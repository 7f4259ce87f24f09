"""How far sampler and trainer are apart in bfloat16: the bundled model's run, in either dtype.

    python -m benchmarks.bf16_mismatch [--steps=2] [--json=docs/results/bf16_mismatch.json]

The bound of `train.mismatch_limit` for bfloat16 runs is read from here; in float32 it is 1e-4.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.machine import commit, machine

KEYS = ("mismatch/max_abs_log_ratio", "mismatch/kl", "mismatch/effective_share")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--json", type=pathlib.Path, default=pathlib.Path("docs/results/bf16_mismatch.json")
    )
    asked = parser.parse_args()
    result = {"machine": machine(), "commit": commit(), "steps": asked.steps}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder, "run")
            command = [
                sys.executable,
                "-m",
                "spiral_jax.train",
                "--config=configs/tiny.py",
                "--config.eval.problems=0",
                f"--config.model.compute_dtype={dtype}",
                "--config.train.mismatch_limit=0",
                f"--config.train.steps={asked.steps}",
                f"--workdir={workdir}",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            lines = (workdir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        result[dtype] = [{key: row[key] for key in KEYS} for row in rows]
    asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
