#!/usr/bin/env bash
# Lint and all tests: once on one CPU device, then the marked subset on eight fake ones; three files of tests side by
# side, since most tests keep one core busy and some wait. Same .venv as local.sh.
# Usage: bash launch/test.sh [pytest arguments for the first run]
cd "$(dirname "$0")/.."
source launch/venv.sh

# Where its compiler exists, the tiny model's programs are compiled for TPUs too; elsewhere that test is skipped.
extras="test"
[ "$(uname -sm)" != "Linux x86_64" ] || extras="test,plan"
install ".[$extras]"
# The report's tests need a browser. A container's root gets one from the system's packages; elsewhere they are skipped.
if ! command -v chromium chromium-browser google-chrome > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "installing chromium for the tests of the report"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    > /dev/null || echo "chromium could not be installed: tests in a browser will be skipped"
fi
export JAX_PLATFORMS=cpu
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
"$VENV/bin/python" -m pytest -q -n 3 --dist=loadfile --no-loadscope-reorder --durations=10 "$@"
XLA_FLAGS=--xla_force_host_platform_device_count=8 "$VENV/bin/python" -m pytest -q -n 3 --dist=loadfile --no-loadscope-reorder -m devices8
