"""SPIRAL in JAX; see README.md."""

import time

# the first line that any of its programs runs: start-up is counted from here
STARTED = time.monotonic()
