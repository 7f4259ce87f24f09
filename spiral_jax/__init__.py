"""SPIRAL in JAX; see README.md."""

import time

__version__ = "0.1.0"

# the first line that any of its programs runs: start-up is counted from here
STARTED = time.monotonic()
