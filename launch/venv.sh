# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv once and installs requirements into it, again only when they changed.
# Usage: install requirements.txt [requirements-test.txt ...]
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=.venv

install() {
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 1
  fi
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  local file
  for file in "$@"; do
    local stamp="$VENV/.installed-$file"
    local want
    want=$(cat requirements*.txt | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
      echo "installing $file into $VENV (minutes, once)"
      "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
      echo "$want" > "$stamp"
    fi
  done
}
