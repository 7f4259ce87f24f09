#!/usr/bin/env bash
# The paper's sets of problems as JSONL files in data/: POLARIS-53k to train on, AIME 2025 and 2026 and BeyondAIME to
# evaluate on, with SHA-256 fingerprints and a report of duplicates and overlap. Fetches from the Hugging Face Hub, or
# converts directories that were downloaded by hand. Same .venv as local.sh, plus the extra datasets.
# Usage: bash launch/prepare_data.sh [--out=DIR] [NAME | NAME=DIRECTORY ...]
cd "$(dirname "$0")/.."
source launch/venv.sh

install ".[datasets]"
"$VENV/bin/python" -m spiral_jax.prepare_data --out=data "$@"
