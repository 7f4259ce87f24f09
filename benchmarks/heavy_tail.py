"""Trace lengths as reasoning has them: most are short, some are very long.

    python -m benchmarks.heavy_tail

Log-normal, clipped, from a seed. Writes benchmarks/heavy_tail.json, which the benchmarks read.
"""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".json")
SEED, GROUPS, TRACES = 0, 64, 8
MEAN_TOKENS, SIGMA, MAX_TOKENS = 96, 0.8, 512  # the mean and sigma are those before clipping


def main() -> None:
    mu = math.log(MEAN_TOKENS) - SIGMA**2 / 2
    drawn = np.random.default_rng(SEED).lognormal(mu, SIGMA, (GROUPS, TRACES))
    limit_UxC = np.clip(np.rint(drawn), 1, MAX_TOKENS).astype(int)
    FILE.write_text(json.dumps(limit_UxC.tolist()) + "\n")
    mean, longest = limit_UxC.mean(), limit_UxC.max()
    print(f"{FILE}: {limit_UxC.size} traces, mean {mean:.1f}, longest {longest} tokens")


def limits() -> np.ndarray:
    """int32 [U, C] tokens of each trace."""
    return np.array(json.loads(FILE.read_text()), np.int32)


if __name__ == "__main__":
    main()
