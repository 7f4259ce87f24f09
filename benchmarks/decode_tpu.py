"""What does the decode program of a 4B run do on a TPU? Read from its HLO.

It is compiled for a slice that need not exist.

    pip install ".[plan]"
    python -m benchmarks.decode_tpu --topology=v5p:2x2x2 --json=docs/decode_tpu.json

Reports, for the program of all slot classes of `configs/qwen3_4b.py` on one chip:
  copies      arrays in HBM as large as the smallest cache or weight that the program copies or
              gathers, beside its arguments
  temporary   memory beside the arguments, as a share of them; the bar is 5 %
  bytes       that one decode step reads and writes in HBM, against weights + allocated keys and
              values; the bar is 1.3
"""

from __future__ import annotations

import json
import math
import pathlib
from collections import Counter
from typing import Any

import jax
from absl import app, flags

from benchmarks.machine import machine
from configs import qwen3_4b
from spiral_jax.planning.compiled import compile_kept
from spiral_jax.planning.hlo import Module, parse
from spiral_jax.planning.inventory import take_inventory
from spiral_jax.planning.planned_program import decode_program
from spiral_jax.planning.profile import unit_and_call
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import find_topology, make_mesh

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
    model, _ = planned_model(c.model, topology.devices)
    inventory = take_inventory(c, model, make_mesh(c.mesh, topology))
    program = decode_program(inventory)
    compiled = compile_kept(program.lower(), topology.name)
    module = parse(compiled.text)
    step, _ = unit_and_call(module, program.unit_loop, program.passes)
    report = {
        "machine": machine(),
        "topology": topology.name,
        "classes": [list(row) for row in c.sampling.classes],
        "compile_seconds": round(compiled.seconds),
        "copies": copies(module, smallest_array([inventory.decode_weights, inventory.caches])),
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


def smallest_array(tree: Any) -> int:
    """Elements of the smallest cache or matrix of a tree of shapes, on one chip."""
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree)]
    return min(math.prod(shape) for shape in shapes if len(shape) > 1 and min(shape) > 64)


def copies(module: Module, smallest: int) -> dict[str, int]:
    """How often the program moves an array to HBM, by operation and shape.

    Args:
      smallest: elements of the arrays that count, at least.
    """
    counts = Counter()
    for instruction in module.instructions():
        if instruction.operation not in MOVES:
            continue
        array = instruction.arrays[0]
        # one on the chip is read ahead of its use: no other array in HBM
        if math.prod(array.shape) >= smallest and not array.on_chip:
            counts[f"{instruction.operation} {array.dtype}{list(array.shape)}"] += 1
    return dict(counts)


if __name__ == "__main__":
    app.run(main)
