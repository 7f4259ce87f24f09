# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv once and installs this repository into it, again only when what it needs
# has changed. Usage: install . or install ".[EXTRA,EXTRA]"; the extras are those of pyproject.toml.
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=.venv

install() {
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 1
  fi
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  local stamp="$VENV/.installed-$1" want
  want=$(cat requirements.txt pyproject.toml | cksum)
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
    echo "installing $1 into $VENV (minutes, once)"
    # Editable: the code that runs is the checkout's, from whatever directory.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e "$1"
    echo "$want" > "$stamp"
  fi
}
