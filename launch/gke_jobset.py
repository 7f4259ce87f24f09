"""Fills in launch/gke_jobset.yaml and applies it with kubectl; `--dry_run` prints it instead.

    python launch/gke_jobset.py [--dry_run] --name=N --slice=v5e:8x8 --image=I --claim=C
        [--restarts=20] -- TRAIN_FLAGS...

Needs Python's library alone.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import string
import subprocess
import sys

TEMPLATE = pathlib.Path(__file__).with_suffix(".yaml")
CHIPS_PER_HOST = 4  # of every slice with more than one host
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}


def render(name: str, slice: str, image: str, claim: str, restarts: int, args: list[str]) -> str:
    """The JobSet as YAML.

    Args:
      slice: "v5e:8x8" or "v5p:4x4x4"; of more than one host.
      args: of spiral_jax.train.

    Raises:
      ValueError: a slice that GKE does not have, or a name that Kubernetes does not take.
    """
    kind, _, topology = slice.partition(":")
    sizes = [int(size) for size in topology.split("x") if size.isdecimal()]
    is_known = kind in ACCELERATORS and len(sizes) == DIMENSIONS[kind]
    if not is_known or "x".join(map(str, sizes)) != topology:
        known = ", ".join(f"{kind}:{'x'.join('NNN'[:n])}" for kind, n in DIMENSIONS.items())
        raise ValueError(f"--slice={slice}: must be one of {known}, with a number for each N.")
    chips = math.prod(sizes)
    if chips % CHIPS_PER_HOST or chips <= CHIPS_PER_HOST:
        raise ValueError(
            f"--slice={slice}: {chips} chips are no whole hosts of {CHIPS_PER_HOST}, two or more."
        )
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"--name={name}: must be small letters, digits and hyphens, at most 40, a letter first."
        )
    return string.Template(TEMPLATE.read_text()).substitute(
        name=name,
        restarts=restarts,
        hosts=chips // CHIPS_PER_HOST,
        accelerator=ACCELERATORS[kind],
        topology=topology,
        image=json.dumps(image),
        args=json.dumps(args),
        chips_per_host=CHIPS_PER_HOST,
        claim=claim,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry_run", action="store_true")
    for name in ("name", "slice", "image", "claim"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("args", nargs="*", metavar="TRAIN_FLAG")
    asked = vars(parser.parse_args())
    dry_run = asked.pop("dry_run")
    try:
        text = render(**asked)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if dry_run:
        print(text, end="")
    else:
        sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode)


if __name__ == "__main__":
    main()
