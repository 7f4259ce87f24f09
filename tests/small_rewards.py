"""Rewards for models that know nothing, arbitrary but fixed; the verifier's processes import it."""

import os
import time
import zlib


def every_other(text, problem):
    """Half of the problems are hopeless; in the others, half of the texts are right.

    Dynamic sampling refuses the hopeless ones. Each call is noted in the file that JUDGED names.
    """
    with open(os.environ["JUDGED"], "a") as file:
        file.write(f"{problem.id}\n")
    return int(problem.id.split(":")[1]) % 2 == 0 and len(text) % 2 == 0


def slow_coin(text, problem):
    """The coin of the drills, after a while in which nothing is computed.

    A signal takes a second to reach all.
    """
    time.sleep(0.25)
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2 == 0


def unable_to_judge_aggregation(text, problem):
    """For scripted traces of which those of aggregation say "right"."""
    return {"left": 0}[text.split("=")[0]]
