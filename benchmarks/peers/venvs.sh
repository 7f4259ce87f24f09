#!/usr/bin/env bash
# Makes .venv-peers/NAME for each peer of benchmarks/sampler.py and installs NAME.txt into it: once, minutes, gigabytes.
# Usage: bash benchmarks/peers/venvs.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
for requirements in benchmarks/peers/*.txt; do
  name=$(basename "$requirements" .txt)
  venv=.venv-peers/$name
  [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
  echo "installing $requirements into $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
done
