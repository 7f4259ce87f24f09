#!/usr/bin/env bash
# Kills a small run 100 times, in every phase, and compares it bit for bit with one that was left alone; gives the
# verifier 10,000 answers made to break it; writes docs/results/reliability.md. It took 17 minutes, with installing, on two
# cores that tests shared; a stopped soak goes on with the same command (its state is in runs/soak). Same .venv as
# local.sh.
# Usage: bash launch/soak.sh [options of benchmarks.kill_soak, such as --seconds=600]
cd "$(dirname "$0")/.."
source launch/venv.sh

install .
export JAX_PLATFORMS=cpu
"$VENV/bin/python" -m benchmarks.kill_soak --folder=runs/soak --kills=100 "$@"
"$VENV/bin/python" -m benchmarks.verifier_soak
"$VENV/bin/python" -m benchmarks.bf16_mismatch
"$VENV/bin/python" -m benchmarks.reliability_table
