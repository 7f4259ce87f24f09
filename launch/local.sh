#!/usr/bin/env bash
# Trains the bundled tiny model on this machine: makes .venv, installs, trains, prints the table. Again: resumes.
# Usage: bash launch/local.sh [WORKDIR] [--config.a.b=c ...]
cd "$(dirname "$0")/.."
source launch/venv.sh

install .
workdir=runs/tiny
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir=$1
  shift
fi
JAX_PLATFORMS=cpu "$VENV/bin/python" -m spiral_jax.train --config=configs/tiny.py --workdir="$workdir" "$@"
