"""What does the decode program of a 4B run do on a TPU? Compiled for a slice that need not exist,
read from its HLO.

    pip install -r requirements-plan.txt
    python -m benchmarks.decode_tpu --topology=v5p:2x2x2 --json=docs/decode_tpu.json

Reports, for the program of all slot classes of `configs/qwen3_4b.py` on one chip:
  copies      arrays in HBM as large as the smallest cache or weight that the program copies or gathers, beside its
              arguments
  temporary   memory beside the arguments, as a share of them; the bar is 5 %
  bytes       that one decode step reads and writes in HBM, against weights + allocated keys and values; the bar is 1.3
"""

from __future__ import annotations

import json
import math
import pathlib
from collections import Counter

import jax
from absl import app, flags

from benchmarks.machine import machine
from configs import qwen3_4b
from spiral_jax.planning.compiled import compile_kept
from spiral_jax.planning.fit import make_mesh
from spiral_jax.planning.hlo import Module, parse
from spiral_jax.planning.inventory import Run
from spiral_jax.planning.profile import unit_and_call
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import find_topology

TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x2", "a TPU slice that libtpu knows")
JSON = flags.DEFINE_string("json", None, "file that gets the report")

MOVES = (
    "copy",
    "copy-start",
    "transpose",
    "all-gather",
    "all-gather-start",
    "all-to-all",
    "collective-permute",
)


def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    c, topology = qwen3_4b.get_config(), find_topology(TOPOLOGY.value)
    c.batch.search_groups = c.batch.aggregation_groups = 256  # not looked at; the mesh divides them
    run = Run(c, planned_model(c)[0], make_mesh(c, topology))
    program = run.decode_program()
    compiled = compile_kept(program.lower(), topology.name)
    module = parse(compiled.text)
    step, _ = unit_and_call(module, program.unit_loop, program.passes)
    on_chip = [
        leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves([run.decode_weights, run.caches])
    ]
    report = {
        "machine": machine(),
        "topology": topology.name,
        "classes": [list(row) for row in c.sampling.classes],
        "compile_seconds": round(compiled.seconds),
        "copies": copies(
            module, min(math.prod(shape) for shape in on_chip if len(shape) > 1 and min(shape) > 64)
        ),
        "argument_gb": compiled.arguments / 1e9,
        "temporary_share": compiled.temporary / compiled.arguments,
        "aliased_gb": compiled.aliased / 1e9,
        "weights_and_caches_gb": program.ideal_hbm_bytes / 1e9,
        "step_gb": step.hbm_bytes / 1e9,
        "step_over_ideal": step.hbm_bytes / program.ideal_hbm_bytes,
    }
    print(json.dumps(report, indent=1))
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")


def copies(module: Module, smallest: int) -> dict[str, int]:
    """How often the program moves an array of at least `smallest` elements to HBM, by operation and
    shape.
    """
    found = Counter(
        f"{one.operation} {one.arrays[0].dtype}{list(one.arrays[0].shape)}"
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if one.operation in MOVES
        and math.prod(one.arrays[0].shape) >= smallest
        and not one.arrays[0].on_chip  # read ahead of its use: no other array in HBM
    )
    return dict(found)


if __name__ == "__main__":
    app.run(main)
