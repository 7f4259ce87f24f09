"""A reward for models that know nothing, in a module that the verifier's processes import:
arbitrary, but fixed.
"""

import os
import time
import zlib


def every_other(text, problem):
    """Half of the problems are hopeless, so that dynamic sampling refuses them; in the others, half of the texts are
    right. Notes each call in the file that JUDGED names."""
    with open(os.environ["JUDGED"], "a") as file:
        file.write(f"{problem.id}\n")
    return int(problem.id.split(":")[1]) % 2 == 0 and len(text) % 2 == 0


def slow_coin(text, problem):
    """The coin of the drills, after a while in which nothing is computed: a signal takes a second
    to reach all.
    """
    time.sleep(0.25)
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2 == 0
