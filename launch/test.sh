#!/usr/bin/env bash
# Lint and all tests: once on one CPU device, then the marked subset on eight fake ones. Same .venv as local.sh.
# Usage: bash launch/test.sh [pytest arguments for the first run]
cd "$(dirname "$0")/.."
source launch/venv.sh

install requirements-test.txt
export JAX_PLATFORMS=cpu
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
"$VENV/bin/python" -m pytest -q --durations=10 "$@"
XLA_FLAGS=--xla_force_host_platform_device_count=8 "$VENV/bin/python" -m pytest -q -m devices8
